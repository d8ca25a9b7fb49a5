"""Seesaw: its published step fractions, its two forms, its learning rate, and what it refuses."""

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_adaptive_batch.decide.schedule import Unit
from hf_adaptive_batch.decide.seesaw import Seesaw
from tests import reference_schedules as reference
from tests.reference_schedules import linear_to_zero, quarter_cosine, refusal


ETA0 = 3e-3
REFERENCES = {"quarter cosine": quarter_cosine, "linear to zero": linear_to_zero}
# Where the reference has fallen to a part of its peak.
INVERSES: dict[str, Callable[[float], float]] = {
    "quarter cosine": lambda decay: 2 / math.pi * math.acos(decay),
    "linear to zero": lambda decay: 1 - decay,
}
each_reference = pytest.mark.parametrize("name", REFERENCES)


def seesaw(
    falls: Callable[[float], float] = linear_to_zero,
    *,
    first: int = 1024,
    largest: int = 1024 * 2**20,
    alpha: float | None = None,
) -> Seesaw:
    return Seesaw(reference=falls, first_size=first, max_size=largest, alpha=alpha)


def learning_rate(schedule: Seesaw, share: float) -> float:
    """What is trained with: the reference's rate times the factor, with the batch in force."""
    ratio = schedule.size_at(share) / schedule.first_size
    return ETA0 * schedule.reference(share) * schedule.learning_rate_factor(share, ratio)


# ------------------------------------------------------------------------------ the closed form


@each_reference
@pytest.mark.parametrize("share", [0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99])
def test_without_cuts_the_batch_is_the_first_by_peak_over_reference(
    name: str, share: float
) -> None:
    schedule = seesaw(REFERENCES[name])
    eta_ref = ETA0 * REFERENCES[name](share)
    batch, eta = reference.seesaw_limit(eta_ref, eta0=ETA0, b0=1024)
    assert schedule.size_at(share) == math.floor(batch + 1e-6)
    assert learning_rate(schedule, share) == pytest.approx(eta, rel=1e-3)  # the batch is whole
    exact = schedule.learning_rate_factor(share, batch / 1024)
    assert eta_ref * exact == pytest.approx(eta, rel=1e-12)


@pytest.mark.parametrize(
    ("share", "size"),
    [
        (0.0, 8),
        (0.0001, 8),  # 8.0008: rounded down
        (0.1, 8),  # 8.89
        (0.1111, 8),  # 8.9999
        (1 - 8 / 9, 9),  # exactly 9
        (0.1112, 9),
        (0.4999, 15),  # 15.997
        (0.5, 16),
        (0.5001, 16),
        (0.7499, 31),
        (0.75, 32),
        (0.7501, 32),
        (0.8749, 63),
        (0.875, 64),  # the cap
        (0.8751, 64),
        (0.999999, 64),
        (1.0, 64),  # the reference is 0
    ],
)
def test_the_batch_at_each_boundary_of_a_linear_decay(share: float, size: int) -> None:
    assert seesaw(first=8, largest=64).size_at(share) == size


@pytest.mark.parametrize(
    ("share", "size", "rate"),
    [
        (0.0, 8, 1.0),
        (0.4999, 8, 1.0),
        (0.5, 16, 2**-0.5),  # the reference has halved
        (0.5001, 16, 2**-0.5),
        (0.7499, 16, 2**-0.5),
        (0.75, 32, 0.5),
        (0.8749, 32, 0.5),
        (0.875, 64, 2**-1.5),  # the cap, at which it is still as published
        (0.9374, 64, 2**-1.5),
        (0.9375, 64, 2**-2.5),  # no growth is left: the whole cut is the learning rate's
        (0.96875, 64, 2**-3.5),
    ],
)
def test_by_halvings_the_batch_doubles_and_the_rate_is_cut_by_the_root(
    share: float, size: int, rate: float
) -> None:
    schedule = seesaw(first=8, largest=64, alpha=2.0)
    assert schedule.size_at(share) == size
    assert learning_rate(schedule, share) == pytest.approx(ETA0 * rate, rel=1e-12)
    batch, eta = reference.seesaw_by_cuts(linear_to_zero, share, alpha=2, eta0=ETA0, b0=8)
    if batch <= 64:
        assert (size, ETA0 * rate) == pytest.approx((batch, eta))


