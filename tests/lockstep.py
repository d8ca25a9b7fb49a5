"""Several ranks in one process, a thread each, that train on steps as the Trainer does.

What is under test is the real `StepLoader`; only the collectives are replaced, and in most examples
the DataLoader, by one that reads ahead as far as it is told: all that workers do to the order.
"""

from __future__ import annotations

import json
import threading
from array import array
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch.utils.data import IterableDataset

from hf_adaptive_batch import BatchPlan, StepLoader, TrainingClock
from hf_adaptive_batch.apply import loader as loader_module
from hf_adaptive_batch.apply.sampler import EpochOrder
from hf_adaptive_batch.apply.sources import MapSource, StreamSource
from hf_adaptive_batch.apply.stream import StreamReader
from hf_adaptive_batch.ranks import Ranks

from .test_loader import Numbers, Shuffled


# ------------------------------------------------------------------------------- ranks as threads


class Meeting:
    """Where ranks exchange what they have to say; none waits for one that has failed."""

    def __init__(self, size: int) -> None:
        self.said: list[Any] = [None] * size
        self.barrier = threading.Barrier(size, timeout=60)
        self.left = 2_000  # exchanges: more than any example needs

    def exchange(self, rank: int, mine: Any) -> list[Any]:
        self.said[rank] = mine
        if self.barrier.wait() == 0:
            self.left -= 1
        assert self.left > 0, "the ranks talk and talk, and never come to an end"
        said = list(self.said)
        self.barrier.wait()
        return said


@dataclass(frozen=True)
class ThreadRanks(Ranks):
    """Ranks whose collectives need no process group, and refuse what gloo would choke on."""

    meeting: Meeting | None = None

    def gather(self, *numbers: float) -> list[list[float]]:
        return self._alike([float(number) for number in numbers])

    def total(self, *numbers: float) -> list[float]:
        return [sum(column) for column in zip(*self.gather(*numbers), strict=True)]

    def alike(self, *numbers: float) -> bool:
        rows = self.gather(*numbers)
        return all(row == rows[0] for row in rows)

    def gather_objects(self, mine: Any) -> list[Any]:
        return [json.loads(text) for text in self._exchange(json.dumps(mine))]

    def of_first(self, numbers: array[int]) -> array[int]:
        return array("q", self._alike(numbers)[0])

    def _exchange(self, mine: Any) -> list[Any]:
        assert self.meeting is not None
        return self.meeting.exchange(self.rank, mine)

    def _alike(self, mine: Any) -> list[Any]:
        rows = self._exchange(mine)
        assert len({len(row) for row in rows}) == 1, "ranks send tensors of different lengths"
        return rows


def on_ranks(size: int, work: Callable[[Ranks], Any]) -> list[Any]:
    """What `work` returns on each rank; the first error of any of them is raised."""
    meeting, results, errors = Meeting(size), [None] * size, []

    def one(rank: int) -> None:
        try:
            results[rank] = work(ThreadRanks(rank, size, "cpu", meeting=meeting))
        except BaseException as error:
            errors.append(error)
            meeting.barrier.abort()

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    others = [e for e in errors if not isinstance(e, threading.BrokenBarrierError)]
    for error in others or errors:
        raise error
    return results


# ------------------------------------------------------------------------------------------- data


class Flow(IterableDataset):
    """A stream of the numbers from `first` on, in an order of the epoch's own."""

    def __init__(self, samples: int, first: int = 0) -> None:
        self.samples, self.first, self.epoch = samples, first, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def order(self, epoch: int) -> list[int]:
        sampler = Shuffled(self.samples, seed=self.first)
        sampler.set_epoch(epoch)
        return [self.first + number for number in sampler]

    def __iter__(self):
        yield from self.order(self.epoch)


