"""The noise-scale estimator: unbiased, honest about its error, silent where it knows nothing."""

import json
import math
import statistics
from collections.abc import Sequence

import pytest
import torch

from hf_adaptive_batch.decide.noise_scale import Measurability, NoiseScale, NoiseScaleEstimator
from hf_adaptive_batch.measure.moments import GradientMoments
from tests.reference import KnownNoise


def moments(noise_trace: float, grad_sq_norm: float, *, samples: int = 16) -> GradientMoments:
    """Moments of which the two unbiased estimates are these numbers."""
    variance = noise_trace / samples
    return GradientMoments(
        workers=2,
        global_batch_size=samples,
        small_sq_norm=grad_sq_norm + 2 * variance,
        big_sq_norm=grad_sq_norm + variance,
    )


def estimate_of(steps: Sequence[tuple[float, float]], decay: float = 0.9) -> NoiseScale:
    estimator = NoiseScaleEstimator(decay)
    for noise_trace, grad_sq_norm in steps:
        estimator.update(moments(noise_trace, grad_sq_norm))
    return estimator.estimate()


# --------------------------------------------------------------------------------- unbiased


TRIALS = 4000
TRUTH = KnownNoise.of_noise_scale(20.0, dimension=50)


def measured_trials(sizes: Sequence[int]) -> list[GradientMoments]:
    """Steps of independent samples' gradients, cut into workers of these sizes."""
    generator = torch.Generator().manual_seed(7)
    samples = sum(sizes)
    gradients = TRUTH.skewed_samples((TRIALS, samples), generator)
    workers = torch.stack([part.mean(1) for part in gradients.split(list(sizes), dim=1)], dim=1)
    shares = torch.tensor(sizes, dtype=torch.float64) / samples
    small = (workers.square().sum(2) * shares).sum(1)
    big = gradients.mean(1).square().sum(1)
    return [
        GradientMoments(
            workers=len(sizes), global_batch_size=samples, small_sq_norm=s, big_sq_norm=b
        )
        for s, b in zip(small.tolist(), big.tolist(), strict=True)
    ]


def standard_errors_off(values: Sequence[float], truth: float) -> float:
    error = statistics.stdev(values) / math.sqrt(len(values))
    return abs(statistics.fmean(values) - truth) / error


SIZES = {
    "2 equal workers": (4, 4),
    "4 equal workers": (3, 3, 3, 3),
    "single samples": (1,) * 8,
    "short last worker": (4, 4, 4, 1),
    "unequal workers": (1, 2, 5, 4),
}


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
def test_both_estimates_are_unbiased_and_the_biased_ones_would_be_found_out(
    sizes: tuple[int, ...],
) -> None:
    """Within four standard errors of the truth: one false alarm in 16,000 for another seed."""
    trials = measured_trials(sizes)
    assert standard_errors_off([m.noise_trace for m in trials], TRUTH.noise_trace) < 4
    assert standard_errors_off([m.grad_sq_norm for m in trials], TRUTH.grad_sq_norm) < 4

    # 1/J in the place of 1/(J - 1): the same check must fail.
    bessel = (len(sizes) - 1) / len(sizes)
    noise = [m.noise_trace * bessel for m in trials]
    signal = [m.big_sq_norm - m.gradient_variance * bessel for m in trials]
    assert standard_errors_off(noise, TRUTH.noise_trace) > 8
    assert standard_errors_off(signal, TRUTH.grad_sq_norm) > 8
    # So must the measured squared norm, which contains the noise.
    assert standard_errors_off([m.big_sq_norm for m in trials], TRUTH.grad_sq_norm) > 8


def test_shares_that_do_not_fit_the_sizes_would_be_found_out() -> None:
    """Why the probe must know the weights: 4, 4, 4 and 1 samples taken as equal shares."""
    generator = torch.Generator().manual_seed(8)
    gradients = TRUTH.skewed_samples((TRIALS, 13), generator)
    workers = torch.stack([part.mean(1) for part in gradients.split([4, 4, 4, 1], dim=1)], dim=1)
    small, big = workers.square().sum(2).mean(1), workers.mean(1).square().sum(1)
    trials = [
        GradientMoments(workers=4, global_batch_size=13, small_sq_norm=s, big_sq_norm=b)
        for s, b in zip(small.tolist(), big.tolist(), strict=True)
    ]
    assert standard_errors_off([m.noise_trace for m in trials], TRUTH.noise_trace) > 8


