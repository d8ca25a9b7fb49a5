"""What is to be known of streams of `datasets`, and of those that accelerate has wrapped.

Written against datasets 5.2 and accelerate 1.15. Can go when an `IterableDataset` tells such things
by public means.
"""

import copy
from typing import Any

import datasets
from accelerate.data_loader import IterableDatasetShard
from datasets.iterable_dataset import BufferShuffledExamplesIterable


def whole_stream(dataset: Any) -> Any:
    """The stream as the user gave it: accelerate hides one that it shares out between ranks.

    Args:
        dataset: Of a loader that accelerate has prepared, or not.

    Returns:
        The user's dataset.
    """
    return dataset.dataset if isinstance(dataset, IterableDatasetShard) else dataset


def parts_of(dataset: Any) -> tuple[int, int] | None:
    """How `split_dataset_by_node` has split a stream.

    Args:
        dataset: Any iterable dataset.

    Returns:
        Which part of how many this is; None for a whole stream.
    """
    split = getattr(dataset, "_distributed", None)
    return None if split is None else (split.rank, split.world_size)


def shuffle_buffer(dataset: Any) -> int:
    """The largest shuffle buffer of a stream of `datasets`.

    With more than one sample in it, the stream's `state_dict` does not lead back to the very place:
    it does not hold what is in the buffer, which is filled again with the samples behind.

    Args:
        dataset: Any iterable dataset.

    Returns:
        Samples; 0 without one.
    """
    if not isinstance(dataset, datasets.IterableDataset):
        return 0
    largest, found = 0, [dataset._ex_iterable]
    for node in found:
        if isinstance(node, BufferShuffledExamplesIterable):
            largest = max(largest, node.buffer_size)
        found += [node.ex_iterable] if hasattr(node, "ex_iterable") else []
        found += getattr(node, "ex_iterables", [])
    return largest


def private(dataset: Any, *, epoch: int | None = None) -> Any:
    """A stream of `datasets` that nobody else reads; any other is given back as it is.

    `datasets` keeps the place of an iteration in the objects that it reads through, and these are
    shared by all that is derived from a dataset: of `stream.skip(9)` and `stream.take(9)`, both
    being read, each moves the other's place.

    Args:
        dataset: Any iterable dataset.
        epoch: That of the stream; else it follows the dataset's.

    Returns:
        A stream of the same samples, whose state may be loaded without the user's noticing.
    """
    if not isinstance(dataset, datasets.IterableDataset):
        return dataset
    own = copy.copy(dataset)
    # Until here no copy at all: its __setstate__ has put the __dict__ of the original into it.
    own.__dict__ = dataset.__dict__ | {"_ex_iterable": _own(dataset._ex_iterable)}
    if epoch is not None:
        own._epoch = epoch
    return own


def settle(dataset: Any) -> None:
    """Let streams of `datasets` inside a dataset begin their next epoch at its beginning.

    They keep a state that was loaded, and begin every iteration there while the epoch's number is
    the same.

    Args:
        dataset: Any iterable dataset, after the first sample behind a state that was loaded.
    """
    for value in getattr(dataset, "__dict__", {}).values():
        if isinstance(value, datasets.IterableDataset):
            value._starting_state_dict = None


def _own(source: Any) -> Any:
    source = copy.copy(source)
    if hasattr(source, "ex_iterable"):
        source.ex_iterable = _own(source.ex_iterable)
    if hasattr(source, "ex_iterables"):
        source.ex_iterables = [_own(inner) for inner in source.ex_iterables]
    return source
