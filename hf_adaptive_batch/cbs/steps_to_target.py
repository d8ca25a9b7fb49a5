"""Steps to a target loss against batch size, fitted: Y(B) = a + b / B."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise
from typing import Any, NamedTuple

from .intervals import LEAVE_OUT, Interval, check_positive, check_share
from .steps_curve import StepsCurve
from .trade_off import TradeOff


class FitFlag(StrEnum):
    """What a reader of a fit, or of a critical batch size, has to know."""

    NOT_MONOTONE = (
        "a larger batch took more steps than a smaller one: noise, or a bad learning rate"
    )
    NO_CURVATURE = (
        "steps fall in proportion to the batch: the critical batch size lies above all of them"
    )
    NO_SPEED_UP = "steps do not fall with the batch: the knee lies below all of them"
    NOT_REACHED = "some batch sizes did not reach the target: bounds, which are not fitted"
    PARTLY_REACHED = "only some runs of a batch size reached the target: its steps are too low"
    BOUND_CONTRADICTS = "a batch size did not reach the target in the steps that the curve gives it"
    REFERENCE_OUTSIDE = "the reference batch size lies outside the measured ones: extrapolated"
    EXTRAPOLATED = "the critical batch size lies outside the measured batch sizes: extrapolated"
    OPEN_INTERVAL = "the data bound the critical batch size on one side at most"


class StepsMeasurement(NamedTuple):
    """One training run, or the mean of some, that reached the target.

    Attributes:
        batch_size: In sequences.
        steps: Optimizer steps to the target loss.
    """

    batch_size: float
    steps: float


class NotReached(NamedTuple):
    """A run that ended above the target: its steps to the target are more than it trained for.

    Attributes:
        batch_size: In sequences.
        more_than_steps: Optimizer steps trained for; 0 where that is not known.
    """

    batch_size: float
    more_than_steps: float


@dataclass(frozen=True, kw_only=True)
class StepsToTargetFit:
    """Y(B) = a + b / B, by least squares on log Y (Zhang et al. 2025, arXiv 2410.21676).

    Intervals are of the profile: every a and b whose sum of squares is within Student's t of the
    least one (Bates & Watts 1988, ch. 6). They need not be symmetric, and may be open: without any
    curvature in the data a may be 0, and b / a has no upper end.

    Attributes:
        a: Optimizer steps that no batch saves; S_min of the trade-off.
        b: Sequences that no batch saves; E_min of the trade-off.
        a_interval: Of a.
        b_interval: Of b.
        knee_interval: Of b / a, in sequences.
        residual: Standard deviation of log steps around the curve, with n - 2 degrees of freedom.
        confidence: Of the intervals.
        measurements: That were fitted, by batch size.
        not_reached: Bounds, by batch size; they were not fitted.
        tokens_per_sequence: None if it was not given.
        flags: What a reader has to know.
    """

    a: float
    b: float
    a_interval: Interval
    b_interval: Interval
    knee_interval: Interval
    residual: float
    confidence: float
    measurements: tuple[StepsMeasurement, ...]
    not_reached: tuple[NotReached, ...] = ()
    tokens_per_sequence: float | None = None
    flags: tuple[FitFlag, ...] = ()

    @property
    def knee(self) -> float:
        """The knee of the trade-off, b / a in sequences; infinite where a is 0."""
        return self.b / self.a if self.a else math.inf

    @property
    def knee_tokens(self) -> float | None:
        """The knee in tokens; None where a sequence's tokens were not given."""
        return None if self.tokens_per_sequence is None else self.knee * self.tokens_per_sequence

    @property
    def trade_off(self) -> TradeOff:
        """The trade-off of steps against examples; a `ValueError` where a or b is 0."""
        if not (self.a and self.b):
            raise ValueError(
                f"a and b ({self.a:g}, {self.b:g}) must be above 0, because there is no trade-off "
                f"where steps {'fall in proportion to' if self.b else 'do not fall with'} the "
                f"batch; measure {'larger' if self.b else 'smaller'} batch sizes."
            )
        return TradeOff(min_steps=self.a, min_examples=self.b)

    def steps_at(self, batch_size: float) -> float:
        """The curve.

        Args:
            batch_size: In sequences.

        Returns:
            Optimizer steps to the target.
        """
        [size] = check_positive("batch_size", [batch_size], "a step trains on sequences")
        return self.a + self.b / size


