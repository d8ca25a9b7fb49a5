"""What a comparison shows and what it does not: each sentence only what its numbers carry."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from .comparison import Comparison, Contender, Row


def shown(comparison: Comparison) -> list[str]:
    """What came out: the differences to the baseline, and who reached the target.

    Args:
        comparison: The comparison.

    Returns:
        Sentences.
    """
    rows = comparison.rows()
    return [
        *(_outcome(row, rows[0]) for row in rows[1:]),
        *_diverged_baseline(rows[0]),
        *_target(comparison, rows),
    ]


def limits(comparison: Comparison) -> list[str]:
    """What the numbers do not carry, or only with a reservation.

    Args:
        comparison: The comparison.

    Returns:
        Sentences.
    """
    return [
        *_learning_rates(comparison.contenders),
        *_amounts(comparison.contenders),
        *_missing(comparison),
        *_limits(comparison, comparison.rows()),
    ]


def _outcome(row: Row, base: Row) -> str:
    """Where a contender ended, against the baseline."""
    if row.diverged:
        which = "its run" if row.seeds == 1 else f"{row.diverged} of its {row.seeds} runs"
        return f"{row.name} diverged: the final validation loss of {which} is not finite."
    found = row.difference
    if found is None:
        return (
            f"{row.name} cannot be compared with {base.name}: they have no seed in common of which "
            "both runs ended with a finite loss."
        )
    steps = _steps(row.steps, base.steps)
    where = f"{_loss(abs(found.mean))} {'above' if found.mean > 0 else 'below'}"
    if found.mean == 0:
        where = "exactly as low as"
    if found.low is None or found.high is None:
        return (
            f"{row.name} ended {where} {base.name} in final validation loss with one seed: no "
            f"statement about chance is possible. It took {steps}."
        )
    seeds = f"over {found.seeds} seeds"
    if found.is_clear:
        ends = sorted((abs(found.low), abs(found.high)))
        return (
            f"{row.name} ended {where} {base.name} in final validation loss (95 % interval "
            f"{_loss(ends[0])} to {_loss(ends[1])} {seeds}, paired), in {steps}."
        )
    if found.low == found.high:
        return f"{row.name} ended exactly where {base.name} did, {seeds}, in {steps}."
    return (
        f"{row.name} cannot be told apart from {base.name} in final validation loss: it ended "
        f"{where} it, but the 95 % interval is from {_loss(-found.low)} below to "
        f"{_loss(found.high)} above {seeds}, paired. It took {steps}."
    )


def _diverged_baseline(base: Row) -> Iterator[str]:
    if base.diverged:
        which = "its run" if base.seeds == 1 else f"{base.diverged} of its {base.seeds} runs"
        yield (
            f"{base.name}, the baseline, diverged: the final validation loss of {which} is not "
            "finite."
        )


def _target(comparison: Comparison, rows: Sequence[Row]) -> Iterator[str]:
    target, base = comparison.target_loss, rows[0]
    if not math.isfinite(target):
        return
    source = "" if comparison.target_given else f" (the highest final one of {base.name})"
    named = f"the target validation loss of {_loss(target)}{source}"
    for row in rows:
        if row.steps_to_target is not None:
            steps = f"{row.steps_to_target:,.0f} steps"
            yield f"{row.name} reached {named} in {steps}{_relative(row, base)}."
        elif row.reached:
            yield f"{row.name} reached {named} in only {row.reached} of {row.seeds} runs."
    missed = [row.name for row in rows if not row.reached]
    if missed:
        yield f"{_listed(missed)} did not reach {named}."


def _relative(row: Row, base: Row) -> str:
    if row is base:
        return ""
    if base.steps_to_target:
        than = f"the {base.steps_to_target:,.0f} of {base.name}"
        share = 1 - row.steps_to_target / base.steps_to_target  # type: ignore[operator]
    else:
        than = f"the {base.steps:,.0f} that {base.name} trained for in all"
        share = 1 - row.steps_to_target / base.steps  # type: ignore[operator]
    if abs(share) < 0.005:
        return f", about as many as {than}"
    return f", {100 * abs(share):.0f} % {'fewer' if share > 0 else 'more'} than {than}"


def _learning_rates(contenders: Sequence[Contender]) -> Iterator[str]:
    tuned = [contender for contender in contenders if len(contender.tried) > 1]
    for word, end in (("smallest", min), ("largest", max)):
        at_end = [c for c in tuned if c.learning_rate == end(c.tried)]
        if at_end:
            chosen = _listed([f"{c.name} ({c.learning_rate:g})" for c in at_end])
            yield (
                f"The learning rate chosen is the {word} of those tried for {chosen}: a better one "
                "may lie beyond."
            )
    if not tuned:
        yield (
            "Learning rates were not tuned: a difference may be one of how well the learning rate "
            "fits a schedule, instead of the schedules themselves."
        )
    elif len(tuned) < len(contenders):
        names = _listed([c.name for c in contenders if len(c.tried) < 2])
        yield (
            f"The learning rate was not tuned for {names}, but was for the others: that favours "
            "those."
        )
    if len({len(contender.tried) for contender in tuned}) > 1:
        counts = _listed([f"{len(contender.tried)} for {contender.name}" for contender in tuned])
        yield f"Different numbers of learning rates were tried: {counts}. More favour a schedule."
    overlap = sorted({s for c in tuned for s in set(c.tuning_seeds) & set(c.seeds)})
    if overlap:
        seeds = f"seed{'s' * (len(overlap) > 1)} {_listed([str(seed) for seed in overlap])}"
        yield (
            f"Learning rates were chosen by the final validation loss of {seeds}, also among those "
            "averaged: the mean losses of tuned schedules tend to be slightly too low for it."
        )


def _amounts(contenders: Sequence[Contender]) -> Iterator[str]:
    """Whether all trained on as much: samples alike, or tokens within a step."""
    runs = [run for contender in contenders for run in contender.runs]
    samples, tokens = {run.samples for run in runs}, [run.tokens for run in runs]
    step = 0.0
    for run in runs:
        sizes = [size for size in run.records.get("global_batch_size", ()) if size is not None]
        largest = max([*sizes, run.average_batch_size or 0])
        step = max(step, largest * run.tokens / max(run.samples, 1))
    far_apart = max(tokens) - min(tokens) > step
    if len(samples) == 1 and not far_apart:
        return
    if far_apart or not any(tokens):
        of_tokens = f" and {min(tokens):,} to {max(tokens):,} tokens" if any(tokens) else ""
        yield (
            f"The runs did not train on as much as one another: {min(samples):,} to "
            f"{max(samples):,} samples{of_tokens}. Differences in loss are also ones of that."
        )
    else:
        yield (
            f"The runs trained on the same number of tokens within one step ({min(tokens):,} to "
            f"{max(tokens):,}), and on {min(samples):,} to {max(samples):,} samples."
        )


def _missing(comparison: Comparison) -> Iterator[str]:
    if comparison.failed:
        count = len(comparison.failed)
        runs = "1 run failed and is" if count == 1 else f"{count} runs failed and are"
        yield f"{runs} missing from the numbers: {'; '.join(comparison.failed)}."
    seeds = {tuple(sorted(contender.seeds)) for contender in comparison.contenders}
    if len(seeds) > 1:
        yield (
            "The contenders do not have the same seeds: their means are not over the same runs, "
            "but the differences to the baseline are over common seeds."
        )
    if len(comparison.versions) > 1:
        yield (
            "Runs were made with different versions of the software: "
            f"{'; '.join(comparison.versions)}."
        )


def _limits(comparison: Comparison, rows: Sequence[Row]) -> Iterator[str]:
    intervals = [row for row in rows if row.difference and row.difference.low is not None]
    if len(intervals) > 1:
        yield (
            f"The {len(intervals)} intervals hold 95 % each, and are not corrected for being "
            "several: the more contenders, the likelier that one leaves out 0 by chance."
        )
    if any(row.reached for row in rows):
        yield "Steps to the target are interpolated between the evaluations around it."
    if any(row.seconds is not None for row in rows):
        yield _seconds(comparison)
    yield "Nothing is said about other models, other data or other budgets."


def _seconds(comparison: Comparison) -> str:
    jobs = list(comparison.jobs)
    at_a_time = "one job" if jobs == [1] else f"{' or '.join(map(str, jobs))} jobs"
    effects = ["slow one another down"] * (jobs != [1]) + ["differ between runs"] * (len(jobs) > 1)
    of_jobs = f", which {' and '.join(effects)}" if effects else ""
    where = "on this machine"
    if len(comparison.machines) > 1:
        where = f"on different machines, and cannot be compared ({'; '.join(comparison.machines)})"
    return (
        f"Seconds are of training with {at_a_time} at a time{of_jobs}, {where}; they include no "
        "evaluation and no saving."
    )


def _steps(steps: float, base: float) -> str:
    saved = 1 - steps / base
    if steps == base:
        return f"the same number of steps ({steps:,.0f})"
    if abs(saved) < 0.005:
        return f"about as many steps ({steps:,.0f} against {base:,.0f})"
    digits = 1 if saved > 0.99 else 0  # 99.7 % fewer is not all of them
    share = f"{abs(saved) * 100:.{digits}f}"
    word = "fewer" if saved > 0 else "more"
    return f"{share} % {word} steps ({steps:,.0f} against {base:,.0f})"


def _loss(value: float) -> str:
    """Four digits after the point, or as many as it takes to differ from 0."""
    return f"{value:.4f}" if value == 0 or abs(value) >= 1e-3 else f"{value:.2g}"


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
