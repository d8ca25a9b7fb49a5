"""Trainers and models as people write them: overrides see micro-batches, and losses scale."""

import logging
from dataclasses import dataclass, field, replace

import datasets
import pytest
import torch
from torch.utils.data import DataLoader
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    HfArgumentParser,
    MixtralConfig,
    MixtralForCausalLM,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainerCallback,
    set_seed,
)

from hf_adaptive_batch import (
    AdaptiveBatchArguments,
    AdaptiveBatchMixin,
    AdaptiveBatchOptions,
    AdaptiveBatchTrainer,
    BatchDecision,
    Reason,
)
from tests.cases import arguments, llama, plain, sequences


# The weights stay as they are, so that losses of the same samples can be compared.
STILL = {"learning_rate": 0.0, "lr_scheduler_type": "constant", "logging_steps": 1}
GROWING = {
    "per_device_train_batch_size": 8,
    "eta": 0.1,
    "batch_warmup_samples": 0,
    "max_global_batch_size": 32,
    "num_train_epochs": 4,
}


def classifier() -> BertForSequenceClassification:
    set_seed(0)
    config = BertConfig(
        vocab_size=32,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return BertForSequenceClassification(config)


def classified(samples: int = 64) -> datasets.Dataset:
    numbers = torch.Generator().manual_seed(0)
    rows = torch.randint(0, 32, (samples, 8), generator=numbers)
    return datasets.Dataset.from_dict(
        {"input_ids": rows.tolist(), "labels": (rows[:, 0] % 2).tolist()}
    )


def column(trainer: Trainer, name: str) -> list:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


# ------------------------------------------------------------------ how the loss is scaled


def test_a_model_that_ignores_the_count_of_items_has_the_loss_of_the_plain_trainer(tmp_path):
    """Its forward takes keyword arguments, so the Trainer divides nothing; halves doubled it."""
    given = {"model": classifier(), "train_dataset": classified()}
    size = {"per_device_train_batch_size": 8, "num_train_epochs": 1}
    reference = plain(tmp_path / "plain", trainer=given, **STILL, **size)
    reference.train()
    trainer = AdaptiveBatchTrainer(
        args=arguments(tmp_path / "split", **STILL, **{**GROWING, "batch_warmup_samples": 10**6}),
        **given,
    )
    assert trainer.model_accepts_loss_kwargs
    trainer.train()
    assert trainer.model_accepts_loss_kwargs  # as it was
    for name in ("loss", "grad_norm"):
        assert column(trainer, name)[:8] == pytest.approx(column(reference, name), rel=1e-5)


def test_the_loss_of_such_a_model_stays_as_the_batch_grows(tmp_path):
    trainer = AdaptiveBatchTrainer(
        model=classifier(), args=arguments(tmp_path, **STILL, **GROWING), train_dataset=classified()
    )
    trainer.train()
    assert column(trainer, "adaptive_batch/accumulation_steps")[-1] == 4
    losses = column(trainer, "loss")
    assert max(losses) < 1.2 * min(losses)


def test_a_first_batch_that_cannot_tell_leaves_it_to_the_next(tmp_path):
    """Its labels are all ignored, so that it has no items; the shuffle is off."""
    rows = classified().to_dict()
    rows["labels"][:4] = [-100] * 4
    trainer = AdaptiveBatchTrainer(
        model=classifier(),
        args=arguments(tmp_path, **STILL, **GROWING, train_sampling_strategy="sequential"),
        train_dataset=datasets.Dataset.from_dict(rows),
    )
    found = []
    find = trainer._find_loss_scale
    trainer._find_loss_scale = lambda batch: (
        find(batch),
        found.append(trainer._loss_scale_unknown),
    )
    trainer.train()
    assert found == [True, False]


def test_a_mean_of_ones_own_is_divided(tmp_path):
    class Own(AdaptiveBatchTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            logits = model(input_ids=inputs["input_ids"]).logits[:, :-1].flatten(0, 1)
            return torch.nn.functional.cross_entropy(logits, inputs["labels"][:, 1:].flatten())

    trainer = Own(
        model=llama(dropout=0.0),
        args=arguments(tmp_path, **STILL, **GROWING),
        train_dataset=sequences(64),
    )
    trainer.train()
    assert column(trainer, "adaptive_batch/accumulation_steps")[-1] == 4
    losses = column(trainer, "loss")
    assert max(losses) < 1.2 * min(losses)


def test_a_loss_that_is_divided_in_part_is_told(tmp_path, caplog):
    set_seed(0)
    config = MixtralConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=2,
        output_router_logits=True,
        router_aux_loss_coef=1.0,
    )
    trainer = AdaptiveBatchTrainer(
        model=MixtralForCausalLM(config),
        args=arguments(tmp_path, **STILL, **{**GROWING, "num_train_epochs": 1}),
        train_dataset=sequences(32),
    )
    with caplog.at_level(logging.WARNING, logger="hf_adaptive_batch.hosting"):
        trainer.train()
    assert "part of the loss is not divided by num_items_in_batch" in caplog.text


# ---------------------------------------------------------------------------- overrides


def test_an_override_of_the_step_sees_one_micro_batch_at_a_time(tmp_path):
    seen = []

    class Own(AdaptiveBatchTrainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            inputs = dict(inputs)
            inputs.pop("nothing", None)
            seen.append(len(inputs["input_ids"]))
            return super().training_step(model, inputs, num_items_in_batch)

    trainer = Own(model=llama(), args=arguments(tmp_path, **GROWING), train_dataset=sequences(64))
    trainer.train()
    assert sum(seen) == 4 * 64
    assert max(seen) == 8
    assert column(trainer, "adaptive_batch/global_batch_size")[-1] == 32
    assert "training_step" not in vars(trainer)


def test_a_loader_of_ones_own_is_cut_into_steps(tmp_path):
    class Own(AdaptiveBatchTrainer):
        def get_train_dataloader(self):
            return DataLoader(
                self.train_dataset.with_format("torch"), batch_size=8, collate_fn=self.data_collator
            )

    trainer = Own(model=llama(), args=arguments(tmp_path, **GROWING), train_dataset=sequences(64))
    trainer.train()
    assert column(trainer, "adaptive_batch/samples_seen")[-1] == 4 * 64
    assert column(trainer, "adaptive_batch/global_batch_size")[-1] == 32
    assert type(trainer.get_train_dataloader()) is DataLoader


def test_a_mixin_behind_the_trainer_is_refused():
    with pytest.raises(TypeError, match=r"bases of Wrong must begin with AdaptiveBatchMixin"):

        class Wrong(Trainer, AdaptiveBatchMixin):
            pass


@pytest.mark.parametrize("accumulation", [1, 3])
def test_callbacks_get_every_event_of_the_plain_trainer(tmp_path, accumulation):
    class Events(TrainerCallback):
        def __init__(self):
            self.names = []

        def on_step_begin(self, args, state, control, **kwargs):
            self.names.append(("begin", state.global_step))

        def on_substep_end(self, args, state, control, **kwargs):
            self.names.append(("substep", state.global_step))

        def on_step_end(self, args, state, control, **kwargs):
            self.names.append(("end", state.global_step))

    size = {"gradient_accumulation_steps": accumulation, "num_train_epochs": 2}
    found, expected = Events(), Events()
    given = {"model": llama(), "train_dataset": sequences(26)}
    plain(tmp_path / "plain", trainer={**given, "callbacks": [expected]}, **size).train()
    args = arguments(tmp_path / "fixed", batch_schedule="constant", **size)
    AdaptiveBatchTrainer(args=args, **given, callbacks=[found]).train()
    assert found.names == expected.names
    assert (("substep", 0) in found.names) == (accumulation > 1)


def test_a_controller_below_the_initial_batch_trains_the_whole_budget(tmp_path):
    class Smaller:
        can_change = True

        def measures(self, step):
            return True

        def decide(self, observation):
            return BatchDecision(global_batch_size=4, reason=Reason.SHRUNK)

    args = arguments(
        tmp_path, per_device_train_batch_size=4, gradient_accumulation_steps=4, num_train_epochs=2
    )
    trainer = AdaptiveBatchTrainer(
        model=llama(), args=args, train_dataset=sequences(64), controller=Smaller()
    )
    trainer.train()
    assert trainer.run.clock.samples_seen == 2 * 64
    assert trainer.state.epoch == 2.0


# --------------------------------------------------------------------- scripts and arguments


@dataclass
class DataTrainingArguments:
    """As the example scripts of transformers have it: to cut the dataset."""

    max_train_samples: int | None = field(default=None, metadata={"help": "cut the dataset"})


def test_flags_stand_beside_those_of_the_example_scripts(tmp_path):
    parser = HfArgumentParser((DataTrainingArguments, AdaptiveBatchArguments))
    flags = ["--output_dir", str(tmp_path), "--max_train_samples", "7", "--eta", "0.3"]
    data, args = parser.parse_args_into_dataclasses([*flags, "--max_training_samples", "50"])
    assert (data.max_train_samples, args.max_training_samples, args.eta) == (7, 50, 0.3)


def test_the_budget_in_samples_has_a_shorter_name_in_python(tmp_path):
    args = AdaptiveBatchArguments(str(tmp_path), max_train_samples=20)
    assert args.max_train_samples == args.max_training_samples == 20
    assert replace(args, max_training_samples=30).max_train_samples == 30


def test_arguments_of_another_trainer_gain_the_fields(tmp_path):
    @dataclass
    class Mine(AdaptiveBatchOptions, Seq2SeqTrainingArguments):
        mine: int = 1

        def __post_init__(self):
            super().__post_init__()
            self.mine += 1

    args = Mine(str(tmp_path), predict_with_generate=True, eta=0.3)
    assert (args.mine, args.eta, args.predict_with_generate) == (2, 0.3, True)
