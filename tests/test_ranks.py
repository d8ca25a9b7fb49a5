"""Several ranks train on the steps of one: the same samples, each once, none beyond the plan.

The ranks here are threads of one process; real ones are in test_distributed.py.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hf_adaptive_batch import TrainingClock
from hf_adaptive_batch.apply.sampler import EpochOrder, StepSampler
from hf_adaptive_batch.apply.sources import MapSource
from hf_adaptive_batch.apply.stream import StreamReader
from hf_adaptive_batch.ranks import Ranks

from .lockstep import Case, Flow, build, on_ranks, run, train
from .test_loader import Numbers, Shuffled


WHOLE = ("map", "stream", "stream_with_state")
SPLIT = ("parts", "parts_with_state")
depths = st.integers(0, 12)


@st.composite
def growths(draw, unit, accumulation):
    size, found, step = unit * accumulation, [], 0
    for _ in range(draw(st.integers(0, 3))):
        step += draw(st.integers(1, 4))
        size += draw(st.integers(1, 3 * size))
        found.append((step, size))
    return tuple(found)


@st.composite
def whole(draw, largest=150, epochs=3, kinds=WHOLE, divisors=1):
    """A case of a whole dataset and a number of ranks; or `divisors` numbers of ranks."""
    ranks = [draw(st.integers(1, 4)) for _ in range(divisors)]
    least = torch.tensor(1)
    for number in ranks:
        least = torch.lcm(least, torch.tensor(number))
    unit = int(least) * draw(st.integers(1, 4 if divisors == 1 else 2))
    accumulation = draw(st.integers(1, 4))
    samples, kind = draw(st.integers(1, largest)), draw(st.sampled_from(kinds))
    dropped = draw(st.integers(0, min(samples - 1, unit - 1))) if kind == "map" else 0
    case = Case(
        samples=samples,
        unit=unit,
        accumulation=accumulation,
        doublings=draw(st.integers(0, 3)),
        growths=draw(growths(unit, accumulation)),
        budget=draw(st.integers(1, epochs * (samples - dropped))),
        kind=kind,
        dropped=dropped,
    )
    return (case, *ranks)


@st.composite
def split(draw, largest=40, epochs=3):
    """A case of a stream that was split into uneven parts, one for each rank."""
    ranks = draw(st.integers(1, 4))
    parts = tuple(draw(st.integers(1, largest)) for _ in range(ranks))
    unit, accumulation = ranks * draw(st.integers(1, 4)), draw(st.integers(1, 4))
    return Case(
        samples=sum(parts),
        unit=unit,
        accumulation=accumulation,
        doublings=draw(st.integers(0, 3)),
        growths=draw(growths(unit, accumulation)),
        budget=draw(st.integers(1, epochs * sum(parts))),
        kind=draw(st.sampled_from(SPLIT)),
        parts=parts,
    )


def by_epoch(samples, epoch_samples):
    return [samples[at : at + epoch_samples] for at in range(0, len(samples), epoch_samples)]


def expected_order(case):
    epochs = -(-case.budget // case.epoch_samples)
    return [i for epoch in range(epochs) for i in case.order(epoch)][: case.budget]


def check_layout(case, ranks, steps):
    """What holds of every step, whatever the data: ranks run alike, within plan and ladder."""
    for step in steps:
        assert len({len(rank.lengths) for rank in step.by_rank}) == 1
        assert len({rank.ends_epoch for rank in step.by_rank}) == 1
        assert len({rank.state for rank in step.by_rank}) == 1
        assert {rank.global_samples for rank in step.by_rank} == {len(step.samples)}
        assert {rank.planned for rank in step.by_rank} == {step.by_rank[0].planned}
        assert 1 <= len(step.samples) <= step.planned
        for rank in step.by_rank:
            assert max(rank.lengths) <= case.largest_micro(ranks)
            for samples, length in zip(rank.samples, rank.lengths, strict=True):
                assert length == max(1, len(samples))  # one stands in where there is none


def check_shares(steps):
    for step in steps:
        for parts in step.rounds:
            sizes = [len(part) for part in parts]
            assert max(sizes) - min(sizes) <= 1
            assert sizes == sorted(sizes, reverse=True)


# ------------------------------------------------------------------------------- a whole dataset


@given(whole(), depths)
@settings(max_examples=150)
@example((Case(samples=61, unit=12, accumulation=2, budget=61), 4), 3)
def test_the_ranks_train_on_each_sample_once_and_in_the_order_of_a_single_one(found, depth):
    """Rounds are contiguous ranges of the epoch's order, shared out from the first rank on."""
    case, ranks = found
    samples = [i for step in run(case, ranks, depth) for i in step.samples]
    assert samples == expected_order(case)
    for epoch, part in enumerate(by_epoch(samples, case.epoch_samples)):
        if len(part) == case.epoch_samples:
            assert sorted(part) == sorted(case.order(epoch))