def test_the_estimator_finds_the_noise_scale_where_the_mean_of_ratios_does_not() -> None:
    """Numerator and denominator are averaged separately (McCandlish et al. 2018, A.1).

    One step of 32 samples knows ||G||^2 to a quarter here, so that the mean of the single steps'
    ratios is too large by about the square of that.
    """
    trials = measured_trials((8, 8, 8, 8))
    estimator = NoiseScaleEstimator(0.999)
    for step in trials:
        noise = estimator.update(step)
    assert noise.noise_scale is not None
    assert abs(noise.noise_scale - TRUTH.noise_scale) < 4 * noise.noise_scale_error
    assert noise.noise_scale_error < 0.01 * TRUTH.noise_scale
    ratios = statistics.fmean(m.noise_trace / m.grad_sq_norm for m in trials)
    assert ratios - TRUTH.noise_scale > 4 * noise.noise_scale_error


# --------------------------------------------------------------------------------- averaging


@pytest.mark.parametrize("decay", [0.1, 0.9, 0.999])
@pytest.mark.parametrize("updates", [1, 2, 3, 50])
def test_a_constant_input_is_reproduced_from_the_first_update_on(
    decay: float, updates: int
) -> None:
    noise = estimate_of([(8.0, 2.0)] * updates, decay)
    assert noise.updates == updates
    assert noise.noise_trace == pytest.approx(8.0)
    assert noise.grad_sq_norm == pytest.approx(2.0)
    if updates > 1:
        assert noise.noise_scale == pytest.approx(4.0)


def test_the_weights_are_those_of_an_exponential_average() -> None:
    steps = [(8.0, 2.0), (6.0, 1.0), (1.0, 3.0)]
    weights = [0.5**2, 0.5, 1.0]
    noise = estimate_of(steps, decay=0.5)
    for index, found in enumerate((noise.noise_trace, noise.grad_sq_norm)):
        expected = sum(w * s[index] for w, s in zip(weights, steps, strict=True)) / sum(weights)
        assert found == pytest.approx(expected)


def test_the_noise_scale_is_the_ratio_of_averages_and_not_the_average_of_ratios() -> None:
    noise = estimate_of([(9.0, 2.0), (9.0, 4.0)], decay=0.999_999_999)
    assert noise.noise_scale == pytest.approx(9 / 3)
    assert noise.noise_scale != pytest.approx((9 / 2 + 9 / 4) / 2, rel=1e-2)


def test_averages_that_do_not_decay_would_lag_behind_a_change() -> None:
    steps = [(8.0, 2.0)] * 50 + [(80.0, 2.0)] * 50
    assert estimate_of(steps, decay=0.9).noise_scale == pytest.approx(40.0, rel=0.01)
    assert estimate_of(steps, decay=0.999).noise_scale < 25


def test_decay_zero_is_the_last_step_by_itself() -> None:
    noise = estimate_of([(8.0, 2.0), (6.0, 1.0), (9.0, 3.0)], decay=0.0)
    assert (noise.noise_trace, noise.grad_sq_norm) == (pytest.approx(9.0), pytest.approx(3.0))
    assert noise.noise_scale == pytest.approx(3.0)


def test_decay_zero_gives_no_noise_scale_where_the_signal_is_not_above_zero() -> None:
    noise = estimate_of([(8.0, 2.0), (6.0, -1.0)], decay=0.0)
    assert noise.measurability is Measurability.NOISE_DOMINATES
    assert noise.noise_scale is None


# --------------------------------------------------------------------------------- its error


RUNS, UPDATES, DECAY = 400, 200, 0.98


def z_scores() -> dict[str, list[float]]:
    """How many of its own standard errors each of many independent runs is off."""
    generator = torch.Generator().manual_seed(9)
    truth = KnownNoise.of_noise_scale(20.0, dimension=30)
    scores: dict[str, list[float]] = {"noise_trace": [], "grad_sq_norm": [], "noise_scale": []}
    for _ in range(RUNS):
        normal = torch.randn(UPDATES, 4, 30, dtype=torch.float64, generator=generator)
        workers = truth.mean + truth.deviation / math.sqrt(8) * normal
        small = workers.square().sum(2).mean(1).tolist()
        big = workers.mean(1).square().sum(1).tolist()
        estimator = NoiseScaleEstimator(DECAY)
        for s, b in zip(small, big, strict=True):
            noise = estimator.update(
                GradientMoments(workers=4, global_batch_size=32, small_sq_norm=s, big_sq_norm=b)
            )
        for name, of_run in scores.items():
            off = getattr(noise, name) - getattr(truth, name)
            of_run.append(off / getattr(noise, f"{name}_error"))
    return scores


