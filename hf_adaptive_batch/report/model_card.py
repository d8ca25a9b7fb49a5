"""The part of a model's card that says how its batch size was chosen."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .records import RECORDS_FILE, read_evaluations, read_records
from .summary import path_text, trajectory


PICTURE = "adaptive_batch.png"
# Between these the section stands, so that a card that is made again holds it once.
_BEGIN, _END = "<!-- batch size: begin -->", "<!-- batch size: end -->"


def add_section(folder: str | os.PathLike[str], schedule: str) -> None:
    """Write the section into a folder's model card, and the picture beside it.

    Nothing happens without a card, or without records of a run.

    Args:
        folder: Holds `README.md` and the run's records.
        schedule: What decided the batch size, in words.
    """
    card = Path(folder) / "README.md"
    if not card.is_file() or not (Path(folder) / RECORDS_FILE).is_file():
        return
    records = read_records(folder)
    if not records["step"]:
        return
    drawn = len(records["step"]) > 1
    if drawn:
        from .picture import draw_run  # matplotlib takes a second, and cards are seldom made

        evaluations = [
            (row["samples_seen"], row["metrics"]["eval_loss"])
            for row in read_evaluations(folder)
            if "eval_loss" in row["metrics"]
        ]
        draw_run(records, evaluations, Path(folder) / PICTURE)
    text = card.read_text(encoding="utf-8")
    before, begin, rest = text.partition(_BEGIN)
    after = rest.partition(_END)[2] if begin else ""
    part = section(records, schedule, picture=PICTURE if drawn else None)
    card.write_text(
        f"{before.rstrip()}\n\n{_BEGIN}\n{part}{_END}\n{after.lstrip()}", encoding="utf-8"
    )


def section(
    records: Mapping[str, Sequence[Any]], schedule: str, *, picture: str | None = None
) -> str:
    """The section, in Markdown.

    Args:
        records: Columns as `read_records` gives them; at least one decision.
        schedule: What decided the batch size, in words.
        picture: File name of the picture beside the card.

    Returns:
        A heading, the picture and a table.
    """
    sizes = trajectory(records)
    changes = len(sizes) - 1
    noise = next((v for v in reversed(records["noise_scale"]) if v is not None), None)
    error = next((v for v in reversed(records["noise_scale_error"]) if v is not None), None)
    reasons = Counter(str(reason).replace("_", " ") for reason in records["reason"])
    rows = {
        "decided by": schedule,
        "global batch size": path_text(sizes),
        "changes": f"{changes}",
        "trained on": f"{records['samples_seen'][-1]:,} samples, "
        f"{records['tokens_seen'][-1]:,} tokens",
        "optimizer steps": f"{records['step'][-1]:,}",
        "noise scale at the end": "not measurable"
        if noise is None
        else f"{noise:,.1f} samples" + (f" (standard error {error:,.1f})" if error else ""),
        "reasons": ", ".join(f"{name} {count}" for name, count in reasons.most_common()),
    }
    lines = [
        "## How the batch size was chosen",
        "",
        "The global batch size was decided by `hf_adaptive_batch`, which measures the noise of the",
        "gradient while a model trains. The norm test is that of",
        "[Lau et al.](https://arxiv.org/abs/2412.21124), the noise scale that of",
        "[McCandlish et al.](https://arxiv.org/abs/1812.06162).",
        "",
    ]
    if picture is not None:
        lines += [f"![Loss, batch size and noise scale over samples]({picture})", ""]
    lines += ["| | |", "|---|---|"]
    lines += [f"| {name} | {value.replace('|', '/')} |" for name, value in rows.items()]
    return "\n".join(lines) + "\n"
