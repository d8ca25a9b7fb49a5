"""What the documentation's Python takes for given: a model, data and a tokenizer, small enough."""

from hf_adaptive_batch.byte_tokenizer import byte_tokenizer
from tests.cases import llama, sequences


def given() -> dict:
    """Names that a page may use without making them."""
    return {
        "model": llama(),
        "dataset": sequences(64),
        "validation": sequences(8),
        "tokenizer": byte_tokenizer(),
    }
