"""Checks the flags of many runs, in a process of its own: run as a module, with a file's path.

Parsing them sets up a device, which the process that only waits for the runs should not hold. A
launcher starts this one as it starts a run, so that sizes are checked for its number of processes.
"""

import io
import json
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from pathlib import Path


ANSWER = ".answer"  # added to the file's name


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
        Path(path + ANSWER).write_text(json.dumps(messages), "utf-8")
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
