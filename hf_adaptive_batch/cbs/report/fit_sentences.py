"""What a report of fits shows and does not show, in sentences."""

from __future__ import annotations

import math

from ..scaling_law import ScalingLaw
from ..steps_to_target import FitFlag
from .fit_laws import VARIABLES, FittedSweep, LawPrediction, LawSensitivity, values_of
from .fit_report import FitReport
from .quantities import compact, share


NOISE_SCALE = (
    "The noise scale tr(Sigma)/|G|^2 is read from gradients while training. It is a predictor, and "
    "another quantity than the critical batch size, which is measured from whole runs."
)


def definition(report: FitReport) -> str:
    """How the critical batch size of a report is defined.

    Args:
        report: The report.

    Returns:
        A sentence.
    """
    constants = list(dict.fromkeys((each.overhead, each.reference) for each in report.sweeps))
    words = [f"from {compact(start)} sequences by {share(over)}" for over, start in constants]
    return (
        "Critical batch size: the batch whose steps to the target loss exceed linear scaling "
        f"{'; or '.join(words)}."
    )


def findings(report: FitReport) -> list[str]:
    """What was measured.

    Args:
        report: The report.

    Returns:
        Sentences.
    """
    found = [each for each in report.sweeps if each.is_finite]
    sentences = [_sweep(each) for each in found] if len(found) < 3 else [_range(found)]
    sentences += [law_sentence(name, law) for name, law in report.laws.items()]
    sentences += [_prediction(each, report.confidence) for each in report.predictions]
    if report.sensitivity is not None:
        sentences.append(_sensitivity(report.sensitivity))
    return [*sentences, *_noise(report)]


def limits(report: FitReport) -> list[str]:
    """What a reader of the numbers has to know.

    Args:
        report: The report.

    Returns:
        Sentences.
    """
    sentences = [_unfitted(each) for each in report.sweeps if each.fit is None]
    for flag in FitFlag:
        names = [
            each.sweep.name
            for each in report.sweeps
            if each.critical and flag in each.critical.flags
        ]
        if names:
            sentences.append(f"{', '.join(names)}: {flag}.")
    sentences += [
        f"{each.sweep.name}, not reached: {_bounds(each)}."
        for each in report.sweeps
        if each.fit is not None and each.bounds
    ]
    sentences += _comparable(report)
    sentences += report.reasons
    if report.laws:
        sentences.append(
            "The laws take each critical batch size as exact: its own interval is not in theirs."
        )
        sentences += _along_a_line(report)
    return sentences


def law_sentence(name: str, law: ScalingLaw) -> str:
    """A law with its units.

    Args:
        name: N, D or ND.
        law: The law.

    Returns:
        A sentence.
    """
    powers = [f"{n}^{p:.3f}" for n, p in zip(law.names, law.exponents, strict=True)]
    units = [f"{n} in {VARIABLES[n]}" for n in law.names]
    ends = [f"{low:.3f} to {high:.3f}" for low, high in law.exponent_intervals]
    exponent = "the exponent" if len(powers) == 1 else "the exponents"
    return (
        f"Critical batch size = {law.coefficient:#.4g} {' '.join(powers)} sequences, "
        f"{', '.join(units)}. {share(law.confidence)} interval of {exponent}: "
        f"{' and '.join(ends)}, from {len(law.y)} sweeps."
    )


def _range(found: list[FittedSweep]) -> str:
    sizes = sorted((float(each.critical), each.sweep.name) for each in found if each.critical)
    (low, first), (high, last) = sizes[0], sizes[-1]
    return f"Critical batch sizes go from {compact(low)} ({first}) to {compact(high)} ({last})."


