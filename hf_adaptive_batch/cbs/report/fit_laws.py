"""What several sweeps say together: laws, their sensitivity, predictions, a schedule."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..critical import CriticalBatchSize
from ..scaling_law import (
    Prediction,
    ScalingLaw,
    Space,
    fit_power_law,
    predict,
)
from ..schedule import ScheduleLaw, schedule_law
from ..sensitivity import Sensitivity, law_sensitivity
from ..steps_to_target import FitFlag, NotReached, StepsToTargetFit
from ..sweep_result import Sweep


# Laws are fitted in these units, as Zhang et al. (arXiv 2410.21676) write theirs.
MILLION = 1e6
VARIABLES = {"N": "millions of parameters", "D": "millions of tokens"}
_OVERHEADS = (0.1, 0.2, 0.5, 1.0)
_ANOTHER = (
    "critical batch sizes of different definitions are no values of one quantity; give --overhead "
    "and --reference."
)


@dataclass(frozen=True, kw_only=True)
class FittedSweep:
    """A sweep, and what its fit says or why there is none.

    Attributes:
        sweep: As it was measured.
        overhead: Of the definition that was asked for.
        reference: Of the definition that was asked for, in sequences.
        fit: Of steps to the target; None if it cannot be fitted.
        critical: By that definition; None likewise.
        error: Why there is no fit; empty if there is one.
    """

    sweep: Sweep
    overhead: float
    reference: float
    fit: StepsToTargetFit | None = None
    critical: CriticalBatchSize | None = None
    error: str = ""

    @property
    def bounds(self) -> list[NotReached]:
        """Chosen runs that did not reach the target, by batch size."""
        chosen = [run for run in self.sweep.runs if run.chosen]
        return sorted(
            NotReached(run.batch_size, run.trained_steps or 0.0)
            for run in chosen
            if run.steps is None or not math.isfinite(run.steps)
        )

    @property
    def is_finite(self) -> bool:
        """Whether it has a critical batch size that a law can be fitted to."""
        return self.critical is not None and math.isfinite(self.critical.sequences)


@dataclass(frozen=True, kw_only=True)
class LawPrediction:
    """A law's value where it was asked for.

    Attributes:
        variable: N or D.
        at: Parameters or tokens.
        prediction: In sequences, with the interval of a new measurement.
    """

    variable: str
    at: float
    prediction: Prediction


@dataclass(frozen=True, kw_only=True)
class LawSensitivity:
    """How the exponent follows the two constants of the definition.

    Attributes:
        variable: N or D.
        rows: One for each pair of constants, overheads slowest.
        knee: The law of the knees of the same fits; None where one of them has none.
    """

    variable: str
    rows: tuple[Sensitivity, ...]
    knee: ScalingLaw | None


def values_of(each: FittedSweep, variables: str) -> tuple[float, ...] | None:
    """N, D or both of a sweep in the units of the laws.

    Args:
        each: The sweep.
        variables: "N", "D" or "ND".

    Returns:
        The numbers; None where one is not known.
    """
    known = {"N": each.sweep.parameters, "D": each.sweep.tokens}
    values = [known[variable] for variable in variables]
    return None if None in values else tuple(v / MILLION for v in values if v is not None)


def fit_laws(
    sweeps: Sequence[FittedSweep], confidence: float, space: Space
) -> tuple[dict[str, ScalingLaw], list[str]]:
    """Fit critical batch sizes in sequences against N, D, and both.

    Args:
        sweeps: All of the report.
        confidence: Of the intervals.
        space: As for `fit_power_law`.

    Returns:
        Laws by "N", "D" and "ND"; and a sentence for each that cannot be told.
    """
    if len(sweeps) < 3:
        return {}, ["A law takes three sweeps or more that differ in N or D."]
    if not _is_one_definition(sweeps):
        return {}, [f"No law: {_ANOTHER}"]
    laws, reasons = {}, []
    for variables in ("N", "D", "ND"):
        found = [(values_of(each, variables), each) for each in sweeps if each.is_finite]
        x = [values for values, _ in found if values is not None]
        y = [
            each.critical.sequences
            for values, each in found
            if values is not None and each.critical is not None
        ]
        least = len(variables) + 2
        if len(x) < least:
            reasons.append(
                f"No law of {' and '.join(variables)}: it takes {least} sweeps with a finite "
                f"critical batch size and known {' and '.join(variables)}; there are {len(x)}."
            )
            continue
        try:
            laws[variables] = fit_power_law(
                x, y, names=[*variables], confidence=confidence, space=space
            )
        except ValueError as error:
            reasons.append(f"No law of {' and '.join(variables)}: {error}")
    return laws, reasons


def _is_one_definition(sweeps: Sequence[FittedSweep]) -> bool:
    return len({(each.overhead, each.reference) for each in sweeps if each.is_finite}) < 2


def sensitivity_of(
    sweeps: Sequence[FittedSweep], laws: dict[str, ScalingLaw], space: Space
) -> LawSensitivity | None:
    """Fit the law again with other constants, around those of the first sweep.

    Args:
        sweeps: All of the report.
        laws: That were fitted; that of D is taken if there is one.
        space: As for `fit_power_law`.

    Returns:
        The laws; None if there is none.
    """
    variable = next((name for name in ("D", "N") if name in laws), None)
    if variable is None:
        return None
    used = [each for each in sweeps if each.is_finite and values_of(each, variable)]
    x = [values_of(each, variable) or () for each in used]
    fits = [each.fit for each in used if each.fit is not None]
    overhead, reference = used[0].overhead, used[0].reference
    # Linear scaling from a batch that was not measured is a second extrapolation.
    least = max(fit.measurements[0].batch_size for fit in fits)
    most = min(fit.measurements[-1].batch_size for fit in fits)
    around = [min(max(each, least), most) for each in (reference / 4, 4 * reference)]
    rows = law_sensitivity(
        x,
        fits,
        overheads=sorted({*_OVERHEADS, overhead}),
        references=sorted({reference, *around}),
        space=space,
        names=[variable],
    )
    knee = None
    if all(fit.knee > 0 for fit in fits):
        knee = fit_power_law(x, [fit.knee for fit in fits], names=[variable], space=space)
    return LawSensitivity(variable=variable, rows=tuple(rows), knee=knee)


def predictions_of(
    laws: dict[str, ScalingLaw], parameters: Sequence[float], tokens: Sequence[float]
) -> tuple[list[LawPrediction], list[str]]:
    """The laws where they were asked for.

    Args:
        laws: By "N" and "D".
        parameters: Values of N.
        tokens: Values of D.

    Returns:
        The predictions; and a sentence for each variable without a law.
    """
    found, reasons = [], []
    for variable, values in (("N", parameters), ("D", tokens)):
        if values and variable not in laws:
            reasons.append(f"No prediction from {variable}: there is no law of it.")
            continue
        found += [
            LawPrediction(
                variable=variable, at=at, prediction=predict(laws[variable], at / MILLION)
            )
            for at in values
        ]
    return found, reasons


def schedule_of(sweeps: Sequence[FittedSweep]) -> tuple[ScheduleLaw | None, str]:
    """The law in tokens that `--batch_schedule cbs_law` follows.

    Args:
        sweeps: All of the report.

    Returns:
        The law, and the sentence on where its exponent is from; or None, and why.
    """
    used = [
        (each, each.critical)
        for each in sweeps
        if each.is_finite and each.sweep.tokens and each.critical and each.critical.tokens
    ]
    if not _is_one_definition([each for each, _ in used]):
        return None, f"No schedule: {_ANOTHER}"
    tokens = [each.sweep.tokens or 0.0 for each, _ in used]
    if not tokens:
        return None, (
            "No schedule: no sweep has a finite critical batch size, its D in tokens and the "
            "tokens of a sequence; give --tokens and --tokens_per_sequence if you know them."
        )
    try:
        law = schedule_law(tokens, [critical.tokens or 0.0 for _, critical in used])
    except ValueError as error:
        return None, f"No schedule: {error}"
    note = f"Its exponent was measured, by {len(tokens)} sweeps."
    if law.fitted is None:
        note = (
            "With fewer than three sweeps that differ in D, the exponent is the published one "
            f"({law.exponent:g}, Zhang et al. 2025), an assumption."
        )
    doubtful = {FitFlag.EXTRAPOLATED, FitFlag.OPEN_INTERVAL}
    names = [each.sweep.name for each, critical in used if doubtful & {*critical.flags}]
    if names:
        note += f" It rests on critical batch sizes that were not bracketed: {', '.join(names)}."
    return law, note
