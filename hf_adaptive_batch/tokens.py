"""How many tokens of a collated micro-batch are not padding."""

import copy
from collections.abc import Callable, Mapping
from itertools import islice
from typing import Any

import torch
from torch import nn

from .apply.fetch import same_random_numbers
from .hf_streams import private


# Enough to know the mean length of a sample to a few per cent, cheap enough to collate at start.
_SAMPLES_LOOKED_AT = 64


def count_tokens(batch: Any, model: nn.Module) -> int:
    """Tokens that are not padding; 0 for data without tokens.

    Args:
        batch: The collator's micro-batch.
        model: Names its main input.

    Returns:
        The ones of the attention mask, or all elements of an integer main input.
    """
    if not isinstance(batch, Mapping):
        return 0
    mask = batch.get("attention_mask")
    if isinstance(mask, torch.Tensor) and mask.dim() == 2:
        return int(mask.sum())
    main = batch.get(getattr(model, "main_input_name", "input_ids"))
    if isinstance(main, torch.Tensor) and not main.is_floating_point():
        return main.numel()
    return 0


def target_tokens(batch: Any) -> float:
    """Tokens whose loss a causal language model averages: the weight of that mean.

    Args:
        batch: The collator's micro-batch, with `labels`.

    Returns:
        Labels that are not -100, without each row's first, which nothing predicts.
    """
    return float((batch["labels"][..., 1:] != -100).sum())


def mean_tokens(
    dataset: Any,
    collate: Callable[[list[Any]], Any],
    model: nn.Module,
    micro_batch_size: int,
    *,
    asked: str = "max_train_tokens",
) -> float:
    """Mean tokens of a sample, from samples spread evenly over the dataset.

    Args:
        dataset: Map-style dataset; or a stream, of whose first samples a copy is read.
        collate: The collator.
        model: Names its main input.
        micro_batch_size: Samples that are collated together.
        asked: The argument that counts in tokens.

    Returns:
        Tokens a sample that are not padding; exact where all samples are equally long.
    """
    tokens = 0
    with same_random_numbers():  # collators may draw
        if isinstance(dataset, torch.utils.data.IterableDataset):
            samples = list(islice(_copy(dataset, asked), _SAMPLES_LOOKED_AT))
        else:
            count = min(len(dataset), _SAMPLES_LOOKED_AT)
            samples = [dataset[i * len(dataset) // count] for i in range(count)]
        for start in range(0, len(samples), micro_batch_size):
            tokens += count_tokens(collate(samples[start : start + micro_batch_size]), model)
    return tokens / max(1, len(samples))


def _copy(stream: Any, asked: str) -> Any:
    """A stream from which samples may be taken; refused where there can be none."""
    found = private(stream, epoch=0)
    if found is not stream:
        return found
    try:
        found = copy.deepcopy(stream)
    except Exception as error:  # a generator, a socket: what can be read once only
        raise ValueError(
            f"{asked} must count tokens only of data that can be looked at beforehand, because a "
            f"step is a number of samples, but a copy of train_dataset ({type(stream).__name__}) "
            f"cannot be had ({error}); count in samples or steps."
        ) from error
    if hasattr(found, "set_epoch"):
        found.set_epoch(0)
    return found
