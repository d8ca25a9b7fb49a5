"""The oracle: the papers' formulas written out naively in float64, without the library.

Every function is a loop or a line that can be held beside its equation. Gradients are lists with
one flat float64 vector per small batch.

    McCandlish et al. 2018, "An Empirical Model of Large-Batch Training", arXiv 1812.06162
    Lau et al. 2025, "Adaptive Batch Size Schedules for Distributed Training", arXiv 2412.21124
    Lau et al. 2024, AdAdaGrad: `norm_test` in `tests.py` of the authors' code
    Zhang et al. 2025, "How Does Critical Batch Size Scale in Pre-training?", arXiv 2410.21676:
        `AdamW` in `olmo/optim.py` of the authors' code
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


# ---------------------------------------------------------------------------------- gradients


def micro_batch_gradients(
    model: nn.Module, batches: Iterable[Any], loss_of: Callable[[nn.Module, Any], Tensor]
) -> list[Tensor]:
    """The gradient of each micro-batch, by one backward call for each and nothing in between.

    `loss_of(model, batch)` is the plain mean loss of the micro-batch: unweighted, unscaled. Leaves
    `.grad` of the model empty.
    """
    gradients = []
    for batch in batches:
        model.zero_grad(set_to_none=True)
        loss_of(model, batch).backward()
        gradients.append(flat_gradient(model))
    model.zero_grad(set_to_none=True)
    return gradients


def flat_gradient(model: nn.Module) -> Tensor:
    """`.grad` of all trainable parameters as one float64 vector: tied once, without gradient 0."""
    parts = []
    for parameter in model.parameters():  # yields a tied parameter once
        if not parameter.requires_grad:
            continue
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        if gradient.is_complex():
            gradient = torch.view_as_real(gradient)
        parts.append(gradient.detach().flatten().double())
    return torch.cat(parts)


# ------------------------------------------------------------------------------------ weights


def plain_weights(batches: Sequence[Any]) -> list[float]:
    """Plain mean over micro-batches: every micro-batch weighs the same."""
    return [1.0 for _ in batches]


def token_weights(labels: Iterable[Tensor]) -> list[float]:
    """Mean over target tokens: a micro-batch weighs as many as it has.

    A causal model predicts no first token, and -100 marks what is not predicted.
    """
    weights = []
    for label in labels:
        count = 0
        for row in label.tolist():
            for token in row[1:]:
                if token != -100:
                    count += 1
        weights.append(float(count))
    return weights


def step_gradient(gradients: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """The step's gradient g = sum_j w_j g_j / sum_j w_j."""
    total = torch.zeros_like(gradients[0])
    for gradient, weight in zip(gradients, weights, strict=True):
        if weight > 0:
            total += weight * gradient
    return total / sum(weights)


# ------------------------------------------------------------------------------- noise scale


def grad_sq_norm(small_sq_norm: float, big_sq_norm: float, small: float, big: float) -> float:
    """Unbiased ||G||^2 from two batch sizes (McCandlish et al. 2018, appendix A.1)."""
    return (big * big_sq_norm - small * small_sq_norm) / (big - small)


def noise_trace(small_sq_norm: float, big_sq_norm: float, small: float, big: float) -> float:
    """Unbiased tr(Sigma) from two batch sizes (McCandlish et al. 2018, appendix A.1)."""
    return (small_sq_norm - big_sq_norm) / (1 / small - 1 / big)


def moments(
    gradients: Sequence[Tensor], weights: Sequence[float], samples: int
) -> dict[str, float]:
    """S, L and the two unbiased estimates of one step (McCandlish et al. 2018, appendix A.1).

    The big batch is the step, of B samples. The small ones are its J small batches: of B / J
    samples each, or of q_j B samples, of which the share-weighted harmonic mean is B / J too. A
    small batch of weight 0 does not take part.
    """
    taking_part = [(g, w) for g, w in zip(gradients, weights, strict=True) if w > 0]
    kept, kept_weights = [g for g, _ in taking_part], [w for _, w in taking_part]
    small_sq_norm = 0.0
    for gradient, weight in taking_part:
        small_sq_norm += weight / sum(kept_weights) * gradient.dot(gradient).item()
    step = step_gradient(kept, kept_weights)
    big_sq_norm = step.dot(step).item()
    sizes = {"small": samples / len(kept), "big": float(samples)}
    return {
        "S": small_sq_norm,
        "L": big_sq_norm,
        "noise_trace": noise_trace(small_sq_norm, big_sq_norm, **sizes),
        "grad_sq_norm": grad_sq_norm(small_sq_norm, big_sq_norm, **sizes),
    }


