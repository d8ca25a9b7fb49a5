"""Text that is too much to load: a stream of documents to train on, and a few to validate.

The division is that of `corpus`: by the hash of a document's content. So a stream and the same data
loaded at once train on the same documents, and validate on the same first ones.
"""

import contextlib
import glob
import gzip
import inspect
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa  # the tables of `datasets`, which requires it

from .text_source import (
    PYTHON_STDLIB,
    check_column,
    column_error,
    content_hash,
    find_files,
    is_blank,
    locate,
    open_hub,
)


# The reader of `datasets` for a suffix. C4 and its like come as .json.gz.
_READERS = {
    ".jsonl": "json",
    ".ndjson": "json",
    ".jsonl.gz": "json",
    ".json.gz": "json",
    ".parquet": "parquet",
}
_DOCUMENTS_PER_READ = 100
# How far validation is looked for, over what is to be expected: where nothing was found in 20 times
# the documents that hold one on average, the chance was e^-20.
_PATIENCE_BYTES, _PATIENCE_DOCUMENTS = 4, 20


def stream_text(
    source: str | os.PathLike[str],
    *,
    validation_bytes: int,
    config: str | None = None,
    split: str = "train",
    text_column: str = "text",
    validation_split: str | None = None,
    validation_fraction: float = 0.05,
    seed: int = 0,
) -> tuple[datasets.IterableDataset, datasets.Dataset]:
    """Open a stream of documents for training, and read some for validation.

    A document goes to validation when the hash of its content falls below ``validation_fraction``.
    None of these is in the training stream, but only the first ones of the source are read. Blank
    documents are dropped; copies are not, but they stay on one side. A path that does not exist or
    a Hub dataset out of reach is a FileNotFoundError.

    Args:
        source: A file, or a folder searched recursively, of ``.jsonl``, ``.ndjson`` (both also with
            ``.gz``) or ``.parquet``, where each file is a shard; otherwise the name of a Hub
            dataset. An existing path wins over a Hub name.
        validation_bytes: Enough text to validate on. Reading stops there, and in any case at four
            times the text, and twenty times the documents, in which it was to be expected.
        config: Configuration of the Hub dataset.
        split: Split of the Hub dataset to train on, or to divide.
        text_column: Column that holds the text.
        validation_split: Split of the Hub dataset to validate on; training is then not divided.
        validation_fraction: Expected share of the documents (not the bytes) for validation.
        seed: Of the order of the shards, which is another one in every epoch.

    Returns:
        The training stream, whose state is exact, and the validation documents in source order;
        both with the one column ``text``.

    Raises:
        ValueError: An argument does not fit the source, a file is not what its suffix says, the
            column is missing, or training or validation would be empty.
    """
    place = locate(source, config, split, validation_split, validation_fraction)
    if place == PYTHON_STDLIB:
        raise ValueError(
            f"source ({PYTHON_STDLIB!r}) must be files or a Hub dataset to be streamed, because it "
            "is small and read into memory at once; load it without streaming"
        )
    where = str(place)

    def documents_of(part: str) -> datasets.IterableDataset:
        if isinstance(place, Path):
            return _one_column(_open_local(place), text_column, where)
        return _one_column(open_hub(place, config, part, streaming=True), text_column, where)

    side = partial(_side, column=text_column, where=where)
    with _as_its_suffix_says(where):
        documents = documents_of(split)
        train = documents.map(
            partial(
                side, fraction=0.0 if validation_split else validation_fraction, validation=False
            ),
            batched=True,
            batch_size=_DOCUMENTS_PER_READ,
            remove_columns=[text_column],
            features=datasets.Features({"text": datasets.Value("string")}),
        ).shuffle(seed=seed, buffer_size=1, **_shard_by_shard())
        fraction = validation_fraction
        if validation_split:
            documents, fraction = documents_of(validation_split), 1.0
        chosen = partial(side, fraction=fraction, validation=True)
        texts = list(_first(documents, chosen, validation_bytes, fraction))
        found = next(iter(train), None)
    if not texts or found is None:
        raise ValueError(
            f"source ({where!r}) must give documents to both training and validation, because each "
            f"reports a loss, but gave {'none' if found is None else 'some'} to train on and "
            f"{len(texts)} to validate; add documents, raise validation_bytes "
            f"({validation_bytes}), or change validation_fraction ({validation_fraction})"
        )
    return train, datasets.Dataset(pa.table({"text": pa.array(texts, pa.large_string())}))


