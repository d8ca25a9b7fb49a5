"""Fits of the critical batch size against the papers' numbers, other routes, and the truth."""

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hf_adaptive_batch.cbs import (
    ZHANG_2025,
    FitFlag,
    Interval,
    StepsToTargetFit,
    TradeOff,
    critical_batch_size,
    fit_power_law,
    fit_steps_to_target,
    law_sensitivity,
    predict,
)
from tests import reference_cbs as reference
from tests.reference_cbs import BATCH_SIZES, TABLE, as_printed
from tests.reference_schedules import refusal


NAMES = ("a", "b", "knee", "critical")


def by_name(fit: StepsToTargetFit, of: float = 256) -> dict[str, Interval]:
    return {
        "a": fit.a_interval,
        "b": fit.b_interval,
        "knee": fit.knee_interval,
        "critical": critical_batch_size(fit, reference=of).interval,
    }


def curve(a: float, b: float, sizes: Sequence[float] = BATCH_SIZES) -> list[float]:
    return [a + b / size for size in sizes]


def published_law(variable: str, value: Callable[[StepsToTargetFit], float], **options):
    x = [getattr(model, variable) for model in TABLE]
    if variable == "sequences":
        x = [each * 512 for each in x]  # millions of tokens
    fits = [fit_steps_to_target(BATCH_SIZES, model.steps) for model in TABLE]
    return fit_power_law(x, [value(fit) for fit in fits], **options)


def critical(fit: StepsToTargetFit) -> float:
    return float(critical_batch_size(fit))


# --------------------------------------------------------------------------- the published table


@pytest.mark.parametrize("model", TABLE, ids=lambda model: f"{model.parameters:g}M")
def test_the_table_of_zhang_et_al_to_its_digits(model: reference.Model) -> None:
    fit = fit_steps_to_target(BATCH_SIZES, model.steps, tokens_per_sequence=512)
    assert as_printed(fit.a, model.a)
    assert as_printed(fit.b, model.b)
    assert as_printed(fit.knee, model.knee)
    size = critical_batch_size(fit, overhead=0.2, reference=256)
    assert as_printed(float(size), model.critical)
    assert size.tokens == 512 * size.sequences
    assert fit.knee_tokens == 512 * fit.knee
    assert size.flags == fit.flags == ()


@pytest.mark.parametrize("model", TABLE, ids=lambda model: f"{model.parameters:g}M")
def test_other_squares_and_other_constants_give_other_digits(model: reference.Model) -> None:
    """The check above can fail: each digit depends on how it was fitted."""
    inverse = 1 / np.array(BATCH_SIZES, dtype=float)
    design = np.column_stack([np.ones(len(inverse)), inverse])
    a, b = np.linalg.lstsq(design, np.array(model.steps, dtype=float), rcond=None)[0]
    assert not as_printed(a, model.a)
    assert not as_printed(b, model.b)
    assert not as_printed(b / a, model.knee)
    fit = fit_steps_to_target(BATCH_SIZES, model.steps)
    for overhead, of in [(0.2, 257), (0.201, 256), (0.2, 64), (1.0, 256)]:
        assert not as_printed(float(critical_batch_size(fit, overhead, of)), model.critical)


def test_the_stored_measurements_are_those_of_the_notebook() -> None:
    assert len(ZHANG_2025) == len(TABLE)
    for sweep, model in zip(ZHANG_2025, TABLE, strict=True):
        assert [run.batch_size for run in sweep.runs] == BATCH_SIZES
        assert [run.steps for run in sweep.runs] == model.steps
        assert sweep.parameters == model.parameters * 1e6
        assert sweep.tokens == model.sequences * 1e6 * 512
        assert as_printed(float(sweep.critical_batch_size()), model.critical)


