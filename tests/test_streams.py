"""Streams: every sample of an epoch once and in order, no step beyond its plan, found again.

Most examples run the real `StepLoader` over a fake fetcher, which reads ahead in a copy of the
dataset as a worker process does. A few run real workers. What is expected is counted naively.
"""

from __future__ import annotations

import contextlib
import datetime
import decimal
import itertools
import json
import logging
import math
import multiprocessing
import os
import pickle
import random
import subprocess
import sys
from collections import deque
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import pytest
import torch
from datasets.distributed import split_dataset_by_node
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.utils.data import IterableDataset

from hf_adaptive_batch import BatchPlan, StepLoader, TrainingClock, hf_streams
from hf_adaptive_batch.apply import loader as loader_module
from hf_adaptive_batch.apply import stream as stream_module
from hf_adaptive_batch.apply.sources import StreamSource
from hf_adaptive_batch.apply.stream import StreamReader, digest
from hf_adaptive_batch.ranks import Ranks


# --------------------------------------------------------------------------------- torch streams


class Stream(IterableDataset):
    """Numbers, in an order that is a function of the epoch; it has no state."""

    def __init__(self, samples, *, fails_at=None):
        self.samples, self.epoch, self.fails_at = samples, 0, fails_at

    def set_epoch(self, epoch):
        self.epoch = epoch

    def order(self, epoch):
        return random.Random(epoch).sample(range(self.samples), self.samples)

    def __iter__(self):
        for number in self.order(self.epoch):
            if number == self.fails_at:
                raise KeyError("a broken sample")
            yield number


class Unaware(IterableDataset):
    """Is not told its epoch."""

    def __init__(self, samples):
        self.samples = samples

    def order(self, epoch):
        return list(range(self.samples))

    def __iter__(self):
        yield from self.order(0)


class Stateful(Stream):
    """Knows its place, and is set to one."""

    def __init__(self, samples):
        super().__init__(samples)
        self.begin = self.place = 0

    def __iter__(self):
        begin, self.begin = self.begin, 0
        order, self.place = self.order(self.epoch), begin
        while self.place < self.samples:
            self.place += 1
            yield order[self.place - 1]

    def state_dict(self):
        return {"place": self.place}

    def load_state_dict(self, state):
        self.begin = state["place"]


class StatefulIterator(Stream):
    """Its iterator knows the place."""

    def __iter__(self):
        return _Counting(self.order(self.epoch))


class _Counting:
    def __init__(self, order):
        self.order, self.place = order, 0

    def __iter__(self):
        return self

    def __next__(self):
        if self.place == len(self.order):
            raise StopIteration
        self.place += 1
        return self.order[self.place - 1]

    def state_dict(self):
        return {"place": self.place}

    def load_state_dict(self, state):
        self.place = state["place"]


class NoJSON(Stateful):
    """Its state does not survive JSON."""

    def state_dict(self):
        return {"place": torch.tensor(self.place)}


class Tuples(Stateful):
    """Its state comes back from JSON as another one."""

    def state_dict(self):
        return {"place": (self.place,)}

    def load_state_dict(self, state):
        (self.begin,) = state["place"]
        assert isinstance(state["place"], tuple)


class Lying(Stateful):
    """Its state leads elsewhere."""

    def load_state_dict(self, state):
        self.begin = state["place"] // 2


class LateState(Stateful):
    """What it tells is the state that it has by the time that it is looked at."""

    def __init__(self, samples):
        super().__init__(samples)
        self.shared = {}

    def __iter__(self):
        for number in super().__iter__():
            self.shared["place"] = self.place
            yield number

    def state_dict(self):
        return self.shared


class Keeping(Stateful):
    """An iteration that was set to a place leaves the object there, until it ends."""

    def __iter__(self):
        order = self.order(self.epoch)
        self.place = self.begin
        while self.place < self.samples:
            self.place += 1
            yield order[self.place - 1]


# What is kept in a checkpoint of them, and may be used.
RESTORED = (Stateful, StatefulIterator, Keeping, LateState)
STREAMS = (Stream, Unaware, Lying, NoJSON, Tuples, *RESTORED)


# ------------------------------------------------------------------------------------- the driver


