"""Every field is a flag with help; bad input has one clear error, before training starts."""

from __future__ import annotations

import dataclasses
import re
from typing import get_args, get_type_hints

import datasets
import pytest
import torch
from torch import nn
from transformers import HfArgumentParser, Trainer, TrainingArguments

from hf_adaptive_batch import (
    AdaptiveBatchArguments,
    AdaptiveBatchMixin,
    AdaptiveBatchTrainer,
    BatchPlan,
    FixedController,
    NormTestController,
)
from hf_adaptive_batch.arguments import AdaptiveBatchOptions
from hf_adaptive_batch.schedule_arguments import SCHEDULES

from .cases import adaptive, arguments, llama, plain, sequences


PLAIN = {field.name for field in dataclasses.fields(TrainingArguments)}
OWN = {f.name: f for f in dataclasses.fields(AdaptiveBatchArguments) if f.name not in PLAIN}


# --------------------------------------------------------------------------------------- flags

FLAGS = {
    "batch_schedule": "0:8 250M:16",
    "noise_scale_factor": 2.5,
    "ramp_length": "250M",
    "seesaw_alpha": 2.0,
    "cbs_coefficient": 9.0,
    "cbs_exponent": 0.5,
    "scale_learning_rate": "sqrt",
    "scale_beta2": True,
    "min_beta2": 0.5,
    "scale_weight_decay": True,
    "eta": 0.3,
    "norm_test_estimator": "published",
    "max_global_batch_size": 64,
    "max_micro_batch_size": 16,
    "max_growth_factor": 1.5,
    "allow_smaller_batch": True,
    "test_interval": 3,
    "batch_warmup_samples": 100,
    "noise_scale_decay": 0.5,
    "split_micro_batch": False,
    "skip_nonfinite_steps": False,
    "max_training_samples": 1000,
    "max_train_tokens": 2000,
    "averaging_decay": 0.999,
    "averaging_half_life_tokens": 3e8,
    "stop_at_eval_loss": 3.5,
    "stop_after_tokens": 1000,
}


def test_every_field_is_tried_as_a_flag():
    assert OWN.keys() == FLAGS.keys()


def parse(tmp_path, *flags):
    quiet = ["--output_dir", str(tmp_path), "--use_cpu", "--report_to", "none"]
    (parsed,) = HfArgumentParser(AdaptiveBatchArguments).parse_args_into_dataclasses(
        [*quiet, *flags]
    )
    return parsed


@pytest.mark.parametrize(("name", "value"), FLAGS.items(), ids=FLAGS)
def test_every_field_is_parsed_from_the_command_line(tmp_path, name, value):
    # Without these nothing could be left unsplit, and nothing would be evaluated.
    others = ["--gradient_accumulation_steps", "2", "--eval_strategy", "steps"]
    parsed = parse(tmp_path, f"--{name}", str(value), *others)
    assert getattr(parsed, name) == value
    assert getattr(parse(tmp_path), name) == OWN[name].default != value


@pytest.mark.parametrize("name", OWN)
def test_every_field_has_help(name):
    text = OWN[name].metadata["help"]
    assert len(text) > 20
    assert text.endswith(".")


def test_a_choice_that_is_none_is_refused_on_the_command_line(tmp_path, capsys):
    name = "norm_test_estimator"
    with pytest.raises(SystemExit):
        parse(tmp_path, f"--{name}", "other")
    assert name in capsys.readouterr().err
    choices = get_args(get_type_hints(AdaptiveBatchOptions)[name])
    for choice in choices:
        assert getattr(parse(tmp_path, f"--{name}", choice), name) == choice


def test_a_schedule_that_is_none_is_refused_on_the_command_line(tmp_path):
    with pytest.raises(ValueError, match=r"batch_schedule \('other'\) must be one of norm_test"):
        parse(tmp_path, "--batch_schedule", "other")
    for name in SCHEDULES:
        assert parse(tmp_path, "--batch_schedule", name).batch_schedule == name


def test_the_fields_go_before_any_training_arguments(tmp_path):
    @dataclasses.dataclass
    class Others(TrainingArguments):
        extra: int = 3

    @dataclasses.dataclass
    class Both(AdaptiveBatchOptions, Others):
        pass

    args = arguments(tmp_path, Both, eta=0.4, extra=5)
    assert (args.eta, args.extra) == (0.4, 5)
    with pytest.raises(ValueError, match="eta"):
        arguments(tmp_path, Both, eta=2.0)


