"""What of accelerate's settings cannot be measured or cut is refused, with the way out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from accelerate.utils import DDPCommunicationHookType, DistributedType

from .batch_options import BatchOptions
from .hf_streams import parts_of
from .ranks import Ranks


if TYPE_CHECKING:
    from accelerate import Accelerator


_POWER_SGD = (DDPCommunicationHookType.POWER_SGD, DDPCommunicationHookType.BATCHED_POWER_SGD)


def check_processes(accelerator: Accelerator) -> None:
    """Refuse what leaves no gradient of a rank's own samples to measure, or an inexact mean of it.

    Args:
        accelerator: Of several processes.

    Raises:
        ValueError: With the reason and the way out.
    """
    kind = accelerator.distributed_type
    if kind is not DistributedType.FSDP and not kind.startswith("MULTI_"):
        raise ValueError(
            f"distributed_type ({kind.value}) must be that of DDP or FSDP, because gradients are "
            "read where torch's autograd leaves them; launch with --multi_gpu or --use_fsdp."
        )
    mesh = getattr(accelerator, "parallelism_config", None)
    for name, what in (("cp_size", "context"), ("sp_size", "sequence")):
        size = getattr(mesh, name, 1) or 1
        if size > 1:
            raise ValueError(
                f"{name} ({size}) must be 1, because under {what} parallelism a process sees the "
                "gradient of a part of each sequence, and no gradient of a whole sample exists "
                "before all are summed; use dp_shard_size (FSDP) and activation checkpointing for "
                "long sequences."
            )
    hook = getattr(accelerator.ddp_handler, "comm_hook", DDPCommunicationHookType.NO)
    if hook in _POWER_SGD:
        raise ValueError(
            f"comm_hook ({hook.value}) must not be PowerSGD, because it keeps a part of the "
            "gradient back, and the rest is not the mean of what the ranks have seen; use fp16 or "
            "bf16, or none."
        )
    if accelerator.split_batches:
        raise ValueError(
            "split_batches (True) of accelerator_config must be False, because then "
            "per_device_train_batch_size is that of all devices; divide it by their number."
        )


def check_stream(dataset: Any, ranks: Ranks, accelerator: Accelerator) -> None:
    """Refuse a stream of which it is not known whether it is all ranks' or split between them.

    Args:
        dataset: The user's, iterable.
        ranks: Who trains on it.
        accelerator: The Trainer's, or the user's.

    Raises:
        ValueError: With the reason and the way out.
    """
    part = parts_of(dataset)
    if part is not None and part != (ranks.rank, ranks.size):
        raise ValueError(
            f"train_dataset (part {part[0]} of {part[1]}) must be part {ranks.rank} of "
            f"{ranks.size}, because every data-parallel rank trains on its own; call "
            f"split_dataset_by_node(dataset, rank={ranks.rank}, world_size={ranks.size})."
        )
    if ranks.processes > 1 and accelerator.dispatch_batches is False:
        raise ValueError(
            "dispatch_batches (False) of accelerator_config must be left out for a stream, because "
            "accelerate would split it between ranks by itself; split it by split_dataset_by_node, "
            "or leave it whole."
        )


def check_loop(accelerator: Accelerator) -> None:
    """Refuse what a loop without a Trainer cannot do.

    Args:
        accelerator: The user's.

    Raises:
        ValueError: With the reason and the way out.
    """
    if accelerator.gradient_accumulation_steps != 1:
        raise ValueError(
            f"gradient_accumulation_steps ({accelerator.gradient_accumulation_steps}) of the "
            "Accelerator must be 1, because AdaptiveBatch accumulates as many micro-batches as "
            "the batch needs; give it accumulation_steps to begin with more than one."
        )
    kind = accelerator.distributed_type
    if kind in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise ValueError(
            f"distributed_type ({kind.value}) must be that of DDP or FSDP, because there the "
            "engine reduces and steps inside backward, where no gradient of a single micro-batch "
            "can be measured; use FSDP2."
        )
    if kind is DistributedType.FSDP and not accelerator.is_fsdp2:
        raise ValueError(
            "fsdp_version (1) must be 2, because a loop that accelerator.save_state had saved "
            "under FSDP1 did not go on exactly when it was tried; use FSDP2, or "
            "AdaptiveBatchTrainer."
        )
    tensor_parallel = getattr(getattr(accelerator, "parallelism_config", None), "tp_size", 1) or 1
    if tensor_parallel > 1:
        raise ValueError(
            f"tp_size ({tensor_parallel}) must be 1, because tensor parallelism was not tried in a "
            "loop without a Trainer; use AdaptiveBatchTrainer, or dp_shard_size (FSDP2) alone."
        )
    if accelerator.num_processes > 1:
        check_processes(accelerator)


def check_options(options: BatchOptions) -> None:
    """Refuse what needs the learning rate, which in a loop without a Trainer is the user's.

    Args:
        options: What decides the batch size.

    Raises:
        ValueError: With the reason and the way out.
    """
    if options.batch_schedule == "seesaw":
        raise ValueError(
            "batch_schedule ('seesaw') must be another one, because seesaw shares the learning "
            "rate's work, and the learning rate of this loop is yours; use AdaptiveBatchTrainer."
        )
    if not options.co_scaling.is_off:
        raise ValueError(
            "scale_learning_rate, scale_beta2 and scale_weight_decay must be left out, because "
            "the optimizer of this loop is yours; scale its values by step.plan.global_batch_size."
        )
