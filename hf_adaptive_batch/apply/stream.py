"""Reading a stream round by round, so that its place can be found again.

A stream has no indices. Its order is that of a single iteration in a single process: one reader on
every rank, in the main process or in one loader worker, reads it in that order, and of each round
hands out this rank's share. So the order depends neither on ranks nor on workers. A stream that was
split between ranks beforehand is read by each rank as its own.
"""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any, NamedTuple

from ..ranks import Ranks
from .digest import digest
from .fetch import same_random_numbers, set_generators, single_process


logger = logging.getLogger(__name__)


class _Mark(Enum):  # members are the same objects also after a journey to another process
    NOTHING = 0
    END = 1


_NOTHING, _END = _Mark.NOTHING, _Mark.END


def _itself(dataset: Any) -> Any:
    return dataset


@dataclass(frozen=True)
class Place:
    """Where a reader stands between two rounds.

    Attributes:
        epoch: The stream's epoch, from 0.
        offset: Samples of the epoch that were read before.
        state: The dataset's own state there, if it keeps one, as JSON.
        following: Digest of the sample that comes next, by which the place is known again; None at
            the end of the epoch.
    """

    epoch: int
    offset: int = 0
    state: str | None = None
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
        private: Gives the dataset as nobody else reads it, where others could move its place.
        settle: Called with a dataset that was set to a state, once it is read on from there.
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
        private: Callable[[Any], Any] = _itself,
        settle: Callable[[Any], Any] = _itself,
        restorable: bool = True,
        draws_seed: int | None = None,
    ) -> None:
        self.dataset = dataset
        self._ranks, self._split = ranks, split
        self._private, self._settle, self._restorable = private, settle, restorable
        self._draws_seed = draws_seed
        self._source = dataset  # what is iterated: the dataset, or a copy set to a state
        self._iterator: Iterator[Any] = iter(())
        self._ahead: Any = _NOTHING  # a sample that was read and belongs to the next round
        self._spare: Any = _NOTHING
        self._epoch = self._offset = 0
        self._state_is_plain = False

    def __call__(self, request: ReadRound) -> Round:
        """Read one round.

        Args:
            request: How much, and where to begin if not where the last one ended.

        Returns:
            This rank's share.
        """
        with single_process():
            found = self._round(request)
        if self._draws_seed is not None:
            place, part = found.place, self._ranks.rank if self._split else 0
            share = range(found.read) if self._split else self._ranks.share(found.read)
            first = place.offset - found.read + share.start
            set_generators(self._draws_seed, place.epoch, first, part)
        return found

    def _round(self, request: ReadRound) -> Round:
        if request.place is not None:
            self._go_to(request.place)
        wanted = len(self._ranks.share(request.size)) if self._split else request.size
        samples: list[Any] = []
        while len(samples) < wanted and (sample := self._next()) is not _END:
            samples.append(sample)
        self._offset += len(samples)
        state = self._state()  # before looking at the sample behind
        if self._ahead is _NOTHING:
            self._ahead = self._next()
        ended = self._ahead is _END
        place = Place(self._epoch, self._offset, state, None if ended else digest(self._ahead))
        share = range(len(samples)) if self._split else self._ranks.share(len(samples))
        mine = [samples[i] for i in share]
        if not mine:
            spare = samples[-1] if samples else self._any_sample()
            return Round([] if spare is _NOTHING else [spare], 0, len(samples), place)
        self._spare = samples[-1]
        return Round(mine, len(mine), len(samples), place)

    def close(self) -> None:
        """Let go of the iterator, and of the files and threads that it may hold."""
        self._iterator, self._source = iter(()), self.dataset
        self._ahead = self._spare = _NOTHING

    def _next(self) -> Any:
        sample, self._ahead = self._ahead, _NOTHING
        if sample is _END:
            self._ahead = _END
        return next(self._iterator, _END) if sample is _NOTHING else sample

    def _any_sample(self) -> Any:
        """One to stand in for none: the last one read, or after a restart the stream's first."""
        if self._spare is _NOTHING and self._offset:
            self._spare = next(iter(self._private(self.dataset)), _NOTHING)
        return self._spare

    def _go_to(self, place: Place) -> None:
        """Find a place: by the dataset's state, or by reading again what comes before it.

        Raises:
            ValueError: If another sample comes next than the one that did.
        """
        self._epoch, self._offset = place.epoch, place.offset
        self._state_is_plain = False
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(place.epoch)
        if place.offset and place.state is not None and self._restorable:
            if self._restored(json.loads(place.state)) and self._is_at(place):
                return
        self._source, self._ahead = self._private(self.dataset), _NOTHING
        self._iterator = iter(self._source)
        if place.offset:
            with same_random_numbers():
                for _ in range(place.offset + 1):
                    self._ahead = next(self._iterator, _END)
                if self._is_at(place):
                    return
            raise ValueError(
                f"train_dataset (its sample {place.offset} in epoch {place.epoch}) must be the "
                "sample that was to come next in the checkpoint, because the run goes on in the "
                "middle of the stream; resume with the same data and seed, give shuffle() a seed, "
                "draw nothing at random in map(), or pass ignore_data_skip=True to begin the "
                "stream's epoch anew."
            )

    def _restored(self, state: Any) -> bool:
        """Whether the dataset could be set to its state, and read on from there."""
        source = self._private(self.dataset)
        if source is self.dataset:  # the next epoch is to begin at the beginning, as before
            source = copy.copy(source)
        try:
            if hasattr(source, "load_state_dict"):
                source.load_state_dict(state)
            self._source, self._iterator = source, iter(source)
            if not hasattr(source, "load_state_dict"):
                self._iterator.load_state_dict(state)  # type: ignore[attr-defined]
            self._ahead = next(self._iterator, _END)
        except Exception:  # whatever it is in the dataset, its samples can be read again
            logger.warning("The state of train_dataset could not be loaded.", exc_info=True)
            return False
        finally:
            self._settle(source)
        return True

    def _is_at(self, place: Place) -> bool:
        found = None if self._ahead is _END else digest(self._ahead)
        return found == place.following

    def _state(self) -> str | None:
        """The dataset's own state, as JSON; None if it has none that leads back."""
        if not self._restorable:
            return None
        for holder in (self._source, self._iterator):
            if hasattr(holder, "state_dict") and hasattr(holder, "load_state_dict"):
                try:
                    state = holder.state_dict()
                    text = json.dumps(state)
                    if self._state_is_plain or json.loads(text) == state:
                        self._state_is_plain = True  # looked at once in an iteration
                        return text
                    problem: Any = "a round trip through JSON changes it"
                except Exception as error:  # whatever it is, the place is found without it
                    problem = error
                logger.warning(
                    "The state of train_dataset is not kept (%s): a resumed run finds its place "
                    "by reading the epoch again from its beginning.",
                    problem,
                )
                self._restorable = False
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
