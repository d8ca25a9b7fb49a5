"""Scenarios of sharded models and of what processes tell each other, on real processes with gloo.

Each is a function that all processes run alike; what it returns, the test reads by rank.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from accelerate import FullyShardedDataParallelPlugin
from safetensors import safe_open
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import (
    LlamaForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    TrainerCallback,
    set_seed,
)
from transformers.distributed import DistributedConfig

import hf_adaptive_batch
from hf_adaptive_batch import AdaptiveBatchTrainer, read_records

from . import scenarios
from .cases import VOCABULARY, MeanLossModel, arguments, llama, pad, sequences
from .train_on_ranks import FORCED, without_dropout


OURS = Path(hf_adaptive_batch.__file__).parent
SAVED = {"save_strategy": "steps", "save_steps": 2}
TWO_OF_FOUR = {  # a step of 16 samples, in two micro-batches on each of two ranks
    "max_grad_norm": 0.0,
    "ddp_backend": "gloo",
    "gradient_accumulation_steps": 2,
    **FORCED,
}
FSDP2 = {  # what `accelerate launch` sets for `accelerate_configs/fsdp2.yaml`
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}
HSDP = {  # and for `hsdp.yaml`, with two shards
    **FSDP2,
    "ACCELERATE_USE_PARALLELISM_CONFIG": "true",
    "PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "2",
    "PARALLELISM_CONFIG_DP_SHARD_SIZE": "2",
}


def trainer_of(model: Any, folder: Path, *, kind: Any = AdaptiveBatchTrainer, **options: Any):
    """A trainer of the rows that all tests here train on."""
    extra = options.pop("trainer", {})
    return kind(
        model=model,
        args=arguments(folder, **{**TWO_OF_FOUR, **options}),
        train_dataset=sequences(200),
        **extra,
    )


def whole(parameter: torch.Tensor) -> torch.Tensor:
    value = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
    return value.detach().clone()


def weights_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: whole(parameter) for name, parameter in model.named_parameters()}


def saved_once(model: Any, folder: Path) -> Path:
    if dist.get_rank() == 0:
        model.save_pretrained(folder)
    dist.barrier()
    return folder


class AtSaves(TrainerCallback):
    """Keeps the weights as they were saved, by step; all processes come here."""

    def __init__(self) -> None:
        self.weights: dict[int, dict[str, torch.Tensor]] = {}

    def on_save(self, args, state, control, model=None, **kwargs):
        self.weights[state.global_step] = weights_of(model)


# ------------------------------------------------------------- a model whose saved names differ


def mixture_of_experts() -> Qwen3MoeForCausalLM:
    """Saved expert by expert, and in memory one tensor for all of them."""
    set_seed(0)
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            intermediate_size=32,
            moe_intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            head_dim=4,
            num_experts=4,
            num_experts_per_tok=2,
            decoder_sparse_step=1,
            tie_word_embeddings=False,
        )
    )


def experts(folder: Path) -> dict[str, Any]:
    """Four steps, the first checkpoint the best; and the last of them again, from that one."""
    source = saved_once(mixture_of_experts(), folder / "moe")
    best = {
        "load_best_model_at_end": True,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "metric_for_best_model": "eval_loss",
        "greater_is_better": True,  # so that the best is not what the model ended with
    }

    def trainer(name: str, **options: Any) -> tuple[Any, AtSaves]:
        model = Qwen3MoeForCausalLM.from_pretrained(
            source, distributed_config=DistributedConfig(fsdp_size=2)
        )
        assert any(isinstance(parameter, DTensor) for parameter in model.parameters())
        saves = AtSaves()
        extra = {"eval_dataset": sequences(16), "callbacks": [saves], "data_collator": pad}
        given = {"max_steps": 6, **SAVED, **best, **options}
        return trainer_of(model, folder / name, trainer=extra, **given), saves

    first, saves = trainer("first")
    after_construction = first.args.save_only_model
    first.train()
    checkpoint = folder / "first" / "checkpoint-2"
    if dist.get_rank() == 0:
        shutil.copytree(folder / "first", folder / "again")
        shutil.rmtree(folder / "again" / "checkpoint-4")
    dist.barrier()
    again, saves_again = trainer("again")
    again.train(resume_from_checkpoint=str(folder / "again" / "checkpoint-2"))

    other, _ = trainer("other", save_only_model=True)
    before = weights_of(other.model)
    other._load_from_checkpoint(str(checkpoint))
    with safe_open(checkpoint / "model.safetensors", "pt") as file:
        names = set(file.keys())
    return {
        "names": (names, set(saves.weights[2])),
        "saves": saves.weights,
        "saves_again": saves_again.weights,
        "best": Path(first.state.best_model_checkpoint).name,
        "at_end": weights_of(first.model),
        "at_end_again": weights_of(again.model),
        "before_loading": before,
        "loaded": weights_of(other.model),
        "read_whole": weights_of(Qwen3MoeForCausalLM.from_pretrained(checkpoint)),
        "records": [read_records(folder / name) for name in ("first", "again")],
        "losses": [evaluated(trainer) for trainer in (first, again)],
        "save_only_model": [after_construction, first.args.save_only_model],
        "save_only_model_of_user": other.args.save_only_model,
    }


def evaluated(trainer: Any) -> list[float]:
    return [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]


# -------------------------------------------------------------------------------------- refusals


def refused(sharding: DistributedConfig, folder: Path, **options: Any) -> dict[str, Any]:
    """What is said of a model that was loaded so, and what becomes of the user's arguments."""
    source = saved_once(llama(layers=2), folder / "llama")
    model = LlamaForCausalLM.from_pretrained(source, distributed_config=sharding)
    args = arguments(folder / "out", **{**TWO_OF_FOUR, **SAVED, **options})
    try:
        AdaptiveBatchTrainer(model=model, args=args, train_dataset=sequences(37))
    except ValueError as error:
        return {"error": str(error), "save_only_model": args.save_only_model}
    return {"error": None, "save_only_model": args.save_only_model}


