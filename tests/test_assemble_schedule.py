"""From the flags to the controller: what each schedule becomes, and what does not fit the run."""

import dataclasses
import itertools
import math
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_adaptive_batch.apply.plan import BatchPlan
from hf_adaptive_batch.assemble_schedule import (
    Horizon,
    begin_schedule,
    criterion_of,
    needs_tokens,
    schedule_of,
)
from hf_adaptive_batch.decide.controllers import (
    BatchController,
    BatchDecision,
    FixedController,
    NormTestController,
    Observation,
    Reason,
    ScheduledController,
)
from hf_adaptive_batch.decide.criteria import NoiseScaleTarget, NormTest, TestResult
from hf_adaptive_batch.decide.noise_scale import Measurability, NoiseScale, NoiseScaleEstimator
from hf_adaptive_batch.decide.schedule import LinearRamp, PowerLaw, Unit
from hf_adaptive_batch.decide.seesaw import Seesaw
from hf_adaptive_batch.decide.stages import Stage, Stages
from hf_adaptive_batch.measure.moments import GradientMoments
from hf_adaptive_batch.schedule_arguments import CLOSED_LOOP, SCHEDULES
from tests import cases
from tests.reference_schedules import linear_to_zero, refusal


# 1000 samples of 8 tokens, in two epochs of 500; micro-batches of 4.
RUN: dict[str, Any] = {"samples": 1000.0, "tokens_per_sample": 8.0, "epoch_samples": 500}


def horizon(**changes: Any) -> Horizon:
    return Horizon(**{**RUN, **changes})


def arguments(**options: Any) -> Any:
    return cases.arguments(Path("never-made"), **options)


def begin(
    *, ranks: int = 1, on: Horizon | None = None, **options: Any
) -> tuple[BatchController, BatchPlan]:
    args = arguments(**options)
    return begin_schedule(args, args.initial_batch_plan(ranks), on or horizon())


def scheduled(**options: Any) -> ScheduledController:
    controller, _ = begin(**options)
    assert isinstance(controller, ScheduledController)
    return controller


# --------------------------------------------------------------------------- what a name becomes


def test_every_schedule_has_a_name_and_a_controller() -> None:
    kinds = {
        "norm_test": NormTestController,
        "noise_scale": NormTestController,
        "constant": FixedController,
    }
    assert set(CLOSED_LOOP) == {"norm_test", "noise_scale"}
    for name in SCHEDULES:
        on = horizon(learning_rate=linear_to_zero)
        controller, _ = begin(batch_schedule=name, max_global_batch_size=32, on=on)
        assert type(controller) is kinds.get(name, ScheduledController)
        assert controller.can_change is (name != "constant")


def test_a_ramp_goes_from_the_first_batch_to_the_cap_over_the_budget() -> None:
    controller = scheduled(batch_schedule="linear_ramp", max_global_batch_size=64)
    ramp = LinearRamp(first_size=4, last_size=64, length=1.0, unit=Unit.BUDGET)
    assert controller.schedule == ramp
    assert controller.max_global_batch_size == 64
    in_tokens = scheduled(batch_schedule="linear_ramp", ramp_length="2K").schedule
    assert in_tokens == LinearRamp(first_size=4, last_size=128, length=2000.0, unit=Unit.TOKENS)


def test_seesaw_follows_the_learning_rate_of_the_run() -> None:
    def falls(share: float) -> float:
        return 1 - share / 2

    on = horizon(learning_rate=falls)
    options = {"batch_schedule": "seesaw", "max_global_batch_size": 16, "seesaw_alpha": 2.0}
    schedule = scheduled(on=on, **options).schedule
    assert schedule == Seesaw(reference=falls, first_size=4, max_size=16, alpha=2.0)
    assert schedule.size_at(1.0) == 8


@pytest.mark.parametrize("tokens", [1.0, 8.0, 512.0])
def test_the_law_in_tokens_becomes_one_in_samples(tokens: float) -> None:
    schedule = scheduled(
        batch_schedule="cbs_law",
        cbs_coefficient=32.0,
        cbs_exponent=0.5,
        on=horizon(tokens_per_sample=tokens),
    ).schedule
    assert isinstance(schedule, PowerLaw)
    assert schedule.unit is Unit.TOKENS
    for seen in (1, 100, 10_000, 1_000_000):
        wished = 32 * math.sqrt(seen) / tokens
        assert schedule.size_at(seen) == min(max(math.ceil(wished - 1e-6), 4), 128)


