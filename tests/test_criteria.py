"""The norm test, as published and unbiased: what it compares, and what it asks for."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_adaptive_batch.decide.criteria import NormTest
from hf_adaptive_batch.decide.noise_scale import Measurability, NoiseScale, NoiseScaleEstimator
from hf_adaptive_batch.measure.moments import GradientMoments
from tests import reference


def moments_of(gradients: list[torch.Tensor]) -> GradientMoments:
    """Of single samples' gradients."""
    truth = reference.moments(gradients, [1.0] * len(gradients), len(gradients))
    return GradientMoments(
        workers=len(gradients),
        global_batch_size=len(gradients),
        small_sq_norm=truth["S"],
        big_sq_norm=truth["L"],
    )


def expected_moments(
    *, noise_trace: float, grad_sq_norm: float, samples: int, workers: int
) -> GradientMoments:
    """Moments at their expected values: ||G||^2 + tr(Sigma)/b (McCandlish et al. 2018, A.1)."""
    return GradientMoments(
        workers=workers,
        global_batch_size=samples,
        small_sq_norm=grad_sq_norm + noise_trace * workers / samples,
        big_sq_norm=grad_sq_norm + noise_trace / samples,
    )


def averaged(noise_trace: float, grad_sq_norm: float, error: float = 0.0) -> NoiseScale:
    return NoiseScale(
        updates=10,
        noise_trace=noise_trace,
        grad_sq_norm=grad_sq_norm,
        noise_trace_error=error,
        grad_sq_norm_error=error,
        noise_scale_error=error,
    )


def some_gradients() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(10)
    return list(torch.randn(12, 40, dtype=torch.float64, generator=generator) + 0.4)


# ------------------------------------------------------------------------- against the papers


@pytest.mark.parametrize("eta", [0.1, 0.275, 0.9])
def test_the_published_test_is_that_of_the_authors_code(eta: float) -> None:
    gradients = some_gradients()
    result = NormTest(eta, "published").evaluate(moments_of(gradients))
    assert result.threshold == pytest.approx(eta**2)
    assert result.statistic == pytest.approx(reference.norm_test_statistic(gradients), rel=1e-12)
    asked = reference.norm_test_batch_size(gradients, eta)
    assert result.passing_batch_size == pytest.approx(asked, rel=1e-12)


@pytest.mark.parametrize("eta", [0.1, 0.275, 0.9])
def test_the_unbiased_test_asks_for_the_noise_scale_over_eta_squared(eta: float) -> None:
    gradients = some_gradients()
    truth = reference.moments(gradients, [1.0] * 12, 12)
    noise_scale = truth["noise_trace"] / truth["grad_sq_norm"]
    result = NormTest(eta).evaluate(moments_of(gradients))
    assert result.statistic == pytest.approx(noise_scale / 12, rel=1e-12)
    assert result.passing_batch_size == pytest.approx(noise_scale / eta**2, rel=1e-12)
    # The comparison tells the two estimators apart.
    assert result.statistic != pytest.approx(reference.norm_test_statistic(gradients), rel=1e-2)


def test_the_unbiased_test_takes_the_averages_and_the_batch_of_this_step() -> None:
    step = moments_of(some_gradients())
    result = NormTest(0.5).evaluate(step, averaged(noise_trace=300.0, grad_sq_norm=2.0))
    assert result.statistic == pytest.approx(150 / 12)
    assert result.tested_batch_size == 12
    assert result.passing_batch_size == pytest.approx(150 / 0.25)


def test_the_published_test_does_not_look_at_the_averages() -> None:
    step = moments_of(some_gradients())
    test = NormTest(0.5, "published")
    assert test.evaluate(step, averaged(300.0, 2.0)) == test.evaluate(step)
    assert NormTest(0.5).evaluate(step, averaged(300.0, 2.0)) != NormTest(0.5).evaluate(step)


@given(
    noise_scale=st.floats(1e-3, 1e6),
    grad_sq_norm=st.floats(1e-8, 1e8),
    samples=st.integers(2, 4096),
    eta=st.floats(0.05, 0.99),
)
def test_expected_moments_give_the_law_of_each_estimator(
    noise_scale: float, grad_sq_norm: float, samples: int, eta: float
) -> None:
    """Unbiased: B_simple/eta^2. Published: B_simple b / (B_simple + b) / eta^2."""
    step = expected_moments(
        noise_trace=noise_scale * grad_sq_norm,
        grad_sq_norm=grad_sq_norm,
        samples=samples,
        workers=2,
    )
    unbiased = NormTest(eta).evaluate(step).passing_batch_size
    published = NormTest(eta, "published").evaluate(step).passing_batch_size
    # S - L cancels where the noise is small, L - V where the signal is.
    ratio = noise_scale / samples
    rounding = 1e-12 * (1 + ratio) * (1 + 1 / ratio)
    assert unbiased == pytest.approx(noise_scale / eta**2, rel=rounding)
    seen = noise_scale * samples / (noise_scale + samples)
    assert published == pytest.approx(seen / eta**2, rel=rounding)
    # So one published test multiplies the batch by at most 1/eta^2, however noisy the gradient.
    assert published is not None
    assert published <= samples / eta**2 * (1 + rounding)