def test_the_standard_errors_are_calibrated() -> None:
    """The z-scores of 400 runs have variance 1, within four of its standard errors: sqrt(2/400).

    Of (1 + decay) / (1 - decay) = 99 effective updates, differences know their spread as well as
    66 independent ones would, which adds another three per cent.
    """
    slack = 4 * math.sqrt(2 / RUNS)
    for name, scores in z_scores().items():
        variance = statistics.fmean(z * z for z in scores)
        assert 1 - slack < variance < 1.03 + slack, name
        # An error that took all 200 updates for equal would be found out.
        effective = (1 + DECAY) / (1 - DECAY)
        assert variance * UPDATES / effective > 1.03 + slack, name


def test_the_error_of_two_updates_is_their_half_difference_where_decay_hardly_counts() -> None:
    noise = estimate_of([(8.0, 2.0), (12.0, 3.0)], decay=0.999_999)
    assert noise.noise_trace_error == pytest.approx(2.0, rel=1e-4)
    assert noise.grad_sq_norm_error == pytest.approx(0.5, rel=1e-4)


def test_a_constant_input_has_no_error() -> None:
    noise = estimate_of([(8.0, 2.0)] * 20)
    assert noise.noise_trace_error == pytest.approx(0, abs=1e-6)
    assert noise.noise_scale_error == pytest.approx(0, abs=1e-6)


def test_a_slow_drift_is_no_error_of_the_measurement() -> None:
    """The spread comes from successive differences (von Neumann et al. 1941)."""
    falling = [(8.0, 10 * 0.95**step) for step in range(40)]
    to_and_fro = [step for pair in zip(falling[:20], falling[20:], strict=True) for step in pair]
    drifting, scattered = estimate_of(falling), estimate_of(to_and_fro)
    assert drifting.grad_sq_norm_error < 0.02 * drifting.grad_sq_norm
    assert scattered.grad_sq_norm_error > 0.1 * scattered.grad_sq_norm


def test_noise_and_signal_that_move_together_leave_the_ratio_exact() -> None:
    """The delta method needs the covariance: both double, their ratio does not move."""
    noise = estimate_of([(8.0, 2.0), (16.0, 4.0)] * 10)
    assert noise.noise_trace_error > 0.5
    assert noise.noise_scale_error == pytest.approx(0, abs=1e-6)


# ----------------------------------------------------------------------------- measurability


def test_before_any_update_nothing_is_known() -> None:
    noise = NoiseScaleEstimator().estimate()
    assert noise.updates == 0
    assert math.isnan(noise.noise_trace)
    assert math.isnan(noise.grad_sq_norm)
    assert noise.measurability is Measurability.NOT_YET
    assert noise.noise_scale is None


def test_one_update_has_estimates_but_no_errors_and_no_noise_scale() -> None:
    noise = estimate_of([(8.0, 2.0)])
    assert (noise.noise_trace, noise.grad_sq_norm) == (pytest.approx(8.0), pytest.approx(2.0))
    assert math.isnan(noise.noise_trace_error)
    assert math.isnan(noise.grad_sq_norm_error)
    assert math.isnan(noise.noise_scale_error)
    assert noise.measurability is Measurability.NOT_YET
    assert noise.noise_scale is None


STATES = {
    "clear signal": ([(8.0, 2.0)] * 3, Measurability.MEASURED),
    "no noise": ([(0.0, 2.0)] * 3, Measurability.MEASURED),
    "signal below zero": ([(8.0, -2.0)] * 3, Measurability.NOISE_DOMINATES),
    "signal zero": ([(8.0, 0.0)] * 3, Measurability.NOISE_DOMINATES),
    "signal within its error": ([(8.0, 10.0), (8.0, -8.0)], Measurability.NOISE_DOMINATES),
    "nothing at all": ([(0.0, 0.0)] * 3, Measurability.NO_GRADIENT),
}


@pytest.mark.parametrize(("steps", "state"), STATES.values(), ids=STATES.keys())
def test_the_noise_scale_is_a_number_only_where_it_is_measured(
    steps: list[tuple[float, float]], state: Measurability
) -> None:
    noise = estimate_of(steps)
    assert noise.measurability is state
    if state is Measurability.MEASURED:
        assert noise.noise_scale == pytest.approx(noise.noise_trace / noise.grad_sq_norm)
    else:
        assert noise.noise_scale is None


@pytest.mark.parametrize(
    "name",
    [name for name, (_, state) in STATES.items() if state is not Measurability.MEASURED],
)
def test_where_there_is_no_noise_scale_it_has_no_error_either(name: str) -> None:
    assert math.isnan(estimate_of(STATES[name][0]).noise_scale_error)


