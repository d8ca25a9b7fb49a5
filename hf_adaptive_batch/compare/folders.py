"""The folder of a comparison and those of its runs: whose they are, what came of them."""

import fcntl
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..report.history import COMPARISON_FILE, RunHistory, is_run, read_history
from .machine import machine, versions
from .plan import ComparePlan, Run


LOG_FILE = "log.txt"
FLAGS_FILE = "flags.json"
FINISHED_FILE = "finished.json"

_LOG_LINES = 15


@contextmanager
def locked(folder: Path) -> Iterator[int]:
    """Hold a folder for this comparison alone.

    Args:
        folder: Of the comparison; made if need be.

    Yields:
        The descriptor of the lock. A process that inherits it holds the folder, too: a comparison
        that was killed may have left runs that still write.

    Raises:
        ValueError: If it cannot be written to, or is held already.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / COMPARISON_FILE).open("a")
    except OSError as error:
        raise ValueError(
            f"output_dir ({folder}) must be a folder that can be written to, because the runs go "
            f"there, but: {error.strerror}; give another."
        ) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ValueError(
                f"output_dir ({folder}) must be used by one comparison at a time, because two "
                "would write into the same files, but another one, or a run that it left behind, "
                "is at work there; wait for it, or give another output_dir."
            ) from error
        yield file.fileno()


def check_folders(plan: ComparePlan) -> None:
    """Refuse folders that hold other runs than the plan's.

    Args:
        plan: The plan.

    Raises:
        ValueError: If there is one.
    """
    for run in plan.possible_runs():
        path = run.folder / FLAGS_FILE
        if not path.exists():
            continue
        found, wanted = json.loads(path.read_text("utf-8")), plan.identity(run)
        names = [n for n in {**wanted, **found} if _plain(wanted.get(n)) != _plain(found.get(n))]
        if names:
            differing = ", ".join(
                f"{name} ({wanted.get(name, 'not given')}; there {found.get(name, 'not given')})"
                for name in names
            )
            raise ValueError(
                f"{run.folder} must hold the same run, because its result would be taken for this "
                f"one's, but these differ: {differing}; give another output_dir, or remove the "
                "folder."
            )


def is_finished(run: Run) -> bool:
    """Whether it has come to its end, now or in an earlier comparison."""
    return (run.folder / FINISHED_FILE).is_file()


def last_lines(run: Run) -> list[str]:
    """The end of what a run printed."""
    try:
        text = (run.folder / LOG_FILE).read_text("utf-8", errors="replace")
    except OSError:
        return []
    # A progress bar writes over its line.
    lines = [line.rsplit("\r", 1)[-1].rstrip() for line in text.replace("\r\n", "\n").split("\n")]
    return [line for line in lines if line][-_LOG_LINES:]


def begin(run: Run, identity: Mapping[str, str]) -> None:
    """Make a run's folder its own.

    Args:
        run: The run.
        identity: As the plan gives it.
    """
    run.folder.mkdir(parents=True, exist_ok=True)
    _write_json(run.folder / FLAGS_FILE, identity)


def finish(run: Run, seconds: float, jobs: int) -> None:
    """Write down that a run has come to its end.

    Args:
        run: The run.
        seconds: That it took, from its last start.
        jobs: Runs at a time.
    """
    made = {"seconds": round(seconds, 1), "jobs": jobs, "versions": versions()}
    made["machine"] = machine()
    _write_json(run.folder / FINISHED_FILE, made)


def read_finished(run: Run) -> dict[str, Any]:
    """What a finished run was made with: `jobs` at a time, `versions` and `machine`."""
    found: dict[str, Any] = json.loads((run.folder / FINISHED_FILE).read_text("utf-8"))
    return found


def read_result(run: Run) -> RunHistory:
    """Read what a run came to.

    Args:
        run: One that has ended.

    Returns:
        Its history, with an evaluation at its end.

    Raises:
        ValueError: If it left nothing to compare.
    """
    if not is_run(run.folder):
        raise ValueError(
            f"program of {run.label} must leave the records of an AdaptiveBatchTrainer in its "
            f"output_dir ({run.folder}), because they are compared, but it left none; train with "
            "AdaptiveBatchTrainer, into the folder given by --output_dir."
        )
    history = read_history(run.folder, run.label)
    if not history.evaluations or history.evaluations[-1].step < history.steps:
        found = f"the last is of step {history.evaluations[-1].step}" if history.evaluations else ""
        raise ValueError(
            f"program of {run.label} must evaluate at the end of training ({history.steps} steps), "
            f"because the final eval_loss is what is compared, but {found or 'it never did'}; call "
            "trainer.evaluate() with an evaluation dataset after trainer.train()."
        )
    return history


def _write_json(path: Path, value: Any) -> None:
    """Whole or not at all."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value, indent=1) + "\n", "utf-8")
    temporary.replace(path)


def _plain(value: str | None) -> float | str | None:
    """2000 and 2e3 are the same to every flag."""
    try:
        return float(value) if value is not None else None
    except ValueError:
        return value
