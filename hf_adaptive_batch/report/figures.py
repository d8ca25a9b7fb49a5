"""The panels of a report as pictures: SVG that follows the page's colours, and PNG."""

import io
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from .panels import Curve, Panel


@dataclass(frozen=True, kw_only=True)
class Style:
    """How a group looks in every panel and in the legend.

    Attributes:
        color: Readable on white and on near-black.
        dashes: Lengths of strokes and gaps in line widths; empty for a solid line.
        marker: Name of a marker, as matplotlib's and as the page's.
    """

    color: str
    dashes: tuple[float, ...]
    marker: str


# Okabe and Ito's colours, which most colour-blind readers can tell apart, made lighter or darker
# until each has a contrast of 3 to white and to near-black; their yellow has no such shade.
_COLORS = "#0077bb #d55e00 #009e73 #bf5f9c #7a7a7a #a87900 #2f94cf #8a5fd1".split()
_DASHES: tuple[tuple[float, ...], ...] = ((), (5, 1.6), (1.4, 1.4), (6, 1.6, 1.4, 1.6), (10, 2.5))
_MARKERS = ("o", "s", "^", "D", "v", "X")

_INK = "#010203"  # in SVG replaced by currentColor: no curve has this colour
_SIZE = (4.6, 3.0)
_RC = {
    "svg.fonttype": "none",
    "svg.hashsalt": "hf_adaptive_batch",  # ids are random otherwise
    "font.size": 9,
    "axes.formatter.use_mathtext": False,
}


def style_of(group: int) -> Style:
    """The style of a group.

    Args:
        group: Counted from 0.

    Returns:
        A style that no other of the first hundred groups has.
    """
    return Style(
        color=_COLORS[group % len(_COLORS)],
        dashes=_DASHES[group % len(_DASHES)],
        marker=_MARKERS[group % len(_MARKERS)],
    )


def svg_of(panel: Panel, prefix: str) -> str:
    """A panel as an element of a page.

    Args:
        panel: What to draw.
        prefix: Of all ids, so that those of several panels differ.

    Returns:
        An `<svg>` element without user text, in the colour of the text around it.
    """
    with matplotlib.style.context(["default", _RC]):
        figure = Figure(figsize=_SIZE, layout="constrained")
        figure.patch.set_visible(False)
        _draw(figure.subplots(), panel, _INK)
        file = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(file, format="svg", metadata=nothing, transparent=True)
    return _for_page(file.getvalue(), prefix)


def save_png(panel: Panel, names: Sequence[str], path: Path) -> None:
    """A panel as a file of its own, with title and legend.

    Args:
        panel: What to draw.
        names: Of all groups; user's texts, drawn as they are.
        path: Where to.
    """
    shown = sorted({curve.group for curve in panel.curves})
    rows = -(-len(shown) // 2)
    with matplotlib.style.context(["default", _RC]), warnings.catch_warnings():
        # A name may hold characters that the font lacks. They are drawn as boxes.
        warnings.filterwarnings("ignore", message="(?s)Glyph .* missing from")
        figure = Figure(figsize=(6.4, 4.2 + 0.22 * rows), layout="constrained")
        axes = figure.subplots()
        _draw(axes, panel, "#222222")
        figure.suptitle(panel.title, color="#222222", fontsize=10, x=0.01, ha="left")
        handles = [_legend_handle(index) for index in shown]
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
            text.set_text(_short(names[index]))
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
        _scale(axis, scale, setter)
    if panel.scales[0] == "linear":
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    if not any(len(curve.y) for curve in panel.curves):
        axes.set_yticks([])  # all of it is beyond, and ticks would be made up
    axes.set_xlabel(panel.x_label, color=ink)
    axes.set_ylabel(panel.y_label, color=ink)
    axes.tick_params(which="both", colors=ink, labelcolor=ink)
    axes.grid(color=ink, alpha=0.14, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(ink)


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


def _scale(axis: Any, scale: str, setter: Callable[..., None]) -> None:
    plain = FuncFormatter(lambda value, _: f"{value:g}".replace("e-0", "e-"))
    if scale == "linear":
        axis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
        axis.set_major_formatter(plain)
        return
    base = 2 if scale == "log2" else 10
    setter("log", base=base)
    axis.set_major_formatter(plain)
    axis.set_minor_formatter(NullFormatter())
    if base == 10:
        low, high = axis.get_view_interval()
        few_decades = 0 < low and high < 1000 * low
        axis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5) if few_decades else (1,)))
    else:
        axis.set_major_locator(LogLocator(base=2, numticks=9))
        axis.set_minor_locator(LogLocator(base=2, subs=(), numticks=9))


def _legend_handle(group: int) -> Line2D:
    style = style_of(group)
    dashes: Any = (0, style.dashes) if style.dashes else "-"
    return Line2D([], [], color=style.color, linestyle=dashes, marker=style.marker, ms=5, mew=0)


def _short(name: str, most: int = 44) -> str:
    """A name that fits into half a picture, in one line."""
    name = " ".join(name.split())
    return name if len(name) <= most else f"{name[: most - 1]}…"


def _for_page(svg: str, prefix: str) -> str:
    """Turn matplotlib's file into an element that shares a page with others."""
    svg = svg[svg.index("<svg") :].strip()
    # The style sheet would hold for the whole page; the page has the same rule for its panels.
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<metadata.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r' (?:width|height)="[\d.]+pt"', "", svg)
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", svg)
    svg = svg.replace(_INK, "currentColor")
    # Hundredths of a unit are less than a pixel shows. Only inside of tags: labels are text.
    svg = re.sub(
        r"<[^>]*>",
        lambda tag: re.sub(r"-?\d+\.\d{3,}", lambda number: f"{float(number[0]):.2f}", tag[0]),
        svg,
    )
    used = set(re.findall(r"url\(#([^)]+)\)", svg)) | set(re.findall(r'href="#([^"]+)"', svg))
    svg = re.sub(r' id="([^"]+)"', lambda m: f' id="{prefix}-{m[1]}"' if m[1] in used else "", svg)
    svg = svg.replace("url(#", f"url(#{prefix}-").replace('xlink:href="#', f'href="#{prefix}-')
    svg = svg.replace(' xmlns:xlink="http://www.w3.org/1999/xlink"', "")
    return re.sub(r">\s+<", "><", svg)