def test_arguments_survive_being_saved(tmp_path):
    args = arguments(tmp_path, eta=0.4, max_global_batch_size=64)
    torch.save(args, tmp_path / "args.bin")
    again = torch.load(tmp_path / "args.bin", weights_only=False)
    assert again.to_dict() == args.to_dict()
    assert again.to_dict()["eta"] == 0.4


# ------------------------------------------------------------------------------------- defaults


def test_the_plan_is_what_the_plain_arguments_say(tmp_path):
    args = arguments(tmp_path, gradient_accumulation_steps=3)
    assert args.initial_batch_plan() == BatchPlan(micro_batch_size=4, accumulation_steps=3)


def test_the_cap_is_32_times_the_first_batch_and_never_more_than_an_epoch(tmp_path):
    args = arguments(tmp_path, gradient_accumulation_steps=2)
    plan = args.initial_batch_plan()
    assert args.batch_controller(plan).max_global_batch_size == 256
    assert args.batch_controller(plan, epoch_samples=103).max_global_batch_size == 100
    assert args.batch_controller(plan, epoch_samples=3) == FixedController(1)


def test_the_warm_up_of_the_batch_is_that_of_the_learning_rate(tmp_path):
    args = arguments(tmp_path)
    plan = args.initial_batch_plan()
    assert args.batch_controller(plan, warmup_samples=40).warmup_samples == 40
    args = arguments(tmp_path, batch_warmup_samples=8)
    assert args.batch_controller(plan, warmup_samples=40).warmup_samples == 8


def test_the_controller_is_the_one_described(tmp_path):
    args = arguments(
        tmp_path, max_growth_factor=1.5, test_interval=4, allow_smaller_batch=True, eta=0.3
    )
    assert args.batch_controller(args.initial_batch_plan()) == NormTestController(
        initial_global_batch_size=4,
        max_global_batch_size=128,
        test_interval=4,
        warmup_samples=0,
        max_growth_factor=1.5,
        monotone=False,
    )


# ------------------------------------------------------------------- refused as arguments are made

BAD_ARGUMENTS = {
    "eta_zero": ({"eta": 0.0}, "eta (0.0)"),
    "eta_negative": ({"eta": -0.1}, "eta (-0.1)"),
    "eta_one": ({"eta": 1.0}, "eta (1.0)"),
    "eta_above_one": ({"eta": 1.5}, "eta (1.5)"),
    "eta_nan": ({"eta": float("nan")}, "eta (nan)"),
    "cap_below_the_batch": (
        {"max_global_batch_size": 7, "gradient_accumulation_steps": 2},
        "max_global_batch_size (7)",
    ),
    "cap_negative": ({"max_global_batch_size": -5}, "max_global_batch_size (-5)"),
    "cap_zero": ({"max_global_batch_size": 0}, "max_global_batch_size (0)"),
    "micro_batch_below_the_first": ({"max_micro_batch_size": 2}, "max_micro_batch_size (2)"),
    "micro_batch_zero": ({"max_micro_batch_size": 0}, "max_micro_batch_size (0)"),
    "micro_batch_negative": ({"max_micro_batch_size": -1}, "max_micro_batch_size (-1)"),
    "interval_zero": ({"test_interval": 0}, "test_interval (0)"),
    "interval_negative": ({"test_interval": -1}, "test_interval (-1)"),
    "interval_negative_constant": (
        {"test_interval": -1, "batch_schedule": "constant"},
        "test_interval (-1)",
    ),
    "growth_below_one": ({"max_growth_factor": 0.5}, "max_growth_factor (0.5)"),
    "growth_negative": ({"max_growth_factor": -2.0}, "max_growth_factor (-2.0)"),
    "growth_nan": ({"max_growth_factor": float("nan")}, "max_growth_factor (nan)"),
    "warm_up_negative": ({"batch_warmup_samples": -1}, "batch_warmup_samples (-1)"),
    "decay_one": ({"noise_scale_decay": 1.0}, "noise_scale_decay (1.0)"),
    "decay_negative": ({"noise_scale_decay": -0.5}, "noise_scale_decay (-0.5)"),
    "samples_zero": ({"max_train_samples": 0}, "max_training_samples (0)"),
    "samples_negative": ({"max_train_samples": -3}, "max_training_samples (-3)"),
    "tokens_negative": ({"max_train_tokens": -3}, "max_train_tokens (-3)"),
    "unknown_schedule": ({"batch_schedule": "norm-test"}, "batch_schedule ('norm-test')"),
    "unknown_estimator": ({"norm_test_estimator": "biased"}, "norm_test_estimator ('biased')"),
    "auto_find_batch_size": ({"auto_find_batch_size": True}, "auto_find_batch_size (True)"),
    "deepspeed": ({"deepspeed": {"zero_optimization": {"stage": 2}}}, "deepspeed ("),
    "one_worker_without_splitting": ({"split_micro_batch": False}, "split_micro_batch (False)"),
    "one_sample": ({"per_device_train_batch_size": 1}, "per_device_train_batch_size (1)"),
    "samples_and_tokens": (
        {"max_train_samples": 10, "max_train_tokens": 20},
        "max_training_samples (10) and max_train_tokens (20)",
    ),
    "samples_and_steps": (
        {"max_train_samples": 10, "max_steps": 5},
        "max_training_samples (10) and max_steps (5)",
    ),
    "tokens_and_steps": (
        {"max_train_tokens": 10, "max_steps": 5},
        "max_train_tokens (10) and max_steps (5)",
    ),
}


