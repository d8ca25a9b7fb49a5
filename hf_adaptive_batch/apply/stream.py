"""Reading a stream round by round, so that its place can be found again.

A stream has no indices. Its order is that of a single iteration in a single process: one reader on
every rank, in the main process or in one loader worker, reads it in that order, and of each round
hands out this rank's share. So the order depends neither on ranks nor on workers. A stream that was
split between ranks beforehand is read by each rank as its own.
"""

from __future__ import annotations

import contextlib
import copy
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, NamedTuple

import numpy as np
import torch

from ..ranks import Ranks
from .fetch import set_generators


_NOTHING, _END = object(), object()


def _itself(dataset: Any) -> Any:
    return dataset


@dataclass(frozen=True)
class Place:
    """Where a reader stands between two rounds.

    Attributes:
        epoch: The stream's epoch, from 0.
        offset: Samples of the epoch that were read before.
        state: The dataset's own state there, if it keeps one.
        following: Digest of the sample that comes next, by which the place is known again; None at
            the end of the epoch.
    """

    epoch: int
    offset: int = 0
    state: Any = None
    following: int | None = None


class ReadRound(NamedTuple):
    """What a reader is asked for.

    Attributes:
        size: Samples of the round, over all ranks.
        place: Where to begin, if not where the last round ended.
    """

    size: int
    place: Place | None


class Round(NamedTuple):
    """What was read.

    Attributes:
        samples: This rank's; one that does not count where there is none, so that every rank has
            something to run.
        size: How many of them count.
        read: Samples taken from the stream: over all ranks, or this rank's of a split stream.
        place: Where the reader stands after it.
    """

    samples: list[Any]
    size: int
    read: int
    place: Place


class StreamReader:
    """Reads a stream on, round by round, in the process where it is asked to.

    Args:
        dataset: Iterable dataset. If it, or its iterator, has `state_dict` and `load_state_dict`,
            a place is found by them, else by reading the epoch again from its beginning.
        ranks: Who shares the stream.
        split: Whether every rank has a stream of its own already.
        read: Iterates over the dataset.
        private: Gives the dataset as nobody else reads it, where others could move its place.
        restorable: Whether the dataset's state leads back to the very place.
        draws_seed: What random draws of the collator depend on beside the place; None to leave
            them. Not for the main process, whose generators are training's.
    """

    def __init__(
        self,
        dataset: Any,
        ranks: Ranks,
        *,
        split: bool = False,
        read: Callable[[Any], Iterator[Any]] = iter,
        private: Callable[[Any], Any] = _itself,
        restorable: bool = True,
        draws_seed: int | None = None,
    ) -> None:
        self.dataset = dataset
        self._ranks, self._split = ranks, split
        self._read, self._private, self._restorable = read, private, restorable
        self._draws_seed = draws_seed
        self._source = dataset  # what is iterated: the dataset, or a copy set to a state
        self._iterator: Iterator[Any] = iter(())
        self._ahead: Any = _NOTHING  # a sample that was read and belongs to the next round
        self._spare: Any = _NOTHING
        self._epoch = self._offset = 0

    def __call__(self, request: ReadRound) -> Round:
        """Read one round.

        Args:
            request: How much, and where to begin if not where the last one ended.

        Returns:
            This rank's share.
        """
        if request.place is not None:
            self._go_to(request.place)
        wanted = len(self._ranks.share(request.size)) if self._split else request.size
        samples: list[Any] = []
        while len(samples) < wanted and (sample := self._next()) is not _END:
            samples.append(sample)
        begin, self._offset = self._offset, self._offset + len(samples)
        state = self._state()  # before looking at the sample behind
        if self._ahead is _NOTHING:
            self._ahead = self._next()
        ended = self._ahead is _END
        place = Place(self._epoch, self._offset, state, None if ended else digest(self._ahead))
        share = range(len(samples)) if self._split else self._ranks.share(len(samples))
        mine = [samples[i] for i in share]
        if self._draws_seed is not None:
            part = self._ranks.rank if self._split else 0
            set_generators(self._draws_seed, self._epoch, begin + share.start, part)
        self._spare = samples[-1] if samples else self._spare
        size = len(mine)
        if not mine and self._spare is not _NOTHING:
            mine = [self._spare]
        return Round(mine, size, len(samples), place)

    def close(self) -> None:
        """Let go of the iterator, and of the files and threads that it may hold."""
        self._iterator, self._source = iter(()), self.dataset
        self._ahead = self._spare = _NOTHING

    def _next(self) -> Any:
        sample, self._ahead = self._ahead, _NOTHING
        if sample is _END:
            self._ahead = _END
        return next(self._iterator, _END) if sample is _NOTHING else sample

    def _go_to(self, place: Place) -> None:
        """Find a place: by the dataset's state, or by reading again what comes before it.

        Raises:
            ValueError: If another sample comes next than the one that did.
        """
        self._epoch, self._offset = place.epoch, place.offset
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(place.epoch)
        if place.offset and place.state is not None and self._restorable:
            self._restore(place.state)
            if self._is_at(place):
                return
        self._source, self._ahead = self._private(self.dataset), _NOTHING
        self._iterator = self._read(self._source)
        if place.offset:
            with _same_random_numbers():
                for _ in range(place.offset):
                    next(self._iterator, _END)
                if self._is_at(place):
                    return
            raise ValueError(
                f"train_dataset (its sample {place.offset} in epoch {place.epoch}) must be the "
                "sample that was to come next in the checkpoint, because the run goes on in the "
                "middle of the stream; resume with the same data and seed, give shuffle() a seed, "
                "or pass ignore_data_skip=True to begin the stream's epoch anew."
            )

    def _restore(self, state: Any) -> None:
        # A copy: the user's dataset, and so the next epoch, begin at the beginning as before.
        self._source = self._private(self.dataset)
        if self._source is self.dataset:
            self._source = copy.copy(self.dataset)
        if hasattr(self._source, "load_state_dict"):
            self._source.load_state_dict(state)
        self._iterator = self._read(self._source)
        if not hasattr(self._source, "load_state_dict"):
            self._iterator.load_state_dict(state)  # type: ignore[attr-defined]

    def _is_at(self, place: Place) -> bool:
        self._ahead = next(self._iterator, _END)
        found = None if self._ahead is _END else digest(self._ahead)
        return found == place.following

    def _state(self) -> Any:
        if not self._restorable:
            return None
        for holder in (self._source, self._iterator):
            if hasattr(holder, "state_dict") and hasattr(holder, "load_state_dict"):
                return holder.state_dict()
        return None