@each_reference
@given(share=st.floats(0, 0.999), alpha=st.floats(1.05, 8))
def test_by_cuts_it_is_the_paper_s_algorithm(name: str, share: float, alpha: float) -> None:
    falls = REFERENCES[name]
    schedule = seesaw(falls, alpha=alpha)
    batch, eta = reference.seesaw_by_cuts(falls, share, alpha=alpha, eta0=ETA0, b0=1024)
    cut = 1024 / batch
    if abs(math.log(falls(share) / cut)) < 1e-6 or abs(math.log(falls(share) * alpha / cut)) < 1e-6:
        return  # at a boundary, rounding decides
    assert schedule.cut_at(share) == pytest.approx(cut, rel=1e-9)
    assert schedule.size_at(share) == math.floor(batch * (1 + 2e-9))
    rate = ETA0 * falls(share) * schedule.learning_rate_factor(share, batch / 1024)
    assert rate == pytest.approx(eta, rel=1e-9)


@pytest.mark.parametrize("alpha", [1.1, 1.5, 2.0, 3.0, 5.0, 10.0])
def test_a_cut_is_made_exactly_where_the_reference_reaches_it(alpha: float) -> None:
    """A reference in stairs of alpha: log(alpha^-k) / log(alpha) is not always k in floats."""
    stairs = seesaw(lambda share: alpha ** -int(10 * share), first=1000, alpha=alpha)
    for k in range(10):
        if alpha**k > 1e5:  # the batch, too, is rounded with some slack: a billionth of it
            break
        share = (k + 0.5) / 10
        assert stairs.cut_at(share) == pytest.approx(alpha**-k, rel=1e-12)
        assert stairs.size_at(share) == math.floor(1000 * alpha**k + 1e-6)
        assert learning_rate(stairs, share) == pytest.approx(ETA0 * alpha ** (-k / 2), rel=1e-3)


@each_reference
def test_small_cuts_approach_the_closed_form(name: str) -> None:
    smooth = seesaw(REFERENCES[name])
    fine, coarse = (seesaw(REFERENCES[name], alpha=alpha) for alpha in (1.001, 2.0))
    shares = [index / 100 for index in range(99)]
    assert all(
        fine.size_at(share) == pytest.approx(smooth.size_at(share), rel=2.1e-3) for share in shares
    )
    assert any(coarse.size_at(share) < 0.6 * smooth.size_at(share) for share in shares)


@given(
    share=st.floats(0, 1),
    alpha=st.none() | st.floats(1.01, 5),
    largest=st.integers(8, 512),
)
def test_a_cut_is_never_below_the_decay(share: float, alpha: float | None, largest: int) -> None:
    schedule = seesaw(quarter_cosine, first=8, largest=largest, alpha=alpha)
    decay, cut = schedule.decay_at(share), schedule.cut_at(share)
    assert 0 <= decay <= cut * (1 + 1e-8) <= 1 + 1e-8
    assert alpha is None or decay == 0 or cut < decay * alpha * (1 + 1e-8)
    assert 8 <= schedule.size_at(share) <= largest


# -------------------------------------------------------------------- the learning rate and a cap


@each_reference
@pytest.mark.parametrize("ratio", [1, 1.5, 2, 4])
def test_under_a_cap_the_rate_is_the_reference_s_by_the_root_of_the_growth(
    name: str, ratio: float
) -> None:
    """The cap holds the batch at ratio x B0, and the reference goes on falling."""
    falls = REFERENCES[name]
    schedule = seesaw(falls, first=1000, largest=int(1000 * ratio))
    for share in (0.85, 0.9, 0.999):
        assert schedule.size_at(share) == 1000 * ratio
        expected = ETA0 * falls(share) * math.sqrt(ratio)
        assert learning_rate(schedule, share) == pytest.approx(expected, rel=1e-12)
        published = reference.seesaw_limit(ETA0 * falls(share), eta0=ETA0, b0=1000)[1]
        assert expected < published  # which would not fit the smaller batch


def test_with_a_cap_at_the_first_size_the_rate_is_the_reference_s() -> None:
    schedule = seesaw(first=8, largest=8)
    assert not schedule.can_change
    for share in (0.0, 0.3, 0.7, 0.999):
        assert schedule.size_at(share) == 8
        assert schedule.learning_rate_factor(share, 1.0) == 1.0


@pytest.mark.parametrize("alpha", [None, 2.0])
def test_where_the_reference_is_zero_so_is_the_rate(alpha: float | None) -> None:
    schedule = seesaw(first=8, largest=64, alpha=alpha)
    assert schedule.learning_rate_factor(1.0, 8.0) * schedule.reference(1.0) == 0
    assert schedule.size_at(1.0) == 64


