"""Where a model's gradients appear: small ones at autograd's leaves, the step's at its parameters.

In a single process and under DDP the parameters are the leaves. FSDP2 (HSDP, and with tensor
parallelism too) puts a whole parameter in place of each shard while it computes; FSDP1 a flat one
in place of many. Only there are a rank's own gradients of a micro-batch to be seen; what is left
after the reduction is in `.grad` of the shards.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, ShardingStrategy
from torch.distributed.tensor import DTensor, Replicate


class Leaf(NamedTuple):
    """Where the gradient of one trainable parameter appears.

    Attributes:
        name: The parameter's, as `named_parameters` has it; of a flat one, by its FSDP unit.
        tensors: Into which autograd accumulates: what is hooked. More than one where FSDP2 gathers
            a tied weight once for each of its uses; the gradient is then the sum of theirs.
        parameters: Whose `.grad` holds the gradient after its reduction: the tensor itself, its
            shard, or the pieces of a flat one's shard.
        shards: Over how many processes those pieces are spread; None if their `.grad` tells it.
    """

    name: str
    tensors: tuple[torch.Tensor, ...]
    parameters: tuple[torch.Tensor, ...]
    shards: int | None = None


class GradientLeaves:
    """The leaves of a model, looked up once: under FSDP2 that takes gathering every parameter.

    To be made, and asked, on all ranks alike.

    Args:
        model: As it is trained: wrapped by DDP or FSDP, if it is.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        # By id. What is known is held, so that nothing else takes over an id.
        self._known: dict[int, torch.Tensor] = {}
        self._shard_of: dict[int, torch.Tensor] = {}
        self._gathered: dict[int, list[torch.Tensor]] = {}

    def trainable(self) -> list[Leaf]:
        """What is trainable now.

        Returns:
            Leaves in the model's order; tied weights once. What `check_trainable` refuses is
            refused, and frozen parameters that FSDP1 flattened together with trainable ones.
        """
        check_trainable(self._model)
        flat = self._flat_leaves()
        members = {id(p) for leaf in flat for p in (*leaf.tensors, *leaf.parameters)}
        named = self._named(members)
        if any(id(p) not in self._known for _, p in named):
            # A forward without a backward leaves modules whole, or in larger shards.
            units = [module for module in self._model.modules() if isinstance(module, FSDPModule)]
            for unit in units:
                unit.reshard()
            named = self._named(members)
            if any(id(p) not in self._known for _, p in named):
                self._gather(named, units)
        leaves: dict[int, Leaf] = {}
        for name, parameter in named:
            shard = self._shard_of.get(id(parameter), parameter)
            tensors = self._gathered.get(id(shard), [shard])
            if shard.requires_grad and id(shard) not in leaves:
                for tensor in tensors:
                    tensor.requires_grad_(True)  # as FSDP2 does, but only when it gathers next
                leaves[id(shard)] = Leaf(name, tuple(tensors), (shard,))
        return [*leaves.values(), *(leaf for leaf in flat if leaf.tensors[0].requires_grad)]

    def _named(self, flattened: set[int]) -> list[tuple[str, nn.Parameter]]:
        return [(n, p) for n, p in self._model.named_parameters() if id(p) not in flattened]

    def _gather(self, named: list[tuple[str, nn.Parameter]], units: Sequence[Any]) -> None:
        """Find what stands for each shard: it is made once, and stays for the model's life."""
        self._known = {id(parameter): parameter for _, parameter in named}
        self._shard_of, self._gathered = {}, {}
        for unit in units:
            before = dict(unit.named_parameters(remove_duplicate=False))
            unit.unshard()
            for name, whole in unit.named_parameters(remove_duplicate=False):
                shard = before[name]
                if whole is shard:
                    continue
                # Found by both, as a parameter may be met in either state.
                self._known |= {id(shard): shard, id(whole): whole}
                if id(whole) not in self._shard_of:
                    self._shard_of[id(whole)] = shard
                    self._gathered.setdefault(id(shard), []).append(whole)
            unit.reshard()

    def _flat_leaves(self) -> list[Leaf]:
        """Those of FSDP1, whose wrappers hold the parameters of a module in a flat one.

        Returns:
            One leaf for each wrapper with parameters.

        Raises:
            ValueError: If some of them are frozen and others are not.
        """
        leaves = []
        for name, module in self._model.named_modules():
            if not isinstance(module, FullyShardedDataParallel):
                continue
            # Private: with use_orig_params the flat parameter is no parameter of the module.
            flat = module._flat_param
            if flat is None:
                continue
            pieces = tuple(flat._params or (flat,))
            if len({piece.requires_grad for piece in pieces}) > 1:
                raise ValueError(
                    f"the parameters of the FSDP unit {name or 'root'!r} must be all trainable or "
                    "all frozen, because FSDP1 computes one gradient for them all; use "
                    "fsdp_version: 2."
                )
            whole = module.sharding_strategy is ShardingStrategy.NO_SHARD
            shards = 1 if whole else dist.get_world_size(module.process_group)
            leaves.append(Leaf(f"{name}.flat_param", (flat,), pieces, shards))
        return leaves


def check_trainable(model: nn.Module) -> None:
    """Refuse a model whose gradients have no norm, or that has none.

    Args:
        model: Any, before it is sharded or after.

    Raises:
        ValueError: If nothing is trainable, or an embedding makes sparse gradients.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.sparse:
            if module.weight.requires_grad:
                raise ValueError(
                    f"sparse (True) of the embedding {name!r} must be False, because the norm of "
                    "a sparse gradient with repeated rows is not the norm of its values; build "
                    "it with sparse=False, or freeze it."
                )
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            "model must have a trainable parameter, because the batch size is read from gradients; "
            "unfreeze some, or use Trainer."
        )


def on_this_process(gradient: torch.Tensor) -> tuple[torch.Tensor, int]:
    """This process's part of a gradient, and how many processes hold parts of it.

    A sum that is still spread as summands (the gradient of a norm layer under sequence-parallel
    activations) is summed first: a collective of the tensor-parallel processes.

    Args:
        gradient: A tensor, or a DTensor on any mesh.

    Returns:
        A plain tensor, and the number of its shards: the squared norm of the whole gradient is the
        sum over all processes of (squared norm x shards / processes).
    """
    if not isinstance(gradient, DTensor):
        return gradient, 1
    if any(placement.is_partial() for placement in gradient.placements):
        gradient = gradient.redistribute(
            placements=[Replicate() if p.is_partial() else p for p in gradient.placements]
        )
    mesh = gradient.device_mesh
    shards = math.prod(
        mesh.size(dim) for dim, p in enumerate(gradient.placements) if not p.is_replicate()
    )
    return gradient.to_local(), shards
