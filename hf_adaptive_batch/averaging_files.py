"""The files of an average of weights: its tensors, which load into any layout, and its numbers."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.tensor import DTensor


AVERAGE_FOLDER = "weight_average"  # in a checkpoint
_STATE_FILE = "average.json"  # beside the tensors, and written after them
_STATE_VERSION = 1


def write_average(
    folder: str | os.PathLike[str],
    averages: Mapping[str, Tensor],
    state: Mapping[str, float],
    *,
    writes: bool,
) -> None:
    """Write an average, whole or not at all; to be called on all processes.

    Args:
        folder: Of its own. What was saved there before is replaced.
        averages: Tensors by name; sharded ones are written by all who hold a part.
        state: Its numbers.
        writes: Whether this process writes what all of them hold.
    """
    path = Path(folder)
    if writes and path.exists():
        shutil.rmtree(path)
    if any(isinstance(average, DTensor) for average in averages.values()):
        dist.barrier()  # before others write there
        dcp.save(dict(averages), checkpoint_id=path)
    elif writes:
        with _alone():
            dcp.save(dict(averages), checkpoint_id=path, no_dist=True)
    if writes:
        temporary = path / f"{_STATE_FILE}.tmp"
        text = json.dumps({"version": _STATE_VERSION, **state}, indent=1)
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path / _STATE_FILE)


def is_saved(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder holds a whole average: its numbers are written last.

    Args:
        folder: The one that was given to `write_average`.

    Returns:
        False also where saving was interrupted.
    """
    return all((Path(folder) / name).is_file() for name in (_STATE_FILE, ".metadata"))


def read_state(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Read the numbers of an average.

    Args:
        folder: The one that was given to `write_average`.

    Returns:
        As they were given, with their version.

    Raises:
        ValueError: If the average is not whole, or another version's.
    """
    path = Path(folder)
    if not is_saved(path):
        raise ValueError(
            f"{path} must hold an average of the weights, because it goes on from there, but none "
            "was kept when the checkpoint was saved, or saving was interrupted; resume another, or "
            "resume without averaging, or start a new run from its weights."
        )
    state: dict[str, Any] = json.loads((path / _STATE_FILE).read_text(encoding="utf-8"))
    if state.get("version") != _STATE_VERSION:
        raise ValueError(
            f"version ({state.get('version')}) of {path / _STATE_FILE} must be {_STATE_VERSION}, "
            "because its fields are read by name; resume with the release that wrote it."
        )
    return state


def read_shapes(folder: str | os.PathLike[str]) -> dict[str, torch.Size]:
    """Read which parameters an average is of.

    Args:
        folder: The one that was given to `write_average`.

    Returns:
        The shapes of the whole parameters, by name.
    """
    metadata: Any = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    return {name: stored.size for name, stored in metadata.items()}


def read_average(folder: str | os.PathLike[str], averages: dict[str, Tensor]) -> None:
    """Read an average into tensors, each process what it holds.

    Args:
        folder: The one that was given to `write_average`.
        averages: Tensors by name, sharded or not; filled in place.
    """
    # Not together: a collective would wait for the processes that do not see the folder.
    with _alone():
        dcp.load(dict(averages), checkpoint_id=folder, no_dist=True)


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Save or load as a single process; torch warns of that also where it is asked for it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield
