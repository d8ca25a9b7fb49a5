"""The loader's steps: each sample once, in the epoch's order, no step beyond its plan, resumable.

Most examples run the real `StepLoader` over a fake fetcher, which reads ahead as far as it is told:
that is all that workers do to the order. A few run real workers.
"""

from __future__ import annotations

import gc
import json
import multiprocessing
from array import array
from collections import deque
from itertools import pairwise
from typing import NamedTuple

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.utils.data import Dataset, RandomSampler, Sampler, SequentialSampler

from hf_adaptive_batch import BatchPlan, StepBatch, StepLoader, TrainingClock
from hf_adaptive_batch.apply import loader as loader_module
from hf_adaptive_batch.apply.sampler import EpochOrder, fingerprint
from hf_adaptive_batch.apply.sources import MapSource
from hf_adaptive_batch.ranks import Ranks


class Numbers(Dataset):
    """Sample i is the number i."""

    def __init__(self, samples, *, fails_at=None):
        self.samples, self.fails_at = samples, fails_at

    def __len__(self):
        return self.samples

    def __getitem__(self, index):
        if index == self.fails_at:
            raise KeyError("a broken sample")
        return index


class Shuffled(Sampler):
    """A permutation that is a function of the epoch."""

    def __init__(self, samples, seed=0):
        self.samples, self.seed, self.epoch = samples, seed, 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return self.samples

    def __iter__(self):
        generator = torch.Generator().manual_seed(1000 * self.seed + self.epoch)
        return iter(torch.randperm(self.samples, generator=generator).tolist())


class Prefetching:
    """Stands for a DataLoader with workers: always holds `depth` micro-batches ahead."""

    persistent_workers = False

    def __init__(self, dataset, batch_sampler, depth):
        self.batch_sampler, self.depth = batch_sampler, depth

    def __iter__(self):
        return _Ahead(iter(self.batch_sampler), self.depth)


class _Ahead:
    def __init__(self, batches, depth):
        self.batches, self.queue = batches, deque()
        for _ in range(depth):
            self._fetch()

    def _fetch(self):
        self.queue.extend([batch] if (batch := next(self.batches, None)) else [])

    def __next__(self):
        self._fetch()
        return {"x": torch.tensor(self.queue.popleft())}


class Case(NamedTuple):
    """A run: `growths` are the sizes wished from a step on."""

    samples: int
    micro: int
    accumulation: int
    doublings: int
    growths: tuple[tuple[int, int], ...]
    budget: int
    dropped: int = 0
    measured: int = 0

    @property
    def first(self):
        return BatchPlan(micro_batch_size=self.micro, accumulation_steps=self.accumulation)

    @property
    def epoch_samples(self):
        return self.samples - self.dropped

    def plan_after(self, step, plan):
        for at, size in self.growths:
            if at == step:
                return BatchPlan.nearest(
                    size,
                    micro_batch_size=self.micro,
                    max_micro_batch_size=self.micro * 2**self.doublings,
                )
        return plan

    def measures(self, step):
        return self.measured > 0 and step % self.measured == 0

    def order(self, epoch):
        sampler = Shuffled(self.samples)
        sampler.set_epoch(epoch)
        return list(sampler)[: self.epoch_samples]


@st.composite
def cases(draw, largest=150, epochs=3):
    samples = draw(st.integers(1, largest))
    micro, accumulation = draw(st.integers(1, 6)), draw(st.integers(1, 4))
    size, growths, step = micro * accumulation, [], 0
    for _ in range(draw(st.integers(0, 4))):
        step += draw(st.integers(1, 5))
        size += draw(st.integers(1, 3 * size))
        growths.append((step, size))
    dropped = draw(st.integers(0, min(samples - 1, micro - 1)))
    return Case(
        samples=samples,
        micro=micro,
        accumulation=accumulation,
        doublings=draw(st.integers(0, 3)),
        growths=tuple(growths),
        budget=draw(st.integers(1, epochs * (samples - dropped))),
        dropped=dropped,
        measured=draw(st.integers(0, 3)),
    )


class Step(NamedTuple):
    samples: list[int]
    sizes: list[int]
    planned: BatchPlan
    ends_epoch: bool
    state: str  # after it, as JSON


def build(case, options, *, dataset=None, order=None):
    clock = TrainingClock(
        epoch_samples=case.epoch_samples,
        initial_global_batch_size=case.first.global_batch_size,
        initial_round_size=case.micro,
        budget_samples=case.budget,
    )
    source = MapSource(
        Numbers(case.samples) if dataset is None else dataset,
        EpochOrder(Shuffled(case.samples)) if order is None else order,
        clock,
        Ranks(),
    )
    loader = StepLoader(
        source,
        case.first,
        clock,
        case.measures,
        options,
    )
    return loader, clock


