"""Tiny models, datasets and runs that the tests of the Trainer share."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import datasets
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

from hf_adaptive_batch import AdaptiveBatchArguments, AdaptiveBatchTrainer


VOCABULARY = 32

# The Trainer collects garbage whenever it trains or is made; searching through all that was just
# imported would be most of the time of these tests.
gc.collect()
gc.freeze()


def llama(*, dropout: float = 0.1, tied: bool = False, layers: int = 1) -> LlamaForCausalLM:
    """A Llama of some thousand weights, the same at every call."""
    set_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=layers,
            num_attention_heads=2,
            num_key_value_heads=1,
            attention_dropout=dropout,
            tie_word_embeddings=tied,
        )
    )


class MeanLossModel(nn.Module):
    """A model whose loss is a plain mean over its micro-batch: its forward takes no **kwargs."""

    def __init__(self) -> None:
        super().__init__()
        set_seed(0)
        self.embedding = nn.Embedding(VOCABULARY, 16)
        self.dropout = nn.Dropout(0.1)
        self.head = nn.Linear(16, VOCABULARY)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.head(self.dropout(self.embedding(input_ids)))
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return {"loss": loss, "logits": logits}


def sequences(samples: int, *, length: int = 8, uneven: bool = False) -> datasets.Dataset:
    """Random tokens; `index` tells which sample a row is. Uneven rows hold 2 to `length` tokens."""
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(0, VOCABULARY, (samples, length), generator=generator).tolist()
    if uneven:
        lengths = torch.randint(2, length + 1, (samples,), generator=generator).tolist()
        rows = [row[:n] for row, n in zip(rows, lengths, strict=True)]
    return datasets.Dataset.from_dict({"input_ids": rows, "labels": rows})


def pad(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """A collator: pads to the longest row; padding is no target."""
    longest = max(len(row["input_ids"]) for row in rows)

    def padded(name: str, filler: int) -> torch.Tensor:
        return torch.tensor([row[name] + [filler] * (longest - len(row[name])) for row in rows])

    ones = [{"mask": [1] * len(row["input_ids"])} for row in rows]
    mask = torch.tensor([row["mask"] + [0] * (longest - len(row["mask"])) for row in ones])
    return {
        "input_ids": padded("input_ids", 0),
        "labels": padded("labels", -100),
        "attention_mask": mask,
    }


class Recorder:
    """A collator that notes which samples it was given, in order; for runs without workers."""

    def __init__(self) -> None:
        self.micro_batches: list[list[int]] = []

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        self.micro_batches.append([row["index"] for row in rows])
        return pad(rows)

    @property
    def samples(self) -> list[int]:
        return [index for micro_batch in self.micro_batches for index in micro_batch]


def arguments(folder: Path | str, kind: type = AdaptiveBatchArguments, **options: Any) -> Any:
    """Quiet arguments for a short run on the CPU; nothing that decides the order of samples."""
    quiet: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "num_train_epochs": 2,
        "learning_rate": 3e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return kind(**{**quiet, **options})


def adaptive(folder: Path | str, *, trainer: dict[str, Any] | None = None, **options: Any) -> Any:
    """An `AdaptiveBatchTrainer` that has not trained; `trainer` are its arguments beside `args`."""
    given: dict[str, Any] = {"train_dataset": sequences(37), **(trainer or {})}
    if "model" not in given:
        given["model"] = llama()
    return AdaptiveBatchTrainer(args=arguments(folder, **options), **given)


def plain(folder: Path | str, *, trainer: dict[str, Any] | None = None, **options: Any) -> Trainer:
    """A plain `Trainer` that has not trained."""
    given: dict[str, Any] = {"train_dataset": sequences(37), **(trainer or {})}
    if "model" not in given:
        given["model"] = llama()
    return Trainer(args=arguments(folder, TrainingArguments, **options), **given)


GROWING: dict[str, Any] = {
    "eta": 0.5,
    "max_global_batch_size": 16,
    "max_micro_batch_size": 8,
    "batch_warmup_samples": 0,
}
"""Options under which the batch of a random problem grows 4 -> 8 -> 16 within a few steps."""


def history(trainer: Trainer, *, adaptive_keys: bool = True) -> list[dict[str, Any]]:
    """The log history without what depends on the clock on the wall."""
    return [
        {
            key: value
            for key, value in entry.items()
            if "runtime" not in key
            and "per_second" not in key
            and (adaptive_keys or not key.startswith("adaptive_batch/"))
        }
        for entry in trainer.state.log_history
    ]


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in trainer.model.state_dict().items()}


def same_weights(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    """Bitwise."""
    return first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)