def test_the_published_laws_in_both_spaces() -> None:
    law = published_law("parameters", critical)
    assert (f"{law.coefficient:.2f}", f"{law.exponent:.3f}") == ("93.20", "0.468")
    forecasts = [round(predict(law, each).value) for each in (1750, 2000, 3000, 6000)]
    assert forecasts == [3076, 3275, 3960, 5478]
    plain = published_law("parameters", critical, space="plain")
    assert (f"{plain.coefficient:.1f}", f"{plain.exponent:.3f}") == ("99.5", "0.458")
    assert [round(predict(plain, each).value) for each in (1750, 2000, 3000, 6000)] != forecasts
    data = published_law("sequences", critical)
    assert (f"{data.coefficient:.2f}", f"{data.exponent:.3f}") == ("22.72", "0.468")
    knees = published_law("sequences", lambda fit: fit.knee)
    assert f"{knees.exponent:.2f}" == "0.62"


def test_the_exponent_follows_the_definition() -> None:
    fits = [sweep.fit() for sweep in ZHANG_2025]
    x = [model.parameters for model in TABLE]
    found = {
        (each.overhead, each.reference): f"{each.law.exponent:.3f}"
        for each in law_sensitivity(x, fits)
    }
    assert found[0.2, 256] == "0.468"
    assert len(set(found.values())) == len(found) == 12
    for (overhead, of), exponent in found.items():
        sizes = [reference.critical_by_halving(fit.a, fit.b, overhead, of) for fit in fits]
        assert exponent == f"{reference.power_law_by_sums(x, sizes, 0.95).exponent:.3f}"


# ---------------------------------------------------------------------------- steps to a target


@given(
    a=st.floats(1e-3, 1e9),
    b=st.floats(1e-3, 1e12),
    overhead=st.floats(0.01, 3),
    of=st.floats(1, 1e6),
)
@settings(max_examples=50)
def test_the_critical_batch_size_solves_its_definition(
    a: float, b: float, overhead: float, of: float
) -> None:
    # Exact steps around the knee: the fit is that of a and b.
    sizes = [b / a * factor for factor in (0.1, 0.5, 1, 2, 10)]
    fit = fit_steps_to_target(sizes, curve(a, b, sizes))
    expected = reference.critical_by_halving(a, b, overhead, of)
    assert float(critical_batch_size(fit, overhead, of)) == pytest.approx(expected, rel=1e-6)
    assert fit.knee == pytest.approx(reference.knee_by_halving(a, b), rel=1e-6)


@st.composite
def sweeps(draw: st.DrawFn) -> tuple[list[float], list[float]]:
    """Sizes and steps with noise, around, below or above a knee, with seeds."""
    first = draw(st.floats(0.5, 1e4))
    sizes = [first * 2**k for k in draw(st.lists(st.integers(0, 10), min_size=3, max_size=9))]
    if len(set(sizes)) < 3:
        sizes += [first * 2**11, first * 2**12, first * 2**13]
    knee = first * 2 ** draw(st.floats(-2, 12))
    scale = 10 ** draw(st.floats(0, 6))
    noise = draw(st.lists(st.floats(-0.3, 0.3), min_size=len(sizes), max_size=len(sizes)))
    steps = [scale * (1 + knee / size) * math.exp(e) for size, e in zip(sizes, noise, strict=True)]
    return sizes, steps


