"""A run as lines of numbers: evaluated, recorded, thinned, averaged over seeds."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .history import RunHistory


# A curve of more points than its picture has pixels only makes the page heavy. Losses are smooth,
# and drawn three times.
_MOST_POINTS, _MOST_EVALUATIONS = 300, 120


@dataclass(frozen=True, kw_only=True)
class Line:
    """Values of one run.

    Attributes:
        progress: Tokens or samples at each point, never falling: what seeds are compared at.
        x: Abscissas, as many.
        y: Ordinates, as many; finite.
    """

    progress: Any
    x: Any
    y: Any


def evaluated(run: RunHistory, clock: str, x_name: str, unit: float = 1.0) -> Line:
    """Validation loss.

    Args:
        run: The run.
        clock: `tokens` or `samples`.
        x_name: `tokens`, `samples`, `steps` or `seconds`.
        unit: What the abscissas are divided by.

    Returns:
        A point for each evaluation whose loss and abscissa are known; fewer where they are many.
    """
    field = {"steps": "step", "seconds": "seconds"}.get(x_name, f"{x_name}_seen")
    line = _line(
        [getattr(each, f"{clock}_seen") for each in run.evaluations],
        [getattr(each, field) for each in run.evaluations],
        [each.loss for each in run.evaluations],
        unit,
    )
    return thinned(line, _MOST_EVALUATIONS)


def recorded(run: RunHistory, clock: str, name: str, *, positive: bool = False) -> Line:
    """A column of the records.

    Args:
        run: The run.
        clock: `tokens` or `samples`, the abscissas.
        name: The column's.
        positive: Leave out what has no place on a logarithmic axis.

    Returns:
        A point for each decision at which the value was known.
    """
    seen, values = run.records.get(f"{clock}_seen", ()), run.records.get(name, ())
    if positive:
        values = [value if value is not None and value > 0 else None for value in values]
    return _line(seen, seen, values)


def sizes(run: RunHistory, clock: str) -> Line:
    """Global batch size: each value holds from its abscissa to the next.

    Args:
        run: The run.
        clock: `tokens` or `samples`, the abscissas.

    Returns:
        The start, each change and the end; without decisions the averages between evaluations.
    """
    seen, values = [0.0], []
    if run.records.get("step"):
        values = [run.records["global_batch_size"][0], *run.records["next_global_batch_size"]]
        seen += run.records[f"{clock}_seen"]
        total = getattr(run, clock)
        if total > (seen[-1] or 0):  # trained on after the last decision
            seen, values = [*seen, total], [*values, values[-1]]
        else:  # nothing was trained on with the last size
            values[-1] = values[-2]
    else:
        step = samples = 0
        for each in run.evaluations:
            if each.step > step:
                values.append((each.samples_seen - samples) / (each.step - step))
                seen.append(getattr(each, f"{clock}_seen"))
                step, samples = each.step, each.samples_seen
        values = values + values[-1:]
    line = _line(seen[: len(values)], seen[: len(values)], values)
    if len(line.y) > 2:
        changed = np.concatenate([[True], line.y[1:] != line.y[:-1]])
        changed[-1] = True
        line = Line(progress=line.progress[changed], x=line.x[changed], y=line.y[changed])
    return thinned(line)


def thinned(line: Line, most: int = _MOST_POINTS) -> Line:
    """Fewer points of a line.

    Args:
        line: The line.
        most: Points at most.

    Returns:
        Points at equal distances in number, the first and the last among them.
    """
    if len(line.x) <= most:
        return line
    kept = np.unique(np.linspace(0, len(line.x) - 1, most).round().astype(int))
    return Line(progress=line.progress[kept], x=line.x[kept], y=line.y[kept])


def binned(line: Line, bins: int, kind: str = "linear") -> Line:
    """Means over equal stretches of the abscissa.

    Args:
        line: The line.
        bins: Stretches.
        kind: `log` for geometric means.

    Returns:
        At most a point a stretch; the line itself where it has no more than twice as many points.
    """
    if len(line.x) <= 2 * bins:
        return line
    start, end = line.x[0], line.x[-1]
    stretch = np.minimum((line.x - start) / max(end - start, 1e-300) * bins, bins - 1).astype(int)
    counts = np.bincount(stretch)
    used = counts > 0

    def mean(column: Any) -> Any:
        return np.bincount(stretch, weights=column)[used] / counts[used]

    y = np.exp(mean(np.log(line.y))) if kind == "log" else mean(line.y)
    return Line(progress=mean(line.progress), x=mean(line.x), y=y)


def mean_line(lines: Sequence[Line], kind: str = "linear") -> Line | None:
    """The mean of several seeds, at equal progress.

    Args:
        lines: One a seed.
        kind: How a value continues between points: `linear`, `log` or `steps`.

    Returns:
        The mean over the progress that all have in common, interpolated between their points; None
        if there is none.
    """
    if not lines or not all(len(line.x) for line in lines):
        return None
    start = max(line.progress[0] for line in lines)
    end = min(line.progress[-1] for line in lines)
    every = np.unique(np.concatenate([line.progress for line in lines]))
    grid = every[(every >= start) & (every <= end)]
    if not len(grid):
        return None
    most = _MOST_POINTS if kind == "steps" else _MOST_EVALUATIONS
    if len(grid) > most:
        grid = grid[np.linspace(0, len(grid) - 1, most).round().astype(int)]

    def values(line: Line) -> Any:
        if kind == "steps":
            return line.y[np.searchsorted(line.progress, grid, side="right") - 1]
        if kind == "log":
            return np.log(line.y[0]) + np.interp(
                grid, line.progress, np.log(line.y) - np.log(line.y[0])
            )
        return np.interp(grid, line.progress, line.y)

    y = np.mean([values(line) for line in lines], axis=0)
    x = np.mean([np.interp(grid, line.progress, line.x) for line in lines], axis=0)
    return Line(progress=grid, x=x, y=np.exp(y) if kind == "log" else y)


def loss_limits(
    curves: Sequence[Any], target_loss: float | None, share: float = 0.8
) -> tuple[tuple[float, float] | None, str]:
    """The range of losses in which the end of training can be read.

    Args:
        curves: Losses of each curve, in order.
        target_loss: A level that must be inside, if any.
        share: Of each curve's values, without its first tenth, that must be inside.

    Returns:
        The limits, or None without curves; and a sentence on what they hide, if anything.
    """
    curves = [curve for curve in curves if len(curve)]
    if not curves:
        return None, ""
    low = min(float(curve.min()) for curve in curves)
    # The middle curve's, so that one that diverged does not matter: the lower of two.
    highs = sorted(float(np.quantile(each[len(each) // 10 :], share)) for each in curves)
    high = highs[(len(highs) - 1) // 2]
    # A contender that ends badly must be seen; one that diverged must not flatten the others.
    high = max([high, *(end for each in curves if (end := float(each[-1])) <= 3 * high - 2 * low)])
    if target_loss is not None and math.isfinite(target_loss):
        low, high = min(low, target_loss), max(high, target_loss)
    limits = padded(low, high)
    if max(float(curve.max()) for curve in curves) <= limits[1]:
        return limits, ""
    sentence = f"Cut off above {limits[1]:.3g}, so that the end of training can be read."
    hidden = sum(float(curve.min()) > limits[1] for curve in curves)
    if hidden:
        sentence += f" {hidden} {'curve lies' if hidden == 1 else 'curves lie'} wholly above."
    return limits, sentence


def padded(low: float, high: float) -> tuple[float, float]:
    """A range with a margin around what it must show.

    Args:
        low: Smallest value.
        high: Largest value.

    Returns:
        Both ends, never equal.
    """
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 0.05
    return low - margin, high + margin


def _line(progress: Sequence[Any], x: Sequence[Any], y: Sequence[Any], unit: float = 1.0) -> Line:
    """What is known of three columns: finite, and not too large for a picture's arithmetic."""
    columns = np.array(
        [[math.nan if value is None else value for value in column] for column in (progress, x, y)],
        dtype=float,
    )
    known = np.isfinite(columns).all(axis=0) & (np.abs(columns[2]) < 1e100)
    columns = columns[:, known]
    return Line(progress=columns[0], x=columns[1] / unit, y=columns[2])