def pipeline(folder: Path) -> dict[str, Any]:
    return refused(DistributedConfig(pp_size=2), folder)


def sharded_twice(folder: Path) -> dict[str, Any]:
    return refused(DistributedConfig(fsdp_size=2), folder)


def sharded_twice_weights_only(folder: Path) -> dict[str, Any]:
    return refused(DistributedConfig(fsdp_size=2), folder, save_only_model=True)


# ------------------------------------------------------------------ what processes tell each other


class Steps(TrainerCallback):
    """Counts the calls of torch's collectives from the end of a step to the end of the next."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.steps: list[Counter[str]] = []

    def on_step_end(self, args, state, control, **kwargs):
        self.steps.append(Counter(self.calls))
        self.calls.clear()

    @contextmanager
    def counting(self) -> Iterator[None]:
        with ExitStack() as stack:
            for name in ("all_gather", "all_gather_object", "all_reduce", "broadcast"):
                counted = partial(self._call, name, getattr(dist, name))
                stack.enter_context(mock.patch.object(dist, name, counted))
            yield

    def _call(self, name: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self.calls[name] += 1
        return function(*args, **kwargs)


def mean_loss(folder: Path) -> dict[str, Any]:
    """Runs of two lengths; every second step is measured."""
    found: dict[str, Any] = {}
    for length in (4, 12):
        steps, out = Steps(), folder / f"mean-{length}"
        options = {"max_steps": length, "logging_strategy": "no", "test_interval": 2}
        extra = {"callbacks": [steps]}
        model = without_dropout(MeanLossModel())
        trainer = trainer_of(model, out, trainer=extra, **options)
        with steps.counting():
            trainer.train()
        dist.barrier()  # the first process has written the records
        found[str(length)] = {"steps": steps.steps, "measured": read_records(out)["step"]}
    return found


# ----------------------------------------------------------------------- under accelerate's plugin


def save_model(folder: Path) -> dict[str, Any]:
    """Train for two steps, and save the model as a user does, while training and after it."""
    kinds: list[str] = []

    class Saving(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 1:
                trainer.save_model(str(folder / "under way"))
                kinds.append(plugin.state_dict_type.name)
                under_way.update(weights_of(trainer.model))

    under_way: dict[str, torch.Tensor] = {}
    extra = {"callbacks": [Saving()]}
    model = llama(dropout=0.0, layers=2)
    trainer = trainer_of(model, folder / "out", trainer=extra, max_steps=2, **SAVED)
    plugin: FullyShardedDataParallelPlugin = trainer.accelerator.state.fsdp_plugin
    kinds.append(plugin.state_dict_type.name)
    trainer.train()
    trainer.save_model(str(folder / "by user"))
    kinds.append(plugin.state_dict_type.name)
    dist.barrier()
    return {
        "sharded": isinstance(trainer.model_wrapped, FSDPModule),
        "kinds": kinds,
        "under way": under_way,
        "by user": weights_of(trainer.model),
    }


class Interrupted(Exception):
    """What a test raises in the middle of a step."""


class Interrupting(AdaptiveBatchTrainer):
    interrupted_at: int | None = None  # micro-batch, from 1
    micro_batches = 0

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.micro_batches += 1
        if self.micro_batches == self.interrupted_at:
            raise Interrupted
        return super().training_step(*args, **kwargs)


class Gradients(TrainerCallback):
    def __init__(self) -> None:
        self.steps: list[torch.Tensor] = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps.append(torch.cat([whole(p.grad).flatten() for p in model.parameters()]))


def interrupted(folder: Path) -> dict[str, Any]:
    """The same two steps by a trainer that was interrupted in its first step, and by one not.

    The sum over replicas waits for the end of a step; where the batch cannot grow, all of it does.
    """
    found: dict[str, Any] = {}
    for schedule in ("norm_test", "constant"):
        for name, at in (("undisturbed", None), ("interrupted", 2)):
            gradients, key = Gradients(), f"{schedule}, {name}"
            trainer = trainer_of(
                llama(dropout=0.0, layers=2),
                folder / key,
                kind=Interrupting,
                trainer={"callbacks": [gradients]},
                max_steps=2,
                per_device_train_batch_size=2,
                batch_schedule=schedule,
            )
            raised = False
            if at is not None:
                trainer.interrupted_at = at
                try:
                    trainer.train()
                except Interrupted:
                    raised = True
            steps_before = len(gradients.steps)
            trainer.train()
            found[key] = {
                "raised": raised,
                "steps_before": steps_before,
                "gradients": gradients.steps,
                "weights": weights_of(trainer.model),
                "mesh": tuple(next(trainer.model.parameters()).device_mesh.shape),
            }
    return found


# -------------------------------------------------------------------------------------- processes

SCENARIOS = {
    scenario.__name__: scenario
    for scenario in (
        experts,
        pipeline,
        mean_loss,
        sharded_twice,
        sharded_twice_weights_only,
        save_model,
        interrupted,
    )
}


launch = partial(scenarios.launch, __name__)