def test_the_paper_s_stages_end_at_the_cap() -> None:
    controller, plan = begin(batch_schedule="stage_wise", max_global_batch_size=64)
    assert isinstance(controller, ScheduledController)
    assert [(s.start, s.size) for s in controller.schedule.stages] == [
        (0, 16),
        (0.025, 32),
        (0.05, 64),
    ]
    assert plan == BatchPlan(micro_batch_size=4, accumulation_steps=4)


def test_stages_have_their_own_first_size_and_cap() -> None:
    controller, plan = begin(batch_schedule="0:12 1K:24", gradient_accumulation_steps=2)
    assert isinstance(controller, ScheduledController)
    assert controller.schedule == Stages((Stage(0, 12), Stage(1000, 24)), Unit.TOKENS)
    assert controller.max_global_batch_size == 24
    assert plan == BatchPlan(micro_batch_size=4, accumulation_steps=3)


def test_stages_may_shrink() -> None:
    controller, plan = begin(batch_schedule="0:24 1K:12")
    assert plan.global_batch_size == 24
    assert controller.max_global_batch_size == 24  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("schedule", "options", "plan"),
    [
        ("0:16", {}, 16),
        ("0:16 100:16", {}, 16),
        ("linear_ramp", {"max_global_batch_size": 4}, 4),
        ("seesaw", {"max_global_batch_size": 4}, 4),
        ("cbs_law", {"max_global_batch_size": 4}, 4),
        ("norm_test", {"max_global_batch_size": 4}, 4),
        ("noise_scale", {"max_global_batch_size": 4}, 4),
        ("constant", {}, 4),
        ("linear_ramp", {"max_global_batch_size": 7}, 4),  # no whole micro-batch of room
    ],
)
def test_a_batch_that_cannot_change_is_fixed(
    schedule: str, options: dict[str, Any], plan: int
) -> None:
    controller, first = begin(batch_schedule=schedule, test_interval=3, **options)
    assert controller == FixedController(3)
    assert first.global_batch_size == plan


@pytest.mark.parametrize(
    ("changes", "ranks", "cap"),
    [
        ({}, 1, 128),  # 32 times the first
        ({}, 2, 256),
        ({"gradient_accumulation_steps": 2}, 1, 256),
        ({"max_global_batch_size": 30}, 1, 28),  # rounded down to whole micro-batches
        ({"max_global_batch_size": 30}, 2, 24),
        ({"max_global_batch_size": 1000}, 1, 500),  # an epoch
        ({"max_global_batch_size": 30, "max_micro_batch_size": 8}, 1, 24),
    ],
)
def test_the_cap_is_what_can_be_trained_on(changes: dict[str, Any], ranks: int, cap: int) -> None:
    for name in ("linear_ramp", "seesaw", "cbs_law", "norm_test", "noise_scale"):
        controller, _ = begin(ranks=ranks, batch_schedule=name, **changes)
        assert controller.max_global_batch_size == cap  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("schedule", "needed"),
    [
        *((name, name == "cbs_law") for name in SCHEDULES),
        ("0:8", False),
        ("0:8 100:16", True),
        ("0:8 100tokens:16", True),
        ("0:8 100samples:16", False),
        ("0:8 100steps:16", False),
        ("0:8 50%:16", False),
    ],
)
def test_tokens_are_counted_where_a_schedule_needs_them(schedule: str, needed: bool) -> None:
    assert needs_tokens(arguments(batch_schedule=schedule)) is needed


@pytest.mark.parametrize(("length", "needed"), [("100", True), ("100steps", False), ("5%", False)])
def test_a_ramp_needs_tokens_if_its_length_is_in_tokens(length: str, needed: bool) -> None:
    args = arguments(batch_schedule="linear_ramp", ramp_length=length)
    assert needs_tokens(args) is needed


# ---------------------------------------------------------------------------- within the budget


