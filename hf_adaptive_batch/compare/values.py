"""The values of a compare file: each of its names, and what may stand there."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..flags import flags_of


def refuse_equal(name: str, values: Sequence[Any]) -> None:
    """Refuse a list with the same entry twice.

    Args:
        name: Of the list.
        values: Its entries.

    Raises:
        ValueError: If two are equal.
    """
    for i, value in enumerate(values):
        if value in values[:i]:
            raise ValueError(
                f"{name} ({', '.join(map(str, values))}) must be different ones, because equal "
                f"ones are the same runs; leave out the second {value}."
            )


def _text(name: str, value: Any) -> str:
    if value is None:
        return "Batch schedules compared" if name == "title" else ""
    if not isinstance(value, str):
        raise ValueError(
            f"{name} ({value!r}) must be text, because it is printed on the page; put it into "
            "quotes."
        )
    return value


def _path(name: str, value: Any) -> Path:
    if value is not None and (not isinstance(value, str) or not value):
        raise ValueError(
            f"{name} ({value!r}) must be the path of a folder, because the runs go there; put it "
            "into quotes."
        )
    return Path(value or "runs/compare")


def as_mapping(name: str, value: Any) -> dict[str, Any]:
    """Take a value for a mapping.

    Args:
        name: Of the value.
        value: The value.

    Returns:
        A copy.

    Raises:
        ValueError: If it is none.
    """
    if not isinstance(value, Mapping):
        raise ValueError(
            f"{name} ({value!r}) must be a mapping, because it has values by name; write such as "
            "{max_train_samples: 16000}."
        )
    return dict(value)


def as_flags(where: str, value: Mapping[str, Any]) -> dict[str, Any]:
    """Take settings for flags.

    Args:
        where: They stand.
        value: The settings.

    Returns:
        Them.

    Raises:
        ValueError: If they cannot be written as flags.
    """
    try:
        flags_of(value)
    except ValueError as error:
        raise ValueError(f"In {where}: {error}") from error
    return dict(value)


def _shared(name: str, value: Any) -> dict[str, Any]:
    shared = as_flags(name, as_mapping(name, {} if value is None else value))
    given = shared.get("learning_rate")
    if given is not None:
        rate = _positive(given)
        if rate is None:
            raise ValueError(
                f"learning_rate ({given!r}) must be one number above 0, because all runs share it; "
                "to choose from several, give learning_rates."
            )
        shared["learning_rate"] = rate
    return shared


def _schedules(name: str, value: Any) -> dict[Any, Any]:
    schedules = as_mapping(name, {} if value is None else value)
    if not schedules:
        raise ValueError(
            "schedules (none) must be at least one, because it is them that are compared; write "
            "such as schedules: {adaptive: {batch_schedule: norm_test}}."
        )
    return schedules


def _list(name: str, value: Any, kind: str, fits: Callable[[Any], bool]) -> tuple[Any, ...]:
    if value is None:
        return ()
    if not isinstance(value, list | tuple) or not value or not all(fits(entry) for entry in value):
        raise ValueError(
            f"{name} ({value!r}) must be a list of {kind}, because each stands for one thing; "
            "write such as [1, 2], or leave it out."
            if kind != "words"
            else f"{name} ({value!r}) must be a list of words, because they are started as they "
            "are, without a shell; write such as [python, train.py]."
        )
    return tuple(value)


def _seeds(name: str, value: Any) -> tuple[int, ...]:
    seeds = _list(name, value, "whole numbers from 0", lambda x: type(x) is int and x >= 0)
    refuse_equal(name, seeds)
    return seeds or ((0,) if name == "seeds" else ())


def as_rates(name: str, value: Any) -> tuple[float, ...]:
    """Take a list for learning rates.

    Args:
        name: Of the list.
        value: The list; None for none.

    Returns:
        The learning rates, each above 0, and there once.
    """
    found = _list(name, value, "numbers above 0", lambda entry: _positive(entry) is not None)
    rates = tuple(float(rate) for rate in found)
    refuse_equal(name, rates)
    return rates


def _positive(value: Any) -> float | None:
    """A number above 0, or None; 1e-3 without a dot is text to YAML."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except ValueError:
        return None
    return number if math.isfinite(number) and number > 0 else None


def _target(name: str, value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(
            f"{name} ({value!r}) must be a number, because it is a validation loss to be reached; "
            "leave it out for the final one of the first schedule."
        )
    return float(value)


def _jobs(name: str, value: Any) -> int:
    if value is None:
        return 1
    if type(value) is not int or value < 1:
        raise ValueError(
            f"{name} ({value!r}) must be a whole number from 1, because it is how many runs train "
            "at a time; leave it out for one after the other."
        )
    return value


def _words(name: str, value: Any) -> tuple[str, ...]:
    return _list(name, value, "words", lambda x: isinstance(x, str) and bool(x))


CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "title": _text,
    "note": _text,
    "shared": _shared,
    "seeds": _seeds,
    "learning_rates": as_rates,
    "tuning_seeds": _seeds,
    "target_loss": _target,
    "jobs": _jobs,
    "program": _words,
    "launch": _words,
    "output_dir": _path,
    "schedules": _schedules,
}
