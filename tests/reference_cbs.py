"""The oracle for critical batch sizes: definitions solved by force, fits by other routes.

Nothing here calls the library. What the library has in closed form is searched for here, what it
searches for in one number is searched for in two, and what it compares in floats are fractions.

    McCandlish et al. 2018, "An Empirical Model of Large-Batch Training", arXiv 1812.06162
    Zhang et al. 2025, "How Does Critical Batch Size Scale in Pre-training?", arXiv 2410.21676:
        `plots/chinchilla.ipynb` of hlzhang109/critical-batch-size at c5b509d
    Merrill et al. 2025, "Critical Batch Size Revisited", arXiv 2505.23971
    Bergsma et al. 2025, "Power Lines", arXiv 2505.13738
    Bates & Watts 1988, "Nonlinear Regression Analysis and Its Applications", ch. 6
"""

import math
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np
from scipy.optimize import curve_fit, least_squares
from scipy.stats import norm
from scipy.stats import t as student_t


# --------------------------------------------------------------------------- the published table


class Model(NamedTuple):
    """A row of the notebook, and what its fit printed."""

    parameters: float  # millions
    sequences: float  # millions, of 512 tokens
    steps: list[int]  # at 64, 128, ... 16384 sequences
    a: str
    b: str
    critical: str
    knee: str


BATCH_SIZES = [2**power for power in range(6, 15)]

_ROWS = """
85 3.4 46000 23000 13282 7000 3840 2528 1917 1600 1600 1293.8 2.834e6 745.3 2191
151 6 96000 49000 24000 12000 7128 4350 2940 2400 2300 1752.4 5.677e6 955.2 3240
302 12 196000 90000 46000 23400 13300 7224 4980 3400 2879 2095.3 1.138e7 1393.7 5433
604 24 311000 166000 81000 37440 21320 11400 7199 4700 3800 2459.9 1.945e7 1888.5 7907
1200 48 642000 331000 176000 94000 46500 25000 15360 8900 6500 3897.3 4.338e7 2533.4 11131
"""

TABLE = [
    Model(float(words[0]), float(words[1]), [int(word) for word in words[2:11]], *words[11:])
    for words in map(str.split, _ROWS.strip().splitlines())
]


def as_printed(value: float, printed: str) -> bool:
    """Whether a value rounds to the digits that were printed."""
    mantissa, _, exponent = printed.partition("e")
    decimals = len(mantissa.partition(".")[2])
    return f"{value / 10 ** int(exponent or 0):.{decimals}f}" == mantissa


# ------------------------------------------------------------------------------- definitions


def root_by_halving(function: Callable[[float], float], low: float, high: float) -> float:
    """Where an increasing function is 0, between two positive numbers, halving their ratio."""
    assert function(low) <= 0 <= function(high)
    for _ in range(200):
        middle = math.sqrt(low * high)
        if function(middle) <= 0:
            low = middle
        else:
            high = middle
    return math.sqrt(low * high)


def critical_by_halving(a: float, b: float, overhead: float, reference: float) -> float:
    """Zhang et al.: Y(B*) = (1 + overhead) x linear scaling from the reference, Y = a + b / B.

    Relative to the linear scaling, Y grows with B without end.
    """

    def excess(size: float) -> float:
        linear = (a + b / reference) * reference / size
        return (a + b / size) / linear - (1 + overhead)

    return root_by_halving(excess, 1e-6 * reference, 1e12 * reference * max(b / a, 1))


def knee_by_halving(a: float, b: float) -> float:
    """McCandlish: the batch at which the steps are twice their least, S(B) = 2 S_min."""
    return root_by_halving(lambda size: 2 - (a + b / size) / a, 1e-12 * b / a, 1e12 * b / a)


# -------------------------------------------------------------------- steps to target, two numbers


def sum_of_squares(sizes: Sequence[float], steps: Sequence[float], a: float, b: float) -> float:
    """Of log Y around log(a + b / B)."""
    total = 0.0
    for size, measured in zip(sizes, steps, strict=True):
        total += (math.log(measured) - math.log(a + b / size)) ** 2
    return total


