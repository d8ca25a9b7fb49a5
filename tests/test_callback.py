"""`GradientNoiseCallback` measures under a plain `Trainer`, and changes nothing of the training."""

from __future__ import annotations

import re

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_adaptive_batch import GradientNoiseCallback
from hf_adaptive_batch.hf_compat import argument_name

from .cases import (
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


ACCUMULATED = {"gradient_accumulation_steps": 2}
MEASURED = ("noise_trace", "grad_sq_norm", "noise_scale", "norm_test")


def skewed(row):
    """Most tokens one of two, so that the gradient stands out of the noise."""
    tokens = [token % 2 if token > 5 else token for token in row["input_ids"]]
    return {"input_ids": tokens, "labels": tokens}


def padded():
    return {"train_dataset": sequences(37, uneven=True).map(skewed), "data_collator": pad}


def mean_loss():
    return {"model": MeanLossModel(), "train_dataset": sequences(37).map(skewed)}


def with_callback(folder, *, trainer=padded, first=False, callback=None, **options):
    own = plain(folder, trainer=trainer(), **{**ACCUMULATED, **options})
    if first:
        GradientNoiseCallback.first_in(own)
    else:
        own.add_callback(callback or GradientNoiseCallback())
    own.train()
    return own


def measured(trainer):
    """What was logged of the noise, step by step."""
    return [
        {
            name: entry[f"adaptive_batch/{name}"]
            for name in MEASURED
            if f"adaptive_batch/{name}" in entry
        }
        for entry in history(trainer)
        if "loss" in entry
    ]


OPTIONS = {
    "default": {},
    "clipped": {"max_grad_norm": 0.05},
    "workers": {"dataloader_num_workers": 2},
    "accumulation_3": {"gradient_accumulation_steps": 3},
    "rare_logs": {"logging_steps": 3},
    "checkpointing": {
        argument_name("activation_checkpointing"): True,
        argument_name("activation_checkpointing_kwargs"): {"use_reentrant": False},
    },
    "evaluated": {"eval_strategy": "steps", "eval_steps": 2},
}


def evaluated():
    return {**padded(), "eval_dataset": sequences(8)}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_training_is_bitwise_the_same_with_and_without(tmp_path, options):
    check_unchanged(tmp_path, evaluated, options)


@pytest.mark.parametrize("name", ["default", "clipped", "accumulation_3"])
def test_training_with_a_plain_mean_loss_is_bitwise_the_same(tmp_path, name):
    check_unchanged(tmp_path, mean_loss, OPTIONS[name])


def check_unchanged(tmp_path, data, options):
    without = plain(tmp_path / "without", trainer=data(), **{**ACCUMULATED, **options})
    without.train()
    measuring = with_callback(tmp_path / "with", trainer=data, **options)
    assert history(measuring, adaptive_keys=False) == history(without)
    assert same_weights(weights(measuring), weights(without))
    assert any(measured(measuring))


def test_the_noise_scale_is_in_the_log_history(tmp_path):
    logged = measured(with_callback(tmp_path))
    assert set(logged[0]) >= {"noise_trace", "grad_sq_norm"}
    assert "noise_scale" not in logged[0]  # one step gives no error of its estimate
    assert set(logged[-1]) == set(MEASURED)


@pytest.mark.parametrize("data", [padded, mean_loss])
@pytest.mark.parametrize(
    "options",
    [{}, {"max_grad_norm": 0.05}, {"gradient_accumulation_steps": 3}, {"bf16": True}],
    ids=["default", "clipped", "accumulation_3", "bf16"],
)
def test_the_moments_are_those_of_the_adaptive_trainer(tmp_path, data, options):
    measuring = with_callback(tmp_path / "callback", trainer=data, **options)
    constant = adaptive(
        tmp_path / "adaptive",
        trainer=data(),
        batch_schedule="constant",
        **{**ACCUMULATED, **options},
    )
    constant.train()
    one, other = measured(measuring), measured(constant)
    assert len(one) == len(other) > 5
    for mine, theirs in zip(one, other, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-9)
    if "max_grad_norm" in options:
        norms = [entry["grad_norm"] for entry in history(constant) if "grad_norm" in entry]
        assert min(norms) > 0.05  # every step was clipped


def test_a_measurement_after_clipping_is_seen_to_differ(tmp_path, monkeypatch):
    from hf_adaptive_batch import callback as module

    class Late(module.GradientProbe):
        def __init__(self, model, *, total_from_backward=False):
            super().__init__(model)  # reads `.grad` in finish, which is clipped by then

    one = measured(with_callback(tmp_path / "one", max_grad_norm=0.05))
    monkeypatch.setattr(module, "GradientProbe", Late)
    other = measured(with_callback(tmp_path / "other", max_grad_norm=0.05))
    assert one[0] != pytest.approx(other[0], rel=1e-3)


def test_trackers_get_the_values_if_the_callback_is_first(tmp_path):
    event_accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator"
    )

    def scalars(folder, *, first):
        trainer = with_callback(folder, first=first, report_to=["tensorboard"])
        (file,) = folder.rglob("events.out.tfevents.*")
        events = event_accumulator.EventAccumulator(str(file.parent))
        events.Reload()
        tag = "train/adaptive_batch/noise_scale"
        found = tag in events.Tags()["scalars"]
        values = [event.value for event in events.Scalars(tag)] if found else []
        return values, [e["noise_scale"] for e in measured(trainer) if "noise_scale" in e]

    values, logged = scalars(tmp_path / "first", first=True)
    assert values == pytest.approx(logged)
    assert len(logged) > 3
    assert scalars(tmp_path / "last", first=False)[0] == []  # as documented


