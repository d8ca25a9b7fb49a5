"""Where the batch cannot change, training is the plain Trainer's to the last bit.

Logged losses, gradient norms and learning rates, the samples' order and the final weights, with
nothing that helps: default shuffling, dropout, workers.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import TrainingArguments
from transformers.trainer_utils import SchedulerType

from hf_adaptive_batch import AdaptiveBatchTrainer
from hf_adaptive_batch.hf_compat import argument_name

from .cases import (
    GROWING,
    MeanLossModel,
    adaptive,
    arguments,
    history,
    llama,
    pad,
    plain,
    same_weights,
    sequences,
    weights,
)


CONSTANT = {"batch_schedule": "constant"}


def both(folder, *, trainer=None, batch=CONSTANT, **options):
    """Train the same twice, plainly and adaptively; `trainer` makes the Trainer's arguments."""
    make = trainer or dict
    one = plain(folder / "plain", trainer=make(), **options)
    one.train()
    other = adaptive(folder / "adaptive", trainer=make(), **options, **batch)
    other.train()
    return one, other


def assert_equal(one, other):
    assert history(other, adaptive_keys=False) == history(one)
    assert same_weights(weights(other), weights(one))
    assert other.state.global_step == one.state.global_step
    assert other.state.max_steps == one.state.max_steps
    assert other.state.epoch == one.state.epoch
    assert other.state.total_flos == one.state.total_flos
    assert len(history(one)) >= 2  # there was something to compare


def uneven():
    return {"train_dataset": sequences(37, uneven=True), "data_collator": pad}


def mean_loss():
    return {"model": MeanLossModel()}


def with_evaluation():
    return {**uneven(), "eval_dataset": sequences(11, uneven=True)}


def summed_loss(outputs, labels, num_items_in_batch=None):
    logits = outputs["logits"][:, :-1].flatten(0, 1)
    total = nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum")
    return total / (labels.numel() if num_items_in_batch is None else num_items_in_batch)


def with_loss_function():
    return {**uneven(), "compute_loss_func": summed_loss}


def with_own_optimizer():
    model = llama()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=3, gamma=0.5)
    return {"model": model, "optimizers": (optimizer, schedule)}


# 37 samples, micro-batches of 4: the last one holds 1 sample, and the last step of an epoch is
# short for every accumulation but 1 and 2.
@pytest.mark.parametrize("accumulation", [1, 2, 3])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("data", [dict, uneven, mean_loss], ids=["even", "padded", "mean_loss"])
def test_a_constant_batch_trains_as_the_plain_trainer(tmp_path, accumulation, workers, data):
    one, other = both(
        tmp_path,
        trainer=data,
        gradient_accumulation_steps=accumulation,
        dataloader_num_workers=workers,
    )
    assert_equal(one, other)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_norm_test_that_starts_at_its_cap_trains_as_the_plain_trainer(tmp_path, accumulation):
    one, other = both(
        tmp_path,
        trainer=uneven,
        batch={"eta": 0.5, "max_global_batch_size": 4 * accumulation},
        gradient_accumulation_steps=accumulation,
    )
    assert_equal(one, other)


def test_a_norm_test_that_starts_at_the_size_of_the_dataset_trains_as_the_plain_trainer(tmp_path):
    one, other = both(
        tmp_path,
        trainer=lambda: {"train_dataset": sequences(8)},
        batch={"eta": 0.5},
        gradient_accumulation_steps=2,
        num_train_epochs=4,
    )
    assert_equal(one, other)