@pytest.mark.parametrize(
    ("below", "at", "unit", "total"),
    [
        ("0:8 7999:16", "0:8 8000:16", "tokens", "8,000"),
        ("0:8 999samples:16", "0:8 1000samples:16", "samples", "1,000"),
        ("0:8 125steps:16", "0:8 126steps:16", "steps", "126"),
        ("0:8 12samples:16 62steps:24", None, "", ""),
        ("0:8 2steps:16 64steps:24", "0:8 2steps:16 65steps:24", "steps", "65"),
    ],
)
def test_a_stage_must_begin_before_the_budget_ends(
    below: str, at: str | None, unit: str, total: str
) -> None:
    if at is None:  # mixed units are found first
        assert "units of the stages" in refusal(lambda: begin(batch_schedule=below))
        return
    assert scheduled(batch_schedule=below).can_change
    message = refusal(lambda: begin(batch_schedule=at))
    assert f"batch_schedule ({at!r})" in message
    assert f"{total} {unit}" in message
    later = at.replace(total.replace(",", ""), "1M" if unit != "steps" else "1K")
    assert "batch_schedule" in refusal(lambda: begin(batch_schedule=later))


@pytest.mark.parametrize(
    ("fits", "beyond", "unit"),
    [
        ("100%", "101%", "budget"),
        ("8000", "8001", "tokens"),
        ("8Ktokens", "8.001Ktokens", "tokens"),
        ("1Ksamples", "1001samples", "samples"),
        ("56steps", "1000steps", "steps"),
    ],
)
def test_a_ramp_must_end_by_the_end_of_the_budget(fits: str, beyond: str, unit: str) -> None:
    ramp = {"batch_schedule": "linear_ramp", "max_global_batch_size": 16}
    assert scheduled(ramp_length=fits, **ramp).can_change
    message = refusal(lambda: begin(ramp_length=beyond, **ramp))
    assert f"ramp_length ({beyond!r})" in message
    assert unit in message


def test_a_ramp_of_steps_ends_with_the_last_step_of_its_own_sizes() -> None:
    """4, 8 and 12 samples, then 61 steps of 16: as many as there are samples for."""
    ramp = {"batch_schedule": "linear_ramp", "max_global_batch_size": 16}
    assert scheduled(ramp_length="3steps", **ramp).schedule.steps_for(1000) == 64
    assert "ramp_length" in refusal(lambda: begin(ramp_length="126steps", **ramp))


