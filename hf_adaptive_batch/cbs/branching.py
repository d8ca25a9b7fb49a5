"""The critical batch size at a checkpoint, by branches of it: the rule of Merrill et al. 2025."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from .intervals import Interval, check_positive


# Merrill et al. 2025 (arXiv 2505.23971).
TOLERANCE = 0.01
SMOOTHING = 0.5

# Losses are decimals that floats only come near: a tie within it is a tie.
_ROUNDING = 1e-12


class BranchOutcome(StrEnum):
    """What the branches say of the critical batch size."""

    BRACKETED = "it lies between the largest batch that passed and the next one"
    NONE_PASSED = "no larger batch passed: it lies below the next one, perhaps below the smallest"
    ALL_PASSED = "the largest batch passed: it lies above, by how much was not measured"


@dataclass(frozen=True, kw_only=True)
class BranchedBatchSize:
    """The local critical batch size by branched training.

    Attributes:
        factor: k*, the largest factor whose loss is at most that of every smaller one plus the
            tolerance.
        next_factor: The next larger factor that was tried; None if there is none.
        batch_size: B of the checkpoint in samples: the batch of factor 1.
        losses: Smoothed loss by factor.
        tolerance: In units of the loss.
        outcome: What they say.
        failed_below: Factors below k* that did not pass themselves: the losses are noisy, or do not
            rise with the batch.
        undecided: Factors whose verdict is within the losses' error; empty where none was given.
    """

    factor: float
    next_factor: float | None
    batch_size: float
    losses: Mapping[float, float]
    tolerance: float
    outcome: BranchOutcome
    failed_below: tuple[float, ...] = ()
    undecided: tuple[float, ...] = ()

    @property
    def bracket(self) -> Interval:
        """B* = k* B, and the next larger batch; infinite where none was tried.

        Where none passed, B* is the smallest batch, which passes by the rule and not by a
        comparison: the critical batch size may lie below.
        """
        upper = math.inf if self.next_factor is None else self.next_factor * self.batch_size
        return Interval(self.factor * self.batch_size, upper)

    @property
    def critical_batch_size(self) -> float | None:
        """The reported point: geometric mean of the bracket, in samples; None where it is open."""
        low, high = self.bracket
        return None if math.isinf(high) else math.sqrt(low * high)


def smoothed_loss(losses: Sequence[float], smoothing: float = SMOOTHING) -> float:
    """The last value of an exponential moving average that begins with the first loss.

    Args:
        losses: Of a branch's steps, in order.
        smoothing: Weight of each new loss, in (0, 1]; 1 takes the last loss.

    Returns:
        The average.

    Raises:
        ValueError: If there is no loss, or the weight is out of range.
    """
    if not 0 < smoothing <= 1:
        raise ValueError(
            f"smoothing ({smoothing}) must be in (0, 1], because it is the weight of each new "
            "loss; use 0.5."
        )
    if len(losses) == 0:
        raise ValueError(
            "losses (none) of a branch must be at least one, because they are averaged; train "
            "each branch for a step or more."
        )
    average = float(losses[0])
    for loss in losses[1:]:
        average = (1 - smoothing) * average + smoothing * float(loss)
    return average


def branched_batch_size(
    losses: Mapping[float, float | None],
    *,
    batch_size: float,
    tolerance: float = TOLERANCE,
    errors: Mapping[float, float] | None = None,
) -> BranchedBatchSize:
    """Merrill's rule: k* = max {k : L_k <= L_k' + tolerance for all k' < k}.

    A tie passes. The smallest factor has none below it, and so always passes; a loss that is not
    finite passes never, and does not count for others.

    Args:
        losses: Smoothed loss by the factor k of its batch; None or NaN for a branch that diverged.
        batch_size: B in samples, the batch of factor 1.
        tolerance: Merrill's epsilon, in units of the loss.
        errors: Standard errors of the losses, by factor, where they are known; they only mark
            verdicts as undecided.

    Returns:
        k*, its bracket, and what the branches say.

    Raises:
        ValueError: If there are fewer than two branches, or a number is out of range.
    """
    numbers = check_positive("factor", losses, "it multiplies the batch")
    found = {
        factor: math.nan if loss is None else float(loss)
        for factor, loss in zip(numbers, losses.values(), strict=True)
    }
    error = {float(factor): value for factor, value in (errors or {}).items()}
    factors = sorted(found)
    check_positive("batch_size", [batch_size], "factors multiply it")
    if len(factors) < 2:
        raise ValueError(
            f"losses ({len(factors)}) must be of two factors or more, because they are "
            "compared; branch at 1, 2, 4 and so on."
        )
    if not (tolerance >= 0 and math.isfinite(tolerance)):
        raise ValueError(
            f"tolerance ({tolerance}) must be at least 0 and finite, because it is how much loss "
            "may be given away; use 0.01."
        )
    if not math.isfinite(found[factors[0]]):
        raise ValueError(
            f"loss ({found[factors[0]]}) of factor {factors[0]:g} must be finite, because the "
            "others are compared with it; branch from an earlier checkpoint."
        )
    passed, undecided, least, least_factor = [factors[0]], [], found[factors[0]], factors[0]
    for factor in factors[1:]:
        loss, limit = found[factor], least + tolerance
        if not math.isfinite(loss):
            continue
        if loss <= limit + _ROUNDING * abs(limit):
            passed.append(factor)
        both = [error.get(each, math.nan) for each in (factor, least_factor)]
        if abs(loss - limit) < math.hypot(*both):
            undecided.append(factor)
        if loss < least:
            least, least_factor = loss, factor
    star = passed[-1]
    above = [factor for factor in factors if factor > star]
    outcome = BranchOutcome.BRACKETED if len(passed) > 1 else BranchOutcome.NONE_PASSED
    return BranchedBatchSize(
        factor=star,
        next_factor=above[0] if above else None,
        batch_size=float(batch_size),
        losses={factor: found[factor] for factor in factors},
        tolerance=tolerance,
        outcome=outcome if above else BranchOutcome.ALL_PASSED,
        failed_below=tuple(f for f in factors if f < star and f not in passed),
        undecided=tuple(undecided),
    )
