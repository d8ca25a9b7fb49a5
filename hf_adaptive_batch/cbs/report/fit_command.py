"""`hf-adaptive-batch cbs fit`: the critical batch size of measured sweeps, and its laws."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from ...report.history import COMPARISON_FILE
from .fit_report import report_of
from .fit_table import show
from .quantities import quantity
from .sweep_input import PUBLISHED, sweeps_of


_SWEEP_FILE = "sweep.json"


def fit(arguments: Sequence[str]) -> int:
    """Fit sweeps, print what they show, and write their page.

    Args:
        arguments: Files and flags, as on the command line.

    Returns:
        The exit status: 0; 1 if no sweep could be fitted.
    """
    words = _parser().parse_args(arguments)
    sweeps = sweeps_of(
        words.files,
        tokens_per_sequence=words.tokens_per_sequence,
        parameters=words.parameters,
        tokens=words.tokens,
    )
    output = _output(words.output, words.files[0])
    report = report_of(
        sweeps,
        overhead=words.overhead,
        reference=words.reference,
        confidence=words.confidence,
        space=words.space,
        predict_parameters=[quantity("predict_parameters", t) for t in words.predict_parameters],
        predict_tokens=[quantity("predict_tokens", text) for text in words.predict_tokens],
    )
    console = Console(highlight=False)
    show(report, console)
    from .page import write_page  # draws, and so takes a second to load

    page = write_page(report, output)
    console.print(f"\nreport  {page}", markup=False, soft_wrap=True)
    return 1 if report.is_empty else 0


def _output(given: str | None, first: str) -> Path:
    """Where the page goes, made if need be; never over the page of a comparison."""
    place = Path(first)
    default = (
        Path("runs", "cbs") if first == PUBLISHED else place if place.is_dir() else place.parent
    )
    output = default if given is None else Path(given)
    if (output / COMPARISON_FILE).exists() and not (output / _SWEEP_FILE).exists():
        raise ValueError(
            f"output ({output}) must be another folder, because the report of a comparison is in "
            "it; pass --output FOLDER."
        )
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"output ({output}) must be a folder that can be written to, because the page and its "
            f"pictures go there, but: {error.strerror}; pass --output FOLDER."
        ) from error
    return output


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hf-adaptive-batch cbs fit",
        description="Fit steps to a target loss against batch size, find the critical batch size, "
        "and its laws where there are three sweeps or more. Writes report.html, report.json and "
        "PNGs.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "files",
        metavar="FILE",
        nargs="+",
        help="JSON of cbs measure, a folder that holds it, CSV with the columns batch_size and "
        "steps (empty where the target was not reached), or the word published for the table of "
        "Zhang et al. (arXiv 2410.21676)",
    )
    add = parser.add_argument
    add("--overhead", metavar="SHARE", type=float, help="of the definition; each sweep's if unset")
    add("--reference", metavar="B", type=float, help="in sequences; each sweep's if unset")
    add("--tokens_per_sequence", metavar="T", help="for sweeps that do not say")
    add("--parameters", metavar="N", help="of the one sweep that does not say, such as 1.2B")
    add("--tokens", metavar="D", help="of the one sweep that does not say, such as 24e9")
    add("--confidence", metavar="SHARE", type=float, default=0.95, help="of intervals; %(default)s")
    add("--space", choices=("log", "plain"), default="log", help="in which laws are fitted")
    add(
        "--predict_parameters",
        metavar="N",
        nargs="+",
        default=[],
        help="models to ask the law about",
    )
    add("--predict_tokens", metavar="D", nargs="+", default=[], help="budgets to ask the law about")
    add("--output", metavar="FOLDER", help="where to write; the folder of the first FILE if unset")
    return parser
