"""TRL's SFTTrainer and adapters, also on a quantised base, on several processes with gloo."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from trl import SFTConfig, SFTTrainer

from hf_adaptive_batch import AdaptiveBatchTrainer, read_records

from .cases import arguments, llama, sequences
from .test_peft import load, with_lora
from .test_trl import CASES, COMMON, GROWING, TOKENIZER, AdaptiveSFTTrainer, Arguments, model


CASE = "packed without padding"


def told(trainer: Any, folder: Path | None = None) -> dict[str, Any]:
    trainer.train()
    return {
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "weights": [float(p.detach().double().sum()) for p in trainer.model.parameters()],
        "records": dict(read_records(folder)) if folder else {},
        "samples": len(trainer.train_dataset),
    }


def sft(folder: Path) -> dict[str, Any]:
    """Plain, with a constant batch, and growing.

    The first two without an epoch's last samples, of which SFTTrainer gives some to both ranks.
    """
    data, options = CASES[CASE]
    given = {"train_dataset": data(), "processing_class": TOKENIZER}
    options = {**COMMON, **options}
    whole = {**options, "max_steps": 8}
    plain = SFTConfig(str(folder / "plain"), **whole)
    constant = Arguments(str(folder / "constant"), batch_schedule="constant", **whole)
    growing = Arguments(str(folder / "growing"), **GROWING, **options)
    return {
        "plain": told(SFTTrainer(model=model(), args=plain, **given)),
        "constant": told(AdaptiveSFTTrainer(model=model(), args=constant, **given)),
        "growing": told(
            AdaptiveSFTTrainer(model=model(), args=growing, **given), folder / "growing"
        ),
    }


def adapters(folder: Path) -> dict[str, Any]:
    """Of a base in full precision and of the same one quantised."""
    base = folder / "base"
    llama(dropout=0.0).save_pretrained(base)  # the first process writes
    torch.distributed.barrier()
    found = {}
    for quantised in ("none", "4 bits"):
        args = arguments(
            folder / quantised,
            per_device_train_batch_size=2,
            learning_rate=1e-3,
            num_train_epochs=1,
            **{"eta": 0.05, "batch_warmup_samples": 0, "max_global_batch_size": 16},
        )
        trainer = AdaptiveBatchTrainer(
            model=with_lora(load(base, quantised)), args=args, train_dataset=sequences(96)
        )
        found[quantised] = told(trainer, folder / quantised)
    return found


SCENARIOS = {"sft": sft, "adapters": adapters}