@given(st.floats(0, 0.999))
def test_the_rate_falls_and_the_batch_grows(share: float) -> None:
    for alpha in (None, 2.0):
        schedule = seesaw(quarter_cosine, first=64, largest=1024, alpha=alpha)
        later = share + (1 - share) / 2
        assert schedule.size_at(later) >= schedule.size_at(share)
        # A size that lacks most of a sample has a rate that lacks half of that sample's share.
        assert learning_rate(schedule, later) <= learning_rate(schedule, share) * (1 + 1 / 128)


@each_reference
@given(share=st.floats(0, 0.999), first=st.integers(1, 100), largest=st.integers(100, 10_000))
def test_neither_batch_nor_rate_is_ever_above_the_published_one(
    name: str, share: float, first: int, largest: int
) -> None:
    """A batch that was rounded up, or a rate without its cap, would be."""
    schedule = seesaw(REFERENCES[name], first=first, largest=largest)
    batch, eta = reference.seesaw_limit(ETA0 * REFERENCES[name](share), eta0=ETA0, b0=first)
    assert schedule.size_at(share) <= batch * (1 + 1e-8)
    assert learning_rate(schedule, share) <= eta * (1 + 1e-8)
    assert Seesaw.rounds_down  # so that it stays so in whole micro-batches


def test_the_noise_of_an_adam_step_is_kept_through_a_cut() -> None:
    """alpha1 sqrt(beta1) = alpha2 sqrt(beta2): eta cut by sqrt(2), batch by 2, as eta cut by 2."""
    schedule = seesaw(first=8, alpha=2.0)
    before, after = learning_rate(schedule, 0.4999), learning_rate(schedule, 0.5)
    growth = schedule.size_at(0.5) / schedule.size_at(0.4999)
    assert before / after * math.sqrt(growth) == pytest.approx(2)


# --------------------------------------------------------------------------------------- warm-up


def warmed_up(share: float) -> float:
    """Up to 1 at 1/8, then linear to 0."""
    return share * 8 if share < 1 / 8 else (1 - share) * 8 / 7


@pytest.mark.parametrize("alpha", [None, 2.0])
def test_nothing_happens_during_warm_up(alpha: float | None) -> None:
    schedule = seesaw(warmed_up, first=8, largest=64, alpha=alpha)
    for share in (0.0, 0.01, 0.05, 0.1249, 0.125):
        assert schedule.decay_at(share) == schedule.cut_at(share) == 1
        assert schedule.size_at(share) == 8
        assert schedule.learning_rate_factor(share, 1.0) == 1.0
    assert schedule.size_at(9 / 16) == 16
    assert schedule.size_at(0.5624) == (15 if alpha is None else 8)


def test_a_peak_between_two_points_of_the_grid_is_met_closely() -> None:
    """Warm-up of 1/5000 of the budget: the highest value that is looked at is just below it."""

    def short_warm_up(share: float) -> float:
        return share * 5000 if share < 1 / 5000 else (1 - share) / (1 - 1 / 5000)

    schedule = seesaw(short_warm_up, first=1024)
    assert schedule.size_at(1 / 10_000) == 1024
    assert schedule.size_at(0.5) == pytest.approx(2048, abs=2)


def test_a_peak_that_is_left_quickly_is_met_as_well() -> None:
    """Inverse square root after a warm-up of 1/10,000 of the budget, such as 100 of 10^6 steps."""

    def inverse_root(share: float) -> float:
        return share * 10_000 if share < 1e-4 else math.sqrt(1e-4 / share)

    schedule = seesaw(inverse_root)
    assert schedule.size_at(0.01) == pytest.approx(10 * 1024, rel=1e-3)


def test_a_plateau_and_a_floor_are_followed() -> None:
    """Warm-up, stable, decay to a tenth: a batch ten times as large at the end, and no more."""

    def stable(share: float) -> float:
        return 1.0 if share < 0.8 else max(1 - 4.5 * (share - 0.8), 0.1)

    schedule = seesaw(stable, first=8, largest=1024)
    assert [schedule.size_at(share) for share in (0.0, 0.4, 0.8, 1.0)] == [8, 8, 8, 80]
    assert learning_rate(schedule, 1.0) == pytest.approx(ETA0 * math.sqrt(0.1))


# ----------------------------------------------------------------------- published step fractions


