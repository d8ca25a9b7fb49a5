"""How a Trainer spreads a model over processes: who sees which data, when gradients are reduced.

Touches internals of transformers and accelerate, as `hf_compat` does, for the same versions.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from .ranks import Ranks


if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import Trainer


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
    """Drop what FSDP2 has not reduced yet, when a step is given up: the next one would add it.

    torch 2.13 has `FSDPModule.reset_iter_state` for it, which leaves whole gradients where they
    are, so that private attributes are set as well. Can go when that is mended.

    Args:
        model: The prepared model.
    """
    # Before its first forward there is nothing to forget, and torch stumbles over that. What is to
    # be seen is the error that led here.
    with contextlib.suppress(Exception):
        for module in model.modules():
            if isinstance(module, FSDPModule):
                state = module._get_fsdp_state()
                groups = getattr(state, "_fsdp_param_groups", None)  # one before torch 2.13
                for group in groups or [state._fsdp_param_group]:
                    for param in group.fsdp_params if group else ():
                        param.unsharded_accumulated_grad = None
                        if hasattr(param, "_unsharded_param"):
                            param._unsharded_param.grad = None
    with contextlib.suppress(Exception):
        getattr(model, "_orig_mod", model).reset_iter_state()


def wrap_anew(trainer: Trainer) -> None:
    """Let a model be wrapped by DDP that was evaluated before: transformers would leave it bare.

    `Trainer.evaluate` has accelerate prepare the model for evaluation alone, and accelerate takes
    it for prepared when training begins: its ranks would drift apart. Can go when it does not.

    Args:
        trainer: Any Trainer, before training.
    """
    model = trainer.model
    if trainer.accelerator.distributed_type.startswith("MULTI_") and model is trainer.model_wrapped:
        if getattr(model, "_is_accelerate_prepared", False):
            model._is_accelerate_prepared = False


def check_reduced(model: nn.Module, trainable: set[int]) -> None:
    """Refuse to measure gradients that are not averaged over the ranks.

    Args:
        model: The prepared model of several processes.
        trainable: Ids of the parameters that were trainable when it was wrapped.

    Raises:
        RuntimeError: If nothing wraps the model, or DDP did not know a parameter as trainable.
    """
    inner = getattr(model, "_orig_mod", model)  # of torch.compile
    if not isinstance(inner, DistributedDataParallel):
        sharded = isinstance(inner, FSDPModule | FullyShardedDataParallel)
        if not sharded and not any(isinstance(p, DTensor) for p in inner.parameters()):
            raise RuntimeError(
                f"The model ({type(inner).__name__}) of several processes must be wrapped by DDP "
                "or FSDP, because its gradients are else not averaged and the ranks drift apart; "
                "leave wrapping to the Trainer, or to accelerator.prepare."
            )
        return
    for name, parameter in inner.named_parameters():
        if parameter.requires_grad and id(parameter) not in trainable:
            raise RuntimeError(
                f"{name!r} must be trainable before training starts, because DDP averages the "
                "gradients of those alone that were when it wrapped the model, and the ranks would "
                "drift apart; unfreeze it before the Trainer is made (or the model is prepared), "
                "or use FSDP2."
            )


def micro_batch(
    trainer: Trainer, model: nn.Module, *, last: bool, keep_sharded: bool
) -> contextlib.AbstractContextManager[None]:
    """Run one micro-batch of a Trainer's step.

    Args:
        trainer: The Trainer.
        model: The prepared model.
        last: As in `synchronised`.
        keep_sharded: As in `synchronised`.

    Returns:
        A context to run it in.
    """
    options = trainer.args.accelerator_config.gradient_accumulation_kwargs or {}
    in_shards = getattr(trainer, "is_distributed_loading_by_transformers", False)
    return synchronised(
        trainer.accelerator,
        model,
        last=last,
        keep_sharded=keep_sharded,
        reduce_each=options.get("sync_each_batch"),
        defer=trainer._defer_fsdp_gradient_reduction if in_shards else None,
    )


@contextlib.contextmanager
def synchronised(
    accelerator: Accelerator,
    model: nn.Module,
    *,
    last: bool,
    keep_sharded: bool,
    reduce_each: bool | None = None,
    defer: Callable[[], contextlib.AbstractContextManager[Any]] | None = None,
) -> Iterator[None]:
    """Run one micro-batch; gradients are reduced over the ranks after the last one at the latest.

    `GradientState._set_sync_gradients` is what `Trainer._run_epoch` calls itself. Can go when the
    Trainer's loop takes the number of micro-batches per step from a method.

    Args:
        accelerator: The Trainer's, or the user's.
        model: The prepared model.
        last: Whether this is the step's last micro-batch.
        keep_sharded: Whether FSDP is to reduce every micro-batch's gradient, where the user has not
            said it by `sync_each_batch`. Else it holds a whole one while it accumulates, and a
            batch that grows into accumulation may no longer fit.
        reduce_each: `sync_each_batch`; None if the user has not said it.
        defer: How transformers puts off the reduction of a model that it has sharded itself.

    Yields:
        Nothing.
    """
    accelerator.gradient_state._set_sync_gradients(last)
    inner = getattr(model, "_orig_mod", model)  # of torch.compile
    sharded = isinstance(inner, FSDPModule) or accelerator.distributed_type is DistributedType.FSDP
    between: contextlib.AbstractContextManager[Any]
    if last or reduce_each:
        between = contextlib.nullcontext()
    elif sharded and keep_sharded and reduce_each is None:
        between = _all_reduce_deferred(inner)
    elif sharded and defer is not None:
        between = defer()
    else:
        between = accelerator.no_sync(model)
    with between:
        yield


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
