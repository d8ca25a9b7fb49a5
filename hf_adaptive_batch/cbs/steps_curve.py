"""The curve Y = a + b / B through measured steps: least squares on log Y, and its profile."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.optimize import brentq, minimize_scalar
from scipy.stats import t as student_t

from .intervals import Interval, exp


_GRID = 2001


class StepsCurve:
    """log Y = log b + log(c + 1/B) with c = a/b: for a given c, log b is a mean.

    So one number is searched for, and the region of all plausible (c, b) is known along it: the sum
    of squares is that of c, plus n times the squared distance of log b from its mean.

    Args:
        points: Batch size and steps of each, with three different batch sizes or more.
        confidence: Of the intervals.

    Attributes:
        a: Steps; 0 where they fall in proportion to the batch, or faster.
        b: Sequences; 0 where steps do not fall with the batch.
        residual: Standard deviation of log Y around the curve, with n - 2 degrees of freedom.
        a_interval: Of a.
        b_interval: Of b.
        knee_interval: Of b / a.
    """

    def __init__(self, points: Sequence[tuple[float, float]], confidence: float) -> None:
        self._inverse = np.array([1 / size for size, _ in points])
        self._log_steps = np.log([steps for _, steps in points])
        # Beyond these, no measured batch differs from a straight line, or from a constant, by more
        # than a ten-thousandth.
        self._ends = math.log(1e-4 * self._inverse.min()), math.log(1e4 * self._inverse.max())
        least, where = self._best()
        freedom = len(points) - 2
        self.residual = math.sqrt(least / freedom)
        quantile = float(student_t.ppf((1 + confidence) / 2, freedom))
        self._most = least * (1 + quantile**2 / freedom)
        self.a, self.b = self._at(where)
        self._intervals(where)

    def _best(self) -> tuple[float, float]:
        """The least sum of squares, and its log c."""
        grid = np.linspace(*self._ends, _GRID)
        best = int(self._profile(grid)[0].argmin())
        straight, constant = [(self._sum_of_squares(u), u) for u in (-math.inf, math.inf)]
        if best in (0, _GRID - 1):
            return constant if best else straight
        # Searched for by its distance, so that a search in relative precision is as good anywhere.
        found = minimize_scalar(
            lambda distance: self._sum_of_squares(grid[best] + distance),
            bounds=(grid[best - 1] - grid[best], grid[best + 1] - grid[best]),
            method="bounded",
            options={"xatol": 1e-12},
        )
        inside = float(found.fun), float(grid[best] + found.x)
        return min([straight, constant, inside], key=lambda each: each[0])

    def _profile(self, log_c: Any) -> tuple[Any, Any]:
        """The sum of squares, and the best log b, for each log c."""
        # The log of Y / (c + 1/B): log b and noise.
        rest = self._log_steps - np.log(np.exp(log_c)[:, None] + self._inverse)
        log_b = rest.mean(axis=1)
        return np.sum((rest - log_b[:, None]) ** 2, axis=1), log_b

    def _sum_of_squares(self, u: float) -> float:
        """That of a log c; without end, of steps that are constant."""
        if u == math.inf:
            return float(np.sum((self._log_steps - self._log_steps.mean()) ** 2))
        return float(self._profile(np.array([u]))[0][0])

    def _at(self, u: float) -> tuple[float, float]:
        """The best a and b for a log c."""
        if u == math.inf:
            return math.exp(float(self._log_steps.mean())), 0.0
        b = math.exp(float(self._profile(np.array([u]))[1][0]))
        return math.exp(u) * b, b

    def _intervals(self, where: float) -> None:
        low, high = self._plausible_end(where, 0), self._plausible_end(where, 1)
        self.knee_interval = Interval(math.exp(-high), math.exp(-low))
        inside = np.linspace(max(low, self._ends[0]), min(high, self._ends[1]), _GRID)
        sums, log_b = self._profile(inside)
        margin = np.sqrt(np.maximum(self._most - sums, 0.0) / len(self._inverse))
        log_a = log_b + inside
        # The best is between the points of the grid, or beyond them.
        self.b_interval = Interval(
            0.0 if high == math.inf else min(math.exp((log_b - margin).min()), self.b),
            max(exp((log_b + margin).max()), self.b),
        )
        self.a_interval = Interval(
            0.0 if low == -math.inf else min(math.exp((log_a - margin).min()), self.a),
            max(exp((log_a + margin).max()), self.a),
        )

    def _plausible_end(self, where: float, side: int) -> float:
        """Where the sum of squares passes its limit, below (0) or above (1) the best log c."""
        limit, end = (-math.inf, math.inf)[side], self._ends[side]
        if self._sum_of_squares(limit) <= self._most:
            return limit
        start = min(max(where, self._ends[0]), self._ends[1])

        def above(u: float) -> float:
            return self._sum_of_squares(u) - self._most

        if above(start) >= 0:  # a perfect fit: nothing but the best is plausible
            return start
        return float(brentq(above, start, end, xtol=1e-12)) if above(end) > 0 else limit