@pytest.mark.parametrize(
    ("gradients", "noise_trace", "grad_sq_norm"),
    [([[3, 4], [3, 4]], 0, 25), ([[3, 4], [-3, -4]], 50, -25)],
    ids=["identical", "opposite"],
)
def test_identical_gradients_have_no_noise_and_opposite_ones_no_signal(
    gradients: list[list[float]], noise_trace: float, grad_sq_norm: float
) -> None:
    small = statistics.fmean(x * x + y * y for x, y in gradients)
    mean = [statistics.fmean(values) for values in zip(*gradients, strict=True)]
    step = GradientMoments(
        workers=2,
        global_batch_size=2,
        small_sq_norm=small,
        big_sq_norm=sum(value**2 for value in mean),
    )
    estimator = NoiseScaleEstimator()
    estimator.update(step)
    noise = estimator.update(step)
    assert noise.noise_trace == pytest.approx(noise_trace)
    assert noise.grad_sq_norm == pytest.approx(grad_sq_norm)
    assert noise.noise_scale == (0 if noise_trace == 0 else None)


# ------------------------------------------------------------------------- state and bad input


STEPS = [(8.0, 2.0), (6.0, 1.0), (9.0, 3.0)]


def test_the_state_is_plain_json_and_goes_on_exactly_where_it_was() -> None:
    estimator = NoiseScaleEstimator()
    for step in STEPS:
        estimator.update(moments(*step))
    state = json.loads(json.dumps(estimator.state_dict(), allow_nan=False))
    resumed = NoiseScaleEstimator()
    resumed.load_state_dict(state)
    assert resumed == estimator
    assert resumed.update(moments(7.0, 2.5)) == estimator.update(moments(7.0, 2.5))
    assert NoiseScaleEstimator().update(moments(7.0, 2.5)) != estimator.estimate()


def test_a_state_of_a_fresh_estimator_is_a_fresh_estimator() -> None:
    resumed = NoiseScaleEstimator()
    resumed.load_state_dict(json.loads(json.dumps(NoiseScaleEstimator().state_dict())))
    assert resumed == NoiseScaleEstimator()


def test_the_state_does_not_change_when_the_estimator_goes_on() -> None:
    estimator = NoiseScaleEstimator()
    estimator.update(moments(8.0, 2.0))
    state = estimator.state_dict()
    before = json.dumps(state)
    estimator.update(moments(80.0, 3.0))
    assert json.dumps(state) == before


@pytest.mark.parametrize(("before", "after"), [(0.5, 0.99), (0.99, 0.5), (0.9, 0.0), (0.0, 0.9)])
def test_loading_keeps_the_configured_decay_and_the_saved_estimate(
    before: float, after: float
) -> None:
    saved = NoiseScaleEstimator(before)
    for step in STEPS:
        saved.update(moments(*step))
    resumed = NoiseScaleEstimator(after)
    resumed.load_state_dict(saved.state_dict())
    assert resumed.decay == after
    assert resumed.estimate() == saved.estimate()
    # From here on the new decay counts.
    assert resumed.update(moments(90.0, 1.0)) != saved.update(moments(90.0, 1.0))
    assert resumed.estimate().noise_trace_error > 0


@pytest.mark.parametrize("version", [0, 2, None])
def test_a_state_of_another_version_is_refused(version: int | None) -> None:
    state = NoiseScaleEstimator().state_dict() | {"version": version}
    with pytest.raises(ValueError, match=rf"version \({version}\) of the noise-scale state must"):
        NoiseScaleEstimator().load_state_dict(state)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["small_sq_norm", "big_sq_norm"])
def test_moments_that_are_not_finite_are_refused_and_leave_the_average_as_it_was(
    name: str, value: float
) -> None:
    estimator = NoiseScaleEstimator()
    before = estimator.update(moments(8.0, 2.0))
    norms = {"small_sq_norm": 1.0, "big_sq_norm": 0.5, name: value}
    with pytest.raises(ValueError, match=r"moments \(.*\) must be finite, because"):
        estimator.update(GradientMoments(workers=2, global_batch_size=2, **norms))
    assert estimator.estimate().noise_trace == before.noise_trace
    assert estimator.estimate().updates == 1


@pytest.mark.parametrize("decay", [-0.1, 1.0, 1.5, math.nan])
def test_a_decay_outside_its_range_is_refused(decay: float) -> None:
    assert NoiseScaleEstimator(0.0).decay == 0
    with pytest.raises(ValueError, match=rf"decay \({decay}\) must be in \[0, 1\), because"):
        NoiseScaleEstimator(decay)
