"""A comparison in the terminal."""

from rich.console import Console
from rich.table import Table
from rich.text import Text

from .comparison import Comparison, Row


_LEGEND = (
    "loss: final validation loss, mean ± standard deviation over seeds. difference: to the first, "
    "paired by seed, ± half of the 95 % interval."
)

# Terminals of 80 columns have room for what matters; the findings say the rest.
_WIDE = 110
_NAME_WIDTH = 24


def show(comparison: Comparison, console: Console) -> None:
    """Print the table of contenders and the findings.

    Args:
        comparison: What to show.
        console: Where to.
    """
    rows = comparison.rows()
    table = Table(box=None, padding=(0, 2, 0, 0))
    columns = [("schedule", _name), ("loss", _loss), ("difference", _difference)]
    columns.append(("steps", _steps))
    if console.width >= _WIDE:
        columns += [("to target", _to_target), ("seconds", _seconds)]
    if any(row.learning_rate is not None for row in rows):
        columns.insert(1, ("lr", _rate))
    (first, _), *others = columns
    longest = max(len(row.name) for row in rows)
    table.add_column(first, overflow="fold", min_width=min(longest, _NAME_WIDTH))
    for title, _ in others:
        table.add_column(title, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*(Text(value(row)) for _, value in columns))
    console.print()
    console.print(table)
    console.print(_LEGEND, style="dim")
    console.print()
    for title, sentences in (
        ("What this shows", comparison.findings()),
        ("What it does not show", comparison.limits()),
    ):
        console.print(title, style="bold")
        for sentence in sentences:
            console.print(f"- {sentence}", markup=False)


def _name(row: Row) -> str:
    return row.name


def _rate(row: Row) -> str:
    return "" if row.learning_rate is None else f"{row.learning_rate:g}"


def _loss(row: Row) -> str:
    if row.loss_mean is None:
        return "diverged"
    spread = "" if row.loss_spread is None else f" ± {row.loss_spread:.4f}"
    return f"{row.loss_mean:.4f}{spread}"


def _difference(row: Row) -> str:
    found = row.difference
    if found is None:
        return ""
    if found.high is None:
        return f"{found.mean:+.4f}"
    return f"{found.mean:+.4f} ± {found.high - found.mean:.4f}"


def _steps(row: Row) -> str:
    saved = row.steps_saved or 0.0
    share = f" ({-saved:+.0%})" if abs(saved) >= 0.005 else ""
    return f"{row.steps:,.0f}{share}"


def _to_target(row: Row) -> str:
    if row.steps_to_target is not None:
        return f"{row.steps_to_target:,.0f}"
    return f"{row.reached} of {row.seeds} runs" if row.reached else "never"


def _seconds(row: Row) -> str:
    if row.seconds is None:
        return ""
    return f"{row.seconds:,.0f}" if row.seconds >= 10 else f"{row.seconds:.1f}"
