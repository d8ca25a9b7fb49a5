"""Merrill's rule, advice and schedules against their definitions."""

import math
import random
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_adaptive_batch.assemble_schedule import Horizon, begin_schedule
from hf_adaptive_batch.cbs import (
    LAWS,
    ZHANG_2025,
    BranchOutcome,
    advise,
    branched_batch_size,
    fit_power_law,
    schedule_law,
    smoothed_loss,
)
from hf_adaptive_batch.cbs.published import Evidence, Kind, PublishedLaw
from hf_adaptive_batch.decide.controllers import ScheduledController
from hf_adaptive_batch.decide.schedule import PowerLaw
from tests import cases
from tests import reference_cbs as reference
from tests.reference_schedules import refusal


# ------------------------------------------------------------------------------ Merrill's rule


@pytest.mark.parametrize(
    ("losses", "factor", "next_factor", "outcome", "failed_below"),
    [
        ({1: 3.0, 2: 3.0, 4: 3.005, 8: 3.1}, 4, 8, BranchOutcome.BRACKETED, ()),
        ({1: 3.0, 2: 3.1, 4: 3.2}, 1, 2, BranchOutcome.NONE_PASSED, ()),
        ({1: 3.0, 2: 3.0, 4: 3.0}, 4, None, BranchOutcome.ALL_PASSED, ()),
        ({1: 3.0, 2: 3.1, 4: 3.005, 8: 3.2}, 4, 8, BranchOutcome.BRACKETED, (2,)),
        ({1: 3.0, 2: 2.9, 4: 2.95}, 2, 4, BranchOutcome.BRACKETED, ()),  # compared with all
        ({1: 3.0, 2: 3.005, 4: math.nan}, 2, 4, BranchOutcome.BRACKETED, ()),
        ({1: 3.0, 2: math.inf, 4: 3.0, 8: None}, 4, 8, BranchOutcome.BRACKETED, (2,)),
        ({1: 3.0, 2: -math.inf, 4: 3.0}, 4, None, BranchOutcome.ALL_PASSED, (2,)),
        ({1: 3.0, 2: math.nan}, 1, 2, BranchOutcome.NONE_PASSED, ()),
        ({8: 3.1, 1: 3.0, 4: 3.005, 2: 3.0}, 4, 8, BranchOutcome.BRACKETED, ()),
        ({1: 3.0, 2: 3.0}, 2, None, BranchOutcome.ALL_PASSED, ()),
        ({1: 3.0, 1.5: 3.0, 2.25: 3.1}, 1.5, 2.25, BranchOutcome.BRACKETED, ()),
        ({0.25: 3.0, 0.5: 3.0, 1: 3.2}, 0.5, 1, BranchOutcome.BRACKETED, ()),
        ({"1": 3.0, "2": 3.005, "4": 4.0}, 2, 4, BranchOutcome.BRACKETED, ()),  # keys of JSON
        ({np.int64(1): np.float32(3), Fraction(3, 2): 3}, 1.5, None, BranchOutcome.ALL_PASSED, ()),
    ],
)
def test_merrill_s_rule_on_branches_with_a_known_answer(
    losses: Any, factor: float, next_factor: float | None, outcome: BranchOutcome, failed_below: Any
) -> None:
    found = branched_batch_size(losses, batch_size=64)
    assert (found.factor, found.next_factor, found.outcome) == (factor, next_factor, outcome)
    assert found.failed_below == failed_below
    assert list(found.losses) == sorted(found.losses)
    low, high = found.bracket
    assert low == 64 * factor
    if next_factor is None:
        assert high == math.inf
        assert found.critical_batch_size is None
    else:
        assert high == 64 * next_factor
        assert found.critical_batch_size == pytest.approx(math.sqrt(low * high))


@pytest.mark.parametrize("hundredths", range(1, 1200, 7))
def test_a_tie_passes_and_a_hair_more_does_not(hundredths: int) -> None:
    """2.0 + 0.01 is above 2.01 in floats, and 2.5 + 0.01 below 2.51 or not: all are ties."""
    least, tied = hundredths / 100, (hundredths + 1) / 100
    found = branched_batch_size({1: least, 2: tied}, batch_size=8, tolerance=0.01)
    assert found.factor == 2
    above = branched_batch_size({1: least, 2: tied + 1e-9}, batch_size=8, tolerance=0.01)
    assert above.factor == 1


def test_some_ties_would_fail_in_bare_floats() -> None:
    bare = [n / 100 + 0.01 < (n + 1) / 100 for n in range(1, 1200)]
    assert 0 < sum(bare) < len(bare)


