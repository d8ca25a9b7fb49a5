"""`hf-adaptive-batch cbs`: the four commands of the critical batch size."""

import sys
from collections.abc import Callable, Sequence


_USAGE = """\
usage: hf-adaptive-batch cbs COMMAND ...

commands:
  measure   train with several batch sizes to a target loss, and fit the steps that it takes
  branch    branch from a checkpoint with larger batches: the critical batch size there
  fit       fit measured steps, and scaling laws where there are several models; make a page
  advise    a range of batch sizes for a model, its data and the hardware, from published laws

`hf-adaptive-batch cbs COMMAND --help` lists the flags of a command.
"""


def cbs(arguments: Sequence[str]) -> int:
    """Run one of the commands.

    Args:
        arguments: Its name and flags, as on the command line.

    Returns:
        The exit status.
    """
    words = list(arguments)
    if not words or words[0] in ("-h", "--help"):
        sys.stdout.write(_USAGE)
        return 0
    command, *rest = words
    return _find(command)(rest)


def _find(command: str) -> Callable[[Sequence[str]], int]:
    """The command's function, imported when it is needed."""
    if command == "measure":
        from .training.measure_command import measure

        return measure
    if command == "branch":
        from .training.branch_command import branch

        return branch
    if command == "fit":
        from .report.fit_command import fit

        return fit
    if command == "advise":
        from .report.advise_command import advise_batch_size

        return advise_batch_size
    raise ValueError(
        f"cbs command ({command}) must be measure, branch, fit or advise, because there are no "
        "others; see hf-adaptive-batch cbs --help."
    )
