"""The byte tokenizer: one token per UTF-8 byte, nothing lost, nothing added."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from hf_adaptive_batch.byte_tokenizer import byte_tokenizer


END = "<|endoftext|>"
TOKENIZER = byte_tokenizer()
# Characters that UTF-8 cannot hold (surrogates) are not text.
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=200)


@pytest.fixture(scope="module")
def reloaded(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    byte_tokenizer().save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


@given(TEXT)
def test_the_token_ids_are_the_utf8_bytes_of_the_text(text: str) -> None:
    assert TOKENIZER(text)["input_ids"] == list(text.encode())


@given(TEXT)
def test_any_text_survives_encoding_and_decoding(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER(text)["input_ids"]) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a b  c \n\n\t d\r\n",
        " leading and trailing ",
        "can 't , he said .",
        "naïve → 漢字 \U0001f600",
        "cafe\u0301 \ufeff \u2028",
        "\0\x01\x7f\x80\xa0\xad\xff",
    ],
    ids=["empty", "spaces", "edges", "punctuation", "wide", "combining", "control"],
)
def test_spaces_controls_and_accents_are_neither_cleaned_nor_normalised(text: str) -> None:
    assert TOKENIZER(text)["input_ids"] == list(text.encode())
    assert TOKENIZER.decode(TOKENIZER(text)["input_ids"]) == text


def test_the_vocabulary_is_the_256_bytes_and_one_end_token() -> None:
    assert len(TOKENIZER) == TOKENIZER.vocab_size == 257
    symbols = TOKENIZER.convert_ids_to_tokens(list(range(256)))
    assert set(symbols) == set(pre_tokenizers.ByteLevel.alphabet())
    assert TOKENIZER.convert_ids_to_tokens(256) == END
    ids = (TOKENIZER.eos_token_id, TOKENIZER.bos_token_id, TOKENIZER.pad_token_id)
    assert ids == (256, 256, 256)


def test_a_text_that_spells_the_end_token_does_not_become_it() -> None:
    text = f"a{END}b"
    assert TOKENIZER([text, END])["input_ids"] == [list(text.encode()), list(END.encode())]


def test_without_split_special_tokens_the_spelled_end_token_would_become_it() -> None:
    assert TOKENIZER(f"a{END}b", split_special_tokens=False)["input_ids"] == [97, 256, 98]
    assert TOKENIZER(f"a{END}b")["input_ids"] == list(f"a{END}b".encode())  # and that is not sticky


def test_the_end_token_is_skipped_or_shown_when_decoding() -> None:
    assert TOKENIZER.decode([97, 256, 98]) == f"a{END}b"
    assert TOKENIZER.decode([97, 256, 98], skip_special_tokens=True) == "ab"


def test_ids_that_are_not_utf8_decode_to_the_replacement_character() -> None:
    assert TOKENIZER.decode([97, 0xFF, 98]) == "a\ufffdb"


def test_batches_are_padded_with_the_end_token_and_masked() -> None:
    batch = TOKENIZER(["abc", "d"], padding=True)
    assert batch["input_ids"][1] == [100, 256, 256]
    assert batch["attention_mask"][1] == [1, 0, 0]


def test_a_saved_tokenizer_loads_as_the_same_one(reloaded: PreTrainedTokenizerFast) -> None:
    assert reloaded.get_vocab() == TOKENIZER.get_vocab()
    assert reloaded.special_tokens_map == TOKENIZER.special_tokens_map
    # A fresh one, because a call with padding=True is kept in the state of its tokenizer.
    assert reloaded.backend_tokenizer.to_str() == byte_tokenizer().backend_tokenizer.to_str()


@pytest.mark.parametrize("text", ["a b\n", f"a{END}b", "漢字 \U0001f600"])
def test_a_loaded_tokenizer_encodes_alike(reloaded: PreTrainedTokenizerFast, text: str) -> None:
    assert reloaded(text)["input_ids"] == list(text.encode())
    assert reloaded.decode(reloaded(text)["input_ids"]) == text