@pytest.mark.parametrize("steps", [86, 90, 97])
def test_a_ramp_of_steps_is_checked_with_the_sizes_that_are_trained_on(steps: int) -> None:
    """In micro-batches of 4 its sizes are larger, so that there are fewer steps than it takes."""
    ramp = {"batch_schedule": "linear_ramp", "max_global_batch_size": 16}
    schedule = LinearRamp(first_size=4, last_size=16, length=float(steps), unit=Unit.STEPS)
    assert schedule.steps_for(1000, feasible=lambda size: -(-size // 4) * 4) < steps
    refusal(lambda: begin(ramp_length=f"{steps}steps", **ramp))


@pytest.mark.parametrize(
    "tokens_per_sample",
    [
        1,
        512.3,
        37,
        45,
        39 / 7,
    ],
)
def test_a_ramp_over_exactly_the_token_budget_is_accepted(tokens_per_sample: float) -> None:
    """max_train_tokens and ramp_length are both 100M."""
    on = horizon(
        samples=1e8 / tokens_per_sample, tokens_per_sample=tokens_per_sample, epoch_samples=None
    )
    assert scheduled(batch_schedule="linear_ramp", ramp_length="100M", on=on).can_change


@given(st.floats(1, 5000))
def test_a_stage_at_exactly_the_end_of_the_token_budget_is_refused(tokens: float) -> None:
    on = horizon(samples=1e8 / tokens, tokens_per_sample=tokens, epoch_samples=None)
    args, plan = _ARGUMENTS_OF_STAGES
    assert "batch_schedule" in refusal(lambda: begin_schedule(args, plan, on))


_ARGUMENTS_OF_STAGES = (
    cases.arguments(Path("never-made"), batch_schedule="0:8 100M:16"),
    BatchPlan(micro_batch_size=4),
)


def test_before_the_data_are_known_no_budget_is_checked() -> None:
    for schedule in ("0:8 1T:16", "cbs_law", "linear_ramp"):
        assert scheduled(batch_schedule=schedule, on=Horizon()).can_change


# ------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    "name", ["", " ", "cosine", "Seesaw", "norm_test ", "stage-wise", "norm_test,constant"]
)
def test_an_unknown_schedule_is_refused_with_the_known_ones(name: str) -> None:
    message = refusal(lambda: begin(batch_schedule=name))
    assert f"batch_schedule ({name!r})" in message
    assert all(known in message for known in SCHEDULES)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"batch_schedule": "0:6"}, "size of a stage (6)"),
        ({"batch_schedule": "0:8 100:10"}, "size of a stage (10)"),
        ({"batch_schedule": "0:2 100:8"}, "size of a stage (2)"),
        ({"batch_schedule": "0:8 100:32", "max_global_batch_size": 16}, "(32)"),
        ({"batch_schedule": "0:8 100:504"}, "an epoch (500 samples)"),
        ({"batch_schedule": "stage_wise", "max_global_batch_size": 2}, "(2)"),
        (
            {"batch_schedule": "stage_wise", "max_global_batch_size": 24},
            "max_global_batch_size (24) must be four times",
        ),
        (
            {"batch_schedule": "linear_ramp", "max_global_batch_size": 2},
            "max_global_batch_size (2) must be at least",
        ),
        ({"batch_schedule": "seesaw", "max_global_batch_size": 2}, "max_global_batch_size (2)"),
        ({"batch_schedule": "cbs_law", "max_global_batch_size": 2}, "max_global_batch_size (2)"),
        ({"batch_schedule": "linear_ramp", "ramp_length": ""}, "duration ('')"),
        ({"batch_schedule": "linear_ramp", "ramp_length": "5 epochs"}, "duration ('5 epochs')"),
        ({"batch_schedule": "linear_ramp", "ramp_length": "0"}, "ramp_length ('0"),
        ({"batch_schedule": "linear_ramp", "ramp_length": "0%"}, "ramp_length ('0"),
        ({"batch_schedule": "seesaw", "seesaw_alpha": 1.0}, "seesaw_alpha (1.0)"),
        ({"batch_schedule": "seesaw", "seesaw_alpha": math.nan}, "seesaw_alpha (nan)"),
        ({"batch_schedule": "cbs_law", "cbs_exponent": -0.5}, "exponent (-0.5)"),
        ({"batch_schedule": "cbs_law", "cbs_exponent": math.nan}, "exponent (nan)"),
        ({"batch_schedule": "cbs_law", "cbs_coefficient": 0.0}, "coefficient (0.0)"),
        ({"batch_schedule": "noise_scale", "noise_scale_factor": 0.0}, "noise_scale_factor (0.0)"),
        (
            {"batch_schedule": "noise_scale", "noise_scale_factor": math.inf},
            "noise_scale_factor (inf)",
        ),
        ({"batch_schedule": "linear_ramp", "test_interval": -1}, "test_interval (-1)"),
        ({"batch_schedule": "0:8 100:16", "test_interval": -1}, "test_interval (-1)"),
        ({"scale_learning_rate": "cubic"}, "scale_learning_rate ('cubic')"),
        ({"min_beta2": 1.0}, "min_beta2 (1.0)"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(options: dict[str, Any], said: str) -> None:
    assert said in refusal(lambda: begin(**options))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"cbs_exponent": -0.5}, "cbs_exponent (-0.5)"),
        ({"cbs_coefficient": -18.1}, "cbs_coefficient (-18.1)"),
    ],
)
def test_a_bad_law_is_refused_by_the_names_of_its_flags(options: dict[str, Any], said: str) -> None:
    assert said in refusal(lambda: begin(batch_schedule="cbs_law", **options))


def test_a_ramp_beyond_the_budget_is_told_in_percent() -> None:
    assert "100%" in refusal(lambda: begin(batch_schedule="linear_ramp", ramp_length="150%"))