def fit_by_least_squares(sizes: Sequence[float], steps: Sequence[float]) -> tuple[float, float]:
    """(a, b) of Y = a + b / B: Levenberg-Marquardt in (log a, log b), from several starts."""
    log_sizes, logs = (np.log(np.array(each, dtype=float)) for each in (sizes, steps))

    def rest(logarithms):
        return np.logaddexp(logarithms[0], logarithms[1] - log_sizes) - logs

    mean = logs.mean()
    starts = [(mean - 3, mean + log_sizes.max()), (mean, mean + log_sizes.mean()), (mean, mean)]
    found = min(
        (
            least_squares(rest, start, method="lm", xtol=1e-14, ftol=1e-14, gtol=1e-14)
            for start in starts
        ),
        key=lambda each: each.cost,
    )
    a, b = np.exp(found.x)
    return float(a), float(b)


def limit_of_squares(least: float, points: int, confidence: float) -> float:
    """Bates & Watts: S(theta) <= S(least) (1 + t^2 / (n - p)), for one parameter at a time."""
    quantile = float(student_t.ppf((1 + confidence) / 2, points - 2))
    return least * (1 + quantile**2 / (points - 2))


def region_by_grid(
    sizes: Sequence[float],
    steps: Sequence[float],
    best: tuple[float, float],
    confidence: float,
    *,
    reach: float = 0.8,
    points: int = 1001,
) -> dict[str, tuple[float, float]]:
    """Least and largest a, b and b/a among all points of a grid in (log a, log b) within the limit.

    The grid goes from best / e^reach to best x e^reach, and the region has to end inside of it.
    """
    log_a = np.linspace(math.log(best[0]) - reach, math.log(best[0]) + reach, points)[:, None]
    log_b = np.linspace(math.log(best[1]) - reach, math.log(best[1]) + reach, points)[None, :]
    squares = np.zeros((points, points))
    for size, measured in zip(sizes, steps, strict=True):
        squares += (np.log(np.exp(log_a) + np.exp(log_b) / size) - math.log(measured)) ** 2
    limit = limit_of_squares(sum_of_squares(sizes, steps, *best), len(sizes), confidence)
    inside = squares <= limit
    edge = inside[0].any() or inside[-1].any() or inside[:, 0].any() or inside[:, -1].any()
    assert not edge, "the region reaches the end of the grid"
    rows, columns = np.nonzero(inside)
    found = {
        "a": np.exp(log_a[rows, 0]),
        "b": np.exp(log_b[0, columns]),
        "knee": np.exp(log_b[0, columns] - log_a[rows, 0]),
    }
    return {name: (float(values.min()), float(values.max())) for name, values in found.items()}


# --------------------------------------------------------------------------------- power laws


class Line(NamedTuple):
    """log y = log c + p log x by the textbook's sums."""

    coefficient: float
    exponent: float
    residual: float
    coefficient_interval: tuple[float, float]
    exponent_interval: tuple[float, float]


def power_law_by_sums(x: Sequence[float], y: Sequence[float], confidence: float) -> Line:
    """Simple regression: p = Sxy / Sxx, se(p) = s / sqrt(Sxx), se(log c) with 1/n + mean^2/Sxx."""
    p, intercept, s, mean, sxx = _sums(x, y)
    t = float(student_t.ppf((1 + confidence) / 2, len(x) - 2))
    se_p, se_c = s / math.sqrt(sxx), s * math.sqrt(1 / len(x) + mean**2 / sxx)
    return Line(
        coefficient=math.exp(intercept),
        exponent=p,
        residual=s,
        coefficient_interval=(math.exp(intercept - t * se_c), math.exp(intercept + t * se_c)),
        exponent_interval=(p - t * se_p, p + t * se_p),
    )


def predicted_by_sums(
    x: Sequence[float], y: Sequence[float], at: float, confidence: float, *, new: bool
) -> tuple[float, float, float]:
    """(value, low, high): s sqrt(1/n + (x - mean)^2 / Sxx), and 1 more for a new measurement."""
    p, intercept, s, mean, sxx = _sums(x, y)
    t = float(student_t.ppf((1 + confidence) / 2, len(x) - 2))
    half = t * s * math.sqrt(new + 1 / len(x) + (math.log(at) - mean) ** 2 / sxx)
    middle = intercept + p * math.log(at)
    return math.exp(middle), math.exp(middle - half), math.exp(middle + half)


