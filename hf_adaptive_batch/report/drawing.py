"""How every picture of a page is drawn: styles of groups, axes, SVG that follows its colours."""

import io
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.markers import MarkerStyle
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter


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

INK = "#010203"  # in SVG replaced by currentColor: no curve has this colour
PNG_INK = "#222222"
SIZE = (4.6, 3.0)
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


@contextmanager
def page_style() -> Iterator[None]:
    """The settings that all pictures are drawn with, whatever the user's own are."""
    with matplotlib.style.context(["default", _RC]):
        yield


def svg_element(draw: Callable[[Figure], None], prefix: str, size: tuple[float, float]) -> str:
    """A picture as an element of a page.

    Args:
        draw: Draws into an empty figure, in the colour `INK` what has that of the text; no user's
            text.
        prefix: Of all ids, so that those of several pictures differ.
        size: In inches.

    Returns:
        An `<svg>` element in the colour of the text around it.
    """
    with page_style():
        figure = Figure(figsize=size, layout="constrained")
        figure.patch.set_visible(False)
        draw(figure)
        file = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(file, format="svg", metadata=nothing, transparent=True)
    return _for_page(file.getvalue(), prefix)


def dress(axes: Axes, x_label: str, y_label: str, ink: str) -> None:
    """Labels, grid and spines.

    Args:
        axes: To dress.
        x_label: Of the horizontal axis.
        y_label: Of the vertical axis.
        ink: Their colour.
    """
    axes.set_xlabel(x_label, color=ink)
    axes.set_ylabel(y_label, color=ink)
    axes.tick_params(which="both", colors=ink, labelcolor=ink)
    axes.grid(color=ink, alpha=0.14, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(ink)


def set_scale(axis: Any, scale: str, setter: Callable[..., None]) -> None:
    """Scale and ticks of an axis.

    Args:
        axis: The x or y axis.
        scale: linear, log2 or log10.
        setter: The axes' `set_xscale` or `set_yscale`.
    """
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


def legend_handle(group: int) -> Line2D:
    """The sign of a group in a picture's legend.

    Args:
        group: Counted from 0.

    Returns:
        A line of its style.
    """
    style = style_of(group)
    dashes: Any = (0, style.dashes) if style.dashes else "-"
    return Line2D([], [], color=style.color, linestyle=dashes, marker=style.marker, ms=5, mew=0)


def swatch(group: int) -> dict[str, str]:
    """The page's sign of a group: the same marker as in the pictures, as an SVG path.

    Args:
        group: Counted from 0.

    Returns:
        Colour, dashes and marker, for the macro `swatch`.
    """
    style = style_of(group)
    marker = MarkerStyle(style.marker)
    path = marker.get_path().transformed(marker.get_transform())
    letters = {1: "M", 2: "L", 3: "Q", 4: "C", 79: "Z"}
    words = []
    for vertices, code in path.iter_segments(simplify=False):
        places = "" if code == 79 else " ".join(f"{value:.3f}" for value in vertices)
        words.append(letters[int(code)] + places)
    return {
        "color": style.color,
        "dashes": " ".join(f"{1.8 * length:g}" for length in style.dashes),
        "marker": "".join(words),
    }


def short(name: str, most: int = 44) -> str:
    """A name that fits into half a picture, in one line.

    Args:
        name: User's text.
        most: Characters.

    Returns:
        The name, cut where it is longer.
    """
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
    svg = svg.replace(INK, "currentColor")
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
