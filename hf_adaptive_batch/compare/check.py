"""Checks the flags of many runs, in a process of its own: run as a module, with a file's path.

Parsing them sets up a device, which the process that only waits for the runs should not hold. A
launcher starts this one as it starts a run, so that sizes are checked for its number of processes.
"""

import io
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from pathlib import Path

from .folders import is_finished
from .plan import ComparePlan, Run
from .runs import environment


_ANSWER = ".answer"  # added to the file's name


def check_flags(plan: ComparePlan) -> None:
    """Parse the flags of all runs that are still to come, as the command will.

    Args:
        plan: The plan; of another program than ours nothing is known, and nothing is checked.

    Raises:
        ValueError: If a flag does not fit, or the launcher does not start.
    """
    if plan.program:
        return  # nobody knows what flags it has
    runs: dict[tuple[str, float | None], Run] = {}
    for run in plan.possible_runs():
        if not is_finished(run):
            runs.setdefault((run.schedule, run.learning_rate), run)
    if not runs:
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "flags.json"
        path.write_text(json.dumps([run.words() for run in runs.values()]), "utf-8")
        python = [] if plan.launches_python else [sys.executable]
        command = [*plan.launch, *python, "-m", "hf_adaptive_batch.compare.check"]
        done = subprocess.run(
            [*command, str(path)],
            capture_output=True,
            text=True,
            check=False,
            env=environment(),
        )
        answer = Path(str(path) + _ANSWER)
        if done.returncode or not answer.exists():
            end = "\n".join((done.stdout + done.stderr).strip().splitlines()[-15:])
            raise ValueError(
                f"command ({' '.join(command)}) must start, because the flags of the runs are "
                f"checked by it, but it ended with exit status {done.returncode}; correct what it "
                f"says:\n{end}"
            )
        for run, message in zip(runs.values(), json.loads(answer.read_text("utf-8")), strict=True):
            if message:
                raise ValueError(f"In {run.label}: {message}")


def main(path: str) -> None:
    """Parse each command's flags, and write the messages beside the file.

    Args:
        path: A JSON list of lists of words.
    """
    from ..pretrain import parse_flags
    from ..ranks import leave_together

    commands: list[list[str]] = json.loads(Path(path).read_text("utf-8"))
    messages = [_message_of(parse_flags, words) for words in commands]
    if os.environ.get("RANK", "0") == "0":
        Path(path + _ANSWER).write_text(json.dumps(messages), "utf-8")
    leave_together()


def _message_of(parse_flags: Callable[[Sequence[str]], object], words: Sequence[str]) -> str:
    said = io.StringIO()
    try:
        with redirect_stderr(said):
            parse_flags(words)
    except (ValueError, FileNotFoundError) as error:
        return str(error)
    except SystemExit:  # argparse prints its usage, all flags of it, and last what is wrong
        return said.getvalue().strip().splitlines()[-1].rpartition("error: ")[2]
    return ""


if __name__ == "__main__":
    main(sys.argv[1])
