"""A stream of documents becomes a stream of blocks, whose place can be kept and found again.

The blocks are those of `packing.pack`. They come in windows: so many blocks, shuffled among each
other. A place is the window's begin, which `datasets` can find, and how many of its blocks were
handed out; to go on there, one window at most is packed again.
"""

import copy
from collections.abc import Iterator
from typing import Any, NamedTuple

import datasets
import numpy as np
import torch

from .hf_streams import parts_of, private, shuffle_buffer
from .packing import BlockCutter, TextTokenizer, Tokens, end_token, in_batches, tokenized


_STATE_VERSION = 1
# Windows begin between two of these reads. So the number is part of what a state means: whoever
# changes it raises the version.
_DOCUMENTS_PER_READ = 100


class _Place(NamedTuple):
    """Where an epoch stands: at a block of a window that begins at a document."""

    epoch: int
    window: int = 0
    documents: dict[str, Any] | None = None  # the state of `datasets`; None at the epoch's begin
    leftover: tuple[int, ...] | list[int] = ()  # tokens of the documents before
    yielded: int = 0  # blocks of the window that were handed out


class PackedStream(torch.utils.data.IterableDataset[dict[str, Any]]):
    """Blocks of equal length from a stream of documents, each followed by the end token.

    Only the incomplete block at the end of an epoch is dropped. Every iteration reads the whole
    stream on its own, in whatever process it runs: nothing is divided among loader workers.

    Args:
        documents: Stream with a column `text`, one row per document. Its epoch is the blocks'.
        tokenizer: Hugging Face tokenizer that has an end token; no other special token is added.
        block_size: Tokens per block.
        shuffle_blocks: Shuffle blocks within windows of at least so many; 0 keeps their order.
        seed: Seed of that shuffling.

    Raises:
        ValueError: An argument does not fit, or the documents' own state would not be exact.
    """

    def __init__(
        self,
        documents: datasets.IterableDataset,
        tokenizer: TextTokenizer,
        block_size: int,
        *,
        shuffle_blocks: int = 0,
        seed: int = 0,
    ) -> None:
        BlockCutter(block_size)  # refuses, as pack does
        end_token(tokenizer)
        for name, value in (("shuffle_blocks", shuffle_blocks), ("seed", seed)):
            if value < 0:
                raise ValueError(
                    f"{name} ({value}) must not be negative, because it counts blocks or seeds a "
                    "generator; pass 0 or more"
                )
        _check_documents(documents)
        self._documents = documents
        self._tokenizer = tokenizer
        self._settings = {"block_size": block_size, "shuffle_blocks": shuffle_blocks, "seed": seed}
        self._place: _Place | None = None
        self._goes_on = False  # whether the next iteration begins at that place

    @property
    def epoch(self) -> int:
        """The epoch that the next iteration reads."""
        return int(self._documents.epoch)

    @property
    def num_shards(self) -> int:
        """The shards that the documents come from."""
        return int(self._documents.num_shards)

    def set_epoch(self, epoch: int) -> None:
        """Shuffle shards and blocks for this epoch. The place in another epoch is given up.

        Args:
            epoch: Its number, from 0.
        """
        # Kept by the documents alone: there it also reaches workers that live for many epochs.
        self._documents.set_epoch(epoch)
        if self._place is not None and self._place.epoch != epoch:
            self._place, self._goes_on = None, False

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """The epoch's blocks; after `load_state_dict`, once, those that are left of them."""
        place = self._place if self._goes_on else None
        self._place, self._goes_on = place or _Place(self.epoch), False
        return self._blocks(self._place)

    def state_dict(self) -> dict[str, Any]:
        """Describe the place behind the block that was yielded last.

        Returns:
            Plain JSON: a few numbers, the state of `documents`, and less than a block of tokens.
        """
        place = self._place or _Place(self.epoch)
        fresh = place._replace(
            documents=copy.deepcopy(place.documents), leftover=list(place.leftover)
        )
        return {"version": _STATE_VERSION, **self._settings, **fresh._asdict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let the next iteration go on from a place; the one after it begins an epoch as ever.

        Args:
            state: From `state_dict` of a stream of the same documents, tokenizer and settings.

        Raises:
            ValueError: The state is of another version, or of a stream with other settings.
        """
        settings = {"version": _STATE_VERSION, **self._settings}
        for name, value in settings.items():
            if state.get(name) != value:
                raise ValueError(
                    f"{name} ({value}) must be that of the state ({state.get(name)}), because the "
                    "blocks would be others and some repeated or lost; use the same settings, or "
                    "begin anew"
                )
        fields = {name: copy.deepcopy(state[name]) for name in _Place._fields}
        self.set_epoch(fields["epoch"])
        self._place, self._goes_on = _Place(**fields), True

    def _blocks(self, begin: _Place) -> Iterator[dict[str, Any]]:
        skipped = begin.yielded
        for place, blocks in self._windows(begin._replace(yielded=0)):
            for number in range(skipped, len(blocks)):
                self._place = place._replace(yielded=number + 1)
                # What a tensor of tokens is made of: collated without looking at every token.
                yield {"input_ids": blocks[number].astype(np.int64)}
            skipped = 0

    def _windows(self, place: _Place) -> Iterator[tuple[_Place, Tokens]]:
        """The windows from one on, each with the place of its begin."""
        reader = private(self._documents).with_format(None)  # plain text whatever format is set
        reader.set_epoch(place.epoch)
        if place.documents is not None:
            reader.load_state_dict(place.documents)
        cutter = BlockCutter(self._settings["block_size"], place.leftover)
        enough = max(1, self._settings["shuffle_blocks"])
        parts: list[Tokens] = []
        # Not iter(reader), which reads a part of the shards only when it is in a loader worker.
        for batch in reader.iter(batch_size=_DOCUMENTS_PER_READ):
            for tokens in tokenized(in_batches(batch["text"]), self._tokenizer):
                parts.append(cutter.cut(tokens))
            if sum(map(len, parts)) >= enough:
                yield place, self._shuffled(np.concatenate(parts), place)
                parts = []
                place = _Place(
                    place.epoch, place.window + 1, reader.state_dict(), cutter.leftover.tolist()
                )
        if parts:
            yield place, self._shuffled(np.concatenate(parts), place)

    def _shuffled(self, blocks: Tokens, place: _Place) -> Tokens:
        if not self._settings["shuffle_blocks"]:
            return blocks
        generator = np.random.default_rng([self._settings["seed"], place.epoch, place.window])
        return blocks[generator.permutation(len(blocks))]


def _check_documents(documents: datasets.IterableDataset) -> None:
    columns = documents.column_names  # None where only reading would tell
    if columns is not None and "text" not in columns:
        raise ValueError(
            f"documents (columns {columns}) must have a column 'text', because it is what is "
            "packed; rename_column() the one that holds the text"
        )
    part = parts_of(documents)
    if part is not None and part[1] > 1:
        raise ValueError(
            f"documents (part {part[0]} of {part[1]}) must not be split between ranks, "
            "because the blocks are: every rank reads them all and trains on its share; pass the "
            "documents as they were before split_dataset_by_node"
        )
    if (size := shuffle_buffer(documents)) > 1:
        raise ValueError(
            f"documents (shuffled with buffer_size={size}) must have no shuffle buffer, because "
            "its content is not in their state, and a resumed run would lose it; shuffle the "
            "shards only, by shuffle(buffer_size=1), and pass shuffle_blocks"
        )
