"""An evaluation with the metric of language models, on one process or on several with gloo."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainingArguments

from hf_adaptive_batch import language_modeling_metrics, sample_losses

from .cases import llama, pad, sequences


def evaluated(
    folder: Path, batch: int = 2, samples: int = 13, model: Any = None, **options: Any
) -> dict[str, float]:
    """Samples of different lengths; their last batch is a partial one."""
    trainer = Trainer(
        model=model or differing(),
        args=TrainingArguments(
            str(folder), per_device_eval_batch_size=batch, report_to=[], use_cpu=True, **options
        ),
        eval_dataset=sequences(samples, uneven=True),
        data_collator=pad,
        compute_metrics=language_modeling_metrics(tokens_per_byte=0.5),
        preprocess_logits_for_metrics=sample_losses,
    )
    return trainer.evaluate()


def differing() -> Any:
    """A model that finds some samples far harder than others."""
    model = llama(dropout=0.0)
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    return model


def whole_and_by_batch(folder: Path) -> dict[str, Any]:
    return {
        "whole": evaluated(folder),
        "by batch": evaluated(folder, batch_eval_metrics=True),
    }


SCENARIOS = {"whole_and_by_batch": whole_and_by_batch}