@pytest.mark.parametrize(("options", "text"), BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS)
def test_bad_arguments_are_refused_with_name_value_and_way_out(tmp_path, options, text):
    with pytest.raises(ValueError, match=re.escape(text)) as refused:
        arguments(tmp_path, **options)
    assert "must" in str(refused.value)


GOOD_ARGUMENTS = {
    "eta": {"eta": 0.999},
    "cap_at_the_batch": {"max_global_batch_size": 4},
    "micro_batch_at_the_first": {"max_micro_batch_size": 4},
    "no_averaging": {"noise_scale_decay": 0.0},
    "accumulation_without_splitting": {
        "split_micro_batch": False,
        "gradient_accumulation_steps": 2,
    },
    "constant_without_splitting": {"split_micro_batch": False, "batch_schedule": "constant"},
    "one_sample_accumulated": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2},
    "one_sample_constant": {"per_device_train_batch_size": 1, "batch_schedule": "constant"},
    "nothing_measured": {"test_interval": 0, "batch_schedule": "constant"},
    "epochs_and_samples": {"num_train_epochs": 3, "max_train_samples": 10},
}


@pytest.mark.parametrize("options", GOOD_ARGUMENTS.values(), ids=GOOD_ARGUMENTS)
def test_what_is_just_allowed_is_allowed(tmp_path, options):
    adaptive(tmp_path, **options)


# --------------------------------------------------------------------- refused as a trainer is made


class Sparse(nn.Module):
    def __init__(self, *, frozen=False):
        super().__init__()
        self.embedding = nn.Embedding(32, 4, sparse=True).requires_grad_(not frozen)
        self.head = nn.Linear(4, 32)

    def forward(self, input_ids, labels):
        logits = self.head(self.embedding(input_ids))
        return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())}


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        yield from sequences(8)


def frozen():
    return llama().requires_grad_(False)


BAD_TRAINERS = {
    "empty_dataset": (
        lambda: {"train_dataset": datasets.Dataset.from_dict({"input_ids": [], "labels": []})},
        {},
        "train_dataset (0 samples)",
    ),
    "empty_dataset_constant": (
        lambda: {"train_dataset": datasets.Dataset.from_dict({"input_ids": [], "labels": []})},
        {"batch_schedule": "constant"},
        "train_dataset (0 samples)",
    ),
    "dataset_below_a_batch": (
        lambda: {"train_dataset": sequences(3)},
        {},
        "train_dataset (3 samples)",
    ),
    "dataset_below_an_accumulated_batch": (
        lambda: {"train_dataset": sequences(7)},
        {"gradient_accumulation_steps": 2},
        "train_dataset (7 samples)",
    ),
    "lomo": (dict, {"optim": "lomo"}, "optim ("),
    "layerwise": (
        dict,
        {"optim": "galore_adamw_layerwise", "optim_target_modules": ["q_proj"]},
        "optim (",
    ),
    "sparse_embedding": (lambda: {"model": Sparse()}, {}, "sparse (True)"),
    "nothing_trainable": (lambda: {"model": frozen()}, {}, "trainable parameter"),
}


