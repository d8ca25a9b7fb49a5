"""Controllers: one contract for all, each rule by itself, and the loop closed on known noise."""

import dataclasses
import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_adaptive_batch.apply.plan import BatchPlan
from hf_adaptive_batch.decide.controllers import (
    BatchController,
    BatchDecision,
    FixedController,
    NormTestController,
    Observation,
    Reason,
    ScheduledController,
)
from hf_adaptive_batch.decide.criteria import NormTest, TestResult
from hf_adaptive_batch.decide.noise_scale import Measurability, NoiseScaleEstimator
from hf_adaptive_batch.decide.schedule import Unit
from hf_adaptive_batch.decide.stages import Stage, Stages
from hf_adaptive_batch.measure.moments import GradientMoments
from tests.reference import KnownNoise


def asking_for(batch: float | None, *, at: int = 64) -> TestResult:
    """A test at a batch of `at` samples whose passing batch is this; None for not measurable."""
    if batch is None:
        return unmeasured(Measurability.NOT_YET)
    return TestResult(
        statistic=0.25 * batch / at,
        threshold=0.25,
        passing_batch_size=batch,
        measurability=Measurability.MEASURED,
    )


def unmeasured(why: Measurability) -> TestResult:
    return TestResult(statistic=None, threshold=0.25, passing_batch_size=None, measurability=why)


def observed(
    test: TestResult | None, *, size: int = 64, samples_seen: int = 10_000, finite: bool = True
) -> Observation:
    return Observation(samples_seen=samples_seen, global_batch_size=size, test=test, finite=finite)


def norm_test(
    *,
    initial: int = 16,
    cap: int = 1024,
    interval: int = 1,
    warmup: int = 0,
    factor: float = 2.0,
    monotone: bool = True,
) -> NormTestController:
    return NormTestController(
        initial_global_batch_size=initial,
        max_global_batch_size=cap,
        test_interval=interval,
        warmup_samples=warmup,
        max_growth_factor=factor,
        monotone=monotone,
    )


# --------------------------------------------------------------------------------- the contract

CONTROLLERS: dict[str, BatchController] = {
    "fixed": FixedController(),
    "fixed, measuring": FixedController(test_interval=4),
    "norm test": norm_test(),
    "norm test, may shrink": norm_test(monotone=False),
    "norm test, every fifth step": norm_test(interval=5),
    "norm test, warming up": norm_test(warmup=5000),
    "norm test, in small steps": norm_test(factor=1.01),
    "norm test, unbounded growth": norm_test(factor=1e9),
    "norm test, no room": norm_test(initial=64, cap=64),
    "norm test, odd sizes": norm_test(initial=3, cap=1021),
}
OBSERVATIONS = [
    observed(test, size=size, samples_seen=samples_seen, finite=finite)
    for test in (
        None,
        asking_for(None),
        unmeasured(Measurability.NOISE_DOMINATES),
        unmeasured(Measurability.NO_GRADIENT),
        asking_for(0.0),
        asking_for(63.2),
        asking_for(64.0),
        asking_for(64.1),
        asking_for(1e12),
    )
    for size in (64, 1000, 1021)
    for samples_seen in (1, 4999, 5000, 10**9)
    for finite in (True, False)
]
BOUNDS = {"norm test, no room": (64, 64), "norm test, odd sizes": (3, 1021)}

each_controller = pytest.mark.parametrize("name", CONTROLLERS)


@each_controller
def test_decisions_are_deterministic_and_do_not_depend_on_what_was_decided_before(
    name: str,
) -> None:
    controller = CONTROLLERS[name]
    fresh = dataclasses.replace(controller)  # type: ignore[type-var]
    forwards = [controller.decide(observation) for observation in OBSERVATIONS]
    backwards = [fresh.decide(observation) for observation in reversed(OBSERVATIONS)]
    assert forwards == backwards[::-1]


def decisions_keep_the_contract(controller: BatchController, low: int, high: int) -> bool:
    """Whole sizes within the bounds, a reason, and no change where nothing was measured."""
    for observation in OBSERVATIONS:
        size = observation.global_batch_size
        if not low <= size <= high:
            continue
        decision = controller.decide(observation)
        unknown = observation.test is None or not observation.finite
        if unknown and decision.global_batch_size != size:
            return False
        if not isinstance(decision.global_batch_size, int):
            return False
        if not low <= decision.global_batch_size <= high or decision.reason not in Reason:
            return False
    return True


