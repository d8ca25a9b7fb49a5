"""GradientMoments: two measured squared norms and the two unbiased estimates in them."""

import dataclasses
import math
from typing import NamedTuple

import pytest
import torch

from hf_adaptive_batch.measure.moments import GradientMoments, MomentSums
from tests import reference


def moments(
    *, workers: int = 4, samples: int = 8, small: float = 3.0, big: float = 1.0
) -> GradientMoments:
    return GradientMoments(
        workers=workers, global_batch_size=samples, small_sq_norm=small, big_sq_norm=big
    )


def moments_of(
    gradients: list[torch.Tensor], weights: list[float], samples: int
) -> GradientMoments:
    truth = reference.moments(gradients, weights, samples)
    return moments(workers=len(gradients), samples=samples, small=truth["S"], big=truth["L"])


class Miniature(NamedTuple):
    """Gradients of which everything can be computed by hand; one sample each."""

    gradients: list[list[float]]
    small_sq_norm: float
    big_sq_norm: float
    noise_trace: float
    grad_sq_norm: float


# noise_trace = B (S - L) / (J - 1), grad_sq_norm = L - (S - L) / (J - 1), with B = J here.
MINIATURES = {
    "identical": Miniature([[3, 4], [3, 4], [3, 4]], 25, 25, 0, 25),
    "opposite": Miniature([[3, 4], [-3, -4]], 25, 0, 50, -25),
    "orthogonal": Miniature([[1, 0], [0, 1]], 1, 0.5, 1, 0),
    "one of four": Miniature([[2, 0], [0, 0], [0, 0], [0, 0]], 1, 0.25, 1, 0),
    "no gradient": Miniature([[0, 0], [0, 0]], 0, 0, 0, 0),
}


@pytest.mark.parametrize("miniature", MINIATURES.values(), ids=MINIATURES.keys())
def test_miniatures_give_the_numbers_computed_by_hand(miniature: Miniature) -> None:
    gradients = [torch.tensor(g, dtype=torch.float64) for g in miniature.gradients]
    found = moments_of(gradients, reference.plain_weights(gradients), len(gradients))
    assert found.small_sq_norm == pytest.approx(miniature.small_sq_norm)
    assert found.big_sq_norm == pytest.approx(miniature.big_sq_norm)
    assert found.noise_trace == pytest.approx(miniature.noise_trace)
    assert found.grad_sq_norm == pytest.approx(miniature.grad_sq_norm)


@pytest.mark.parametrize(
    "weights", [[1.0] * 5, [1.0, 2.0, 3.0, 4.0, 6.0]], ids=["equal shares", "unequal shares"]
)
def test_estimates_are_the_two_batch_estimates_of_mccandlish(weights: list[float]) -> None:
    generator = torch.Generator().manual_seed(1)
    gradients = list(torch.randn(5, 30, dtype=torch.float64, generator=generator) + 0.3)
    truth = reference.moments(gradients, weights, samples=32)
    found = moments_of(gradients, weights, samples=32)
    assert found.noise_trace == pytest.approx(truth["noise_trace"], rel=1e-12)
    assert found.grad_sq_norm == pytest.approx(truth["grad_sq_norm"], rel=1e-12)
    # The comparison could fail: leaving the samples out of account is another number.
    assert moments_of(gradients, weights, samples=16).noise_trace != pytest.approx(
        truth["noise_trace"], rel=1e-3
    )


def test_the_worker_variance_is_the_mean_squared_distance_from_the_mean() -> None:
    generator = torch.Generator().manual_seed(2)
    gradients = list(torch.randn(6, 30, dtype=torch.float64, generator=generator) + 0.3)
    found = moments_of(gradients, [1.0] * 6, samples=6)
    assert found.worker_variance == pytest.approx(reference.worker_variance(gradients), rel=1e-12)
    # Of single samples the unbiased trace is the per-sample variance of the norm test.
    assert found.noise_trace == pytest.approx(reference.sample_variance(gradients), rel=1e-12)
    assert found.worker_variance != pytest.approx(reference.sample_variance(gradients), rel=1e-3)


@pytest.mark.parametrize("factor", [1e-8, 2.0, 1e8])
def test_estimates_scale_with_the_square_of_the_gradient(factor: float) -> None:
    one, scaled = moments(), moments(small=3.0 * factor**2, big=factor**2)
    assert scaled.noise_trace == pytest.approx(one.noise_trace * factor**2)
    assert scaled.grad_sq_norm == pytest.approx(one.grad_sq_norm * factor**2)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_number_that_is_not_finite_makes_the_moments_so(value: float) -> None:
    assert moments().is_finite
    assert not moments(small=value).is_finite
    assert not moments(big=value).is_finite


@pytest.mark.parametrize("workers", [1, 0, -1])
def test_fewer_than_two_workers_are_refused(workers: int) -> None:
    assert moments(workers=2).workers == 2
    with pytest.raises(ValueError, match=rf"workers \({workers}\) must be at least 2, because"):
        moments(workers=workers)


def test_fewer_samples_than_workers_are_refused() -> None:
    assert moments(workers=4, samples=4).global_batch_size == 4
    with pytest.raises(ValueError, match=r"global_batch_size \(3\) must be at least workers \(4\)"):
        moments(workers=4, samples=3)


def test_moments_are_a_value_that_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        moments().small_sq_norm = 0.0  # type: ignore[misc]
    assert moments() == moments()


def of_sums(small: float, big: float, **options: bool) -> GradientMoments | None:
    """Of two ranks with two micro-batches each, whose mean squared norm is `small`."""
    sums = MomentSums(weighted_sq_norms=small, weight=4.0, workers=4.0, big_sq_norm=big)
    return GradientMoments.of_sums(sums, global_batch_size=16, data_parallel_size=2, **options)


@pytest.mark.parametrize("small", [0.0, 0.5, 0.985])
def test_gradients_that_are_smaller_than_their_mean_are_an_error(small: float) -> None:
    with pytest.raises(RuntimeError, match=r"must not be smaller than their mean \(1\)"):
        of_sums(small, 1.0)


@pytest.mark.parametrize("small", [0.995, 1.0, 7.0])
def test_what_rounding_can_make_of_equal_gradients_is_none(small: float) -> None:
    found = of_sums(small, 1.0)
    assert found is not None
    assert (found.small_sq_norm, found.big_sq_norm) == (pytest.approx(small), 1.0)
    assert found.is_finite


@pytest.mark.parametrize("big", [math.inf, math.nan])
def test_a_step_whose_gradient_is_not_finite_is_no_error(big: float) -> None:
    found = of_sums(1.0, big)
    assert found is not None
    assert not found.is_finite


@pytest.mark.parametrize("small", [0.0, 0.5, 3.0])
def test_where_micro_batches_were_left_out_their_mean_may_be_larger(small: float) -> None:
    found = of_sums(small, 1.0, left_out=True)
    assert found is not None
    assert found.small_sq_norm == pytest.approx(small)