@pytest.mark.parametrize(("ranks", "whole"), [(2, 8), (3, 12)])
def test_stages_are_whole_micro_batches_on_all_ranks(ranks: int, whole: int) -> None:
    fits = f"0:{whole} 100:{3 * whole}"
    _, plan = begin(ranks=ranks, batch_schedule=fits)
    assert plan == BatchPlan(micro_batch_size=4, data_parallel_size=ranks)
    message = refusal(lambda: begin(ranks=ranks, batch_schedule=f"0:{whole} 100:{whole + 4}"))
    assert f"multiple of {whole}" in message
    assert f"{ranks} ranks" in message


def test_stages_are_whole_micro_batches_of_the_size_that_they_are_trained_in() -> None:
    _, plan = begin(batch_schedule="0:8 100:32", max_micro_batch_size=32)
    assert plan == BatchPlan(micro_batch_size=8)
    message = refusal(lambda: begin(batch_schedule="0:8 100:24", max_micro_batch_size=32))
    assert "size of a stage (24)" in message
    assert "max_micro_batch_size" in message


@pytest.mark.parametrize(
    "options",
    [
        {"batch_schedule": "cbs_law"},
        {"batch_schedule": "0:8 100:16"},
        {"batch_schedule": "linear_ramp", "ramp_length": "100"},
    ],
)
def test_a_schedule_of_tokens_needs_tokens(options: dict[str, Any]) -> None:
    message = refusal(lambda: begin(on=horizon(tokens_per_sample=0.0), **options))
    assert "tokens" in message
    assert "batch_schedule" in message


@pytest.mark.parametrize(
    "rate", [lambda share: 1.0, lambda share: share, lambda share: 1 - 0.9 * ((2 * share) % 1)]
)
def test_seesaw_refuses_a_learning_rate_that_does_not_fall(rate: Any) -> None:
    with pytest.raises(ValueError, match=r"learning rate .*must.*because seesaw"):
        begin(batch_schedule="seesaw", on=horizon(learning_rate=rate))


@pytest.mark.parametrize("epoch_samples", [30, 37, 100])
def test_the_paper_s_stages_fit_a_short_epoch(epoch_samples: int) -> None:
    on = horizon(epoch_samples=epoch_samples)
    schedule = scheduled(batch_schedule="stage_wise", on=on).schedule
    first, second, last = (schedule.size_at(share) for share in (0, 0.025, 0.05))
    assert (first, 2 * first, 4 * first) == (first, second, last)
    assert last <= epoch_samples


# ------------------------------------------------------------------------------- the closed loop


def moments(noise_scale: float, *, samples: int, workers: int = 4) -> GradientMoments:
    """Expected norms of a gradient of size 1, without chance (McCandlish et al. 2018, A.1)."""
    return GradientMoments(
        workers=workers,
        global_batch_size=samples,
        small_sq_norm=1 + noise_scale * workers / samples,
        big_sq_norm=1 + noise_scale / samples,
    )


@given(
    eta=st.floats(0.02, 0.98),
    noise_scale=st.floats(0.01, 1e5),
    samples=st.integers(4, 8192),
    averaged=st.booleans(),
)
def test_the_noise_scale_target_at_one_over_eta_squared_is_the_unbiased_norm_test(
    eta: float, noise_scale: float, samples: int, averaged: bool
) -> None:
    seen = moments(noise_scale, samples=samples)
    noise = None
    if averaged:
        estimator = NoiseScaleEstimator(0.9)
        estimator.update(moments(3 * noise_scale, samples=samples))
        noise = estimator.update(seen)
    target = NoiseScaleTarget(1 / eta**2).evaluate(seen, noise)
    norm_test = NormTest(eta).evaluate(seen, noise)
    assert target.measurability is norm_test.measurability
    assert target.statistic == norm_test.statistic
    assert target.threshold == pytest.approx(norm_test.threshold, rel=1e-12)
    assert target.passing_batch_size == pytest.approx(norm_test.passing_batch_size, rel=1e-12)
    assert target.tested_batch_size == samples
    if not averaged:
        assert target.passing_batch_size == pytest.approx(noise_scale / eta**2, rel=1e-4)