def collate(indices):
    return {"x": torch.tensor(indices)}


def steps_of(case, loader, clock, *, before_step=None):
    """Train to the end of the budget as the Trainer does: hand out, decide, commit."""
    done = []
    while not clock.finished:
        for batch in loader:
            planned = loader.plan
            loader.set_plan(case.plan_after(clock.steps + 1, loader.plan))
            clock.advance(samples=batch.samples, tokens=0)
            state = {"clock": clock.state_dict(), "loader": loader.state_dict()}
            state["plan"] = [loader.plan.micro_batch_size, loader.plan.accumulation_steps]
            samples = [i for part in batch.micro_batches for i in part["x"].tolist()]
            sizes = [len(part["x"]) for part in batch.micro_batches]
            assert sizes == batch.sizes
            done.append(Step(samples, sizes, planned, batch.ends_epoch, json.dumps(state)))
    return done


@pytest.fixture
def fake_fetcher(monkeypatch):
    monkeypatch.setattr(loader_module, "DataLoader", Prefetching)


def run(case, depth):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loader_module, "DataLoader", Prefetching)
        return steps_of(case, *build(case, {"depth": depth}))


def resume(case, depth, state):
    state = json.loads(state)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loader_module, "DataLoader", Prefetching)
        loader, clock = build(case, {"depth": depth})
        clock.load_state_dict(state["clock"])
        loader.load_state_dict(state["loader"])
        micro, accumulation = state["plan"]
        loader.set_plan(BatchPlan(micro_batch_size=micro, accumulation_steps=accumulation))
        return steps_of(case, loader, clock)


# --------------------------------------------------------------------------- whatever the batch


