"""Open-loop schedules under a real Trainer: what is trained on, how much of it, and at which rate.

Every schedule is compared with a loop that is written from its definition, on the samples that
reached the model.
"""

from __future__ import annotations

import json
import math
import shutil
from itertools import pairwise

import datasets
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_adaptive_batch import AdaptiveBatchTrainer, read_records
from hf_adaptive_batch.checkpoint import STATE_FILE
from hf_adaptive_batch.decide.controllers import ScheduledController
from hf_adaptive_batch.decide.schedule import LinearRamp, Unit
from hf_adaptive_batch.decide.stages import parse_stages
from hf_adaptive_batch.report.records import EVALUATIONS_FILE, RECORDS_FILE, read_evaluations

from .cases import (
    MeanLossModel,
    arguments,
    history,
    llama,
    pad,
    plain,
    same_weights,
    sequences,
    weights,
)
from .train_on_ranks import Job, launch


SAMPLES, EPOCHS, FIRST, CAP, LENGTH = 37, 3, 4, 16, 8
RATE = 3e-3
CONSTANT = {"batch_schedule": "constant"}


class Watch(TrainerCallback):
    """The optimizer as it is when it steps, and the batch of that step."""

    def __init__(self):
        self.steps = []
        self.trainer = None

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        run, groups = self.trainer.run, optimizer.param_groups
        self.steps.append(
            {
                "size": run.step.plan.global_batch_size,
                "samples": run.step.global_samples,
                "before": run.clock.samples_seen,
                "rates": [float(group["lr"]) for group in groups],
                "betas": [group.get("betas") for group in groups],
                "weight_decays": [group["weight_decay"] for group in groups],
            }
        )

    def column(self, name):
        return [step[name] for step in self.steps]

    @property
    def rates(self):
        return [step["rates"][0] for step in self.steps]


def seen_by(kind):
    """A Trainer that notes the samples which its model is given, without their padding."""

    class Seeing(kind):
        def training_step(self, model, inputs, *rest):
            rows, mask = inputs["input_ids"].tolist(), inputs.get("attention_mask")
            lengths = [len(row) for row in rows] if mask is None else mask.sum(1).tolist()
            self.seen += [tuple(row[:n]) for row, n in zip(rows, lengths, strict=True)]
            return super().training_step(model, inputs, *rest)

    Seeing.seen = ()
    return Seeing


def made(folder, *, trainer=None, kind=AdaptiveBatchTrainer, **options):
    """A trainer that has not trained, and what watches it."""
    watch = Watch()
    given = {"train_dataset": sequences(SAMPLES), **(trainer or {})}
    if "model" not in given:
        given["model"] = llama()
    callbacks = [*given.pop("callbacks", []), watch]
    options = {"num_train_epochs": EPOCHS, "learning_rate": RATE, **options}
    own = seen_by(kind)(args=arguments(folder, **options), callbacks=callbacks, **given)
    own.seen, watch.trainer = [], own
    return own, watch


def trained(folder, *, resume=None, **options):
    own, watch = made(folder, **options)
    own.train(resume_from_checkpoint=resume)
    return own, watch


def trained_plainly(folder, *, trainer=None, **options):
    given = {"train_dataset": sequences(SAMPLES), **(trainer or {})}
    if "model" not in given:
        given["model"] = llama()
    options = {"num_train_epochs": EPOCHS, "learning_rate": RATE, **options}
    own = seen_by(Trainer)(args=arguments(folder, TrainingArguments, **options), **given)
    own.seen = []
    own.train()
    return own


def padded():
    return {"train_dataset": sequences(SAMPLES, uneven=True), "data_collator": pad}


# ------------------------------------------------------------------------------ naive definitions


def share_at(samples, *, epoch=SAMPLES, epochs=EPOCHS, first=FIRST):
    """The budget used up, in the steps of the plain Trainer: an epoch's short one is a whole."""
    whole, rest = divmod(samples, epoch)
    per_epoch = math.ceil(epoch / first)
    return (whole * per_epoch + rest / first) / (epochs * per_epoch)


def linear(share):
    return 1 - share


def stage(progress, *stages):
    return [size for start, size in stages if progress >= start - 1e-12][-1]