@pytest.mark.parametrize("factor", [0.5, 1.0, 4.0])
@pytest.mark.parametrize(("batch", "passes"), [(-1, False), (0, True), (1, True)])
def test_the_target_is_met_from_factor_times_the_noise_scale_on(
    factor: float, batch: int, passes: bool
) -> None:
    samples = int(400 * factor) + batch
    noise = NoiseScale(
        updates=5,
        noise_trace=400.0,
        grad_sq_norm=1.0,
        noise_trace_error=0.0,
        grad_sq_norm_error=0.0,
        noise_scale_error=0.0,
    )
    result = NoiseScaleTarget(factor).evaluate(moments(400, samples=samples), noise)
    assert result.passed is passes
    assert result.passing_batch_size == 400 * factor


@pytest.mark.parametrize(
    "state",
    [
        ({"updates": 1}, Measurability.NOT_YET),
        ({"grad_sq_norm": -1.0}, Measurability.NOISE_DOMINATES),
        ({"grad_sq_norm": 0.0, "noise_trace": 0.0}, Measurability.NO_GRADIENT),
    ],
)
def test_the_target_says_nothing_where_nothing_can_be_measured(state: Any) -> None:
    changes, why = state
    values = {
        "updates": 5,
        "noise_trace": 400.0,
        "grad_sq_norm": 1.0,
        "noise_trace_error": 0.0,
        "grad_sq_norm_error": 0.0,
        "noise_scale_error": 0.0,
    }
    noise = NoiseScale(**{**values, **changes})
    result = NoiseScaleTarget(2.0).evaluate(moments(400, samples=64), noise)
    assert (result.measurability, result.statistic, result.passed) == (why, None, False)


def test_the_criterion_is_that_of_the_schedule() -> None:
    assert criterion_of(arguments(batch_schedule="noise_scale", noise_scale_factor=3.0)) == (
        NoiseScaleTarget(3.0)
    )
    for name in set(SCHEDULES) - {"noise_scale"}:
        assert criterion_of(arguments(batch_schedule=name, eta=0.3)) == NormTest(0.3)


@pytest.mark.parametrize(("factor", "settled"), [(1.0, 100), (4.0, 392), (0.5, 52)])
def test_the_loop_of_the_noise_scale_settles_at_its_factor(factor: float, settled: int) -> None:
    """B_simple = 97.3; whole micro-batches of 4, rounded up."""
    options = {"max_global_batch_size": 1000, "noise_scale_factor": factor}
    args = arguments(batch_schedule="noise_scale", **options)
    plan = args.initial_batch_plan(1)
    controller, plan = begin_schedule(args, plan, horizon(epoch_samples=None))
    estimator, criterion, sizes = NoiseScaleEstimator(0.9), criterion_of(args), []
    seen = 0
    for _ in range(40):
        size = plan.global_batch_size
        sizes.append(size)
        seen += size
        step = moments(97.3, samples=size, workers=2)
        test = criterion.evaluate(step, estimator.update(step))
        decision = controller.decide(
            Observation(samples_seen=seen, global_batch_size=size, test=test)
        )
        plan = BatchPlan.nearest(decision.global_batch_size, micro_batch_size=4)
    assert sizes == sorted(sizes)
    assert all(after <= 2 * before for before, after in itertools.pairwise(sizes))
    assert sizes[0] == 4
    assert sizes[-1] == settled


# ---------------------------------------------------------------------------------- the contract


def measured_at(batch: float) -> TestResult:
    return TestResult(
        statistic=batch / 64,
        threshold=1.0,
        passing_batch_size=batch,
        measurability=Measurability.MEASURED,
    )


