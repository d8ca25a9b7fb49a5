"""All sweeps in one picture: the trade-off, and the noise scale beside the critical batch size."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ...report.drawing import dress, set_scale, style_of
from .fit_report import FitReport
from .picture import COMPACT, Picture
from .quantities import share


def trade_off_picture(report: FitReport) -> Picture:
    """Steps against sequences to the target: the hyperbola, and its knee.

    Args:
        report: The report.

    Returns:
        The picture.
    """
    groups = [
        group
        for group, each in enumerate(report.sweeps)
        if each.fit is not None and each.fit.a > 0 and each.fit.b > 0
    ]
    title = "The trade-off: steps against sequences to the target loss"
    if not groups:
        caption = "No fit has both a least number of steps and a least number of sequences."
        return Picture(key="trade-off", title=title, caption=caption, draw=None)
    return Picture(
        key="trade-off",
        title=title,
        caption="Points: what was fitted, a mean for each batch size, small ones to the upper "
        "left. Curves: (S / S_min - 1)(E / E_min - 1) = 1 of the same fits. Rings: the knee b/a, "
        "where both are twice their least. It is another definition than that of the critical "
        "batch size here.",
        draw=lambda figure, ink: _draw_trade_off(figure, ink, report, groups),
        groups=groups,
    )


def noise_picture(report: FitReport) -> Picture:
    """The noise scale of the same runs, with the critical batch size beside it.

    Args:
        report: The report.

    Returns:
        The picture.
    """
    groups = [g for g, each in enumerate(report.sweeps) if each.sweep.noise_scales()]
    title = "Noise scale of the same runs, and the critical batch size beside it"
    if not groups:
        caption = "The noise scale was not measured in these runs."
        return Picture(key="noise-scale", title=title, caption=caption, draw=None)
    return Picture(
        key="noise-scale",
        title=title,
        caption="Left: the noise scale tr(Sigma)/|G|^2, read from gradients at the end of each "
        "run, geometric means over seeds. Right, on the same scale: the critical batch size of the "
        f"same sweeps, measured from whole runs, with its {share(report.confidence)} interval. "
        "They are two quantities, and need not agree.",
        draw=lambda figure, ink: _draw_noise(figure, ink, report, groups),
        groups=groups,
    )


def _draw_trade_off(figure: Figure, ink: str, report: FitReport, groups: list[int]) -> None:
    axes = figure.subplots()
    examples: list[float] = []
    for group in groups:
        fit, style = report.sweeps[group].fit, style_of(group)
        assert fit is not None
        sizes = [point.batch_size for point in fit.measurements]
        grid = np.geomspace(min(sizes) / 1.5, max(sizes) * 1.5, 200)
        steps = fit.a + fit.b / grid
        axes.plot(grid * steps, steps, color=style.color, lw=1.4, zorder=2)
        examples += [*(grid * steps), *(size * count for size, count in fit.measurements)]
        for size, count in fit.measurements:
            marker: dict[str, Any] = {
                "marker": style.marker,
                "ms": 4,
                "mew": 0,
                "color": style.color,
            }
            axes.plot([size * count], [count], ls="", zorder=3, **marker)
        if grid[0] <= fit.knee <= grid[-1]:
            ring: dict[str, Any] = {"mfc": "none", "mec": ink, "mew": 1.2, "ms": 9}
            axes.plot([2 * fit.b], [2 * fit.a], "o", zorder=4, **ring)
    axes.set_xlim(min(examples) / 1.2, max(examples) * 1.2)
    set_scale(axes.xaxis, "log10", axes.set_xscale)
    axes.xaxis.set_major_formatter(COMPACT)
    set_scale(axes.yaxis, "log10", axes.set_yscale)
    axes.yaxis.set_major_formatter(COMPACT)
    dress(axes, "sequences to the target", "steps to the target", ink)


def _draw_noise(figure: Figure, ink: str, report: FitReport, groups: list[int]) -> None:
    axes, beside = figure.subplots(1, 2, sharey=True, width_ratios=(4, 1.5))
    values: list[float] = []
    for place, group in enumerate(groups):
        each, style = report.sweeps[group], style_of(group)
        scales = each.sweep.noise_scales()
        dashes = (0, style.dashes) if style.dashes else "-"
        axes.plot(
            list(scales),
            list(scales.values()),
            color=style.color,
            ls=dashes,
            marker=style.marker,
            ms=5,
            mew=0,
        )
        values += scales.values()
        if each.critical is None or not each.is_finite:
            continue
        low, high = each.critical.interval
        top = high if math.isfinite(high) else 100 * each.critical.sequences
        beside.plot([place, place], [low, top], color=style.color, lw=1.4)
        beside.plot([place], [float(each.critical)], marker=style.marker, ms=6, color=style.color)
        values += [low, float(each.critical), *([high] if math.isfinite(high) else [])]
    set_scale(axes.xaxis, "log2", axes.set_xscale)
    axes.set_ylim(min(values) / 1.6, max(values) * 1.6)
    set_scale(axes.yaxis, "log10", axes.set_yscale)
    axes.yaxis.set_major_formatter(COMPACT)
    dress(axes, "batch size (sequences)", "noise scale (sequences)", ink)
    dress(beside, "critical\nbatch size", "", ink)
    _strip(beside, len(groups))


def _strip(axes: Axes, places: int) -> None:
    """A strip whose abscissa means nothing."""
    axes.set_xlim(-0.7, places - 0.3)
    axes.set_xticks([])
    axes.grid(visible=False, axis="x")
    axes.tick_params(labelleft=False)
