"""The table of a report: numbers as text, each column in one form."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .history import RunHistory
from .summary import trajectory


if TYPE_CHECKING:  # it needs scipy, which the page of single runs does not
    from .comparison import Comparison, Row


UNKNOWN = "–"


@dataclass(frozen=True, kw_only=True)
class TableRow:
    """A row of the table.

    Attributes:
        name: User's text.
        detail: What makes it differ, below the name; user's text, may be empty.
        cells: One a column after the first.
        best: Whether its loss is the lowest.
    """

    name: str
    detail: str
    cells: Sequence[str]
    best: bool


@dataclass(frozen=True, kw_only=True)
class Table:
    """The table of a report.

    Attributes:
        head: Name of each column, the first included.
        rows: In the order of the legend.
    """

    head: Sequence[str]
    rows: Sequence[TableRow]


def comparison_table(comparison: Comparison) -> Table:
    """One row a contender.

    Args:
        comparison: What was compared.

    Returns:
        The table.
    """
    rows = comparison.rows()
    swept = any(row.learning_rate is not None for row in rows)
    head = ("contender", "chosen learning rate", "final validation loss", "against the first")
    in_bits = any(row.bits_per_byte is not None for row in rows)
    means = [row.loss_mean for row in rows]
    best = lowest(means)
    return Table(
        head=(
            *(name for name in head if swept or name != "chosen learning rate"),
            *(["bits per byte"] * in_bits),
            "optimizer steps",
            "tokens" if any(row.tokens for row in rows) else "samples",
            "seconds",
            "average batch",
            "steps to target",
        ),
        rows=[
            TableRow(
                name=row.name,
                detail=settings_text(contender.settings),
                cells=[
                    *([UNKNOWN if row.learning_rate is None else f"{row.learning_rate:g}"] * swept),
                    _loss_of(row),
                    _difference(row),
                    *([_bits(row.bits_per_byte)] * in_bits),
                    count(row.steps),
                    count(row.tokens or row.samples),
                    time(row.seconds),
                    size(row.average_batch_size),
                    _to_target(row, comparison.target_loss),
                ],
                best=row.loss_mean is not None and row.loss_mean == best,
            )
            for row, contender in zip(rows, comparison.contenders, strict=True)
        ],
    )


def runs_table(histories: Sequence[RunHistory]) -> Table:
    """One row a run.

    Args:
        histories: The runs.

    Returns:
        The table.
    """
    best = lowest([run.final_loss for run in histories])
    samples = not any(run.tokens for run in histories)
    in_bits = any(run.bits_per_byte is not None for run in histories)
    return Table(
        head=(
            "run",
            "last validation loss",
            *(["bits per byte"] * in_bits),
            "optimizer steps",
            "samples" if samples else "tokens",
            "seconds",
            "average batch",
            "batch, first to last",
        ),
        rows=[
            TableRow(
                name=run.name,
                detail="",
                cells=[
                    UNKNOWN if run.final_loss is None else loss(run.final_loss),
                    *([_bits(run.bits_per_byte)] * in_bits),
                    count(run.steps),
                    count(run.samples if samples else run.tokens),
                    time(run.seconds),
                    size(run.average_batch_size),
                    _path(run),
                ],
                best=len(histories) > 1 and run.final_loss is not None and run.final_loss == best,
            )
            for run in histories
        ],
    )


def settings_text(settings: Mapping[str, Any]) -> str:
    """Flags in one line.

    Args:
        settings: Values by flag.

    Returns:
        The flags as they are written on a command line, without dashes.
    """
    return ", ".join(f"{name} {value}" for name, value in settings.items() if value is not None)


def lowest(losses: Sequence[float | None]) -> float | None:
    """The lowest finite loss.

    Args:
        losses: Losses; None or NaN where there is none.

    Returns:
        The lowest; None if none is finite.
    """
    return min((each for each in losses if each is not None and math.isfinite(each)), default=None)


def loss(value: float) -> str:
    """A loss, in four decimals or, if it is huge, in four digits."""
    if not math.isfinite(value):
        return "diverged"
    return f"{value:.4f}" if abs(value) < 1e4 else f"{value:.3e}"


def count(value: float) -> str:
    """A whole number, in groups of three digits."""
    return f"{value:,.0f}"


def time(seconds: float | None) -> str:
    """Seconds, with a decimal where there are few."""
    if seconds is None:
        return UNKNOWN
    return f"{seconds:,.1f}" if seconds < 100 else f"{seconds:,.0f}"


def size(value: float | None) -> str:
    """A mean batch size in samples."""
    return UNKNOWN if value is None else f"{value:,.1f}"


def _bits(value: float | None) -> str:
    return UNKNOWN if value is None else f"{value:.3f}"


def _loss_of(row: Row) -> str:
    if row.loss_mean is None:
        return f"{row.diverged} of {row.seeds} diverged" if row.seeds > 1 else "diverged"
    spread = "" if row.loss_spread is None else f" ± {loss(row.loss_spread)}"
    return loss(row.loss_mean) + spread


def _difference(row: Row) -> str:
    found = row.difference
    if found is None:
        return UNKNOWN
    interval = ""
    if found.low is not None and found.high is not None:
        interval = f"\n[{signed(found.low)}, {signed(found.high)}]"
    return signed(found.mean) + interval


def signed(value: float) -> str:
    """A difference of losses, with a minus sign as wide as the plus."""
    return f"{'+' if value > 0 else '−' if value < 0 else ''}{loss(abs(value))}"


def _to_target(row: Row, target_loss: float) -> str:
    if row.steps_to_target is not None:
        return count(row.steps_to_target)
    if not math.isfinite(target_loss):
        return UNKNOWN
    return f"reached by {row.reached} of {row.seeds}" if row.reached else "not reached"


def _path(run: RunHistory) -> str:
    path = trajectory(run.records) if run.records.get("step") else []
    if not path:
        return UNKNOWN
    if len(path) == 1:
        return f"{count(path[0][1])} throughout"
    changes = "1 change" if len(path) == 2 else f"{len(path) - 1:,} changes"
    return f"{count(path[0][1])} → {count(path[-1][1])}, {changes}"
