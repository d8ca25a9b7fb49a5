"""The panels of a report as pictures: SVG for its page, and PNG."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from .drawing import (
    INK,
    PNG_INK,
    SIZE,
    dress,
    legend_handle,
    page_style,
    set_scale,
    short,
    style_of,
    svg_element,
)
from .panels import Curve, Panel


def svg_of(panel: Panel, prefix: str) -> str:
    """A panel as an element of a page.

    Args:
        panel: What to draw.
        prefix: Of all ids, so that those of several panels differ.

    Returns:
        An `<svg>` element without user text, in the colour of the text around it.
    """
    return svg_element(lambda figure: _draw(figure.subplots(), panel, INK), prefix, SIZE)


def save_png(panel: Panel, names: Sequence[str], path: Path) -> None:
    """A panel as a file of its own, with title and legend.

    Args:
        panel: What to draw.
        names: Of all groups; user's texts, drawn as they are.
        path: Where to.
    """
    shown = sorted({curve.group for curve in panel.curves})
    rows = -(-len(shown) // 2)
    with page_style(), warnings.catch_warnings():
        # A name may hold characters that the font lacks. They are drawn as boxes.
        warnings.filterwarnings("ignore", message="(?s)Glyph .* missing from")
        figure = Figure(figsize=(6.4, 4.2 + 0.22 * rows), layout="constrained")
        axes = figure.subplots()
        _draw(axes, panel, PNG_INK)
        figure.suptitle(panel.title, color=PNG_INK, fontsize=10, x=0.01, ha="left")
        handles = [legend_handle(index) for index in shown]
        legend = figure.legend(
            handles,
            [str(index) for index in shown],
            loc="outside lower center",
            ncols=2,
            frameon=False,
            handlelength=3.5,
        )
        for text, index in zip(legend.get_texts(), shown, strict=True):
            text.set_parse_math(False)  # "$x$" is a name, not a formula
            text.set_text(short(names[index]))
        figure.savefig(path, format="png", dpi=150, facecolor="white", metadata={"Software": None})


def _draw(axes: Axes, panel: Panel, ink: str) -> None:
    for curve in panel.curves:
        _draw_curve(axes, panel, curve)
    _draw_beyond(axes, panel)
    if panel.level is not None and np.isfinite(panel.level):
        axes.axhline(panel.level, color=ink, linewidth=1, linestyle=(0, (1, 2.5)), zorder=1.5)
    if panel.scales[0] == "linear":
        axes.set_xlim(left=0)
    else:  # what lies above the axes is no data to matplotlib
        every = np.concatenate([part for curve in panel.curves for part in (curve.x, curve.beyond)])
        axes.set_xlim(every.min() / 1.5, every.max() * 1.5)
    if panel.limits is not None:
        axes.set_ylim(*panel.limits)
    elif panel.scales[1] == "log2":
        low, high = axes.dataLim.intervaly
        axes.set_ylim(low / 2**0.5, high * 2**0.5)
    elif panel.scales[1] == "linear":
        axes.set_ylim(bottom=0)
    setters = (axes.set_xscale, axes.set_yscale)
    for scale, axis, setter in zip(panel.scales, (axes.xaxis, axes.yaxis), setters, strict=True):
        set_scale(axis, scale, setter)
    if panel.scales[0] == "linear":
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    if not any(len(curve.y) for curve in panel.curves):
        axes.set_yticks([])  # all of it is beyond, and ticks would be made up
    dress(axes, panel.x_label, panel.y_label, ink)


def _draw_curve(axes: Axes, panel: Panel, curve: Curve) -> None:
    style = style_of(curve.group)
    drawstyle = "steps-post" if panel.steps else "default"
    line: dict[str, Any] = {"color": style.color, "drawstyle": drawstyle}
    if not curve.bold:
        marker = style.marker if len(curve.x) == 1 else ""  # a line of one point is invisible
        axes.plot(curve.x, curve.y, **line, linewidth=0.7, alpha=0.5, marker=marker, ms=3, zorder=2)
        return
    swept = panel.scales[0] != "linear"
    # Markers tell the curves apart where colours do not: few, and each group's at other places.
    every = 1 if swept else max(1, -(-len(curve.x) // 6))
    axes.plot(
        curve.x,
        curve.y,
        **line,
        linewidth=1.7,
        linestyle=(0, style.dashes) if style.dashes else "-",
        marker=style.marker,
        ms=4,
        mew=0,
        markevery=(curve.group % every, every),
        zorder=3,
    )
    if curve.marked:
        chosen = list(curve.marked)
        ring: dict[str, Any] = {"mfc": "none", "mec": style.color, "mew": 1.3, "ms": 9}
        axes.plot(curve.x[chosen], curve.y[chosen], "o", **ring, zorder=4)


def _draw_beyond(axes: Axes, panel: Panel) -> None:
    """Crosses above the axes, where no loss can be read off them: a row for each group."""
    curves = [curve for curve in panel.curves if curve.beyond]
    for row, curve in enumerate(curves):
        axes.plot(
            curve.beyond,
            np.full(len(curve.beyond), 1.03 + 0.035 * row),
            "x",
            transform=axes.get_xaxis_transform(),  # x of the data, y of the axes
            color=style_of(curve.group).color,
            ms=4.5,
            mew=1.5,
            clip_on=False,
        )