@each_controller
def test_decisions_are_whole_sizes_within_the_bounds_and_have_a_reason(name: str) -> None:
    low, high = BOUNDS.get(name, (16, 1024))
    assert decisions_keep_the_contract(CONTROLLERS[name], low, high)


def test_controllers_that_break_the_contract_are_found_out() -> None:
    class Unbounded(NormTestController):
        def decide(self, observation: Observation) -> BatchDecision:
            size = super().decide(observation).global_batch_size
            return BatchDecision(global_batch_size=2 * size, reason=Reason.TEST_FAILED)

    class Eager(NormTestController):
        def decide(self, observation: Observation) -> BatchDecision:
            return super().decide(dataclasses.replace(observation, finite=True))

    for kind in (Unbounded, Eager):
        controller = kind(initial_global_batch_size=16, max_global_batch_size=1024)
        assert not decisions_keep_the_contract(controller, 16, 1024)


@each_controller
def test_a_controller_changes_the_batch_exactly_if_it_says_that_it_can(name: str) -> None:
    controller = CONTROLLERS[name]
    at_64 = [o for o in OBSERVATIONS if o.global_batch_size == 64]
    sizes = {controller.decide(observation).global_batch_size for observation in at_64}
    assert (sizes != {64}) == controller.can_change


@each_controller
def test_steps_are_measured_at_the_interval_and_by_every_controller_that_can_change(
    name: str,
) -> None:
    controller = CONTROLLERS[name]
    measured = [step for step in range(1, 21) if controller.measures(step)]
    interval = getattr(controller, "test_interval", 0)
    assert measured == ([] if interval == 0 else list(range(interval, 21, interval)))
    assert measured or not controller.can_change


# ------------------------------------------------------------------------------------- reasons

REACHED: dict[Reason, tuple[BatchController, Observation, int]] = {
    Reason.FIXED: (FixedController(), observed(asking_for(900.0)), 64),
    Reason.SCHEDULED: (
        ScheduledController(
            schedule=Stages((Stage(0, 64), Stage(128, 96)), Unit.SAMPLES), max_global_batch_size=96
        ),
        observed(None, samples_seen=128),
        96,
    ),
    Reason.WARMING_UP: (norm_test(warmup=200), observed(asking_for(900.0), samples_seen=199), 64),
    Reason.NOT_FINITE: (norm_test(), observed(asking_for(900.0), finite=False), 64),
    Reason.NOT_MEASURED: (norm_test(), observed(None), 64),
    Reason.NOT_MEASURABLE_YET: (norm_test(), observed(asking_for(None)), 64),
    Reason.TEST_PASSED: (norm_test(), observed(asking_for(64.0)), 64),
    Reason.TEST_FAILED: (norm_test(), observed(asking_for(99.5)), 100),
    Reason.NOISE_DOMINATES: (
        norm_test(),
        observed(unmeasured(Measurability.NOISE_DOMINATES)),
        128,
    ),
    Reason.AT_CAP: (norm_test(cap=64), observed(asking_for(900.0)), 64),
    Reason.SHRUNK: (norm_test(monotone=False), observed(asking_for(50.5)), 51),
}


@pytest.mark.parametrize("reason", Reason)
def test_every_reason_is_reached_and_explains_itself(reason: Reason) -> None:
    controller, observation, size = REACHED[reason]
    assert controller.decide(observation) == BatchDecision(global_batch_size=size, reason=reason)
    assert len(reason.explanation.split()) >= 4
    assert reason.explanation != reason.value


def test_reasons_are_plain_distinct_strings() -> None:
    assert Reason("at_cap") is Reason.AT_CAP
    assert f"{Reason.AT_CAP}" == "at_cap"
    assert len({reason.explanation for reason in Reason}) == len(Reason)


def test_no_gradient_is_not_measurable_and_does_not_grow() -> None:
    decision = norm_test().decide(observed(unmeasured(Measurability.NO_GRADIENT)))
    assert decision == BatchDecision(global_batch_size=64, reason=Reason.NOT_MEASURABLE_YET)