@given(whole(), depths, depths)
@settings(max_examples=150)
def test_the_steps_of_ranks_hold_the_samples_of_a_single_ranks_steps(found, depth, other_depth):
    case, ranks = found
    alone = run(case, 1, other_depth)
    assert [step.samples for step in run(case, ranks, depth)] == [step.samples for step in alone]


@given(whole(), depths)
@settings(max_examples=150)
def test_ranks_run_alike_and_share_evenly_and_within_the_plan(found, depth):
    case, ranks = found
    steps = run(case, ranks, depth)
    check_layout(case, ranks, steps)
    check_shares(steps)


@given(whole(), depths)
@settings(max_examples=100)
def test_only_the_last_step_of_an_epoch_or_of_the_budget_is_short(found, depth):
    case, ranks = found
    seen = 0
    for step in run(case, ranks, depth):
        left = min(case.epoch_samples - seen % case.epoch_samples, case.budget - seen)
        assert len(step.samples) == min(step.planned, left)
        assert step.by_rank[0].ends_epoch == (len(step.samples) == left)
        seen += len(step.samples)


@given(whole(largest=60, epochs=2, divisors=2), depths, depths, st.integers(0, 100))
@settings(max_examples=150)
def test_a_run_resumed_on_other_ranks_goes_on_with_the_same_steps(found, depth, other_depth, at):
    case, ranks, other_ranks = found
    uninterrupted = run(case, ranks, depth)
    at %= len(uninterrupted)
    resumed = run(case, other_ranks, other_depth, state=uninterrupted[at].state)
    rest = uninterrupted[at + 1 :]
    assert [step.samples for step in resumed] == [step.samples for step in rest]
    check_layout(case, other_ranks, resumed)
    check_shares(resumed)


@given(whole(largest=60, epochs=2), depths, st.integers(0, 100))
@settings(max_examples=60)
def test_a_run_resumed_on_as_many_ranks_cuts_on_alike(found, depth, at):
    case, ranks = found
    uninterrupted = run(case, ranks, depth)
    at %= len(uninterrupted)
    resumed = run(case, ranks, depth, state=uninterrupted[at].state)
    assert [step.rounds for step in resumed] == [step.rounds for step in uninterrupted[at + 1 :]]


@st.composite
def any_sizes(draw):
    """A case whose batch grows and shrinks as it likes."""
    case, ranks = draw(whole())
    sizes = draw(st.lists(st.tuples(st.integers(1, 20), st.integers(1, 200)), max_size=5))
    return case._replace(growths=tuple(sizes)), ranks


@given(any_sizes(), depths)
@settings(max_examples=200)
def test_a_batch_that_shrinks_over_queued_rounds_stays_within_its_plan(found, depth):
    case, ranks = found
    steps = run(case, ranks, depth)
    assert [i for step in steps for i in step.samples] == expected_order(case)
    check_layout(case, ranks, steps)


# --------------------------------------------------------------- a stream that was split beforehand


