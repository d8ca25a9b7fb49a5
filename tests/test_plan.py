"""BatchPlan.nearest: the feasible batch for any wish, by properties and by tables."""

import math

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from hf_adaptive_batch.apply.plan import BatchPlan


# The first micro-batch, how often it may double, ranks, and what is left of the largest rung to
# the configured maximum (which need not be on the ladder).
MICRO = st.integers(1, 48)
DOUBLINGS = st.integers(0, 6)
RANKS = st.integers(1, 9)
WISH = st.integers(1, 20_000)
# The cap, above one micro-batch on every rank; None for none.
ROOM = st.none() | st.integers(0, 10_000)


def nearest(
    wish: int, micro: int, doublings: int = 0, ranks: int = 1, room: int | None = None
) -> BatchPlan:
    return BatchPlan.nearest(
        wish,
        micro_batch_size=micro,
        max_micro_batch_size=micro * 2**doublings + (micro * 2**doublings) // 3,
        max_global_batch_size=None if room is None else micro * ranks + room,
        data_parallel_size=ranks,
    )


# ---------------------------------------------------------------------------------- properties


@given(WISH, MICRO, DOUBLINGS, RANKS, ROOM)
def test_the_factors_are_those_asked_for_and_their_product_is_the_batch(
    wish: int, micro: int, doublings: int, ranks: int, room: int | None
) -> None:
    plan = nearest(wish, micro, doublings, ranks, room)
    assert plan.data_parallel_size == ranks
    assert plan.micro_batch_size in [micro * 2**rung for rung in range(doublings + 1)]
    product = plan.micro_batch_size * plan.accumulation_steps * plan.data_parallel_size
    assert plan.global_batch_size == product


@given(WISH, MICRO, DOUBLINGS, RANKS, ROOM)
def test_the_batch_is_within_the_cap_and_never_below_the_wish_unless_capped(
    wish: int, micro: int, doublings: int, ranks: int, room: int | None
) -> None:
    plan = nearest(wish, micro, doublings, ranks, room)
    size = plan.global_batch_size
    if room is not None:
        cap = micro * ranks + room
        assert size <= cap
        if size < wish:  # not one more micro-batch on every rank would fit
            assert size + plan.micro_batch_size * ranks > cap
    else:
        assert size >= wish


@given(WISH, MICRO, DOUBLINGS, RANKS, ROOM)
def test_the_batch_overshoots_by_less_than_a_micro_batch_and_than_doubling(
    wish: int, micro: int, doublings: int, ranks: int, room: int | None
) -> None:
    plan = nearest(wish, micro, doublings, ranks, room)
    assert plan.global_batch_size - wish < plan.micro_batch_size * ranks
    assert plan.global_batch_size < 2 * max(wish, micro * ranks)


@given(WISH, MICRO, DOUBLINGS, RANKS, ROOM)
def test_accumulation_begins_where_the_micro_batch_cannot_double_any_more(
    wish: int, micro: int, doublings: int, ranks: int, room: int | None
) -> None:
    plan = nearest(wish, micro, doublings, ranks, room)
    if plan.accumulation_steps > 1:
        cap = math.inf if room is None else micro * ranks + room
        doubled = 2 * plan.micro_batch_size
        assert doubled > micro * 2**doublings or doubled * ranks > cap


@given(WISH, WISH, MICRO, DOUBLINGS, RANKS, ROOM)
def test_a_larger_wish_never_gives_a_smaller_batch(
    wish: int, other: int, micro: int, doublings: int, ranks: int, room: int | None
) -> None:
    low, high = (
        nearest(w, micro, doublings, ranks, room).global_batch_size for w in sorted((wish, other))
    )
    assert low <= high


@given(WISH, MICRO, DOUBLINGS, RANKS, ROOM)
def test_a_batch_is_a_whole_number_of_all_micro_batches_up_to_its_own(
    wish: int, micro: int, doublings: int, ranks: int, room: int | None
) -> None:
    plan = nearest(wish, micro, doublings, ranks, room)
    while micro <= plan.micro_batch_size:
        assert plan.global_batch_size % (micro * ranks) == 0
        micro *= 2


@given(WISH, WISH, MICRO, DOUBLINGS, RANKS, ROOM)
@example(wish=64, other=65, micro=8, doublings=3, ranks=1, room=64)
def test_a_larger_batch_is_a_whole_number_of_the_micro_batches_of_a_smaller_one(
    wish: int, other: int, micro: int, doublings: int, ranks: int, room: int | None
) -> None:
    """The sampler lives on it: micro-batches fetched ahead for a smaller step fill a larger one."""
    low, high = (nearest(w, micro, doublings, ranks, room) for w in sorted((wish, other)))
    assert high.global_batch_size % (low.micro_batch_size * ranks) == 0


