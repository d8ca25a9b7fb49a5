"""The command `hf-adaptive-batch`: thin, and quick to answer for its help."""

import sys
from collections.abc import Sequence

from . import __version__


_USAGE = """\
usage: hf-adaptive-batch COMMAND [--flag value ...]

commands:
  pretrain   pretrain a causal language model with a batch size that follows the gradient noise
  compare    train with several batch schedules side by side, and say what that showed
  cbs        measure the critical batch size: measure, branch, fit, advise
  report     make a page of finished or running runs

`hf-adaptive-batch COMMAND --help` lists the flags of a command; --version prints the version.
"""
_COMMANDS = ("pretrain", "compare", "cbs", "report")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: The command and its flags; those of the process by default.

    Returns:
        The exit status: 0, or 2 for a command line or an input that does not fit.

    Raises:
        ValueError: One that is not a message of this package, with its traceback.
        FileNotFoundError: Likewise.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help"):
        print(_USAGE, end="")
        return 0
    if words[0] == "--version":
        print(__version__)
        return 0
    command, *rest = words
    if command not in _COMMANDS:
        known = ", ".join(_COMMANDS)
        print(f"error: command ({command}) must be: {known}\n\n{_USAGE}", end="", file=sys.stderr)
        return 2
    try:
        return _run(command, rest)
    except (ValueError, FileNotFoundError) as error:
        if _from_this_package(error):
            print(f"error: {error}", file=sys.stderr)
            return 2
        raise


def _run(command: str, arguments: Sequence[str]) -> int:
    """Imports what the command needs, and not before: torch and transformers take seconds."""
    if command == "compare":
        from .compare.command import compare

        return compare(arguments)
    if command == "cbs":
        from .cbs.command import cbs

        return cbs(arguments)
    if command == "report":
        from .report_command import report

        return report(arguments)
    from .pretrain import pretrain
    from .ranks import leave_together

    pretrain(arguments)
    leave_together()
    return 0


def _from_this_package(error: BaseException) -> bool:
    """Whether it is one of our own messages, which need no traceback, and not a defect."""
    frame, name = error.__traceback__, ""
    while frame is not None:
        name = str(frame.tb_frame.f_globals.get("__name__"))
        frame = frame.tb_next
    return name.startswith(__package__ or "hf_adaptive_batch")
