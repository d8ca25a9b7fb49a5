"""What goes wrong when accumulation changes under a plain Trainer with DDP, and here does not."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_adaptive_batch import AdaptiveBatchTrainer, read_records

from . import train_on_ranks
from .cases import arguments, llama, pad, sequences
from .train_on_ranks import Job, launch


pytestmark = [pytest.mark.distributed, pytest.mark.slow]

RANKS, MICRO, STEPS = 2, 4, 12
HOOK = "fp16"  # that for bf16 is for NCCL alone
# The batch doubles 16 -> 32 by accumulation alone.
GROWING = {
    **{"eta": 0.02, "batch_warmup_samples": 0, "max_global_batch_size": 32, "num_train_epochs": 2},
    **{"max_micro_batch_size": MICRO, "gradient_accumulation_steps": 2, "max_grad_norm": 0.0},
}
JOBS = [Job(name) for name in ("naive", "untouched", "ours", HOOK)]


class Assigns(TrainerCallback):
    """The naive way to a larger batch."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3:
            args.gradient_accumulation_steps = 4


class Registers(TrainerCallback):
    """A communication hook, as accelerate's `DistributedDataParallelKwargs(comm_hook=...)` does."""

    trainer: Trainer

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.trainer.model_wrapped.register_comm_hook(None, default_hooks.fp16_compress_hook)


def perform(job: Job, folder: Path) -> dict[str, Any]:
    common = {
        "ddp_find_unused_parameters": False,
        "ddp_backend": "gloo",
        "per_device_train_batch_size": MICRO,
    }
    data = {"train_dataset": sequences(120), "data_collator": pad, "model": llama(dropout=0.0)}
    if job.name in ("naive", "untouched"):
        args = TrainingArguments(
            **{**common, "output_dir": str(folder / job.name), "use_cpu": True, "seed": 1},
            **{"gradient_accumulation_steps": 2, "max_steps": STEPS, "report_to": "none"},
            **{"save_strategy": "no", "disable_tqdm": True, "learning_rate": 1e-2},
        )
        callbacks = [Assigns()] if job.name == "naive" else []
        trainer = Trainer(args=args, callbacks=callbacks, **data)
        trainer.train()
        return {"weights": weights(trainer), "steps": trainer.state.global_step}
    callbacks = [Registers()] if job.name == HOOK else []
    out = folder / job.name
    trainer = AdaptiveBatchTrainer(
        args=arguments(out, **{**GROWING, **common}), callbacks=callbacks, **data
    )
    for callback in callbacks:
        callback.trainer = trainer
    trainer.train()
    records = read_records(out) if os.environ["RANK"] == "0" else None
    return {"weights": weights(trainer), "records": records}


def weights(trainer: Trainer) -> torch.Tensor:
    return torch.cat([value.detach().flatten() for value in trainer.model.parameters()])


_work = train_on_ranks.work


def work(*given: Any) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_on_ranks, "perform", perform)
        _work(*given)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_on_ranks, "work", work)
        return launch(RANKS, JOBS, tmp_path_factory.mktemp("ranks"))


def drift(results: list[dict[str, Any]]) -> float:
    first, second = (found["weights"] for found in results)
    return float((first - second).abs().max())


def test_ranks_of_a_plain_trainer_drift_apart_when_accumulation_is_assigned(trained):
    """Silently: it synchronises at other micro-batches than it steps at.

    When this fails, the Trainer may have learnt to change it, and ours may become simpler.
    """
    assert drift(trained["untouched"]) == 0
    assert drift(trained["naive"]) > 1e-5
    assert trained["naive"][0]["steps"] > 3


@pytest.mark.parametrize("name", ["ours", HOOK])
def test_ranks_stay_bitwise_alike_when_accumulation_changes(trained, name):
    assert drift(trained[name]) == 0
    records = trained[name][0]["records"]
    grown = set(zip(records["accumulation_steps"], records["micro_batch_size"], strict=True))
    assert grown == {(2, MICRO), (4, MICRO)}


def test_a_hook_that_compresses_changes_moments_by_its_rounding_at_most(trained):
    """Of 11 bits, once per step: 5e-4; and small batches are seen before it."""
    expected, records = trained["ours"][0]["records"], trained[HOOK][0]["records"]
    for column in ("global_batch_size", "step_samples", "reason", "workers"):
        assert records[column] == expected[column], column
    for column in ("small_sq_norm", "big_sq_norm", "loss"):
        assert records[column] == pytest.approx(expected[column], rel=2e-3), column
    assert records["small_sq_norm"][0] == pytest.approx(expected["small_sq_norm"][0], rel=1e-6)
    assert records["big_sq_norm"] != expected["big_sq_norm"]  # the hook was at work
