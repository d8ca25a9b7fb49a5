"""The critical batch size of a fit, by the definition of Zhang et al. with its constants open."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .intervals import Interval, check_positive
from .steps_to_target import FitFlag, StepsToTargetFit


# Zhang et al. 2025 (arXiv 2410.21676): steps 20 % above those of linear scaling from 256 sequences.
OVERHEAD = 0.2
REFERENCE = 256


@dataclass(frozen=True, kw_only=True)
class CriticalBatchSize:
    """The batch at which steps exceed linear scaling from a reference by a given share.

    Measured from whole runs: not the noise scale, which is read from gradients. It depends on the
    two constants of its definition, so that numbers of different ones cannot be compared; by it no
    critical batch size is below (1 + overhead) x reference.

    Attributes:
        sequences: The critical batch size; infinite where the data show no curvature.
        interval: Of `sequences`, at the confidence of the fit.
        tokens_per_sequence: None if it was not given.
        overhead: Share of steps above linear scaling.
        reference: Batch size from which scaling is linear, in sequences.
        confidence: Of the interval.
        flags: What a reader has to know.
    """

    sequences: float
    interval: Interval
    tokens_per_sequence: float | None
    overhead: float
    reference: float
    confidence: float
    flags: tuple[FitFlag, ...]

    @property
    def tokens(self) -> float | None:
        """In tokens; None where a sequence's tokens were not given."""
        return (
            None if self.tokens_per_sequence is None else self.sequences * self.tokens_per_sequence
        )

    @property
    def tokens_interval(self) -> Interval | None:
        """The interval in tokens; None where a sequence's tokens were not given."""
        per = self.tokens_per_sequence
        return None if per is None else self.interval.scaled(per)

    def __float__(self) -> float:
        return self.sequences


def critical_batch_size(
    fit: StepsToTargetFit, overhead: float = OVERHEAD, reference: float = REFERENCE
) -> CriticalBatchSize:
    """Where the fitted steps exceed linear scaling from the reference by `overhead`.

    a + b / B* = (1 + overhead) (a + b / reference) reference / B*, and so
    B* = (1 + overhead) reference + overhead b / a (Zhang et al. 2025, arXiv 2410.21676). Constants
    that are not positive and finite are refused (`ValueError`).

    Args:
        fit: Of steps to a target.
        overhead: Share of steps above linear scaling.
        reference: Batch size in sequences from which scaling is taken to be linear.

    Returns:
        The critical batch size with its interval, flagged where it is extrapolated or open.
    """
    check_positive("overhead", [overhead], "it is the share of steps that a larger batch may waste")
    check_positive("reference", [reference], "scaling is linear from there")
    shift = (1 + overhead) * reference
    value, interval = shift + overhead * fit.knee, fit.knee_interval.scaled(overhead, shift)
    least, most = fit.measurements[0].batch_size, fit.measurements[-1].batch_size
    found = {
        FitFlag.REFERENCE_OUTSIDE: not least <= reference <= most,
        FitFlag.EXTRAPOLATED: not least <= value <= most,
        FitFlag.OPEN_INTERVAL: math.isinf(interval.high) or fit.knee_interval.low == 0,
    }
    return CriticalBatchSize(
        sequences=value,
        interval=interval,
        tokens_per_sequence=fit.tokens_per_sequence,
        overhead=overhead,
        reference=reference,
        confidence=fit.confidence,
        flags=(*fit.flags, *(flag for flag, holds in found.items() if holds)),
    )
