"""The settings of `cbs measure` and `cbs branch`: their own flags, and those of all runs."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ...compare.file import shared_flags


_PRETRAIN_BLOCK_SIZE = 128


class Own(NamedTuple):
    """A setting of a command's own.

    Attributes:
        kind: Of its value; None for one that stands in files alone.
        text: Its help.
        is_list: Whether it takes several values.
    """

    kind: type | None
    text: str
    is_list: bool = False

    @classmethod
    def list(cls, kind: type, text: str) -> Own:
        """One with several values."""
        return cls(kind, text, is_list=True)

    @classmethod
    def of_files(cls) -> Own:
        """One that a command line cannot say."""
        return cls(None, "")


def parser_of(own: Mapping[str, Own], **texts: str) -> argparse.ArgumentParser:
    """A parser of a command's own flags.

    Args:
        own: By name.
        **texts: Of the parser.

    Returns:
        The parser. It knows no prefixes: what it does not know belongs to the runs.
    """
    parser = argparse.ArgumentParser(
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        **texts,  # type: ignore[arg-type]
    )
    for name, each in own.items():
        if each.kind is not None:
            nargs = "+" if each.is_list else None
            parser.add_argument(f"--{name}", type=each.kind, nargs=nargs, help=each.text)
    return parser


def given_flags(parser: argparse.ArgumentParser, words: Sequence[str]) -> dict[str, Any]:
    """The flags of a command line: a command's own, and those of the runs as text.

    Args:
        parser: Of the command's own.
        words: Of the command line.

    Returns:
        Values by name, of those that were given.
    """
    given, others = parser.parse_known_args(words)
    found = {name: value for name, value in vars(given).items() if value is not None}
    return {**found, **shared_flags(others)}


def take_own(
    values: dict[str, Any], own: Mapping[str, Own], taken: Mapping[str, str]
) -> dict[str, Any]:
    """Take a command's own settings out of all that were given.

    Args:
        values: All; those of the runs stay.
        own: What is the command's own.
        taken: What it decides itself, by name with the reason.

    Returns:
        Its own; None for those that were not given.

    Raises:
        ValueError: If what it decides itself was given.
    """
    found = {name: values.pop(name, None) for name in own}
    for name, why in taken.items():
        if name in values:
            raise ValueError(
                f"{name} ({values[name]}) must not be given, because {why}; leave it out."
            )
    return found


def tokens_per_sequence_of(value: Any, shared: Mapping[str, Any], program: Sequence[str]) -> int:
    """The tokens of a sample, given or by the block size of `pretrain`.

    Args:
        value: Given by the user; None for the block size.
        shared: Flags of all runs.
        program: A command of the user's, whose samples nobody knows.

    Returns:
        Tokens.

    Raises:
        ValueError: If they are not known.
    """
    if value is None and program:
        raise ValueError(
            "tokens_per_sequence (none) must be given with a program of your own, because "
            "half-lives and results are in tokens; give the length of its samples."
        )
    if value is None:
        value = shared.get("block_size", _PRETRAIN_BLOCK_SIZE)
    return whole("tokens_per_sequence", value, 0)


def whole(name: str, value: Any, default: int) -> int:
    """Take a value for a count.

    Args:
        name: Of the value.
        value: The value; None for the default.
        default: 0 for one that must be given.

    Returns:
        A whole number from 1.

    Raises:
        ValueError: If it is none.
    """
    count = default if value is None else number(name, value)
    if count < 1 or count != int(count):
        shown = "none" if value is None else value
        raise ValueError(
            f"{name} ({shown}) must be given as a whole number from 1, because it is a count; "
            "write such as 16."
        )
    return int(count)


def number(name: str, value: Any) -> float:
    """Take a value for an amount.

    Args:
        name: Of the value.
        value: The value, or text of it.

    Returns:
        A finite number of at least 0.

    Raises:
        ValueError: If it is none.
    """
    try:
        found = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        found = math.nan
    if not (found >= 0 and math.isfinite(found)):
        raise ValueError(
            f"{name} ({value!r}) must be a number of at least 0, because it is an amount; correct "
            "it, or leave it out for the default."
        )
    return found


def choice(name: str, value: Any, choices: Sequence[str]) -> str:
    """Take a value for one of some words.

    Args:
        name: Of the value.
        value: The value; None for the first word.
        choices: The words.

    Returns:
        The word.

    Raises:
        ValueError: If it is none of them.
    """
    if value is None:
        return choices[0]
    if value not in choices:
        raise ValueError(
            f"{name} ({value!r}) must be one of {', '.join(choices)}, because there are no others; "
            f"leave it out for {choices[0]}."
        )
    return str(value)