def _sums(x: Sequence[float], y: Sequence[float]) -> tuple[float, float, float, float, float]:
    u, v = [math.log(each) for each in x], [math.log(each) for each in y]
    n = len(u)
    mean_u, mean_v = sum(u) / n, sum(v) / n
    sxx = sum((each - mean_u) ** 2 for each in u)
    sxy = sum((a - mean_u) * (b - mean_v) for a, b in zip(u, v, strict=True))
    p = sxy / sxx
    intercept = mean_v - p * mean_u
    squares = sum((b - intercept - p * a) ** 2 for a, b in zip(u, v, strict=True))
    return p, intercept, math.sqrt(squares / (n - 2)), mean_u, sxx


def plain_power_law(x: Sequence[float], y: Sequence[float]) -> tuple[float, float, float, float]:
    """(c, p, se(c), se(p)) by least squares of y itself, with scipy's covariance."""
    start = power_law_by_sums(x, y, 0.5)
    (c, p), covariance = curve_fit(
        lambda u, c, p: c * u**p, x, y, p0=(start.coefficient, start.exponent), xtol=1e-14
    )
    return float(c), float(p), math.sqrt(covariance[0][0]), math.sqrt(covariance[1][1])


def joint_law(x: Sequence[tuple[float, float]], y: Sequence[float]) -> tuple[float, float, float]:
    """(c, p, q) of y = c u^p v^q: the normal equations by Cramer's rule."""
    rows = [(1.0, math.log(u), math.log(v)) for u, v in x]
    target = [math.log(each) for each in y]
    matrix = [[sum(r[i] * r[j] for r in rows) for j in range(3)] for i in range(3)]
    right = [sum(r[i] * v for r, v in zip(rows, target, strict=True)) for i in range(3)]

    def determinant(m):
        return (
            m[0][0] * (m[1][1] * m[2][2] - m[1][2] * m[2][1])
            - m[0][1] * (m[1][0] * m[2][2] - m[1][2] * m[2][0])
            + m[0][2] * (m[1][0] * m[2][1] - m[1][1] * m[2][0])
        )

    whole = determinant(matrix)
    found = [
        determinant(
            [[right[i] if j == column else matrix[i][j] for j in range(3)] for i in range(3)]
        )
        / whole
        for column in range(3)
    ]
    return math.exp(found[0]), found[1], found[2]


# ------------------------------------------------------------------------------------ branches


def merrill_by_sentence(
    losses: Mapping[Fraction, Fraction | None], tolerance: Fraction
) -> tuple[Fraction, Fraction | None, list[Fraction]]:
    """k* = max {k : L_k <= L_j + eps for all j < k}, in fractions; None is a branch that diverged.

    Also the next larger factor that was tried, if any, and those below k* that did not pass.
    """

    def passes(k: Fraction) -> bool:
        loss = losses[k]
        if loss is None:
            return False
        return all(
            loss <= l_j + tolerance for j, l_j in losses.items() if j < k and l_j is not None
        )

    star = max(k for k in losses if passes(k))
    larger = [k for k in losses if k > star]
    return star, min(larger, default=None), sorted(k for k in losses if k < star and not passes(k))


def smoothed_by_weights(losses: Sequence[float], alpha: float) -> float:
    """m_0 = L_0, m_i = alpha L_i + (1 - alpha) m_(i-1), written as its weights."""
    n = len(losses)
    weights = [alpha * (1 - alpha) ** (n - 1 - i) for i in range(n)]
    weights[0] = (1 - alpha) ** (n - 1)
    return sum(w * loss for w, loss in zip(weights, losses, strict=True))


# ----------------------------------------------------------------------------------- coverage


def coverage_errors(hits: int, repetitions: int, confidence: float) -> float:
    """How many binomial standard errors a share of hits lies from the confidence."""
    error = math.sqrt(confidence * (1 - confidence) / repetitions)
    return (hits / repetitions - confidence) / error


def as_if_normal(confidence: float, freedom: int) -> float:
    """The confidence at which Student's t is what a normal's quantile is at `confidence`."""
    return float(2 * student_t.cdf(norm.ppf((1 + confidence) / 2), freedom) - 1)