def _open_local(path: Path) -> datasets.IterableDataset:
    suffixes = tuple(_READERS)
    files = find_files(path, suffixes) if path.is_dir() else [path]
    files = [file for file in files if file.stat().st_size]  # `datasets` fails on an empty file
    readers = {
        next((reader for suffix, reader in _READERS.items() if name.endswith(suffix)), None)
        for name in (file.name.lower() for file in files)
    }
    if len(readers) != 1 or None in readers:
        raise ValueError(
            f"source ({str(path)!r}) must be or hold files of one kind, JSON lines or Parquet, in "
            f"{', '.join(suffixes)}, to be streamed, because the suffix says how a file is read; "
            "convert the files, or load them without streaming"
        )
    return datasets.load_dataset(
        readers.pop(),
        # As patterns, in which a bracket of a folder's name would mean something.
        data_files=[glob.escape(str(file.resolve())) for file in files],
        split="train",
        streaming=True,
    )


@contextlib.contextmanager
def _as_its_suffix_says(where: str) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, UnicodeError, gzip.BadGzipFile) as error:
        raise ValueError(
            f"source ({where!r}) must hold UTF-8 text or Parquet as the suffix says, because none "
            f"is skipped in silence, but reading it gave {type(error).__name__}: {error}; convert "
            "or remove the file"
        ) from error


def _one_column(
    raw: datasets.IterableDataset, text_column: str, where: str
) -> datasets.IterableDataset:
    if raw.features is not None:
        check_column(raw.features, text_column, where)
    else:  # known only by reading
        columns = list(next(iter(raw), {}))
        if text_column not in columns:
            raise column_error(text_column, where, columns)
    return raw.select_columns(text_column)


def _side(
    batch: dict[str, list[Any]], *, column: str, where: str, fraction: float, validation: bool
) -> dict[str, list[str]]:
    """The documents of a batch that are for validation, or those that are not."""
    kept: list[str] = []
    for text in batch[column]:
        if not isinstance(text, str | None):
            raise column_error(column, where, list(batch))
        if text and not is_blank(text) and (content_hash(text) < fraction) == validation:
            kept.append(text)
    return {"text": kept}


def _first(
    documents: datasets.IterableDataset,
    chosen: Callable[[dict[str, list[Any]]], dict[str, list[str]]],
    enough: int,
    fraction: float,
) -> Iterator[str]:
    """Chosen documents from the begin of the source, of at least so many bytes if it can be."""
    found = seen = count = 0
    for batch in documents.iter(batch_size=_DOCUMENTS_PER_READ):
        for text in chosen(batch)["text"]:
            yield text
            found += len(text.encode())
            if found >= enough:
                return
        (texts,) = batch.values()
        seen += sum(len((text or "").encode()) + 1 for text in texts)
        count += len(texts)
        too_far = seen > _PATIENCE_BYTES * enough / fraction
        if too_far and count > _PATIENCE_DOCUMENTS / fraction:
            return


def _shard_by_shard() -> dict[str, int]:
    """Read one shard after the other, as `datasets` did before it could interleave them.

    To go on in a shard, all before the place is read again; of ten shards, ten times as much.

    Returns:
        Options of `shuffle`.
    """
    option = "max_buffer_input_shards"
    known = inspect.signature(datasets.IterableDataset.shuffle).parameters
    return {option: 1} if option in known else {}
