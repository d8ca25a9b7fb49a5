"""Seesaw: the batch takes over what a learning-rate schedule would cut."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import ClassVar

from .schedule import BatchSchedule, Unit, check_cap


@dataclass(frozen=True, kw_only=True)
class Seesaw(BatchSchedule):
    """The batch grows where a reference schedule would cut the learning rate.

    Meterez et al. 2025 (arXiv 2510.14717): where the reference cuts it by alpha, the batch is
    multiplied by alpha and the learning rate divided by sqrt(alpha) alone. In the limit of small
    cuts, batch = first_size x peak / reference, rounded down. Before the reference's peak nothing
    happens.

    Args:
        reference: The reference's learning rate, in any unit, by the share of the budget.
        first_size: Samples per step at the reference's peak.
        max_size: Most samples per step.
        alpha: The cut that is waited for; None follows the reference continuously.
        corners: Where the reference may have its peak: at whole multiples of the budget divided by
            this, such as its optimizer steps.

    Raises:
        ValueError: If the reference never falls, or rises after it fell, alpha is not above 1, or
            the sizes are not in order.
    """

    reference: Callable[[float], float]
    first_size: int
    max_size: int
    alpha: float | None = None
    corners: int = 2**24
    unit: Unit = Unit.BUDGET
    # A larger batch than the reference's cut has made room for would raise the learning rate.
    rounds_down: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.alpha is not None and not (self.alpha > 1 and math.isfinite(self.alpha)):
            raise ValueError(
                f"seesaw_alpha ({self.alpha}) must be above 1 and finite, because the batch is "
                "multiplied by it; use 2 to double, or leave it out to follow continuously."
            )
        check_cap(self.first_size, self.max_size)
        values = self._values
        if not all(map(math.isfinite, values)):
            raise ValueError(
                "learning rate (NaN or infinite at a part of the budget) must be finite, because "
                "seesaw divides by it; choose another schedule, such as cosine or linear."
            )
        falling = values[values.index(max(values)) :]
        if not 0 <= falling[-1] < falling[0]:
            raise ValueError(
                f"learning rate at the end ({falling[-1]:g} of a peak of {falling[0]:g}) must be "
                "from 0 to below its peak, because seesaw grows the batch where the learning rate "
                "would fall; choose a schedule that decays, such as cosine or linear."
            )
        slack = 0.01 * falling[0]  # a schedule of transformers turns up at its very end
        if any(after > before + slack for before, after in pairwise(falling)):
            raise ValueError(
                f"learning rate (peak {falling[0]:g}) must not rise again after it fell, because "
                "seesaw's batch would have to shrink there; choose a schedule without restarts."
            )

    @property
    def can_change(self) -> bool:
        """Whether there is room between the sizes."""
        return self.max_size > self.first_size

    @property
    def _stride(self) -> int:
        return max(1, self.corners // 4096)

    @cached_property
    def _values(self) -> list[float]:
        """The reference from begin to end, at every corner or at some thousand of them."""
        at = [*range(0, self.corners, self._stride), self.corners]
        return [self.reference(corner / self.corners) for corner in at]

    @cached_property
    def _peak(self) -> tuple[float, float]:
        """The share of the budget at which the reference is highest, and its value there."""
        near = self._values.index(max(self._values)) * self._stride
        around = range(max(near - self._stride, 0), min(near + self._stride, self.corners) + 1)
        value, corner = max((self.reference(at / self.corners), -at) for at in around)
        return -corner / self.corners, value

    def decay_at(self, progress: float) -> float:
        """What the reference has fallen to, as a share of its peak; 1 before the peak.

        Args:
            progress: Share of the budget.

        Returns:
            In [0, 1].
        """
        at, peak = self._peak
        return 1.0 if progress <= at else min(max(self.reference(progress) / peak, 0.0), 1.0)

    def cut_at(self, progress: float) -> float:
        """The decay by the cuts that were made: with `alpha`, the last power of 1/alpha reached.

        Args:
            progress: Share of the budget.

        Returns:
            In [0, 1], and not below `decay_at`.
        """
        decay = self.decay_at(progress)
        if self.alpha is None or decay == 0:
            return decay
        # A cut is reached at its value, also where a rounding error lies between.
        return float(self.alpha ** -math.floor(-math.log(decay) / math.log(self.alpha) + 1e-9))

    def learning_rate_factor(self, progress: float, ratio: float) -> float:
        """What the reference learning rate is multiplied by: sqrt(B / B0).

        For Adam, a cut of the learning rate by a and a growth of the batch by b act alike where
        a sqrt(b) is the same. So a cut of the reference is made up by sqrt(B / B0), with the B that
        is trained on: rounded, and under a cap. Between two cuts the rate stays as it is.

        Args:
            progress: Share of the budget.
            ratio: B / B0.

        Returns:
            A factor of the reference's learning rate.
        """
        decay = self.decay_at(progress)
        return self.cut_at(progress) / decay * math.sqrt(ratio) if decay > 0 else 0.0

    def size_at(self, progress: float) -> int:
        """The first size divided by what the reference has fallen to.

        Args:
            progress: Share of the budget.

        Returns:
            Samples per optimizer step.
        """
        decay = self.cut_at(progress)
        if decay * self.max_size <= self.first_size:
            return self.max_size
        return math.floor(self.first_size / decay * (1 + 1e-9))
