"""One tiny Llama, laid out over processes as torch, accelerate and transformers do it.

Every layout is made on all processes alike, from the name of a model.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from accelerate import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.distributed._composable.replicate_with_fsdp import replicate as replicate_module
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    FullyShardedDataParallel,
    MixedPrecisionPolicy,
    ShardingStrategy,
    fully_shard,
)
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.distributed import DistributedConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from hf_adaptive_batch.ranks import Ranks


VOCABULARY = 32


# -------------------------------------------------------------------------------------- models


def llama(*, tied: bool = False, **options: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "initializer_range": 0.2,
        "use_cache": False,
        **options,
    }
    return LlamaForCausalLM(LlamaConfig(tie_word_embeddings=tied, **config)).train()


def lora() -> nn.Module:
    """Of rank 3, so that some of four processes have an empty shard; not zero to begin with."""
    return with_adapters(llama())


def with_adapters(model: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    adapters = LoraConfig(r=3, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    with warnings.catch_warnings():  # peft 0.21 asks by a name that transformers 5.23 deprecates
        warnings.simplefilter("ignore", FutureWarning)
        return get_peft_model(model, adapters)


def freeze(model: nn.Module) -> None:
    """A part of what every FSDP unit holds."""
    for name, parameter in model.named_parameters():
        if "embed_tokens" in name or "layernorm" in name or "up_proj" in name:
            parameter.requires_grad_(False)


def frozen() -> nn.Module:
    model = llama()
    freeze(model)
    return model


def unused() -> nn.Module:
    model = llama()
    model.unused = nn.Linear(7, 3)
    return model


def checkpointed() -> nn.Module:
    model = llama(tied=True)
    with warnings.catch_warnings():  # transformers 5.23 has another name for it, 5.17 has not
        warnings.simplefilter("ignore", FutureWarning)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


class Sometimes(nn.Module):
    """Of its weights, one is used by micro-batches of one kind alone."""

    def __init__(self) -> None:
        super().__init__()
        self.llama = llama()
        self.bonus = nn.Parameter(torch.linspace(1, 2, 5))

    def forward(self, input_ids: Tensor, **inputs: Any) -> Any:
        found = self.llama(input_ids=input_ids, **inputs)
        if int(input_ids[0, 0]) % 2:
            found.loss = found.loss * self.bonus.square().sum()
        return found


MODELS: dict[str, Callable[[], nn.Module]] = {
    "untied": llama,
    "tied": lambda: llama(tied=True),
    "uneven": lambda: llama(vocab_size=35, intermediate_size=30),
    "lora": lora,
    "frozen": frozen,
    "unused": unused,
    "checkpointed": checkpointed,
    "sometimes": Sometimes,
}


# --------------------------------------------------------------------------------- what is alike


@dataclass(frozen=True)
class Laid:
    """A model as it is trained, and who sees which samples."""

    model: nn.Module
    ranks: Ranks


def ranks_of(copies: int = 1) -> Ranks:
    rank, size = dist.get_rank(), dist.get_world_size()
    return Ranks(rank // copies, size // copies, "cpu", copies)


@functools.cache
def mesh_of(shape: tuple[int, ...], names: tuple[str, ...]) -> DeviceMesh:
    return init_device_mesh("cpu", shape, mesh_dim_names=names)


def compiled(module: nn.Module, backend: str | None) -> nn.Module:
    return module if backend is None else torch.compile(module, backend=backend)


def _reduce_last(model: nn.Module, last: bool) -> contextlib.AbstractContextManager[Any]:
    inner = getattr(model, "_orig_mod", model)
    if isinstance(inner, FSDPModule):
        inner.set_requires_gradient_sync(last)
    elif not last and hasattr(inner, "no_sync"):
        return inner.no_sync()
    return contextlib.nullcontext()


def _all_reduce_last(model: nn.Module, last: bool) -> contextlib.AbstractContextManager[Any]:
    model.set_requires_all_reduce(last)
    return contextlib.nullcontext()


POLICIES: dict[str, Callable[[nn.Module, bool], contextlib.AbstractContextManager[Any]]] = {
    "last": _reduce_last,
    "each": lambda model, last: contextlib.nullcontext(),
    "all-reduce last": _all_reduce_last,
}


def precision(name: str) -> contextlib.AbstractContextManager[Any]:
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=name == "autocast")


# ------------------------------------------------------------------------------------- layouts


def single(model: str, *, folder: Path, backend: str | None = None) -> Laid:
    return Laid(compiled(MODELS[model](), backend), Ranks())


def ddp(
    model: str,
    *,
    folder: Path,
    fp16: bool = False,
    inner: str | None = None,
    outer: str | None = None,
    **options: Any,
) -> Laid:
    wrapped = DistributedDataParallel(compiled(MODELS[model](), inner), **options)
    if fp16:
        wrapped.register_comm_hook(None, fp16_compress_hook)
    return Laid(compiled(wrapped, outer), ranks_of())


def fsdp2(
    model: str,
    *,
    folder: Path,
    replicas: int | None = None,
    copies: int = 1,
    sequence: bool = False,
    offload: bool = False,
    bfloat16: bool = False,
    halves: bool = False,
    inner: str | None = None,
    outer: str | None = None,
    **options: Any,
) -> Laid:
    """By hand: a unit for each layer, and the rest. Any of FSDP2, HSDP, and TP with or without."""
    whole = MODELS[model]()
    size = dist.get_world_size() // copies
    if copies > 1:
        meshes = mesh_of((size, copies), ("data", "tensor"))
        (in_sequences if sequence else in_tensors)(whole, meshes["tensor"])
        mesh = meshes["data"]
    elif replicas is None:
        mesh = mesh_of((size,), ("data",))
    else:
        mesh = mesh_of((replicas, size // replicas), ("replicas", "shards"))
    if offload:
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=False)
    if bfloat16:
        options["mp_policy"] = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
    # In groups of two after a forward, under a third kind of tensor; the rest stays whole there.
    of_layers = {**options, "reshard_after_forward": 2} if halves else options
    if size > 1:
        for layer in [m for m in whole.modules() if isinstance(m, LlamaDecoderLayer)]:
            if inner is not None:
                layer.compile(backend=inner)
            fully_shard(layer, mesh=mesh, **of_layers)
        fully_shard(whole, mesh=mesh, **options)
    return Laid(compiled(whole, outer), ranks_of(copies))


def replicated(model: str, *, folder: Path) -> Laid:
    """torch's DDP that is made of FSDP2."""
    whole = MODELS[model]()
    for layer in [m for m in whole.modules() if isinstance(m, LlamaDecoderLayer)]:
        replicate_module(layer)
    return Laid(replicate_module(whole), ranks_of())