def whole_epochs(case):
    return -(-case.budget // case.samples) * case.samples


ENDLESS = 1_000_000  # a budget so far away that none of its last samples are asked for


@given(split(), depths)
@settings(max_examples=150)
def test_parts_of_uneven_lengths_are_trained_on_once_per_epoch(case, depth):
    case = case._replace(budget=whole_epochs(case))
    steps = run(case, len(case.parts), depth)
    orders = case.datasets()
    for epoch, samples in enumerate(by_epoch([i for s in steps for i in s.samples], case.samples)):
        assert Counter(samples) == Counter(range(case.samples))
        for rank, part in enumerate(orders):  # each rank its own, in the order of its own
            mine = set(range(part.first, part.first + part.samples))
            assert [i for i in samples if i in mine] == part.order(epoch), rank
    check_layout(case, len(case.parts), steps)


@given(split(), depths)
@settings(max_examples=150)
def test_parts_end_with_the_step_that_reaches_the_budget(case, depth):
    """What is asked of a part is not what comes, so the budget's last step is a whole one."""
    steps = run(case, len(case.parts), depth)
    samples = [i for step in steps for i in step.samples]
    assert case.budget <= len(samples) < case.budget + len(steps[-1].samples)
    assert max(Counter(by_epoch(samples, case.samples)[-1]).values()) == 1
    check_layout(case, len(case.parts), steps)


@given(split(largest=25, epochs=2), depths, depths, st.integers(0, 100))
@settings(max_examples=150)
def test_parts_resume_at_any_step_with_any_reading_ahead(case, depth, other_depth, at):
    case, ranks, epochs = case._replace(budget=ENDLESS), len(case.parts), 2
    uninterrupted = run(case, ranks, depth, epochs=epochs)
    at %= len(uninterrupted)
    resumed = run(case, ranks, other_depth, state=uninterrupted[at].state, epochs=epochs)
    rest = uninterrupted[at + 1 :]
    assert [sorted(step.samples) for step in resumed] == [sorted(step.samples) for step in rest]
    check_layout(case, ranks, resumed)


UNEVEN = Case(samples=43, unit=8, budget=86, kind="parts", parts=(3, 20, 19, 1))


@pytest.mark.parametrize("depth", [0, 5])
@given(case=split(largest=25))
@settings(max_examples=100)
def test_an_epoch_of_parts_is_whole_where_the_budget_is_far(depth, case):
    """What holds of parts besides the two defects that the properties above stumble over."""
    ranks, epochs = len(case.parts), 2
    orders = case.datasets()
    steps = run(case._replace(budget=ENDLESS), ranks, depth, epochs=epochs)
    check_layout(case, ranks, steps)
    samples = [i for step in steps for i in step.samples]
    assert len(samples) == epochs * case.samples
    for epoch, part in enumerate(by_epoch(samples, case.samples)):
        for order in orders:
            mine = range(order.first, order.first + order.samples)
            assert [i for i in part if i in mine] == order.order(epoch)


@pytest.mark.parametrize("depth", [0, 4])
def test_the_budgets_last_sample_comes_from_a_part_that_has_one(depth):
    case = Case(samples=8, unit=2, budget=8, kind="parts", parts=(1, 7))
    assert sum(len(step.samples) for step in run(case, 2, depth)) == 8


@pytest.mark.parametrize("kind", SPLIT)
def test_a_run_resumes_where_one_part_has_ended(kind):
    case = Case(samples=12, unit=2, budget=12, kind=kind, parts=(10, 2))
    steps = run(case, 2)
    resumed = run(case, 2, state=steps[1].state)
    assert [step.samples for step in resumed] == [step.samples for step in steps[2:]]


def test_a_part_that_has_ended_stands_in_with_a_sample_that_does_not_count():
    steps = run(UNEVEN._replace(budget=ENDLESS), 4, epochs=1)
    assert [len(step.samples) for step in steps][:3] == [7, 5, 4]
    assert [rank.lengths for rank in steps[2].by_rank] == [[1], [2], [2], [1]]
    assert [len(part) for part in steps[2].rounds[0]] == [0, 2, 2, 0]


def test_parts_are_refused_on_another_number_of_ranks():
    state = run(UNEVEN._replace(budget=ENDLESS), 4, epochs=1)[0].state
    two = UNEVEN._replace(parts=(23, 20))
    with pytest.raises(ValueError, match=r"a stream in 2 parts.*as in the checkpoint \(4\)"):
        run(two, 2, state=state)
    with pytest.raises(ValueError, match=r"a stream in 1 part\).*as in the checkpoint \(4\)"):
        run(UNEVEN._replace(kind="stream", parts=()), 1, state=state)


# ------------------------------------------------------------------------- what ranks disagree on


GROWS = Case(
    samples=61, unit=12, doublings=2, growths=((2, 24), (4, 48)), budget=150, accumulation=1
)


def test_a_stream_that_differs_between_ranks_is_refused_on_all():
    case = GROWS._replace(kind="stream")
    raised = []

    def one(ranks):
        loader, clock = build(case, ranks, {}, dataset=Flow(61, first=ranks.rank))
        with pytest.raises(ValueError, match=r"the same on all ranks, but rank 1") as error:
            train(case, loader, clock, ranks.size)
        raised.append(str(error.value))

    on_ranks(3, one)
    assert len(set(raised)) == 1
    assert len(raised) == 3


class Shorter(Flow):
    """The same samples in the same order, but the file is cut off."""

    def __init__(self, samples, kept):
        super().__init__(samples)
        self.kept = kept

    def __iter__(self):
        yield from self.order(self.epoch)[: self.kept]


@pytest.mark.parametrize(
    "kept",
    [
        *(1, 5, 13, 30),
        *(12, 36, 60),
    ],
)
def test_a_stream_that_is_shorter_on_one_rank_is_refused(kept):
    """Not left to a collective of tensors of different lengths, which gloo does not survive."""
    case = Case(samples=61, unit=4, accumulation=3, budget=61, kind="stream")
    for depth in (0, 4):
        with pytest.raises(ValueError, match="the same on all ranks, but rank 1"):
            run(case, 2, depth, dataset_of=lambda rank: Shorter(61, 61 if rank == 0 else kept))


def test_the_first_ranks_order_is_for_all_where_a_sampler_drew_another():
    def one(ranks):
        clock = TrainingClock(
            epoch_samples=40,
            initial_global_batch_size=4,
            initial_round_size=4,
            budget_samples=40,
        )
        order = EpochOrder(Shuffled(40, seed=ranks.rank))
        source = MapSource(Numbers(40), order, clock, ranks)
        fetch = source.open_epoch()
        return [i for begin in range(0, 40, 4) for i in fetch(begin, 4)]

    shares = on_ranks(4, one)
    assert sorted(i for share in shares for i in share) == list(range(40))


# ---------------------------------------------------------------------------------- real workers


OPTIONS = {
    "0": {},
    "1": {"num_workers": 1},
    "3": {"num_workers": 3},
    "3_deep": {"num_workers": 3, "prefetch_factor": 5},
}


def real(workers):
    return {"generator": torch.Generator().manual_seed(3), **OPTIONS[workers]}


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than cores
@pytest.mark.parametrize("kind", ["map", "stream", "stream_with_state"])
@pytest.mark.parametrize("workers", OPTIONS)
def test_real_workers_change_nothing_on_two_ranks(kind, workers):
    case = GROWS._replace(kind=kind)
    steps = run(case, 2, options=real(workers))
    assert [step.samples for step in steps] == [step.samples for step in run(case, 1)]
    check_layout(case, 2, steps)
    check_shares(steps)
    resumed = run(case, 3, options=real("1"), state=steps[3].state)
    assert [step.samples for step in resumed] == [step.samples for step in steps[4:]]


@pytest.mark.parametrize("workers", ["0", "3"])
def test_real_workers_read_parts_that_end_unevenly(workers):
    case = UNEVEN._replace(budget=ENDLESS)
    steps, fake = run(case, 4, options=real(workers), epochs=2), run(case, 4, epochs=2)
    assert [step.samples for step in steps] == [step.samples for step in fake]


# ------------------------------------------------------------------------ that all this can fail


def test_a_rank_that_takes_too_much_is_seen(monkeypatch):
    monkeypatch.setattr(Ranks, "share", lambda self, n: range(0, -(-n // self.size)))
    samples = [i for step in run(GROWS, 2) for i in step.samples]
    assert samples != expected_order(GROWS)


def test_a_sampler_that_forgets_the_ranks_in_its_rounds_is_seen(monkeypatch):
    plain = StepSampler._next_cut
    monkeypatch.setattr(StepSampler, "_next_cut", lambda self: 2 * plain(self))
    with pytest.raises(AssertionError):
        check_layout(GROWS, 2, run(GROWS, 2))


def test_a_resume_that_keeps_the_rounds_of_other_ranks_is_seen():
    """They would be too large for the memory of one rank."""
    case, state = GROWS._replace(doublings=0), run(GROWS, 4, 6)[4].state
    assert json.loads(state)["loader"]["pending"]
    check_layout(case, 1, run(case, 1, 6, state=state))
    kept = json.dumps({**json.loads(state), "ranks": 1})
    with pytest.raises(AssertionError):
        check_layout(case, 1, run(case, 1, 6, state=kept))


def test_a_reader_that_loses_a_sample_at_each_rounds_end_is_seen(monkeypatch):
    plain = StreamReader.__call__

    def losing(self, request):
        found = plain(self, request)
        self._next()
        return found

    monkeypatch.setattr(StreamReader, "__call__", losing)
    case = GROWS._replace(kind="stream", budget=20)
    samples = [i for step in run(case, 2) for i in step.samples]
    assert samples != expected_order(case)


def test_a_rank_that_fails_ends_the_others():
    class Broken(Flow):
        def __iter__(self):
            yield from self.order(self.epoch)[:20]
            raise KeyError("a broken sample")

    case = GROWS._replace(kind="stream")
    with pytest.raises(KeyError, match="a broken sample"):
        run(case, 3, dataset_of=lambda rank: Broken(61) if rank == 1 else Flow(61))


def test_ranks_that_are_not_several_need_no_process_group():
    alone = Ranks()
    assert alone.gather(1, 2.5) == [[1.0, 2.5]]
    assert alone.gather_objects({"a": 1}) == [{"a": 1}]
    assert list(alone.share(5)) == [0, 1, 2, 3, 4]
    assert replace(alone, rank=3, size=4).share(3) == range(3, 3)


@given(st.integers(1, 9), st.integers(0, 100))
def test_shares_are_a_partition_in_the_order_of_the_ranks(ranks, samples):
    shares = [Ranks(rank, ranks).share(samples) for rank in range(ranks)]
    assert [i for share in shares for i in share] == list(range(samples))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
