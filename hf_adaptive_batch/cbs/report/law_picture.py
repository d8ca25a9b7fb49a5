"""The critical batch size against N and D, with the law and the band of its predictions."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from ...report.drawing import dress, set_scale, style_of
from ..scaling_law import predict
from .fit_laws import MILLION
from .fit_report import FitReport
from .fit_sentences import law_sentence
from .picture import COMPACT, Picture
from .quantities import share


_WORDS = {"N": "model size", "D": "tokens trained on"}
_AXES = {"N": "N (millions of parameters)", "D": "D (millions of tokens)"}


def law_picture(report: FitReport, variable: str) -> Picture:
    """Critical batch sizes of all sweeps against N or D.

    Args:
        report: The report.
        variable: N or D.

    Returns:
        The picture; without a law only the points.
    """
    points = _points(report, variable)
    key, title = f"law-{variable}", f"Critical batch size against {_WORDS[variable]}"
    if not points:
        caption = f"No sweep has a finite critical batch size and {variable}."
        return Picture(key=key, title=title, caption=caption, draw=None)
    words = [f"Bars: the {share(report.confidence)} interval of each."]
    if variable in report.laws:
        words.insert(0, law_sentence(variable, report.laws[variable]))
        words.append("Band: where a new measurement would lie.")
    if any(each.variable == variable for each in report.predictions):
        words.append("Hollow: predictions.")
    return Picture(
        key=key,
        title=title,
        caption=" ".join(words),
        draw=lambda figure, ink: _draw(figure, ink, report, variable),
        groups=[group for group, *_ in points],
    )


def _points(report: FitReport, variable: str) -> list[tuple[int, float, float, float, float]]:
    """Of each sweep: group, abscissa, critical batch size, and the ends of its interval."""
    found = []
    for group, each in enumerate(report.sweeps):
        x = each.sweep.parameters if variable == "N" else each.sweep.tokens
        if x is not None and each.is_finite and each.critical is not None:
            low, high = each.critical.interval
            found.append((group, x / MILLION, each.critical.sequences, low, high))
    return found


def _draw(figure: Figure, ink: str, report: FitReport, variable: str) -> None:
    axes = figure.subplots()
    points = _points(report, variable)
    asked = [each for each in report.predictions if each.variable == variable]
    every = [x for _, x, *_ in points] + [each.at / MILLION for each in asked]
    span = min(every) / 1.4, max(every) * 1.4
    law = report.laws.get(variable)
    if law is not None:
        grid = np.geomspace(*span, 100)
        found = [predict(law, float(x)) for x in grid]
        low, high = zip(*(each.interval for each in found), strict=True)
        axes.plot(grid, [each.value for each in found], color=ink, lw=1.2, zorder=2)
        axes.fill_between(grid, low, high, color=ink, alpha=0.12, lw=0, zorder=1)
    for group, x, y, low_end, high_end in points:
        style = style_of(group)
        # What is open upwards ends far above; the axes cut it off.
        top = high_end if math.isfinite(high_end) else 100 * y
        axes.plot([x, x], [low_end, top], color=style.color, lw=1.4, zorder=3)
        axes.plot([x], [y], ls="", marker=style.marker, ms=6, color=style.color, zorder=4)
    for each in asked:
        x, (low_end, high_end) = each.at / MILLION, each.prediction.interval
        bar: dict[str, Any] = {"color": ink, "lw": 1, "ls": (0, (2, 2)), "zorder": 3}
        axes.plot([x, x], [max(low_end, 1e-9), high_end], **bar)
        hollow: dict[str, Any] = {"mfc": "none", "mec": ink, "ms": 6, "zorder": 4}
        axes.plot([x], [each.prediction.value], ls="", marker="o", **hollow)
    values = [value for _, _, *ends in points for value in ends if math.isfinite(value)]
    values += [each.prediction.value for each in asked]
    axes.set_xlim(*span)
    axes.set_ylim(min(values) / 1.6, max(values) * 1.6)
    set_scale(axes.xaxis, "log10", axes.set_xscale)
    axes.xaxis.set_major_formatter(COMPACT)
    set_scale(axes.yaxis, "log10", axes.set_yscale)
    axes.yaxis.set_major_formatter(COMPACT)
    dress(axes, _AXES[variable], "critical batch size (sequences)", ink)
