"""What a source of text is: its name, its files or its place on the Hub, and its column."""

import hashlib
import os
from collections.abc import Set
from pathlib import Path
from typing import Any

import datasets


PYTHON_STDLIB = "python-stdlib"

SUFFIXES = (".jsonl", ".ndjson", ".parquet", ".txt")


def locate(
    source: str | os.PathLike[str],
    config: str | None,
    split: str,
    validation_split: str | None,
    validation_fraction: float,
) -> Path | str:
    """Say what ``source`` names, and check that the other arguments fit it.

    Args:
        source: As of ``load_text``.
        config: Configuration of the Hub dataset.
        split: Split of the Hub dataset to train on, or to divide.
        validation_split: Split of the Hub dataset to validate on.
        validation_fraction: Share of the documents to validate on.

    Returns:
        The path of a local source; ``PYTHON_STDLIB`` or a Hub name as it is.

    Raises:
        FileNotFoundError: The path does not exist.
        ValueError: An argument does not fit the source.
    """
    if not 0.0 < validation_fraction < 1.0:
        raise ValueError(
            f"validation_fraction ({validation_fraction}) must lie between 0 and 1, because "
            "training and validation both need documents; pass for example 0.05"
        )
    name = os.fspath(source)
    path = Path(os.path.expanduser(name))  # noqa: PTH111 (Path.expanduser may raise RuntimeError)
    is_stdlib = name == PYTHON_STDLIB
    is_local = is_stdlib or (name != "" and path.exists())
    # One slash inside does not make a path: Hub names are "owner/name".
    path_like = name.startswith((".", "/", "~")) or name.endswith(("/", *SUFFIXES))
    if not is_local and (path_like or not name or "\\" in name or name.count("/") > 1):
        raise FileNotFoundError(
            f"source ({name!r}) must exist, because it reads like a path and not like the name of "
            f"a Hub dataset; check the spelling and the working directory ({str(Path.cwd())!r})"
        )
    if is_local:
        given = [("config", config, None), ("split", split, "train")]
        for argument, value, default in [*given, ("validation_split", validation_split, None)]:
            if value != default:
                raise ValueError(
                    f"{argument} ({value!r}) must be left out, because source ({name!r}) is local "
                    "and only Hub datasets have it; divide by validation_fraction"
                )
    return path if is_local and not is_stdlib else name


def open_hub(name: str, config: str | None, split: str, **options: Any) -> Any:
    """Call ``datasets.load_dataset``, and say what was tried where it fails.

    Args:
        name: Of the Hub dataset.
        config: Its configuration.
        split: Its split.
        **options: Further arguments, such as ``streaming``.

    Returns:
        The split, of whatever kind the options ask for.

    Raises:
        FileNotFoundError: The Hub dataset cannot be reached, or has no such configuration or split.
    """
    try:
        return datasets.load_dataset(name, config, split=split, **options)
    except (OSError, ValueError) as error:  # out of reach, or no such configuration or split
        raise FileNotFoundError(
            f"source ({name!r}) must be a path that exists or a Hub dataset in reach, because "
            f"load_dataset({name!r}, {config!r}, split={split!r}) gave {type(error).__name__}: "
            f"{error}; check the name, the network and HF_HUB_OFFLINE, or use {PYTHON_STDLIB!r}"
        ) from error


def check_column(features: Any, text_column: str, where: str) -> None:
    """Refuse a column, by the features of its dataset, that does not exist or holds no text."""
    dtype = getattr(features.get(text_column), "dtype", None)
    if dtype not in ("string", "large_string"):
        raise column_error(text_column, where, list(features))


def find_files(
    root: Path, suffixes: tuple[str, ...], skipped: Set[str] = frozenset()
) -> list[Path]:
    """The files below a folder, in the order of their relative paths."""
    found: list[Path] = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in skipped]
        found += [Path(folder, name) for name in names if name.lower().endswith(suffixes)]
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def is_blank(text: str | None) -> bool:
    """Whether a document holds nothing to train on."""
    return not text or text.isspace()


def content_hash(text: str) -> float:
    """The number from 0 up to 1 that says where a document goes: below the fraction, validation."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") / 2**64


def column_error(text_column: str, where: str, columns: list[str]) -> ValueError:
    """The error of a column that is missing or holds no text."""
    return ValueError(
        f"text_column ({text_column!r}) must name a column of strings, because it is the text to "
        f"train on, but {where} has the columns {columns}; pass the name of one that holds text"
    )
