"""Numbers as people write them: 1.2B parameters, 24e9 tokens, and back."""

from __future__ import annotations

import math
import re

from ..intervals import Interval


_UNITS = {"": 1.0, "K": 1e3, "M": 1e6, "B": 1e9, "G": 1e9, "T": 1e12}
_QUANTITY = re.compile(r"([+-]?(?:\d[\d_,]*\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*([kKmMbBgGtT]?)")


def quantity(name: str, text: str) -> float:
    """Read a number such as 1.2B, 300M or 24e9.

    Args:
        name: Of the flag, for the message.
        text: What was written.

    Returns:
        The number.

    Raises:
        ValueError: If it is not a number above 0.
    """
    found = _QUANTITY.fullmatch(text.strip())
    value = math.nan
    if found:
        value = float(re.sub("[_,]", "", found[1])) * _UNITS[found[2].upper()]
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(
            f"{name} ({text}) must be a number above 0, because sizes are computed from it; write "
            "such as 1.2B, 300M or 24e9."
        )
    return value


def compact(value: float) -> str:
    """A number in three or four digits, with k, M, B or T where it is large.

    Args:
        value: At least 0; may be infinite.

    Returns:
        Such as 745, 2,191, 2.83M or ∞.
    """
    if math.isinf(value):
        return "∞"
    value = float(f"{value:.4g}")
    if value < 9999.5:
        return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
    value = float(f"{value:.3g}")
    units = (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3))
    unit, size = next(each for each in units if value >= each[1])
    return f"{value / size:.3g}{unit}" if value < 1e15 else f"{value:.3g}"


def between(interval: Interval) -> str:
    """An interval, as short as it can be.

    Args:
        interval: Its ends.

    Returns:
        Such as 688–813.
    """
    return f"{compact(interval.low)}–{compact(interval.high)}"


def share(value: float) -> str:
    """A share in percent, such as 20 % or 2.5 %."""
    return f"{100 * value:.4g} %"
