"""The sweeps that a command line names, with what their files do not say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ..published import ZHANG_2025
from ..sweep_result import Sweep, read_sweeps
from .quantities import quantity


PUBLISHED = "published"


def sweeps_of(
    words: Sequence[str],
    *,
    tokens_per_sequence: str | None = None,
    parameters: str | None = None,
    tokens: str | None = None,
) -> list[Sweep]:
    """Read sweeps, and fill in what is missing.

    Args:
        words: Files, folders, or `published` for the table of Zhang et al.
        tokens_per_sequence: For every sweep that does not say.
        parameters: N, for the one sweep that does not say.
        tokens: D, for the one sweep that does not say.

    Returns:
        The sweeps.

    Raises:
        ValueError: If nothing is missing, or a flag would hold for several sweeps.
    """
    sweeps: list[Sweep] = []
    for word in words:
        sweeps += ZHANG_2025 if word == PUBLISHED else read_sweeps(word)
    if not sweeps:
        raise ValueError(
            f"FILE ({', '.join(words)}) must hold a sweep, because it is fitted, but has none; "
            "measure one with cbs measure."
        )
    given = {"tokens_per_sequence": tokens_per_sequence, "parameters": parameters, "tokens": tokens}
    for name, text in given.items():
        if text is None:
            continue
        value = quantity(name, text)
        lacking = [index for index, each in enumerate(sweeps) if getattr(each, name) is None]
        if not lacking or (len(lacking) > 1 and name != "tokens_per_sequence"):
            raise ValueError(
                f"{name} ({text}) must be given for one sweep without it, because each has its "
                f"own, but {len(lacking)} are without; "
                + ("write it into the files." if lacking else "leave the flag out.")
            )
        for index in lacking:
            sweeps[index] = replace(sweeps[index], **{name: value})  # type: ignore[arg-type]
    return sweeps
