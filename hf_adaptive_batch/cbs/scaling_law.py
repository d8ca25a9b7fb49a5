"""Scaling laws y = c x^p, or c x1^p1 x2^p2, with intervals and predictions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from scipy.optimize import least_squares
from scipy.stats import t as student_t

from .intervals import LEAVE_OUT, Interval, check_positive, check_share, exp


Space = Literal["log", "plain"]

# Least eigenvalue of the correlations of log x, 1 - r for a pair. Below it columns vary together so
# closely that the noise decides what each does.
_LEAST_INDEPENDENCE = 0.001


@dataclass(frozen=True, kw_only=True)
class ScalingLaw:
    """coefficient x x1^exponents[0] x x2^exponents[1] ..., fitted.

    The y are taken as they are: what each of them was known to is not in the intervals.

    Attributes:
        coefficient: Of the law, at x = 1.
        exponents: One for each variable.
        coefficient_interval: Of the coefficient.
        exponent_intervals: Of the exponents.
        residual: Standard deviation of log y around the law, or of y in plain space.
        confidence: Of the intervals.
        space: In which squares were summed.
        names: Of the variables.
        x: Fitted values, a tuple for each measurement.
        y: Fitted values.
        covariance: Of `(log coefficient, *exponents)`, without the residual's variance.
    """

    coefficient: float
    exponents: tuple[float, ...]
    coefficient_interval: Interval
    exponent_intervals: tuple[Interval, ...]
    residual: float
    confidence: float
    space: Space
    names: tuple[str, ...]
    x: tuple[tuple[float, ...], ...]
    y: tuple[float, ...]
    covariance: tuple[tuple[float, ...], ...]

    @property
    def exponent(self) -> float:
        """The exponent of a law of one variable.

        Raises:
            ValueError: If it has several.
        """
        if len(self.exponents) > 1:
            raise ValueError(
                f"exponent ({', '.join(self.names)}) must be asked for by its variable, because "
                "the law has several; read exponents."
            )
        return self.exponents[0]

    @property
    def exponent_interval(self) -> Interval:
        """The interval of `exponent`."""
        assert self.exponent is not None  # refuses several
        return self.exponent_intervals[0]

    def __call__(self, *x: float) -> float:
        """The law's value.

        Args:
            *x: A number for each variable, in the units that were fitted.

        Returns:
            y.
        """
        return exp(self._log(_numbers(self, x)))

    def _log(self, numbers: Sequence[float]) -> float:
        """Of the value: there a float holds every one."""
        terms = [p * math.log(n) for n, p in zip(numbers, self.exponents, strict=True)]
        return math.log(self.coefficient) + math.fsum(terms)

    def __str__(self) -> str:
        variables = [f"{n}^{p:.4g}" for n, p in zip(self.names, self.exponents, strict=True)]
        return " ".join([f"{self.coefficient:.4g}", *variables])


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What a law says of a value that was not measured.

    Attributes:
        value: The law's.
        interval: For a new measurement, which scatters as the fitted ones; or of the law itself.
        beyond: How many times it lies outside the range that was measured, by the variable that is
            furthest out; 1 inside.
    """

    value: float
    interval: Interval
    beyond: float


def fit_power_law(
    x: Sequence[float] | Sequence[Sequence[float]],
    y: Sequence[float],
    *,
    space: Space = "log",
    names: Sequence[str] | None = None,
    confidence: float = 0.95,
) -> ScalingLaw:
    """Fit y = c x^p without an offset.

    With a pair of numbers for each measurement, such as parameters N and tokens D, it fits
    c N^p D^q, which tells apart what each does. That takes runs in which N and D vary by
    themselves: where D = 20 N in all of them, no data can tell, and it is refused.

    Args:
        x: A number for each measurement, or a sequence of as many numbers as there are variables.
        y: Of each measurement, such as critical batch sizes.
        space: "log" for least squares of log y, "plain" for those of y, in which large values
            decide; Zhang et al. (arXiv 2410.21676) fit in log space.
        names: Of the variables, for printing; x, or x1, x2 and so on.
        confidence: Of the intervals, by Student's t; in plain space to first order.

    Returns:
        The law.

    Raises:
        ValueError: If variables cannot be told apart or hardly vary, measurements are too few, or a
            number is not positive.
    """
    columns, labels = _columns(x, names)
    _check(columns, y, labels, space, confidence)
    count, variables = columns.shape
    design = np.column_stack([np.ones(count), np.log(columns)])
    target = np.array([float(value) for value in y])
    solution = np.linalg.lstsq(design, np.log(target), rcond=None)[0]
    jacobian, rest = design, np.log(target) - design @ solution
    if space == "plain":
        found = least_squares(
            lambda s: np.exp(design @ s) / target.max() - target / target.max(),
            solution,
            x_scale="jac",
            xtol=1e-15,
            ftol=1e-15,
            gtol=1e-15,
        )
        solution = found.x
        values = np.exp(design @ solution)
        jacobian, rest = design * values[:, None], target - values
    freedom = count - variables - 1
    residual = math.sqrt(float(rest @ rest) / freedom)
    unscaled = np.linalg.inv(jacobian.T @ jacobian)
    half = (
        float(student_t.ppf((1 + confidence) / 2, freedom)) * residual * np.sqrt(np.diag(unscaled))
    )
    log_c, *exponents = (float(value) for value in solution)
    if not 0 < exp(log_c) < math.inf:
        raise ValueError(
            f"x ({', '.join(labels)}) must vary more, because the fitted exponents are "
            f"{', '.join(f'{p:.3g}' for p in exponents)}, with a coefficient beyond any float; "
            "measure over a wider range."
        )
    return ScalingLaw(
        coefficient=math.exp(log_c),
        exponents=tuple(exponents),
        coefficient_interval=Interval(exp(log_c - half[0]), exp(log_c + half[0])),
        exponent_intervals=tuple(
            Interval(p - float(h), p + float(h)) for p, h in zip(exponents, half[1:], strict=True)
        ),
        residual=residual,
        confidence=confidence,
        space=space,
        names=labels,
        x=tuple(tuple(row) for row in columns.tolist()),
        y=tuple(target.tolist()),
        covariance=tuple(tuple(row) for row in unscaled.tolist()),
    )


