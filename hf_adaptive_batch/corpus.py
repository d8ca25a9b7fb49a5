"""Text to pretrain on: documents from this machine or the Hub, for training and validation.

The source ``PYTHON_STDLIB`` is on every machine, so that a first run needs no download. `packing`
cuts the documents into blocks.
"""

import contextlib
import hashlib
import json
import os
import sysconfig
from collections.abc import Set
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa  # the tables of `datasets`, which requires it
import pyarrow.parquet as pq

from .packing import iter_texts


PYTHON_STDLIB = "python-stdlib"

_SUFFIXES = (".jsonl", ".ndjson", ".parquet", ".txt")
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
    Blank documents are dropped, and of a local source (read into memory) all copies.

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
        FileNotFoundError: The path does not exist, or the Hub dataset cannot be reached.
        ValueError: An argument does not fit the source, a file is not text of a supported kind,
            the column is missing, or training or validation would be empty.
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
    path_like = name.startswith((".", "/", "~")) or name.endswith(("/", *_SUFFIXES))
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
        texts = _stdlib_texts() if is_stdlib else _local_texts(path, text_column)
        unique = pa.array(list(dict.fromkeys(texts)), pa.large_string())
        documents = datasets.Dataset(pa.table({"text": unique}))
    else:
        documents = _load_hub(name, config, split, text_column)
    if validation_split is None:
        train, validation = _divide(documents, validation_fraction)
    else:
        train, _ = _divide(documents, 0.0)
        documents = _load_hub(name, config, validation_split, text_column)
        _, validation = _divide(documents, 1.0)
    if not len(train) or not len(validation):
        raise ValueError(
            f"source ({name!r}) must give documents to both training and validation, because each "
            f"reports a loss, but gave {len(train)} and {len(validation)} (no blanks, no copies); "
            "add documents (a .txt file is one, a .jsonl file has one per line) or change "
            f"validation_fraction ({validation_fraction})"
        )
    return train, validation


def _divide(documents: datasets.Dataset, fraction: float) -> list[datasets.Dataset]:
    """Training and validation documents, by the hash of their content."""
    hashes = {
        row: int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")
        for row, text in enumerate(iter_texts(documents))
        if text and not text.isspace()
    }
    if len(hashes) == 1 and 0 < fraction < 1:
        return _divide_text(documents[next(iter(hashes))]["text"], fraction)
    rows: tuple[list[int], list[int]] = ([], [])
    for row, value in hashes.items():
        rows[value < fraction * 2**64].append(row)
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
    try:
        documents = datasets.load_dataset(name, config, split=split)
    except (OSError, ValueError) as error:  # out of reach, or no such configuration or split
        raise FileNotFoundError(
            f"source ({name!r}) must be a path that exists or a Hub dataset in reach, because "
            f"load_dataset({name!r}, {config!r}, split={split!r}) gave {type(error).__name__}: "
            f"{error}; check the name, the network and HF_HUB_OFFLINE, or use {PYTHON_STDLIB!r}"
        ) from error
    dtype = getattr(documents.features.get(text_column), "dtype", None)
    if dtype not in ("string", "large_string"):
        raise _column_error(text_column, name, documents.column_names)
    return documents.select_columns(text_column).rename_column(text_column, "text")


def _files(root: Path, suffixes: tuple[str, ...], skipped: Set[str] = frozenset()) -> list[Path]:
    found: list[Path] = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in skipped]
        found += [Path(folder, name) for name in names if name.lower().endswith(suffixes)]
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def _stdlib_texts() -> list[str]:
    root = Path(sysconfig.get_paths()["stdlib"])
    texts = []
    for path in _files(root, (".py",), _NOT_STDLIB):
        if not path.relative_to(root).parts[0].startswith(_BUILD_PREFIXES):
            with contextlib.suppress(UnicodeDecodeError):  # a few use another encoding on purpose
                texts.append(_decode(path))
    return texts


def _local_texts(source: Path, text_column: str) -> list[str | None]:
    texts: list[str | None] = []
    files = _files(source, _SUFFIXES) if source.is_dir() else [source]
    if not files or not files[0].name.lower().endswith(_SUFFIXES):
        raise ValueError(
            f"source ({str(source)!r}) must be or hold files in {', '.join(_SUFFIXES)}, because "
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
            raise _column_error(text_column, str(file), columns)
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


def _column_error(text_column: str, where: str, columns: list[str]) -> ValueError:
    return ValueError(
        f"text_column ({text_column!r}) must name a column of strings, because it is the text to "
        f"train on, but {where} has the columns {columns}; pass the name of one that holds text"
    )