TESTS = [
    None,
    *(
        TestResult(statistic=None, threshold=1.0, passing_batch_size=None, measurability=why)
        for why in Measurability
        if why is not Measurability.MEASURED
    ),
    *(measured_at(batch) for batch in (0.0, 63.2, 64.0, 64.1, 1e12)),
]
OBSERVATIONS = [
    Observation(
        samples_seen=seen,
        global_batch_size=size,
        test=test,
        finite=finite,
        tokens_seen=8 * seen,
        steps=seen // 64,
        budget_share=min(seen / 1000, 1.0),
    )
    for test in TESTS
    for size in (4, 16, 64)
    for seen in (1, 64, 499, 500, 999, 10**9)
    for finite in (True, False)
]
CONTROLLED: dict[str, dict[str, Any]] = {
    "ramp": {"batch_schedule": "linear_ramp", "max_global_batch_size": 64},
    "ramp, never measured": {
        "batch_schedule": "linear_ramp",
        "max_global_batch_size": 64,
        "test_interval": 0,
    },
    "law": {"batch_schedule": "cbs_law", "max_global_batch_size": 64, "test_interval": 4},
    "seesaw": {"batch_schedule": "seesaw", "max_global_batch_size": 64},
    "seesaw by halvings": {
        "batch_schedule": "seesaw",
        "max_global_batch_size": 64,
        "seesaw_alpha": 2.0,
    },
    "paper": {"batch_schedule": "stage_wise", "max_global_batch_size": 64},
    "stages in samples": {"batch_schedule": "0:4 64samples:16 500samples:64"},
    "stages in tokens": {"batch_schedule": "0:4 512:16 4K:64"},
    "stages in steps": {"batch_schedule": "0:4 1steps:16 7steps:64"},
    "stages that shrink": {"batch_schedule": "0:64 64samples:16 500samples:4"},
    "noise scale": {"batch_schedule": "noise_scale", "max_global_batch_size": 64},
    "noise scale, may shrink": {
        "batch_schedule": "noise_scale",
        "max_global_batch_size": 64,
        "allow_smaller_batch": True,
    },
}
each_controlled = pytest.mark.parametrize("name", CONTROLLED)


@each_controlled
def test_decisions_are_deterministic_bounded_and_have_a_reason(name: str) -> None:
    controller, fresh = begin(**CONTROLLED[name])[0], begin(**CONTROLLED[name])[0]
    assert controller.can_change
    forwards = [controller.decide(observation) for observation in OBSERVATIONS]
    backwards = [fresh.decide(observation) for observation in reversed(OBSERVATIONS)]
    assert forwards == backwards[::-1]
    for decision in forwards:
        assert isinstance(decision, BatchDecision)
        assert isinstance(decision.global_batch_size, int)
        assert 4 <= decision.global_batch_size <= 64
        assert decision.reason in Reason
    assert len({decision.global_batch_size for decision in forwards}) > 1


@each_controlled
def test_an_open_loop_takes_no_notice_of_measurements_and_a_closed_one_of_nothing_else(
    name: str,
) -> None:
    controller, _ = begin(**CONTROLLED[name])
    is_open = CONTROLLED[name]["batch_schedule"] != "noise_scale"
    assert getattr(controller, "open_loop", False) is is_open
    for observation in OBSERVATIONS:
        decision = controller.decide(observation)
        if is_open:
            blind = dataclasses.replace(observation, test=None, finite=False, global_batch_size=4)
            assert controller.decide(blind) == decision
            assert decision.reason is Reason.SCHEDULED
        elif observation.test is None or not observation.finite:
            assert decision.global_batch_size == observation.global_batch_size


@each_controlled
def test_steps_are_measured_at_the_interval(name: str) -> None:
    controller, _ = begin(**CONTROLLED[name])
    interval = CONTROLLED[name].get("test_interval", 1)
    measured = [step for step in range(1, 21) if controller.measures(step)]
    assert measured == (list(range(interval, 21, interval)) if interval else [])


def test_a_controller_keeps_under_its_cap_whatever_the_schedule_says() -> None:
    schedule = Stages((Stage(0, 8), Stage(10, 1024)), Unit.SAMPLES)
    capped = ScheduledController(schedule=schedule, max_global_batch_size=100)
    seen = Observation(samples_seen=10, global_batch_size=8, test=None)
    assert capped.decide(seen).global_batch_size == 100
    assert capped.decide(dataclasses.replace(seen, samples_seen=9)).global_batch_size == 8


def test_the_plan_of_a_run_is_not_touched_by_asking_for_its_schedule() -> None:
    args = arguments(batch_schedule="0:8 100:16")
    plan = args.initial_batch_plan(1)
    assert schedule_of(args, plan, horizon()) == schedule_of(args, plan, horizon())
    assert re.match(r"0:8 100:16", args.batch_schedule)
    assert plan == BatchPlan(micro_batch_size=4)