LINEARS = {
    **{f"self_attn.{name}_proj": ColwiseParallel for name in "qkv"},
    "self_attn.o_proj": RowwiseParallel,
    "mlp.gate_proj": ColwiseParallel,
    "mlp.up_proj": ColwiseParallel,
    "mlp.down_proj": RowwiseParallel,
}


def in_tensors(whole: nn.Module, mesh: DeviceMesh) -> None:
    """Layers in parts; norms and embeddings stay off the mesh."""
    for layer in whole.model.layers:
        parallelize_module(layer, mesh, {name: style() for name, style in LINEARS.items()})


def in_sequences(whole: nn.Module, mesh: DeviceMesh) -> None:
    """The activations between them in parts too, so that the norms' gradients are summands."""
    parts, all_of_it = Shard(1), Replicate()
    norm = functools.partial(SequenceParallel, use_local_output=True)
    plan = {name: style() for name, style in LINEARS.items()}
    plan |= {
        "input_layernorm": norm(),
        "post_attention_layernorm": norm(),
        "self_attn": PrepareModuleInput(
            input_kwarg_layouts={"hidden_states": parts},
            desired_input_kwarg_layouts={"hidden_states": all_of_it},
            use_local_output=True,
        ),
        "mlp": PrepareModuleInput(
            input_layouts=(parts,), desired_input_layouts=(all_of_it,), use_local_output=True
        ),
        "self_attn.o_proj": RowwiseParallel(output_layouts=parts),
        "mlp.down_proj": RowwiseParallel(output_layouts=parts),
    }
    for layer in whole.model.layers:
        parallelize_module(layer, mesh, plan)
    ends = {
        "model.embed_tokens": RowwiseParallel(input_layouts=all_of_it, output_layouts=parts),
        "model.norm": norm(),
        "lm_head": ColwiseParallel(input_layouts=parts, output_layouts=all_of_it),
    }
    parallelize_module(whole, mesh, ends)
    whole.register_forward_pre_hook(_with_positions, with_kwargs=True)


def _with_positions(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
    """Llama would count them in its part of the sequence."""
    positions = torch.arange(kwargs["input_ids"].shape[1])[None]
    return args, {**kwargs, "position_ids": positions}


def by_accelerate(
    model: str, *, folder: Path, replicas: int | None = None, offload: bool = False
) -> Laid:
    """Accelerate's own units. Its `Accelerator` refuses FSDP on the CPU, so that one stands in."""
    size, names = dist.get_world_size(), ("dp_replicate", "dp_shard")
    mesh = mesh_of((size,), names[1:])
    if replicas is not None:
        mesh = mesh_of((replicas, size // replicas), names)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        reshard_after_forward=True,
        cpu_ram_efficient_loading=False,
        cpu_offload=CPUOffloadPolicy(pin_memory=False) if offload else None,
    )
    accelerator = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin),
        torch_device_mesh=mesh,
        parallelism_config=SimpleNamespace(fsdp_dim_names=mesh.mesh_dim_names),
        mixed_precision="no",
        is_main_process=dist.get_rank() == 0,
        device=torch.device("cpu"),
    )
    return Laid(fsdp2_prepare_model(accelerator, MODELS[model]()), ranks_of())


def at_load_time(model: str, *, folder: Path, **sizes: int) -> Laid:
    """As transformers shards a model while it reads it.

    Adapters come later, and are as whole on every process as the Trainer leaves them: with a hook
    of its own that averages their gradients.
    """
    config = DistributedConfig(**sizes)
    read = "untied" if model == "lora" else model
    whole = LlamaForCausalLM.from_pretrained(folder / read, distributed_config=config).train()
    if model == "lora":
        whole = with_adapters(whole)
        for parameter in whole.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(_average_gradient)
    return Laid(whole, ranks_of(sizes.get("tp_size", 1)))


def _average_gradient(parameter: Tensor) -> None:
    dist.all_reduce(parameter.grad, op=dist.ReduceOp.SUM)
    parameter.grad /= dist.get_world_size()


def fsdp1(model: str, *, folder: Path, strategy: str = "FULL_SHARD", original: bool = True) -> Laid:
    options: dict[str, Any] = {}
    if strategy.startswith("HYBRID"):
        size = dist.get_world_size()
        options["device_mesh"] = mesh_of((2, size // 2), ("replicas", "shards"))
    whole = FullyShardedDataParallel(
        MODELS[model](),
        sharding_strategy=ShardingStrategy[strategy],
        use_orig_params=original,
        auto_wrap_policy=ModuleWrapPolicy({LlamaDecoderLayer}),
        device_id=torch.device("cpu"),
        **options,
    )
    return Laid(whole, ranks_of())