class Hooks(TrainerCallback):
    """Counts the hooks on the model at each event; must come after the callback it looks at."""

    def __init__(self):
        self.begins, self.ends = [], []

    @staticmethod
    def of(model):
        leaves = sum(
            len(p._backward_hooks or ()) + len(p._post_accumulate_grad_hooks or ())
            for p in model.parameters()
        )
        return leaves + len(model._forward_pre_hooks)

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.begins.append(self.of(model))

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.ends.append(self.of(model))


def test_hooks_are_on_in_measured_steps_only(tmp_path):
    hooks = Hooks()
    trainer = plain(tmp_path, trainer=padded(), **ACCUMULATED)
    trainer.add_callback(GradientNoiseCallback(test_interval=3))
    trainer.add_callback(hooks)
    trainer.train()
    assert [step for step, count in enumerate(hooks.begins, start=1) if count] == [3, 6, 9]
    assert set(hooks.ends) == {0}
    assert Hooks.of(trainer.model) == 0


def test_the_interval_is_in_optimizer_steps(tmp_path):
    trainer = with_callback(tmp_path, callback=GradientNoiseCallback(test_interval=4))
    first = next(index for index, entry in enumerate(measured(trainer), start=1) if entry)
    assert first == 4


def test_a_trainer_that_broke_down_measures_again(tmp_path):
    class Breaking(TrainerCallback):
        broken = False

        def on_substep_end(self, args, state, control, **kwargs):
            if state.global_step == 2 and not self.broken:
                self.broken = True
                raise KeyError("broken here")

    trainer = plain(tmp_path, trainer=padded(), **ACCUMULATED)
    trainer.add_callback(GradientNoiseCallback())
    trainer.add_callback(Breaking())
    with pytest.raises(KeyError):
        trainer.train()
    trainer.train()
    assert all(measured(trainer))
    assert Hooks.of(trainer.model) == 0


def test_a_loss_that_is_not_finite_is_not_taken_in(tmp_path):
    class Poisoned(Trainer):
        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            return loss * float("nan") if self.state.global_step == 3 else loss

    trainer = Poisoned(
        model=llama(),
        args=arguments(tmp_path, TrainingArguments, **ACCUMULATED),
        **padded(),
    )
    trainer.add_callback(GradientNoiseCallback())
    trainer.train()
    values = [value for entry in measured(trainer) for value in entry.values()]
    assert values
    assert all(value == value for value in values)


def test_only_training_logs_get_the_values(tmp_path):
    trainer = with_callback(tmp_path, trainer=evaluated, eval_strategy="steps", eval_steps=2)
    for entry in history(trainer):
        if "loss" not in entry:
            assert not any(key.startswith("adaptive_batch/") for key in entry)


# -------------------------------------------------------------------------------------- refusals


def test_adaptive_arguments_are_refused(tmp_path):
    trainer = adaptive(tmp_path, **ACCUMULATED, batch_schedule="constant")
    trainer.add_callback(GradientNoiseCallback())
    with pytest.raises(ValueError, match=r"args \(AdaptiveBatchArguments\) must"):
        trainer.train()


def test_one_micro_batch_a_step_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"gradient_accumulation_steps \(1\) must"):
        with_callback(tmp_path, gradient_accumulation_steps=1)


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("world_size", 2, "world_size (2)"),
        ("n_gpu", 2, "n_gpu (2)"),
        ("deepspeed", "zero.json", "DeepSpeed"),
        ("fp16", True, "fp16 (True)"),
    ],
    ids=["ranks", "gpus", "deepspeed", "fp16"],
)
def test_what_a_callback_cannot_measure_is_refused(tmp_path, name, value, text):
    class Arguments(TrainingArguments):
        pass

    setattr(Arguments, name, property(lambda self: value, lambda self, _: None))
    plain_arguments = arguments(tmp_path, TrainingArguments, **ACCUMULATED)
    plain_arguments.__class__ = Arguments  # as if it had been started so
    with pytest.raises(ValueError, match=re.escape(text)):
        GradientNoiseCallback().on_train_begin(plain_arguments, None, None)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"eta": 0.0}, "eta (0.0)"),
        ({"eta": 1.0}, "eta (1.0)"),
        ({"test_interval": 0}, "test_interval (0)"),
        ({"test_interval": -1}, "test_interval (-1)"),
        ({"noise_scale_decay": 1.0}, "decay (1.0)"),
    ],
    ids=str,
)
def test_bad_arguments_are_refused(options, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        GradientNoiseCallback(**options)


def summed_loss(outputs, labels, num_items_in_batch=None):
    logits = outputs["logits"][:, :-1].flatten(0, 1)
    total = torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum")
    return total / num_items_in_batch


def with_loss_function():
    return {**padded(), "compute_loss_func": summed_loss}


def test_a_loss_function_that_keeps_the_labels_to_itself_is_refused(tmp_path):
    with pytest.raises(RuntimeError, match=r"num_items_in_batch .* must be"):
        with_callback(tmp_path, trainer=with_loss_function)


def test_label_smoothing_is_refused_before_the_first_step(tmp_path):
    with pytest.raises(ValueError, match=r"label_smoothing_factor \(0\.1\) must be 0"):
        with_callback(tmp_path, trainer=padded, label_smoothing_factor=0.1)
