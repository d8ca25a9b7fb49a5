"""The loop that tests of `AdaptiveBatch` share: as a user writes it, and what it went through."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.data_loader import SeedableRandomSampler
from accelerate.state import AcceleratorState, GradientState
from torch.utils.data import DataLoader
from transformers import set_seed

from hf_adaptive_batch import AdaptiveBatch

from .cases import GROWING, pad, sequences


RATE = 3e-3


def loader_of(
    dataset: Any, collate: Callable[..., Any] = pad, size: int = 4, **options: Any
) -> Any:
    """In the order of the Trainer's own loader of seed 42."""
    sampler = SeedableRandomSampler(dataset, data_seed=42)
    return DataLoader(dataset, batch_size=size, sampler=sampler, collate_fn=collate, **options)


@dataclass
class Setting:
    """A user's objects, and what a loop over them saw."""

    accelerator: Accelerator
    model: Any
    optimizer: Any
    adaptive: AdaptiveBatch
    losses: list[float] = field(default_factory=list)
    sizes: list[tuple[int, int]] = field(default_factory=list)  # of each step: planned, trained on

    def train(self, *, stop: int | None = None, schedule: Any = None) -> Setting:
        for step in self.adaptive:
            for batch in step:
                step.backward(self.model(**batch)["loss"])
            self.accelerator.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            if schedule is not None:
                schedule.step()
            self.optimizer.zero_grad()
            self.losses.append(step.loss)
            self.sizes.append((step.plan.global_batch_size, step.samples))
            if self.adaptive.run.clock.steps == stop:
                break
        return self

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        model = self.accelerator.unwrap_model(self.model)
        return {name: value.detach().clone() for name, value in model.state_dict().items()}


def setting(
    model: Any,
    data: Any = None,
    folder: Path | str | None = None,
    *,
    accelerator: Accelerator | None = None,
    prepared: bool = False,
    **options: Any,
) -> Setting:
    """As a user sets it up; by default so that the batch grows 4 -> 8 -> 16."""
    accelerator = accelerator or new_accelerator()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    loader = loader_of(sequences(37)) if data is None else data
    if prepared:
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    else:
        model, optimizer = accelerator.prepare(model, optimizer)
    budget = {"num_train_epochs": 2} if not any("train_" in name for name in options) else {}
    adaptive = AdaptiveBatch(
        accelerator,
        model,
        optimizer,
        loader,
        output_dir=folder,
        seed=42,
        **{**GROWING, **budget, **options},
    )
    accelerator.register_for_checkpointing(adaptive)
    set_seed(42)  # as the Trainer does
    return Setting(accelerator, model, optimizer, adaptive)


def new_accelerator(**options: Any) -> Accelerator:
    """One that knows nothing of those before it, which share their state."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    return Accelerator(cpu=True, **options)
