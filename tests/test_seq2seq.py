"""Seq2SeqTrainer with the mixin in front: generation in evaluations, and a batch that grows."""

from dataclasses import dataclass

import datasets
import numpy as np
import torch
from transformers import (
    DataCollatorForSeq2Seq,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    set_seed,
)

from hf_adaptive_batch import AdaptiveBatchMixin, AdaptiveBatchOptions, read_records
from hf_adaptive_batch.byte_tokenizer import byte_tokenizer


@dataclass
class Arguments(AdaptiveBatchOptions, Seq2SeqTrainingArguments):
    """What the documentation says to write."""


class AdaptiveSeq2SeqTrainer(AdaptiveBatchMixin, Seq2SeqTrainer):
    """What the documentation says to write."""


def model() -> T5ForConditionalGeneration:
    set_seed(0)
    sizes = {"d_model": 16, "d_ff": 32, "d_kv": 8, "num_layers": 1, "num_heads": 2}
    tokens = {"pad_token_id": 256, "eos_token_id": 256, "decoder_start_token_id": 256}
    return T5ForConditionalGeneration(T5Config(vocab_size=257, dropout_rate=0.0, **sizes, **tokens))


def translations(samples: int) -> datasets.Dataset:
    """Words of uneven lengths, and the same words backwards."""
    tokenizer = byte_tokenizer()
    words = ["noise" * (1 + i % 5) + str(i) for i in range(samples)]
    rows = [
        {"input_ids": tokenizer(word)["input_ids"], "labels": tokenizer(word[::-1])["input_ids"]}
        for word in words
    ]
    return datasets.Dataset.from_list(rows)


def train(kind, arguments, folder, **options):
    own = model()
    trainer = kind(
        model=own,
        args=arguments(
            str(folder),
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            num_train_epochs=1,
            learning_rate=1e-3,
            logging_steps=1,
            eval_strategy="epoch",
            save_strategy="no",
            predict_with_generate=True,
            generation_max_length=6,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            **options,
        ),
        train_dataset=translations(64),
        eval_dataset=translations(6),
        data_collator=DataCollatorForSeq2Seq(byte_tokenizer(), own),
        compute_metrics=lambda found: {"longest": int(np.shape(found.predictions)[1])},
    )
    trainer.train()
    return trainer


def logged(trainer, name: str) -> list:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def test_a_constant_batch_trains_and_generates_as_seq2seq_trainer(tmp_path):
    plain = train(Seq2SeqTrainer, Seq2SeqTrainingArguments, tmp_path / "plain")
    ours = train(AdaptiveSeq2SeqTrainer, Arguments, tmp_path / "ours", batch_schedule="constant")
    for name in ("loss", "grad_norm", "eval_loss", "eval_longest"):
        assert logged(ours, name) == logged(plain, name) != []
    for mine, theirs in zip(ours.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_the_batch_grows_over_sequences_of_uneven_lengths(tmp_path):
    options = {"eta": 0.05, "batch_warmup_samples": 0, "max_global_batch_size": 32}
    trainer = train(AdaptiveSeq2SeqTrainer, Arguments, tmp_path, **options)
    records = read_records(tmp_path)
    assert records["global_batch_size"][0] == 8
    assert max(records["global_batch_size"]) == 32
    assert sum(records["step_samples"]) == 64
    assert logged(trainer, "eval_longest") != []