@given(
    st.dictionaries(
        st.sampled_from([Fraction(k, 4) for k in (1, 2, 3, 4, 6, 8, 12, 16, 32, 64)]),
        st.one_of(st.none(), st.integers(2990, 3020), st.integers(1, 12000)),
        min_size=2,
    ),
    st.integers(0, 30),
    st.randoms(use_true_random=False),
)
def test_merrill_s_rule_is_its_sentence(
    thousandths: dict[Fraction, int | None], tolerance: int, shuffler: random.Random
) -> None:
    thousandths[min(thousandths)] = thousandths[min(thousandths)] or 3000  # has to be finite
    exact = {k: None if n is None else Fraction(n, 1000) for k, n in thousandths.items()}
    star, larger, failed = reference.merrill_by_sentence(exact, Fraction(tolerance, 1000))
    pairs = [(float(k), math.nan if n is None else n / 1000) for k, n in thousandths.items()]
    shuffler.shuffle(pairs)
    found = branched_batch_size(dict(pairs), batch_size=32, tolerance=tolerance / 1000)
    assert found.factor == star
    assert found.next_factor == larger
    assert list(found.failed_below) == failed


def test_verdicts_within_the_error_of_the_losses_are_undecided() -> None:
    losses = {1: 3.0, 2: 3.005, 4: 3.02, 8: 3.5}
    errors = {1: 0.01, 2: 0.01, 4: 0.01, 8: 0.01}
    assert branched_batch_size(losses, batch_size=8).undecided == ()
    # Limit 3.01, error sqrt(2) / 100 = 0.0141.
    found = branched_batch_size(losses, batch_size=8, errors=errors)
    assert (found.factor, found.undecided) == (2, (2, 4))
    few = branched_batch_size(losses, batch_size=8, errors={1: 0.01, 4: 0.01})
    assert few.undecided == (4,)
    half = {k: error / 2 for k, error in errors.items()}
    assert branched_batch_size(losses, batch_size=8, errors=half).undecided == (2,)


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=30), st.floats(0.01, 1))
def test_a_smoothed_loss_is_its_weighted_mean(losses: list[float], weight: float) -> None:
    expected = reference.smoothed_by_weights(losses, 0.5)
    assert smoothed_loss(losses) == pytest.approx(expected, abs=1e-12)
    assert smoothed_loss(np.array(losses), weight) == pytest.approx(
        reference.smoothed_by_weights(losses, weight), abs=1e-9
    )
    assert smoothed_loss(losses, 1) == losses[-1]


def test_a_branch_that_diverged_on_the_way_has_no_smoothed_loss() -> None:
    assert math.isnan(smoothed_loss([3.0, math.nan, 3.0]))
    assert smoothed_loss([4.0, 2.0, 1.0]) == 2.0  # 4, 3, 2


# --------------------------------------------------------------------------------------- advice


N, D, T = 1.2e9, 24e9, 2048


def advice(**options: Any) -> Any:
    return advise(**{"parameters": N, "tokens": D, "tokens_per_sequence": T, **options})


def test_the_range_goes_from_the_smallest_optimum_to_the_smallest_critical_size() -> None:
    optima = [0.58 * D**0.571, 0.0306 * D**0.383 * 2048, 0.292 * (6 * N * D) ** 0.327]
    critical = [22.72 * (D / 1e6) ** 0.4682 * 512, 0.0471 * D**0.462 * 2048]
    found = advice()
    assert found.tokens_range == pytest.approx((min(optima), min(critical)), rel=2e-3)
    for kind, sizes in ((Kind.OPTIMAL, optima), (Kind.CRITICAL, critical)):
        mine = [each.tokens for each in found.opinions if each.kind is kind]
        assert mine == pytest.approx(sizes, rel=2e-3)
        assert found.disagreement[kind] == pytest.approx(max(sizes) / min(sizes), rel=2e-3)
    # The law of Zhang et al. is that of their table, at their largest model.
    [zhang] = [law for law in LAWS if law.name.startswith("Zhang")]
    last = ZHANG_2025[-1]
    assert zhang.tokens_per_step(last.parameters, last.tokens) == pytest.approx(
        512 * float(last.critical_batch_size()), rel=0.05
    )


def test_your_own_measurement_replaces_the_papers() -> None:
    for size in (1e6, 5e6):  # below and above theirs
        assert advice(measured_tokens=size).tokens_range.high == size
    found = advice(measured_tokens=1e6)
    assert found.opinions[0].source == "your own measurement"
    assert len(found.opinions) == len(LAWS) + 1
    assert found.disagreement[Kind.CRITICAL] > advice().disagreement[Kind.CRITICAL]
    below = advice(measured_tokens=2e4)
    assert below.tokens_range == (2e4, advice().tokens_range.low)
    assert "contradict" in below.notes[0]


