"""From the arguments to the controller and to what is tested, checked against the run."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .apply.plan import BatchPlan
from .decide.controllers import (
    BatchController,
    FixedController,
    NormTestController,
    ScheduledController,
)
from .decide.criteria import Criterion, NoiseScaleTarget, NormTest
from .decide.schedule import BatchSchedule, LinearRamp, PowerLaw, Unit, check_cap
from .decide.seesaw import Seesaw
from .decide.stages import Duration, Stages, paper_stages, parse_stages
from .schedule_arguments import CLOSED_LOOP, SCHEDULES, ScheduleOptions


if TYPE_CHECKING:
    from .batch_options import BatchOptions


# Lau et al. cap batches that begin at 128-256 sequences at 8192 (from memory, not confirmed).
_DEFAULT_CAP_FACTOR = 32

# A budget in tokens is known as samples x mean tokens.
_ROUNDING = 1e-9


@dataclass(frozen=True, kw_only=True)
class Horizon:
    """What is known of a run when it begins; nothing when its arguments are made.

    Attributes:
        samples: The budget; None before the data are known.
        tokens_per_sample: Mean tokens of a sample; 0 if it has none.
        warmup_samples: Of the learning rate.
        epoch_samples: Of an epoch, which no step can exceed.
        learning_rate: The reference learning rate, by the share of the budget.
        total_steps: The budget in steps of the initial size, in which the reference is counted.
    """

    samples: float | None = None
    tokens_per_sample: float = 0.0
    warmup_samples: int = 0
    epoch_samples: int | None = None
    learning_rate: Callable[[float], float] | None = None
    total_steps: int = 0


def needs_tokens(args: ScheduleOptions) -> bool:
    """Whether the schedule counts in tokens."""
    if args.batch_schedule == "linear_ramp":
        return Duration.parse(args.ramp_length).unit is Unit.TOKENS
    if args.batch_schedule in SCHEDULES:
        return args.batch_schedule == "cbs_law"
    return parse_stages(args.batch_schedule).unit is Unit.TOKENS


def criterion_of(args: BatchOptions) -> Criterion:
    """What is tested after each measured step."""
    if args.batch_schedule == "noise_scale":
        return NoiseScaleTarget(args.noise_scale_factor)
    return NormTest(args.eta, args.norm_test_estimator)


def begin_schedule(
    args: BatchOptions, plan: BatchPlan, horizon: Horizon
) -> tuple[BatchController, BatchPlan]:
    """The controller that the arguments describe, and the plan of the first step.

    Args:
        args: The arguments.
        plan: That of `per_device_train_batch_size`, `gradient_accumulation_steps` and the ranks.
        horizon: What is known of the run.

    Returns:
        A `FixedController` where the batch cannot change, so that training equals the plain
        Trainer's; and the first plan, which only stages make differ from `plan`.
    """
    if args.batch_schedule == "constant":
        return FixedController(args.test_interval), plan
    if args.batch_schedule in CLOSED_LOOP:
        norm_test = NormTestController(
            initial_global_batch_size=plan.global_batch_size,
            max_global_batch_size=_cap(args, plan, horizon),
            test_interval=args.test_interval,
            warmup_samples=(
                horizon.warmup_samples
                if args.batch_warmup_samples is None
                else args.batch_warmup_samples
            ),
            max_growth_factor=args.max_growth_factor,
            monotone=not args.allow_smaller_batch,
        )
        return norm_test if norm_test.can_change else FixedController(args.test_interval), plan
    schedule = schedule_of(args, plan, horizon)
    cap = _cap(args, plan, horizon)
    if isinstance(schedule, Stages):
        cap = max(stage.size for stage in schedule.stages)
        plan = _nearest(args, plan, schedule.size_at(0), grows=not schedule.can_shrink)
    if not schedule.can_change:
        return FixedController(args.test_interval), plan
    controller = ScheduledController(
        schedule=schedule, max_global_batch_size=cap, test_interval=args.test_interval
    )
    return controller, plan


def schedule_of(args: BatchOptions, plan: BatchPlan, horizon: Horizon) -> BatchSchedule:
    """The open-loop schedule that the arguments name.

    Args:
        args: The arguments.
        plan: The initial plan of the arguments.
        horizon: What is known of the run.

    Returns:
        The schedule, in samples per step.

    Raises:
        ValueError: If it does not fit the budget, the data or the plan.
    """
    name, size, cap = args.batch_schedule, plan.global_batch_size, _cap(args, plan, horizon)
    if name in SCHEDULES:
        check_cap(size, cap)
    if horizon.samples is not None and needs_tokens(args) and not horizon.tokens_per_sample:
        raise ValueError(
            f"batch_schedule ({name!r}) must not count tokens, because there are none in the "
            "collated samples; count in samples, steps or %."
        )
    if name == "seesaw":
        falls = horizon.learning_rate or (lambda share: 1 - share)
        return Seesaw(
            reference=falls,
            first_size=size,
            max_size=cap,
            alpha=args.seesaw_alpha,
            corners=horizon.total_steps or 2**24,
        )
    if name == "cbs_law":
        tokens = horizon.tokens_per_sample or 1.0
        return PowerLaw(
            coefficient=args.cbs_coefficient / tokens,
            exponent=args.cbs_exponent,
            first_size=size,
            max_size=cap,
        )
    if name == "linear_ramp":
        length = Duration.parse(args.ramp_length)
        ramp = LinearRamp(first_size=size, last_size=cap, length=length.value, unit=length.unit)
        total = _budget(args, plan, ramp, length.value, horizon)
        if length.value > total * (1 + _ROUNDING):
            _refuse_beyond("ramp_length", args.ramp_length, length, total)
        return ramp
    if name == "stage_wise":
        return paper_stages(_four_times_feasible(args, plan, cap))
    stages = parse_stages(name)
    for stage in stages.stages:
        _check_stage(args, plan, stage.size, horizon, grows=not stages.can_shrink)
    last = Duration(stages.stages[-1].start, stages.unit)
    total = _budget(args, plan, stages, last.value, horizon)
    if last.value >= total * (1 - _ROUNDING):
        _refuse_beyond("batch_schedule", name, last, total)
    return stages


def _four_times_feasible(args: BatchOptions, plan: BatchPlan, cap: int) -> int:
    """The cap for stages of a quarter, a half and all; only one that nobody gave is rounded."""
    quarter = cap // 4
    if args.max_global_batch_size is None:
        least = plan.micro_batch_size * plan.data_parallel_size
        quarter = _nearest(args, plan, quarter, cap=max(quarter, least)).global_batch_size
        cap = min(cap, 4 * quarter)
    if cap % 4 or _nearest(args, plan, quarter).global_batch_size != quarter:
        raise ValueError(
            f"max_global_batch_size ({cap}) must be four times a feasible batch, because "
            "stage_wise begins with a quarter of it, of whole micro-batches on every rank; "
            "give another, of at most an epoch."
        )
    return cap


def _check_stage(
    args: BatchOptions, plan: BatchPlan, size: int, horizon: Horizon, *, grows: bool
) -> None:
    """What a user has written is not rounded."""
    nearest = _nearest(args, plan, size, grows=grows)
    if nearest.global_batch_size != size:
        whole = nearest.micro_batch_size * nearest.data_parallel_size
        raise ValueError(
            f"size of a stage ({size}) must be a multiple of {whole}, because it is cut into "
            f"micro-batches of {nearest.micro_batch_size} samples on each of "
            f"{nearest.data_parallel_size} ranks; change it, per_device_train_batch_size or "
            "max_micro_batch_size."
        )
    if args.max_global_batch_size is not None and size > args.max_global_batch_size:
        raise ValueError(
            f"size of a stage ({size}) must be at most max_global_batch_size "
            f"({args.max_global_batch_size}), because that is the cap; raise it, or leave it out."
        )
    if horizon.epoch_samples is not None and size > max(
        horizon.epoch_samples, plan.global_batch_size
    ):
        raise ValueError(
            f"size of a stage ({size}) must be at most an epoch ({horizon.epoch_samples} samples), "
            "because no step reaches into the next one; lower it."
        )


def _budget(
    args: BatchOptions,
    plan: BatchPlan,
    schedule: BatchSchedule,
    end: float,
    horizon: Horizon,
) -> float:
    """All of training in the schedule's unit, or more than `end`; infinite before it is known."""
    if schedule.unit is Unit.BUDGET:
        return 1.0
    if horizon.samples is None:
        return math.inf
    if schedule.unit is Unit.STEPS:
        feasible = functools.cache(lambda size: _nearest(args, plan, size).global_batch_size)
        return _steps_before(schedule, end, horizon, feasible)
    return horizon.samples * (horizon.tokens_per_sample if schedule.unit is Unit.TOKENS else 1)


