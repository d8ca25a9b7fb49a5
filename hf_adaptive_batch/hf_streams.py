"""What is to be known of streams of `datasets`, and of those that accelerate has wrapped.

Written against datasets 5.2 and accelerate 1.15. Can go when an `IterableDataset` tells such things
by public means.
"""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import datasets
import torch
from accelerate.data_loader import IterableDatasetShard
from torch.utils.data import get_worker_info

from .arguments import AdaptiveBatchOptions


def whole_stream(dataset: Any) -> Any:
    """The stream as the user gave it: accelerate hides one that it shares out between ranks.

    Args:
        dataset: Of a loader that accelerate has prepared, or not.

    Returns:
        The user's dataset.
    """
    return dataset.dataset if isinstance(dataset, IterableDatasetShard) else dataset


@contextlib.contextmanager
def steps_from_budget(arguments: Iterable[Any]) -> Iterator[None]:
    """Make a Trainer of a stream with a budget in samples or tokens.

    Of a stream without a length its constructor wants `max_steps`, to know where to end. While it
    runs, the budget stands in. Can go when the check asks a method.

    Args:
        arguments: All arguments of the constructor.

    Yields:
        Nothing.
    """
    args = next((a for a in arguments if isinstance(a, AdaptiveBatchOptions)), None)
    stream = any(isinstance(a, torch.utils.data.IterableDataset) for a in arguments)
    budget = args and (args.max_training_samples or args.max_train_tokens)
    if args is None or not stream or not budget or args.max_steps > 0:
        yield
        return
    steps, args.max_steps = args.max_steps, budget
    try:
        yield
    finally:
        args.max_steps = steps


def rows(dataset: Any) -> Iterator[Any]:
    """Iterate in the order of a single process, in loader workers as well.

    In a worker, a stream of `datasets` sees to its share of the shards and moves on the generators
    of its shuffle buffers, even where the worker is the only one. `iter(batch_size=1)` does not.

    Args:
        dataset: Any iterable dataset.

    Returns:
        An iterator over samples.
    """
    if isinstance(dataset, datasets.IterableDataset) and get_worker_info() is not None:
        if dataset._formatting is None or not dataset._formatting.is_table:
            return _unbatched(dataset)
    return iter(dataset)


def parts_of(dataset: Any) -> tuple[int, int] | None:
    """How `split_dataset_by_node` has split a stream.

    Args:
        dataset: Any iterable dataset.

    Returns:
        Which part of how many this is; None for a whole stream.
    """
    split = getattr(dataset, "_distributed", None)
    return None if split is None else (split.rank, split.world_size)


def restores_exactly(dataset: Any) -> bool:
    """Whether a stream's `state_dict` leads back to the very sample.

    That of a shuffle buffer does not hold what is in the buffer: `datasets` fills it again with
    the samples behind.

    Args:
        dataset: Any iterable dataset.

    Returns:
        False if there is a shuffle buffer of more than one sample in a stream of `datasets`.
    """
    if not isinstance(dataset, datasets.IterableDataset):
        return True
    found = [dataset._ex_iterable]
    while found:
        node = found.pop()
        if type(node).__name__ == "BufferShuffledExamplesIterable" and node.buffer_size > 1:
            return False
        below = (getattr(node, "ex_iterable", None), *(getattr(node, "ex_iterables", None) or ()))
        found += [child for child in below if child is not None]
    return True


def _unbatched(dataset: Any) -> Iterator[Any]:
    for batch in dataset.iter(batch_size=1):
        yield {name: column[0] for name, column in batch.items()}
