"""How a Trainer spreads a model over processes: who sees which data, when gradients are reduced.

Touches internals of transformers and accelerate, as `hf_compat` does, for the same versions.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from accelerate.utils import DDPCommunicationHookType, DistributedType
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from .ranks import Ranks


if TYPE_CHECKING:
    from transformers import Trainer


logger = logging.getLogger(__name__)

_POWER_SGD = (DDPCommunicationHookType.POWER_SGD, DDPCommunicationHookType.BATCHED_POWER_SGD)


def ranks_of(trainer: Trainer) -> Ranks:
    """The data-parallel ranks of a Trainer, whose tensor-parallel processes share their samples.

    Both accelerate and transformers number processes with tensor parallelism innermost.

    Args:
        trainer: Any Trainer, constructed.

    Returns:
        The ranks, seen from this process.
    """
    args, copies = trainer.args, trainer.get_tp_size()
    rank, copy = divmod(args.process_index, copies)
    return Ranks(rank, args.world_size // copies, args.device, copies, copy)


def layout_of(trainer: Trainer) -> str:
    """Say in a few words how the model is spread over the processes.

    Args:
        trainer: Any Trainer, constructed.

    Returns:
        For the terminal, such as "FSDP2" or "DDP".
    """
    if getattr(trainer, "is_distributed_loading_by_transformers", False):
        config = trainer.model.config.distributed_config
        sizes = (
            (config.dp_replicate_size, "replicas"),
            (config.fsdp_size, "shards (FSDP2)"),
            (config.tp_size, "tensor-parallel"),
        )
        return " x ".join(f"{size} {name}" for size, name in sizes if size > 1)
    accelerator = trainer.accelerator
    if accelerator.distributed_type is not DistributedType.FSDP:
        return "DDP"
    mesh = accelerator.parallelism_config
    replicas = (mesh.dp_replicate_size or 1) if mesh is not None else 1
    kind = "FSDP2" if accelerator.is_fsdp2 else "FSDP1"
    return f"{replicas} replicas of {kind} shards (HSDP)" if replicas > 1 else kind


@contextlib.contextmanager
def whole_weights(trainer: Trainer) -> Iterator[None]:
    """Save the model to be loaded anywhere, also where checkpoints hold its shards alone.

    With `SHARDED_STATE_DICT` the Trainer's `save_model` writes no weights.

    Args:
        trainer: Any Trainer.

    Yields:
        Nothing.
    """
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    if plugin is None:
        yield
        return
    kind = plugin.state_dict_type
    plugin.set_state_dict_type("FULL_STATE_DICT")
    try:
        yield
    finally:
        plugin.set_state_dict_type(kind)


def forget_unreduced(model: Any) -> None:
    """Drop what FSDP2 has reduced only in part, when a step is given up: the next would add it.

    Args:
        model: The prepared model.
    """
    inner = getattr(model, "_orig_mod", model)  # of torch.compile
    if isinstance(inner, FSDPModule) and hasattr(inner, "reset_iter_state"):  # since torch 2.13
        inner.reset_iter_state()


def check_parallelism(trainer: Trainer) -> None:
    """Refuse what leaves no gradient of a rank's own samples to measure, or an inexact mean of it.

    Args:
        trainer: Any Trainer, constructed, of several processes.

    Raises:
        ValueError: With the reason and the way out.
    """
    accelerator = trainer.accelerator
    kind = accelerator.distributed_type
    asked = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if asked and kind is DistributedType.MULTI_CPU and trainer.is_world_process_zero():
        logger.warning(
            "FSDP was asked for, but accelerate does without it on the CPU: every process holds "
            "the whole model (DDP). transformers' DistributedConfig shards there, too."
        )
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
    _check_load_time_sharding(trainer.model)
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


def _check_load_time_sharding(model: Any) -> None:
    """What `from_pretrained(distributed_config=...)` may have done to a model.

    Raises:
        ValueError: With the reason and the way out.
    """
    if model is None:
        return
    sharded = any(isinstance(parameter, DTensor) for parameter in model.parameters())
    if not sharded and not getattr(model, "is_distributed_loading_by_transformers", False):
        return  # the configuration may be that of the run which saved the model
    # Its fields came one by one between transformers 5.17 and 5.23.
    config = getattr(getattr(model, "config", None), "distributed_config", None)
    for name, reason in (
        (
            "ep_size",
            "an expert's gradient mixes the tokens of all ranks before it can be seen; use "
            "fsdp_size instead",
        ),
        (
            "pp_size",
            "a stage of a pipeline runs its own schedule of micro-batches; use fsdp_size and "
            "tp_size instead",
        ),
    ):
        size = getattr(config, name, 1) or 1
        if size > 1:
            raise ValueError(f"{name} ({size}) of distributed_config must be 1, because {reason}.")
    for name, shared in _shared_parameters(model).items():
        mesh, rows = shared.device_mesh, shared.shape[0]
        shards = math.prod(
            mesh.size(i) for i, p in enumerate(shared.placements) if getattr(p, "dim", None) == 0
        )
        if rows % shards and (getattr(config, "fsdp_size", None) or 1) > 1:
            raise ValueError(
                f"the tied weight {name!r} ({rows} rows) must divide evenly into its {shards} "
                "shards, because one of its uses would else go on with the weights of the start "
                "(transformers 5.23); untie it (tie_word_embeddings=False), resize it to a "
                f"multiple of {shards} rows, or let accelerate shard the model."
            )
    late = "replicated_with_grad_allreduce"
    tensor_parallel = (getattr(config, "tp_size", None) or 1) > 1
    plan = (getattr(model, "tp_plan", None) or {}) if tensor_parallel else {}
    names = [name for name, style in plan.items() if style == late]
    if names:
        raise ValueError(
            f"tp_plan ({names[0]!r}: {late!r}) must not sum a gradient after it was accumulated, "
            "because what a micro-batch adds to it is then never seen, and is wrong with "
            "accumulation (transformers 5.23); use fsdp_size without tp_size for this model."
        )


def _shared_parameters(model: nn.Module) -> dict[str, DTensor]:
    """Sharded parameters that several modules use, by one of their names."""
    names: dict[int, list[tuple[str, Any]]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if isinstance(parameter, DTensor):
            names.setdefault(id(parameter), []).append((name, parameter))
    return {uses[0][0]: uses[0][1] for uses in names.values() if len(uses) > 1}


@contextlib.contextmanager
def micro_batch(
    trainer: Trainer, model: nn.Module, *, last: bool, keep_sharded: bool
) -> Iterator[None]:
    """Run one micro-batch; gradients are reduced over the ranks after the last one at the latest.

    `GradientState._set_sync_gradients` is what `Trainer._run_epoch` calls itself. Can go when the
    Trainer's loop takes the number of micro-batches per step from a method.

    Args:
        trainer: The Trainer.
        model: The prepared model.
        last: Whether this is the step's last micro-batch.
        keep_sharded: Whether FSDP is to reduce every micro-batch's gradient, where the user has not
            said it by `sync_each_batch`. Else it holds a whole one while it accumulates, and a
            batch that grows into accumulation may no longer fit.

    Yields:
        Nothing.
    """
    trainer.accelerator.gradient_state._set_sync_gradients(last)
    with contextlib.nullcontext() if last else _before_the_last(trainer, model, keep_sharded):
        yield


def _before_the_last(
    trainer: Trainer, model: nn.Module, keep_sharded: bool
) -> contextlib.AbstractContextManager[Any]:
    accelerator = trainer.accelerator
    options = trainer.args.accelerator_config.gradient_accumulation_kwargs or {}
    reduce_each = options.get("sync_each_batch")
    if reduce_each:
        return contextlib.nullcontext()
    inner = getattr(model, "_orig_mod", model)  # of torch.compile
    sharded = isinstance(inner, FSDPModule) or accelerator.distributed_type is DistributedType.FSDP
    if sharded and keep_sharded and reduce_each is None:
        return _all_reduce_deferred(inner)
    if getattr(trainer, "is_distributed_loading_by_transformers", False) and sharded:
        return trainer._defer_fsdp_gradient_reduction()
    return accelerator.no_sync(model)


@contextlib.contextmanager
def _all_reduce_deferred(model: nn.Module) -> Iterator[None]:
    """Reduce-scatter within each replica now; the sum over HSDP's replicas waits for the last."""
    if not isinstance(model, FSDPModule):  # FSDP1 reduces in every backward
        yield
        return
    model.set_requires_all_reduce(False)
    try:
        yield
    finally:
        model.set_requires_all_reduce(True)
