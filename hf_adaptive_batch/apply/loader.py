"""A loader whose item is one optimizer step, and whose batch size may change at every step."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch.utils.data import DataLoader, default_collate

from ..ranks import Ranks
from .clock import TrainingClock
from .plan import BatchPlan
from .sampler import StepSampler
from .sources import MapSource, Part, StreamSource
from .step import StepBatch
from .stream import CollateRound


_STATE_VERSION = 2


class StepLoader:
    """Iterates over the optimizer steps of one epoch; the plan may change between any two.

    Workers fetch and collate micro-batches ahead. Those that wait when the plan changes are used in
    the next steps, so that the global batch changes at once, nothing is dropped and no worker
    restarts; only the micro-batch size follows later. Where an epoch begins, and how much of it
    there is, is read from the clock; iterating again goes on with the next sample.

    Args:
        source: Where the samples come from.
        plan: The first plan.
        clock: The progress that is committed; the loader only reads it.
        measures: Whether a step, by its number from 1, is measured.
        loader_options: Further arguments of the torch `DataLoader` that fetches micro-batches.
        ranks: Who trains on the same steps. They must iterate alike.
        count_tokens: Tokens of a micro-batch that are not padding.
    """

    def __init__(
        self,
        source: MapSource | StreamSource,
        plan: BatchPlan,
        clock: TrainingClock,
        measures: Callable[[int], bool],
        loader_options: Mapping[str, Any],
        *,
        ranks: Ranks | None = None,
        count_tokens: Callable[[Any], int] | None = None,
    ) -> None:
        self.source = source
        self.sampler = StepSampler(plan, measures)
        self._clock = clock
        self._ranks = ranks or Ranks()
        self._count_tokens = count_tokens
        self._restored_pending: list[int] | None = None
        options = dict(loader_options)
        if source.is_stream and options.get("num_workers", 0) > 1:
            # One reads in order; a second would read the same again. It may run as far ahead.
            factor = options.get("prefetch_factor") or 2
            options["prefetch_factor"] = factor * options["num_workers"]
            options["num_workers"] = 1
        if source.is_stream:
            options["collate_fn"] = CollateRound(options.get("collate_fn", default_collate))
        self._loader: DataLoader[Any] | None = DataLoader(
            source.dataset, batch_sampler=self.sampler, **options
        )
        self._micro_batches: Iterator[Any] | None = None

    @property
    def dataset(self) -> Any:
        """What the torch DataLoader fetches from."""
        return self.source.dataset

    @property
    def plan(self) -> BatchPlan:
        """The plan in force."""
        return self.sampler.plan

    def set_plan(self, plan: BatchPlan) -> None:
        """Cut all steps from the next one on by another plan.

        Args:
            plan: The new plan.
        """
        self.sampler.plan = plan

    def __len__(self) -> int:
        """Steps that the current epoch takes with the plan in force, those done not counted.

        Returns:
            Optimizer steps.

        Raises:
            TypeError: For a stream.
        """
        if self.source.is_stream:
            raise TypeError("A stream has no length.")
        left = self._clock.epoch_limit - self._clock.epoch_offset
        return -(-left // self.plan.global_batch_size)

    def __iter__(self) -> Iterator[StepBatch]:
        """Yield the steps from where the clock stands to the end of its epoch or budget.

        Yields:
            One optimizer step.

        Raises:
            RuntimeError: If the loader was closed.
        """
        if self._loader is None:
            raise RuntimeError(
                "This loader was closed when its training ended; call train() again."
            )
        clock, sampler, source = self._clock, self.sampler, self.source
        pending, self._restored_pending = self._restored_pending, None
        # Making an iterator draws the workers' seed from torch's generator, once per epoch, or once
        # per run if workers persist. Where the uninterrupted run did not draw, a resumed one must
        # not either, so that its dropout finds the generator as it was. What the order draws stays.
        drawn = clock.epoch_offset > 0 or (
            clock.epoch_index > 0 and self._loader.persistent_workers
        )
        source.begin()
        fetch = source.open_epoch() if drawn else None
        sampler.begin(
            source.open_epoch if fetch is None else lambda: fetch,
            # Parts of a split stream end unevenly: what is asked for is not what comes.
            sys.maxsize if source.split else clock.epoch_limit,
            boundary=clock.epoch_offset,
            steps=clock.steps,
            pending=pending,
        )
        persistent = self._loader.persistent_workers
        with torch.random.fork_rng(devices=[]) if drawn else nullcontext():
            self._micro_batches = micro_batches = iter(self._loader)
        try:
            yield from self._steps(micro_batches, persistent=persistent)
        finally:
            if not persistent:
                _shut_down(micro_batches)

    def _steps(self, micro_batches: Iterator[Any], *, persistent: bool) -> Iterator[StepBatch]:
        clock, sampler, source = self._clock, self.sampler, self.source
        ended = False
        while sampler.boundary < sampler.limit and not ended and not clock.finished:
            plan = self._plan_of_next_step()
            size = min(plan.global_batch_size, sampler.limit - sampler.boundary)
            if clock.remaining_samples is not None:
                size = min(size, clock.remaining_samples)
            asked, parts = 0, list[Part]()
            # A shared stream ends for all ranks alike; what was asked for beyond is empty.
            while asked < size and not (ended and not source.split):
                if parts and asked + (sampler.next_round or 0) > size:
                    break  # cut for a larger batch: the step ends early rather than exceed its plan
                item, cut = next(micro_batches), sampler.pending.popleft()
                asked += cut
                parts.append(source.part(item, cut))
                ended = source.is_stream and parts[-1].following is None
            sampler.hand_over(asked)
            step = self._agreed(parts, plan)
            ended = step.ends_stream
            left = clock.remaining_samples
            step.ends_epoch = (
                ended
                or sampler.boundary >= sampler.limit
                or (left is not None and step.global_samples >= left)
            )
            if step.ends_epoch and not persistent:
                _shut_down(micro_batches)  # the workers have nothing left to fetch
            yield step

    def close(self) -> None:
        """Let the worker processes go at once; the loader cannot be iterated afterwards."""
        _shut_down(self._micro_batches)
        self._micro_batches = self._loader = None
        self.source.close()

    def state_dict(self) -> dict[str, Any]:
        """What the clock does not tell of the place in the data, as plain JSON.

        Valid between two steps: when the step that was handed out has reached the optimizer. To be
        called on all ranks.

        Returns:
            Rounds that were fetched ahead, and the place in the source.
        """
        # What was asked of a stream beyond the end of its epoch is not asked of the next one.
        pending = self.sampler.waiting if self._clock.epoch_offset else []
        if self._restored_pending is not None:  # resumed, and not gone on yet
            pending = self._restored_pending
        return {
            "version": _STATE_VERSION,
            "pending": pending,
            "source": self.source.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken; the clock must be restored as well.

        Args:
            state: A dictionary from `state_dict`.

        Raises:
            ValueError: If the state has another version.
        """
        if state.get("version") != _STATE_VERSION:
            raise ValueError(
                f"version ({state.get('version')}) of the loader state must be {_STATE_VERSION}, "
                "because its fields are read by name; resume with the release that wrote it."
            )
        self._restored_pending = state["pending"]
        self.source.load_state_dict(state["source"])

    def _plan_of_next_step(self) -> BatchPlan:
        """The plan in force; or, if a larger round waits than it allows for, that round alone."""
        plan, waiting = self.plan, self.sampler.next_round
        if waiting is None or waiting <= plan.global_batch_size:
            return plan
        ranks = plan.data_parallel_size
        return BatchPlan(micro_batch_size=-(-waiting // ranks), data_parallel_size=ranks)

    def _agreed(self, parts: list[Part], plan: BatchPlan) -> StepBatch:
        """The step, as all ranks know it: they exchange what each of them read.

        Returns:
            The step, with no part that is empty on all ranks.

        Raises:
            ValueError: If they did not read the same stream, or there is nothing in it.
        """
        source = self.source
        sizes = [part.size for part in parts]
        tokens = 0
        if self._count_tokens is not None:
            tokens = sum(self._count_tokens(part.batch) for part in parts if part.size)
        batches, reads = [part.batch for part in parts], [part.read for part in parts]
        if not source.is_stream:  # cut alike on all ranks, and nothing to find out
            return StepBatch(batches, sizes, plan, global_samples=sum(reads), tokens=tokens)
        following, ranks = parts[-1].following, self._ranks
        missing, goes_on = any(part.batch is None for part in parts), following is not None
        if source.split:  # only of this do ranks read differently, and as many parts then
            told = ranks.total(missing, goes_on, *reads)
            missing, goes_on = told[0] > 0, told[1] > 0
            reads = [round(read / ranks.copies) for read in told[2:]]
        else:
            read_here = (-1 if following is None else following, sum(reads), len(reads), missing)
            if not ranks.alike(*read_here):
                rows = ranks.gather(*read_here)
                other = next((i for i, row in enumerate(rows) if row != rows[0]), 0)
                missing = any(row[3] for row in rows)
                if not missing:
                    raise ValueError(
                        f"train_dataset (a stream) must be the same on all ranks, but rank {other} "
                        "read other samples than rank 0, because of a shuffle() without a seed or "
                        "a stream that was split by hand; give it a seed, or split it by "
                        "datasets.distributed.split_dataset_by_node."
                    )
        if missing or not sum(reads):
            raise ValueError(
                f"train_dataset (a stream in epoch {self._clock.epoch_index}) must yield at least "
                "one sample in every epoch, for every rank, because there is nothing to train on; "
                "check what it is made of, whether it can be iterated again, and into how many "
                "parts it is split."
            )
        count = max(i for i, read in enumerate(reads, start=1) if read)
        return StepBatch(  # of what any rank had a sample for
            batches[:count],
            sizes[:count],
            plan,
            ends_stream=not goes_on,
            global_samples=sum(reads),
            tokens=tokens,
        )


def _shut_down(micro_batches: Any) -> None:
    # An exception's traceback may hold the iterator, and with it the workers, for as long as it is
    # looked at; torch offers no public way to end them.
    shut_down = getattr(micro_batches, "_shutdown_workers", None)
    if shut_down is not None:
        shut_down()
