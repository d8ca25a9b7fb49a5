"""What one optimizer step measured: two squared norms, and the two unbiased estimates in them.

A step averages the gradients g_j of J small batches ("workers": every pair of a data-parallel rank
and a micro-batch) into g = sum_j q_j g_j, where q_j is the share of small batch j in the step. With
G the true gradient and Sigma the covariance of one sample's gradient,

    E ||g_j||^2 = ||G||^2 + tr(Sigma) / b_j        b_j = q_j B samples
    E ||g||^2   = ||G||^2 + tr(Sigma) / B

so that two measured numbers, S = sum_j q_j ||g_j||^2 and L = ||g||^2, determine both unknowns
(McCandlish et al. 2018, arXiv 1812.06162, appendix A.1, for J equal batches):

    tr(Sigma) = B (S - L) / (J - 1)
    ||G||^2   = L - (S - L) / (J - 1)

With unequal shares q_j = b_j / B the same two lines stay unbiased, because sum_j q_j / b_j = J / B.
Where tokens are the weights, that takes the noise of a small batch to fall with its target tokens.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple


# By the inequality of Cauchy and Schwarz S >= L, whatever the weights. Reductions in low precision
# are off by far less than this.
_LEAST_RATIO = 0.99


class MomentSums(NamedTuple):
    """What one process saw of a step: its share, so that the processes' add up to the step's.

    Processes that hold copies of the same tensor, or see the same samples, divide it among them.

    Attributes:
        weighted_sq_norms: Sum of ||seen_j||^2 / w_j over the micro-batches of weight w_j > 0, where
            seen_j is the gradient as it left backward.
        weight: Sum of the w_j.
        workers: How many they are.
        big_sq_norm: ||g||^2 of the step's gradient, after its reduction.
    """

    weighted_sq_norms: float
    weight: float
    workers: float
    big_sq_norm: float


@dataclass(frozen=True, kw_only=True)
class GradientMoments:
    """The measured numbers of one optimizer step: all-reduced, before clipping, loss scale removed.

    Attributes:
        workers: J, the small batches whose gradients were measured; at least 2.
        global_batch_size: B, in samples.
        small_sq_norm: S, the share-weighted mean of ||g_j||^2 over the workers.
        big_sq_norm: L = ||g||^2, the squared norm of the step's gradient.

    Raises:
        ValueError: If there are fewer than two workers, or fewer samples than workers.
    """

    workers: int
    global_batch_size: int
    small_sq_norm: float
    big_sq_norm: float

    def __post_init__(self) -> None:
        if self.workers < 2:
            raise ValueError(
                f"workers ({self.workers}) must be at least 2, because one gradient alone says "
                "nothing of its noise; accumulate, or split the micro-batch in two on measured "
                "steps."
            )
        if self.global_batch_size < self.workers:
            raise ValueError(
                f"global_batch_size ({self.global_batch_size}) must be at least workers "
                f"({self.workers}), because every small batch holds a sample."
            )

    @classmethod
    def of_sums(
        cls,
        sums: MomentSums,
        *,
        global_batch_size: int,
        data_parallel_size: int = 1,
        left_out: bool = False,
    ) -> "GradientMoments | None":
        """The step's moments from what its processes saw.

        Ranks average their gradients, so that a small batch of share q_j = w_j / sum w was seen as
        R q_j g_j by its rank, and q_j ||g_j||^2 is ||seen_j||^2 / (R^2 q_j).

        Args:
            sums: Added up over all processes.
            global_batch_size: B, the samples of the step over all ranks.
            data_parallel_size: R, the ranks that see different samples.
            left_out: Whether there were micro-batches of weight 0, too. A loss that is not divided
                by weights, such as a router's, may have given them a gradient.

        Returns:
            The moments, possibly not finite; None if fewer than two small batches have a weight,
            of which no noise can be measured.

        Raises:
            RuntimeError: If S is less than a finite L, which no gradients can give.
        """
        workers = round(sums.workers)
        if workers < 2:
            return None
        small = sums.weighted_sq_norms * sums.weight / data_parallel_size**2
        if small < _LEAST_RATIO * sums.big_sq_norm < math.inf and not left_out:
            raise RuntimeError(
                f"The gradients of the micro-batches (mean squared norm {small:g}) must not be "
                f"smaller than their mean ({sums.big_sq_norm:g}): a part of them was not seen, or "
                "the step's gradient was changed after it, by a hook on the parameters or a kind "
                "of parallelism that this version does not know. Please report the model."
            )
        return cls(
            workers=workers,
            global_batch_size=global_batch_size,
            small_sq_norm=small,
            big_sq_norm=sums.big_sq_norm,
        )

    @property
    def is_finite(self) -> bool:
        """Whether both norms are finite; if not, the step says nothing and must be dropped."""
        return math.isfinite(self.small_sq_norm) and math.isfinite(self.big_sq_norm)

    @property
    def worker_variance(self) -> float:
        """The mean squared distance of the workers' gradients from the step's, S - L.

        This is (1/J) sum_j ||g_j - g||^2 of Lau et al. 2025 (DDP-Norm) for equal shares.
        """
        return self.small_sq_norm - self.big_sq_norm

    @property
    def gradient_variance(self) -> float:
        """Unbiased estimate of E||g - G||^2 = tr(Sigma)/B, the left side of the norm test."""
        return self.worker_variance / (self.workers - 1)

    @property
    def noise_trace(self) -> float:
        """Unbiased estimate of tr(Sigma), the trace of the per-sample gradient covariance."""
        return self.global_batch_size * self.gradient_variance

    @property
    def grad_sq_norm(self) -> float:
        """Unbiased estimate of ||G||^2, the true gradient's squared norm; may be zero or less."""
        return self.big_sq_norm - self.gradient_variance
