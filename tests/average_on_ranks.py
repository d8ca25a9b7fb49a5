"""Scenarios of averaged weights on real processes with gloo, as those of `train_in_shards`.

Each is a function that all processes run alike; what it returns, the test reads by rank.
"""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import LlamaForCausalLM
from transformers.distributed import DistributedConfig

from hf_adaptive_batch.averaging import WeightAverage

from . import layouts, scenarios
from .cases import llama, sequences
from .train_in_shards import saved_once, trainer_of, weights_of, whole


HALF_LIFE = 400.0
DECAYS = [0.9, 0.5, 0.99]
STEPS = {"max_steps": 8, "weight_decay": 0.0}
AVERAGED = {
    **STEPS,
    "averaging_half_life_tokens": HALF_LIFE,
    "eval_strategy": "steps",
    "eval_steps": 1,
    "save_strategy": "steps",
    "save_steps": 2,
}


def trainer_for(folder: Path, model: Any = None, **options: Any) -> Any:
    """Of 16 samples a step at first, whatever the number of processes."""
    size = int(os.environ.get("WORLD_SIZE", 1))
    given = {"gradient_accumulation_steps": 4 // size, **options}
    given |= {} if size > 1 else {"ddp_backend": None}
    model = model or llama(dropout=0.0, layers=2, tied=True)
    return trainer_of(model, folder, trainer={"eval_dataset": sequences(16)}, **given)


def averages_of(average: WeightAverage) -> dict[str, torch.Tensor]:
    return {name: whole(value) for name, value in average.values.items()}


def evaluated(trainer: Any) -> list[float]:
    return [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]


def in_trainer(folder: Path) -> dict[str, Any]:
    """A run with an average, the same resumed, and one without."""
    trainer = trainer_for(folder / "first", **AVERAGED)
    trainer.train()
    average = trainer.weight_averaging.average
    found = {
        "sharded": isinstance(trainer.model_wrapped, FSDPModule),
        "averages": averages_of(average),
        "local": {n: _local(value).numel() for n, value in average.values.items()},
        "weights": weights_of(trainer.model),
        "losses": evaluated(trainer),
        "steps": trainer.state.global_step,
        "checkpoint": str(folder / "first" / f"checkpoint-{trainer.state.global_step}"),
    }
    found["interrupted"] = interrupted_evaluation(trainer)
    with trainer.weight_averaging.averaged_weights():
        trainer.save_model(str(folder / "averaged"))
    found["weights after saving"] = weights_of(trainer.model)

    bare = trainer_for(folder / "bare", **STEPS)
    bare.train()
    found["bare weights"] = weights_of(bare.model)

    stopping = {**AVERAGED, "save_strategy": "no", "stop_at_eval_loss": found["losses"][2]}
    stopped = trainer_for(folder / "stopped", **stopping)
    stopped.train()
    found["stopped"] = evaluated(stopped)

    _together()
    again = trainer_for(folder / "again", **AVERAGED)
    again.train(resume_from_checkpoint=str(folder / "first" / "checkpoint-2"))
    found["resumed"] = {
        "averages": averages_of(again.weight_averaging.average),
        "weights": weights_of(again.model),
        "losses": evaluated(again),
        "retained": again.weight_averaging.average.retained == average.retained,
    }
    return found


def at_load_time(folder: Path) -> dict[str, Any]:
    """The same run of a model that transformers shards as it loads it."""
    source = saved_once(llama(dropout=0.0, layers=2, tied=True), folder / "llama")

    def sharded() -> Any:
        config = DistributedConfig(fsdp_size=dist.get_world_size())
        return LlamaForCausalLM.from_pretrained(source, distributed_config=config)

    trainer = trainer_for(folder / "first", sharded(), **AVERAGED)
    trainer.train()
    _together()
    again = trainer_for(folder / "again", sharded(), **AVERAGED)
    again.train(resume_from_checkpoint=str(folder / "first" / "checkpoint-4"))
    average = trainer.weight_averaging.average
    return {
        "sharded": all(isinstance(value, DTensor) for value in average.values.values()),
        "averages": averages_of(average),
        "losses": evaluated(trainer),
        "resumed": averages_of(again.weight_averaging.average),
    }


def interrupted_evaluation(trainer: Any) -> dict[str, Any]:
    """In the middle of a forward; FSDP2 has gathered the average, and is asked again at once."""
    batch = {"input_ids": torch.arange(8)[None], "labels": torch.arange(8)[None]}

    def loss_of_training() -> float:
        with torch.no_grad():
            return float(trainer.model_wrapped.eval()(**batch).loss)

    def cut_off(*_: Any) -> None:
        raise KeyboardInterrupt

    before, loss = loss_of_training(), trainer.evaluate()["eval_loss"]
    hook = trainer.model.model.layers[1].mlp.register_forward_pre_hook(cut_off)
    raised = False
    try:
        trainer.evaluate()
    except KeyboardInterrupt:
        raised = True
    hook.remove()
    found = {"weights": weights_of(trainer.model), "raised": raised}
    found["of training"] = (before, loss_of_training())
    found["of the average"] = (loss, trainer.evaluate()["eval_loss"])
    return found


def from_one_process(folder: Path) -> dict[str, Any]:
    """The average that a single process has saved, loaded under FSDP2."""
    laid = layouts.fsdp2("uneven", folder=folder)
    average = WeightAverage(laid.model)
    average.load(folder.parent / "one process")
    return {
        "averages": averages_of(average),
        "sharded": all(isinstance(value, DTensor) for value in average.values.values()),
        "state": (average.updates, average.retained, average.tokens_seen),
    }


MESHES: dict[str, tuple[str, dict[str, Any]]] = {
    "FSDP2 and tensor-parallel": ("tied", {"copies": 2}),
    "HSDP": ("untied", {"replicas": 2}),
    "an empty shard": ("lora", {}),
}


def meshes(folder: Path) -> dict[str, Any]:
    """Weights that are multiplied in every step, on meshes of one and two dimensions."""
    found: dict[str, Any] = {}
    for name, (model, options) in MESHES.items():
        laid = layouts.fsdp2(model, folder=folder, **options)
        average = WeightAverage(laid.model)
        multiply(laid.model, average)
        average.save(folder / name, writes=dist.get_rank() == 0)
        dist.barrier()
        again = WeightAverage(layouts.fsdp2(model, folder=folder, **options).model)
        again.load(folder / name)
        found[name] = {
            "averages": averages_of(average),
            "again": averages_of(again),
            "least": min(_local(value).numel() for value in average.values.values()),
            "weights": weights_of(laid.model),
        }
        with average.averaged():
            found[name]["inside"] = weights_of(laid.model)
        found[name]["after"] = weights_of(laid.model)
    try:
        WeightAverage(layouts.fsdp1("untied", folder=folder).model)
    except ValueError as error:
        found["FSDP1"] = str(error)
    return found


@torch.no_grad()
def multiply(model: torch.nn.Module, average: WeightAverage) -> None:
    for factor, decay in enumerate(DECAYS, start=2):
        for parameter in model.parameters():
            if parameter.requires_grad:
                _local(parameter).mul_(factor)
        average.update(decay)


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _together() -> None:
    if dist.is_initialized():
        dist.barrier()


# -------------------------------------------------------------------------------------- processes

SCENARIOS = {each.__name__: each for each in (in_trainer, at_load_time, from_one_process, meshes)}


launch = partial(scenarios.launch, __name__)