@given(
    low=st.floats(1, 1e4),
    width=st.floats(1, 8),
    micro=st.integers(1, 64),
    doublings=st.integers(0, 4),
    ranks=st.integers(1, 512),
)
def test_plans_lie_in_the_range_where_any_layout_does(
    low: float, width: float, micro: int, doublings: int, ranks: int
) -> None:
    optimum = PublishedLaw(
        name="",
        source="",
        formula="",
        kind=Kind.OPTIMAL,
        evidence=Evidence.UNCONFIRMED,
        tokens_per_step=lambda n, d: low * T,
        definition="",
    )
    found = advice(
        laws=[optimum],
        measured_tokens=low * width * T,
        micro_batch_size=micro,
        max_micro_batch_size=micro * 2**doublings,
        data_parallel_size=ranks,
    )
    smallest, largest = [plan.global_batch_size for plan in found.plans]
    assert smallest <= largest
    for plan in found.plans:
        assert plan.data_parallel_size == ranks
        assert micro <= plan.micro_batch_size <= micro * 2**doublings
    least = micro * ranks
    feasible = [k * least for k in range(1, int(low * width / least) + 1)]
    if not feasible:
        assert (smallest, largest) == (least, least)
        assert "above the range" in found.notes[-1]
    elif feasible[-1] < low:
        assert (smallest, largest) == (feasible[-1], feasible[-1])
        assert "nearest below" in found.notes[-1]
    else:
        assert low <= smallest
        assert largest <= low * width
        assert found.notes == ()


def test_ranks_that_the_batch_cannot_use_are_told() -> None:
    notes = advice(data_parallel_size=4096).notes[0]
    assert "4096 x 1 sequences" in notes
    assert "more ranks than the batch can use" in notes
    alone = advice(micro_batch_size=4096).notes[0]
    assert "more ranks" not in alone
    assert "Lower the micro-batch" in alone


def test_more_tokens_never_take_a_smaller_batch() -> None:
    ranges = [advice(tokens=10**power).tokens_range for power in range(7, 14)]
    assert ranges == sorted(ranges)
    assert [each.high for each in ranges] == sorted(each.high for each in ranges)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"parameters": 0}, "parameters (0)"),
        ({"tokens": math.nan}, "tokens (nan)"),
        ({"tokens_per_sequence": -1}, "tokens_per_sequence (-1)"),
        ({"measured_tokens": 0}, "measured_tokens (0)"),
        ({"tokens": 1e300, "parameters": 1e300}, "batch size of DeepSeek LLM"),
        ({"laws": ()}, "laws (0) must hold one of the optimal batch size"),
        ({"laws": LAWS[:3]}, "laws (3) must hold one of the critical batch size"),
        ({"laws": LAWS[3:], "measured_tokens": 1e6}, "laws (2) must hold one of the optimal"),
    ],
)
def test_advice_that_cannot_be_given_is_refused(options: dict[str, Any], said: str) -> None:
    assert said in refusal(lambda: advice(**options))


# ------------------------------------------------------------------------------------ schedules


def test_three_measurements_are_their_law_and_fewer_the_published_exponent() -> None:
    tokens, sizes = [1e9, 4e9, 30e9], [2e5, 5e5, 9e5]
    law, fitted = schedule_law(tokens, sizes), fit_power_law(tokens, sizes)
    assert (law.coefficient, law.exponent) == (fitted.coefficient, fitted.exponent)
    assert schedule_law(np.array(tokens), np.array(sizes)).arguments == law.arguments
    one = schedule_law([4e9], [5e5])
    assert (one.exponent, one.fitted) == (0.468, None)
    assert one.coefficient * 4e9**0.468 == pytest.approx(5e5)
    two = schedule_law([1e9, 1e9, 4e9], [2e5, 3e5, 5e5])  # two budgets, one twice
    assert (two.exponent, two.fitted) == (0.468, None)
    off = [
        math.log(y / (two.coefficient * x**0.468)) for x, y in ((1e9, 2e5), (1e9, 3e5), (4e9, 5e5))
    ]
    assert sum(off) == pytest.approx(0, abs=1e-9)
    assert schedule_law(tokens, sizes, exponent=0.3).exponent == 0.3


@pytest.mark.parametrize("count", [1, 5])
def test_training_follows_the_law_through_the_measured_sizes(count: int) -> None:
    tokens = [sweep.tokens for sweep in ZHANG_2025][-count:]
    exact = [18.05 * each**0.4682 for each in tokens]
    law = schedule_law(tokens, exact)
    args = cases.arguments(
        Path("never-made"),
        **law.arguments,
        per_device_train_batch_size=4,
        max_global_batch_size=100_000,
    )
    horizon = Horizon(tokens_per_sample=512.0)
    controller, _ = begin_schedule(args, args.initial_batch_plan(1), horizon)
    assert isinstance(controller, ScheduledController)
    schedule = controller.schedule
    assert isinstance(schedule, PowerLaw)
    for seen, size in zip(tokens, exact, strict=True):
        assert schedule.size_at(seen) == pytest.approx(size / 512, rel=2e-3)
    assert schedule.size_at(tokens[0] / 10) < schedule.size_at(tokens[0])