@given(cases(), st.integers(0, 12))
@settings(max_examples=200)
def test_every_sample_of_an_epoch_is_handed_out_once_and_in_its_order(case, depth):
    samples = [i for step in run(case, depth) for i in step.samples]
    assert len(samples) == case.budget
    epochs = -(-case.budget // case.epoch_samples)
    expected = [i for epoch in range(epochs) for i in case.order(epoch)][: case.budget]
    assert samples == expected


@given(cases(), st.integers(0, 12))
@settings(max_examples=200)
@example(  # the micro-batch may become smaller while the batch grows: 8 = 4 x 2, then 10 = 2 x 5
    Case(
        samples=100,
        micro=2,
        accumulation=1,
        doublings=1,
        growths=((1, 8), (3, 10)),
        budget=100,
    ),
    12,
)
def test_no_step_exceeds_its_plan_and_only_an_epochs_last_is_short(case, depth):
    seen = 0
    for step in run(case, depth):
        left = min(case.epoch_samples - seen % case.epoch_samples, case.budget - seen)
        assert len(step.samples) == min(step.planned.global_batch_size, left)
        seen += len(step.samples)
        assert step.ends_epoch == (len(step.samples) == left)


@given(cases(), st.integers(1, 12))
@settings(max_examples=200)
def test_the_steps_do_not_depend_on_how_far_workers_read_ahead(case, depth):
    assert [step.samples for step in run(case, depth)] == [step.samples for step in run(case, 0)]


@given(cases(), st.integers(0, 12))
@settings(max_examples=100)
def test_micro_batches_stay_within_the_ladder(case, depth):
    for step in run(case, depth):
        assert max(step.sizes) <= case.micro * 2**case.doublings
        assert min(step.sizes) >= 1


@given(cases())
@settings(max_examples=100)
def test_without_reading_ahead_micro_batches_are_those_of_the_plan(case):
    """All but the last whole; a measured step that would be one micro-batch is cut in two."""
    for number, step in enumerate(run(case, 0), start=1):
        micro, samples = step.planned.micro_batch_size, len(step.samples)
        if 1 < samples <= micro and case.measures(number):
            micro = -(-samples // 2)
        assert step.sizes == [min(micro, samples - begin) for begin in range(0, samples, micro)]


@given(cases(), st.integers(0, 12))
@settings(max_examples=100)
def test_a_measured_step_is_never_a_single_micro_batch(case, depth):
    """Unless it is one sample, or was cut for a step that was not measured."""
    if case.measured != 1:
        return
    for step in run(case, depth):
        assert len(step.sizes) > 1 or len(step.samples) == 1


@given(cases(largest=60, epochs=2), st.integers(0, 12))
@settings(max_examples=60)
def test_a_run_resumed_at_any_step_cuts_on_alike(case, depth):
    whole = run(case, depth)
    for number, step in enumerate(whole, start=1):
        resumed = resume(case, depth, step.state)
        assert [s[:4] for s in resumed] == [s[:4] for s in whole[number:]]


@given(cases(largest=60, epochs=2), st.integers(0, 12), st.integers(0, 12))
@settings(max_examples=60)
def test_a_resumed_run_may_read_ahead_differently(case, depth, other_depth):
    whole = run(case, depth)
    middle = len(whole) // 2
    resumed = resume(case, other_depth, whole[middle].state)
    assert [s.samples for s in resumed] == [s.samples for s in whole[middle + 1 :]]


GROWS = Case(
    samples=61, micro=2, accumulation=2, doublings=2, growths=((2, 8), (5, 16)), budget=150
)


def test_a_fetcher_that_loses_a_micro_batch_is_seen(fake_fetcher, monkeypatch):
    """The properties above can fail."""

    def losing(self):
        self._fetch()
        self.queue.popleft()
        return {"x": torch.tensor(self.queue.popleft())}

    monkeypatch.setattr(_Ahead, "__next__", losing)
    with pytest.raises((AssertionError, IndexError, StopIteration, RuntimeError)):
        steps_of(GROWS, *build(GROWS, {"depth": 4}))


def test_a_resume_that_forgets_what_was_read_ahead_is_seen():
    whole = run(GROWS, 6)
    state = json.loads(whole[2].state)
    assert state["loader"]["pending"]
    state["loader"]["pending"] = []
    resumed = resume(GROWS, 6, json.dumps(state))
    assert [s.samples for s in resumed] == [s.samples for s in whole[3:]]
    assert [s.sizes for s in resumed] != [s.sizes for s in whole[3:]]


def test_the_batch_grows_at_once_and_the_micro_batch_when_the_queue_is_used_up():
    steps = run(GROWS, 6)
    assert [len(step.samples) for step in steps[:6]] == [4, 4, 8, 8, 8, 16]
    assert steps[2].sizes == [2, 2, 2, 2]  # fetched before
    assert run(GROWS, 0)[2].sizes == [8]


@pytest.mark.parametrize("depth", [0, 5])
def test_the_example_in_the_module_is_true(depth):
    case = Case(samples=14, micro=2, accumulation=2, doublings=1, growths=((1, 8),), budget=14)
    steps = run(case, depth)
    assert [len(step.samples) for step in steps] == [4, 8, 2]
    assert steps[1].sizes == ([2, 2, 2, 2] if depth else [4, 4])


# ----------------------------------------------------------------------------------- real workers

LOADERS = {
    "0": {},
    "1": {"num_workers": 1},
    "2": {"num_workers": 2},
    "2_deep": {"num_workers": 2, "prefetch_factor": 5},
    "2_persistent": {"num_workers": 2, "persistent_workers": True},
}


def real(options):
    return {"collate_fn": collate, "generator": torch.Generator().manual_seed(3), **options}


@pytest.mark.parametrize("options", LOADERS.values(), ids=LOADERS)
def test_real_workers_give_the_steps_of_the_fake_fetcher(options):
    loader, clock = build(GROWS, real(options))
    steps = steps_of(GROWS, loader, clock)
    loader.close()
    depth = options.get("num_workers", 0) * options.get("prefetch_factor", 2)
    assert [s[:4] for s in steps] == [s[:4] for s in run(GROWS, depth)]


@pytest.mark.parametrize("options", LOADERS.values(), ids=LOADERS)
def test_real_workers_resume_at_a_step(options):
    loader, clock = build(GROWS, real(options))
    whole = steps_of(GROWS, loader, clock)
    loader.close()
    for number in (3, 9, len(whole) - 2):
        state = json.loads(whole[number - 1].state)
        loader, clock = build(GROWS, real(options))
        clock.load_state_dict(state["clock"])
        loader.load_state_dict(state["loader"])
        micro, accumulation = state["plan"]
        loader.set_plan(BatchPlan(micro_batch_size=micro, accumulation_steps=accumulation))
        resumed = steps_of(GROWS, loader, clock)
        loader.close()
        assert [s[:4] for s in resumed] == [s[:4] for s in whole[number:]]


def children():
    gc.collect()
    return multiprocessing.active_children()


@pytest.mark.parametrize("persistent", [False, True])
def test_no_worker_outlives_the_loader(persistent):
    loader, _ = build(GROWS, real({"num_workers": 2, "persistent_workers": persistent}))
    steps = iter(loader)
    next(steps)
    assert len(multiprocessing.active_children()) == 2  # the test would see them
    loader.close()
    del steps
    assert not children()


def test_no_worker_outlives_a_sample_that_raises():
    loader, clock = build(
        GROWS, real({"num_workers": 2}), dataset=Numbers(61, fails_at=GROWS.order(0)[20])
    )
    with pytest.raises(KeyError, match="a broken sample"):
        steps_of(GROWS, loader, clock)
    loader.close()
    # At once: left to the garbage collector, torch waits five seconds for each of them.
    assert not multiprocessing.active_children()


def test_no_worker_outlives_an_order_that_is_refused():
    loader, clock = build(GROWS, real({"num_workers": 2}))
    state = json.loads(steps_of(GROWS, loader, clock)[2].state)
    loader.close()
    loader, clock = build(GROWS, real({"num_workers": 2}), order=EpochOrder(Shuffled(61, seed=1)))
    clock.load_state_dict(state["clock"])
    loader.load_state_dict(state["loader"])
    with pytest.raises(ValueError, match="order"):
        next(iter(loader))
    loader.close()
    assert not children()


def test_a_closed_loader_cannot_be_iterated(fake_fetcher):
    loader, _ = build(GROWS, {"depth": 1})
    loader.close()
    loader.close()  # twice is fine
    with pytest.raises(RuntimeError, match="closed"):
        next(iter(loader))


# ------------------------------------------------------------------------------ small behaviours


def test_the_length_is_what_the_rest_of_the_epoch_takes_with_the_plan_in_force(fake_fetcher):
    loader, clock = build(GROWS, {"depth": 0})
    assert len(loader) == 16
    clock.advance(samples=21, tokens=0)
    assert len(loader) == 10
    loader.set_plan(BatchPlan(micro_batch_size=8))
    assert len(loader) == 5


def test_a_state_of_another_version_is_refused(fake_fetcher):
    loader, _ = build(GROWS, {"depth": 0})
    with pytest.raises(ValueError, match=r"version \(0\)"):
        loader.load_state_dict({**loader.state_dict(), "version": 0})


def test_iterating_again_goes_on_with_the_next_sample(fake_fetcher):
    loader, clock = build(GROWS, {"depth": 3})
    first = next(iter(loader))
    clock.advance(samples=first.samples, tokens=0)
    second = next(iter(loader))
    joined = [*first["x"].tolist(), *second["x"].tolist()]
    assert joined == GROWS.order(0)[:8]


@pytest.mark.parametrize("workers", [0, 1])
def test_steps_may_be_skipped_without_a_draw_from_torchs_generator(workers):
    """A generator of its own: what the loader does leaves dropout as it was."""
    loader, clock = build(GROWS, real({"num_workers": workers}))
    before = torch.get_rng_state()
    steps_of(GROWS, loader, clock)
    loader.close()
    assert torch.equal(torch.get_rng_state(), before)


def test_a_dataset_is_told_its_epoch(fake_fetcher):
    told = []

    class Told(Numbers):
        def set_epoch(self, epoch):
            told.append(epoch)

    case = GROWS._replace(budget=3 * 61)
    steps_of(case, *build(case, {"depth": 2}, dataset=Told(61)))
    assert told == [0, 1, 2]


# -------------------------------------------------------------------------------------- StepBatch


PLAN = BatchPlan(micro_batch_size=2, accumulation_steps=2)


def test_a_step_looks_like_one_flat_batch():
    parts = [
        {"input_ids": torch.ones(2, 3), "names": ["a", "b"]},
        {"input_ids": torch.zeros(1, 3), "names": ["c"]},
    ]
    step = StepBatch(parts, [2, 1], PLAN, ends_epoch=True)
    assert step.samples == 3
    assert step["input_ids"].shape == (3, 3)
    assert step["input_ids"].sum() == 6
    assert step["names"] == [["a", "b"], ["c"]]
    assert list(step) == ["input_ids", "names"]
    assert len(step) == 2
    assert "labels" not in step
    assert step.get("labels") is None
    with pytest.raises(KeyError):
        step["labels"]
    assert dict(step.items()).keys() == {"input_ids", "names"}


def test_parts_padded_to_different_lengths_are_joined_flat():
    parts = [{"input_ids": torch.ones(2, 3)}, {"input_ids": torch.ones(2, 5)}]
    step = StepBatch(parts, [2, 2], PLAN)
    assert step["input_ids"].shape == (16,)


def test_scalars_are_joined_too():
    step = StepBatch([{"n": torch.tensor(2)}, {"n": torch.tensor(3)}], [1, 1], PLAN)
    assert step["n"].tolist() == [2, 3]


# -------------------------------------------------------------------------------------- EpochOrder


class Fresh(Sampler):
    """Draws from torch's generator at every iteration."""

    def __init__(self, samples):
        self.samples = samples

    def __len__(self):
        return self.samples

    def __iter__(self):
        return iter(torch.randperm(self.samples).tolist())


class Lying(Shuffled):
    """Its length says more than it yields."""

    def __iter__(self):
        return iter(list(super().__iter__())[:-5])


def own_generator(samples):
    return RandomSampler(range(samples), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize(
    "make",
    [Shuffled, Fresh, own_generator, lambda n: SequentialSampler(range(n))],
    ids=["set_epoch", "global_generator", "own_generator", "sequential"],
)
def test_an_order_can_be_had_again(make):
    torch.manual_seed(1)
    order = EpochOrder(make(40))
    epochs = [order.of(epoch) for epoch in range(3)]
    assert all(sorted(indices) == list(range(40)) for indices, _ in epochs)
    for epoch, (indices, rng_state) in enumerate(epochs):
        torch.manual_seed(99)
        before = torch.get_rng_state()
        other = EpochOrder(make(40))
        other.skip(epoch)
        assert other.again(epoch, json.loads(json.dumps(rng_state))) == indices
        assert torch.equal(torch.get_rng_state(), before)


def test_an_order_from_torchs_generator_needs_its_state():
    torch.manual_seed(1)
    order, rng_state = EpochOrder(Fresh(40)).of(0)
    assert rng_state is not None
    assert EpochOrder(Fresh(40)).again(0, None) != order


def test_an_order_that_draws_nothing_keeps_no_state():
    assert EpochOrder(Shuffled(40)).of(2)[1] is None
    assert EpochOrder(own_generator(40)).of(2)[1] is None


def test_a_sampler_is_drawn_from_as_a_dataloader_would():
    """The second epoch of a sampler without set_epoch is its second iteration."""
    order, sampler = EpochOrder(own_generator(40)), own_generator(40)
    for epoch in range(3):
        assert list(order.of(epoch)[0]) == list(sampler)


@pytest.mark.parametrize("make", [Fresh, own_generator], ids=["global_generator", "own_generator"])
@pytest.mark.parametrize("workers", [0, 1])
def test_any_sampler_resumes_in_any_epoch(make, workers):
    case = GROWS._replace(samples=40, budget=120)
    torch.manual_seed(1)
    loader, clock = build(case, real({"num_workers": workers}), order=EpochOrder(make(40)))
    whole = []
    rng_states = []
    while not clock.finished:
        for batch in loader:
            clock.advance(samples=batch.samples, tokens=0)
            whole.append(
                (batch["x"].tolist(), json.dumps([clock.state_dict(), loader.state_dict()]))
            )
            rng_states.append(torch.get_rng_state())
    loader.close()
    for number in range(1, len(whole), 3 if workers == 0 else 11):
        states = json.loads(whole[number - 1][1])
        loader, clock = build(case, real({"num_workers": workers}), order=EpochOrder(make(40)))
        clock.load_state_dict(states[0])
        loader.load_state_dict(states[1])
        torch.set_rng_state(rng_states[number - 1])  # as the Trainer does
        resumed = []
        while not clock.finished:
            for batch in loader:
                clock.advance(samples=batch.samples, tokens=0)
                resumed.append(batch["x"].tolist())
        loader.close()
        assert resumed == [samples for samples, _ in whole[number:]]


def test_a_sampler_whose_length_lies_is_refused(fake_fetcher):
    loader, _ = build(GROWS, {"depth": 0}, order=EpochOrder(Lying(61)))
    with pytest.raises(ValueError, match=r"train sampler \(56 indices\).*at least 61"):
        next(iter(loader))


def test_a_longer_sampler_trains_its_epochs_share(fake_fetcher):
    case = GROWS._replace(samples=61, dropped=1, budget=120)
    steps = steps_of(case, *build(case, {"depth": 0}))
    assert [i for step in steps[:-1] if step for i in step.samples][:60] == case.order(0)


def test_another_order_has_another_fingerprint():
    one, other = array("q", [1, 2, 3]), array("q", [1, 3, 2])
    assert fingerprint(one) == fingerprint(array("q", [1, 2, 3])) != fingerprint(other)


@given(cases(), st.integers(0, 12))
@settings(max_examples=50)
def test_steps_are_numbered_over_epochs(case, depth):
    seen = [0, *(json.loads(step.state)["clock"]["samples_seen"] for step in run(case, depth))]
    assert all(a < b for a, b in pairwise(seen))
    assert seen[-1] == case.budget