@given(sweeps())
def test_no_other_route_finds_fewer_squares(measured: tuple[list[float], list[float]]) -> None:
    sizes, steps = measured
    fit = fit_steps_to_target(sizes, steps)
    a, b = reference.fit_by_least_squares(sizes, steps)
    mine = reference.sum_of_squares(sizes, steps, fit.a, fit.b)
    other = reference.sum_of_squares(sizes, steps, a, b)
    # A ten-thousandth in log steps is where the library takes a curve for a straight line.
    assert mine <= other + 1e-3 * math.sqrt(other / len(sizes)) + 1e-8
    assert fit.residual == pytest.approx(math.sqrt(mine / (len(sizes) - 2)), rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("seed", range(20))
def test_twenty_seeds_of_noise_are_fitted_as_by_least_squares(seed: int) -> None:
    random = np.random.default_rng(seed)
    sizes = random.choice(BATCH_SIZES, 4 + seed % 6, replace=False).tolist()
    steps = np.array(curve(2000, 5e6, sizes)) * np.exp(0.1 * random.standard_normal(len(sizes)))
    fit = fit_steps_to_target(sizes, steps)
    expected = reference.fit_by_least_squares(sizes, steps.tolist())
    assert (fit.a, fit.b) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("confidence", [0.68, 0.95])
@pytest.mark.parametrize("model", TABLE[::2], ids=lambda model: f"{model.parameters:g}M")
def test_intervals_are_those_of_a_fine_grid_of_a_and_b(
    model: reference.Model, confidence: float
) -> None:
    fit = fit_steps_to_target(BATCH_SIZES, model.steps, confidence=confidence)
    best = reference.fit_by_least_squares(BATCH_SIZES, model.steps)
    region = reference.region_by_grid(BATCH_SIZES, model.steps, best, confidence, reach=0.4)
    for name, expected in region.items():
        assert by_name(fit)[name] == pytest.approx(expected, rel=2e-3)
    low, high = region["knee"]
    ends = [reference.critical_by_halving(1.0, end, 0.2, 256) for end in (low, high)]
    assert by_name(fit)["critical"] == pytest.approx(ends, rel=2e-3)
    other = fit_steps_to_target(BATCH_SIZES, model.steps, confidence=confidence - 0.05)
    for name, expected in region.items():  # which a slightly narrower one is not
        assert by_name(other)[name] != pytest.approx(expected, rel=2e-3)


@example(
    (
        [4999.0] * 3 + [10237952.0, 20475904.0, 40951808.0],
        [2.0, 2.0, 2.0, 1.00048828125, 1.000244140625, 1.0001220703125],
    ),
    0.5,
)
@given(sweeps(), st.sampled_from([0.5, 0.95, 0.999999]))
def test_intervals_hold_their_estimates_and_are_open_where_a_straight_line_is_plausible(
    measured: tuple[list[float], list[float]], confidence: float
) -> None:
    sizes, steps = measured
    fit = fit_steps_to_target(sizes, steps, confidence=confidence)
    size = critical_batch_size(fit)
    values = {"a": fit.a, "b": fit.b, "knee": fit.knee, "critical": float(size)}
    for name, (low, high) in by_name(fit).items():
        rounding = 1 + 1e-12  # a perfect fit is its own interval
        assert 0 <= low <= values[name] * rounding
        assert values[name] <= high * rounding
        assert not math.isnan(low + high)
    logs = [math.log(y * x) for x, y in zip(sizes, steps, strict=True)]
    straight = sum((each - sum(logs) / len(logs)) ** 2 for each in logs)
    least = reference.sum_of_squares(sizes, steps, fit.a, fit.b)
    limit = reference.limit_of_squares(least, len(sizes), confidence)
    if not straight == pytest.approx(limit, rel=1e-2, abs=1e-6):
        assert math.isinf(fit.knee_interval.high) is (straight <= limit)
        assert (fit.a_interval.low == 0) is (straight <= limit)
    open_ = math.isinf(size.interval.high) or fit.knee_interval.low == 0
    assert (FitFlag.OPEN_INTERVAL in size.flags) is open_


@given(
    sweeps(),
    st.sampled_from([1e-3, 3.0, 512.0, 1e6]),
    st.sampled_from([1e-6, 0.3, 1e3, 1e9]),
    st.randoms(use_true_random=False),
)
def test_units_and_order_do_not_matter(
    measured: tuple[list[float], list[float]], size_unit: float, step_unit: float, random
) -> None:
    """In other units of batch and steps a is a x steps', b is b x both, and the knee x batch's."""
    sizes, steps = measured
    fit = fit_steps_to_target(sizes, steps)
    pairs = [(x * size_unit, y * step_unit) for x, y in zip(sizes, steps, strict=True)]
    random.shuffle(pairs)
    other = fit_steps_to_target(*zip(*pairs, strict=True))
    small = 1e-5  # of the largest steps and examples: what is nearly 0 has no digits
    most = max(steps), max(x * y for x, y in zip(sizes, steps, strict=True))
    assert other.a == pytest.approx(fit.a * step_unit, rel=1e-4, abs=small * most[0] * step_unit)
    assert other.b == pytest.approx(
        fit.b * step_unit * size_unit, rel=1e-4, abs=small * most[1] * step_unit * size_unit
    )
    assert other.residual == pytest.approx(fit.residual, rel=1e-5, abs=1e-7)
    for mine, theirs in zip(fit.knee_interval, other.knee_interval, strict=True):
        assert theirs == pytest.approx(mine * size_unit, rel=1e-3)
    assert other.flags == fit.flags


@pytest.mark.parametrize("size_unit", [1, 512, 1e6])
@pytest.mark.parametrize("step_unit", [1e-3, 1, 1e6])
def test_exact_steps_of_any_magnitude_give_back_their_curve(
    size_unit: float, step_unit: float
) -> None:
    sizes = [size_unit * size for size in BATCH_SIZES]
    a, b = 1000 * step_unit, 3e6 * step_unit * size_unit
    fit = fit_steps_to_target(sizes, curve(a, b, sizes))
    assert (fit.a, fit.b) == pytest.approx((a, b), rel=1e-7)
    assert fit.residual < 1e-7
    assert fit.a_interval == pytest.approx((a, a), rel=1e-6)
    assert fit.knee_interval == pytest.approx((b / a, b / a), rel=1e-6)
    assert fit.flags == ()
    assert fit.steps_at(sizes[3]) == pytest.approx(a + b / sizes[3], rel=1e-7)


# ---------------------------------------------------------------------------------- coverage


REPETITIONS = 600


def noisy_fits(sizes: Sequence[float], noise: float, confidence: float) -> Iterator:
    """Fits to Y = (a + b/B) exp(noise) with a = 2000 and b = 4e6, always the same ones."""
    random = np.random.default_rng(6)
    for _ in range(REPETITIONS):
        steps = np.array(curve(2000, 4e6, sizes)) * np.exp(
            noise * random.standard_normal(len(sizes))
        )
        yield fit_steps_to_target(sizes, steps, confidence=confidence)


TRUTH = {"a": 2000, "b": 4e6, "knee": 2000, "critical": 1.2 * 256 + 0.2 * 2000}

EIGHT, FOUR = [64 * 2**i for i in range(8)], [64 * 4**i for i in range(4)]


def hits(found: Iterator[dict[str, Interval]], truth: dict[str, float]) -> dict[str, int]:
    counts = dict.fromkeys(truth, 0)
    for intervals in found:
        for name, value in truth.items():
            counts[name] += intervals[name].low <= value <= intervals[name].high
    return counts


def halved(fit: StepsToTargetFit) -> dict[str, Interval]:
    """Half as wide in logarithms, around the estimates."""
    size = float(critical_batch_size(fit))
    values = {"a": fit.a, "b": fit.b, "knee": fit.knee, "critical": size}
    return {
        name: Interval(math.sqrt(low * values[name]), math.sqrt(high * values[name]))
        for name, (low, high) in by_name(fit).items()
    }


@pytest.mark.parametrize(
    ("sizes", "noise", "confidence"),
    [
        (EIGHT, 0.05, 0.95),
        (EIGHT, 0.25, 0.95),  # so that the curve is not straight within its error
        (EIGHT, 0.05, 0.7),
        (FOUR, 0.05, 0.95),
        (FOUR, 0.4, 0.95),  # most of them open above
        ([64, 512, 4096], 0.02, 0.95),
        ([64, 1024, 8192] * 4, 0.1, 0.95),  # seeds
    ],
)
def test_intervals_hold_the_truth_as_often_as_they_say(
    sizes: list[int], noise: float, confidence: float
) -> None:
    counts = hits(map(by_name, noisy_fits(sizes, noise, confidence)), TRUTH)
    for name in NAMES:
        errors = reference.coverage_errors(counts[name], REPETITIONS, confidence)
        assert abs(errors) < 4, (name, counts[name] / REPETITIONS)


def test_intervals_half_as_wide_would_not() -> None:
    counts = hits(map(halved, noisy_fits(EIGHT, 0.05, 0.95)), TRUTH)
    for name in NAMES:
        assert reference.coverage_errors(counts[name], REPETITIONS, 0.95) < -4


def test_intervals_of_a_normal_distribution_would_not_at_four_batch_sizes() -> None:
    normal = reference.as_if_normal(0.95, freedom=2)
    assert normal == pytest.approx(0.81, abs=0.005)
    counts = hits(map(by_name, noisy_fits(FOUR, 0.05, normal)), TRUTH)
    for name in NAMES:
        assert reference.coverage_errors(counts[name], REPETITIONS, 0.95) < -4


LAW = {"coefficient": 22.0, "exponent": 0.47, "law": 22 * 1e6**0.47, "new": 0.0}


def noisy_laws(space, count: int, confidence: float) -> Iterator[dict[str, Interval]]:
    """Intervals of 22 x^0.47, and of a new measurement, from which it is subtracted."""
    random = np.random.default_rng(7)
    x = np.geomspace(1e3, 1e5, count)
    for _ in range(REPETITIONS):
        errors = random.standard_normal(count + 1)
        truth = 22 * np.array([*x, 1e6]) ** 0.47
        y = truth * np.exp(0.1 * errors) if space == "log" else truth + 50 * errors
        law = fit_power_law(x, y[:-1], space=space, confidence=confidence)
        yield {
            "coefficient": law.coefficient_interval,
            "exponent": law.exponent_interval,
            "law": predict(law, 1e6, kind="law").interval,
            "new": predict(law, 1e6).interval.scaled(1.0, -y[-1]),
        }


@pytest.mark.parametrize("count", [3, 5])
@pytest.mark.parametrize("space", ["log", "plain"])
def test_laws_and_predictions_hold_the_truth_as_often_as_they_say(space: str, count: int) -> None:
    counts = hits(noisy_laws(space, count, 0.95), LAW)
    for name, count_ in counts.items():
        errors = reference.coverage_errors(count_, REPETITIONS, 0.95)
        assert abs(errors) < 4, (name, count_ / REPETITIONS)


def test_laws_with_intervals_of_a_normal_distribution_would_not() -> None:
    counts = hits(noisy_laws("log", 5, reference.as_if_normal(0.95, freedom=3)), LAW)
    for count in counts.values():
        assert reference.coverage_errors(count, REPETITIONS, 0.95) < -4


def test_the_law_s_own_interval_is_too_narrow_for_a_new_measurement() -> None:
    random, x, held = np.random.default_rng(8), np.geomspace(1e3, 1e5, 8), 0
    for _ in range(REPETITIONS):
        y = 22 * x**0.47 * np.exp(0.1 * random.standard_normal(8))
        low, high = predict(fit_power_law(x, y), 1e4, kind="law").interval
        held += low <= 22 * 1e4**0.47 * math.exp(0.1 * random.standard_normal()) <= high
    assert reference.coverage_errors(held, REPETITIONS, 0.95) < -4


# -------------------------------------------------------------------------------- power laws


@st.composite
def points(draw: st.DrawFn) -> tuple[list[float], list[float]]:
    count = draw(st.integers(3, 8))
    logs = draw(st.lists(st.integers(0, 60), min_size=count, max_size=count, unique=True))
    x = [10 ** (3 + each / 10) for each in logs]
    p, noise = draw(st.floats(-2, 2)), draw(st.lists(st.floats(-1, 1), min_size=8, max_size=8))
    return x, [5 * each**p * math.exp(e) for each, e in zip(x, noise, strict=False)]


@given(points(), st.sampled_from([0.5, 0.95, 0.99]), st.floats(1e2, 1e10))
def test_a_power_law_is_that_of_the_textbook_s_sums(
    measured: tuple[list[float], list[float]], confidence: float, at: float
) -> None:
    x, y = measured
    law, expected = (
        fit_power_law(x, y, confidence=confidence),
        reference.power_law_by_sums(x, y, confidence),
    )
    close = {"rel": 1e-6, "abs": 1e-9}
    assert law.coefficient == pytest.approx(expected.coefficient, **close)
    assert law.exponent == pytest.approx(expected.exponent, **close)
    assert law.residual == pytest.approx(expected.residual, **close)
    for mine, theirs in zip(
        (*law.coefficient_interval, *law.exponent_interval),
        (*expected.coefficient_interval, *expected.exponent_interval),
        strict=True,
    ):
        assert math.isinf(mine) or mine == pytest.approx(theirs, rel=1e-4, abs=1e-9)
    for kind, new in (("new", True), ("law", False)):
        value, low, high = reference.predicted_by_sums(x, y, at, confidence, new=new)
        found = predict(law, at, kind=kind)
        assert found.value == pytest.approx(value, rel=1e-6)
        assert found.interval == pytest.approx((low, high), rel=1e-4)
    assert predict(law, at).beyond == max(at / max(x), min(x) / at, 1)


@pytest.mark.parametrize("seed", range(5))
def test_a_law_in_plain_space_is_that_of_scipy(seed: int) -> None:
    random, x = np.random.default_rng(seed), np.geomspace(1e3, 1e5, 6)
    y = 22 * x**0.47 * np.exp(0.1 * random.standard_normal(6))
    law = fit_power_law(x, y, space="plain")
    c, p, error_c, error_p = reference.plain_power_law(x, y)
    assert (law.coefficient, law.exponent) == pytest.approx((c, p), rel=1e-5)
    t = 2.7764451051977987  # 4 degrees of freedom
    assert law.exponent_interval == pytest.approx((p - t * error_p, p + t * error_p), rel=1e-4)
    half = t * error_c / c
    ends = c * math.exp(-half), c * math.exp(half)
    assert law.coefficient_interval == pytest.approx(ends, rel=1e-4)


def test_what_n_and_d_do_is_told_apart_by_a_grid_of_runs() -> None:
    grid = [(n, d) for n in (85, 302, 1200) for d in (1e3, 5e3, 25e3)]
    exact = fit_power_law(grid, [20 * n**0.05 * d**0.47 for n, d in grid], names=("N", "D"))
    assert (exact.coefficient, *exact.exponents) == pytest.approx((20, 0.05, 0.47), rel=1e-9)
    noise = np.exp(0.1 * np.random.default_rng(0).standard_normal(len(grid)))
    y = [20 * n**0.05 * d**0.47 * e for (n, d), e in zip(grid, noise, strict=True)]
    law = fit_power_law(grid, y, names=("N", "D"))
    assert (law.coefficient, *law.exponents) == pytest.approx(reference.joint_law(grid, y))
    for truth, interval in zip((0.05, 0.47), law.exponent_intervals, strict=True):
        assert interval.low < truth < interval.high
    assert law(85, 1e3) == pytest.approx(predict(law, (85, 1e3)).value)
    assert predict(law, (2400, 1e3)).beyond == 2
    assert "exponent (N, D) must" in refusal(lambda: law.exponent)


# ------------------------------------------------------------------------------ the trade-off


@given(st.floats(1, 1e9), st.floats(1e-3, 1e9), st.floats(1e-3, 1e3))
def test_steps_and_examples_lie_on_the_hyperbola(
    least: float, knee: float, relative: float
) -> None:
    trade = TradeOff(min_steps=least, min_examples=least * knee)
    assert trade.knee == pytest.approx(knee)
    size = trade.knee * relative
    steps, examples = trade.steps_at(size), trade.examples_at(size)
    product = (steps / trade.min_steps - 1) * (examples / trade.min_examples - 1)
    assert product == pytest.approx(1, rel=1e-9)
    assert steps == pytest.approx(examples / size)
    assert trade.examples_for(steps) == pytest.approx(examples, rel=1e-9)
    assert trade.steps_for(examples) == pytest.approx(steps, rel=1e-9)
    assert trade.steps_at(trade.knee) == pytest.approx(2 * trade.min_steps)
    assert trade.examples_at(trade.knee) == pytest.approx(2 * trade.min_examples)
    assert trade.examples_for(math.inf) == trade.min_examples
    assert trade.steps_for(math.inf) == trade.min_steps


def test_a_fit_is_a_trade_off() -> None:
    fit = ZHANG_2025[0].fit()
    trade = fit.trade_off
    assert (trade.min_steps, trade.min_examples, trade.knee) == (fit.a, fit.b, fit.knee)
    assert trade.steps_at(300) == fit.steps_at(300)
    # Power Lines: D = D_min (1 + B / B_crit).
    assert trade.examples_at(300) == pytest.approx(fit.b * (1 + 300 / fit.knee))