OPTIONS = {
    "persistent_workers": {
        "dataloader_num_workers": 2,
        "dataloader_persistent_workers": True,
        "gradient_accumulation_steps": 2,
    },
    "deep_prefetch": {
        "dataloader_num_workers": 1,
        "dataloader_prefetch_factor": 7,
        "gradient_accumulation_steps": 2,
    },
    "drop_last": {"dataloader_drop_last": True, "gradient_accumulation_steps": 2},
    "drop_last_short_step": {"dataloader_drop_last": True, "gradient_accumulation_steps": 4},
    "half_epochs": {"num_train_epochs": 2.5},
    "half_epochs_accumulated": {"num_train_epochs": 2.5, "gradient_accumulation_steps": 2},
    "less_than_an_epoch": {"num_train_epochs": 0.3, "gradient_accumulation_steps": 2},
    "max_steps_within_an_epoch": {"max_steps": 7},
    "max_steps_over_epochs": {"max_steps": 13, "gradient_accumulation_steps": 2},
    "rare_logs": {"logging_steps": 5, "gradient_accumulation_steps": 3},
    "first_step_logged": {"logging_steps": 5, "logging_first_step": True},
    "fractional_logs": {"logging_steps": 0.2},
    "logs_by_epoch": {"logging_strategy": "epoch", "gradient_accumulation_steps": 2},
    "clipping": {"max_grad_norm": 0.05, "gradient_accumulation_steps": 2},
    "no_clipping": {"max_grad_norm": 0.0, "gradient_accumulation_steps": 2},
    "label_smoothing": {"label_smoothing_factor": 0.1, "gradient_accumulation_steps": 2},
    "activation_checkpointing": {
        argument_name("activation_checkpointing"): True,
        argument_name("activation_checkpointing_kwargs"): {"use_reentrant": False},
        "gradient_accumulation_steps": 2,
    },
    "bf16": {"bf16": True, "gradient_accumulation_steps": 2},
    "group_by_length": {
        "train_sampling_strategy": "group_by_length",
        "gradient_accumulation_steps": 2,
    },
    "sequential": {"train_sampling_strategy": "sequential", "gradient_accumulation_steps": 2},
    "data_seed": {"data_seed": 7, "seed": 5, "gradient_accumulation_steps": 2},
    "neftune": {"neftune_noise_alpha": 5.0, "gradient_accumulation_steps": 2},
    "evaluated_on_start": {"eval_strategy": "epoch", "eval_on_start": True},
    "sgd": {"optim": "sgd", "gradient_accumulation_steps": 2},
    "input_tokens_counted": {"include_num_input_tokens_seen": True},
    "measured_seldom": {"gradient_accumulation_steps": 2},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_constant_batch_trains_as_the_plain_trainer_with(tmp_path, options, request):
    seldom = {"test_interval": 3} if "measured_seldom" in request.node.name else {}
    data = with_evaluation if "eval_strategy" in options else uneven
    one, other = both(tmp_path, trainer=data, batch={**CONSTANT, **seldom}, **options)
    assert_equal(one, other)


@pytest.mark.parametrize("workers", [0, 2])
def test_group_by_length_orders_samples_as_the_plain_trainer_does(tmp_path, workers):
    """Its sampler draws from torch's generator when an epoch begins."""
    one, other = both(
        tmp_path,
        trainer=uneven,
        train_sampling_strategy="group_by_length",
        dataloader_num_workers=workers,
        num_train_epochs=3,
    )
    assert_equal(one, other)


@pytest.mark.parametrize("averaged", [True, False])
def test_a_loss_function_is_called_as_by_the_plain_trainer(tmp_path, averaged):
    one, other = both(
        tmp_path,
        trainer=with_loss_function,
        gradient_accumulation_steps=2,
        average_tokens_across_devices=averaged,
    )
    assert_equal(one, other)


SCHEDULES = {
    "linear": {},
    "cosine": {},
    "cosine_with_restarts": {"num_cycles": 2},
    "polynomial": {"power": 2.0},
    "constant": {},
    "constant_with_warmup": {},
    "inverse_sqrt": {},
    "cosine_with_min_lr": {"min_lr": 1e-4},
    "cosine_warmup_with_min_lr": {"min_lr": 1e-4},
    "warmup_stable_decay": {"num_decay_steps": 5},
}


def test_every_schedule_without_metrics_is_compared():
    driven_by_metrics = {"reduce_lr_on_plateau", "greedy"}
    assert set(SCHEDULES) == {kind.value for kind in SchedulerType} - driven_by_metrics


@pytest.mark.parametrize(("kind", "options"), SCHEDULES.items(), ids=SCHEDULES)
def test_learning_rates_follow_every_schedule_as_the_plain_trainers_do(tmp_path, kind, options):
    one, other = both(
        tmp_path,
        lr_scheduler_type=kind,
        lr_scheduler_kwargs=options,
        warmup_steps=4,
        num_train_epochs=1.5,
    )
    assert_equal(one, other)
    rates = {entry["learning_rate"] for entry in history(one) if "learning_rate" in entry}
    assert len(rates) > 3 or kind == "constant"


def test_a_plateau_schedule_follows_the_metric_as_the_plain_trainers_does(tmp_path):
    one, other = both(
        tmp_path,
        trainer=with_evaluation,
        lr_scheduler_type="reduce_lr_on_plateau",
        lr_scheduler_kwargs={"patience": 0},
        metric_for_best_model="eval_loss",
        eval_strategy="steps",
        eval_steps=2,
        learning_rate=0.1,
    )
    assert_equal(one, other)


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_during_training_sees_the_plain_trainers_model(tmp_path, workers):
    one, other = both(
        tmp_path,
        trainer=with_evaluation,
        gradient_accumulation_steps=2,
        eval_strategy="steps",
        eval_steps=3,
        logging_steps=5,
        dataloader_num_workers=workers,
    )
    assert_equal(one, other)
    assert sum("eval_loss" in entry for entry in history(one)) > 2


def test_evaluation_at_epoch_ends_and_the_best_model_are_the_plain_trainers(tmp_path):
    one, other = both(
        tmp_path,
        trainer=with_evaluation,
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
        num_train_epochs=3,
        metric_for_best_model="eval_loss",
        greater_is_better=True,  # so that the best model is not the last
    )
    assert_equal(one, other)
    best = [path.best_model_checkpoint.rpartition("-")[2] for path in (one.state, other.state)]
    assert best[0] == best[1] != str(one.state.global_step)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_an_optimizer_and_schedule_that_were_passed_in_step_as_in_the_plain_trainer(
    tmp_path, accumulation
):
    one, other = both(
        tmp_path, trainer=with_own_optimizer, gradient_accumulation_steps=accumulation
    )
    assert_equal(one, other)


def test_with_plain_arguments_everything_is_left_to_the_trainer(tmp_path, caplog):
    one = plain(tmp_path / "plain", gradient_accumulation_steps=2)
    one.train()
    args = arguments(tmp_path / "other", TrainingArguments, gradient_accumulation_steps=2)
    other = AdaptiveBatchTrainer(model=llama(), args=args, train_dataset=sequences(37))
    assert "constant batch" in caplog.text
    other.train()
    assert_equal(one, other)
    assert history(other) == history(other, adaptive_keys=False)


def test_training_twice_goes_on_as_the_plain_trainer_does(tmp_path):
    one = plain(tmp_path / "plain", gradient_accumulation_steps=2)
    one.train()
    one.train()
    other = adaptive(tmp_path / "adaptive", gradient_accumulation_steps=2, **CONSTANT)
    other.train()
    other.train()
    assert_equal(one, other)


# That the comparison can fail: one run that must differ for each thing compared.


def test_a_batch_that_grows_is_seen_to_differ(tmp_path):
    one, other = both(tmp_path, batch=GROWING)
    with pytest.raises(AssertionError):
        assert_equal(one, other)
    assert not same_weights(weights(one), weights(other))


def test_another_weighting_of_a_short_micro_batch_is_seen_to_differ(tmp_path, monkeypatch):
    monkeypatch.setattr(
        AdaptiveBatchTrainer,
        "_loss_divisors",
        lambda self, step: [step.samples / size for size in step.sizes],
    )
    one, other = both(tmp_path, trainer=mean_loss, gradient_accumulation_steps=2)
    assert not same_weights(weights(one), weights(other))


def test_one_random_number_too_many_is_seen_to_differ(tmp_path):
    class Drawing(AdaptiveBatchTrainer):
        def get_batch_samples(self, *args):
            torch.rand(())
            return super().get_batch_samples(*args)

    one = plain(tmp_path / "plain")
    one.train()
    args = arguments(tmp_path / "other", **CONSTANT)
    other = Drawing(model=llama(), args=args, train_dataset=sequences(37))
    other.train()
    assert not same_weights(weights(one), weights(other))
