"""What the documentation's Python takes for given: a model, data and a tokenizer, small enough."""

import datasets
import torch
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM, default_data_collator

from hf_adaptive_batch.byte_tokenizer import byte_tokenizer
from tests.cases import sequences


def given() -> dict:
    """Names that a page may use without making them."""
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 32}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=1, num_attention_heads=2))
    dataset = sequences(64)
    return {
        "torch": torch,
        "model": model,
        "optimizer": torch.optim.AdamW(model.parameters(), lr=1e-3),
        "dataset": dataset,
        "validation": sequences(8),
        "texts": datasets.Dataset.from_dict({"text": ["how large a batch is useful now"] * 64}),
        "tokenizer": tokenizer,
        "dataloader": DataLoader(
            dataset.remove_columns("index") if "index" in dataset.column_names else dataset,
            batch_size=4,
            shuffle=True,
            collate_fn=default_data_collator,
        ),
        # A sweep: batch sizes in sequences, and the steps that each took to the target.
        "batch_sizes": [64, 128, 256, 512, 1024],
        "steps": [8100, 4300, 2400, 1450, 960],
    }
