"""The norm test: is the step's gradient precise enough for its batch size?

Byrd et al. 2012 ask that the sampling error of the batch gradient stays below a fraction eta of the
gradient itself, E||g - G||^2 <= eta^2 ||G||^2. Lau et al. 2025 (arXiv 2412.21124; CPAL 2025) put
the variance between data-parallel workers for the left side and call it DDP-Norm and FSDP-Norm:

    Var / B <= eta^2 ||.||^2         Var: estimate of tr(Sigma), B: samples in the step

If it fails, the batch for which the same numbers would just pass is Var / (eta^2 ||.||^2).
"""

import math
from dataclasses import dataclass
from typing import Literal, Protocol

from ..measure.moments import GradientMoments
from .noise_scale import Measurability, NoiseScale


@dataclass(frozen=True, kw_only=True)
class TestResult:
    """One evaluation of the norm test; samples and squared-gradient units.

    Attributes:
        statistic: (Var / B) / ||.||^2, compared with eta^2. None where ||.||^2 is not measurable.
        threshold: eta^2.
        passing_batch_size: Smallest batch in samples that would pass with these numbers, not
            rounded; None where it is not measurable.
        measurability: Why there is no statistic, or that there is one.
        tested_batch_size: B of the step that was tested, in samples; None where it is not known.
    """

    __test__ = False  # pytest: a result, not a test case

    statistic: float | None
    threshold: float
    passing_batch_size: float | None
    measurability: Measurability
    tested_batch_size: int | None = None

    @property
    def passed(self) -> bool:
        """Whether the gradient was precise enough; False where nothing could be measured."""
        return self.statistic is not None and self.statistic <= self.threshold


class Criterion(Protocol):
    """A statistic of a step beside its threshold, and the batch for which it would just pass."""

    def evaluate(self, moments: GradientMoments, noise: NoiseScale | None = None) -> TestResult:
        """Evaluate it for the step that gave `moments`."""
        ...


@dataclass(frozen=True)
class NormTest:
    """The criterion Var / B <= eta^2 ||.||^2.

    Args:
        eta: Tolerated ratio of the gradient's sampling error to its size, in (0, 1).
        estimator: What stands for ||.||^2 and Var.
            `"unbiased"` (default) takes the averaged unbiased ||G||^2 and tr(Sigma); the batch
            settles at B_simple / eta^2. `"published"` takes this step's measured ||g||^2, which
            contains the noise itself, and this step's variance, as the authors' code does
            (AdAdaGrad); it settles at B_simple (1/eta^2 - 1), and in
            expectation one test asks for at most 1/eta^2 times the batch.

    Raises:
        ValueError: If `eta` is outside (0, 1) or `estimator` is unknown.
    """

    eta: float
    estimator: Literal["unbiased", "published"] = "unbiased"

    def __post_init__(self) -> None:
        if not 0 < self.eta < 1:
            raise ValueError(
                f"eta ({self.eta}) must be in (0, 1), because it is the tolerated ratio of the "
                "gradient's error to its size; smaller asks for larger batches, 0.2 aims at 25 "
                "times the noise scale."
            )
        if self.estimator not in ("unbiased", "published"):
            raise ValueError(
                f"estimator ({self.estimator!r}) must be 'unbiased' or 'published', because they "
                "converge to different batch sizes; use 'unbiased' unless you reproduce the "
                "paper."
            )

    def evaluate(self, moments: GradientMoments, noise: NoiseScale | None = None) -> TestResult:
        """Evaluate the test for the step that gave `moments`.

        Args:
            moments: This step's moments; its batch size is the B that is tested.
            noise: The averaged estimate that includes this step. Without it the unbiased estimator
                uses this step's own two estimates, which are far noisier.

        Returns:
            The statistic beside its threshold, and the batch that would pass.
        """
        if self.estimator == "published":
            variance, sq_norm, known = moments.noise_trace, moments.big_sq_norm, None
        else:
            variance, sq_norm, known = _unbiased(moments, noise)
        return _compare(variance, sq_norm, known, moments.global_batch_size, self.eta**2)


@dataclass(frozen=True)
class NoiseScaleTarget:
    """The criterion B >= factor x B_simple, with the averaged unbiased estimates.

    It is the unbiased norm test at eta = 1/sqrt(factor). McCandlish et al. 2018 (arXiv 1812.06162)
    predict that at B = B_simple a step makes half the progress of one without noise.

    Args:
        factor: The batch in noise scales.

    Raises:
        ValueError: If `factor` is not positive.
    """

    factor: float = 1.0

    def __post_init__(self) -> None:
        if not (self.factor > 0 and math.isfinite(self.factor)):
            raise ValueError(
                f"noise_scale_factor ({self.factor}) must be above 0 and finite, because the batch "
                "is so many noise scales; use 1 for the noise scale itself."
            )

    def evaluate(self, moments: GradientMoments, noise: NoiseScale | None = None) -> TestResult:
        """Evaluate it for the step that gave `moments`.

        Args:
            moments: This step's moments; its batch size is the B that is tested.
            noise: The averaged estimate that includes this step; without it, this step's alone.

        Returns:
            B_simple / B beside 1 / factor, and the batch that would pass.
        """
        return _compare(*_unbiased(moments, noise), moments.global_batch_size, 1 / self.factor)


def _unbiased(
    moments: GradientMoments, noise: NoiseScale | None
) -> tuple[float, float, Measurability | None]:
    """The averaged tr(Sigma) and ||G||^2, or this step's alone, for which no error is known."""
    if noise is None:
        return moments.noise_trace, moments.grad_sq_norm, None
    return noise.noise_trace, noise.grad_sq_norm, noise.measurability


def _compare(
    variance: float,
    sq_norm: float,
    known: Measurability | None,
    global_batch_size: int,
    threshold: float,
) -> TestResult:
    """(variance / B) / sq_norm beside the threshold, if sq_norm is above zero."""
    measurability = known or Measurability.MEASURED
    if measurability is Measurability.MEASURED and sq_norm <= 0:
        measurability = Measurability.NOISE_DOMINATES if variance > 0 else Measurability.NO_GRADIENT
    if measurability is not Measurability.MEASURED:
        return TestResult(
            statistic=None,
            threshold=threshold,
            passing_batch_size=None,
            measurability=measurability,
            tested_batch_size=global_batch_size,
        )
    # A variance estimate can fall below zero by chance: then the test passes at any batch size.
    ratio = variance / sq_norm
    return TestResult(
        statistic=ratio / global_batch_size,
        threshold=threshold,
        passing_batch_size=max(ratio, 0.0) / threshold if math.isfinite(ratio) else None,
        measurability=measurability,
        tested_batch_size=global_batch_size,
    )