def test_the_unbiased_test_is_not_bounded_so() -> None:
    step = expected_moments(noise_trace=1000.0, grad_sq_norm=1.0, samples=10, workers=2)
    published = NormTest(0.5, "published").evaluate(step).passing_batch_size
    unbiased = NormTest(0.5).evaluate(step).passing_batch_size
    assert published == pytest.approx(10 / 0.25, rel=0.02)
    assert unbiased == pytest.approx(1000 / 0.25)


def test_in_few_dimensions_chance_can_exceed_the_published_bound() -> None:
    """The bound is that of the expected ||g||^2; nearly opposite gradients leave less of it."""
    gradients = [torch.tensor(g, dtype=torch.float64) for g in ([1.0, 0.0], [-0.8, 0.0])]
    result = NormTest(0.5, "published").evaluate(moments_of(gradients))
    assert result.passing_batch_size is not None
    assert result.passing_batch_size > 2 / 0.25


def test_a_batch_passes_exactly_from_the_passing_batch_size_on() -> None:
    test, noise = NormTest(0.5), averaged(noise_trace=16.0, grad_sq_norm=2.0)  # asks for 32
    for samples, passes in ((31, False), (32, True), (33, True)):
        step = expected_moments(noise_trace=1, grad_sq_norm=1, samples=samples, workers=2)
        result = test.evaluate(step, noise)
        assert result.passing_batch_size == pytest.approx(32)
        assert result.passed is passes


# ---------------------------------------------------------------------------- not measurable


def test_the_unbiased_test_says_nothing_before_the_second_measured_step() -> None:
    estimator, step = NoiseScaleEstimator(), moments_of(some_gradients())
    first = NormTest(0.5).evaluate(step, estimator.update(step))
    assert first.measurability is Measurability.NOT_YET
    assert first.statistic is None
    assert first.passing_batch_size is None
    assert not first.passed
    second = NormTest(0.5).evaluate(step, estimator.update(step))
    assert second.measurability is Measurability.MEASURED
    assert second.statistic is not None


def test_a_signal_within_its_error_is_dominated_by_noise() -> None:
    step = moments_of(some_gradients())
    result = NormTest(0.5).evaluate(step, averaged(8.0, 2.0, error=2.5))
    assert result.measurability is Measurability.NOISE_DOMINATES
    assert (result.statistic, result.passing_batch_size) == (None, None)
    assert (result.threshold, result.tested_batch_size) == (0.25, 12)
    assert not result.passed


@pytest.mark.parametrize("estimator", ["unbiased", "published"])
def test_opposite_gradients_are_dominated_by_noise(estimator: str) -> None:
    gradients = [torch.tensor(g, dtype=torch.float64) for g in ([3.0, 4.0], [-3.0, -4.0])]
    result = NormTest(0.5, estimator).evaluate(moments_of(gradients))  # type: ignore[arg-type]
    assert result.measurability is Measurability.NOISE_DOMINATES
    assert result.passing_batch_size is None
    assert not result.passed


@pytest.mark.parametrize("estimator", ["unbiased", "published"])
def test_a_zero_gradient_is_no_gradient(estimator: str) -> None:
    result = NormTest(0.5, estimator).evaluate(  # type: ignore[arg-type]
        moments_of([torch.zeros(3, dtype=torch.float64)] * 4)
    )
    assert result.measurability is Measurability.NO_GRADIENT
    assert result.passing_batch_size is None


@pytest.mark.parametrize("estimator", ["unbiased", "published"])
def test_identical_gradients_pass_at_any_batch(estimator: str) -> None:
    result = NormTest(0.01, estimator).evaluate(  # type: ignore[arg-type]
        moments_of([torch.tensor([3.0, 4.0], dtype=torch.float64)] * 4)
    )
    assert result.passed
    assert result.passing_batch_size == 0


def test_a_variance_below_zero_by_rounding_passes_and_asks_for_no_negative_batch() -> None:
    step = GradientMoments(workers=2, global_batch_size=8, small_sq_norm=1 - 1e-9, big_sq_norm=1.0)
    result = NormTest(0.5).evaluate(step)
    assert result.passed
    assert result.passing_batch_size == 0


@pytest.mark.parametrize("estimator", ["unbiased", "published"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_moments_that_are_not_finite_never_pass_and_ask_for_no_batch(
    estimator: str, value: float
) -> None:
    step = GradientMoments(workers=2, global_batch_size=8, small_sq_norm=value, big_sq_norm=1.0)
    result = NormTest(0.5, estimator).evaluate(step)  # type: ignore[arg-type]
    assert not result.passed
    assert result.passing_batch_size is None


# ----------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("eta", [0.0, -0.2, 1.0, 1.5, math.nan, math.inf])
def test_eta_outside_zero_to_one_is_refused(eta: float) -> None:
    assert NormTest(0.2).eta == 0.2
    with pytest.raises(ValueError, match=rf"eta \({eta}\) must be in \(0, 1\), because"):
        NormTest(eta)


def test_an_unknown_estimator_is_refused() -> None:
    with pytest.raises(ValueError, match=r"estimator \('exact'\) must be 'unbiased' or 'publish"):
        NormTest(0.2, "exact")  # type: ignore[arg-type]
