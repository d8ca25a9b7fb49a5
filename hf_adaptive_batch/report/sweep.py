"""The panel of a learning-rate sweep."""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from .lines import padded
from .panels import Curve, Panel


def sweep_panel(
    tried: Sequence[Mapping[float, float]], chosen: Sequence[float | None]
) -> Panel | None:
    """Final loss against learning rate.

    Args:
        tried: Of each group, learning rate -> final validation loss.
        chosen: Of each group, the learning rate that was taken.

    Returns:
        The panel; None if nothing was swept.
    """
    if not any(tried):
        return None
    losses = sorted(loss for each in tried for loss in each.values() if math.isfinite(loss))
    limits = None
    if losses:
        # Sweeps go on until it gets bad: what is far worse than most would flatten all the rest.
        low, middle = losses[0], losses[len(losses) // 2]
        top = max(loss for loss in losses if loss <= low + 3 * (middle - low))
        limits = padded(low, top)
    curves = []
    for index, (each, taken) in enumerate(zip(tried, chosen, strict=True)):
        rates = sorted(each)
        inside = [r for r in rates if limits and math.isfinite(each[r]) and each[r] <= limits[1]]
        curves.append(
            Curve(
                group=index,
                x=np.array(inside),
                y=np.array([each[rate] for rate in inside]),
                bold=True,
                marked=[i for i, rate in enumerate(inside) if rate == taken],
                beyond=[rate for rate in rates if rate not in inside],
            )
        )
    caption = (
        "Final validation loss, mean of the tuning seeds. Ringed: the learning rate that was taken."
    )
    if any(curve.beyond for curve in curves):
        caption += " Crosses above: diverged, or far above the others."
    return Panel(
        key="learning-rate-sweep",
        title="Final loss against learning rate",
        caption=caption,
        x_label="learning rate",
        y_label="final validation loss",
        curves=curves,
        scales=("log10", "linear"),
        limits=limits,
    )
