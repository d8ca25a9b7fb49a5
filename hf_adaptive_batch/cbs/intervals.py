"""An interval of plausible values, and the checks that every fit makes of its numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple


class Interval(NamedTuple):
    """Two ends; 0 or infinity where the data leave a side open.

    Attributes:
        low: Lower end.
        high: Upper end.
    """

    low: float
    high: float

    def scaled(self, factor: float, shift: float = 0.0) -> Interval:
        """The interval of shift + factor x value.

        Args:
            factor: Above 0.
            shift: Added.

        Returns:
            The interval.
        """
        return Interval(shift + factor * self.low, shift + factor * self.high)


def check_positive(name: str, values: Sequence[float], why: str) -> list[float]:
    """Refuse numbers that have no logarithm.

    Args:
        name: Of the values, for the message.
        values: The numbers.
        why: They must be positive.

    Returns:
        Them, as floats.

    Raises:
        ValueError: If one is not positive and finite.
    """
    numbers = [float(value) for value in values]
    for number in numbers:
        if not (number > 0 and math.isfinite(number)):
            raise ValueError(
                f"{name} ({number:g}) must be above 0 and finite, because {why}; correct it, or "
                "leave out its measurement."
            )
    return numbers


def check_share(name: str, value: float, why: str) -> float:
    """Refuse what is no share between 0 and 1.

    Args:
        name: Of the value, for the message.
        value: The share.
        why: It must be one.

    Returns:
        The share.

    Raises:
        ValueError: If it is not strictly between.
    """
    if not 0 < value < 1:
        raise ValueError(f"{name} ({value}) must be between 0 and 1, because {why}; use 0.95.")
    return float(value)