class CollateRound:
    """The user's collator, for rounds; runs where the round was read.

    Args:
        collate: Of samples.
    """

    def __init__(self, collate: Callable[[list[Any]], Any]) -> None:
        self._collate = collate

    def __call__(self, found: Round) -> tuple[Any, Round]:
        """Collate the samples.

        Args:
            found: What was read.

        Returns:
            The micro-batch, None if there is no sample at all, and the round without its samples.
        """
        batch = self._collate(found.samples) if found.samples else None
        return batch, found._replace(samples=[])


def digest(sample: Any) -> int:
    """48 bits that tell samples apart, the same in every process.

    Args:
        sample: Nested mappings and sequences of plain values, tensors and arrays; of any other
            object only its type is looked at.

    Returns:
        An integer that a float64 holds exactly.
    """
    state = blake2b(digest_size=6)
    for piece in _pieces(sample):
        state.update(piece)
    return int.from_bytes(state.digest(), "big")


def _pieces(value: Any) -> Iterator[bytes]:
    if isinstance(value, Mapping):
        for key in sorted(value, key=str):
            yield repr(key).encode()
            yield from _pieces(value[key])
    elif isinstance(value, list | tuple) and not all(type(v) is int for v in value):
        yield f"[{len(value)}".encode()
        for item in value:
            yield from _pieces(item)
    elif isinstance(value, torch.Tensor):
        yield f"{value.dtype}{tuple(value.shape)}".encode()
        yield value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    elif hasattr(value, "tobytes"):  # arrays of numpy, images
        yield type(value).__name__.encode() + value.tobytes()
    elif isinstance(value, str | bytes | bool | int | float | list | tuple | None):
        yield repr(value).encode(errors="backslashreplace")
    else:
        yield type(value).__qualname__.encode()


@contextlib.contextmanager
def _same_random_numbers() -> Iterator[None]:
    """What is read again may draw; training must find the generators as they were."""
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