def _steps_before(
    schedule: BatchSchedule, end: float, horizon: Horizon, feasible: Callable[[int], int]
) -> int:
    """The steps of training, with a short one at each epoch's end; counted to just behind `end`."""
    assert horizon.samples is not None
    samples = steps = 0
    while samples < horizon.samples and steps <= end:
        size = feasible(schedule.size_at(steps))
        if horizon.epoch_samples is not None:
            size = min(size, horizon.epoch_samples - samples % horizon.epoch_samples)
        samples, steps = samples + size, steps + 1
    return steps


def _refuse_beyond(name: str, value: str, end: Duration, total: float) -> None:
    """Nothing of a schedule may lie where training has ended, because it would never come."""
    if end.unit is Unit.BUDGET:
        budget, at = "100%", f"{100 * end.value:g}%"
    else:
        budget, at = f"{total:,.10g} {end.unit}", f"{end.value:,.10g}"
    raise ValueError(
        f"{name} ({value!r}) must lie within the budget ({budget}), because what comes at {at} "
        "would never be reached; shorten it, or train for longer."
    )


def _cap(args: BatchOptions, plan: BatchPlan, horizon: Horizon) -> int:
    """The largest batch that is both allowed and feasible, in samples."""
    size, epoch = plan.global_batch_size, horizon.epoch_samples
    cap = args.max_global_batch_size
    if cap is None:
        cap = size * _DEFAULT_CAP_FACTOR
    if epoch is not None:
        cap = min(cap, max(epoch, size))
    if cap < size:  # the controller or the schedule names the error
        return cap
    return max(_nearest(args, plan, cap, cap=cap).global_batch_size, size)


def _nearest(
    args: BatchOptions,
    plan: BatchPlan,
    size: int,
    *,
    cap: int | None = None,
    grows: bool = True,
) -> BatchPlan:
    return BatchPlan.nearest(
        size,
        micro_batch_size=plan.micro_batch_size,
        max_micro_batch_size=args.max_micro_batch_size if grows else None,
        max_global_batch_size=cap,
        data_parallel_size=plan.data_parallel_size,
    )
