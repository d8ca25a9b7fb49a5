"""Takes a loader apart, as the user or the Trainer made it, or as accelerate has prepared it.

Touches internals of accelerate, as `hf_compat` does of transformers, for the same versions.
"""

from typing import Any, NamedTuple

import torch
from accelerate.data_loader import (
    BatchSamplerShard,
    DataLoaderDispatcher,
    DataLoaderShard,
    get_sampler,
)
from torch.utils.data import BatchSampler, DataLoader, Dataset

from .hf_streams import whole_stream


_PLAIN_ITERATIONS = {c.__iter__ for c in (DataLoader, DataLoaderShard, DataLoaderDispatcher)}


class LoaderParts(NamedTuple):
    """What a loader is made of.

    Attributes:
        dataset: The user's.
        sampler: Of its indices, with a length; None for a stream.
        micro_batch_size: Samples of a micro-batch.
        drop_last: Whether an incomplete one is dropped.
        options: The further arguments of the `DataLoader`.
    """

    dataset: Dataset[Any]
    sampler: Any
    micro_batch_size: int
    drop_last: bool
    options: dict[str, Any]


def loader_parts(
    dataloader: DataLoader[Any],
) -> LoaderParts:
    """What a train loader is made of, so that it can be cut into other batches.

    Uses accelerate's `get_sampler`, because `prepare` replaces `RandomSampler` by its seeded one,
    whose order is the one that the plain Trainer trains on. Can go when the Trainer offers its
    sampler, with accelerate's seeding, without a loader.

    Args:
        dataloader: A torch `DataLoader`, prepared by accelerate or not.

    Returns:
        Its parts.

    Raises:
        ValueError: If the loader is none of torch's, brings its own batches, or fetches them out
            of order.
    """
    own = getattr(type(dataloader), "__iter__", None)
    if not isinstance(dataloader, DataLoader) or own not in _PLAIN_ITERATIONS:
        raise ValueError(
            f"train dataloader ({type(dataloader).__name__}) must be a torch DataLoader that "
            "iterates as torch's does, because it is taken apart to cut other batches; put what it "
            "does to a batch into the collator."
        )
    is_stream = isinstance(dataloader.dataset, torch.utils.data.IterableDataset)
    batch_sampler: Any = dataloader.batch_sampler
    if isinstance(batch_sampler, BatchSamplerShard):  # of several ranks
        batch_sampler = batch_sampler.batch_sampler
    sampler = None if is_stream else get_sampler(dataloader)
    if sampler is None and not is_stream:  # accelerate looks for it only where it has put its own
        sampler = getattr(batch_sampler, "sampler", None)
    if sampler is not None and not hasattr(sampler, "__len__"):
        raise ValueError(
            f"train sampler ({type(sampler).__name__}) must have a length, because the budget is "
            "counted in samples; give it a __len__."
        )
    own_batches = type(batch_sampler) is not BatchSampler
    if is_stream and getattr(dataloader, "drop_last", False):
        raise ValueError(
            "train dataloader's drop_last (True) must be False for a stream, because the last "
            "samples of its epoch are trained on, each with its weight; remove it."
        )
    if is_stream and dataloader.batch_size is None:
        raise ValueError(
            "train dataloader's batch_size (None) must be per_device_train_batch_size, because a "
            "stream of ready-made batches leaves no batch size to decide; yield samples."
        )
    if not is_stream and (sampler is None or own_batches):
        raise ValueError(
            f"train dataloader's batch_sampler ({type(batch_sampler).__name__}) must be torch's "
            "BatchSampler, because it would decide the batch size as well; return a loader with "
            "`sampler=` and `batch_size=`, or override `_get_train_sampler`."
        )
    options = {
        name: getattr(dataloader, name)
        for name in (
            "num_workers",
            "collate_fn",
            "pin_memory",
            "timeout",
            "worker_init_fn",
            "multiprocessing_context",
            "generator",
            "prefetch_factor",
            "persistent_workers",
            "pin_memory_device",
            "in_order",
        )
        if hasattr(dataloader, name)
    }
    if not options.get("in_order", True):
        raise ValueError(
            "dataloader_in_order (False) must be True, because every sample's place in a step "
            "must be known; remove it."
        )
    dataset = whole_stream(dataloader.dataset)
    if is_stream:
        return LoaderParts(dataset, None, int(dataloader.batch_size or 0), False, options)
    batch_size, drop_last = int(batch_sampler.batch_size), bool(batch_sampler.drop_last)
    return LoaderParts(dataset, sampler, batch_size, drop_last, options)
