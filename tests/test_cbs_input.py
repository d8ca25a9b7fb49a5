"""Hostile input to the critical batch size: what is flagged, refused, and read from files."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hf_adaptive_batch.cbs import (
    ZHANG_2025,
    FitFlag,
    NotReached,
    StepsMeasurement,
    Sweep,
    SweepRun,
    TradeOff,
    branched_batch_size,
    critical_batch_size,
    fit_power_law,
    fit_steps_to_target,
    predict,
    read_sweeps,
    schedule_law,
    smoothed_loss,
    write_sweeps,
)
from tests.reference_schedules import refusal


SIZES = [64, 128, 256, 512, 1024, 2048]


def curve(a: float, b: float) -> list[float]:
    return [a + b / size for size in SIZES]


STEPS = curve(1000, 1e6)


# --------------------------------------------------------------- steps that do not reach or fall


@pytest.mark.parametrize("missing", [None, math.nan, math.inf])
def test_a_target_that_was_not_reached_is_a_bound_and_not_fitted(missing: float | None) -> None:
    trained = [5e4] * 6
    fit = fit_steps_to_target([*SIZES, 32], [*STEPS, missing], trained_steps=[*trained, 2e4])
    assert fit.a == fit_steps_to_target(SIZES, STEPS).a
    assert fit.not_reached == (NotReached(32, 2e4),)
    assert fit.flags == (FitFlag.NOT_REACHED,)  # 1000 + 1e6 / 32 = 32,250 are more than 20,000
    late = fit_steps_to_target([*SIZES, 32], [*STEPS, missing], trained_steps=[*trained, 4e4])
    assert late.flags == (FitFlag.NOT_REACHED, FitFlag.BOUND_CONTRADICTS)
    for unknown in (None, math.nan, 0):
        free = fit_steps_to_target([*SIZES, 32], [*STEPS, missing], trained_steps=[unknown] * 7)
        assert free.not_reached == (NotReached(32, 0),)
        assert free.flags == (FitFlag.NOT_REACHED,)


def test_more_steps_at_a_larger_batch_are_flagged() -> None:
    rising = [*STEPS[:-1], STEPS[-2] * 1.01]
    assert FitFlag.NOT_MONOTONE in fit_steps_to_target(SIZES, rising).flags
    flat = [*STEPS[:-1], STEPS[-2]]
    assert FitFlag.NOT_MONOTONE not in fit_steps_to_target(SIZES, flat).flags
    # Of seeds the geometric means are compared: 93 < sqrt(80 x 110) = 93.8 < 94 < (80 + 110) / 2.
    for last, flagged in ((93, False), (94, True)):
        seeds = fit_steps_to_target([1, 2, 2, 4], [100, 80, 110, last])
        assert (FitFlag.NOT_MONOTONE in seeds.flags) is flagged


def test_steps_in_proportion_to_the_batch_have_an_infinite_critical_size() -> None:
    for steps in ([64 * 2**k for k in range(5, -1, -1)], [1e9 / size**1.5 for size in SIZES]):
        fit = fit_steps_to_target(SIZES, steps)
        size = critical_batch_size(fit)
        assert (fit.a, fit.knee, size.sequences) == (0, math.inf, math.inf)
        assert fit.a_interval.low == 0
        assert 0 < fit.knee_interval.low < fit.knee_interval.high == math.inf
        assert size.interval.high == math.inf
        assert {FitFlag.NO_CURVATURE, FitFlag.EXTRAPOLATED, FitFlag.OPEN_INTERVAL} <= {*size.flags}
        assert "a and b (0, " in refusal(lambda fit=fit: fit.trade_off)


def test_steps_that_do_not_fall_have_no_knee() -> None:
    for steps in ([500] * 6, [500, 510, 520, 530, 540, 550]):
        fit = fit_steps_to_target(SIZES, steps)
        assert fit.b == fit.knee == fit.knee_interval.low == fit.b_interval.low == 0
        assert fit.a == pytest.approx(math.exp(np.log(steps).mean()))
        assert FitFlag.NO_SPEED_UP in fit.flags
        size = critical_batch_size(fit)
        assert size.sequences == pytest.approx(1.2 * 256)  # the least that the definition has
        assert FitFlag.OPEN_INTERVAL in size.flags
        assert "do not fall" in refusal(lambda fit=fit: fit.trade_off)


def test_a_reference_and_a_critical_size_outside_the_data_are_flagged() -> None:
    fit = fit_steps_to_target(SIZES, STEPS)  # 1.2 x reference + 200
    for inside in (64, 100, 1024):
        assert critical_batch_size(fit, reference=inside).flags == ()
    assert critical_batch_size(fit, reference=63).flags == (FitFlag.REFERENCE_OUTSIDE,)
    assert critical_batch_size(fit, reference=2048).flags == (FitFlag.EXTRAPOLATED,)
    outside = (FitFlag.REFERENCE_OUTSIDE, FitFlag.EXTRAPOLATED)
    assert critical_batch_size(fit, reference=2049).flags == outside
    assert critical_batch_size(fit).tokens is None
    assert critical_batch_size(fit).tokens_interval is None


def test_arrays_and_whole_numbers_are_input_as_lists_are() -> None:
    steps = [round(each) for each in STEPS]
    expected = fit_steps_to_target(SIZES, steps, trained_steps=steps)
    for kind in (np.int64, np.float64, np.float32):
        array = np.array(steps, dtype=kind)
        found = fit_steps_to_target(np.array(SIZES, dtype=kind), array, trained_steps=array)
        assert found == expected
    assert expected.measurements[0] == StepsMeasurement(64, steps[0])
    pairs = np.array([[1, 2], [2, 9], [4, 3], [8, 5]])
    assert (
        fit_power_law(pairs, np.array([1, 2, 3, 4])).exponents
        == fit_power_law(pairs.tolist(), [1, 2, 3, 4]).exponents
    )
    assert fit_power_law(pairs[:, :1], [1, 2, 3, 4]) == fit_power_law([1, 2, 4, 8], [1, 2, 3, 4])
    assert predict(fit_power_law([1, 2, 4], [1, 2, 5], names="D"), np.float32(4)).beyond == 1


def test_twenty_seeds_at_three_batch_sizes_are_sixty_measurements() -> None:
    noise = np.exp(0.1 * np.random.default_rng(0).standard_normal(60))
    sizes = [64, 512, 4096] * 20
    steps = [(2000 + 1e6 / size) * e for size, e in zip(sizes, noise, strict=True)]
    fit = fit_steps_to_target(sizes, steps)
    assert len(fit.measurements) == 60
    assert fit.residual == pytest.approx(0.1, rel=0.3)
    one = fit_steps_to_target(sizes[:3], steps[:3])
    width, wide = [math.log(f.b_interval.high / f.b_interval.low) for f in (fit, one)]
    assert width < wide
    assert fit.knee_interval.low < 500 < fit.knee_interval.high


@pytest.mark.parametrize("confidence", [0.95, 0.99999999])
def test_intervals_beyond_every_float_are_infinite(confidence: float) -> None:
    fit = fit_steps_to_target([1, 2, 4], [1e5, 6, 5], confidence=confidence)
    assert fit.a_interval.low == 0
    assert fit.knee_interval.high == math.inf
    law = fit_power_law([1e9, 1.1e9, 1.2e9], [100, 200, 150], confidence=confidence)
    assert law.coefficient_interval.high == math.inf
    assert predict(law, 1e200).interval.high == math.inf
    assert predict(law, 1e200).interval.low == 0


# ------------------------------------------------------------------------------------ bad input


FIT = fit_steps_to_target(SIZES, STEPS)
TRADE = TradeOff(min_steps=10, min_examples=1000)
LINE = fit_power_law([1, 2, 4], [1, 2, 5])


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: fit_steps_to_target([], []), "reached the target (0) must be three"),
        (lambda: fit_steps_to_target([8, 16], [9, 5]), "reached the target (2)"),
        (lambda: fit_steps_to_target([8, 8, 16], [9, 8, 5]), "reached the target (2)"),
        (lambda: fit_steps_to_target([8, 16, 32], [9, 5, None]), "train for longer"),
        (lambda: fit_steps_to_target(SIZES, STEPS[1:]), "steps (5) and trained_steps (5)"),
        (lambda: fit_steps_to_target(SIZES, STEPS, trained_steps=[]), "trained_steps (0)"),
        *[
            (lambda bad=bad: fit_steps_to_target(SIZES, [*STEPS[1:], bad]), f"steps ({bad})")
            for bad in (0, -3, -math.inf, "many")
        ],
        *[
            (lambda bad=bad: fit_steps_to_target([*SIZES[1:], bad], STEPS), f"sizes ({bad})")
            for bad in (0, -3, math.nan, math.inf, None, "many")
        ],
        (
            lambda: fit_steps_to_target(SIZES, [*STEPS[1:], None], trained_steps=[-1] * 6),
            "trained_steps (-1)",
        ),
        (lambda: fit_steps_to_target(SIZES, STEPS, tokens_per_sequence=0), "tokens_per_sequence"),
        *[
            (lambda bad=bad: fit_steps_to_target(SIZES, STEPS, confidence=bad), f"({bad})")
            for bad in (0, 1, 95, -0.5, math.nan, "95 %")
        ],
        (lambda: FIT.steps_at(0), "batch_size (0)"),
        *[
            (lambda bad=bad: critical_batch_size(FIT, overhead=bad), f"overhead ({bad})")
            for bad in (0, -0.2, math.nan, math.inf, None)
        ],
        (lambda: critical_batch_size(FIT, reference=0), "reference (0)"),
        (lambda: TradeOff(min_steps=0, min_examples=9), "min_steps (0)"),
        (lambda: TradeOff(min_steps=9, min_examples=math.inf), "min_examples (inf)"),
        (lambda: TRADE.steps_at(-1), "batch_size (-1)"),
        (lambda: TRADE.examples_at(math.nan), "batch_size (nan)"),
        (lambda: TRADE.examples_for(10), "steps (10) must be above 10"),
        (lambda: TRADE.examples_for(math.nan), "steps (nan)"),
        (lambda: TRADE.steps_for(999), "examples (999) must be above 1000"),
        (lambda: fit_power_law([1, 2], [1, 2]), "x (2 different values) must be 3"),
        (lambda: fit_power_law([1, 2, 2], [1, 2, 3]), "x (2 different values)"),
        (lambda: fit_power_law([], []), "x (rows of no numbers)"),
        (lambda: fit_power_law([[1, 2], [1]], [1, 2]), "x (rows of 1 and 2 numbers)"),
        (lambda: fit_power_law([1, 2, 3], [1, 2]), "x (3 measurements)"),
        (lambda: fit_power_law([1, 2, 3], [1, 2, 3], names=("N", "D")), "(N, D)"),
        (lambda: fit_power_law([1, 2, 0], [1, 2, 3], names=["D"]), "D (0)"),
        (lambda: fit_power_law([1, 2, "a"], [1, 2, 3]), "x (a)"),
        (lambda: fit_power_law([1, 2, 3], [1, 2, math.inf]), "y (inf)"),
        (lambda: fit_power_law([1, 2, 3], [1, 2, 3], space="Log"), "space ('Log')"),
        (lambda: fit_power_law([1, 2, 3], [1, 2, 3], confidence=1), "confidence (1)"),
        (lambda: fit_power_law([1e9, 1.001e9, 1.002e9], [100, 250, 600]), "must vary more"),
        (lambda: predict(LINE, 0), "x (0)"),
        (lambda: predict(LINE, (1, 2)), "x (2 numbers)"),
        (lambda: predict(LINE, 1, kind="mean"), "kind ('mean')"),  # type: ignore[arg-type]
        (lambda: branched_batch_size({1: 3.0}, batch_size=8), "losses (1)"),
        (lambda: branched_batch_size({1: math.nan, 2: 3.0}, batch_size=8), "loss (nan)"),
        (lambda: branched_batch_size({0: 3.0, 2: 3.0}, batch_size=8), "factor (0)"),
        (lambda: branched_batch_size({1: 3.0, 2: 3.0}, batch_size=0), "batch_size (0)"),
        (
            lambda: branched_batch_size({1: 3.0, 2: 3.0}, batch_size=8, tolerance=-1),
            "tolerance (-1)",
        ),
        (lambda: smoothed_loss([]), "losses (none)"),
        (lambda: smoothed_loss([1.0], 0), "smoothing (0)"),
        (lambda: smoothed_loss([1.0], 1.5), "smoothing (1.5)"),
        (lambda: smoothed_loss([1.0], math.nan), "smoothing (nan)"),
        (lambda: schedule_law([], []), "batch_tokens (0)"),
        (lambda: schedule_law([1e9, 2e9], [1e5]), "batch_tokens (1)"),
        (lambda: schedule_law([1e9], [0]), "batch_tokens (0)"),
        (lambda: schedule_law([1e9, 2e9, 4e9], [4, 2, 1]), "exponent (-1)"),
        (lambda: schedule_law([1e9], [4], exponent=-0.5), "exponent (-0.5)"),
    ],
)
def test_bad_input_is_told_what_to_do(make: Any, said: str) -> None:
    assert said in refusal(make)


def test_numbers_that_vary_together_are_not_told_apart() -> None:
    y = [1, 2, 3, 4, 5]
    sizes = [85, 151, 302, 604, 1200]
    budgets = [sweep.tokens for sweep in ZHANG_2025]  # nearly, but not exactly, in proportion
    for pairs in ([(n, 20 * n) for n in sizes], list(zip(sizes, budgets, strict=True))):
        message = refusal(lambda pairs=pairs: fit_power_law(pairs, y, names=("N", "D")))
        assert "x (N, D) must vary independently" in message
    products = [(n, d, n * d) for n in (1, 2, 4) for d in (1, 3, 7)]  # no pair of them does
    assert "must vary independently" in refusal(lambda: fit_power_law(products, range(1, 10)))
    assert "must vary" in refusal(lambda: fit_power_law([(n, 3) for n in sizes], y))


# ---------------------------------------------------------------------------------------- files


def test_a_file_gives_back_what_was_written(tmp_path: Path) -> None:
    runs = (
        SweepRun(batch_size=8, steps=120.5, trained_steps=200, learning_rate=1e-3, seed=1),
        SweepRun(batch_size=16, steps=None, noise_scale=3.5, chosen=False),
    )
    sweep = Sweep(name="größer ≥ 漢字", runs=runs, target_loss=3.1, setup={"data": "é", "n": [1]})
    file = write_sweeps([sweep, *ZHANG_2025], tmp_path / "deep" / "sweep.json")
    assert read_sweeps(file) == [sweep, *ZHANG_2025]
    assert read_sweeps(file.parent) == [sweep, *ZHANG_2025]
    assert [each.name for each in file.parent.iterdir()] == ["sweep.json"]
    json.loads(file.read_text(encoding="utf-8"), parse_constant=pytest.fail)


def test_numbers_that_json_lacks_become_unknown_and_numpy_s_become_python_s(tmp_path: Path) -> None:
    runs = [
        SweepRun(batch_size=np.int64(8), steps=math.nan, trained_steps=math.inf),
        SweepRun(batch_size=np.float32(16), steps=np.float64(3), seed=np.int32(7)),
    ]
    [found] = read_sweeps(write_sweeps([Sweep(name="s", runs=runs)], tmp_path / "s.json"))
    assert found.runs == (
        SweepRun(batch_size=8, steps=None, trained_steps=None),
        SweepRun(batch_size=16, steps=3, seed=7),
    )


def test_a_table_has_columns_in_any_order_and_empty_cells(tmp_path: Path) -> None:
    file = tmp_path / "mine.csv"
    text = "\ufeffsteps, seed,batch_size,trained_steps\r\n100.5, 1.0, 8, 200\r\n\r\n,,16,300\r\n"
    file.write_text(text, encoding="utf-8")
    [sweep] = read_sweeps(file)
    assert sweep.name == "mine"
    assert sweep.runs == (
        SweepRun(batch_size=8, steps=100.5, trained_steps=200, seed=1),
        SweepRun(batch_size=16, steps=None, trained_steps=300),
    )


def test_of_several_learning_rates_in_a_table_the_best_is_fitted(tmp_path: Path) -> None:
    rows = [
        (8, 1e-3, 100),
        (8, 1e-3, 110),
        (8, 2e-3, 60),  # fast, but one of its seeds never reached the target
        (8, 2e-3, ""),
        (16, 1e-3, 80),
        (16, 2e-3, 50),
        (32, 1e-3, ""),
    ]
    lines = [f"{size},{rate},{steps}\n" for size, rate, steps in rows]
    file = tmp_path / "rates.csv"
    file.write_text("batch_size,learning_rate,steps\n" + "".join(lines), encoding="utf-8")
    [sweep] = read_sweeps(file)
    chosen = [(run.batch_size, run.learning_rate) for run in sweep.runs if run.chosen]
    assert chosen == [(8, 1e-3), (8, 1e-3), (16, 2e-3), (32, 1e-3)]


def in_json(**run: Any) -> str:
    return json.dumps({"version": 1, "sweeps": [{"name": "s", "runs": [run]}]})


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.csv", "", "no such columns"),
        ("a.csv", "batch_size,steps\n", "no row"),
        ("a.csv", "batch_size;steps\n8;9\n", "no such columns"),
        ("a.csv", "batch_size,steps,speed\n8,9,1\n", "unknown columns ['speed']"),
        ("a.csv", "batch_size,steps\n8,9\n16,7,5\n", "row 2 has more cells"),
        ("a.csv", "batch_size,steps\n8,9\n,7\n", "row 2 has no batch_size"),
        ("a.csv", "batch_size,steps\n8,never\n", "'never'"),
        ("a.csv", "batch_size,steps,seed\n8,9,1.5\n", "seed is 1.5 in row 1"),
        ("a.csv", "batch_size,steps,seed\n8,9,inf\n", "seed is inf in row 1"),
        ("a.json", "", "JSONDecodeError"),
        ("a.json", "[]", "TypeError"),
        ("a.json", '{"sweeps": []}', "version"),
        ("a.json", '{"version": 2, "sweeps": []}', "version 2 is not 1"),
        ("a.json", '{"version": 1, "sweeps": [3]}', "TypeError"),
        ("a.json", '{"version": 1, "sweeps": [{"name": "s", "speed": 1}]}', "['speed']"),
        ("a.json", in_json(batch_size=8, steps="many"), "steps is 'many', and no number"),
        ("a.json", in_json(steps=9), "batch_size"),
        ("a.json", in_json(batch_size=8, steps=9, speed=1), "speed"),
    ],
)
def test_a_file_that_is_something_else_is_named(
    tmp_path: Path, name: str, content: str, said: str
) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    message = refusal(lambda: read_sweeps(tmp_path / name))
    assert message.startswith(f"FILE ({tmp_path / name}) must be")
    assert said in message


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    for path in (tmp_path / "none.json", tmp_path):
        assert f"FILE ({path}) must be one that can be read" in refusal(
            lambda p=path: read_sweeps(p)
        )
    binary = tmp_path / "binary.json"
    binary.write_bytes(b"\xff\xfe\x00")
    assert "UnicodeDecodeError" in refusal(lambda: read_sweeps(binary))


def test_a_sweep_fits_what_was_chosen_and_names_itself_where_it_cannot() -> None:
    runs = [SweepRun(batch_size=x, steps=y) for x, y in zip(SIZES, STEPS, strict=True)]
    worse = [
        SweepRun(batch_size=x, steps=9 * y, chosen=False) for x, y in zip(SIZES, STEPS, strict=True)
    ]
    sweep = Sweep(name="mine", runs=[*runs, *worse], overhead=0.5, reference=128)
    assert sweep.fit() == fit_steps_to_target(SIZES, STEPS, trained_steps=[None] * 6)
    assert float(sweep.critical_batch_size()) == pytest.approx(1.5 * 128 + 0.5 * 1000, rel=1e-6)
    assert float(sweep.critical_batch_size(0.2, 256)) == pytest.approx(507.2, rel=1e-6)
    with pytest.raises(ValueError, match=r"In mine: .* \(2\) must be three"):
        Sweep(name="mine", runs=runs[:2]).fit()


def test_noise_scales_are_geometric_means_of_the_chosen() -> None:
    scales = [(8, 2.0, True), (8, 8.0, True), (8, 99.0, False), (4, 5.0, True), (16, None, True)]
    runs = [SweepRun(batch_size=b, steps=1, noise_scale=s, chosen=c) for b, s, c in scales]
    assert Sweep(name="s", runs=runs).noise_scales() == pytest.approx({4: 5.0, 8: 4.0})
