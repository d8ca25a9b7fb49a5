"""An interval of plausible values, and the checks that every fit makes of its numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable
from numbers import Real
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


def exp(power: float) -> float:
    """e^power.

    Args:
        power: Any number.

    Returns:
        It; infinity, and no error, where a float cannot hold it.
    """
    try:
        return math.exp(power)
    except OverflowError:
        return math.inf


LEAVE_OUT = "correct it, or leave out its measurement"


def check_positive(
    name: str, values: Iterable[float | None], why: str, way_out: str = "correct it"
) -> list[float]:
    """Refuse numbers that have no logarithm.

    Args:
        name: Of the values, for the message.
        values: The numbers.
        why: They must be positive.
        way_out: What to do about one that is not.

    Returns:
        Them, as floats.

    Raises:
        ValueError: If one is not positive and finite.
    """
    numbers = []
    for value in values:
        try:
            number = float(value)  # type: ignore[arg-type]  # None is refused as text is
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not (number > 0 and math.isfinite(number)):
            shown = value if math.isnan(number) else f"{number:g}"
            raise ValueError(
                f"{name} ({shown}) must be above 0 and finite, because {why}; {way_out}."
            )
        numbers.append(number)
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
    if not (isinstance(value, Real) and 0 < value < 1):
        raise ValueError(f"{name} ({value}) must be between 0 and 1, because {why}; use 0.95.")
    return float(value)