def test_noise_that_dominates_at_the_cap_does_not_exceed_it() -> None:
    observation = observed(unmeasured(Measurability.NOISE_DOMINATES), size=1024)
    decision = norm_test().decide(observation)
    assert decision == BatchDecision(global_batch_size=1024, reason=Reason.AT_CAP)


# --------------------------------------------------------------------------------------- rules


@pytest.mark.parametrize(("samples_seen", "size"), [(1, 64), (199, 64), (200, 128), (201, 128)])
def test_nothing_changes_before_the_warm_up_samples_have_been_seen(
    samples_seen: int, size: int
) -> None:
    observation = observed(asking_for(900.0), samples_seen=samples_seen)
    assert norm_test(warmup=200).decide(observation).global_batch_size == size
    assert norm_test(warmup=0).decide(observation).global_batch_size == 128


@pytest.mark.parametrize(
    ("size", "asked", "factor", "wished"),
    [
        (64, 900.0, 2.0, 128),
        (64, 100.0, 2.0, 100),
        (64, 100.1, 2.0, 101),  # at least so many samples: rounded up
        (64, 900.0, 1.5, 96),
        (65, 900.0, 1.5, 98),  # 97.5
        (16, 900.0, 1.01, 17),  # any factor above 1 grows by a sample at least
        (64, 900.0, 1e9, 900),
        (64, 1e12, 1e9, 1024),
        (900, 1e12, 2.0, 1024),
    ],
)
def test_a_failed_test_grows_to_what_would_pass_by_the_growth_factor_at_most(
    size: int, asked: float, factor: float, wished: int
) -> None:
    decision = norm_test(factor=factor).decide(observed(asking_for(asked), size=size))
    assert decision == BatchDecision(global_batch_size=wished, reason=Reason.TEST_FAILED)


@given(
    size=st.integers(16, 1024),
    asked=st.none() | st.floats(0, 1e9),
    factor=st.floats(1.001, 100),
    monotone=st.booleans(),
)
def test_growth_and_shrinkage_are_bounded_for_any_test(
    size: int, asked: float | None, factor: float, monotone: bool
) -> None:
    controller = norm_test(factor=factor, monotone=monotone)
    wished = controller.decide(observed(asking_for(asked), size=size)).global_batch_size
    assert wished <= min(1024, math.ceil(size * factor))
    assert wished >= (size if monotone else max(16, math.floor(size / factor)))
    if asked is not None:  # never away from what was asked for
        assert min(size, asked) <= wished <= max(size, math.ceil(asked))


@pytest.mark.parametrize(
    ("size", "asked", "monotone", "wished", "reason"),
    [
        (64, 40.0, True, 64, Reason.TEST_PASSED),
        (64, 40.0, False, 40, Reason.SHRUNK),
        (64, 39.5, False, 40, Reason.SHRUNK),
        (64, 10.0, False, 32, Reason.SHRUNK),  # by the growth factor at most
        (20, 0.0, False, 16, Reason.SHRUNK),  # not below the initial size
        (16, 0.0, False, 16, Reason.TEST_PASSED),
        (64, 63.5, False, 64, Reason.TEST_PASSED),
        (64, 64.0, False, 64, Reason.TEST_PASSED),
        (64, 65.0, False, 65, Reason.TEST_FAILED),
    ],
)
def test_the_batch_shrinks_only_where_that_is_allowed(
    size: int, asked: float, monotone: bool, wished: int, reason: Reason
) -> None:
    decision = norm_test(monotone=monotone).decide(observed(asking_for(asked), size=size))
    assert decision == BatchDecision(global_batch_size=wished, reason=reason)


def test_a_controller_without_room_is_the_fixed_one_in_all_but_the_reason() -> None:
    controller = norm_test(initial=64, cap=64, monotone=False)
    assert not controller.can_change
    for observation in OBSERVATIONS:
        if observation.global_batch_size == 64:
            fixed = FixedController().decide(observation)
            assert controller.decide(observation).global_batch_size == fixed.global_batch_size


# --------------------------------------------------------------- the short step of an epoch's end


