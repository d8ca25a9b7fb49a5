"""Where measure, decide and apply meet: the library on one screen."""

from __future__ import annotations

import math
from collections.abc import Sequence

from .measure.moments import GradientMoments, MomentSums
from .run import AdaptiveRun


def adapt(
    run: AdaptiveRun,
    sums: MomentSums | None,
    loss: float,
    *,
    finite: bool,
    left_out: bool,
    learning_rate: float,
) -> bool:
    """Gradients -> moments -> test -> decision -> plan, after the step in hand.

    Args:
        run: The run; from here on the plan of its next step is in force.
        sums: What all processes saw of the step's gradients; None if it was not measured.
        loss: The step's loss, over all ranks.
        finite: Whether it is finite.
        left_out: Whether micro-batches without a target are not among the sums.
        learning_rate: The step's, for the record.

    Returns:
        Whether loss and gradients are finite.
    """
    moments = sums and GradientMoments.of_sums(
        sums,
        global_batch_size=run.step_samples,
        data_parallel_size=run.ranks.size,
        left_out=left_out,
    )
    finite = finite and (moments is None or moments.is_finite)
    if not finite:
        moments = None
    noise = run.estimator.update(moments) if moments else run.estimator.estimate()
    test = run.criterion.evaluate(moments, noise) if moments else None
    decision = run.agreed(run.controller.decide(run.observation(test, finite=finite)))
    before = run.plan
    run.loader.set_plan(run.feasible(decision))
    if sums or run.plan != before:
        run.record(moments, test, decision, loss=loss, learning_rate=learning_rate)
    return finite


def finish_step(
    run: AdaptiveRun, loss: float, sums: Sequence[float], *, learning_rate: float
) -> tuple[float, bool]:
    """Tell all processes what this one saw of the step in hand, and adapt to it.

    What follows from this one exchange is the same on all of them.

    Args:
        run: The run.
        loss: The step's loss on this process.
        sums: The probe's; empty if the step was not measured.
        learning_rate: The step's, for the record.

    Returns:
        The step's loss over all processes, and whether it and the gradients are finite.
    """
    step, ranks = run.step, run.ranks
    assert step is not None
    loss, tokens, *found = run.exchange(loss, step.tokens, *sums)
    loss /= ranks.processes
    step.tokens = round(tokens / ranks.copies)
    finite = math.isfinite(loss)
    if sums or run.open_loop:
        measured = MomentSums(*found) if sums else None
        left_out = measured is not None and (
            round(measured.workers) < len(step.micro_batches) * ranks.size
        )
        finite = adapt(
            run, measured, loss, finite=finite, left_out=left_out, learning_rate=learning_rate
        )
    return loss, finite
