"""Documents become blocks of tokens, all of one length, with nothing lost but the very end."""

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import datasets
import numpy as np
import pyarrow as pa  # the tables of `datasets`, which requires it


# Bounds what a tokenizer holds as Python objects, about 100 bytes per token.
_BATCH_CHARACTERS = 1 << 20


class TextTokenizer(Protocol):
    """What ``pack`` needs of a tokenizer; those of Hugging Face have it."""

    eos_token_id: Any

    def __call__(self, text: list[str], /, **options: Any) -> Mapping[str, Any]: ...  # noqa: D102


def pack(
    documents: datasets.Dataset, tokenizer: TextTokenizer, block_size: int
) -> datasets.Dataset:
    """Concatenate all documents, each followed by the end token, and cut blocks of equal size.

    Blocks run across documents. Only the incomplete block at the very end is dropped.

    Args:
        documents: Dataset with a column ``text``, one row per document.
        tokenizer: Hugging Face tokenizer that has an end token; no other special token is added.
        block_size: Tokens per block.

    Returns:
        Dataset in memory, 4 bytes per token, with one column ``input_ids``: (block_size,) int32.

    Raises:
        ValueError: ``block_size`` is below 2, or there is not one full block of tokens.
    """
    if block_size < 2:
        raise ValueError(
            f"block_size ({block_size}) must be at least 2, because a token is predicted from "
            "those before it; pass e.g. 512"
        )
    leftover = np.empty(0, dtype=np.int32)
    blocks: list[pa.Array] = []
    for stream in _token_streams(documents, tokenizer):
        tokens = np.concatenate([leftover, stream])
        cut = len(tokens) - len(tokens) % block_size
        if cut:
            blocks.append(pa.FixedSizeListArray.from_arrays(pa.array(tokens[:cut]), block_size))
        leftover = tokens[cut:]
    if not blocks:
        raise ValueError(
            f"block_size ({block_size}) must not exceed the {len(leftover)} tokens of documents, "
            "because only full blocks are kept; pass a smaller block_size or more documents"
        )
    return datasets.Dataset(pa.table({"input_ids": pa.chunked_array(blocks)}))


def count_tokens(documents: datasets.Dataset, tokenizer: TextTokenizer) -> int:
    """Count the tokens that ``pack`` cuts into blocks.

    Args:
        documents: Dataset with a column ``text``, one row per document.
        tokenizer: Hugging Face tokenizer that has an end token.

    Returns:
        Tokens, one end token per document included.
    """
    return sum(len(stream) for stream in _token_streams(documents, tokenizer))


def utf8_bytes(documents: datasets.Dataset) -> int:
    """Count the UTF-8 bytes in the column ``text``: what bits per byte are divided by.

    Args:
        documents: Dataset with a column ``text``, one row per document.

    Returns:
        Bytes of text. The end tokens that ``pack`` adds are not text and not counted.
    """
    return sum(len(text.encode()) for text in iter_texts(documents))


def iter_texts(documents: datasets.Dataset) -> Iterator[str]:
    """Yield the documents one by one, whatever format the dataset is set to.

    Args:
        documents: Dataset with a column ``text``, one row per document.

    Yields:
        The text of a document.
    """
    for batch in documents.with_format(None).iter(batch_size=100):
        yield from batch["text"]


def _token_streams(
    documents: datasets.Dataset, tokenizer: TextTokenizer
) -> Iterator[np.ndarray[tuple[int], np.dtype[np.int32]]]:
    end_id = tokenizer.eos_token_id
    if end_id is None:
        raise ValueError(
            f"tokenizer ({type(tokenizer).__name__}) must have an eos_token_id, because it marks "
            "where a packed document ends; set tokenizer.eos_token"
        )
    for texts in _batches(documents):
        encoded = tokenizer(
            texts, add_special_tokens=False, return_attention_mask=False, verbose=False
        )["input_ids"]
        ended = [np.array([*token_ids, end_id], dtype=np.int32) for token_ids in encoded]
        yield np.concatenate(ended)


def _batches(documents: datasets.Dataset) -> Iterator[list[str]]:
    batch: list[str] = []
    characters = 0
    for text in iter_texts(documents):
        batch.append(text)
        characters += len(text)
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
