"""What cannot be measured or cut correctly is refused before training starts, with the way out."""

from __future__ import annotations

from collections.abc import Sized
from typing import TYPE_CHECKING

import torch

from .accelerate_support import check_stream
from .hf_parallel import ranks_of
from .measure.leaves import check_trainable
from .parallel_support import check_label_smoothing, check_parallelism


if TYPE_CHECKING:
    from transformers import Trainer


# These apply each gradient inside backward and drop it, so that the step's gradient never exists.
_OPTIMIZERS_IN_BACKWARD = ("lomo", "layerwise")

# By these TRL's trainers that sample what they train on can be told: GRPO, RLOO, and those made
# after them. The first is where generations wait for their turn, the second how many a prompt has.
_BUFFER_OF_GENERATIONS = "_buffered_inputs"
_GENERATIONS_OF_A_PROMPT = "num_generations"


def check_support(trainer: Trainer) -> None:
    """Refuse a configuration whose gradients cannot be measured, or whose batches cannot be cut.

    Args:
        trainer: A trainer with adaptive arguments, constructed.

    Raises:
        ValueError: With the reason and the way out.
    """
    args = trainer.args
    _check_sampling(trainer)
    if trainer.is_deepspeed_enabled:
        raise ValueError(
            "deepspeed (enabled by the launcher) must be off, because DeepSpeed reduces and "
            "steps inside backward, where no gradient of a single micro-batch can be measured; "
            "train without it."
        )
    if args.n_gpu > 1:
        raise ValueError(
            f"n_gpu ({args.n_gpu}) must be 1 in a process, because torch.nn.DataParallel mixes the "
            "gradients of all GPUs before they can be seen; set CUDA_VISIBLE_DEVICES to one GPU."
        )
    if args.world_size > 1:
        check_parallelism(trainer)
        check_label_smoothing(trainer)
    if any(name in str(args.optim).lower() for name in _OPTIMIZERS_IN_BACKWARD):
        raise ValueError(
            f"optim ({args.optim}) must step after backward, because one that steps inside it "
            "leaves no gradient of the whole step to measure; use adamw_torch."
        )
    if trainer.model is not None and trainer.model_init is None:
        check_trainable(trainer.model)
    ranks = ranks_of(trainer)
    plan = args.initial_batch_plan(ranks.size)
    args.check_initial_plan(plan)
    dataset = trainer.train_dataset
    if dataset is None:
        return  # the Trainer says so itself when it is asked to train
    if isinstance(dataset, torch.utils.data.IterableDataset):
        check_stream(dataset, ranks, trainer.accelerator)
        return
    samples = len(dataset) if isinstance(dataset, Sized) else None
    if samples == 0:
        raise ValueError(
            "train_dataset (0 samples) must hold at least one sample, because there is nothing "
            "to train on; check the path, the split and the filters that it was made with."
        )
    if args.batch_schedule != "constant" and samples is not None:
        if samples < plan.global_batch_size:
            raise ValueError(
                f"train_dataset ({samples} samples) must hold at least one global batch "
                f"({plan.global_batch_size} samples), because no step could ever train on a "
                "whole one; lower per_device_train_batch_size or gradient_accumulation_steps, or "
                "add data."
            )


def _check_sampling(trainer: Trainer) -> None:
    """Refuse a Trainer whose samples are not those of its data loader."""
    buffers = hasattr(trainer, _BUFFER_OF_GENERATIONS)
    if not buffers and not hasattr(trainer.args, _GENERATIONS_OF_A_PROMPT):
        return
    names = [cls.__name__ for cls in type(trainer).__mro__ if cls.__module__.startswith("trl.")]
    raise ValueError(
        f"trainer ({names[0] if names else type(trainer).__name__}) must train on the samples of "
        "its data loader, because one that generates completions itself makes those of a fixed "
        "number of micro-batches at once, and weighs each against the others of its prompt: a "
        "batch that grows would train on some of them twice, and its micro-batches are no "
        "independent samples whose noise could be measured; use this Trainer without "
        "AdaptiveBatchMixin."
    )