def predict(
    law: ScalingLaw, x: float | Sequence[float], *, kind: Literal["new", "law"] = "new"
) -> Prediction:
    """What a law says of a value that was not measured.

    Args:
        law: The law.
        x: A number for each variable, in the units that were fitted.
        kind: "new" for the interval of a new measurement, "law" for that of the law itself, which
            is narrower.

    Returns:
        The value, its interval at the law's confidence, and how far it is extrapolated.

    Raises:
        ValueError: If a number is not positive, or there are not as many as variables.
    """
    if kind not in ("new", "law"):
        raise ValueError(
            f"kind ({kind!r}) must be 'new' or 'law', because these are the two intervals; use "
            "'new' for what a run would measure."
        )
    numbers = _numbers(law, x if isinstance(x, Sequence | np.ndarray) else (x,))
    log_value = law._log(numbers)
    value = exp(log_value)
    row = np.array([1.0, *np.log(numbers)])
    freedom = len(law.y) - len(row)
    quantile = float(student_t.ppf((1 + law.confidence) / 2, freedom))
    gradient = row if law.space == "log" else row * value
    spread = float(gradient @ np.array(law.covariance) @ gradient) + (kind == "new")
    half = quantile * law.residual * math.sqrt(spread)
    if law.space == "log":
        interval = Interval(exp(log_value - half), exp(log_value + half))
    else:
        interval = Interval(max(value - half, 0.0), value + half)
    columns = list(zip(*law.x, strict=True))
    beyond = max(
        max(number / max(column), min(column) / number, 1.0)
        for number, column in zip(numbers, columns, strict=True)
    )
    return Prediction(value=value, interval=interval, beyond=beyond)


def _numbers(law: ScalingLaw, x: Sequence[float]) -> list[float]:
    if len(x) != len(law.exponents):
        raise ValueError(
            f"x ({len(x)} numbers) must be one for each variable ({', '.join(law.names)}), because "
            "the law is a function of all; give as many."
        )
    return check_positive("x", x, "a power law has no other values")


def _columns(x: Sequence[Any], names: Sequence[str] | None) -> tuple[Any, tuple[str, ...]]:
    """A column for each variable, and their names."""
    rows = [[*row] if isinstance(row, Sequence | np.ndarray) else [row] for row in x]
    widths = sorted({len(row) for row in rows})
    if len(widths) != 1 or widths == [0]:
        raise ValueError(
            f"x (rows of {' and '.join(map(str, widths)) or 'no'} numbers) must have as many in "
            "each row, because each is a variable; correct it."
        )
    if names is None:
        names = ["x"] if widths == [1] else [f"x{i + 1}" for i in range(widths[0])]
    labels = (names,) if isinstance(names, str) else tuple(names)
    for row in rows:
        for name, number in zip(labels, row, strict=False):  # how many is checked with y
            check_positive(name, [number], "logarithms are fitted", LEAVE_OUT)
    return np.array(rows, dtype=float), labels


def _check(
    columns: Any, y: Sequence[float], names: Sequence[str], space: str, confidence: float
) -> None:
    if space not in ("log", "plain"):
        raise ValueError(
            f"space ({space!r}) must be 'log' or 'plain', because squares are summed in one of "
            "them; use 'log'."
        )
    check_share("confidence", confidence, "it is the share of such intervals that hold the truth")
    if len(columns) != len(y) or columns.shape[1] != len(names):
        raise ValueError(
            f"x ({len(columns)} measurements) must have a row for each y ({len(y)}) and a column "
            f"for each name ({', '.join(names)}), because each measurement is a point; correct it."
        )
    check_positive("y", y, "logarithms are fitted", LEAVE_OUT)
    least = columns.shape[1] + 2
    different = len({tuple(row) for row in columns.tolist()})
    if different < least:
        raise ValueError(
            f"x ({different} different values) must be {least} or more, because "
            f"{least - 1} numbers are fitted and their error has to be known; measure more."
        )
    logs = np.log(columns)
    if (np.ptp(logs, axis=0) == 0).any() or (
        logs.shape[1] > 1 and np.linalg.eigvalsh(np.corrcoef(logs.T)).min() < _LEAST_INDEPENDENCE
    ):
        raise ValueError(
            f"x ({', '.join(names)}) must vary independently, because what each does could not be "
            "told apart, as with tokens in proportion to parameters; fit one of them alone, or add "
            "runs that vary one and not the other."
        )
