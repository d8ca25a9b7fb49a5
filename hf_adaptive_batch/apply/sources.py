"""Where samples come from: a dataset with indices and an order, or a stream.

A source says what to fetch for a round, reads what came back, and knows its place in the data.
"""

from __future__ import annotations

import dataclasses
import json
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from torch.utils.data import Dataset

from ..ranks import Ranks
from .clock import TrainingClock
from .fetch import Fetched, SeededFetch
from .sampler import EpochOrder, fingerprint
from .stream import Place, ReadRound, StreamReader


_OTHER_KIND = (
    "train_dataset ({}) must be the one of the checkpoint ({}), because the run goes on in its "
    "middle; pass the same dataset."
)


class Part(NamedTuple):
    """One rank's micro-batch of a round.

    Attributes:
        batch: What the collator made.
        size: Its samples that count, on this rank; 0 where the round had none left for this rank.
        read: Samples of the round over all ranks, or this rank's alone of a split stream.
        following: Digest of what comes next in a stream; None at its end.
    """

    batch: Any
    size: int
    read: int
    following: int | None


class MapSource:
    """A dataset with indices, in an order that is drawn for every epoch.

    Attributes:
        dataset: What torch's DataLoader fetches from.
        is_stream: Whether its end is only known when it is reached.
        split: Whether every rank has data of its own.

    Args:
        dataset: Map-style dataset.
        order: The epochs' order.
        clock: Tells the epoch, and its length.
        ranks: Who shares a round.
        draws_seed: What random draws in workers depend on beside the place; None to leave them.
    """

    is_stream = split = False

    def __init__(
        self,
        dataset: Dataset[Any],
        order: EpochOrder,
        clock: TrainingClock,
        ranks: Ranks,
        *,
        draws_seed: int | None = None,
    ) -> None:
        self._draws_seed = draws_seed
        self.dataset = dataset
        if draws_seed is not None:
            self.dataset = Fetched(dataset, SeededFetch(dataset))
        self._order, self._clock, self._ranks = order, clock, ranks
        self._epoch: _Epoch | None = None
        self._restored: dict[str, Any] | None = None

    def begin(self) -> None:
        """Tell the dataset its epoch, as accelerate's loader does."""
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(self._clock.epoch_index)

    def open_epoch(self) -> Callable[[int, int], Any]:
        """The epoch's indices: drawn now, kept, or those of the run to be resumed.

        Returns:
            This rank's indices of a round; any one where there is none for it.

        Raises:
            ValueError: If the order is not the checkpoint's, or shorter than its length said.
        """
        clock, index, restored = self._clock, self._clock.epoch_index, self._restored
        self._restored = None
        if restored is not None:
            self._order.skip(index)
        if self._epoch is not None and self._epoch.index == index:
            return partial(self._fetch, self._epoch.order)
        if restored is None or clock.epoch_offset == 0:
            order, rng_state = self._order.of(index)
        else:
            rng_state = restored["rng_state"]
            order = self._order.again(index, rng_state)
        order = self._agreed(order)
        found = fingerprint(order)
        if restored is not None and clock.epoch_offset > 0 and found != restored["order"]:
            raise ValueError(
                f"train_dataset order ({found}) must be that of the checkpoint "
                f"({restored['order']}), because the run goes on in its middle; resume with "
                "the same dataset, seed, data_seed and sampler."
            )
        assert clock.epoch_samples is not None
        if len(order) < clock.epoch_samples:
            raise ValueError(
                f"train sampler ({len(order)} indices) must yield at least {clock.epoch_samples} "
                "indices in every epoch, because its length said so; mend its __len__ or its "
                "__iter__."
            )
        self._epoch = _Epoch(index, order, found, rng_state)
        return partial(self._fetch, order)

    def part(self, item: Any, size: int) -> Part:
        """As the sampler cut it."""
        return Part(item, len(self._ranks.share(size)), size, None)

    def state_dict(self) -> dict[str, Any]:
        """What the epoch's order is known by, and drawn from."""
        if self._restored is not None:  # resumed, and not gone on yet
            return self._restored
        epoch = self._epoch
        return {
            "order": epoch.fingerprint if epoch else None,
            "rng_state": epoch.rng_state if epoch else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Draw the checkpoint's order again.

        Args:
            state: From `state_dict`.

        Raises:
            ValueError: If it is a stream's.
        """
        if "order" not in state:
            raise ValueError(_OTHER_KIND.format("map-style", "a stream"))
        self._restored = state

    def close(self) -> None:
        """Nothing is held open."""

    def _fetch(self, order: array[int], begin: int, size: int) -> Any:
        share = self._ranks.share(size)
        first = begin + share.start
        indices = order[first : begin + share.stop].tolist() or [order[begin]]
        if self._draws_seed is None:
            return indices
        return (self._draws_seed, self._clock.epoch_index, first), indices

    def _agreed(self, order: array[int]) -> array[int]:
        """The first rank's order where a sampler drew another one here, as accelerate has it.

        Returns:
            The same indices on all ranks.

        Raises:
            ValueError: If ranks have orders of different lengths.
        """
        mine = int(fingerprint(order)[:12], 16)
        orders = {(row[0], row[1]) for row in self._ranks.gather(mine, len(order))}
        if len({length for _, length in orders}) > 1:
            raise ValueError(
                f"train sampler ({sorted(int(length) for _, length in orders)} indices on the "
                "ranks) must yield as many on all ranks, because they share every step; do not "
                "split the data yourself."
            )
        return order if len(orders) == 1 else self._ranks.of_first(order)


class StreamSource:
    """A stream, read once per rank.

    Attributes:
        dataset: What torch's DataLoader fetches from.
        is_stream: As a map source's.
        split: As a map source's.

    Args:
        reader: Reads it.
        clock: Tells the epoch.
        ranks: Who shares a round.
        split: Whether every rank has a stream of its own.
    """

    is_stream = True

    def __init__(
        self, reader: StreamReader, clock: TrainingClock, ranks: Ranks, *, split: bool = False
    ) -> None:
        self.dataset, self._reader = Fetched(reader.dataset, reader), reader
        self.split = split
        self._clock, self._ranks = clock, ranks
        self._place: Place | None = None

    def begin(self) -> None:
        """Go on where the last step ended, or at the beginning of the clock's epoch."""
        if self._place is None or self._place.epoch != self._clock.epoch_index:
            self._place = Place(self._clock.epoch_index)

    def open_epoch(self) -> Callable[[int, int], Any]:
        """Requests for a reader, the first of which says where to begin."""
        first = [self._place]

        def requests(begin: int, size: int) -> ReadRound:
            return ReadRound(size, first.pop() if first else None)

        return requests

    def part(self, item: Any, size: int) -> Part:
        """What was read, and from now on the place behind it.

        Args:
            item: From the collator.
            size: What was asked for.

        Returns:
            The micro-batch; None as its batch if nothing was found at all.
        """
        batch, found = item
        self._place = found.place
        return Part(batch, found.size, found.read, found.place.following)

    def state_dict(self) -> dict[str, Any]:
        """Where the reader stood behind the last step; of every rank, if the stream is split."""
        place = self._place or Place(self._clock.epoch_index)
        mine = dataclasses.asdict(place)
        mine["state"] = None if place.state is None else json.loads(place.state)
        places = self._ranks.gather_objects(mine) if self.split else [mine]
        return {"split": self.split, "places": places}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from the places of a checkpoint.

        Args:
            state: From `state_dict`.

        Raises:
            ValueError: If it is not a stream's, or was split otherwise.
        """
        if "places" not in state:
            raise ValueError(_OTHER_KIND.format("a stream", "map-style"))
        here, there = self._ranks.size if self.split else 1, len(state["places"])
        if (here, self.split) != (there, state["split"]):
            raise ValueError(
                f"train_dataset (a stream in {here} part{'s' * (here > 1)}) must be split as in "
                f"the checkpoint ({there}), because every part has a place of its own; resume "
                "with as many ranks, or do not split the stream, and it resumes on any number."
            )
        mine = dict(state["places"][self._ranks.rank if self.split else 0])
        if mine["state"] is not None:
            mine["state"] = json.dumps(mine["state"])
        self._place = Place(**mine)

    def close(self) -> None:
        """Let the reader in this process go."""
        self._reader.close()


@dataclass(frozen=True)
class _Epoch:
    """The epoch that is being cut."""

    index: int
    order: array[int]
    fingerprint: str
    rng_state: str | None
