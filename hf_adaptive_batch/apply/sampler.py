"""The epoch's order, cut into micro-batches so that prefetched ones fit the steps to come.

Example: 14 samples, steps of 4 in micro-batches of 2. After the first step the plan becomes 8 in
micro-batches of 4, while three micro-batches of the old size wait in the workers' queue:

    order   0 1 | 2 3 | 4 5 | 6 7 | 8 9 | 10 11 | 12 13
    cut     [2]   [2]   [2]   [2]   [2]   [2]     [2]
    step    1-------1   2-------------------2     3-3

Step 2 has its 8 samples at once, nothing that was queued is dropped, and no step exceeds its plan.
"""

from __future__ import annotations

import base64
from array import array
from collections import deque
from collections.abc import Callable, Iterator
from hashlib import sha256
from typing import Any

import torch
from torch.utils.data import Sampler

from .plan import BatchPlan


class EpochOrder:
    """The order of each epoch, from any sampler of the dataset, so that it can be had again.

    Args:
        sampler: Yields indices of the dataset, once per iteration. One with `set_epoch` is a
            function of the epoch; one without is iterated afresh in every epoch, as a DataLoader
            does.
    """

    def __init__(self, sampler: Sampler[int]) -> None:
        self._sampler = sampler

    def of(self, epoch: int) -> tuple[array[int], str | None]:
        """The order of an epoch that begins now.

        Args:
            epoch: The epoch, from 0.

        Returns:
            The indices, and what `again` needs beside the epoch: the state of torch's random
            generator before, as text, if the sampler drew from it.
        """
        if hasattr(self._sampler, "set_epoch"):
            self._sampler.set_epoch(epoch)
        before = torch.get_rng_state()
        order = array("q", self._sampler)
        drew = not torch.equal(before, torch.get_rng_state())
        return order, _to_text(before) if drew else None

    def skip(self, epochs: int) -> None:
        """Bring a fresh sampler to where it stands after so many epochs.

        Args:
            epochs: Epochs that an earlier run began and ended.
        """
        if not hasattr(self._sampler, "set_epoch"):
            with torch.random.fork_rng(devices=[]):
                for _ in range(epochs):  # moves on a random generator of the sampler's own
                    deque(self._sampler, maxlen=0)

    def again(self, epoch: int, rng_state: str | None) -> array[int]:
        """The order of an epoch that an earlier run began; leaves torch's generator untouched.

        Args:
            epoch: The epoch, from 0.
            rng_state: What `of` returned beside the order.

        Returns:
            The indices.
        """
        with torch.random.fork_rng(devices=[]):
            if rng_state is not None:
                torch.set_rng_state(_from_text(rng_state))
            return self.of(epoch)[0]


def fingerprint(order: array[int]) -> str:
    """A short name of an order, to tell another dataset, seed or sampler on resume."""
    return sha256(order.tobytes()).hexdigest()[:16]


class StepSampler(Sampler[Any]):
    """Yields what to fetch for each micro-batch, in the epoch's order, cut for the plan in force.

    One item is this rank's share of a round: of the micro-batches that all ranks train on at the
    same time, which together are a contiguous range of the epoch. Every rank cuts alike.

    A loader may fetch ahead as it likes. `boundary` is where the steps handed to training end;
    `pending` are the rounds that were cut beyond it. Every cut falls on the grid of rounds counted
    from a step's beginning. As a larger micro-batch is always a multiple of a smaller one, so is
    every larger step, and its end meets a cut however much was fetched ahead. Only when the batch
    shrinks do rounds wait that are too large.

    Args:
        plan: The plan in force.
        measures: Whether a step, by its number from 1, is measured; then a step that would be a
            single micro-batch on a single rank is cut in two, because one gradient says nothing of
            its noise.
    """

    def __init__(self, plan: BatchPlan, measures: Callable[[int], bool]) -> None:
        self.plan = plan
        self._measures = measures
        self.boundary = 0
        self.limit = 0
        self.steps = 0
        self.pending: deque[int] = deque()
        self._open: Callable[[], Callable[[int, int], Any]] = lambda: lambda begin, size: []
        self._emitted = 0
        self._replay: deque[int] = deque()

    def begin(
        self,
        open_epoch: Callable[[], Callable[[int, int], Any]],
        limit: int,
        *,
        boundary: int = 0,
        steps: int = 0,
        pending: list[int] | None = None,
    ) -> None:
        """Start cutting an epoch.

        Args:
            open_epoch: Gives the function that says what to fetch for the round of so many samples
                that begins at a position. Called at the first cut, because a DataLoader too draws
                its workers' seed before its sampler begins.
            limit: Where to end, in samples of the epoch.
            boundary: Samples of the epoch that were trained on already.
            steps: Optimizer steps done so far in the run.
            pending: Rounds to cut first: those that an interrupted run had fetched ahead.
        """
        self._open, self.limit = open_epoch, limit
        self.boundary = self._emitted = boundary
        self.steps = steps
        self.pending.clear()
        self._replay = deque(pending or ())

    def __iter__(self) -> Iterator[Any]:
        """Yield what to fetch until the limit."""
        fetch = self._open()
        while self._emitted < self.limit:
            begin = self._emitted
            size = min(
                self._replay.popleft() if self._replay else self._next_cut(), self.limit - begin
            )
            self._emitted += size
            self.pending.append(size)
            yield fetch(begin, size)

    @property
    def waiting(self) -> list[int]:
        """Rounds that were cut and not handed over, those of an interrupted run included."""
        return [*self.pending, *self._replay]

    @property
    def next_round(self) -> int | None:
        """Samples of the round that comes next, if it was cut before."""
        waiting = self.pending or self._replay
        return min(waiting[0], self.limit - self.boundary) if waiting else None

    def hand_over(self, samples: int) -> None:
        """Move the boundary behind a step that was handed to training.

        Args:
            samples: Of its rounds, taken from `pending`.
        """
        self.boundary += samples
        self.steps += 1

    def _next_cut(self) -> int:
        """The size of the next round: to the next line of the grid, or to the step's end."""
        plan = self.plan
        size, round_size = plan.global_batch_size, plan.micro_batch_size * plan.data_parallel_size
        ahead, inside = divmod(self._emitted - self.boundary, size)
        step_begin = self._emitted - inside
        step_size = min(size, self.limit - step_begin)
        alone = plan.data_parallel_size == 1 and 1 < step_size <= round_size
        if alone and self._measures(self.steps + ahead + 1):
            round_size = -(-step_size // 2)
        return min(round_size - inside % round_size, step_size - inside)


def _to_text(state: torch.Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode("ascii")


def _from_text(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
