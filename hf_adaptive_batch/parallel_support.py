"""What of parallelism cannot be measured is refused before training starts, with the way out."""

from __future__ import annotations

import logging
import math
import os
from typing import TYPE_CHECKING, Any

from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.tensor import DTensor
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from .accelerate_support import check_processes


if TYPE_CHECKING:
    from transformers import Trainer


logger = logging.getLogger(__name__)

_CAUSAL_MODELS = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())


def check_parallelism(trainer: Trainer) -> None:
    """Refuse what leaves no gradient of a rank's own samples to measure, or an inexact mean of it.

    Args:
        trainer: Any Trainer, constructed, of several processes.
    """
    accelerator = trainer.accelerator
    kind = accelerator.distributed_type
    asked = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if asked and kind is DistributedType.MULTI_CPU and trainer.is_world_process_zero():
        logger.warning(
            "FSDP was asked for, but accelerate does without it on the CPU: every process holds "
            "the whole model (DDP). transformers' DistributedConfig shards there, too."
        )
    check_processes(accelerator)
    _check_load_time_sharding(trainer.model)


def check_label_smoothing(trainer: Trainer) -> None:
    """Refuse a loss that FSDP2 would change: transformers looks up by its name whether to shift.

    Args:
        trainer: Any Trainer, constructed.

    Raises:
        ValueError: With the reason and the way out.
    """
    smoothing, name = trainer.args.label_smoothing_factor, type(trainer.model).__name__
    shards = trainer.accelerator.is_fsdp2 or name.startswith("FSDP")
    if smoothing > 0 and shards and name.removeprefix("FSDP") in _CAUSAL_MODELS:
        raise ValueError(
            f"label_smoothing_factor ({smoothing}) must be 0 under FSDP2, because transformers "
            "does then not know by the model's name that it is causal, and compares each token "
            "with itself instead of the next; smooth in a compute_loss_func, or use DDP."
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