def naive_stage_wise(at):
    return stage(at["share"], (0, CAP // 4), (0.025, CAP // 2), (0.05, CAP))


def naive_ramp(at):
    return FIRST + (CAP - FIRST) * min(at["share"] / 0.5, 1)


def naive_seesaw(at):
    """Rounded down to whole micro-batches, as more would raise the learning rate."""
    left = linear(at["share"])
    return math.floor(1 / left + 1e-9) * FIRST if left > FIRST / CAP else CAP


def naive_cuts(at):
    size = FIRST
    while size < CAP and linear(at["share"]) <= FIRST / (2 * size) + 1e-12:
        size *= 2
    return size


OPEN = {
    "constant": ({}, lambda at: FIRST),
    "0:4 25%:8 50%:16": ({}, lambda at: stage(at["share"], (0, 4), (0.25, 8), (0.5, 16))),
    "0:4 10samples:8 50samples:16": (
        {},
        lambda at: stage(at["samples"], (0, 4), (10, 8), (50, 16)),
    ),
    "0:4 80:12 0.5K:16": ({}, lambda at: stage(at["tokens"], (0, 4), (80, 12), (500, 16))),
    "0:4 3steps:8 9steps:16": ({}, lambda at: stage(at["steps"], (0, 4), (3, 8), (9, 16))),
    "0:16 25%:4 50%:8": ({}, lambda at: stage(at["share"], (0, 16), (0.25, 4), (0.5, 8))),
    "0:8": ({}, lambda at: 8),
    "stage_wise": ({"max_global_batch_size": CAP}, naive_stage_wise),
    "linear_ramp": ({"max_global_batch_size": CAP, "ramp_length": "50%"}, naive_ramp),
    "seesaw": ({"max_global_batch_size": CAP}, naive_seesaw),
    "seesaw in cuts": ({"max_global_batch_size": CAP, "seesaw_alpha": 2.0}, naive_cuts),
    "cbs_law": (
        {"max_global_batch_size": CAP, "cbs_coefficient": 6.0, "cbs_exponent": 0.5},
        lambda at: min(max(6 * math.sqrt(at["tokens"]) / at["per_sample"], FIRST), CAP),
    ),
}
CLOSED = {
    "norm_test": {"max_global_batch_size": CAP, "batch_warmup_samples": 0},
    "noise_scale": {"max_global_batch_size": CAP, "batch_warmup_samples": 0},
}
ALL = {**{name: options for name, (options, _) in OPEN.items()}, **CLOSED}


def options_of(name):
    return {"batch_schedule": name.partition(" in ")[0], **ALL[name]}


def naive_sizes(size_at, lengths, *, micro=FIRST, epochs=EPOCHS, budget_tokens=None):
    """The batches and the samples of each step, by the definition alone.

    `lengths` are the tokens of the samples in the order in which they are trained on.
    """
    found, seen, step, per_sample = [], 0, 0, sum(lengths[:SAMPLES]) / SAMPLES
    while seen < len(lengths):
        tokens = sum(lengths[:seen])
        if budget_tokens is None:
            share = share_at(seen, epochs=epochs)
        else:
            share = tokens / per_sample / FIRST / math.ceil(budget_tokens / per_sample / FIRST)
        at = {"samples": seen, "tokens": tokens, "steps": step, "share": share}
        wished = size_at({**at, "per_sample": per_sample})
        size = math.ceil(wished / micro - 1e-9) * micro
        samples = min(size, SAMPLES - seen % SAMPLES, len(lengths) - seen)
        found.append((size, samples, share))
        seen, step = seen + samples, step + 1
    return found


def check_naive(name, own, watch, **budget):
    size_at = OPEN[name][1]
    expected = naive_sizes(size_at, [len(row) for row in own.seen], **budget)
    assert watch.column("size") == [size for size, _, _ in expected]
    assert watch.column("samples") == [samples for _, samples, _ in expected]
    for step, (size, _, share) in zip(watch.steps, expected, strict=True):
        rate = RATE * max(linear(share), 0.0)
        if name == "seesaw":
            rate *= math.sqrt(size / FIRST)
        elif name == "seesaw in cuts":
            cuts = math.floor(-math.log2(max(linear(share), 1e-12)) + 1e-9)
            rate = RATE * 2.0**-cuts * math.sqrt(size / FIRST)
        assert step["rates"] == pytest.approx([rate] * 2, rel=1e-9)
    return expected


# -------------------------------------------------------------------------- samples, sizes, rates


@pytest.mark.parametrize("name", OPEN)
def test_sizes_and_rates_are_those_of_a_loop_written_from_the_definition(tmp_path, name):
    own, watch = trained(tmp_path, **options_of(name))
    expected = check_naive(name, own, watch)
    assert len({size for size, _, _ in expected}) > 1 or name in ("constant", "0:8")


@pytest.mark.parametrize("name", [name for name in OPEN if name != "0:8"])
def test_sizes_are_those_of_the_naive_loop_for_samples_of_uneven_length(tmp_path, name):
    own, watch = trained(tmp_path, trainer=padded(), **options_of(name))
    check_naive(name, own, watch)


@pytest.mark.parametrize("name", OPEN)
def test_sizes_are_those_of_the_naive_loop_for_a_budget_in_tokens(tmp_path, name):
    """Padding is no token; the last step may go beyond the budget, none begins beyond it."""
    budget = {"max_train_tokens": 520, "num_train_epochs": 1}
    if name == "0:4 80:12 0.5K:16":
        budget["max_train_tokens"] = 600
    own, watch = trained(tmp_path, trainer=padded(), **options_of(name), **budget)
    check_naive(name, own, watch, budget_tokens=budget["max_train_tokens"])
    tokens = [len(row) for row in own.seen]
    assert sum(tokens) == own.run.clock.tokens_seen >= budget["max_train_tokens"]
    assert sum(tokens[: -watch.steps[-1]["samples"]]) < budget["max_train_tokens"]


def test_a_naive_loop_of_other_stages_is_seen_to_differ(tmp_path):
    own, watch = trained(tmp_path, **options_of("0:4 25%:8 50%:16"))
    with pytest.raises(AssertionError):
        check_naive("linear_ramp", own, watch)
    with pytest.raises(AssertionError):
        check_naive("seesaw", own, watch)


WITH_WORKERS = ["seesaw", "0:16 25%:4 50%:8", "norm_test"]


@pytest.mark.parametrize(
    ("name", "workers"), [(name, 0) for name in ALL] + [(name, 1) for name in WITH_WORKERS]
)
def test_every_schedule_trains_on_the_plain_trainers_samples_in_its_order(tmp_path, name, workers):
    loading = {"dataloader_num_workers": workers}
    one = trained_plainly(tmp_path / "plain")
    own, watch = trained(tmp_path / "own", **options_of(name), **loading)
    assert own.seen == one.seen
    assert len(own.seen) == own.run.clock.samples_seen == EPOCHS * SAMPLES
    assert own.run.clock.tokens_seen == LENGTH * EPOCHS * SAMPLES
    assert own.state.epoch == one.state.epoch == EPOCHS
    assert own.state.max_steps == own.state.global_step == len(watch.steps)


@pytest.mark.parametrize("name", [name for name in ALL if "seesaw" not in name])
def test_the_rate_is_the_same_function_of_samples_for_every_schedule(tmp_path, name):
    """That of the plain Trainer where both begin a step, and the line between its steps."""
    shape = {"lr_scheduler_type": "cosine", "warmup_steps": 5}
    _, watch = trained(tmp_path, **options_of(name), **shape)
    total, warmup = EPOCHS * math.ceil(SAMPLES / FIRST), 5
    for step in watch.steps:
        done = share_at(step["before"]) * total
        if done < warmup:
            expected = done / warmup
        else:
            expected = 0.5 * (1 + math.cos(math.pi * (done - warmup) / (total - warmup)))
        assert step["rates"] == pytest.approx([RATE * expected] * 2, rel=1e-9, abs=1e-15)


BUDGETS = {
    "half_an_epoch": ({"num_train_epochs": 0.5}, 20),
    "epoch_and_a_half": ({"num_train_epochs": 1.5}, 57),
    "steps": ({"max_steps": 17}, 65),
    "samples": ({"max_train_samples": 50}, 50),
    "drop_last": ({"dataloader_drop_last": True, "num_train_epochs": 2}, 72),
}


@pytest.mark.parametrize(("budget", "samples"), BUDGETS.values(), ids=BUDGETS)
@pytest.mark.parametrize(
    "name", ["0:16 25%:4 50%:8", "0:8", "linear_ramp", "seesaw", "seesaw in cuts"]
)
def test_the_budget_does_not_depend_on_the_schedule(tmp_path, name, budget, samples):
    one = trained_plainly(
        tmp_path / "plain", **({"max_steps": 14} if "max_train_samples" in budget else budget)
    )
    own, _ = trained(tmp_path / "own", **options_of(name), **budget)
    assert own.run.clock.samples_seen == len(own.seen) == samples
    assert own.seen == one.seen[:samples]


# A first batch below or above the one of the arguments, with and without further stages.
@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("stages", ["0:4", "0:8", "0:16", "0:4 50%:32", "0:32 50%:4", "0:16 1%:8"])
def test_a_first_stage_of_any_size_leaves_the_budget_and_the_rates(tmp_path, stages, accumulation):
    one = trained_plainly(tmp_path / "plain", gradient_accumulation_steps=accumulation)
    own, watch = trained(
        tmp_path / "own", batch_schedule=stages, gradient_accumulation_steps=accumulation
    )
    assert own.seen == one.seen
    assert watch.column("size")[0] == int(stages.split()[0].split(":")[1])
    for step in watch.steps:
        share = share_at(step["before"], first=FIRST * accumulation)
        assert step["rates"][0] == pytest.approx(RATE * linear(share))


# --------------------------------------------------------------------------- the plain Trainer's


@pytest.mark.parametrize("data", [dict, padded], ids=["even", "padded"])
@pytest.mark.parametrize("accumulation", [1, 2, 3])
def test_one_stage_of_the_first_size_trains_as_constant_and_plain(tmp_path, accumulation, data):
    options = {"gradient_accumulation_steps": accumulation, "num_train_epochs": 2}
    one = trained_plainly(tmp_path / "plain", trainer=data(), **options)
    for schedule in ("constant", f"0:{4 * accumulation}", f"0:{4 * accumulation} 50%:12"):
        own, _ = trained(
            tmp_path / schedule.replace(" ", "-"),
            trainer=data(),
            batch_schedule=schedule,
            **options,
        )
        alike = history(own, adaptive_keys=False) == history(one)
        alike = alike and same_weights(weights(own), weights(one))
        assert alike == ("50%" not in schedule or accumulation == 3)


def test_one_larger_stage_is_the_plain_trainers_accumulation(tmp_path):
    """But for the learning rate, which follows the arguments' batch: so it is held."""
    options = {"lr_scheduler_type": "constant"}
    one = trained_plainly(tmp_path / "plain", gradient_accumulation_steps=4, **options)
    own, watch = trained(tmp_path / "own", batch_schedule="0:16", **options)
    assert own.seen == one.seen
    assert own.state.global_step == one.state.global_step == len(watch.steps) == EPOCHS * 3
    assert history(own, adaptive_keys=False) == history(one)
    assert same_weights(weights(own), weights(one))


def test_one_larger_stage_fills_the_budget_of_steps_of_the_arguments_batch(tmp_path):
    own, watch = trained(tmp_path, batch_schedule="0:16", max_steps=16)
    assert watch.column("samples") == [16, 16, 5, 16, 8]
    assert own.run.clock.samples_seen == 61


# ------------------------------------------------------------------------------ stages and epochs


def test_a_boundary_within_a_step_waits_for_the_next_one(tmp_path):
    _, watch = trained(tmp_path, batch_schedule="0:8 17samples:4", num_train_epochs=1)
    assert watch.column("samples") == [8, 8, 8, 4, 4, 4, 1]


def test_a_boundary_at_a_steps_begin_holds_for_it(tmp_path):
    _, watch = trained(tmp_path, batch_schedule="0:8 16samples:4", num_train_epochs=1)
    assert watch.column("samples") == [8, 8, 4, 4, 4, 4, 4, 1]


def test_several_boundaries_within_one_step_leave_the_last(tmp_path):
    stages = "0:16 1samples:4 2samples:8 3samples:12"
    _, watch = trained(tmp_path, batch_schedule=stages, num_train_epochs=1)
    assert watch.column("samples") == [16, 12, 9]


def test_a_boundary_at_an_epochs_end_holds_from_the_next_one_on(tmp_path):
    _, watch = trained(tmp_path, batch_schedule="0:8 37samples:16", num_train_epochs=2)
    assert watch.column("samples") == [8, 8, 8, 8, 5, 16, 16, 5]


def test_stages_cross_the_ends_of_several_epochs(tmp_path):
    stages = "0:4 30samples:8 60samples:12 90samples:16"
    own, watch = trained(tmp_path, batch_schedule=stages, num_train_epochs=3)
    assert watch.column("samples") == [4] * 8 + [5] + [8] * 3 + [12, 1] + [12, 12, 13]
    assert own.run.clock.epoch_index == 3


def test_stages_in_steps_count_short_steps_too(tmp_path):
    """Two epochs of steps of 16, 16 and 5: the sixth step exists, and begins with a stage."""
    _, watch = trained(tmp_path, batch_schedule="0:16 5steps:32", num_train_epochs=2)
    assert watch.column("size") == [16, 16, 16, 16, 16, 32]


def test_micro_batches_of_a_schedule_grow_before_it_accumulates(tmp_path):
    _, watch = trained(
        tmp_path, batch_schedule="0:4 8samples:8 24samples:16", max_micro_batch_size=8
    )
    records = read_records(tmp_path)
    plans = zip(records["micro_batch_size"], records["accumulation_steps"], strict=True)
    assert set(plans) == {(4, 1), (8, 1), (8, 2)}
    assert watch.column("size")[:5] == [4, 4, 8, 8, 16]


@pytest.mark.parametrize("interval", [0, 1, 3, 1000])
@pytest.mark.parametrize("name", ["0:4 3steps:8 9steps:16", "linear_ramp", "seesaw"])
def test_how_often_is_measured_does_not_change_an_open_loop(tmp_path, name, interval):
    own, watch = trained(tmp_path, **options_of(name), test_interval=interval)
    check_naive(name, own, watch)
    changes = sum(a != b for a, b in pairwise(watch.column("size")))
    records = read_records(tmp_path)
    changed = zip(records["global_batch_size"], records["next_global_batch_size"], strict=True)
    assert sum(a != b for a, b in changed) == changes > 1  # every change is on record
    assert set(records["reason"]) == {"scheduled"}
    if interval == 1000:
        assert len(records["step"]) == changes


@pytest.mark.parametrize("name", CLOSED)
def test_a_closed_loop_changes_only_after_measured_steps(tmp_path, name):
    _, watch = trained(tmp_path, **options_of(name), test_interval=3, eta=0.3)
    sizes = watch.column("size")
    changed = [step for step, (a, b) in enumerate(pairwise(sizes), start=1) if a != b]
    assert changed
    assert all(step % 3 == 0 for step in changed)


@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize(
    "schedule", ["0:1 50%:4", "linear_ramp", "seesaw", "cbs_law", "stage_wise"]
)
def test_an_open_loop_needs_nothing_to_measure(tmp_path, schedule, split):
    own, watch = trained(
        tmp_path,
        batch_schedule=schedule,
        per_device_train_batch_size=1,
        max_global_batch_size=8,
        split_micro_batch=split,
        num_train_epochs=1,
    )
    assert len(own.seen) == SAMPLES
    assert watch.column("size")[0] <= 2 < max(watch.column("size"))


def test_a_fixed_batch_of_one_sample_needs_nothing_to_measure(tmp_path):
    _, watch = trained(
        tmp_path, batch_schedule="0:1", per_device_train_batch_size=1, num_train_epochs=1
    )
    assert watch.column("size") == [1] * SAMPLES


# -------------------------------------------------------------------------- seesaw and its falls


def falling(kind, **options):
    return {"lr_scheduler_type": kind, "lr_scheduler_kwargs": options}


FALLS = {
    "linear": falling("linear"),
    "cosine": falling("cosine"),
    "polynomial": falling("polynomial", power=2.0),
    "polynomial_to_a_third": falling("polynomial", lr_end=1e-3),
    "min_lr": falling("cosine_with_min_lr", min_lr=1e-3),
    "min_lr_rate": falling("cosine_with_min_lr", min_lr_rate=0.3),
    "warmup_min_lr": falling("cosine_warmup_with_min_lr", min_lr=5e-4),
    "inverse_sqrt": falling("inverse_sqrt", timescale=2),
    "warmup_stable_decay": falling("warmup_stable_decay", num_decay_steps=15, min_lr_ratio=0.1),
}


def reference_rates(folder, shape, **budget):
    """The plain Trainer's rates, by steps done."""
    one = plain(folder, lr_scheduler_type=shape["lr_scheduler_type"])
    one.args = arguments(folder, TrainingArguments, learning_rate=RATE, **shape, **budget)
    one.create_optimizer()
    return one.create_scheduler(EPOCHS * math.ceil(SAMPLES / FIRST)).lr_lambdas[0]


# transformers' own warm-up of `warmup_min_lr` rises above 1 between whole steps.
@pytest.mark.parametrize(
    ("name", "warmup"),
    [(name, 0) for name in FALLS]
    + [(name, warmup) for name in FALLS if name != "warmup_min_lr" for warmup in (6, 0.2)],
)
def test_seesaw_takes_over_what_any_schedule_cuts(tmp_path, name, warmup):
    """Batch = first x peak / reference, rate = reference x sqrt(batch / first); never beyond."""
    shape = FALLS[name]
    own, watch = trained(
        tmp_path / "own",
        batch_schedule="seesaw",
        max_global_batch_size=CAP,
        warmup_steps=warmup,
        **shape,
    )
    at = reference_rates(tmp_path / "plain", shape, warmup_steps=warmup)
    total = EPOCHS * math.ceil(SAMPLES / FIRST)
    begin = 6 if warmup else 0
    sizes = watch.column("size")
    for step in watch.steps:
        done = share_at(step["before"]) * total
        left = 1.0 if done <= begin else at(done) / at(begin)
        slack = 1e-3 if begin else 1e-6  # of the peak: what a step begins at is tested below
        nearly = [math.floor(1 / left * (1 + sign * slack)) * FIRST for sign in (-1, 1)]
        assert step["size"] in [min(max(size, FIRST), CAP) for size in nearly]
        expected = RATE * at(done) * math.sqrt(step["size"] / FIRST)
        assert step["rates"][0] == pytest.approx(expected, rel=1e-9)
    assert len(own.seen) == EPOCHS * SAMPLES
    assert len(set(sizes)) > 1


@pytest.mark.parametrize("alpha", [None, 2.0])
def test_seesaw_knows_the_peak_that_a_warmup_ends_at(tmp_path, alpha):
    """After 6 of 30 initial steps; after 18 the reference has fallen to a half."""
    _, watch = trained(
        tmp_path,
        batch_schedule="seesaw",
        max_global_batch_size=CAP,
        warmup_steps=6,
        seesaw_alpha=alpha,
    )
    [index] = [i for i, step in enumerate(watch.steps) if share_at(step["before"]) == 0.6]
    assert (watch.steps[index - 1]["size"], watch.steps[index]["size"]) == (FIRST, 2 * FIRST)
    assert watch.rates[index] == pytest.approx(RATE / math.sqrt(2), rel=1e-9)
    if alpha:
        assert watch.rates[6:index] == pytest.approx([RATE] * (index - 6), rel=1e-9)


def with_own(fall):
    model = llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    schedule = LambdaLR(optimizer, fall)
    return {"model": model, "optimizers": (optimizer, schedule)}


def test_seesaw_follows_a_scheduler_that_was_passed_in(tmp_path):
    """Down to a quarter within the first 15 of 30 initial steps, then flat."""

    def fall(step):
        return 1 - min(step, 15) / 20

    own, watch = trained(
        tmp_path, trainer=with_own(fall), batch_schedule="seesaw", max_global_batch_size=CAP
    )
    for step in watch.steps:
        left = fall(share_at(step["before"]) * 30)
        size = math.floor(1 / left + 1e-9) * FIRST
        assert step["size"] == size
        assert step["rates"][0] == pytest.approx(RATE * left * math.sqrt(size / FIRST))
    assert own.lr_scheduler.lr_lambdas == [fall]  # given back as it was


class Calling(AdaptiveBatchTrainer):
    def create_scheduler(self, num_training_steps, optimizer=None):
        return super().create_scheduler(num_training_steps, optimizer)


class ReturningNothing(AdaptiveBatchTrainer):
    def create_scheduler(self, num_training_steps, optimizer=None):
        super().create_scheduler(num_training_steps, optimizer)


class Making(AdaptiveBatchTrainer):
    """As the Trainer's, without it: what it returns nobody asks for."""

    def create_scheduler(self, num_training_steps, optimizer=None):
        self.lr_scheduler = LambdaLR(
            optimizer or self.optimizer, lambda step: 1 - step / num_training_steps
        )
        self._created_lr_scheduler = True
        return self.lr_scheduler


class MakingOfItsOwn(AdaptiveBatchTrainer):
    """With the optimizer that there is, whatever it is given."""

    def create_scheduler(self, num_training_steps, optimizer=None):
        self.lr_scheduler = LambdaLR(self.optimizer, lambda step: 1 - step / num_training_steps)
        self._created_lr_scheduler = True
        return self.lr_scheduler


@pytest.mark.parametrize("kind", [Calling, ReturningNothing, Making, MakingOfItsOwn])
@pytest.mark.parametrize("name", ["seesaw", "0:4 25%:8 50%:16"])
def test_a_trainer_that_makes_its_own_scheduler_trains_alike_or_is_refused(tmp_path, name, kind):
    """A batch that grows beside a rate that does not know of it would be neither."""
    try:
        own, watch = trained(tmp_path, kind=kind, **options_of(name))
    except ValueError as error:
        assert "create_scheduler" in str(error)  # noqa: PT017
        return
    check_naive(name, own, watch)


@pytest.mark.parametrize("name", [name for name in OPEN if name != "0:8"])
def test_training_again_begins_anew(tmp_path, name):
    """With another budget, whose rates fall otherwise."""
    own, watch = trained(tmp_path, **options_of(name), num_train_epochs=2)
    own.args.num_train_epochs = EPOCHS
    own.seen, watch.steps = [], []
    own.train()
    check_naive(name, own, watch)


# ---------------------------------------------------------------------------------------- resume


def whole_run(folder, *, trainer=dict, **options):
    return trained(folder, trainer=trainer(), save_strategy="steps", save_steps=1, **options)


def entries(trainer):
    return [entry for entry in history(trainer) if "train_loss" not in entry]


def check_resumes(tmp_path, *, trainer=dict, every=1, **options):
    """From every checkpoint: sizes, rates, what the optimizer holds, losses, records, weights."""
    whole, watch = whole_run(tmp_path / "run", trainer=trainer, **options)
    steps = whole.state.global_step
    for step in range(1, steps + 1, every):
        folder = tmp_path / f"resumed-{step}"
        folder.mkdir()
        if (tmp_path / "run" / RECORDS_FILE).exists():
            shutil.copy(tmp_path / "run" / RECORDS_FILE, folder)
        other, found = made(folder, trainer=trainer(), **options)
        torch.rand(step)  # a new process stands elsewhere in torch's random numbers
        other.train(resume_from_checkpoint=str(tmp_path / "run" / f"checkpoint-{step}"))
        assert found.steps == watch.steps[step:]
        assert other.seen == whole.seen[whole.run.clock.samples_seen - len(other.seen) :]
        assert entries(other) == entries(whole)
        assert same_weights(weights(other), weights(whole))
        assert other.run.clock.state_dict() == whole.run.clock.state_dict()
        if (tmp_path / "run" / RECORDS_FILE).exists():
            assert read_records(folder) == read_records(tmp_path / "run")
    return whole, watch


@pytest.mark.parametrize("name", ALL)
def test_every_checkpoint_of_every_schedule_resumes_bitwise(tmp_path, name):
    _, watch = check_resumes(
        tmp_path, trainer=padded, every=2, **options_of(name), max_train_samples=100
    )
    assert len(set(watch.column("size"))) > 1 or name in ("constant", "0:8")


RESUMED = {
    "at_a_boundary": {"batch_schedule": "0:4 8samples:8 24samples:16", "num_train_epochs": 1},
    "at_an_epochs_end": {"batch_schedule": "0:8 37samples:16"},
    "first_is_larger": {"batch_schedule": "0:16 30%:4"},
    "first_is_smaller": {"batch_schedule": "0:4 30%:8", "gradient_accumulation_steps": 4},
    "fixed_and_larger": {"batch_schedule": "0:16"},
    "fixed_and_smaller": {"batch_schedule": "0:4", "gradient_accumulation_steps": 4},
    "workers": {"batch_schedule": "0:4 20samples:12 50samples:4", "dataloader_num_workers": 1},
    "deep_prefetch": {
        "batch_schedule": "0:16 20samples:8 50samples:4",
        "dataloader_num_workers": 1,
        "dataloader_prefetch_factor": 8,
    },
    "micro_batches": {
        **options_of("seesaw"),
        "max_micro_batch_size": 8,
        "gradient_accumulation_steps": 2,
    },
    "micro_batches_of_stages": {
        "batch_schedule": "0:4 30samples:16 50samples:8",
        "max_micro_batch_size": 8,
    },
    "unmeasured": {**options_of("linear_ramp"), "test_interval": 0},
    "seldom": {**options_of("0:4 3steps:8 9steps:16"), "test_interval": 4},
    "tokens": {**options_of("cbs_law"), "max_train_tokens": 400},
    "by_length": {**options_of("seesaw"), "train_sampling_strategy": "group_by_length"},
    "cosine": {**options_of("seesaw in cuts"), "lr_scheduler_type": "cosine", "warmup_steps": 3},
}


@pytest.mark.parametrize("options", RESUMED.values(), ids=RESUMED)
def test_every_checkpoint_resumes_bitwise(tmp_path, options):
    check_resumes(tmp_path, trainer=padded, every=2, **{"num_train_epochs": 2, **options})


class Stream(torch.utils.data.IterableDataset):
    """Without a length, in the same order in every epoch."""

    def __iter__(self):
        yield from sequences(SAMPLES, uneven=True)


def stream():
    return {"train_dataset": Stream(), "data_collator": pad}


def known_stream():
    data = sequences(SAMPLES, uneven=True).to_iterable_dataset(num_shards=3)
    return {"train_dataset": data, "data_collator": pad}


@pytest.mark.parametrize("data", [stream, known_stream])
@pytest.mark.parametrize(
    "name", ["0:16 25%:4 50%:8", "0:4 3steps:8 9steps:16", "0:4 80:12 0.5K:16", "seesaw", "cbs_law"]
)
def test_a_stream_resumes_bitwise(tmp_path, name, data):
    budget = {"num_train_epochs": 0, "max_train_samples": 100}
    whole, watch = check_resumes(tmp_path, trainer=data, every=3, **options_of(name), **budget)
    assert len(whole.seen) == 100
    assert len(set(watch.column("size"))) == 3 or name in ("seesaw", "cbs_law")


@pytest.mark.parametrize("data", [stream, known_stream])
def test_a_stream_in_steps_has_the_plain_trainers_rates_at_its_steps(tmp_path, data):
    budget = {"num_train_epochs": 0, "max_steps": 20}
    one = trained_plainly(tmp_path / "plain", trainer=data(), **budget)
    own, watch = trained(
        tmp_path / "own", trainer=data(), batch_schedule="0:4 20%:12 80%:16", **budget
    )
    assert own.seen == one.seen
    rates = [entry["learning_rate"] for entry in history(one) if "loss" in entry]
    assert watch.rates[:5] == rates[:5]
    assert watch.rates[0] > watch.rates[-1] > 0


@pytest.mark.parametrize(("saved", "then"), [("0:16 50%:4", "constant"), ("constant", "0:8 2%:16")])
def test_another_schedule_takes_over_at_the_checkpoint(tmp_path, saved, then):
    whole_run(tmp_path / "run", batch_schedule=saved)
    checkpoint = str(tmp_path / "run" / "checkpoint-2")
    state = json.loads((tmp_path / "run" / "checkpoint-2" / STATE_FILE).read_text())
    own, watch = trained(tmp_path / "own", resume=checkpoint, batch_schedule=then)
    assert set(watch.column("size")) == {4 if then == "constant" else 16}
    assert watch.steps[0]["before"] == state["clock"]["samples_seen"]
    assert own.run.clock.samples_seen == EPOCHS * SAMPLES
    plainly = trained_plainly(tmp_path / "plain")
    assert own.seen == plainly.seen[watch.steps[0]["before"] :]


@pytest.mark.parametrize("then", ["seesaw", "linear_ramp", "norm_test", "0:4 25%:8 50%:16"])
def test_rates_after_another_schedule_took_over_are_those_of_the_new_one(tmp_path, then):
    whole_run(tmp_path / "run", batch_schedule="seesaw", max_global_batch_size=CAP)
    checkpoint = str(tmp_path / "run" / "checkpoint-6")
    _, watch = trained(tmp_path / "own", resume=checkpoint, **options_of(then))
    for step in watch.steps:
        rate = RATE * linear(share_at(step["before"]))
        if then == "seesaw":
            rate *= math.sqrt(step["size"] / FIRST)
        assert step["rates"] == pytest.approx([rate] * 2)


@pytest.mark.parametrize("name", ["0:4 25%:8 50%:16", "linear_ramp", "seesaw", "seesaw in cuts"])
@pytest.mark.parametrize("epochs", [2, 6])
def test_shares_of_a_resumed_run_are_those_of_the_new_budget(tmp_path, name, epochs):
    """Twice as long, and the batch shrinks; shorter, and it grows at once."""
    _, before = whole_run(tmp_path / "run", **options_of(name))
    stop = next(i for i, size in enumerate(before.column("size")) if size >= 8) + 1
    checkpoint = str(tmp_path / "run" / f"checkpoint-{stop}")
    own, watch = trained(
        tmp_path / "own", resume=checkpoint, **options_of(name), num_train_epochs=epochs
    )
    at_begin = sum(before.column("samples")[:stop])
    assert own.run.clock.samples_seen == epochs * SAMPLES
    for step in watch.steps:
        share = share_at(step["before"], epochs=epochs)
        wished = OPEN[name][1]({"share": share})
        assert step["size"] == math.ceil(wished / FIRST - 1e-9) * FIRST
    assert watch.steps[0]["before"] == at_begin


def test_a_checkpoint_of_the_last_step_has_nothing_left(tmp_path):
    whole, _ = whole_run(tmp_path / "run", **options_of("seesaw"))
    last = str(tmp_path / "run" / f"checkpoint-{whole.state.global_step}")
    own, watch = trained(tmp_path / "own", resume=last, **options_of("seesaw"))
    assert watch.steps == []
    assert same_weights(weights(own), weights(whole))


# --------------------------------------------------------------------------------------- refused


class Waves(nn.Module):
    """Floats in, a number out: data without tokens."""

    main_input_name = "x"

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(3, 1)

    def forward(self, x, labels):
        return {"loss": ((self.head(x)[:, 0] - labels) ** 2).mean()}


def waves():
    rows = torch.randn(SAMPLES, 3, generator=torch.Generator().manual_seed(0)).tolist()
    data = datasets.Dataset.from_dict({"x": rows, "labels": [sum(row) for row in rows]})
    return {"model": Waves(), "train_dataset": data.with_format("torch")}


def evaluated():
    return {"eval_dataset": sequences(8)}


PLATEAU = {
    "lr_scheduler_type": "reduce_lr_on_plateau",
    "eval_strategy": "epoch",
    "metric_for_best_model": "eval_loss",
}
SEESAW = {"batch_schedule": "seesaw", "max_global_batch_size": CAP}
REFUSED = {
    "samples": ({"batch_schedule": "0:4 111samples:8"}, "111 samples"),
    "tokens": ({"batch_schedule": "0:4 888:8"}, "888 tokens"),
    "steps": ({"batch_schedule": "0:4 30steps:8"}, "would never be reached"),
    "samples_of_samples": (
        {"batch_schedule": "0:4 50samples:8", "max_train_samples": 50},
        "50 samples",
    ),
    "tokens_of_tokens": ({"batch_schedule": "0:4 400:8", "max_train_tokens": 400}, "400 tokens"),
    "samples_of_tokens": (
        {"batch_schedule": "0:4 50samples:8", "max_train_tokens": 400},
        "50 samples",
    ),
    "samples_of_steps": ({"batch_schedule": "0:4 28samples:8", "max_steps": 7}, "28 samples"),
    "steps_of_steps": ({"batch_schedule": "0:4 7steps:8", "max_steps": 7}, "7 steps"),
    "ramp": ({"batch_schedule": "linear_ramp", "ramp_length": "112samples"}, "ramp_length"),
    "ramp_in_share": ({"batch_schedule": "linear_ramp", "ramp_length": "101%"}, "ramp_length"),
    "larger_than_an_epoch": ({"batch_schedule": "0:4 50%:40"}, "an epoch"),
    "part_of_a_micro_batch": ({"batch_schedule": "0:4 50%:6"}, "multiple of 4"),
    "above_the_cap": ({"batch_schedule": "0:4 50%:16", "max_global_batch_size": 8}, "at most"),
    "seesaw_of_constant": ({**SEESAW, "lr_scheduler_type": "constant"}, "below its peak"),
    "seesaw_of_warmup": (
        {**SEESAW, "lr_scheduler_type": "constant_with_warmup", "warmup_steps": 3},
        "below its peak",
    ),
    "seesaw_of_restarts": (
        {**SEESAW, **falling("cosine_with_restarts", num_cycles=2)},
        "rise again",
    ),
    "seesaw_of_plateau": ({**SEESAW, **PLATEAU}, "ReduceLROnPlateau"),
    "seesaw_of_sgd": ({**SEESAW, "optim": "sgd"}, "SGD"),
    "seesaw_of_adafactor": ({**SEESAW, "optim": "adafactor"}, "Adafactor"),
    "seesaw_and_another_rule": ({**SEESAW, "scale_learning_rate": "sqrt"}, "seesaw"),
}


@pytest.mark.parametrize(("options", "words"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_is_refused_before_the_first_step(tmp_path, options, words):
    with pytest.raises(ValueError, match="must") as raised:
        trained(tmp_path, trainer=evaluated(), **options)
    assert words in str(raised.value)
    assert "Accelerated" not in str(raised.value)  # the user's optimizer has another name
    assert not list(tmp_path.glob("checkpoint*"))


@pytest.mark.parametrize("last", ["110samples", "887", "29steps", "99.9%"])
def test_a_stage_just_within_the_budget_is_allowed(tmp_path, last):
    own, _ = trained(tmp_path, batch_schedule=f"0:4 {last}:8")
    assert own.run.clock.samples_seen == 111


@pytest.mark.parametrize(
    "options",
    [
        {"batch_schedule": "0:4 50:8"},
        {"batch_schedule": "cbs_law"},
        {"batch_schedule": "linear_ramp", "ramp_length": "1K"},
    ],
    ids=lambda options: options["batch_schedule"],
)
def test_tokens_of_data_without_any_are_refused(tmp_path, options):
    with pytest.raises(ValueError, match="must not count tokens"):
        trained(tmp_path, trainer=waves(), **options)


@pytest.mark.parametrize(
    "name", ["0:4 25%:8 50%:16", "0:4 3steps:8 9steps:16", "linear_ramp", "seesaw"]
)
def test_data_without_tokens_are_trained_on_by_samples(tmp_path, name):
    watch = Watch()
    given = waves()
    options = {**options_of(name), "num_train_epochs": EPOCHS, "learning_rate": RATE}
    own = AdaptiveBatchTrainer(args=arguments(tmp_path, **options), callbacks=[watch], **given)
    watch.trainer, own.seen = own, [()] * (EPOCHS * SAMPLES)
    own.train()
    sizes = naive_sizes(OPEN[name][1], [1] * (EPOCHS * SAMPLES))
    assert watch.column("size") == [size for size, _, _ in sizes]
    assert own.run.clock.tokens_seen == 0


def test_a_stream_that_cannot_be_looked_at_is_refused_by_what_was_asked_for(tmp_path):
    class Once(torch.utils.data.IterableDataset):
        def __init__(self):
            self.rows = (row for row in sequences(SAMPLES))

        def __iter__(self):
            yield from self.rows

    with pytest.raises(ValueError, match="batch_schedule"):
        trained(tmp_path, trainer={"train_dataset": Once()}, batch_schedule="0:4 50:8", max_steps=9)


def test_the_paper_stages_of_a_small_dataset_are_kept_or_refused_by_their_cause(tmp_path):
    """No size was written; what makes a quarter of the cap odd is the epoch of 37 samples."""
    try:
        _, watch = trained(tmp_path, batch_schedule="stage_wise")
    except ValueError as error:
        assert "max_global_batch_size" in str(error)  # noqa: PT017
        return
    assert set(watch.column("size")) == {8, 32}  # after the first 8 of 74 samples, 5 % are over


# ----------------------------------------------------------------------------- what else goes on


class Poisoned(MeanLossModel):
    """Its loss is NaN for the samples that begin as number 20 does."""

    mark = sequences(SAMPLES)["input_ids"][20][0]

    def forward(self, input_ids, labels):
        found = super().forward(input_ids, labels)
        if (input_ids[:, 0] == self.mark).any():
            found["loss"] = found["loss"] * torch.nan
        return found


@pytest.mark.parametrize("name", ["0:4 25%:8 50%:16", "seesaw", "linear_ramp"])
def test_a_loss_that_is_not_a_number_moves_on_in_the_schedule(tmp_path, name, caplog):
    own, watch = trained(tmp_path, trainer={"model": Poisoned()}, **options_of(name))
    check_naive(name, own, watch)
    assert EPOCHS <= own.run.skipped_steps < len(watch.steps)
    assert all(torch.isfinite(value).all() for value in weights(own).values())


def test_clipping_and_schedules_go_together(tmp_path):
    own, watch = trained(tmp_path, **options_of("seesaw"), max_grad_norm=0.05)
    check_naive("seesaw", own, watch)
    assert all(entry["grad_norm"] > 0.05 for entry in history(own) if "grad_norm" in entry)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_adapters_are_trained_by_a_schedule(tmp_path):
    def model():
        return get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))

    _, watch = check_resumes(
        tmp_path,
        trainer=lambda: {"model": model()},
        every=4,
        **options_of("seesaw"),
        num_train_epochs=2,
    )
    assert max(watch.column("size")) == CAP


def test_a_schedule_that_is_a_value_decides_as_a_controller(tmp_path):
    ramp = LinearRamp(first_size=4, last_size=CAP, length=0.5, unit=Unit.BUDGET)
    controller = ScheduledController(schedule=ramp, max_global_batch_size=CAP)
    own, watch = trained(tmp_path, trainer={"controller": controller})
    check_naive("linear_ramp", own, watch)


def test_group_by_length_has_one_order_for_every_schedule(tmp_path):
    """Its sampler draws from the generator that dropout draws from, too: so there is none."""
    orders = []
    for name in ("constant", "0:4 25%:8 50%:16", "seesaw"):
        own, _ = trained(
            tmp_path / name.replace(":", "-"),
            trainer={**padded(), "model": llama(dropout=0.0)},
            **options_of(name),
            train_sampling_strategy="group_by_length",
        )
        orders.append(own.seen)
    assert orders[0] == orders[1] == orders[2]


def test_the_length_of_warmup_and_fractions_of_training_do_not_depend_on_the_schedule(tmp_path):
    logs = {}
    for name in ("constant", "0:4 25%:8 50%:16", "linear_ramp"):
        own, _ = trained(
            tmp_path / name.replace(":", "-"),
            trainer=evaluated(),
            **options_of(name),
            eval_strategy="steps",
            eval_steps=0.25,
        )
        logs[name] = [e["adaptive_batch/samples_seen"] for e in history(own) if "eval_loss" in e]
    assert all(len(found) == len(logs["constant"]) for found in logs.values())
    for found in logs.values():
        for one, other in zip(found, logs["constant"], strict=True):
            assert 0 <= one - other < CAP


# ----------------------------------------------------------------------------------- evaluations


EVALUATED = {**options_of("0:4 25%:8 50%:16"), "eval_strategy": "steps", "eval_steps": 3}


def check_evaluations(folder, own, watch, *, after=0):
    """One line per evaluation in the log, where it was."""
    found = [entry for entry in own.state.log_history if any(k.startswith("eval_") for k in entry)]
    lines = read_evaluations(folder)
    assert [line["step"] for line in lines] == [entry["step"] for entry in found]
    for line, entry in zip(lines, found, strict=True):
        done = watch.steps[: line["step"]] if not after else None
        if done is not None:
            assert line["samples_seen"] == sum(step["samples"] for step in done)
            assert line["tokens_seen"] == LENGTH * line["samples_seen"]
        logged = {k: v for k, v in entry.items() if k.startswith("eval_") and "runtime" not in k}
        for name, value in logged.items():
            assert line["metrics"][name] == value
    seconds = [line["seconds"] for line in lines]
    assert seconds == sorted(seconds)
    assert all(value > 0 or line["step"] == 0 for value, line in zip(seconds, lines, strict=True))
    return lines


def test_every_evaluation_is_on_record(tmp_path):
    own, watch = trained(tmp_path, trainer=evaluated(), **EVALUATED)
    lines = check_evaluations(tmp_path, own, watch)
    assert [line["step"] for line in lines] == [3, 6, 9, 12, 15, 16]
    sizes = [*watch.column("size"), own.run.plan.global_batch_size]
    assert [line["global_batch_size"] for line in lines] == [sizes[line["step"]] for line in lines]
    own.evaluate()
    lines = check_evaluations(tmp_path, own, watch)
    assert (lines[-1]["step"], lines[-1]["samples_seen"]) == (len(watch.steps), 111)
    assert own.run.seconds == lines[-1]["seconds"]
    own.predict(sequences(8))
    assert len(read_evaluations(tmp_path)) == len(lines)  # a prediction is none


def test_an_evaluation_on_start_and_one_of_several_datasets_are_on_record(tmp_path):
    several = {"eval_dataset": {"a": sequences(8), "b": sequences(5)}}
    own, watch = trained(tmp_path, trainer=several, **EVALUATED, eval_on_start=True)
    lines = check_evaluations(tmp_path, own, watch)
    assert [line["step"] for line in lines[:4]] == [0, 0, 3, 3]
    names = [{name for name in line["metrics"] if "loss" in name} for line in lines[:2]]
    assert names == [{"eval_a_loss"}, {"eval_b_loss"}]


def test_an_evaluation_before_training_is_no_part_of_it(tmp_path):
    own, _ = made(tmp_path, trainer=evaluated(), **EVALUATED)
    own.evaluate()
    assert read_evaluations(tmp_path) == []
    own.train()
    assert read_evaluations(tmp_path)[0]["step"] == 3


@pytest.mark.parametrize("on_start", [False, True])
def test_a_resume_drops_later_evaluations_and_goes_on(tmp_path, on_start):
    options = {**EVALUATED, "eval_on_start": on_start}
    whole, _ = whole_run(tmp_path, trainer=evaluated, **options)
    lines, stops = read_evaluations(tmp_path), []
    for stop in (whole.state.global_step, 6, 5, 3, 1):
        resume = str(tmp_path / f"checkpoint-{stop}")
        trained(tmp_path, trainer=evaluated(), resume=resume, **options)
        again = read_evaluations(tmp_path)
        stops = [stop] * on_start  # it is evaluated there once more, as by the plain Trainer
        steps = sorted([line["step"] for line in lines] + stops)
        assert [line["step"] for line in again] == steps
        expected = {line["step"]: line for line in lines}
        for line in again:
            if line["step"] in expected:
                for name in ("samples_seen", "tokens_seen", "global_batch_size"):
                    assert line[name] == expected[line["step"]][name]
                loss = expected[line["step"]]["metrics"]["eval_loss"]
                assert line["metrics"]["eval_loss"] == loss
        seconds = [line["seconds"] for line in again]
        assert seconds == sorted(seconds)


def test_a_fresh_run_keeps_the_evaluations_of_the_one_before(tmp_path):
    own, _ = trained(tmp_path, trainer=evaluated(), **EVALUATED)
    before = read_evaluations(tmp_path)
    own.train()
    kept = tmp_path / EVALUATIONS_FILE.replace(".jsonl", "-1.jsonl")
    assert read_evaluations(kept) == before
    assert [line["step"] for line in read_evaluations(tmp_path)] == [
        line["step"] for line in before
    ]


def test_a_metric_that_is_no_number_is_left_empty(tmp_path):
    trained(
        tmp_path,
        trainer={
            **evaluated(),
            "compute_metrics": lambda found: {"nan": float("nan"), "text": "x", "count": 3},
        },
        **EVALUATED,
    )
    line = read_evaluations(tmp_path)[0]
    assert line["metrics"]["eval_nan"] is None
    assert line["metrics"]["eval_count"] == 3
    assert "eval_text" not in line["metrics"]


def test_a_line_that_was_cut_off_is_no_evaluation(tmp_path):
    trained(tmp_path, trainer=evaluated(), **EVALUATED)
    lines, path = read_evaluations(tmp_path), tmp_path / EVALUATIONS_FILE
    path.write_text(path.read_text()[:-20])
    assert read_evaluations(tmp_path) == lines[:-1]


# ------------------------------------------------------------------------------------- two ranks


RULES = {"scale_learning_rate": "sqrt", "scale_beta2": True, "scale_weight_decay": True}
ON_RANKS = {
    "stages": {"batch_schedule": "0:32 20%:16 60%:32"},
    "one_stage": {"batch_schedule": "0:32"},
    "smaller": {"batch_schedule": "0:8 50%:16"},
    "seesaw": {"batch_schedule": "seesaw", "max_global_batch_size": 48},
    "sqrt": {"batch_schedule": "0:16 40%:32", "weight_decay": 0.1, **RULES},
    "adascale": {"batch_schedule": "0:16 40%:32", "scale_learning_rate": "adascale"},
    "unmeasured": {"batch_schedule": "linear_ramp", "test_interval": 0},
    "law": {"batch_schedule": "cbs_law", "cbs_coefficient": 8.0, "cbs_exponent": 0.5},
    "refused": {"batch_schedule": "0:16 40%:32", "optim": "sgd", **RULES},
    "after": {"batch_schedule": "0:16 50%:32"},
}


STOPS = (1, 3, 4, 5)


@pytest.fixture(scope="module")
def on_ranks(tmp_path_factory):
    found = {}
    for ranks in (1, 2):  # so that a round is 8 samples, which all sizes are multiples of
        first = {"per_device_train_batch_size": 8 // ranks, "gradient_accumulation_steps": 2}
        jobs = [
            Job(name, options={**first, **options}, watch=False)
            for name, options in ON_RANKS.items()
        ]
        folder = tmp_path_factory.mktemp("ranks")
        whole = {**first, **ON_RANKS["sqrt"]}
        saved = {**whole, "save_strategy": "steps", "save_steps": 1}
        jobs += [Job("saved", options=saved, watch=False)]
        jobs += [
            Job(
                f"resumed-{step}",
                options=whole,
                watch=False,
                resume=str(folder / "saved" / f"checkpoint-{step}"),
            )
            for step in STOPS
        ]
        found[ranks] = launch(ranks, jobs, folder)
    return found


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("name", [name for name in ON_RANKS if name != "refused"])
def test_two_ranks_train_as_one_process(on_ranks, name):
    [alone], [first, second] = on_ranks[1][name], on_ranks[2][name]
    assert "error" not in first, first.get("trace")
    assert same_weights(first["weights"], second["weights"])
    for column in ("global_batch_size", "samples_seen", "tokens_seen"):
        key = f"adaptive_batch/{column}"
        expected = [entry[key] for entry in alone["history"] if "loss" in entry]
        assert [entry[key] for entry in first["history"] if "loss" in entry] == expected
    for entry, expected in zip(first["history"], alone["history"], strict=True):
        if "loss" in entry:
            assert entry["learning_rate"] == pytest.approx(expected["learning_rate"], rel=1e-3)
            assert entry["loss"] == pytest.approx(expected["loss"], rel=1e-3)
    for key, value in first["weights"].items():
        torch.testing.assert_close(value, alone["weights"][key], rtol=0, atol=2e-3)


@pytest.mark.slow
@pytest.mark.distributed
def test_a_rule_that_does_not_fit_is_refused_on_both_ranks(on_ranks):
    errors = [found["error"] for found in on_ranks[2]["refused"]]
    assert errors[0] == errors[1]
    assert "SGD" in errors[0]


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("step", STOPS)
def test_two_ranks_resume_bitwise_with_rules_in_force(on_ranks, step):
    whole, resumed = on_ranks[2]["saved"][0], on_ranks[2][f"resumed-{step}"]
    assert "error" not in resumed[0], resumed[0].get("trace")
    for found in resumed:
        assert same_weights(found["weights"], whole["weights"])
    logs = [
        [entry for entry in found["history"] if "train_loss" not in entry]
        for found in (whole, resumed[0])
    ]
    assert logs[0] == logs[1]
    assert {entry["adaptive_batch/global_batch_size"] for entry in logs[0]} == {16, 32}


# --------------------------------------------------------------------------------- regressions


def test_a_schedule_given_as_a_controller_is_asked_for_the_first_step(tmp_path):
    """Its first stage is not the arguments' batch; resumed runs asked it there as well."""
    text = "0samples:8 16samples:4"
    controller = ScheduledController(schedule=parse_stages(text), max_global_batch_size=8)
    _, given = trained(tmp_path / "given", trainer={"controller": controller}, num_train_epochs=1)
    _, named = trained(tmp_path / "named", batch_schedule=text, num_train_epochs=1)
    assert given.column("size") == named.column("size") == [8, 8, 4, 4, 4, 4, 4, 4]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_batch_that_shrinks_does_so_at_once_whatever_was_fetched(tmp_path, workers):
    options = {
        "batch_schedule": "0samples:16 16samples:4",
        "max_micro_batch_size": 16,
        "dataloader_num_workers": workers,
        "num_train_epochs": 1,
    }
    _, watch = trained(tmp_path, **options)
    assert watch.column("samples") == [16, 4, 4, 4, 4, 4, 1]


def test_micro_batches_of_a_schedule_that_only_grows_still_grow(tmp_path):
    options = {"batch_schedule": "0:4 25%:16", "max_micro_batch_size": 16, "num_train_epochs": 1}
    own, _ = trained(tmp_path, **options)
    assert own.run.plan.micro_batch_size == 16