class FlowWithState(Flow):
    """Goes on where its state says, as a stream of `datasets` does."""

    begin = done = 0

    def state_dict(self) -> dict[str, int]:
        return {"done": self.done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.begin = state["done"]

    def __iter__(self):
        self.done, self.begin = self.begin, 0
        for sample in self.order(self.epoch)[self.done :]:
            self.done += 1
            yield sample


class ReadingAhead:
    """Stands for a DataLoader with workers: always holds `depth` micro-batches ahead."""

    persistent_workers = False

    def __init__(self, dataset, batch_sampler, depth, collate_fn):
        self.dataset, self.batch_sampler = dataset, batch_sampler
        self.depth, self.collate_fn = depth, collate_fn

    def __iter__(self):
        return _Ahead(self, iter(self.batch_sampler))


class _Ahead:
    def __init__(self, loader, requests):
        self.loader, self.requests, self.queue = loader, requests, deque()
        for _ in range(loader.depth):
            self._fetch()

    def _fetch(self):
        for request in self.requests:
            dataset = self.loader.dataset
            if hasattr(dataset, "__getitems__"):
                found = dataset.__getitems__(request)
            else:
                found = [dataset[index] for index in request]
            self.queue.append(self.loader.collate_fn(found))
            return

    def __next__(self):
        self._fetch()
        if not self.queue:
            raise StopIteration
        return self.queue.popleft()


def collate(numbers):
    return {"x": torch.tensor(numbers)}


# ------------------------------------------------------------------------------------------- runs


class Case(NamedTuple):
    """A run on any number of ranks that divides `unit`, with the same plans in samples.

    `unit` is the first round over all ranks; `growths` are the sizes wished from a step on; `parts`
    are the lengths of a stream that was split beforehand, one part for each rank.
    """

    samples: int
    unit: int
    accumulation: int = 1
    doublings: int = 0
    growths: tuple[tuple[int, int], ...] = ()
    budget: int = 1
    kind: str = "map"  # or "stream", "stream_with_state", "parts", "parts_with_state"
    parts: tuple[int, ...] = ()
    dropped: int = 0

    @property
    def epoch_samples(self) -> int:
        return self.samples - self.dropped

    def plan(self, size: int, ranks: int) -> BatchPlan:
        micro = self.unit // ranks
        return BatchPlan.nearest(
            size,
            micro_batch_size=micro,
            max_micro_batch_size=micro * 2**self.doublings,
            data_parallel_size=ranks,
        )

    def first(self, ranks: int) -> BatchPlan:
        return BatchPlan(
            micro_batch_size=self.unit // ranks,
            accumulation_steps=self.accumulation,
            data_parallel_size=ranks,
        )

    def largest_micro(self, ranks: int) -> int:
        return self.unit // ranks * 2**self.doublings

    def datasets(self) -> list[Flow]:
        kind = FlowWithState if self.kind.endswith("with_state") else Flow
        firsts = [sum(self.parts[:i]) for i in range(len(self.parts))]
        pairs = zip(self.parts, firsts, strict=True)
        return [kind(*pair) for pair in pairs] or [kind(self.samples)]

    def order(self, epoch: int) -> list[int]:
        """Of a whole dataset: the samples of an epoch as a single process reads them."""
        return Flow(self.samples).order(epoch)[: self.epoch_samples]


class RankStep(NamedTuple):
    """A step as one rank sees it."""

    samples: list[list[int]]  # of each micro-batch, those that count
    lengths: list[int]  # of each micro-batch, with one that only stands in
    planned: BatchPlan
    global_samples: int
    ends_epoch: bool
    state: str  # after it, as JSON


class Step(NamedTuple):
    """A step over all ranks."""

    rounds: list[list[list[int]]]  # [round][rank] -> samples that count
    by_rank: list[RankStep]

    @property
    def samples(self) -> list[int]:
        return [i for parts in self.rounds for part in parts for i in part]

    @property
    def planned(self) -> int:
        return self.by_rank[0].planned.global_batch_size

    @property
    def state(self) -> str:
        return self.by_rank[0].state


def build(case: Case, ranks: Ranks, options: dict[str, Any], *, dataset: Any = None):
    stream = case.kind != "map"
    clock = TrainingClock(
        epoch_samples=None if stream else case.epoch_samples,
        initial_global_batch_size=case.unit * case.accumulation,
        initial_round_size=case.unit,
        budget_samples=case.budget,
    )
    if stream:
        split = case.kind.startswith("parts")
        dataset = dataset or case.datasets()[ranks.rank if split else 0]
        source = StreamSource(StreamReader(dataset, ranks, split=split), clock, ranks, split=split)
    else:
        dataset = dataset or Numbers(case.samples)
        source = MapSource(dataset, EpochOrder(Shuffled(case.samples)), clock, ranks)
    options = {"collate_fn": collate, **options}
    loader = StepLoader(
        source, case.first(ranks.size), clock, lambda step: True, options, ranks=ranks
    )
    return loader, clock


def train(
    case: Case, loader: StepLoader, clock: TrainingClock, ranks: int, epochs: int | None = None
) -> list[RankStep]:
    """To the end of the budget as the Trainer does: hand out, decide, commit."""
    done = []
    while not clock.finished and clock.epoch_index != epochs:
        for batch in loader:
            for at, size in case.growths:
                if at == clock.steps + 1:
                    loader.set_plan(case.plan(size, ranks))
            clock.advance(samples=batch.global_samples, tokens=0, ends_stream=batch.ends_stream)
            state = {"clock": clock.state_dict(), "loader": loader.state_dict()}
            state |= {"size": loader.plan.global_batch_size, "ranks": ranks}
            parts = [part["x"].tolist() for part in batch.micro_batches]
            done.append(
                RankStep(
                    [part[:size] for part, size in zip(parts, batch.sizes, strict=True)],
                    [len(part) for part in parts],
                    batch.plan,
                    batch.global_samples,
                    batch.ends_epoch,
                    json.dumps(state),
                )
            )
    return done


def run(
    case: Case,
    size: int,
    depth: int = 0,
    *,
    state: str | None = None,
    epochs: int | None = None,
    options: dict[str, Any] | None = None,
    dataset_of: Callable[[int], Any] = lambda rank: None,
) -> list[Step]:
    """A run, or the rest of one, on so many ranks that read so far ahead (or on real workers)."""

    def one(ranks: Ranks) -> list[RankStep]:
        given = {"depth": depth} if options is None else options
        loader, clock = build(case, ranks, given, dataset=dataset_of(ranks.rank))
        try:
            if state is not None:
                restore(case, loader, clock, json.loads(state), size)
            return train(case, loader, clock, size, epochs)
        finally:
            loader.close()

    with pytest.MonkeyPatch.context() as patch:
        if options is None:
            patch.setattr(loader_module, "DataLoader", ReadingAhead)
        by_rank = on_ranks(size, one)
    steps = zip(*by_rank, strict=True)  # every rank has as many
    return [
        Step([list(part) for part in zip(*(s.samples for s in step), strict=True)], list(step))
        for step in steps
    ]


def restore(case: Case, loader: StepLoader, clock: TrainingClock, state: Any, ranks: int) -> None:
    """As a checkpoint is loaded: what was read ahead was cut for the ranks of then."""
    clock.load_state_dict(state["clock"])
    if state["ranks"] != ranks:
        state["loader"]["pending"] = []
    loader.load_state_dict(state["loader"])
    first = case.first(ranks)
    same = state["size"] == first.global_batch_size
    loader.set_plan(first if same else case.plan(state["size"], ranks))