def expected_moments(
    noise_scale: float, *, samples: int, workers: int = 4, grad_sq_norm: float = 1.0
) -> GradientMoments:
    """||G||^2 + tr(Sigma)/b (McCandlish et al. 2018, A.1), without chance."""
    noise_trace = noise_scale * grad_sq_norm
    return GradientMoments(
        workers=workers,
        global_batch_size=samples,
        small_sq_norm=grad_sq_norm + noise_trace * workers / samples,
        big_sq_norm=grad_sq_norm + noise_trace / samples,
    )


ESTIMATORS = ["unbiased", "published"]
FIXED_POINT = {"unbiased": 400, "published": 300}  # of a noise scale of 100 at eta = 1/2


@pytest.mark.parametrize("monotone", [True, False], ids=["monotone", "may shrink"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("samples", [60, 8, 299])
def test_a_short_step_neither_shrinks_nor_grows_a_batch_that_is_right(
    samples: int, estimator: str, monotone: bool
) -> None:
    criterion = NormTest(0.5, estimator)  # type: ignore[arg-type]
    averages = NoiseScaleEstimator()
    size = FIXED_POINT[estimator]
    for _ in range(10):
        averages.update(expected_moments(100, samples=size))
    short = expected_moments(100, samples=samples)
    test = criterion.evaluate(short, averages.update(short))
    decision = norm_test(monotone=monotone).decide(observed(test, size=size))
    # One sample is what rounding up may add.
    assert size <= decision.global_batch_size <= size + 1


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_whole_step_shrinks_and_grows_a_batch_that_is_wrong(estimator: str) -> None:
    criterion = NormTest(0.5, estimator)  # type: ignore[arg-type]
    right = FIXED_POINT[estimator]
    for size in (right // 2, right * 2):
        test = criterion.evaluate(expected_moments(100, samples=size))
        decision = norm_test(monotone=False).decide(observed(test, size=size))
        assert abs(decision.global_batch_size - right) < abs(size - right)


# -------------------------------------------------------------------------------- closed loop


def closed_loop(
    estimator: str,
    eta: float,
    *,
    steps: int = 120,
    monotone: bool = False,
    max_micro_batch_size: int | None = None,
    cap: int = 100_000,
) -> list[int]:
    """Batch sizes under known noise of B_simple = 100, from 8 samples on: measure, decide, plan.

    All of the loop is the library's but the gradients. With d = 4000 dimensions one step knows
    tr(Sigma) to sqrt(2 / (d (J - 1))) = 0.9 % and, near the fixed point, ||G||^2 to about
    2 eta / sqrt(d) = 2 %; the average of ten steps (decay 0.9: 19 effective) to 0.4 %.
    """
    truth = KnownNoise.of_noise_scale(100.0, dimension=4000)
    generator = torch.Generator().manual_seed(11)
    plan = BatchPlan(micro_batch_size=4, accumulation_steps=2)
    controller = norm_test(initial=plan.global_batch_size, cap=cap, monotone=monotone)
    criterion = NormTest(eta, estimator)  # type: ignore[arg-type]
    averages = NoiseScaleEstimator()
    sizes, samples_seen = [], 0
    for _ in range(steps):
        # Eight workers at most: the micro-batches of a large step are taken together in parts.
        parts = min(8, plan.global_batch_size // 4)
        cuts = [plan.global_batch_size * part // parts for part in range(parts + 1)]
        shares = [end - start for start, end in pairwise(cuts)]
        workers = truth.worker_gradients(shares, generator)
        step = sum(g * (n / plan.global_batch_size) for g, n in zip(workers, shares, strict=True))
        moments = GradientMoments(
            workers=parts,
            global_batch_size=plan.global_batch_size,
            small_sq_norm=sum(
                g.dot(g).item() * n / plan.global_batch_size
                for g, n in zip(workers, shares, strict=True)
            ),
            big_sq_norm=step.dot(step).item(),
        )
        samples_seen += plan.global_batch_size
        test = criterion.evaluate(moments, averages.update(moments))
        decision = controller.decide(
            observed(test, size=plan.global_batch_size, samples_seen=samples_seen)
        )
        if decision.global_batch_size != plan.global_batch_size:
            plan = BatchPlan.nearest(
                decision.global_batch_size,
                micro_batch_size=4,
                max_micro_batch_size=max_micro_batch_size,
                max_global_batch_size=cap,
            )
        sizes.append(plan.global_batch_size)
    return sizes


def settled(sizes: list[int]) -> float:
    """Where the batch settles: the mean of the last half."""
    last = sizes[len(sizes) // 2 :]
    return sum(last) / len(last)


TARGETS: dict[str, Callable[[float], float]] = {
    "unbiased": lambda eta: 100 / eta**2,
    "published": lambda eta: 100 * (1 / eta**2 - 1),
}


@pytest.mark.parametrize("eta", [0.5, 0.7])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_loop_settles_where_the_theory_says_and_not_where_the_other_estimator_does(
    estimator: str, eta: float
) -> None:
    """Within five per cent: rounding up to a micro-batch of 4 adds 2 samples, chance the rest.

    The other target is a quarter away at eta 0.5, and a half at 0.7.
    """
    found = settled(closed_loop(estimator, eta))
    (other,) = set(ESTIMATORS) - {estimator}
    assert found == pytest.approx(TARGETS[estimator](eta) + 2, rel=0.05)
    assert found != pytest.approx(TARGETS[other](eta), rel=0.2)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_batch_that_only_grows_settles_above_the_target_by_as_much_as_chance_adds(
    estimator: str,
) -> None:
    """It keeps the largest wish of a run. Single published steps scatter by some 2 % here, the
    averages of the unbiased test by up to 20 % while they still hold steps of the small batches.
    """
    sizes = closed_loop(estimator, 0.5, monotone=True)
    assert sizes == sorted(sizes)
    target = TARGETS[estimator](0.5)
    assert 0.99 * target < sizes[-1] < 1.25 * target


def test_with_a_ladder_the_batch_settles_within_a_micro_batch_above_the_target() -> None:
    found = settled(closed_loop("unbiased", 0.5, max_micro_batch_size=64))
    assert 0.97 * 400 < found < 1.03 * 400 + 64


def test_the_cap_holds_in_the_loop_where_the_target_is_above_it() -> None:
    sizes = closed_loop("unbiased", 0.5, cap=150, max_micro_batch_size=64)
    assert max(sizes) <= 150
    assert sizes[-1] == 128  # whole micro-batches of 64 under the cap
    assert max(closed_loop("unbiased", 0.5)) > 150


def test_the_batch_doubles_at_most_in_the_loop() -> None:
    sizes = closed_loop("unbiased", 0.5, steps=20)
    assert all(after <= 2 * before for before, after in pairwise([8, *sizes]))
    assert any(after == 2 * before for before, after in pairwise([8, *sizes]))


# ----------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"initial": 0}, r"initial_global_batch_size \(0\) must be at least 1, because"),
        (
            {"cap": 15},
            r"max_global_batch_size \(15\) must be at least the initial global batch \(16\)",
        ),
        ({"interval": 0}, r"test_interval \(0\) must be at least 1, because"),
        ({"warmup": -1}, r"warmup_samples \(-1\) must be at least 0, because"),
        ({"factor": 1.0}, r"max_growth_factor \(1\.0\) must be above 1 and finite"),
        ({"factor": 0.5}, r"max_growth_factor \(0\.5\) must be above 1 and finite"),
        ({"factor": math.inf}, r"max_growth_factor \(inf\) must be above 1 and finite"),
        ({"factor": math.nan}, r"max_growth_factor \(nan\) must be above 1 and finite"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_an_argument_out_of_its_range_is_refused(changed: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        norm_test(**changed)  # type: ignore[arg-type]


def test_a_negative_interval_of_the_fixed_controller_is_refused() -> None:
    assert not FixedController(0).measures(1)
    with pytest.raises(ValueError, match=r"test_interval \(-1\) must be at least 0, because"):
        FixedController(-1)


@pytest.mark.parametrize("size", [0, -5, 3.7, math.nan, None, 2**70])
def test_a_decision_that_is_no_number_of_samples_is_refused(size):
    with pytest.raises(ValueError, match=r"of a decision must be an integer of at least 1"):
        BatchDecision(global_batch_size=size, reason=Reason.FIXED)
