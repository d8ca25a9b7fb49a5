"""What a run writes down: of each decision, of each evaluation, and for the Trainer's log."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from .apply.plan import BatchPlan
from .decide.criteria import TestResult
from .measure.moments import GradientMoments


if TYPE_CHECKING:
    from .run import AdaptiveRun


def decision_record(
    run: AdaptiveRun,
    moments: GradientMoments | None,
    test: TestResult | None,
    *,
    loss: float,
    learning_rate: float,
) -> dict[str, Any]:
    """The record of the decision after the step in hand.

    Args:
        run: The run, its next plan in force.
        moments: What the step measured; None if it could not be measured.
        test: The test of it.
        loss: The step's loss.
        learning_rate: The step's learning rate.

    Returns:
        Values for the fields of a record.
    """
    assert run.step is not None
    clock, noise, samples = run.clock, run.estimator.estimate(), run.step_samples
    return {
        "step": clock.steps + 1,
        "epoch": clock.epoch_after(samples),
        "samples_seen": clock.samples_seen + samples,
        "tokens_seen": clock.tokens_seen + run.step.tokens,
        "loss": loss,
        "learning_rate": learning_rate,
        **_plan_values(run.step.plan),
        "step_samples": samples,
        "workers": moments.workers if moments else None,
        "small_sq_norm": moments.small_sq_norm if moments else None,
        "big_sq_norm": moments.big_sq_norm if moments else None,
        "noise_trace": noise.noise_trace,
        "grad_sq_norm": noise.grad_sq_norm,
        "noise_scale": noise.noise_scale,
        "noise_scale_error": noise.noise_scale_error,
        "norm_test": run.norm_test,
        "threshold": test.threshold if test else None,
        "next_global_batch_size": run.plan.global_batch_size,
        "reason": run.reason,
    }


def evaluation_record(run: AdaptiveRun, metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The record of an evaluation.

    Args:
        run: The run, between two steps or at its end.
        metrics: As the Trainer logs them.

    Returns:
        Values for the fields of an evaluation.
    """
    return {
        "step": run.clock.steps,
        "samples_seen": run.clock.samples_seen,
        "tokens_seen": run.clock.tokens_seen,
        "seconds": run.seconds,
        "global_batch_size": run.plan.global_batch_size,
        "metrics": {k: v for k, v in metrics.items() if isinstance(v, (int, float))},
    }


def log_values(run: AdaptiveRun) -> dict[str, float | str]:
    """What goes into the Trainer's log; a value that is not measurable is left out.

    Args:
        run: The run.

    Returns:
        Values by their names in the log.
    """
    noise = run.estimator.estimate()
    values: dict[str, float | str | None] = {
        **_plan_values(run.step.plan if run.step else run.plan),
        "samples_seen": run.clock.samples_seen,
        "tokens_seen": run.clock.tokens_seen,
        "noise_scale": noise.noise_scale,
        "noise_trace": noise.noise_trace if noise.updates else None,
        "grad_sq_norm": noise.grad_sq_norm if noise.updates else None,
        "norm_test": run.norm_test,
        "reason": run.reason,
        "skipped_steps": run.skipped_steps or None,
    }
    return {f"adaptive_batch/{name}": v for name, v in values.items() if v is not None}


def _plan_values(plan: BatchPlan) -> dict[str, int]:
    return {"global_batch_size": plan.global_batch_size, **asdict(plan)}