class Case(NamedTuple):
    """A run: `growths` are the sizes wished from a step on, `budget` of a kind."""

    micro: int = 2
    accumulation: int = 2
    doublings: int = 2
    growths: tuple[tuple[int, int], ...] = ((2, 8), (5, 16))
    kind: str = "samples"
    budget: int = 100
    measured: int = 0

    @property
    def first(self):
        return BatchPlan(micro_batch_size=self.micro, accumulation_steps=self.accumulation)

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

    def clock(self):
        return TrainingClock(
            epoch_samples=None,
            initial_global_batch_size=self.first.global_batch_size,
            initial_round_size=self.micro,
            tokens_per_sample=2.0,
            **{f"budget_{self.kind}": self.budget},
        )


def tokens_of(sample):
    return 1 + sample % 3


class Step(NamedTuple):
    samples: list[Any]
    sizes: list[int]
    planned: BatchPlan
    ends_epoch: bool
    ends_stream: bool
    state: str  # after it, as JSON


class Ahead:
    """Stands for a DataLoader with a worker that is always `depth` micro-batches ahead.

    The worker has what a pickle of the dataset has, and lives for an epoch.
    """

    persistent_workers = False

    def __init__(self, dataset, batch_sampler, depth, collate_fn):
        self.dataset, self.batch_sampler = dataset, batch_sampler
        self.depth, self.collate_fn = depth, collate_fn

    def __iter__(self):
        dataset = pickle.loads(pickle.dumps(self.dataset)) if self.depth else self.dataset
        queue, requests = deque(), iter(self.batch_sampler)
        for _ in range(self.depth):
            self._fetch(dataset, requests, queue)
        while True:
            self._fetch(dataset, requests, queue)
            yield queue.popleft()

    def _fetch(self, dataset, requests, queue):
        for request in itertools.islice(requests, 1):
            queue.append(self.collate_fn(dataset.__getitems__(request)))


def build(case, dataset, **options):
    clock, ranks = case.clock(), Ranks()
    split = hf_streams.parts_of(dataset) is not None
    reader = StreamReader(
        dataset,
        ranks,
        split=split,
        private=hf_streams.private,
        settle=hf_streams.settle,
        restorable=hf_streams.shuffle_buffer(dataset) <= 1,
    )
    loader = StepLoader(
        StreamSource(reader, clock, ranks, split=split),
        case.first,
        clock,
        case.measures,
        {"collate_fn": list, **options},
        count_tokens=lambda batch: sum(tokens_of(s) for s in batch if isinstance(s, int)),
    )
    return loader, clock


def steps_of(case, loader, clock):
    """Train to the end of the budget as the Trainer does: hand out, decide, commit."""
    while not clock.finished:
        for batch in loader:
            planned = loader.plan
            loader.set_plan(case.plan_after(clock.steps + 1, loader.plan))
            samples = [sample for part in batch.micro_batches for sample in part]
            assert [len(part) for part in batch.micro_batches] == batch.sizes
            assert batch.samples == batch.global_samples == len(samples)
            clock.advance(samples=batch.samples, tokens=batch.tokens, ends_stream=batch.ends_stream)
            state = {"clock": clock.state_dict(), "loader": loader.state_dict()}
            state["plan"] = [loader.plan.micro_batch_size, loader.plan.accumulation_steps]
            yield Step(
                samples, batch.sizes, planned, batch.ends_epoch, batch.ends_stream,
                json.dumps(state),
            )  # fmt: skip
            if clock.finished:  # a budget in tokens does not limit the epoch
                break


@contextlib.contextmanager
def fetching(options):
    """The fake fetcher, if told how far it reads ahead; else torch's own."""
    with pytest.MonkeyPatch.context() as patch:
        if "depth" in options:
            patch.setattr(loader_module, "DataLoader", Ahead)
        yield


def run(case, dataset, *, state=None, anew=False, **options):
    """Train, from a state if there is one."""
    with fetching(options):
        loader, clock = build(case, dataset, **options)
        try:
            if state is not None:
                state = json.loads(state)
                clock.load_state_dict(state["clock"])
                if not anew:
                    loader.load_state_dict(state["loader"])
                micro, accumulation = state["plan"]
                loader.set_plan(BatchPlan(micro_batch_size=micro, accumulation_steps=accumulation))
            return list(steps_of(case, loader, clock))
        finally:
            loader.close()


