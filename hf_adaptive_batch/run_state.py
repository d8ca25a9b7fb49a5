"""The state of a run as plain JSON, and a run set to it."""

import logging
from dataclasses import asdict
from typing import Any

from .apply.clock import TrainingClock
from .apply.plan import BatchPlan
from .decide.controllers import BatchDecision, Reason
from .run import AdaptiveRun


logger = logging.getLogger(__name__)


def state_of(run: AdaptiveRun) -> dict[str, Any]:
    """What a run needs to go on; to be called on all ranks.

    Args:
        run: The run, between two steps.

    Returns:
        Plain JSON.
    """
    return {
        "seed": run.seed,
        "clock": run.clock.state_dict(),
        "loader": run.loader.state_dict(),
        "estimator": run.estimator.state_dict(),
        "plan": asdict(run.plan),
        "skipped_steps": run.skipped_steps,
        "norm_test": run.norm_test,
        "reason": run.reason,
    }


def restore(run: AdaptiveRun, state: dict[str, Any], *, anew: bool = False) -> None:
    """Set a run to a state; what it was configured with stays, within its bounds.

    Args:
        run: A run at its beginning.
        state: From `state_of`.
        anew: Begin the epoch of a stream at its beginning, instead of at the place in it.

    Raises:
        ValueError: If the data are not the checkpoint's, or ranks resume different ones.
    """
    if state["seed"] != run.seed and not run.loader.source.is_stream:
        raise ValueError(
            f"seed, or data_seed, ({run.seed}) must be that of the checkpoint ({state['seed']}), "
            "because the order of the epochs to come depends on it; pass the same one."
        )
    saved = BatchPlan(**state["plan"])
    run.clock.load_state_dict(state["clock"])
    plan = run.scheduled_plan() or _resumed_plan(run, saved)
    run.loader.set_plan(plan)
    loader = state["loader"]
    if plan != saved:  # what was fetched ahead was cut for it: too large, perhaps, for memory
        loader = {**loader, "pending": []}
    if not (anew and run.loader.source.is_stream):
        run.loader.load_state_dict(loader)
    run.estimator.load_state_dict(state["estimator"])
    run.skipped_steps = int(state["skipped_steps"])
    run.norm_test, run.reason = state["norm_test"], state["reason"]
    if run.ranks.is_first:  # said once
        _compare_budgets(run.clock, state["clock"]["budget"])
    rows = run.ranks.gather(run.clock.steps, run.clock.samples_seen)
    if any(row != rows[0] for row in rows):
        raise ValueError(
            f"resume_from_checkpoint (steps {[int(row[0]) for row in rows]} on the ranks) must be "
            "one checkpoint on all ranks, because they share every step; name one that every node "
            "has."
        )


def _resumed_plan(run: AdaptiveRun, saved: BatchPlan) -> BatchPlan:
    """The checkpoint's plan if the arguments allow it, else the nearest that they do."""
    first, cap = run.plan, run.plan.global_batch_size
    if run.controller.can_change:
        cap = getattr(run.controller, "max_global_batch_size", saved.global_batch_size)
    size = min(max(saved.global_batch_size, first.global_batch_size), cap)
    micro = first.micro_batch_size
    ladder = {micro}
    while 2 * micro <= (run.max_micro_batch_size or 0):
        micro *= 2
        ladder.add(micro)
    same_ranks = saved.data_parallel_size == first.data_parallel_size
    if size == saved.global_batch_size and saved.micro_batch_size in ladder and same_ranks:
        return saved
    if size == first.global_batch_size:
        return first
    return run.feasible(BatchDecision(global_batch_size=size, reason=Reason.FIXED))


def _compare_budgets(clock: TrainingClock, saved: str) -> None:
    """Say what became of the end of training."""
    if clock.budget != saved:
        logger.warning(
            "The budget is %s; it was %s in the checkpoint. A budget in steps or epochs counts the "
            "initial batch: micro-batch x accumulation x ranks.",
            clock.budget,
            saved,
        )
    if clock.finished:
        logger.warning(
            "Nothing is left to train on: the checkpoint has seen %s samples, and %s tokens, and "
            "the budget is %s. Raise it to go on.",
            f"{clock.samples_seen:,}",
            f"{clock.tokens_seen:,}",
            clock.budget,
        )