@given(WISH, MICRO, RANKS, ROOM)
def test_without_a_largest_micro_batch_only_accumulation_grows(
    wish: int, micro: int, ranks: int, room: int | None
) -> None:
    plan = BatchPlan.nearest(
        wish,
        micro_batch_size=micro,
        max_global_batch_size=None if room is None else micro * ranks + room,
        data_parallel_size=ranks,
    )
    assert plan.micro_batch_size == micro
    assert plan == nearest(wish, micro, 0, ranks, room)


# -------------------------------------------------------------------------------------- tables


@pytest.mark.parametrize(
    ("wish", "micro", "accumulation"),
    [
        (1, 4, 1),
        (4, 4, 1),
        (5, 8, 1),
        (8, 8, 1),
        (9, 16, 1),
        (16, 16, 1),
        (17, 32, 1),
        (32, 32, 1),
        (33, 32, 2),  # from here on in whole micro-batches of 32
        (64, 32, 2),
        (65, 32, 3),
        (100, 32, 4),
        (1000, 32, 32),
    ],
)
def test_one_rank_with_micro_batches_4_8_16_32(wish: int, micro: int, accumulation: int) -> None:
    plan = BatchPlan.nearest(wish, micro_batch_size=4, max_micro_batch_size=32)
    assert (plan.micro_batch_size, plan.accumulation_steps) == (micro, accumulation)


@pytest.mark.parametrize(
    ("wish", "cap", "size"),
    [(100, 30, 28), (100, 28, 28), (27, 30, 28), (29, 30, 28), (100, 4, 4), (3, 30, 4)],
)
def test_under_a_cap_the_batch_is_rounded_down(wish: int, cap: int, size: int) -> None:
    plan = BatchPlan.nearest(wish, micro_batch_size=4, max_global_batch_size=cap)
    assert plan.global_batch_size == size


def test_a_cap_on_the_ladder_is_reached_in_the_largest_micro_batches() -> None:
    plan = BatchPlan.nearest(
        10**9, micro_batch_size=4, max_micro_batch_size=32, max_global_batch_size=128
    )
    assert plan == BatchPlan(micro_batch_size=32, accumulation_steps=4)


def test_a_cap_below_a_rung_keeps_that_rung_away() -> None:
    plan = BatchPlan.nearest(
        16, micro_batch_size=4, max_micro_batch_size=32, max_global_batch_size=16
    )
    assert plan == BatchPlan(micro_batch_size=16)


@pytest.mark.parametrize(
    ("ranks", "wish", "micro", "accumulation", "size"),
    [
        (1, 64, 32, 2, 64),
        (2, 64, 32, 1, 64),
        (4, 64, 16, 1, 64),
        (3, 64, 32, 1, 96),
        (3, 90, 32, 1, 96),
    ],
)
def test_ranks_take_equal_shares(
    ranks: int, wish: int, micro: int, accumulation: int, size: int
) -> None:
    plan = BatchPlan.nearest(
        wish, micro_batch_size=4, max_micro_batch_size=32, data_parallel_size=ranks
    )
    assert (plan.micro_batch_size, plan.accumulation_steps) == (micro, accumulation)
    assert (plan.data_parallel_size, plan.global_batch_size) == (ranks, size)


# ----------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("name", ["micro_batch_size", "accumulation_steps", "data_parallel_size"])
@pytest.mark.parametrize("value", [0, -1])
def test_a_factor_below_one_is_refused(name: str, value: int) -> None:
    factors = {"micro_batch_size": 2, "accumulation_steps": 3, "data_parallel_size": 4}
    assert BatchPlan(**factors).global_batch_size == 24
    with pytest.raises(ValueError, match=rf"{name} \({value}\) must be at least 1, because"):
        BatchPlan(**factors | {name: value})


@pytest.mark.parametrize("wish", [0, -8])
def test_a_wish_below_one_is_refused(wish: int) -> None:
    with pytest.raises(ValueError, match=rf"global_batch_size \({wish}\) must be at least 1"):
        BatchPlan.nearest(wish, micro_batch_size=4)


def test_a_largest_micro_batch_below_the_first_is_refused() -> None:
    assert BatchPlan.nearest(8, micro_batch_size=4, max_micro_batch_size=4).micro_batch_size == 4
    with pytest.raises(
        ValueError, match=r"max_micro_batch_size \(3\) must be at least the initial .* \(4\)"
    ):
        BatchPlan.nearest(8, micro_batch_size=4, max_micro_batch_size=3)


def test_a_cap_below_one_micro_batch_on_every_rank_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"max_global_batch_size \(7\) must be at least one micro-batch .* \(8\)"
    ):
        BatchPlan.nearest(8, micro_batch_size=4, data_parallel_size=2, max_global_batch_size=7)
