"""Text to pretrain on: documents from this machine or the Hub, for training and validation.

The source ``PYTHON_STDLIB`` is on every machine, so that a first run needs no download. `packing`
cuts the documents into blocks.
"""

import contextlib
import json
import os
import sysconfig
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa  # the tables of `datasets`, which requires it
import pyarrow.parquet as pq

from .packing import iter_texts
from .text_source import (
    PYTHON_STDLIB,
    SUFFIXES,
    check_column,
    column_error,
    content_hash,
    find_files,
    is_blank,
    locate,
    open_hub,
)


# Installed packages, and the interpreter's own tests: half of its code, and much of it tables.
_NOT_STDLIB = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
_BUILD_PREFIXES = ("config-", "_sysconfigdata")  # written by the build, with paths of its machine


def load_text(
    source: str | os.PathLike[str],
    *,
    config: str | None = None,
    split: str = "train",
    text_column: str = "text",
    validation_split: str | None = None,
    validation_fraction: float = 0.05,
) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Load documents and divide them into training and validation.

    A document goes to validation when the hash of its content falls below ``validation_fraction``.
    So neither order nor seed matters, copies stay on one side, and a larger fraction only adds to
    validation. Of few documents each side gets one at least; a document alone is cut at a line end.
    Blank documents are dropped, and of a local source (read into memory) all copies. A path that
    does not exist or a Hub dataset out of reach is a FileNotFoundError.

    Args:
        source: ``PYTHON_STDLIB``; a file, or a folder searched recursively, of ``.txt`` (one
            document), ``.jsonl``, ``.ndjson`` or ``.parquet`` (one document per row); otherwise
            the name of a Hub dataset. An existing path wins over a Hub name.
        config: Configuration of the Hub dataset.
        split: Split of the Hub dataset to train on, or to divide.
        text_column: Column that holds the text; not used for ``.txt`` and ``PYTHON_STDLIB``.
        validation_split: Split of the Hub dataset to validate on, as it is: nothing is divided.
        validation_fraction: Expected share of the documents (not the bytes) in validation.

    Returns:
        Training and validation documents in source order, each with the one column ``text``.

    Raises:
        ValueError: An argument does not fit the source, a file is not text of a supported kind,
            the column is missing, or training or validation would be empty.
    """
    place = locate(source, config, split, validation_split, validation_fraction)
    if place == PYTHON_STDLIB or isinstance(place, Path):
        texts = _local_texts(place, text_column) if isinstance(place, Path) else _stdlib_texts()
        unique = pa.array(list(dict.fromkeys(texts)), pa.large_string())
        documents = datasets.Dataset(pa.table({"text": unique}))
    else:
        documents = _load_hub(place, config, split, text_column)
    if validation_split is None:
        train, validation = _divide(documents, validation_fraction)
    else:
        train, _ = _divide(documents, 0.0)
        documents = _load_hub(str(place), config, validation_split, text_column)
        _, validation = _divide(documents, 1.0)
    if not len(train) or not len(validation):
        raise ValueError(
            f"source ({os.fspath(source)!r}) must give documents to both training and validation, "
            f"because each reports a loss, but gave {len(train)} and {len(validation)} (no blanks, "
            "no copies); add documents (a .txt file is one, a .jsonl file has one per line) or "
            f"change validation_fraction ({validation_fraction})"
        )
    return train, validation


def _divide(documents: datasets.Dataset, fraction: float) -> list[datasets.Dataset]:
    """Training and validation documents, by the hash of their content."""
    hashes = {
        row: content_hash(text)
        for row, text in enumerate(iter_texts(documents))
        if not is_blank(text)
    }
    if len(hashes) == 1 and 0 < fraction < 1:
        return _divide_text(documents[next(iter(hashes))]["text"], fraction)
    rows: tuple[list[int], list[int]] = ([], [])
    for row, value in hashes.items():
        rows[value < fraction].append(row)
    if len(hashes) > 1 and 0 < fraction < 1:  # few documents: neither side stays without one
        for side, pick in ((0, max), (1, min)):
            if not rows[side]:
                row = pick(rows[1 - side], key=hashes.__getitem__)
                rows[1 - side].remove(row)
                rows[side].append(row)
    return [documents.select(part) for part in rows]


def _divide_text(text: str, fraction: float) -> list[datasets.Dataset]:
    """One document alone, such as a single text file: its last lines are for validation."""
    end = text.find("\n", round(len(text) * (1 - fraction))) + 1
    if not text[end:].strip():
        end = text.rstrip().rfind("\n") + 1
    parts = [[part] if part.strip() else [] for part in (text[:end], text[end:])]
    return [datasets.Dataset.from_dict({"text": part}) for part in parts]


def _load_hub(name: str, config: str | None, split: str, text_column: str) -> datasets.Dataset:
    documents = open_hub(name, config, split)
    check_column(documents.features, text_column, name)
    return documents.select_columns(text_column).rename_column(text_column, "text")


def _stdlib_texts() -> list[str]:
    root = Path(sysconfig.get_paths()["stdlib"])
    texts = []
    for path in find_files(root, (".py",), _NOT_STDLIB):
        if not path.relative_to(root).parts[0].startswith(_BUILD_PREFIXES):
            with contextlib.suppress(UnicodeDecodeError):  # a few use another encoding on purpose
                texts.append(_decode(path))
    return texts


def _local_texts(source: Path, text_column: str) -> list[str | None]:
    texts: list[str | None] = []
    files = find_files(source, SUFFIXES) if source.is_dir() else [source]
    if not files or not files[0].name.lower().endswith(SUFFIXES):
        raise ValueError(
            f"source ({str(source)!r}) must be or hold files in {', '.join(SUFFIXES)}, because "
            "the suffix says how a file is read; rename or convert the files"
        )
    for file in files:
        try:
            columns, values = _read(file, text_column)
        except ValueError as error:
            raise ValueError(
                f"source file ({file}) must be UTF-8 text or Parquet as its suffix says, because "
                f"none is skipped in silence, but {error}; convert, rename or remove the file"
            ) from error
        if text_column not in columns or not all(isinstance(v, str | None) for v in values):
            raise column_error(text_column, str(file), columns)
        texts += values
    return texts


def _read(path: Path, text_column: str) -> tuple[list[str], list[Any]]:
    """Return the names of the columns, and of the text column one value per row."""
    if path.suffix.lower() == ".parquet":
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            table = file.read(columns=[name for name in names if name == text_column])
        return names, [value for column in table.columns for value in column.to_pylist()]
    text = _decode(path)
    if path.suffix.lower() == ".txt":
        return [text_column], [text]
    columns: dict[str, None] = {}
    values = []
    # Not splitlines(): JSON strings may hold U+2028 and others that it takes for line ends.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                row = dict(json.loads(line))
                str(value := row.get(text_column)).encode()  # JSON may spell half a character
            except (TypeError, ValueError) as error:
                raise ValueError(f"line {number} is no JSON object: {error}") from error
            columns |= dict.fromkeys(row)
            values.append(value)
    return list(columns), values


def _decode(path: Path) -> str:
    content = path.read_bytes()  # read_text would translate line ends, and so change the hash
    if b"\0" in content:
        raise ValueError("it holds NUL bytes")
    return content.decode("utf-8-sig")
