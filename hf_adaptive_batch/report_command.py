"""The command `hf-adaptive-batch report`: finds runs and writes their page."""

import argparse
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from .report.history import COMPARISON_FILE, RunHistory, is_run, read_history


def report(arguments: Sequence[str]) -> int:
    """Write report.html of the runs in some folders.

    Args:
        arguments: The command's words: folders and flags.

    Returns:
        The exit status, 0.

    Raises:
        ValueError: If there is no run, or another report in the way.
    """
    words = _parser().parse_args(arguments)
    histories = find_histories(words.folders)
    output = Path(words.output or words.folders[0])
    if (output / COMPARISON_FILE).exists():
        raise ValueError(
            f"output ({output}) must be another folder, because the report of a comparison is in "
            "it, which says more than one of its runs alone; pass --output FOLDER."
        )
    from .report.page import write_report  # matplotlib takes a moment, and a typo should not

    title = words.title or (histories[0].name if len(histories) == 1 else "Runs, side by side")
    page = write_report(histories, output, title=title)
    runs = "1 run" if len(histories) == 1 else f"{len(histories)} runs"
    sys.stdout.write(f"{runs}: {page}\n")
    return 0


def find_histories(folders: Sequence[str | os.PathLike[str]]) -> list[RunHistory]:
    """Read every run in some folders, at any depth.

    Args:
        folders: Output folders of runs, or folders that hold such.

    Returns:
        The runs, those of the first folder first. A single run has its folder's name; several have
        their paths from the folder that they share.

    Raises:
        ValueError: If a folder is not there or holds no run.
    """
    found: dict[Path, None] = {}  # a set that keeps the order
    for folder in folders:
        path = Path(folder)
        if not path.is_dir():
            raise ValueError(
                f"DIR ({folder}) must be a folder, because a run's records are read from its "
                "output folder; name that of a run, or one that holds several."
            )
        runs = [Path(each) for each, _, _ in os.walk(path) if is_run(each)]
        if not runs:
            raise ValueError(
                f"DIR ({folder}) must hold a run at some depth, because there is nothing to report "
                "otherwise; name a folder with adaptive_batch.jsonl or "
                "evaluations.jsonl in or below it."
            )
        found.update(dict.fromkeys(sorted((run.resolve() for run in runs), key=_natural)))
    if len(found) == 1:
        return [read_history(run) for run in found]
    shared = os.path.commonpath([run.parent for run in found])
    return [read_history(run, run.relative_to(shared).as_posix()) for run in found]


def _natural(path: Path) -> list[tuple[int, str | int]]:
    """Sorts run-2 before run-10."""
    words = re.split(r"(\d+)", str(path))
    return [(1, int(word)) if word.isdecimal() else (0, word) for word in words]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hf-adaptive-batch report",
        description="Write report.html, report.json and PNGs of finished or running runs.",
    )
    parser.add_argument(
        "folders",
        metavar="DIR",
        nargs="+",
        help="output folder of a run, or a folder that holds such at any depth",
    )
    parser.add_argument("--output", metavar="FOLDER", help="where to write; the first DIR if unset")
    parser.add_argument("--title", metavar="TEXT", help="headline of the page")
    return parser