def expected(case, order):
    """Naively: the steps' samples, whether they end the epoch's share, and the stream."""
    epoch = place = seen = tokens = past = 0
    plan, done, first = case.first, [], case.first.global_batch_size
    while True:
        data = order(epoch)
        left = {
            "samples": case.budget - seen,
            "steps": (case.budget - past) * first - place,
            "tokens": 10**9 if tokens < case.budget else 0,
        }[case.kind]
        if left <= 0:
            return done
        taken = data[place : place + min(plan.global_batch_size, left)]
        place, seen = place + len(taken), seen + len(taken)
        tokens += sum(map(tokens_of, taken))
        ends_stream = place == len(data)
        done.append((taken, ends_stream or len(taken) == left, ends_stream))
        plan = case.plan_after(len(done), plan)
        if ends_stream:
            past += math.ceil(place / first)
            epoch, place = epoch + 1, 0


def shown(steps):
    return [(step.samples, step.ends_epoch, step.ends_stream) for step in steps]


@st.composite
def cases(draw, epochs=3, largest=120):
    """With a stream's length, often a multiple of the steps."""
    micro, accumulation = draw(st.integers(1, 6)), draw(st.integers(1, 4))
    size, growths, step = micro * accumulation, [], 0
    length = draw(
        st.one_of(
            st.integers(1, largest), st.integers(1, max(1, largest // size)).map(size.__mul__)
        )
    )
    for _ in range(draw(st.integers(0, 4))):
        step += draw(st.integers(1, 5))
        size += draw(st.integers(1, 3 * size))
        growths.append((step, size))
    kind = draw(st.sampled_from(["samples", "steps", "tokens"]))
    whole = {"samples": length, "steps": -(-length // (micro * accumulation)), "tokens": 2 * length}
    case = Case(
        micro=micro,
        accumulation=accumulation,
        doublings=draw(st.integers(0, 3)),
        growths=tuple(growths),
        kind=kind,
        budget=draw(st.integers(1, epochs * whole[kind])),
        measured=draw(st.integers(0, 3)),
    )
    return case, length


DEPTHS = st.sampled_from([0, 0, 1, 2, 5, 12])


# ------------------------------------------------------------------------ order, plans and counts


@given(cases(), DEPTHS)
@settings(max_examples=200)
@example((Case(growths=(), budget=24), 8), 3)  # the length is a multiple of the step
@example((Case(growths=(), budget=8), 8), 3)  # and the budget that of an epoch
@example((Case(kind="steps", budget=7), 9), 12)
@example((Case(micro=1, accumulation=1, budget=3), 1), 5)
def test_steps_are_those_counted_naively_however_far_is_read_ahead(drawn, depth):
    """All samples of an epoch once and in order; only what an epoch or the budget ends is short."""
    case, length = drawn
    stream = Stream(length)
    steps = run(case, stream, depth=depth)
    assert shown(steps) == expected(case, stream.order)
    for step in steps:
        assert len(step.samples) <= step.planned.global_batch_size
        assert all(1 <= size <= case.micro * 2**case.doublings for size in step.sizes)


@given(cases())
@settings(max_examples=60)
def test_without_reading_ahead_micro_batches_are_those_of_the_plan(drawn):
    """All but the last whole; a step that is measured is never a single one."""
    case, length = drawn
    for number, step in enumerate(run(case, Stream(length), depth=0), start=1):
        micro, samples = step.planned.micro_batch_size, len(step.samples)
        asked = step.planned.global_batch_size  # a stream's end is not known when rounds are cut
        if samples < asked and not step.ends_stream:
            asked = samples  # but the budget's is
        if 1 < asked <= micro and case.measures(number):
            micro = -(-asked // 2)
        if samples < asked and case.kind != "tokens" and case.measures(number):
            continue  # both ends in one step: cut either way
        assert step.sizes == [min(micro, samples - begin) for begin in range(0, samples, micro)]


@pytest.mark.parametrize("kind", STREAMS)
@given(drawn=cases(epochs=2, largest=40), depth=DEPTHS, other=DEPTHS)
@settings(max_examples=15)
@example(drawn=(Case(growths=((1, 8),), budget=30), 8), depth=5, other=5)
@example(drawn=(Case(growths=((1, 8),), budget=30), 12), depth=0, other=5)
def test_a_run_resumed_at_any_step_goes_on_alike(kind, drawn, depth, other):
    """Whatever the stream tells of its place; if it reads as far ahead, in the same micro-batches.

    With all that a checkpoint holds the same at every later step.
    """
    case, length = drawn
    whole = run(case, kind(length), depth=depth)
    assert shown(whole) == expected(case, kind(length).order)
    for number, step in enumerate(whole, start=1):
        resumed = run(case, kind(length), state=step.state, depth=depth)
        assert resumed == whole[number:]
    middle = len(whole) // 2
    resumed = run(case, kind(length), state=whole[middle].state, depth=other)
    assert shown(resumed) == shown(whole[middle + 1 :])


def test_micro_batches_after_the_end_of_an_epoch_are_the_same_at_a_resume():
    """Rounds that were asked for beyond a stream's end are not those of the next epoch."""
    case = Case(growths=((1, 8),), budget=30)
    whole = run(case, Stream(8), depth=5)
    number = next(i for i, step in enumerate(whole, start=1) if step.ends_stream)
    resumed = run(case, Stream(8), state=whole[number - 1].state, depth=5)
    assert [step.sizes for step in resumed] == [step.sizes for step in whole[number:]]


# What would be seen.


LONG = Case(budget=90)


def altered(whole, number, change):
    """A step's state in which something is another."""
    state = json.loads(whole[number].state)
    change(state["loader"]["source"]["places"][0])
    return json.dumps(state)


@pytest.mark.parametrize("name", ["offset", "following"])
def test_a_place_that_is_another_is_refused(name):
    whole = run(LONG, Stream(50), depth=0)

    def change(place):
        place[name] += 1

    with pytest.raises(ValueError, match=r"train_dataset \(its sample \d+ in epoch 0\) must be"):
        run(LONG, Stream(50), state=altered(whole, 2, change), depth=0)


def test_a_place_of_another_epoch_is_not_taken_for_the_clocks():
    """The clock says which epoch it is; a place in another one is its beginning."""
    whole = run(LONG, Stream(50), depth=0)

    def change(place):
        place["epoch"] += 1

    resumed = run(LONG, Stream(50), state=altered(whole, 2, change), depth=0)
    assert shown(resumed) != shown(whole[3:])


def test_a_reader_that_forgets_what_it_has_looked_at_is_seen(monkeypatch):
    """The properties above can fail."""
    go_on = StreamReader._next

    def forgetting(self):
        self._ahead = stream_module._NOTHING
        return go_on(self)

    monkeypatch.setattr(StreamReader, "_next", forgetting)
    assert shown(run(LONG, Stream(50), depth=0)) != expected(LONG, Stream(50).order)


def test_a_state_that_leads_elsewhere_would_be_seen(monkeypatch):
    """Were it not for the sample that comes next."""
    whole = run(LONG, Lying(50), depth=0)
    monkeypatch.setattr(StreamReader, "_is_at", lambda self, place: True)
    resumed = run(LONG, Lying(50), state=whole[2].state, depth=0)
    assert shown(resumed) != shown(whole[3:])


# ----------------------------------------------------------------------------- what a place needs


@pytest.fixture
def replays(monkeypatch):
    """How often a place was found by reading the epoch again."""
    found, again = [], stream_module.same_random_numbers

    def counting():
        found.append(1)
        return again()

    monkeypatch.setattr(stream_module, "same_random_numbers", counting)
    return found


@pytest.mark.parametrize("kind", STREAMS)
def test_a_state_spares_reading_the_epoch_again_where_it_leads_to_the_place(kind, replays):
    whole = run(LONG, kind(50))
    for step in whole[:-1]:
        run(LONG, kind(50), state=step.state)
    inside = sum(not step.ends_stream for step in whole[:-1])
    assert len(replays) == (0 if kind in RESTORED else inside)


@pytest.mark.parametrize("kind", [NoJSON, Tuples])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_state_that_is_no_json_is_not_kept_and_said_so(kind, workers, caplog):
    case = LONG._replace(budget=8, growths=())
    with caplog.at_level(logging.WARNING):
        steps = run(case, kind(50), num_workers=workers)
    if workers == 0:  # a worker says so on its own
        assert caplog.text.count("The state of train_dataset is not kept") == 1
    places = [json.loads(step.state)["loader"]["source"]["places"] for step in steps]
    assert [place["state"] for [place] in places] == [None, None]


@pytest.mark.parametrize("kind", STREAMS)
@pytest.mark.parametrize("depth", [0, 3])
def test_the_users_dataset_is_not_left_at_a_place(kind, depth):
    whole = run(LONG, kind(50), depth=depth)
    for number in (0, 3, 7):
        dataset = kind(50)
        run(LONG, dataset, state=whole[number].state, depth=depth)
        assert shown(run(LONG, dataset, depth=depth)) == shown(whole)


class Delegating(IterableDataset):
    """Its state is that of the stream inside."""

    def __init__(self, inside):
        self.inside = inside

    def __iter__(self):
        yield from self.inside

    def state_dict(self):
        return self.inside.state_dict()

    def load_state_dict(self, state):
        self.inside.load_state_dict(state)


def numbers(begin, end, shards=2):
    data = datasets.Dataset.from_dict({"x": list(range(begin, end))})
    return data.to_iterable_dataset(num_shards=shards)


@pytest.mark.parametrize("options", [{}, {"num_workers": 1, "persistent_workers": True}])
def test_a_stream_inside_the_users_dataset_is_not_left_at_a_place(options):
    case = LONG._replace(growths=())
    whole = run(case, Delegating(numbers(0, 30)), **options)
    dataset = Delegating(numbers(0, 30))
    resumed = run(case, dataset, state=whole[2].state, **options)
    assert shown(resumed) == shown(whole[3:])  # the next epoch begins at its beginning
    assert shown(run(case, dataset, **options)) == shown(whole)


class Unpicklable(Stateful):
    def state_dict(self):
        return {"place": self.place, "iterator": (number for number in range(3))}


def test_a_state_that_cannot_be_copied_is_not_kept():
    """In a worker it must not be sent, or the loader waits for what never comes."""
    whole = run(LONG, Unpicklable(50))
    assert shown(whole) == expected(LONG, Stream(50).order)


class Random(Stream):
    """Another order in every object."""

    seeds = itertools.count(100)

    def __init__(self, samples):
        super().__init__(samples)
        self.seed = next(self.seeds)

    def order(self, epoch):
        return random.Random(self.seed).sample(range(self.samples), self.samples)


OTHERS = {
    "shorter": (Stream, lambda: Stream(5)),
    "other_samples": (Stream, lambda: Unaware(50)),
    "unseeded": (Random, lambda: Random(50)),
    "unseeded_buffer": (
        lambda n: numbers(0, n).shuffle(buffer_size=40),
        lambda: numbers(0, 50).shuffle(buffer_size=40),
    ),
}


def resume_some(steps, stream, **options):
    """One place may be right by chance."""
    for step in steps:
        run(LONG, stream(), state=step.state, **options)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("others", OTHERS.values(), ids=OTHERS)
def test_another_stream_is_refused(others, workers):
    first, other = others
    whole = run(LONG, first(50), num_workers=workers)
    with pytest.raises(ValueError, match=r"must be the\s+sample that was to come next") as refused:
        resume_some(whole[1:5], other, num_workers=workers)
    for text in ("train_dataset (its sample ", "in epoch 0", "a seed", "ignore_data_skip=True"):
        assert text in str(refused.value)
    assert not multiprocessing.active_children()


def test_the_epoch_may_be_begun_anew():
    whole = run(LONG, Stream(50), depth=0)
    resumed = run(LONG, Stream(50), state=whole[2].state, anew=True, depth=0)
    seen = json.loads(whole[2].state)["clock"]["samples_seen"]
    samples = [sample for step in resumed for sample in step.samples]
    assert samples[:50] == Stream(50).order(0)[: len(samples)]
    assert len(samples) == 90 - seen
    again = run(LONG, Stream(50), state=resumed[1].state, depth=0)
    assert shown(again) == shown(resumed[2:])


@pytest.mark.parametrize("workers", [0, 1])
def test_a_stream_of_nothing_is_refused(workers):
    with pytest.raises(ValueError, match=r"train_dataset \(a stream in epoch 0\) must yield"):
        run(LONG, Stream(0), num_workers=workers)


# ----------------------------------------------------------------------------- streams of datasets


def rows(begin=0, end=24, shards=4):
    data = datasets.Dataset.from_dict(
        {
            "x": list(range(begin, end)),
            "ragged": [[[1] * (i % 3 + 1), [2]] for i in range(begin, end)],
            "text": [f"{i}" for i in range(begin, end)],
            "share": [i / 3 for i in range(begin, end)],
            "gaps": [None if i % 2 else i for i in range(begin, end)],
        }
    )
    return data.to_iterable_dataset(num_shards=shards)


def _generate(shards):
    for shard in shards:
        for i in range(6):
            yield {"x": 6 * shard + i, "floats": [1.5 * i, 2.0]}


def generated():
    return datasets.IterableDataset.from_generator(_generate, gen_kwargs={"shards": [0, 1, 2, 3]})


def twice(batch):
    return {"x": [x + more for x in batch["x"] for more in (0, 100)]}


HF = {
    "rows": rows,
    "generated": generated,
    "torch": lambda: rows().with_format("torch"),
    "map": lambda: rows().map(lambda row: {"y": 2 * row["x"]}),
    "map_batches": lambda: generated().map(
        twice, batched=True, batch_size=5, remove_columns=["floats"]
    ),
    "filter": lambda: rows().filter(lambda row: row["x"] % 3 != 0),
    "interleave": lambda: datasets.interleave_datasets([rows(), rows(100, 130, 2)]),
    "interleave_by_chance": lambda: datasets.interleave_datasets(
        [rows(), rows(100, 130)], probabilities=[0.3, 0.7], seed=3
    ),
    "interleave_all": lambda: datasets.interleave_datasets(
        [rows(), rows(100, 105, 1)],
        probabilities=[0.5, 0.5],
        seed=3,
        stopping_strategy="all_exhausted",
    ),
    "concatenate": lambda: datasets.concatenate_datasets([rows(), rows(100, 110)]),
    "shuffle": lambda: rows().shuffle(seed=1, buffer_size=6),
    "shuffle_below": lambda: datasets.concatenate_datasets(
        [rows().shuffle(seed=2, buffer_size=4), rows(100, 110)]
    ),
    "take": lambda: rows().take(11),
    "skip": lambda: rows().skip(7),
    "shuffle_and_take": lambda: rows().shuffle(seed=1, buffer_size=5).take(11),
    "repeat": lambda: generated().repeat(2),
    "batches": lambda: rows().batch(3),
    "columns": lambda: rows().select_columns(["x"]).cast_column("x", datasets.Value("float32")),
    "split": lambda: split_dataset_by_node(rows(), rank=0, world_size=1),
}
SHUFFLED = [name for name in HF if "shuffle" in name]


def texts(samples):
    return [(repr(sample), digest(sample)) for sample in samples]


def two_epochs(make):
    found = []
    for epoch in (0, 1):
        dataset = make()
        dataset.set_epoch(epoch)
        found.append(texts(dataset))
    return found


@pytest.mark.parametrize("name", HF)
def test_a_stream_of_datasets_is_read_in_its_order_and_found_again(name, replays):
    make = HF[name]
    epochs = two_epochs(make)
    case = Case(micro=3, accumulation=1, growths=((2, 6),), budget=sum(map(len, epochs)))
    whole = run(case, make(), collate_fn=texts)
    assert [s for step in whole for s in step.samples] == [s for epoch in epochs for s in epoch]
    for number, step in enumerate(whole, start=1):
        resumed = run(case, make(), state=step.state, collate_fn=texts)
        assert [s[:5] for s in resumed] == [s[:5] for s in whole[number:]]
    assert bool(replays) == (name in SHUFFLED)


@pytest.mark.parametrize("name", HF)
def test_a_stream_of_datasets_is_the_same_in_a_worker(name):
    """Sample by sample; and a run goes on with more workers or fewer."""
    make = HF[name]
    epochs = two_epochs(make)
    case = Case(micro=3, accumulation=1, growths=(), budget=sum(map(len, epochs)))
    main, worker = (run(case, make(), collate_fn=texts, num_workers=n) for n in (0, 1))
    assert shown(worker) == shown(main)
    number = len(main) // 2 - 1
    for steps, workers in ((main, 1), (worker, 0)):
        state = steps[number].state
        resumed = run(case, make(), state=state, collate_fn=texts, num_workers=workers)
        assert shown(resumed) == shown(main[number + 1 :])


class Around(IterableDataset):
    """A dataset of the user's own around one of `datasets`."""

    def __init__(self, inside):
        self.inside = inside

    def set_epoch(self, epoch):
        self.inside.set_epoch(epoch)

    def __iter__(self):
        yield from self.inside


DIFFERENT_IN_A_WORKER = {
    "warning": lambda: generated().with_format("torch"),
    "numpy": lambda: rows().with_format("numpy"),
    "shuffled_tables": lambda: rows().shuffle(seed=1, buffer_size=6).with_format("arrow"),
    "shuffled_inside": lambda: Around(rows().shuffle(seed=1, buffer_size=6)),
}


@pytest.mark.parametrize("make", DIFFERENT_IN_A_WORKER.values(), ids=DIFFERENT_IN_A_WORKER)
def test_these_are_the_same_in_a_worker_too(make):
    case = Case(micro=3, accumulation=1, growths=(), budget=24)
    main, worker = (run(case, make(), collate_fn=texts, num_workers=n) for n in (0, 1))
    assert shown(worker) == shown(main)


# ------------------------------------------------------------------------------------ real workers

LOADERS = {
    "1": {"num_workers": 1},
    "3": {"num_workers": 3},
    "persistent": {"num_workers": 2, "persistent_workers": True},
}
MANY_WORKERS = pytest.mark.filterwarnings("ignore:This DataLoader will create")  # on few cores


@MANY_WORKERS
@pytest.mark.parametrize("options", LOADERS.values(), ids=LOADERS)
@pytest.mark.parametrize("kind", [Stream, Stateful, StatefulIterator])
def test_real_workers_give_the_steps_of_the_fake_fetcher_and_resume(kind, options):
    """One that reads as far ahead as all of those that were asked for."""
    whole = run(LONG, kind(30), **options)
    assert shown(whole) == expected(LONG, Stream(30).order)
    fake = run(LONG, kind(30), depth=2 * options["num_workers"])
    assert [step.sizes for step in whole] == [step.sizes for step in fake]
    for number in (1, 4, len(whole) - 2):
        resumed = run(LONG, kind(30), state=whole[number].state, **options)
        assert shown(resumed) == shown(whole[number + 1 :])
        assert [step.sizes for step in resumed] == [step.sizes for step in whole[number + 1 :]]
        fewer = run(LONG, kind(30), state=whole[number].state)
        assert shown(fewer) == shown(whole[number + 1 :])
    assert not multiprocessing.active_children()


@MANY_WORKERS
def test_there_is_one_reader_however_many_workers_are_asked_for():
    with fetching({}):
        loader, clock = build(LONG, Stream(50), num_workers=3)
        steps = steps_of(LONG, loader, clock)
        next(steps)
        assert len(multiprocessing.active_children()) == 1
        loader.close()
        del steps
    assert not multiprocessing.active_children()


def test_no_worker_outlives_a_sample_of_a_stream_that_raises():
    with pytest.raises(KeyError, match="a broken sample"):
        run(LONG, Stream(50, fails_at=Stream(50).order(0)[30]), num_workers=1)
    assert not multiprocessing.active_children()


# ------------------------------------------------------------------------------------------ digest


class Thing:
    pass


def samples_to_tell_apart():
    """No two alike; the same at every call, in every process."""
    images = []
    with contextlib.suppress(ImportError):
        from PIL import Image

        images = [Image.new("RGB", (2, 3)), Image.new("RGB", (2, 3), "red"), Image.new("L", (2, 3))]
    tensors = [
        torch.tensor([1, 2]).to(kind)
        for kind in (
            torch.int64, torch.int32, torch.uint8, torch.float32, torch.float64, torch.float16,
            torch.bfloat16, torch.bool, torch.complex64,
        )
    ]  # fmt: skip
    return [
        {}, [], (), "", b"", None, 0, 1, True, 0.0, -0.0, 1.5, "0", "None", "é", "\ud800", Thing(),
        [1, 2], (1, 2), [2, 1], [[1], [2, 3]], [[1, 2], [3]], [1.0, 2.0], [True, 2], [None, 1],
        {"a": 1}, {"a": 2}, {"b": 1}, {1: 1}, {"a": [1]}, {"a": {"b": 1}}, {"a": None},
        {"a": "1"}, {"a": 1, "b": 2}, {"input_ids": [1, 2, 3], "labels": [1, 2, 4]},
        *tensors, torch.tensor(1), torch.tensor(2), torch.empty(0), torch.empty(0, 3),
        torch.tensor([[1, 2]]), torch.tensor([[1], [2]]), torch.tensor([2, 1]),
        np.array([1, 2]), np.array([2, 1]), np.float32(1), np.float64(1), np.int64(1),
        np.array(1), np.str_("a"), np.array(["a", "b"]), *images,
    ]  # fmt: skip


def test_samples_are_told_apart():
    found = [digest(sample) for sample in samples_to_tell_apart()]
    samples = samples_to_tell_apart()
    alike = [
        (a, b)
        for (a, one), (b, other) in itertools.combinations(zip(samples, found, strict=True), 2)
        if one == other
    ]
    assert not alike
    assert all(0 <= value < 2**48 and float(value) == value for value in found)


@pytest.mark.slow  # imports all this again
def test_a_digest_is_the_same_in_every_process():
    code = "from tests.test_streams import *; print([digest(s) for s in samples_to_tell_apart()])"
    found = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[1],
        env={**os.environ, "PYTHONHASHSEED": "7"},
    )
    assert json.loads(found.stdout) == [digest(sample) for sample in samples_to_tell_apart()]


def test_a_digest_looks_at_values_and_not_at_how_they_are_kept():
    rows = torch.arange(6).reshape(2, 3)
    assert digest(rows.t()) == digest(rows.t().contiguous())
    assert digest(rows.float().requires_grad_()) == digest(rows.float())
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})


PAIRS = {
    "floats": ([1.0, 23.0], [1.02, 3.0]),
    "mappings": ({"a": {}, "b": 1}, {"a": {"b": 1}}),
    "shapes_of_arrays": (np.zeros((2, 3)), np.zeros((3, 2))),
    "types_of_arrays": (np.zeros(2), np.zeros(2, dtype=np.int64)),
    "dates": (datetime.date(2020, 1, 1), datetime.date(2021, 1, 1)),
    "decimals": (decimal.Decimal(1), decimal.Decimal(2)),
    "sets": ({1}, {2}),
    "bytearrays": (bytearray(b"a"), bytearray(b"b")),
}


@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)
def test_these_samples_are_told_apart_too(pair):
    assert digest(pair[0]) != digest(pair[1])


def ragged():
    return np.array([np.arange(2), np.arange(3)], dtype=object)


NO_DIGEST = {
    "ragged": ragged,
    "conjugate": lambda: torch.ones(2, dtype=torch.complex64).conj(),
    "sparse": lambda: torch.eye(3).to_sparse(),
}


@pytest.mark.parametrize("make", NO_DIGEST.values(), ids=NO_DIGEST)
def test_these_samples_have_a_digest_too(make):
    """with_format("numpy") makes such arrays of lists of different lengths."""
    kept = make()
    try:
        found = digest(kept), digest(make())
    except RuntimeError as error:
        raise AssertionError from error
    assert found[0] == found[1]


# ------------------------------------------------------------------------------------------- clock


@given(
    micro=st.integers(1, 6),
    accumulation=st.integers(1, 4),
    steps_per_epoch=st.integers(1, 20),
    missing=st.integers(0, 5),
    max_steps=st.integers(1, 60),
)
def test_the_clock_counts_a_stream_as_the_plain_trainer_does(
    micro, accumulation, steps_per_epoch, missing, max_steps
):
    """Where an epoch does not end within an accumulation, which the plain Trainer carries over.

    `epoch` is whole at an epoch's end, where the plain Trainer knows only the whole budget.
    """
    batch = micro * accumulation
    length = steps_per_epoch * batch - min(missing, micro - 1)
    clock = Case(micro=micro, accumulation=accumulation, kind="steps", budget=max_steps).clock()
    assert clock.total_initial_steps == clock.initial_steps_per_epoch == max_steps
    steps_in_epoch = max_steps * accumulation  # of the Trainer, for a loader without a length
    for step in range(max_steps):
        assert not clock.finished
        epoch, index = divmod(step, steps_per_epoch)
        left = length - clock.epoch_offset
        ends = index == steps_per_epoch - 1
        assert (left <= batch) == ends
        samples = min(batch, left)
        assert clock.epoch_limit - clock.epoch_offset >= samples
        assert clock.remaining_steps(batch) == max_steps - step
        clock.advance(samples=samples, tokens=0, ends_stream=ends)
        assert clock.initial_steps == clock.steps == step + 1
        assert clock.epoch == (
            epoch + 1 if ends else epoch + accumulation * (index + 1) / steps_in_epoch
        )
    assert clock.finished


@given(cases(), st.integers(1, 8))
@settings(max_examples=50)
def test_the_clock_of_a_stream_goes_on_from_its_state(drawn, factor):
    """Also at another initial size, of which steps are then counted."""
    case, length = drawn
    whole = run(case, Stream(length), depth=0)
    for step in whole:
        state = json.loads(step.state)["clock"]
        clock = case.clock()
        clock.load_state_dict(state)
        assert clock.state_dict() == state
        if case.kind == "samples":
            assert clock.finished == (clock.samples_seen == case.budget)
        wider = case._replace(accumulation=case.accumulation * factor).clock()
        wider.load_state_dict(state)
        past = wider.epoch_index * math.ceil(length / wider.initial_global_batch_size)
        assert wider.epochs_initial_steps == past
