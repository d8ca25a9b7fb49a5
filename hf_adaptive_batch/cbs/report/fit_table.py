"""A report of fits in the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from .fit_laws import FittedSweep, LawSensitivity
from .fit_report import FitReport
from .fit_sentences import NOISE_SCALE, definition, findings, limits
from .quantities import between, compact, share


UNKNOWN = "–"
HEAD = (
    "model",
    "a (steps)",
    "b (sequences)",
    "knee b/a (sequences)",
    "critical batch size (sequences)",
    "critical batch size (tokens)",
    "noise scale (sequences)",
)
# Terminals of 80 columns have room for short words only.
_SHORT = ("model", "a\nsteps", "b\nseq.", "knee\nseq.", "critical\nseq.", "critical\ntokens")
_SHORT_NOISE = "noise\nscale"


def cells_of(each: FittedSweep) -> list[tuple[str, str]]:
    """The numbers of a sweep, in the order of `HEAD` without its first.

    Args:
        each: The sweep.

    Returns:
        A value and its interval for each column; what is not known is a dash.
    """
    fit, critical = each.fit, each.critical
    scales = list(each.sweep.noise_scales().values())
    noise = (UNKNOWN, "")
    if scales:
        middle = sorted(scales)[len(scales) // 2]
        noise = (compact(middle), f"{compact(min(scales))}–{compact(max(scales))}")
    if fit is None or critical is None:
        return [("not fitted", ""), *[(UNKNOWN, "")] * 4, noise]
    tokens = (UNKNOWN, "")
    if critical.tokens is not None and critical.tokens_interval is not None:
        tokens = (compact(critical.tokens), between(critical.tokens_interval))
    return [
        (compact(fit.a), between(fit.a_interval)),
        (compact(fit.b), between(fit.b_interval)),
        (compact(fit.knee), between(fit.knee_interval)),
        (compact(critical.sequences), between(critical.interval)),
        tokens,
        noise,
    ]


def sensitivity_rows(found: LawSensitivity) -> tuple[list[str], list[list[str]]]:
    """Exponents by overhead, a row each, and reference, a column each.

    Args:
        found: The laws.

    Returns:
        The head and the rows, as text.
    """
    references = list(dict.fromkeys(row.reference for row in found.rows))
    head = ["steps above linear", *(f"from {compact(each)}" for each in references)]
    rows: dict[float, list[str]] = {}
    for row in found.rows:
        rows.setdefault(row.overhead, [share(row.overhead)]).append(f"{row.law.exponent:.3f}")
    return head, list(rows.values())


def show(report: FitReport, console: Console) -> None:
    """Print the table, the sentences and the flags of a schedule.

    Args:
        report: What to show.
        console: Where to.
    """
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column(_SHORT[0], overflow="fold", vertical="top")
    noise = any(each.sweep.noise_scales() for each in report.sweeps)
    for title in (*_SHORT[1:], *([_SHORT_NOISE] * noise)):
        table.add_column(title, justify="right", overflow="fold")
    for each in report.sweeps:
        cells = [Text(value) + Text(f"\n{ends}", style="dim") for value, ends in cells_of(each)]
        table.add_row(Text(each.sweep.name), *(cells if noise else cells[:-1]))
    console.print()
    console.print(table)
    legend = f"{definition(report)} Below each: its {share(report.confidence)} interval"
    legend += f"; of the noise scale, its range. {NOISE_SCALE}" if noise else "."
    console.print(legend, style="dim", markup=False)
    _list("What this shows", findings(report), console)
    _list("What to know", limits(report), console)
    if report.sensitivity is not None:
        _show_sensitivity(report.sensitivity, console)
    console.print()
    console.print("A schedule that follows the critical batch size", style="bold")
    if report.schedule_flags:
        _plain(console, " ".join(report.schedule_flags))
    console.print(report.schedule_note, markup=False)


def _show_sensitivity(found: LawSensitivity, console: Console) -> None:
    head, rows = sensitivity_rows(found)
    console.print()
    title = f"Exponent of {found.variable}, by the definition's overhead and reference"
    console.print(title, style="bold", markup=False)
    table = Table(box=None, padding=(0, 3, 0, 0), pad_edge=False)
    for name in head:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def _list(title: str, sentences: list[str], console: Console) -> None:
    if not sentences:
        return
    console.print()
    console.print(title, style="bold")
    for sentence in sentences:
        console.print(f"- {sentence}", markup=False)


def _plain(console: Console, text: str) -> None:
    """In one line, to be copied."""
    console.print(text, markup=False, soft_wrap=True)
