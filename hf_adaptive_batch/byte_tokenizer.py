"""A byte-level tokenizer that needs no download: one token per UTF-8 byte."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


_END_OF_TEXT = "<|endoftext|>"

# GPT-2 writes these bytes as the character of the same code point, and the k-th other byte as
# chr(256 + k): a fixed alphabet of 256 visible symbols (openai/gpt-2, encoder.py).
_VISIBLE_BYTES = frozenset([*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)])


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Build a tokenizer whose token ids are the UTF-8 bytes of the text.

    Ids 0 to 255 are the byte values; id 256 is ``<|endoftext|>``, which serves as end, begin and
    padding token. No special token is added to a text, and a text that spells ``<|endoftext|>``
    becomes 13 bytes, never id 256. Every Unicode text survives encoding and decoding; ids that are
    not valid UTF-8 (a model may write them) decode to U+FFFD.

    Returns:
        A tokenizer of 257 tokens, to be saved and loaded like any other.
    """
    others = iter(range(0x100, 0x200))
    symbols = [chr(byte if byte in _VISIBLE_BYTES else next(others)) for byte in range(0x100)]
    vocabulary = {symbol: byte for byte, symbol in enumerate(symbols)} | {_END_OF_TEXT: 0x100}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    # The regex only limits where merges may happen, and there are none: without it, less work.
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=_END_OF_TEXT,
        bos_token=_END_OF_TEXT,
        pad_token=_END_OF_TEXT,
        split_special_tokens=True,  # else a document could end another one by quoting the token
    )