def _sweep(each: FittedSweep) -> str:
    fit, critical = each.fit, each.critical
    assert fit is not None
    assert critical is not None
    tokens = "" if critical.tokens is None else f", {compact(critical.tokens)} tokens"
    low, high = critical.interval
    return (
        f"{each.sweep.name}: critical batch size {compact(critical.sequences)} sequences{tokens}; "
        f"{share(critical.confidence)} interval {compact(low)} to {compact(high)} sequences. The "
        f"knee of the trade-off, where steps and sequences are both twice their least, lies at "
        f"{compact(fit.knee)}."
    )


def _prediction(each: LawPrediction, confidence: float) -> str:
    what = {"N": "parameters", "D": "tokens"}[each.variable]
    value, (low, high), beyond = vars(each.prediction).values()
    outside = f", {beyond:.3g} times beyond what was measured" if beyond > 1 else ""
    return (
        f"At {compact(each.at)} {what} the law says {compact(value)} sequences "
        f"({share(confidence)} interval of a new measurement {compact(low)} to {compact(high)})"
        f"{outside}."
    )


def _sensitivity(found: LawSensitivity) -> str:
    rows = sorted(found.rows, key=lambda row: row.law.exponent)
    ends = [
        f"{row.law.exponent:.3f} ({share(row.overhead)} from {compact(row.reference)} sequences)"
        for row in (rows[0], rows[-1])
    ]
    knee = ""
    if found.knee is not None:
        knee = f" The knee of the same fits grows as {found.variable}^{found.knee.exponent:.3f}."
    return (
        f"The exponent of {found.variable} depends on the definition: from the same runs it is "
        f"{ends[0]} to {ends[1]}.{knee}"
    )


def _noise(report: FitReport) -> list[str]:
    sentences = []
    for each in report.sweeps:
        scales = list(each.sweep.noise_scales().values())
        if not scales:
            continue
        text = f"{each.sweep.name}: the noise scale of the same runs was {compact(min(scales))}"
        text += f" to {compact(max(scales))} sequences" if len(scales) > 1 else " sequences"
        if each.is_finite and each.critical is not None:
            ratio = float(each.critical) / math.exp(math.fsum(map(math.log, scales)) / len(scales))
            text += f"; the critical batch size is {compact(ratio)} times its geometric mean"
        sentences.append(f"{text}.")
    return sentences


def _unfitted(each: FittedSweep) -> str:
    bounds = f" Bounds: {_bounds(each)}." if each.bounds else ""
    return f"{each.sweep.name} is not fitted: {each.error}{bounds}"


def _bounds(each: FittedSweep) -> str:
    """By batch size, what is true of all its runs that did not get there."""
    words = []
    for size in dict.fromkeys(bound.batch_size for bound in each.bounds):
        known = [bound.more_than_steps for bound in each.bounds if bound.batch_size == size]
        runs = sum(run.chosen and run.batch_size == size for run in each.sweep.runs)
        more = f"more than {compact(min(known))} steps" if min(known) else "more steps than trained"
        words.append(f"a batch of {compact(size)} takes {more} ({len(known)} of {runs} runs)")
    return ", ".join(words)


def _comparable(report: FitReport) -> list[str]:
    found = [each for each in report.sweeps if each.fit is not None]
    sentences = []
    if len({(each.overhead, each.reference) for each in found}) > 1:
        sentences.append(
            "The sweeps have different definitions of the critical batch size, so that their "
            "numbers cannot be compared; give --overhead and --reference."
        )
    if len({each.sweep.tokens_per_sequence for each in found}) > 1:
        sentences.append(
            "The sweeps have sequences of different or unknown length, and the laws count "
            "sequences: compare the sizes in tokens."
        )
    return sentences


def _along_a_line(report: FitReport) -> list[str]:
    """N and D that grow together leave each law with both their doing."""
    pairs = [values_of(each, "ND") for each in report.sweeps if each.is_finite]
    known = [pair for pair in pairs if pair is not None]
    if "ND" in report.laws or any(len({p[i] for p in known}) < 2 for i in (0, 1)):
        return []
    return [
        "N and D both differ between these sweeps. A law of one of them holds along their line "
        "only, and does not say what N does at a fixed D."
    ]
