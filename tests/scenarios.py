"""Runs functions of a module on real processes with gloo, each alike on all of them.

The module has them in a table, `SCENARIOS`: name -> function of a folder. What it returns, the test
reads by rank.
"""

from __future__ import annotations

import importlib
import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from . import train_on_ranks
from .fsdp_on_cpu import allow_fsdp_on_cpu


_work = train_on_ranks.work


def launch(
    module: str,
    processes: int,
    names: list[str],
    folder: Path,
    environment: dict[str, str] | None = None,
) -> dict[str, list[dict[str, Any]]]:
    """Run scenarios one after the other on so many processes; results by scenario and rank."""
    jobs = [train_on_ranks.Job(name) for name in names]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_on_ranks, "work", partial(work, module, environment or {}))
        found = train_on_ranks.launch(processes, jobs, folder)
    for name, ranks in found.items():
        for rank in ranks:
            assert "trace" not in rank, f"{name}: {rank['trace']}"
    return found


def work(module: str, environment: dict[str, str], *given: Any) -> None:
    """All scenarios on one process, in the environment that a launcher would make for it."""
    os.environ.update(environment)
    if environment:
        allow_fsdp_on_cpu()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_on_ranks, "perform", partial(perform, module))
        _work(*given)


def perform(module: str, job: train_on_ranks.Job, folder: Path) -> dict[str, Any]:
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    return importlib.import_module(module).SCENARIOS[job.name](folder / job.name)