# -------------------------------------------------------------------------------- norm test


def worker_variance(gradients: Sequence[Tensor]) -> float:
    """(1/J) sum_j ||g_j - g||^2 over workers of equal size (Lau et al. 2025, DDP-Norm)."""
    mean = torch.stack(list(gradients)).mean(0)
    distances = 0.0
    for gradient in gradients:
        distances += (gradient - mean).square().sum().item()
    return distances / len(gradients)


def sample_variance(gradients: Sequence[Tensor]) -> float:
    """||Var||_1 with Var = (1/(b-1)) sum_i (g_i - g)^2 element by element (AdAdaGrad).

    `gradients` are those of single samples.
    """
    mean = torch.stack(list(gradients)).mean(0)
    variance = torch.zeros_like(mean)
    for gradient in gradients:
        variance += (gradient - mean).square() / (len(gradients) - 1)
    return variance.abs().sum().item()


def norm_test_statistic(gradients: Sequence[Tensor]) -> float:
    """(||Var||_1 / b) / ||g||^2, which passes up to eta^2 (Byrd et al. 2012; AdAdaGrad)."""
    mean = torch.stack(list(gradients)).mean(0)
    return sample_variance(gradients) / len(gradients) / mean.dot(mean).item()


def norm_test_batch_size(gradients: Sequence[Tensor], eta: float) -> float:
    """||Var||_1 / (eta^2 ||g||^2), not rounded: the update of AdAdaGrad where the test fails."""
    mean = torch.stack(list(gradients)).mean(0)
    return sample_variance(gradients) / (eta**2 * mean.dot(mean).item())


# -------------------------------------------------------------------- gradients of known noise


def weight_average(
    weights: Sequence[Tensor], decays: Sequence[float], start: Tensor | None = None
) -> Tensor:
    """w <- tau w + (1 - tau) theta after each step; Zhang et al., `AdamW.step` and its evaluation.

    From zeros, and divided by 1 - product of tau (1 - tau^t where tau is constant); or, without a
    correction, from the weights at the start.
    """
    average = torch.zeros_like(weights[0].double()) if start is None else start.double()
    product = 1.0
    for theta, tau in zip(weights, decays, strict=True):
        average = tau * average + (1 - tau) * theta.double()
        product *= tau
    return average / (1 - product) if start is None else average


@dataclass(frozen=True, kw_only=True)
class KnownNoise:
    """Gradients whose mean G and covariance Sigma = diag(deviation^2) are known."""

    mean: Tensor  # G, [d], float64
    deviation: Tensor  # standard deviation of one sample's gradient, [d], float64

    @classmethod
    def of_noise_scale(cls, noise_scale: float, dimension: int) -> "KnownNoise":
        """||G|| = 1 and tr(Sigma) = `noise_scale`, with variances from 1 to 4 times the least."""
        mean = torch.full((dimension,), dimension**-0.5, dtype=torch.float64)
        variance = torch.linspace(1, 4, dimension, dtype=torch.float64)
        return cls(mean=mean, deviation=(variance * noise_scale / variance.sum()).sqrt())

    @property
    def noise_trace(self) -> float:
        """tr(Sigma)."""
        return self.deviation.square().sum().item()

    @property
    def grad_sq_norm(self) -> float:
        """||G||^2."""
        return self.mean.square().sum().item()

    @property
    def noise_scale(self) -> float:
        """B_simple = tr(Sigma) / ||G||^2 (McCandlish et al. 2018, equation 2.9)."""
        return self.noise_trace / self.grad_sq_norm

    def expected_sq_norm(self, samples: float) -> float:
        """E ||g||^2 = ||G||^2 + tr(Sigma) / b of a batch of b samples (appendix A.1)."""
        return self.grad_sq_norm + self.noise_trace / samples

    def skewed_samples(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Gradients of single samples, [*shape, d]; exponential, so nothing hangs on Gaussians."""
        uniform = torch.rand(*shape, len(self.mean), dtype=torch.float64, generator=generator)
        return self.mean + self.deviation * (-torch.log1p(-uniform) - 1)

    def worker_gradients(self, sizes: Sequence[int], generator: torch.Generator) -> list[Tensor]:
        """One mean gradient per worker of `sizes` samples: Gaussian, drawn at once."""
        gradients = []
        for size in sizes:
            normal = torch.randn(len(self.mean), dtype=torch.float64, generator=generator)
            gradients.append(self.mean + self.deviation / math.sqrt(size) * normal)
        return gradients
