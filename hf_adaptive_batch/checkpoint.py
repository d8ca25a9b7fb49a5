"""The state of a run in a checkpoint: one small JSON file beside the Trainer's own."""

import json
import os
import zipfile
from pathlib import Path
from typing import Any

from transformers import TrainingArguments
from transformers.trainer import (
    FSDP_MODEL_NAME,
    OPTIMIZER_NAME,
    OPTIMIZER_NAME_BIN,
    SCALER_NAME,
    SCHEDULER_NAME,
    TRAINER_STATE_NAME,
)
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .averaging_files import AVERAGE_FOLDER, is_saved
from .run import AdaptiveRun
from .run_state import restore, state_of


STATE_FILE = "adaptive_batch_state.json"
_STATE_VERSION = 2
# What torch writes of a Trainer's state, if it is there at all.
_ARCHIVES = (
    OPTIMIZER_NAME,
    OPTIMIZER_NAME_BIN,
    SCHEDULER_NAME,
    SCALER_NAME,
    f"{FSDP_MODEL_NAME}.bin",
)


def save_run(
    run: AdaptiveRun,
    args: TrainingArguments,
    folder: str | os.PathLike[str],
    *,
    averaged: bool = False,
) -> None:
    """Write the state into a checkpoint folder, whole or not at all; to be called on all ranks.

    Args:
        run: The run, between two steps.
        args: The Trainer's arguments.
        folder: The checkpoint's folder.
        averaged: Whether the average of the weights belongs to it; saved before.
    """
    state: dict[str, Any] = {
        "version": _STATE_VERSION,
        "random_states": _random_states(args),
        **state_of(run),
    }
    if averaged:
        state["averaged"] = True
    if not args.should_save:
        return
    path = Path(folder) / STATE_FILE
    path.parent.mkdir(parents=True, exist_ok=True)  # FSDP's sharded weights are saved only later
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(state, indent=1), encoding="utf-8")
    temporary.replace(path)


def is_checkpoint(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder is named as the Trainer names checkpoints."""
    return Path(folder).name.startswith(PREFIX_CHECKPOINT_DIR)


def invalidate(folder: str | os.PathLike[str], args: TrainingArguments) -> None:
    """Make a checkpoint incomplete before it is written again; to be called on all ranks.

    Else a kill in the middle would leave old files among new ones, and the whole taken for one.

    Args:
        folder: The checkpoint's folder, if there is one.
        args: The Trainer's arguments.
    """
    stale = [TRAINER_STATE_NAME, STATE_FILE] if args.should_save else []
    if args.world_size > 1:
        stale.append(f"rng_state_{args.process_index}.pth")
    for name in stale:
        (Path(folder) / name).unlink(missing_ok=True)


def load_run(run: AdaptiveRun, folder: str | os.PathLike[str], *, anew: bool = False) -> None:
    """Go on from a checkpoint; what the arguments say stays, within their bounds.

    Args:
        run: A run at its beginning; set to where the checkpoint was taken.
        folder: The checkpoint's folder.
        anew: Begin the epoch of a stream at its beginning, instead of at the place in it.
    """
    restore(run, read_state(folder), anew=anew)


def last_complete_checkpoint(output_dir: str | os.PathLike[str]) -> str:
    """The latest checkpoint that a kill in the middle of saving did not leave in pieces.

    Args:
        output_dir: The run's folder.

    Returns:
        The checkpoint's folder.

    Raises:
        ValueError: If there is none.
    """
    found = find_complete_checkpoint(output_dir)
    if found is None:
        raise ValueError(  # the first words are those of the Trainer
            f"No valid checkpoint found in output directory ({os.fspath(output_dir)}): none is "
            f"complete, with {TRAINER_STATE_NAME} and {STATE_FILE}, which another Trainer does not "
            "write; start without resume_from_checkpoint."
        )
    return found


def find_complete_checkpoint(output_dir: str | os.PathLike[str]) -> str | None:
    """As `last_complete_checkpoint`, where it is no error if there is none.

    Args:
        output_dir: The run's folder.

    Returns:
        The checkpoint's folder, or None.
    """
    folders = Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
    found = {int(f.name.split("-")[-1]): f for f in folders if f.name.split("-")[-1].isdigit()}
    latest_first = (folder for _, folder in sorted(found.items(), reverse=True))
    return next((str(folder) for folder in latest_first if _is_complete(folder)), None)


def _is_complete(folder: Path) -> bool:
    """Whether every file is there and whole: rank 0 writes the Trainer's state last of its own."""
    try:
        json.loads((folder / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
        state = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    if state.get("averaged") and not is_saved(folder / AVERAGE_FOLDER):
        return False
    # Other ranks' files may come later. What torch writes ends with the directory of an archive.
    others = [name for name in _ARCHIVES if (folder / name).exists()]
    wanted = [*others, *state.get("random_states", ())]
    sharded = {path.parent for path in folder.glob("*/*.distcp")}
    return all(zipfile.is_zipfile(folder / name) for name in wanted) and all(
        (path / ".metadata").is_file()  # written last, when all ranks have written their shards
        for path in sharded
    )


def _random_states(args: TrainingArguments) -> list[str]:
    """The Trainer's files of its random states: of every process that saves into the folder."""
    if args.save_only_model:
        return []
    if args.world_size == 1:
        return ["rng_state.pth"]
    ranks = [args.process_index] if args.save_on_each_node else range(args.world_size)
    return [f"rng_state_{rank}.pth" for rank in ranks]


def check_checkpoint(folder: str | os.PathLike[str]) -> None:
    """Refuse a folder from which a run cannot go on.

    Args:
        folder: The checkpoint's folder.

    Raises:
        ValueError: If it is in pieces, another Trainer's, or of another version.
    """
    written = [name for name in (TRAINER_STATE_NAME, STATE_FILE) if (Path(folder) / name).exists()]
    if written != [TRAINER_STATE_NAME] and not _is_complete(Path(folder)):
        raise ValueError(
            f"resume_from_checkpoint ({folder}) must be complete, because a run goes on from all "
            "of it, but it lacks files or has cut ones, as a save that was interrupted leaves it; "
            "name another, or pass True for the last complete one."
        )
    read_state(folder)


def read_state(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Read the state that `save_run` wrote.

    Args:
        folder: The checkpoint's folder.

    Returns:
        The state as plain JSON.

    Raises:
        ValueError: If there is none, or another version's.
    """
    path = Path(folder) / STATE_FILE
    if not path.is_file():
        raise ValueError(
            f"resume_from_checkpoint ({folder}) must hold {STATE_FILE}, because the place in the "
            "data and the batch size are in it; it was saved by another Trainer: resume it with "
            "that one, or start a new run from its weights."
        )
    state: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if state.get("version") != _STATE_VERSION:
        raise ValueError(
            f"version ({state.get('version')}) of {path} must be {_STATE_VERSION}, because its "
            "fields are read by name; resume with the release that wrote it."
        )
    return state
