"""A picture of a fit: what it is called, and how it is drawn on a page and as a file."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from ...report.drawing import INK, PNG_INK, SIZE, legend_handle, page_style, short, svg_element
from .quantities import compact


COMPACT = FuncFormatter(lambda value, _: compact(value))  # 1M, where others write 1e+06


@dataclass(frozen=True, kw_only=True)
class Picture:
    """One picture.

    Attributes:
        key: Names files and ids.
        title: A line above it; may hold user's text.
        caption: Sentences below it.
        draw: Draws into an empty figure, in the colour given; no user's text. None if there is
            nothing to show; the caption then says why.
        groups: Whose styles it uses, counted from 0, if a reader has to tell them apart.
        size: In inches.
    """

    key: str
    title: str
    caption: str
    draw: Callable[[Figure, str], None] | None
    groups: Sequence[int] = ()
    size: tuple[float, float] = SIZE

    def svg(self) -> str:
        """The picture as an element of the page; empty if there is nothing to show."""
        draw = self.draw
        if draw is None:
            return ""
        return svg_element(lambda figure: draw(figure, INK), self.key, self.size)

    def save(self, path: Path, names: Sequence[str]) -> None:
        """Write it as a file of its own, with its title, and a legend where it has groups.

        Args:
            path: Where to.
            names: Of all groups; user's texts, drawn as they are.
        """
        if self.draw is None:
            return
        width, height = self.size
        factor = 6.4 / width
        rows = -(-len(self.groups) // 2)
        with page_style(), warnings.catch_warnings():
            # A name may hold characters that the font lacks. They are drawn as boxes.
            warnings.filterwarnings("ignore", message="(?s)Glyph .* missing from")
            figure = Figure(
                figsize=(6.4, factor * height + 0.25 + 0.22 * rows), layout="constrained"
            )
            self.draw(figure, PNG_INK)
            title = figure.suptitle("", color=PNG_INK, fontsize=10, x=0.01, ha="left")
            title.set_parse_math(False)  # "$x$" is a name, not a formula
            title.set_text(short(self.title, 80))
            if self.groups:
                legend = figure.legend(
                    [legend_handle(index) for index in self.groups],
                    [str(index) for index in self.groups],
                    loc="outside lower center",
                    ncols=2,
                    frameon=False,
                    handlelength=3.5,
                )
                for text, index in zip(legend.get_texts(), self.groups, strict=True):
                    text.set_parse_math(False)
                    text.set_text(short(names[index]))
            figure.savefig(
                path, format="png", dpi=150, facecolor="white", metadata={"Software": None}
            )
