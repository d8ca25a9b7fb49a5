"""Documents become blocks of tokens, all of one length, with nothing lost but the very end."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeAlias

import datasets
import numpy as np
import pyarrow as pa  # the tables of `datasets`, which requires it


# Bounds what a tokenizer holds as Python objects, about 100 bytes per token.
_BATCH_CHARACTERS = 1 << 20

Tokens: TypeAlias = np.ndarray[Any, np.dtype[np.int32]]


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
    cutter = BlockCutter(block_size)
    blocks = [
        cutter.cut(tokens) for tokens in tokenized(in_batches(iter_texts(documents)), tokenizer)
    ]
    full = [pa.array(part.reshape(-1)) for part in blocks if len(part)]
    if not full:
        raise ValueError(
            f"block_size ({block_size}) must not exceed the {len(cutter.leftover)} tokens of "
            "documents, because only full blocks are kept; pass a smaller block_size or more "
            "documents"
        )
    rows = [pa.FixedSizeListArray.from_arrays(tokens, block_size) for tokens in full]
    return datasets.Dataset(pa.table({"input_ids": pa.chunked_array(rows)}))


def count_tokens(documents: datasets.Dataset, tokenizer: TextTokenizer) -> int:
    """Count the tokens that ``pack`` cuts into blocks.

    Args:
        documents: Dataset with a column ``text``, one row per document.
        tokenizer: Hugging Face tokenizer that has an end token.

    Returns:
        Tokens, one end token per document included.
    """
    return sum(map(len, tokenized(in_batches(iter_texts(documents)), tokenizer)))


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


class BlockCutter:
    """Cuts tokens that come piece by piece into blocks of one length.

    Args:
        block_size: Tokens per block.
        leftover: Tokens that came before and did not fill a block.

    Attributes:
        leftover: The tokens that did not fill a block yet.

    Raises:
        ValueError: ``block_size`` is below 2.
    """

    def __init__(self, block_size: int, leftover: Sequence[int] = ()) -> None:
        if block_size < 2:
            raise ValueError(
                f"block_size ({block_size}) must be at least 2, because a token is predicted from "
                "those before it; pass e.g. 512"
            )
        self._block_size = block_size
        self.leftover = np.array(leftover, dtype=np.int32)

    def cut(self, tokens: Tokens) -> Tokens:
        """Cut what is left over and ``tokens``, and keep what remains.

        Args:
            tokens: The next ones.

        Returns:
            (blocks, block_size) int32; there may be none.
        """
        tokens = np.concatenate([self.leftover, tokens])
        end = len(tokens) - len(tokens) % self._block_size
        self.leftover = tokens[end:].copy()  # a view would keep all tokens in memory
        return tokens[:end].reshape(-1, self._block_size)


def tokenized(batches: Iterable[list[str]], tokenizer: TextTokenizer) -> Iterator[Tokens]:
    """Tokenize documents, each followed by the end token.

    Args:
        batches: Documents that are tokenized together.
        tokenizer: Hugging Face tokenizer that has an end token.

    Yields:
        The tokens of a batch, int32.
    """
    end_id = end_token(tokenizer)
    for texts in batches:
        encoded = tokenizer(
            texts, add_special_tokens=False, return_attention_mask=False, verbose=False
        )["input_ids"]
        ended = [np.array([*token_ids, end_id], dtype=np.int32) for token_ids in encoded]
        yield np.concatenate(ended)


def end_token(tokenizer: TextTokenizer) -> int:
    """The token that a packed document ends with.

    Args:
        tokenizer: Hugging Face tokenizer.

    Returns:
        Its number.

    Raises:
        ValueError: The tokenizer has none.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"tokenizer ({type(tokenizer).__name__}) must have an eos_token_id, because it marks "
            "where a packed document ends; set tokenizer.eos_token"
        )
    return int(tokenizer.eos_token_id)


def in_batches(texts: Iterable[str]) -> Iterator[list[str]]:
    """Gather documents for a tokenizer, no more at once than fits into memory with ease.

    Args:
        texts: The documents.

    Yields:
        Some of them, in order.
    """
    batch: list[str] = []
    characters = 0
    for text in texts:
        batch.append(text)
        characters += len(text)
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
