"""A loader whose item is one optimizer step, and whose batch size may change at every step."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from .clock import TrainingClock
from .plan import BatchPlan
from .sampler import EpochOrder, StepSampler, fingerprint


_STATE_VERSION = 1


class StepBatch(Mapping[str, Any]):
    """The micro-batches of one optimizer step.

    To code that only counts (tokens, floating-point operations) it looks like one flat batch: a
    mapping whose tensors are the micro-batches' tensors, concatenated.

    Attributes:
        micro_batches: What the collator made, in order.
        sizes: Samples of each micro-batch on this rank.
        ends_epoch: Whether no sample of the epoch, or of the budget, is left behind this step.
    """

    def __init__(self, micro_batches: list[Any], sizes: list[int], *, ends_epoch: bool) -> None:
        self.micro_batches = micro_batches
        self.sizes = sizes
        self.ends_epoch = ends_epoch

    @property
    def samples(self) -> int:
        """Samples of the step on this rank."""
        return sum(self.sizes)

    def __getitem__(self, key: str) -> Any:
        """The micro-batches' values for `key`, tensors joined into one."""
        values = [micro_batch[key] for micro_batch in self.micro_batches]
        if not all(isinstance(value, torch.Tensor) for value in values):
            return values
        if len({value.shape[1:] for value in values}) == 1 and values[0].dim() > 0:
            return torch.cat(values)
        return torch.cat([value.reshape(-1) for value in values])  # padded to different lengths

    def __contains__(self, key: object) -> bool:
        """Whether the collator makes it."""
        return key in self.micro_batches[0]

    def __iter__(self) -> Iterator[str]:
        """The collator's keys."""
        return iter(self.micro_batches[0])

    def __len__(self) -> int:
        """How many keys there are."""
        return len(self.micro_batches[0])


class StepLoader:
    """Iterates over the optimizer steps of one epoch; the plan may change between any two.

    Workers fetch and collate micro-batches ahead. Those that wait when the plan changes are used in
    the next steps, so that the global batch changes at once, nothing is dropped and no worker
    restarts; only the micro-batch size follows later. Where an epoch begins, and how much of it
    there is, is read from the clock; iterating again goes on with the next sample.

    Args:
        dataset: Map-style dataset.
        order: The epochs' order.
        plan: The first plan.
        clock: The progress that is committed; the loader only reads it.
        measures: Whether a step, by its number from 1, is measured.
        loader_options: Further arguments of the torch `DataLoader` that fetches micro-batches.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        order: EpochOrder,
        plan: BatchPlan,
        clock: TrainingClock,
        measures: Callable[[int], bool],
        loader_options: Mapping[str, Any],
    ) -> None:
        self.dataset = dataset
        self.sampler = StepSampler(plan, measures)
        self._order = order
        self._clock = clock
        self._epoch: _Epoch | None = None
        self._restored: dict[str, Any] | None = None
        self._loader: DataLoader[Any] | None = DataLoader(
            dataset, batch_sampler=self.sampler, **loader_options
        )
        self._micro_batches: Iterator[Any] | None = None

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
        """Steps that the current epoch takes with the plan in force, those done not counted."""
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
        clock, sampler = self._clock, self.sampler
        pending = self._restored["pending"] if self._restored is not None else None
        sampler.begin(
            self._order_of_epoch,
            clock.epoch_limit,
            boundary=clock.epoch_offset,
            steps=clock.steps,
            pending=pending,
        )
        if hasattr(self.dataset, "set_epoch"):  # as accelerate's loader does
            self.dataset.set_epoch(clock.epoch_index)
        # Making an iterator draws the workers' seed from torch's generator, once per epoch, or once
        # per run if workers persist. Where the uninterrupted run did not draw, a resumed one must
        # not either, so that its dropout finds the generator as it was.
        drawn = clock.epoch_offset > 0 or (
            clock.epoch_index > 0 and self._loader.persistent_workers
        )
        with torch.random.fork_rng(devices=[]) if drawn else nullcontext():
            self._micro_batches = iter(self._loader)
        while sampler.boundary < sampler.limit:
            size = min(sampler.plan.global_batch_size, sampler.limit - sampler.boundary)
            micro_batches: list[Any] = []
            sizes: list[int] = []
            while sum(sizes) < size:
                micro_batches.append(next(self._micro_batches))
                sizes.append(sampler.pending.popleft())
            sampler.hand_over(sizes)
            yield StepBatch(micro_batches, sizes, ends_epoch=sampler.boundary >= sampler.limit)

    def close(self) -> None:
        """Let the worker processes go at once; the loader cannot be iterated afterwards."""
        # An exception's traceback may hold the iterator, and with it the workers, for as long as it
        # is looked at; torch offers no public way to end them.
        shut_down = getattr(self._micro_batches, "_shutdown_workers", None)
        if shut_down is not None:
            shut_down()
        self._micro_batches = self._loader = None

    def state_dict(self) -> dict[str, Any]:
        """What the clock does not tell of the place in the data, as plain JSON.

        Valid between two steps: when the step that was handed out has reached the optimizer.

        Returns:
            Sizes that were fetched ahead, and what the epoch's order is known by.
        """
        epoch = self._epoch
        return {
            "version": _STATE_VERSION,
            "pending": list(self.sampler.pending),
            "order": epoch.fingerprint if epoch else None,
            "rng_state": epoch.rng_state if epoch else None,
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
        self._restored = state

    def _order_of_epoch(self) -> array[int]:
        """The order of the clock's epoch: begun now, kept, or that of the run to be resumed."""
        clock = self._clock
        index, restored = clock.epoch_index, self._restored
        self._restored = None
        if restored is not None:
            self._order.skip(index)
        if self._epoch is not None and self._epoch.index == index:
            return self._epoch.order
        if restored is None or clock.epoch_offset == 0:
            order, rng_state = self._order.of(index)
        else:
            rng_state = restored["rng_state"]
            order = self._order.again(index, rng_state)
            if fingerprint(order) != restored["order"]:
                raise ValueError(
                    f"train_dataset order ({fingerprint(order)}) must be that of the checkpoint "
                    f"({restored['order']}), because the run goes on in its middle; resume with "
                    "the same dataset, seed, data_seed and sampler."
                )
        if len(order) < clock.epoch_samples:
            raise ValueError(
                f"train sampler ({len(order)} indices) must yield at least {clock.epoch_samples} "
                "indices in every epoch, because its length said so; mend its __len__ or its "
                "__iter__."
            )
        self._epoch = _Epoch(index, order, fingerprint(order), rng_state)
        return order


@dataclass(frozen=True)
class _Epoch:
    """The epoch that is being cut."""

    index: int
    order: array[int]
    fingerprint: str
    rng_state: str | None