def fraction_of_steps(schedule: Seesaw, *, constant_steps: int = 2**14) -> float:
    samples = constant_steps * schedule.first_size
    return schedule.steps_for(samples, 1 / samples) / constant_steps


@pytest.mark.parametrize(
    ("name", "published"), [("quarter cosine", 2 / math.pi), ("linear to zero", 0.5)]
)
def test_the_step_fraction_is_the_published_one(name: str, published: float) -> None:
    """36.3 % fewer steps for cos(pi t / 2), half of them for a linear decay."""
    naive = reference.seesaw_step_fraction(REFERENCES[name])
    assert naive == pytest.approx(published, abs=1e-6)
    assert fraction_of_steps(seesaw(REFERENCES[name])) == pytest.approx(published, rel=1e-3)


@pytest.mark.parametrize(
    ("name", "expected"), [("quarter cosine", 0.779827), ("linear to zero", 2 / 3)]
)
def test_by_halvings_the_step_fraction_is_the_sum_over_them(name: str, expected: float) -> None:
    naive = reference.seesaw_step_fraction_by_cuts(INVERSES[name], alpha=2)
    assert naive == pytest.approx(expected, abs=1e-6)
    schedule = seesaw(REFERENCES[name], alpha=2.0)
    assert fraction_of_steps(schedule) == pytest.approx(naive, rel=1e-3)


@each_reference
def test_the_smaller_the_cuts_the_closer_the_step_fraction_to_the_limit(name: str) -> None:
    limit = reference.seesaw_step_fraction(REFERENCES[name])
    alphas = [4.0, 2.0, 1.1, 1.01]
    fractions = [fraction_of_steps(seesaw(REFERENCES[name], alpha=alpha)) for alpha in alphas]
    assert all(before > after > limit for before, after in pairwise(fractions))
    assert fractions[-1] == pytest.approx(limit, rel=0.01)
    for alpha, fraction in zip(alphas, fractions, strict=True):
        naive = reference.seesaw_step_fraction_by_cuts(INVERSES[name], alpha=alpha)
        assert fraction == pytest.approx(naive, rel=2e-3)


def test_a_cap_costs_steps() -> None:
    """Linear, capped at 4 B0: (1 - t) up to t = 3/4, then a quarter."""
    exact = (1 - 1 / 16) / 2 + 1 / 16
    assert fraction_of_steps(seesaw(largest=4096)) == pytest.approx(exact, rel=1e-3)


# ------------------------------------------------------------------------------------ bad input


def restarting(share: float) -> float:
    """Two linear decays to a tenth."""
    return 1 - 0.9 * ((2 * share) % 1) if share < 1 else 0.1


@pytest.mark.parametrize("alpha", [1.0, 0.5, 0.0, -2.0, math.nan, math.inf])
def test_an_alpha_that_is_no_cut_is_refused(alpha: float) -> None:
    assert f"seesaw_alpha ({alpha})" in refusal(lambda: seesaw(alpha=alpha))


@pytest.mark.parametrize(
    ("falls", "said"),
    [
        (lambda share: 1.0, "(1 of a peak of 1)"),
        (lambda share: 0.0, "(0 of a peak of 0)"),
        (lambda share: share, "(1 of a peak of 1)"),  # warm-up alone
        (lambda share: 0.5 - share, "(-0.5 of a peak of 0.5)"),
        (lambda share: math.nan, "NaN"),
        (lambda share: math.nan if share > 0.5 else 1 - share, "NaN"),
        pytest.param(
            restarting,
            "learning rate",
        ),
        pytest.param(
            lambda share: math.nan if 0.4 < share < 0.6 else 1 - share,
            "learning rate",
        ),
    ],
    ids=["constant", "zero", "rising", "negative", "nan", "nan late", "restarting", "nan between"],
)
def test_a_reference_that_does_not_fall_is_refused(
    falls: Callable[[float], float], said: str
) -> None:
    assert said in refusal(lambda: seesaw(falls))


def test_a_learning_rate_that_restarts_is_refused() -> None:
    with pytest.raises(ValueError, match="must not rise again"):
        seesaw(restarting)


@pytest.mark.parametrize(("first", "largest"), [(8, 7), (8, 0), (0, 8)])
def test_a_cap_below_the_first_size_is_refused(first: int, largest: int) -> None:
    message = refusal(lambda: seesaw(first=first, largest=largest))
    assert f"max_global_batch_size ({largest})" in message


def test_it_counts_shares_of_the_budget() -> None:
    assert seesaw().unit is Unit.BUDGET