@pytest.mark.parametrize(("trainer", "options", "text"), BAD_TRAINERS.values(), ids=BAD_TRAINERS)
def test_what_cannot_be_trained_is_refused_as_the_trainer_is_made(tmp_path, trainer, options, text):
    with pytest.raises(ValueError, match=re.escape(text)) as refused:
        adaptive(tmp_path, trainer=trainer(), **options)
    assert "must" in str(refused.value)


def test_the_same_is_allowed_with_plain_arguments(tmp_path):
    plain(tmp_path, trainer={"train_dataset": sequences(3)})
    AdaptiveBatchTrainer(
        model=Sparse(),
        args=arguments(tmp_path, TrainingArguments),
        train_dataset=sequences(3),
    )


def test_a_frozen_sparse_embedding_is_allowed(tmp_path):
    trainer = adaptive(tmp_path, trainer={"model": Sparse(frozen=True)})
    trainer.train()
    assert trainer.state.epoch == 2


def test_a_dataset_of_just_one_batch_is_trained_on(tmp_path):
    trainer = adaptive(tmp_path, trainer={"train_dataset": sequences(4)}, num_train_epochs=3)
    trainer.train()
    assert trainer.state.global_step == 3


def test_a_dataset_below_a_micro_batch_is_refused_if_the_last_is_dropped(tmp_path):
    trainer = adaptive(
        tmp_path,
        trainer={"train_dataset": sequences(3)},
        batch_schedule="constant",
        dataloader_drop_last=True,
    )
    with pytest.raises(ValueError, match=r"train_dataset \(3 samples\)"):
        trainer.train()


def test_a_dataset_below_a_batch_trains_with_a_constant_one(tmp_path):
    """As under the plain Trainer."""
    trainer = adaptive(tmp_path, trainer={"train_dataset": sequences(3)}, batch_schedule="constant")
    trainer.train()
    assert trainer.state.global_step == 2


class Bucketed(torch.utils.data.BatchSampler):
    """Stands for any that decides itself what a batch is."""


def own_batches(data):
    sampler = torch.utils.data.SequentialSampler(data)
    return {"batch_sampler": Bucketed(sampler, 4, drop_last=False)}


def own_size(data):
    return {"batch_size": 8}


@pytest.mark.parametrize(
    ("own", "text"),
    [(own_batches, "batch_sampler (Bucketed)"), (own_size, "batch_size (8)")],
    ids=["batches", "size"],
)
def test_a_loader_that_decides_the_batch_itself_is_refused(tmp_path, own, text):
    class Own(Trainer):
        def get_train_dataloader(self):
            data = self.train_dataset
            return torch.utils.data.DataLoader(data, collate_fn=self.data_collator, **own(data))

    class Adaptive(AdaptiveBatchMixin, Own):
        pass

    trainer = Adaptive(model=llama(), args=arguments(tmp_path), train_dataset=sequences(37))
    with pytest.raises(ValueError, match=re.escape(text)):
        trainer.train()


def test_a_loader_of_ones_own_is_taken_apart(tmp_path):
    class Own(Trainer):
        def get_train_dataloader(self):
            data = self.train_dataset
            return torch.utils.data.DataLoader(data, batch_size=4, collate_fn=self.data_collator)

    class Adaptive(AdaptiveBatchMixin, Own):
        pass

    trainer = Adaptive(model=llama(), args=arguments(tmp_path), train_dataset=sequences(37))
    trainer.train()
    assert trainer.run.clock.samples_seen == 74


def test_tokens_cannot_be_the_budget_of_data_without_tokens(tmp_path):
    class Regression(nn.Module):
        main_input_name = "x"

        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 1)

        def forward(self, x, labels):
            return {"loss": (self.linear(x).squeeze(-1) - labels).square().mean()}

    data = datasets.Dataset.from_dict({"x": [[0.1, 0.2, 0.3]] * 16, "labels": [1.0] * 16})
    trainer = adaptive(
        tmp_path, trainer={"model": Regression(), "train_dataset": data}, max_train_tokens=100
    )
    with pytest.raises(ValueError, match=r"max_train_tokens \(100\) must be left out"):
        trainer.train()
    adaptive(tmp_path, trainer={"model": Regression(), "train_dataset": data}).train()
