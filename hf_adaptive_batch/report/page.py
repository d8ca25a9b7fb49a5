"""The page of a report: one file that needs nothing else, with its numbers and pictures beside."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .drawing import swatch
from .figures import save_png, svg_of
from .history import RunHistory
from .panels import Group, Panel, panels_of, training_panel
from .records import without_nan
from .render import render, write_whole
from .sweep import sweep_panel
from .tables import Table, comparison_table, runs_table


if TYPE_CHECKING:  # it needs scipy, which the page of single runs does not
    from .comparison import Comparison


def write_comparison(comparison: Comparison, folder: str | os.PathLike[str]) -> Path:
    """Write the report of a comparison.

    Args:
        comparison: What was compared.
        folder: Where report.html, report.json and the pictures go; made if it is missing.

    Returns:
        The page.
    """
    contenders = comparison.contenders
    groups = [Group(name=each.name, runs=each.runs) for each in contenders]
    panels = panels_of(groups, comparison.target_loss)
    sweep = sweep_panel([each.tried for each in contenders], [c.learning_rate for c in contenders])
    return _write(
        Path(folder),
        groups,
        panels if sweep is None else [*panels, sweep],
        comparison.as_json(),
        title=comparison.title,
        findings=comparison.findings(),
        limits=comparison.limits(),
        table=comparison_table(comparison),
        setup=comparison.setup,
        failed=comparison.failed,
        note=comparison.note,
    )


def write_report(
    histories: Sequence[RunHistory], folder: str | os.PathLike[str], *, title: str
) -> Path:
    """Write the report of some runs, finished or not.

    Args:
        histories: The runs.
        folder: Where report.html, report.json and the pictures go; made if it is missing.
        title: Headline of the page.

    Returns:
        The page.

    Raises:
        ValueError: If there is no run.
    """
    if not histories:
        raise ValueError(
            "histories (0 runs) must not be empty, because a report shows runs; read one with "
            "read_history(folder)."
        )
    groups = [Group(name=each.name, runs=[each]) for each in histories]
    return _write(
        Path(folder),
        groups,
        [*panels_of(groups), training_panel(groups)],
        {"version": 1, "title": title, "runs": [_run_as_json(each) for each in histories]},
        title=title,
        findings=[],
        limits=[],
        table=runs_table(histories),
        setup={},
        failed=[],
        note="",
    )


def _write(
    folder: Path,
    groups: Sequence[Group],
    panels: Sequence[Panel],
    values: Mapping[str, Any],
    *,
    table: Table,
    **texts: Any,
) -> Path:
    names = [group.name for group in groups]
    folder.mkdir(parents=True, exist_ok=True)
    for panel in panels:
        picture = folder / f"report-{panel.key}.png"
        if panel.curves:
            save_png(panel, names, picture)
        else:
            picture.unlink(missing_ok=True)  # of an earlier report, and no longer true
    text = json.dumps(without_nan(values), indent=1, ensure_ascii=False, allow_nan=False)
    write_whole(folder / "report.json", text + "\n")
    page = render(
        "report/page.html.jinja",
        names=names,
        seeds=any(len(group.runs) > 1 for group in groups),
        panels=panels,
        pictures={panel.key: svg_of(panel, panel.key) for panel in panels if panel.curves},
        swatches=[swatch(index) for index in range(len(groups))],
        table=table,
        **texts,
    )
    write_whole(folder / "report.html", page)
    return folder / "report.html"


def _run_as_json(run: RunHistory) -> dict[str, Any]:
    return {
        "name": run.name,
        "final_loss": run.final_loss,
        "steps": run.steps,
        "samples": run.samples,
        "tokens": run.tokens,
        "seconds": run.seconds,
        "average_batch_size": run.average_batch_size,
        "evaluations": [
            {
                "step": each.step,
                "samples_seen": each.samples_seen,
                "tokens_seen": each.tokens_seen,
                "seconds": each.seconds,
                "loss": each.loss,
            }
            for each in run.evaluations
        ],
    }
