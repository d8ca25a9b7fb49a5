"""From measured critical batch sizes to the schedule `cbs_law`, which follows them in training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .intervals import LEAVE_OUT, check_positive
from .scaling_law import ScalingLaw, fit_power_law


# Zhang et al. 2025 (arXiv 2410.21676), refitted: 18.05 D^0.4682, both in tokens.
PUBLISHED_EXPONENT = 0.468


@dataclass(frozen=True, kw_only=True)
class ScheduleLaw:
    """coefficient x tokens^exponent, in tokens per step: what `batch_schedule="cbs_law"` follows.

    Attributes:
        coefficient: Tokens per step after one token.
        exponent: Of the tokens seen.
        fitted: The law it was taken from; None where a single measurement was given the published
            exponent.
    """

    coefficient: float
    exponent: float
    fitted: ScalingLaw | None

    @property
    def arguments(self) -> dict[str, str | float]:
        """The arguments of `AdaptiveBatchArguments`, and by their names the flags of a command."""
        return {
            "batch_schedule": "cbs_law",
            "cbs_coefficient": float(f"{self.coefficient:.6g}"),
            "cbs_exponent": float(f"{self.exponent:.6g}"),
        }


def schedule_law(
    tokens: Sequence[float], batch_tokens: Sequence[float], *, exponent: float | None = None
) -> ScheduleLaw:
    """The law of critical batch sizes as a schedule.

    Args:
        tokens: D of each measurement.
        batch_tokens: Critical batch size of each, in tokens.
        exponent: To be taken instead of the measured one; by default measured from three or more,
            and `PUBLISHED_EXPONENT` through the geometric mean of fewer, which is an assumption.

    Returns:
        The law.

    Raises:
        ValueError: If a number is not positive, or a measured exponent is not.
    """
    check_positive("tokens", tokens, "logarithms are fitted", LEAVE_OUT)
    check_positive("batch_tokens", batch_tokens, "logarithms are fitted", LEAVE_OUT)
    if not len(tokens) == len(batch_tokens) > 0:
        raise ValueError(
            f"batch_tokens ({len(batch_tokens)}) must be as many as tokens ({len(tokens)}), and "
            "one or more, because each belongs to one; correct it."
        )
    if exponent is None and len(set(tokens)) >= 3:
        law = fit_power_law(list(tokens), list(batch_tokens), names=["D"])
        if law.exponent <= 0:
            raise ValueError(
                f"exponent ({law.exponent:.3g}) of the measured law must be above 0, because the "
                "schedule grows the batch with the tokens seen; measure over a wider range of "
                "tokens, or give an exponent."
            )
        return ScheduleLaw(coefficient=law.coefficient, exponent=law.exponent, fitted=law)
    power = PUBLISHED_EXPONENT if exponent is None else exponent
    check_positive("exponent", [power], "the schedule grows the batch with the tokens seen")
    product = 1.0
    for seen, size in zip(tokens, batch_tokens, strict=True):
        product *= (size / seen**power) ** (1 / len(tokens))
    return ScheduleLaw(coefficient=product, exponent=power, fitted=None)
