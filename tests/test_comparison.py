"""A comparison's numbers against naive formulas, and its sentences where they must be or not."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from rich.console import Console

from hf_adaptive_batch.report.comparison import Comparison, Contender, paired_difference
from hf_adaptive_batch.report.comparison_table import show
from hf_adaptive_batch.report.history import Evaluation, RunHistory


# Student's t, two-sided 95 %: from the printed tables.
T_QUANTILE = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776}


def run(loss: float, *, steps: int = 100, samples: int = 800, tokens: int = 8000) -> RunHistory:
    """Ends with `loss`, after it has fallen from 3 in a straight line."""
    start = Evaluation(step=0, samples_seen=0, tokens_seen=0, seconds=0.0, loss=3.0)
    end = Evaluation(step=steps, samples_seen=samples, tokens_seen=tokens, seconds=7.0, loss=loss)
    return RunHistory(name="run", records={}, evaluations=[start, end])


def contender(
    name: str,
    losses: Sequence[float],
    *,
    seeds: Sequence[int] | None = None,
    steps: int = 100,
    samples: int = 800,
    tokens: int = 8000,
    tried: Mapping[float, float] | None = None,
    rate: float | None = None,
    tuning_seeds: Sequence[int] = (),
) -> Contender:
    return Contender(
        name=name,
        settings={"batch_schedule": name},
        learning_rate=rate,
        tried=tried or {},
        seeds=range(len(losses)) if seeds is None else seeds,
        runs=[run(loss, steps=steps, samples=samples, tokens=tokens) for loss in losses],
        tuning_seeds=tuning_seeds,
    )


def comparison(*contenders: Contender, **changed: Any) -> Comparison:
    given: dict[str, Any] = {
        "title": "T",
        "target_loss": 2.0,
        "failed": [],
        "note": "",
        "setup": {},
    }
    return Comparison(contenders=contenders, **{**given, **changed})


def sentences(*contenders: Contender, **changed: Any) -> str:
    result = comparison(*contenders, **changed)
    return "\n".join([*result.findings(), *result.limits()])


@pytest.mark.parametrize("count", [2, 3, 4, 5])
def test_the_difference_and_its_interval_are_those_of_the_paired_formula(count: int) -> None:
    a = [1.91, 1.95, 1.90, 1.99, 2.03][:count]
    b = [1.90, 1.93, 1.91, 1.95, 2.00][:count]
    found = paired_difference(contender("a", a), contender("b", b))
    differences = [x - y for x, y in zip(a, b, strict=True)]
    mean = sum(differences) / count
    variance = sum((d - mean) ** 2 for d in differences) / (count - 1)
    half = T_QUANTILE[count - 1] * math.sqrt(variance / count)
    assert found is not None
    assert found.mean == pytest.approx(mean, rel=1e-12)
    assert found.low == pytest.approx(mean - half, rel=1e-3)
    assert found.high == pytest.approx(mean + half, rel=1e-3)
    assert found.seeds == count


def test_pairs_are_of_equal_seeds_in_whatever_order() -> None:
    a = contender("a", [5.0, 1.2, 1.0], seeds=[7, 2, 1])
    b = contender("b", [1.1, 1.0, 9.0], seeds=[2, 1, 3])
    found = paired_difference(a, b)
    assert found is not None
    assert found.seeds == 2
    assert found.mean == pytest.approx((0.1 + 0.0) / 2)
    unpaired = sum([5.0, 1.2, 1.0]) / 3 - sum([1.1, 1.0, 9.0]) / 3
    assert found.mean != pytest.approx(unpaired)


def test_pairing_finds_what_the_spread_over_seeds_hides() -> None:
    a, b = contender("a", [1.01, 2.012, 3.011]), contender("b", [1.0, 2.0, 3.0])
    row = comparison(b, a).rows()[1]
    assert row.loss_spread == pytest.approx(1.0, abs=0.01)
    assert row.difference is not None
    assert row.difference.is_clear


def test_one_seed_has_neither_spread_nor_interval() -> None:
    base, row = comparison(contender("b", [2.0]), contender("a", [2.5])).rows()
    assert base.loss_spread is row.loss_spread is None
    assert base.difference is None
    assert row.difference is not None
    assert (row.difference.mean, row.difference.low, row.difference.high) == (0.5, None, None)
    assert not row.difference.is_clear


def test_a_row_holds_means_over_seeds() -> None:
    base = contender("b", [1.8, 2.2], steps=100)
    other = contender("a", [1.5, 1.0], steps=40)
    first, second = comparison(base, other).rows()
    assert first.loss_mean == pytest.approx(2.0)
    assert first.loss_spread == pytest.approx(math.sqrt(((0.2) ** 2 + (0.2) ** 2) / 1))
    assert first.steps_saved is None
    assert second.steps_saved == pytest.approx(0.6)
    assert second.average_batch_size == 20
    assert second.seconds == 7.0
    # From 3 in a line: 2.0 is reached after 1 / (3 - end) of the steps.
    assert second.steps_to_target == pytest.approx((40 / 1.5 + 40 / 2) / 2)
    assert (first.reached, first.steps_to_target) == (1, None)  # one of the two ends above it


@pytest.mark.parametrize(("sign", "word"), [(1, "above"), (-1, "below")])
def test_a_clear_difference_is_stated_with_its_direction(sign: int, word: str) -> None:
    base = contender("constant", [2.0, 2.1, 2.2], steps=100)
    other = contender(
        "norm test",
        [x + sign * d for x, d in zip([2.0, 2.1, 2.2], [0.1, 0.11, 0.12], strict=True)],
        steps=38,
    )
    text = sentences(base, other)
    assert (
        f"norm test ended 0.1100 {word} constant in final validation loss (95 % interval " in text
    )
    assert "0.0852 to 0.1348 over 3 seeds, paired), in 62 % fewer steps (38 against 100)." in text
    assert "cannot be told apart" not in text


def test_an_interval_with_0_in_it_is_no_difference() -> None:
    base = contender("constant", [2.0, 2.1, 2.2])
    other = contender("norm test", [2.1, 2.0, 2.25], steps=150)
    text = sentences(base, other)
    assert "norm test cannot be told apart from constant in final validation loss" in text
    assert "It took 50 % more steps (150 against 100)." in text
    assert "norm test ended" not in text


def test_one_seed_carries_no_statement_about_chance() -> None:
    base, other = contender("b", [2.0]), contender("a", [1.5])
    assert "a ended 0.5000 below b in final validation loss with one seed: no statement about" in (
        sentences(base, other)
    )
    several = sentences(contender("b", [2.0, 2.0]), contender("a", [1.5, 1.4]))
    assert "statement about chance" not in several


def test_equal_runs_are_said_to_be_equal() -> None:
    text = sentences(contender("b", [2.0, 2.1]), contender("a", [2.0, 2.1]))
    assert "a ended exactly where b did, over 2 seeds, in the same number of steps (100)." in text


def test_a_diverged_run_has_no_mean_and_is_named() -> None:
    base, other = contender("b", [2.0, 2.1]), contender("a", [1.0, math.nan])
    row = comparison(base, other).rows()[1]
    assert (row.loss_mean, row.loss_spread, row.difference, row.diverged) == (None, None, None, 1)
    text = sentences(base, other)
    assert "a diverged: the final validation loss of 1 of its 2 runs is not finite." in text
    assert "a ended" not in text
    text = sentences(contender("b", [math.nan]), contender("a", [1.0]), target_loss=math.nan)
    assert "b, the baseline, diverged: the final validation loss of its run is not finite." in text
    assert "a cannot be compared with b" in text
    assert "target" not in text


def test_runs_without_a_common_seed_are_not_compared() -> None:
    text = sentences(contender("b", [2.0], seeds=[0]), contender("a", [1.0], seeds=[1]))
    assert "a cannot be compared with b: they have no seed in common" in text
    assert "do not have the same seeds" in text


def test_the_target_is_set_against_the_steps_of_the_baseline() -> None:
    base, other = contender("b", [1.5], steps=300), contender("a", [1.0], steps=200)
    slow = contender("slow", [2.5])
    text = sentences(base, other, slow)
    assert "b reached the target validation loss of 2.0000 in 200 steps." in text
    assert "a reached the target validation loss of 2.0000 in 100 steps, 50 % fewer than" in text
    assert "slow did not reach the target validation loss of 2.0000." in text
    assert "interpolated" in text
    assert "interpolated" not in sentences(base, slow, target_loss=0.5)


def test_a_target_that_the_baseline_misses_in_a_run_is_set_against_all_of_its_steps() -> None:
    base, other = contender("b", [1.8, 2.2], steps=200), contender("a", [1.0, 1.0], steps=200)
    text = sentences(base, other, target_given=False)
    assert (
        "b reached the target validation loss of 2.0000 (the highest final one of b) in only 1 of "
        in (text)
    )
    assert (
        "2.0000 (the highest final one of b) in 100 steps, 50 % fewer than the 200 that b trained"
        in text
    )


@pytest.mark.parametrize(("rate", "end"), [(0.001, "smallest"), (0.002, None), (0.004, "largest")])
def test_a_learning_rate_at_the_edge_is_said_to_be(rate: float, end: str | None) -> None:
    tried = {0.004: 2.0, 0.001: 2.0, 0.002: 2.0}
    each = contender("a", [2.0], seeds=[1], tried=tried, rate=rate, tuning_seeds=[0])
    text = sentences(each)
    if end is None:
        assert "better one may lie beyond" not in text
    else:
        assert f"is the {end} of those tried for a ({rate:g}): a better one may lie beyond." in text
    assert "not tuned" not in text
    assert "also among those averaged" not in text


def test_what_tuning_favours_is_said() -> None:
    tried = {0.001: 2.0, 0.002: 1.9, 0.004: math.nan}
    tuned = contender("a", [2.0, 2.1], tried=tried, rate=0.002, tuning_seeds=[0])
    more = contender("c", [2.0, 2.1], tried={**tried, 0.008: 3.0}, rate=0.002, tuning_seeds=[0])
    plain = contender("b", [2.0, 2.1])
    text = sentences(tuned, more, plain)
    assert "The learning rate was not tuned for b, but was for the others" in text
    assert "Different numbers of learning rates were tried: 3 for a and 4 for c." in text
    assert "chosen by the final validation loss of seed 0, also among those averaged" in text
    assert "may lie beyond" not in text  # what diverged was tried, too
    assert "Learning rates were not tuned" in sentences(plain)
    assert "Different numbers" not in sentences(tuned)


def test_unequal_amounts_of_training_are_said() -> None:
    base = contender("b", [2.0])
    assert "train" not in sentences(base, contender("a", [2.0])).replace("training", "")
    text = sentences(base, contender("a", [2.0], samples=1600, tokens=16000))
    assert "did not train on as much as one another: 800 to 1,600 samples and 8,000 to" in text
    # A batch is 8 samples of 10 tokens here: 80 tokens.
    text = sentences(base, contender("a", [2.0], samples=806, tokens=8060))
    assert "the same number of tokens within one step (8,000 to 8,060), and on 800 to 806" in text
    text = sentences(base, contender("a", [2.0], samples=820, tokens=8200))
    assert "did not train on as much" in text


def test_what_limits_a_comparison_is_said_where_it_does() -> None:
    a, b, c = (contender(name, [2.0, 2.1]) for name in "abc")
    assert "not corrected for being several" in sentences(a, b, c)
    assert "not corrected" not in sentences(a, b)
    assert "with one job at a time, on this machine; they include no evaluation" in sentences(a)
    text = sentences(a, jobs=[3], machines=["x"])
    assert "with 3 jobs at a time, which slow one another down, on this machine;" in text
    text = sentences(a, jobs=[1, 2], machines=["x", "y"])
    assert "with 1 or 2 jobs at a time, which slow one another down and differ between" in text
    assert "on different machines, and cannot be compared (x; y);" in text
    assert "Nothing is said about other models, other data or other budgets." in sentences(a)
    text = sentences(a, failed=["b, seed 1 (exit status 1)"], versions=["torch 1", "torch 2"])
    assert "1 run failed and is missing from the numbers: b, seed 1 (exit status 1)." in text
    assert "different versions of the software: torch 1; torch 2." in text
    assert "versions" not in sentences(a, versions=["torch 1"])


def test_json_has_all_of_it_and_no_nan() -> None:
    tuned = contender("a", [math.nan, 1.0], tried={0.1: math.nan, 0.2: 2.0}, rate=0.2)
    text = json.dumps(comparison(contender("b", [2.0, 2.1]), tuned).as_json(), allow_nan=False)
    values = json.loads(text)
    assert values["contenders"][1]["tried"][0] == {"learning_rate": 0.1, "loss": None}
    assert values["contenders"][1]["final_losses"] == [
        {"seed": 0, "loss": None},
        {"seed": 1, "loss": 1.0},
    ]
    assert values["rows"][0]["loss_mean"] == pytest.approx(2.05)
    assert values["findings"]


def test_the_table_shows_names_as_they_are() -> None:
    console = Console(width=120, record=True, quiet=False)
    base = contender("[bold]b[/bold]", [2.0, 2.1])
    show(comparison(base, contender("a", [2.0, math.nan], steps=50)), console)
    shown = console.export_text()
    assert "[bold]b[/bold]" in shown
    assert "2.0500 ± 0.0707" in shown
    assert "diverged" in shown
    assert "50 (-50%)" in shown
