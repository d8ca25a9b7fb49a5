"""The picture of one sweep: steps against batch size, and how far they are from linear scaling."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ...report.drawing import dress, set_scale, style_of
from .fit_laws import FittedSweep
from .picture import COMPACT, Picture
from .quantities import between, compact, share


_SIZE = (4.6, 4.6)
KEY = (
    "Filled: the runs that are fitted, by their mean at each batch size. Faint: with other "
    "learning rates. Arrows: the target was not reached in so many steps. Diamond: the critical "
    "batch size with its interval. Below: the same steps, divided by those of linear scaling."
)


def steps_picture(each: FittedSweep, group: int) -> Picture:
    """Steps to the target against batch size, above the same divided by linear scaling.

    Args:
        each: The sweep.
        group: Its number, from 0; the style follows from it.

    Returns:
        The picture; without a fit only what was measured.
    """
    key, title = f"steps-{group + 1}", f"{each.sweep.name}: steps to the target loss"
    if not any(run.steps or run.trained_steps for run in each.sweep.runs):
        return Picture(key=key, title=title, caption="No run of it has a step.", draw=None)
    return Picture(
        key=key,
        title=title,
        caption=_caption(each),
        draw=lambda figure, ink: _draw(figure, ink, each, style_of(group).color),
        size=_SIZE if each.fit is not None else (_SIZE[0], 3.0),
    )


def _caption(each: FittedSweep) -> str:
    critical = each.critical
    if critical is None:
        return "Not fitted."
    if math.isinf(critical.sequences):
        return "There is no curvature, and so no critical batch size to show."
    outside = "" if critical.sequences <= _span(each)[1] else " It lies outside of the picture."
    return (
        f"Critical batch size {compact(critical.sequences)} sequences, "
        f"{share(critical.confidence)} interval {between(critical.interval)}; linear scaling from "
        f"{compact(each.reference)} sequences.{outside}"
    )


def _draw(figure: Figure, ink: str, each: FittedSweep, color: str) -> None:
    if each.fit is None:
        axes = figure.subplots()
        _measured(axes, each, color)
        dress(axes, "batch size (sequences)", "steps to the target", ink)
        _scales(axes, _span(each))
        return
    axes, below = figure.subplots(2, 1, sharex=True, height_ratios=(5, 3))
    linear = _Linear(each)
    span = _span(each)
    grid = np.geomspace(*span, 200)
    fitted = each.fit.a + each.fit.b / grid
    lines: list[tuple[Any, dict[str, Any]]] = [
        (fitted, {"color": color, "lw": 1.8, "label": "fitted a + b/B", "zorder": 3}),
        (
            linear(grid),
            {"color": ink, "lw": 1, "ls": (0, (5, 2)), "label": "linear scaling"},
        ),
        (
            (1 + each.overhead) * linear(grid),
            {"color": ink, "lw": 1, "ls": (0, (1, 2)), "label": f"{share(each.overhead)} above it"},
        ),
    ]
    for y, style in lines:
        axes.plot(grid, y, **style)
        below.plot(grid, y / linear(grid), **style)
    _measured(axes, each, color)
    _measured(below, each, color, linear)
    _critical(axes, each, ink, span)
    _critical(below, each, ink, span, linear)
    dress(axes, "", "steps to the target", ink)
    dress(below, "batch size (sequences)", "steps / linear", ink)
    axes.legend(frameon=False, labelcolor=ink, fontsize=8, loc="upper right", handlelength=2.6)
    top = 2.5 * (1 + each.overhead)
    ratios = [run.steps / linear(run.batch_size) for run in _reached(each)]
    bottom = max(min([0.85, *ratios]) / 1.05, 0.4)
    _scales(below, span)
    below.set_ylim(bottom, top)
    wanted = {0.5, 2.0, 5.0, 10.0, 1 + each.overhead, *([1.0] if each.overhead > 0.12 else [])}
    ticks = sorted(tick for tick in wanted if bottom < tick < top)
    below.set_yticks(ticks, [f"{tick:.3g}" for tick in ticks])
    most, fewest = _steps_of(each)
    axes.set_ylim(fewest / 1.8, most * 1.8)
    _scales(axes, span)


class _Linear:
    """Steps of linear scaling from the reference."""

    def __init__(self, each: FittedSweep) -> None:
        assert each.fit is not None
        self._product = each.fit.steps_at(each.reference) * each.reference

    def __call__(self, batch_size: Any) -> Any:
        return self._product / batch_size


def _measured(axes: Axes, each: FittedSweep, color: str, linear: _Linear | None = None) -> None:
    def plot(size: float, steps: float, chosen: bool, reached: bool) -> None:
        y = steps if linear is None else float(steps / linear(size))
        style: dict[str, Any] = {"marker": "o" if reached else "^", "mec": color}
        if chosen:
            style |= {"ms": 5.5, "mfc": color if reached else "none", "zorder": 4}
        else:
            style |= {"ms": 4, "mfc": "none", "alpha": 0.4, "zorder": 2}
        axes.plot([size], [y], ls="", **style)
        if chosen and not reached:  # its foot is the bound
            arrow = {"arrowstyle": "<-", "color": color, "shrinkA": 0, "shrinkB": 3}
            up: dict[str, Any] = {"xytext": (0, 17), "textcoords": "offset points"}
            axes.annotate("", xy=(size, y), **up, arrowprops=arrow)

    for run in each.sweep.runs:
        reached = run.steps is not None and math.isfinite(run.steps)
        if reached or not run.chosen:
            steps = run.steps if reached else run.trained_steps
            if steps:
                plot(run.batch_size, steps, run.chosen, reached)
    for size, steps in {bound.batch_size: bound for bound in reversed(each.bounds)}.values():
        if steps:  # the least of its seeds, which holds for all
            plot(size, steps, True, False)


def _critical(
    axes: Axes,
    each: FittedSweep,
    ink: str,
    span: tuple[float, float],
    linear: _Linear | None = None,
) -> None:
    critical = each.critical
    if critical is None or each.fit is None or math.isinf(critical.sequences):
        return
    x = critical.sequences
    y = each.fit.steps_at(x)
    if linear is not None:
        y = float(y / linear(x))
    low, high = critical.interval
    axes.plot([max(low, span[0]), min(high, span[1])], [y, y], color=ink, lw=1.2, zorder=5)
    for end in (low, high):
        if span[0] <= end <= span[1]:
            axes.plot([end], [y], ls="", marker="|", ms=8, color=ink, zorder=5)
    axes.plot([x], [y], ls="", marker="D", ms=5.5, color=ink, zorder=6)


def _reached(each: FittedSweep) -> list[Any]:
    return [run for run in each.sweep.runs if run.chosen and run.steps and math.isfinite(run.steps)]


def _steps_of(each: FittedSweep) -> tuple[float, float]:
    """The most and the fewest steps that must be seen."""
    found = [run.steps or run.trained_steps or math.nan for run in each.sweep.runs]
    known = [value for value in found if value > 0 and math.isfinite(value)]
    return max(known), min(known)


def _span(each: FittedSweep) -> tuple[float, float]:
    """Batch sizes from the smallest to the largest, and to the critical one if it is near."""
    sizes = [run.batch_size for run in each.sweep.runs]
    sizes.append(each.reference)
    low, high = min(sizes), max(sizes)
    if each.is_finite and each.critical is not None:
        high = max(high, min(each.critical.sequences, 16 * high))
    return low / 1.4, high * 1.4


def _scales(axes: Axes, span: tuple[float, float]) -> None:
    axes.set_xlim(*span)
    set_scale(axes.xaxis, "log2", axes.set_xscale)
    set_scale(axes.yaxis, "log10", axes.set_yscale)
    axes.yaxis.set_major_formatter(COMPACT)