def fit_steps_to_target(
    batch_sizes: Sequence[float],
    steps: Sequence[float | None],
    *,
    trained_steps: Sequence[float | None] | None = None,
    tokens_per_sequence: float | None = None,
    confidence: float = 0.95,
) -> StepsToTargetFit:
    """Fit steps to a target loss as a function of the batch size.

    Runs that did not reach it are not fitted. Where other seeds of their batch size did, those were
    the fast ones, and the curve lies too low there: train for longer, or leave that size out.

    Args:
        batch_sizes: In sequences. One may stand several times, for several seeds.
        steps: Optimizer steps to the target of each; None, NaN or infinity for one that did not
            reach it, which is kept as a bound and not fitted.
        trained_steps: Optimizer steps that each was trained for: the bounds of those; None or NaN
            where it is not known.
        tokens_per_sequence: For sizes in tokens.
        confidence: Of the intervals.

    Returns:
        The fit, flagged where it cannot be taken at its word.

    Raises:
        ValueError: If fewer than three batch sizes reached the target, lengths differ, or a number
            is not positive.
    """
    trained = [None] * len(steps) if trained_steps is None else trained_steps
    if not len(batch_sizes) == len(steps) == len(trained):
        raise ValueError(
            f"steps ({len(steps)}) and trained_steps ({len(trained)}) must be as many as "
            f"batch_sizes ({len(batch_sizes)}), because each belongs to one; give None for a "
            "target that was not reached."
        )
    check_share("confidence", confidence, "it is the share of such intervals that hold the truth")
    if tokens_per_sequence is not None:
        check_positive("tokens_per_sequence", [tokens_per_sequence], "sizes are counted in it")
    sizes = check_positive("batch_sizes", batch_sizes, "a step trains on sequences", LEAVE_OUT)
    reached = [not (_unknown(s) or s == math.inf) for s in steps]
    bounds = tuple(
        NotReached(size, _bound(t))
        for size, t, hit in sorted(zip(sizes, trained, reached, strict=True), key=_size)
        if not hit
    )
    found = [(size, s) for size, s, hit in zip(sizes, steps, reached, strict=True) if hit]
    checked = check_positive("steps", [s for _, s in found], "logarithms are fitted", LEAVE_OUT)
    points = sorted(StepsMeasurement(size, s) for (size, _), s in zip(found, checked, strict=True))
    different = len({point.batch_size for point in points})
    if different < 3:
        raise ValueError(
            f"batch sizes that reached the target ({different}) must be three or more, because two "
            "numbers are fitted and their error has to be known; measure more batch sizes"
            + (", or train for longer." if bounds else ".")
        )
    curve = StepsCurve(points, confidence)
    fit = StepsToTargetFit(
        a=curve.a,
        b=curve.b,
        a_interval=curve.a_interval,
        b_interval=curve.b_interval,
        knee_interval=curve.knee_interval,
        residual=curve.residual,
        confidence=confidence,
        measurements=tuple(points),
        not_reached=bounds,
        tokens_per_sequence=tokens_per_sequence,
    )
    return _with_flags(fit)


def _size(entry: tuple[float, Any, Any]) -> float:
    return entry[0]


def _unknown(steps: float | None) -> bool:
    return steps is None or steps != steps  # NaN, in which tables write what is not there


def _bound(steps: float | None) -> float:
    if _unknown(steps) or steps == 0:
        return 0.0
    return check_positive("trained_steps", [steps], "it is a bound", LEAVE_OUT)[0]


def _with_flags(fit: StepsToTargetFit) -> StepsToTargetFit:
    means: dict[float, list[float]] = {}
    for size, steps in fit.measurements:
        means.setdefault(size, []).append(math.log(steps))
    in_order = [math.fsum(logs) / len(logs) for _, logs in sorted(means.items())]
    found = {
        FitFlag.NOT_MONOTONE: any(later > now + 1e-12 for now, later in pairwise(in_order)),
        FitFlag.NO_CURVATURE: fit.a == 0,
        FitFlag.NO_SPEED_UP: fit.b == 0,
        FitFlag.NOT_REACHED: bool(fit.not_reached),
        FitFlag.PARTLY_REACHED: any(size in means for size, _ in fit.not_reached),
        FitFlag.BOUND_CONTRADICTS: any(fit.steps_at(size) < more for size, more in fit.not_reached),
    }
    flags = tuple(flag for flag, holds in found.items() if holds)
    return StepsToTargetFit(**{**vars(fit), "flags": flags})
