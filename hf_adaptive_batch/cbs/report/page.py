"""The page of `cbs fit`: one file that needs nothing else, its numbers and pictures beside it."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from ...report.drawing import swatch
from ...report.records import without_nan
from ...report.render import render, write_whole
from .comparison_pictures import noise_picture, trade_off_picture
from .fit_laws import FittedSweep
from .fit_report import FitReport
from .fit_sentences import NOISE_SCALE, definition, findings, limits
from .fit_table import HEAD, cells_of, sensitivity_rows
from .law_picture import law_picture
from .steps_picture import KEY, steps_picture


_PICTURE = re.compile(r"cbs-(steps-\d+|law-[ND]|trade-off|noise-scale)\.png")


def write_page(report: FitReport, folder: str | os.PathLike[str]) -> Path:
    """Write report.html, report.json and a PNG of each picture.

    Args:
        report: What was found.
        folder: Where to; made if it is missing.

    Returns:
        The page.
    """
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    names = [each.sweep.name for each in report.sweeps]
    several = len(report.sweeps) > 1  # a law of one point would be an empty picture
    together = [law_picture(report, variable) for variable in "ND"] if several else []
    together += [trade_off_picture(report), noise_picture(report)]
    steps = [steps_picture(each, group) for group, each in enumerate(report.sweeps)]
    for old in place.glob("cbs-*.png"):  # of an earlier page, and no longer true
        if _PICTURE.fullmatch(old.name):
            old.unlink()
    for picture in [*together, *steps]:
        picture.save(place / f"cbs-{picture.key}.png", names)
    shown, unknown = findings(report), limits(report)
    values = {**report.as_json(), "findings": shown, "limits": unknown}
    text = json.dumps(without_nan(values), indent=1, ensure_ascii=False, allow_nan=False)
    write_whole(place / "report.json", text + "\n")
    page = render(
        "cbs/report/page.html.jinja",
        title="Critical batch size",
        lead=[definition(report), NOISE_SCALE],
        findings=shown,
        limits=unknown,
        head=HEAD,
        rows=[_row(each) for each in report.sweeps],
        confidence=report.confidence,
        names=names,
        swatches=[swatch(index) for index in range(len(names))],
        together=_shown(together),
        steps=_shown(steps),
        steps_key=KEY,
        sensitivity=_sensitivity(report),
        schedule_flags=report.schedule_flags,
        schedule_note=report.schedule_note,
        setups=_setups(report),
    )
    write_whole(place / "report.html", page)
    return place / "report.html"


def _shown(pictures: list[Any]) -> list[dict[str, str]]:
    return [{"title": each.title, "caption": each.caption, "svg": each.svg()} for each in pictures]


def _row(each: FittedSweep) -> dict[str, Any]:
    sweep = each.sweep
    batches = len({run.batch_size for run in sweep.runs if run.chosen})
    words = [] if sweep.target_loss is None else [f"target loss {sweep.target_loss:.4g}"]
    words.append(f"{batches} batch sizes, {len(sweep.runs)} runs")
    return {"name": sweep.name, "detail": ", ".join(words), "cells": cells_of(each)}


def _sensitivity(report: FitReport) -> dict[str, Any] | None:
    if report.sensitivity is None:
        return None
    head, rows = sensitivity_rows(report.sensitivity)
    return {"variable": report.sensitivity.variable, "head": head, "rows": rows}


def _setups(report: FitReport) -> list[tuple[str, dict[str, Any]]]:
    """Each set-up once, under the names of all sweeps that were made so."""
    found: list[tuple[list[str], dict[str, Any]]] = []
    for each in report.sweeps:
        setup = dict(each.sweep.setup)
        same = next((names for names, other in found if other == setup), None)
        if same is not None:
            same.append(each.sweep.name)
        elif setup:
            found.append(([each.sweep.name], setup))
    return [(", ".join(names), setup) for names, setup in found]
