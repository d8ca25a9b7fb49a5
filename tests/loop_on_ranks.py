"""Scenarios of a loop without a Trainer on real processes with gloo.

Each is a function that all processes run alike; what it returns, the test reads by rank.
"""

from __future__ import annotations

import contextlib
import os
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from hf_adaptive_batch import AdaptiveBatch, read_records, target_tokens
from hf_adaptive_batch.report.records import RECORDS_FILE

from . import scenarios
from .cases import llama, pad, sequences
from .loops import Setting, loader_of, new_accelerator, setting
from .train_in_shards import weights_of
from .train_on_ranks import FORCED, Contrary


SAVED = (2, 3)  # steps: before the batch has grown in the middle of the epoch, and after


def growing(folder: Path, data: Any = None, **options: Any) -> tuple[Setting, list[list[int]]]:
    """Of 16 samples a step at first, whatever the number of processes; and what it trained on."""
    seen: list[list[int]] = []

    def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = pad(rows)
        batch["index"] = torch.tensor([row["index"] for row in rows])
        return batch

    size = int(os.environ.get("WORLD_SIZE", 1))
    data = sequences(80, uneven=True) if data is None else data
    data = data.add_column("index", list(range(len(data))))
    model = llama(dropout=0.0, layers=2)
    given = {"accumulation_steps": 4 // size, "weigh": target_tokens, **FORCED, **options}
    found = setting(model, loader_of(data, collate), folder, **given)
    found.model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs.pop("index").tolist()) or (args, kwargs),
        with_kwargs=True,
    )
    return found, seen


def trained(folder: Path) -> dict[str, Any]:
    """A run that is saved, and the same resumed from each saving."""
    first, seen = growing(folder / "first")
    found: dict[str, Any] = {"saves": {}}
    for step in first.adaptive:
        for batch in step:
            step.backward(first.model(**batch).loss)
        first.accelerator.clip_grad_norm_(first.model.parameters(), 1.0)
        first.optimizer.step()
        first.optimizer.zero_grad()
        first.losses.append(step.loss)
        first.sizes.append((step.plan.global_batch_size, step.samples))
        if first.adaptive.run.clock.steps in SAVED:
            first.accelerator.save_state(str(folder / f"save-{first.adaptive.run.clock.steps}"))
    found |= result_of(first, folder / "first", seen)
    for number in SAVED:
        again, _ = growing(folder / f"again-{number}")
        again.accelerator.load_state(str(folder / f"save-{number}"))
        again.train()
        found["saves"][number] = result_of(again, folder / f"again-{number}", [])
    return found


def elsewhere(folder: Path) -> dict[str, Any]:
    """What a single process has saved, on as many as there are."""
    found, seen = growing(folder)
    found.accelerator.load_state(str(folder.parent / "saved"))
    return result_of(found.train(), folder, seen)


def ragged(folder: Path) -> dict[str, Any]:
    """Steps that end with the epoch, where ranks have fewer samples than others, or none."""
    found, seen = growing(folder, sequences(33, uneven=True))
    return result_of(found.train(), folder, seen)


def given_up(folder: Path, **options: Any) -> dict[str, Any]:
    """On all ranks alike, in the middle of the third step."""
    found, seen = growing(folder, **options)
    found.train(stop=2)
    with contextlib.suppress(KeyboardInterrupt):
        for step in found.adaptive:
            for index, batch in enumerate(step):
                if index == 1:
                    raise KeyboardInterrupt
                step.backward(found.model(**batch).loss)
    hooks = sum(len(p._backward_hooks or ()) for p in found.model.parameters())
    seen.pop()
    return {**result_of(found.train(), folder, seen), "hooks": hooks}


def given_up_unreduced(folder: Path) -> dict[str, Any]:
    """A constant batch: FSDP holds whole gradients until the last micro-batch."""
    constant = {"batch_schedule": "constant"}
    whole, seen = growing(folder / "whole", **constant)
    wanted = result_of(whole.train(), folder / "whole", seen)
    return {**given_up(folder / "given up", **constant), "whole": wanted}


def contrary(folder: Path) -> dict[str, Any]:
    """Each rank's controller says something else."""
    rank = int(os.environ.get("RANK", 0))
    found, seen = growing(folder, controller=Contrary(rank))
    return result_of(found.train(), folder, seen)


def unwrapped(folder: Path) -> dict[str, Any]:
    accelerator, model = new_accelerator(), llama()
    optimizer = torch.optim.AdamW(model.parameters())
    loader = loader_of(sequences(16))
    try:
        AdaptiveBatch(accelerator, model, optimizer, loader, num_train_epochs=1)
    except RuntimeError as error:
        return {"refused": str(error)}
    return {}


def result_of(found: Setting, folder: Path, seen: list[list[int]]) -> dict[str, Any]:
    dist.barrier() if dist.is_initialized() else None
    return {
        "kind": kind_of(found.model),
        "samples": seen,
        "losses": found.losses,
        "sizes": found.sizes,
        "weights": weights_of(found.accelerator.unwrap_model(found.model)),
        "writes": found.adaptive.run.records is not None,
        "records": read_records(folder) if (folder / RECORDS_FILE).exists() else None,
    }


def kind_of(model: Any) -> str:
    if isinstance(model, FSDPModule):
        return "fsdp2"
    return "ddp" if isinstance(model, DistributedDataParallel) else type(model).__name__


# -------------------------------------------------------------------------------------- processes

SCENARIOS = {
    each.__name__: each
    for each in (trained, elsewhere, ragged, given_up, given_up_unreduced, contrary, unwrapped)
}


launch = partial(scenarios.launch, __name__)
