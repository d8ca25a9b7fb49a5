"""A real tiny Llama under `AdaptiveBatchTrainer`: what it trains on, measures, logs and leaves."""

from __future__ import annotations

import copy
import gc
import json
import math
import multiprocessing
from itertools import pairwise

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainerCallback

from hf_adaptive_batch import (
    AdaptiveBatchArguments,
    AdaptiveBatchMixin,
    AdaptiveBatchTrainer,
    BatchDecision,
    FixedController,
    GradientProbe,
    Reason,
    StepBatch,
    read_records,
)
from hf_adaptive_batch.report.records import FIELDS, RECORDS_FILE
from hf_adaptive_batch.run import AdaptiveRun

from . import cases, reference
from .cases import (
    VOCABULARY,
    MeanLossModel,
    Recorder,
    adaptive,
    arguments,
    history,
    llama,
    pad,
    same_weights,
    sequences,
    weights,
)


# The noise scale of `learnable` is about the first batch, so that this asks for far more.
GROWING = {**cases.GROWING, "eta": 0.1}


def learnable(samples, *, uneven=False):
    """Rows of which most tokens are one of two, so that the gradient stands out of the noise."""
    data = sequences(samples, uneven=uneven)

    def skewed(row):
        tokens = [token % 2 if token > 5 else token for token in row["input_ids"]]
        return {"input_ids": tokens, "labels": tokens}

    return data.map(skewed)


def recorded(samples, *, uneven=False):
    """A dataset and a collator that notes which of its samples were trained on, in order."""
    recorder = Recorder()
    data = learnable(samples, uneven=uneven).add_column("index", list(range(samples)))
    return recorder, {"train_dataset": data, "data_collator": recorder}


def train(folder, *, trainer=None, **options):
    given = {"train_dataset": learnable(61), **(trainer or {})}
    own = adaptive(folder, trainer=given, **{**GROWING, **options})
    own.train()
    return own


def logged(trainer, key):
    """The values of a key in the training logs that have it."""
    return [entry[key] for entry in history(trainer) if "loss" in entry and key in entry]


KEEP = {"remove_unused_columns": False}  # the column `index` is for the recorder


# ------------------------------------------------------------------------- the batch that grows


def test_the_batch_grows_and_the_trajectory_is_consistent(tmp_path):
    trainer = train(tmp_path, num_train_epochs=3)
    records = read_records(tmp_path)
    sizes = logged(trainer, "adaptive_batch/global_batch_size")
    assert sizes[0] == 4
    assert sizes == sorted(sizes)
    assert max(sizes) == 16
    assert records["step"] == list(range(1, len(sizes) + 1))  # none was a single sample
    assert records["global_batch_size"] == sizes
    assert records["next_global_batch_size"][:-1] == sizes[1:]
    assert records["samples_seen"] == logged(trainer, "adaptive_batch/samples_seen")
    assert records["tokens_seen"] == [8 * seen for seen in records["samples_seen"]]
    increments = [b - a for a, b in pairwise([0, *records["samples_seen"]])]
    assert increments == records["step_samples"]
    for samples, size, seen in zip(increments, sizes, records["samples_seen"], strict=True):
        assert samples == size or seen % 61 == 0  # only an epoch's last step is short
        assert samples <= size
    assert records["samples_seen"][-1] == 3 * 61
    for micro, steps, size in zip(
        records["micro_batch_size"], records["accumulation_steps"], sizes, strict=True
    ):
        assert micro * steps == size
        assert micro in (4, 8)
    assert len(sizes) < 3 * 16  # fewer steps than the initial batch would have taken


def test_a_batch_without_room_does_not_grow(tmp_path):
    trainer = train(tmp_path, max_global_batch_size=4)
    assert set(logged(trainer, "adaptive_batch/global_batch_size")) == {4}


def test_a_loose_test_does_not_grow_the_batch(tmp_path):
    """The companion of the test above: it is the norm test that grows the batch."""
    trainer = train(tmp_path, trainer={"train_dataset": same_rows(61)}, eta=0.99)
    sizes = logged(trainer, "adaptive_batch/global_batch_size")
    assert set(sizes) == {4}
    assert "test_passed" in logged(trainer, "adaptive_batch/reason")


def same_rows(samples):
    """All samples alike: no noise but that of dropout."""
    row = list(range(8))
    import datasets

    return datasets.Dataset.from_dict({"input_ids": [row] * samples, "labels": [row] * samples})


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_accumulation_steps": 2},
        {"max_micro_batch_size": None},
        {"train_sampling_strategy": "sequential"},
        {"num_train_epochs": 2.5},
    ],
    ids=["one", "accumulated", "one_micro_batch_size", "sequential", "half_epoch"],
)
def test_every_sample_of_an_epoch_is_trained_exactly_once(tmp_path, options):
    recorder, given = recorded(61)
    options = {"num_train_epochs": 3, **options}
    train(tmp_path, trainer=given, **KEEP, **options)
    samples = recorder.samples
    for epoch in range(math.floor(options["num_train_epochs"])):
        assert sorted(samples[61 * epoch : 61 * (epoch + 1)]) == list(range(61))
    rest = samples[61 * math.floor(options["num_train_epochs"]) :]
    assert len(rest) == len(set(rest)) <= 61
    assert bool(rest) == (options["num_train_epochs"] == 2.5)
    if "train_sampling_strategy" not in options:
        assert samples[:61] != samples[61:122]  # shuffled anew


def test_the_order_of_samples_does_not_depend_on_the_batch(tmp_path):
    orders = []
    for name, options in {"grows": {}, "constant": {"batch_schedule": "constant"}}.items():
        recorder, given = recorded(61)
        train(tmp_path / name, trainer=given, **KEEP, **options)
        orders.append(recorder.samples)
    assert orders[0] == orders[1]


def test_a_first_size_of_micro_batch_is_split_on_measured_steps_only(tmp_path):
    recorder, given = recorded(60)
    train(tmp_path, trainer=given, **KEEP, test_interval=2, max_global_batch_size=8, eta=0.9)
    assert [len(batch) for batch in recorder.micro_batches[:3]] == [4, 2, 2]


def test_a_controller_that_is_passed_in_decides(tmp_path):
    class Doubling:
        can_change = True
        max_global_batch_size = 32

        def measures(self, step):
            return True

        def decide(self, observation):
            size = 2 * observation.global_batch_size
            return BatchDecision(global_batch_size=size, reason=Reason.TEST_FAILED)

    trainer = AdaptiveBatchTrainer(
        model=llama(),
        args=arguments(tmp_path, num_train_epochs=3),
        train_dataset=sequences(61),
        controller=Doubling(),
    )
    trainer.train()
    assert logged(trainer, "adaptive_batch/global_batch_size")[:5] == [4, 8, 16, 32, 32]


class Scripted:
    """Wishes the sizes it was told, each from the step after which it is named."""

    can_change = True

    def __init__(self, sizes):
        self.sizes = sizes

    def measures(self, step):
        return True

    def decide(self, observation):
        size = observation.global_batch_size
        for samples, wished in self.sizes.items():
            if observation.samples_seen >= samples:
                size = max(size, wished)
        return BatchDecision(global_batch_size=size, reason=Reason.TEST_FAILED)


def test_a_growing_batch_is_the_same_whatever_was_fetched_ahead(tmp_path):
    """8 is 2 micro-batches of 4, and 10 no whole number of them: yet no step exceeds its plan."""
    trajectories = []
    for workers in (0, 1):
        trainer = AdaptiveBatchTrainer(
            model=llama(),
            args=arguments(
                tmp_path / str(workers),
                per_device_train_batch_size=2,
                max_micro_batch_size=4,
                dataloader_num_workers=workers,
                dataloader_prefetch_factor=12 if workers else None,
                num_train_epochs=1,
            ),
            train_dataset=sequences(100),
            controller=Scripted({2: 8, 18: 10}),
        )
        trainer.train()
        sizes = logged(trainer, "adaptive_batch/global_batch_size")
        seen = logged(trainer, "adaptive_batch/samples_seen")
        assert [b - a for a, b in pairwise([0, *seen])][:-1] == sizes[:-1]
        trajectories.append((sizes, seen))
    assert trajectories[0] == trajectories[1]


def test_a_fixed_controller_that_is_passed_in_keeps_the_batch(tmp_path):
    trainer = AdaptiveBatchTrainer(
        model=llama(),
        args=arguments(tmp_path, **GROWING),
        train_dataset=sequences(61),
        controller=FixedController(),
    )
    trainer.train()
    assert set(logged(trainer, "adaptive_batch/global_batch_size")) == {4}
    assert not (tmp_path / RECORDS_FILE).exists()  # nothing measured, nothing decided


# ---------------------------------------------------------------------------- what was measured


class Snapshots(TrainerCallback):
    """The model as it was when each step began."""

    def __init__(self):
        self.models = []

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.models.append(copy.deepcopy(model).cpu())


def frozen_embedding():
    model = llama(dropout=0.0)
    model.get_input_embeddings().requires_grad_(False)
    return model


def unused_parameter():
    model = llama(dropout=0.0)
    model.unused = nn.Parameter(torch.zeros(5))
    return model


def tied():
    return llama(dropout=0.0, tied=True)


def untied():
    return llama(dropout=0.0)


def mean_loss():
    model = MeanLossModel()
    model.dropout.p = 0.0
    return model


CONSTANT = {"batch_schedule": "constant"}
MEASURED = {
    "split": (untied, {"max_global_batch_size": 8}),
    "accumulation_2": (untied, {"gradient_accumulation_steps": 2}),
    "accumulation_4": (untied, {"gradient_accumulation_steps": 4, "max_global_batch_size": 32}),
    "constant_2": (untied, {"gradient_accumulation_steps": 2, **CONSTANT}),
    "constant_4": (untied, {"gradient_accumulation_steps": 4, **CONSTANT}),
    "published": (untied, {"norm_test_estimator": "published"}),
    "clipped": (untied, {"gradient_accumulation_steps": 2, "max_grad_norm": 1e-3}),
    "tied": (tied, {}),
    "frozen": (frozen_embedding, {}),
    "unused": (unused_parameter, {}),
    "mean_loss": (mean_loss, {}),
    "mean_loss_constant": (mean_loss, {"gradient_accumulation_steps": 2, **CONSTANT}),
}


@pytest.mark.parametrize(("make", "options"), MEASURED.values(), ids=MEASURED)
def test_moments_equal_the_reference_at_every_step(tmp_path, make, options):
    check_moments(tmp_path, make, options, uneven=False)


PADDED = {name: value for name, value in MEASURED.items() if value[0] is not mean_loss}


@pytest.mark.parametrize(("make", "options"), PADDED.values(), ids=PADDED)
def test_moments_equal_the_reference_with_unequal_token_counts(tmp_path, make, options):
    check_moments(tmp_path, make, options, uneven=True)


@pytest.mark.parametrize("name", ["weights", "clipping", "samples"])
def test_moments_that_are_slightly_wrong_are_seen(tmp_path, monkeypatch, name):
    if name == "weights":
        equal = lambda self, step, divisors, items: [1.0] * len(step.sizes)  # noqa: E731
        monkeypatch.setattr(AdaptiveBatchTrainer, "_weights", equal)
    elif name == "clipping":
        sums = GradientProbe.sums

        def clipped_before(self, *args, **kwargs):
            nn.utils.clip_grad_norm_([p for leaf in self._leaves for p in leaf.parameters], 0.5)
            return sums(self, *args, **kwargs)

        monkeypatch.setattr(GradientProbe, "sums", clipped_before)
    else:
        planned = property(lambda run: run.step.plan.global_batch_size)
        monkeypatch.setattr(AdaptiveRun, "step_samples", planned)
    with pytest.raises(AssertionError):
        check_moments(tmp_path, untied, {"gradient_accumulation_steps": 2}, uneven=True)


def check_moments(folder, make, options, *, uneven):
    """Train on 37 samples: the last step of 4, 8 or 16 is short, and its parts are unequal."""
    snapshots = Snapshots()
    recorder, given = recorded(37, uneven=uneven)
    names = (
        ("input_ids", "labels") if make is mean_loss else ("input_ids", "labels", "attention_mask")
    )

    def collate(rows):
        return {name: value for name, value in pad(rows).items() if name in names}

    def recording(rows):
        recorder(rows)
        return collate(rows)

    trainer = train(
        folder,
        trainer={
            **given,
            "data_collator": recording,
            "model": make(),
            "callbacks": [snapshots],
        },
        **KEEP,
        **options,
        num_train_epochs=1.5,
    )
    records = read_records(folder)
    rows = given["train_dataset"]
    steps = list(all_steps(recorder, trainer))
    measured: list[dict[str, float]] = []
    for index, step in enumerate(records["step"]):
        if records["workers"][index] is None:
            continue
        micro_batches = [collate([rows[i] for i in part]) for part in steps[step - 1]]
        gradients = reference.micro_batch_gradients(
            snapshots.models[step - 1].train(),
            micro_batches,
            lambda model, batch: model(**batch)["loss"],
        )
        if make is not mean_loss:
            shares = reference.token_weights(batch["labels"] for batch in micro_batches)
        elif options.get("batch_schedule") == "constant":  # as the plain Trainer weighs them
            shares = reference.plain_weights(micro_batches)
        else:
            shares = [len(part) for part in steps[step - 1]]
        samples = sum(map(len, steps[step - 1]))
        expected = reference.moments(gradients, shares, samples)
        assert records["workers"][index] == len(shares)
        assert records["small_sq_norm"][index] == pytest.approx(expected["S"], rel=1e-6)
        assert records["big_sq_norm"][index] == pytest.approx(expected["L"], rel=1e-6)
        measured.append(expected)
        tolerance = 1e-6 * expected["S"] * samples
        for name in ("noise_trace", "grad_sq_norm"):  # averaged, with weights 1, 0.9, 0.81, ...
            kept = [0.9 ** (len(measured) - 1 - i) for i in range(len(measured))]
            average = sum(w * m[name] for w, m in zip(kept, measured, strict=True)) / sum(kept)
            assert records[name][index] == pytest.approx(average, abs=tolerance)
    assert len(measured) > 3
    assert any(37 % size for size in records["global_batch_size"])  # a short step was among them


def all_steps(recorder, trainer):
    """The micro-batches of every step, from the sizes that were logged."""
    seen = logged(trainer, "adaptive_batch/samples_seen")
    micro_batches = iter(recorder.micro_batches)
    for samples in [b - a for a, b in pairwise([0, *seen])]:
        step = []
        while sum(map(len, step)) < samples:
            step.append(next(micro_batches))
        assert sum(map(len, step)) == samples
        yield step


def test_a_micro_batch_without_targets_does_not_take_part(tmp_path):
    """Every third row is all padding to the loss: as its micro-batch is alone, so is the other."""
    data = learnable(48)
    labels = [[-100] * 8 if i % 3 == 0 else row for i, row in enumerate(data["labels"])]
    data = data.remove_columns("labels").add_column("labels", labels)
    trainer = train(
        tmp_path,
        trainer={"train_dataset": data},
        per_device_train_batch_size=1,
        gradient_accumulation_steps=3,
        max_global_batch_size=6,
        max_micro_batch_size=None,
        train_sampling_strategy="sequential",
    )
    records = read_records(tmp_path)
    sizes = zip(records["workers"], records["step_samples"], strict=True)
    assert set(sizes) == {(2, 3), (4, 6)}  # of 3 and of 6 micro-batches
    assert samples_trained(trainer) == 96


def test_a_step_of_one_sample_is_trained_but_neither_measured_nor_recorded(tmp_path):
    """37 = 9 x 4 + 1: the last step has one sample, of which no noise is known."""
    trainer = train(
        tmp_path,
        trainer={"train_dataset": learnable(37)},
        max_global_batch_size=8,
        batch_warmup_samples=1000,
        num_train_epochs=1,
    )
    assert logged(trainer, "adaptive_batch/samples_seen")[-1] == 37
    assert read_records(tmp_path)["step_samples"] == [4] * 9


def test_moments_may_go_without_averaging(tmp_path):
    train(tmp_path, noise_scale_decay=0.0, gradient_accumulation_steps=2)
    records = read_records(tmp_path)
    for name, values in records.items():
        records[name] = values[1:]  # one step alone has no error, and says so
    for big, trace, size, signal in zip(
        *(records[k] for k in ("big_sq_norm", "noise_trace", "step_samples", "grad_sq_norm")),
        strict=True,
    ):
        assert signal == pytest.approx(big - trace / size)


def test_hooks_are_off_outside_measured_steps(tmp_path):
    counts = []

    class Counting(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            counts.append(sum(len(p._backward_hooks or ()) for p in model.parameters()))

    trainer = train(tmp_path, trainer={"callbacks": [Counting()]}, test_interval=2)
    assert set(counts) == {0}
    assert not any(p._backward_hooks for p in trainer.model.parameters())


# ------------------------------------------------------------------------------ logs and records

LOG_KEYS = {
    "global_batch_size",
    "micro_batch_size",
    "accumulation_steps",
    "samples_seen",
    "tokens_seen",
    "noise_scale",
    "noise_trace",
    "grad_sq_norm",
    "norm_test",
    "reason",
}


def test_every_value_is_logged_through_the_trainers_log(tmp_path):
    trainer = train(tmp_path, num_train_epochs=3)
    full = [e for e in history(trainer) if "adaptive_batch/noise_scale" in e]
    assert full
    for entry in full:
        assert {f"adaptive_batch/{key}" for key in LOG_KEYS} <= entry.keys()
    assert set(logged(trainer, "adaptive_batch/reason")) <= set(Reason)


def test_a_value_that_is_not_measurable_is_left_out_of_the_log(tmp_path):
    trainer = train(tmp_path, num_train_epochs=1)
    first = history(trainer)[0]
    assert "adaptive_batch/noise_trace" in first
    assert "adaptive_batch/noise_scale" not in first  # one step gives no error of its estimate
    assert first["adaptive_batch/reason"] == "not_measurable_yet"
    for entry in history(trainer):
        assert all(v == v for v in entry.values() if isinstance(v, float))


def test_the_log_says_what_the_records_say(tmp_path):
    trainer = train(tmp_path)
    records = read_records(tmp_path)
    for index, step in enumerate(records["step"]):
        (entry,) = [e for e in history(trainer) if "loss" in e and e["step"] == step]
        for name in LOG_KEYS:
            assert entry.get(f"adaptive_batch/{name}") == records[name][index], name
        assert entry["loss"] == pytest.approx(records["loss"][index], rel=1e-6)
        assert entry["learning_rate"] == records["learning_rate"][index]
        assert entry["epoch"] == records["epoch"][index]


def test_every_record_is_a_line_of_plain_json_with_all_fields(tmp_path):
    train(tmp_path)
    lines = (tmp_path / RECORDS_FILE).read_text().splitlines()
    assert len(lines) > 5
    for line in lines:
        record = json.loads(line, parse_constant=pytest.fail)  # no NaN
        assert tuple(record) == FIELDS
        assert record["version"] == 1


def test_the_loss_in_the_log_is_the_mean_over_the_steps_since_the_last(tmp_path):
    often = train(tmp_path / "often")
    seldom = train(tmp_path / "seldom", logging_steps=4)
    losses = logged(often, "loss")
    assert logged(seldom, "loss")[0] == pytest.approx(sum(losses[:4]) / 4, rel=1e-6)


def test_trackers_get_the_scalars(tmp_path):
    event_accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator"
    )
    train(tmp_path, report_to=["tensorboard"], num_train_epochs=3)
    files = list(tmp_path.rglob("events.out.tfevents.*"))
    assert files
    events = event_accumulator.EventAccumulator(str(files[0].parent))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    for key in LOG_KEYS - {"reason"}:
        assert f"train/adaptive_batch/{key}" in tags
    sizes = [event.value for event in events.Scalars("train/adaptive_batch/global_batch_size")]
    assert sizes == read_records(tmp_path)["global_batch_size"]


def test_a_callback_sees_the_values(tmp_path):
    seen = []

    class Seeing(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.append(logs.get("adaptive_batch/global_batch_size"))

    trainer = train(tmp_path, trainer={"callbacks": [Seeing()]})
    assert [s for s in seen if s] == logged(trainer, "adaptive_batch/global_batch_size")


def test_input_tokens_are_counted_whole(tmp_path):
    trainer = train(tmp_path, include_num_input_tokens_seen="all")
    assert trainer.state.num_input_tokens_seen == 2 * 61 * 8


def test_tokens_that_are_padding_are_not_seen(tmp_path):
    data = learnable(61, uneven=True)
    trainer = train(tmp_path, trainer={"train_dataset": data, "data_collator": pad})
    tokens = sum(len(row) for row in data["input_ids"])
    assert logged(trainer, "adaptive_batch/tokens_seen")[-1] == 2 * tokens


# ------------------------------------------------------------------------------- learning rate


@pytest.mark.parametrize(
    "schedule",
    [
        {"lr_scheduler_type": "linear"},
        {"lr_scheduler_type": "cosine", "warmup_steps": 6, "batch_warmup_samples": 0},
        {"lr_scheduler_type": "inverse_sqrt", "warmup_steps": 3},
        {
            "lr_scheduler_type": "warmup_stable_decay",
            "warmup_steps": 2,
            "lr_scheduler_kwargs": {"num_decay_steps": 9},
        },
        {
            "lr_scheduler_type": "cosine_with_min_lr",
            "lr_scheduler_kwargs": {"min_lr": 1e-4},
            "warmup_steps": 0.1,
        },
    ],
    ids=lambda schedule: schedule["lr_scheduler_type"],
)
def test_the_learning_rate_is_one_function_of_samples_whatever_the_batch(tmp_path, schedule):
    """Each logged rate is that of the step, which began where the step before it ended."""
    rates = {}
    trainers = [
        train(tmp_path / "constant", **schedule, batch_schedule="constant"),
        train(tmp_path / "grows", **schedule),
        train(tmp_path / "to_8", **{**schedule, "max_global_batch_size": 8}),
    ]
    for trainer in trainers:
        begins = [0, *logged(trainer, "adaptive_batch/samples_seen")[:-1]]
        for begin, rate in zip(begins, logged(trainer, "learning_rate"), strict=True):
            assert rates.setdefault(begin, rate) == rate, begin
    assert len(set(rates.values())) > 10
    counts = [trainer.state.global_step for trainer in trainers]
    assert counts[0] > counts[2] > counts[1]  # the trajectories differ


def test_a_schedule_of_whole_steps_follows_samples_too(tmp_path):
    """StepLR cannot be asked for a fraction: it makes up the steps that the samples are worth."""

    def optimizers(model):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        return optimizer, torch.optim.lr_scheduler.StepLR(optimizer, step_size=4, gamma=0.5)

    model = llama()
    trainer = train(
        tmp_path, trainer={"model": model, "optimizers": optimizers(model)}, learning_rate=0.5
    )
    seen = logged(trainer, "adaptive_batch/samples_seen")
    for begin, rate in zip([0, *seen[:-1]], logged(trainer, "learning_rate"), strict=True):
        epochs, rest = divmod(begin, 61)
        assert rate == 0.5 * 0.5 ** ((epochs * 16 + rest // 4) // 4)
    assert trainer.state.global_step < 32


# -------------------------------------------------------------------------------------- budgets


def samples_trained(trainer):
    return logged(trainer, "adaptive_batch/samples_seen")[-1]


BUDGETS = {
    # 61 samples in steps of 4 at first: 16 steps, the last of 1 sample.
    "epochs": ({"num_train_epochs": 2}, 122),
    "half_an_epoch": ({"num_train_epochs": 0.5}, 32),
    "epochs_and_a_half": ({"num_train_epochs": 1.5}, 61 + 32),
    "max_steps": ({"max_steps": 10}, 40),
    "max_steps_over_an_epoch": ({"max_steps": 20}, 61 + 16),
    "max_steps_of_two": ({"max_steps": 9, "gradient_accumulation_steps": 2}, 61 + 8),
    "samples": ({"max_train_samples": 50}, 50),
    "samples_over_epochs": ({"max_train_samples": 131}, 131),
    "one_epoch_of_samples": ({"max_train_samples": 61}, 61),
    "drop_last": ({"num_train_epochs": 2, "dataloader_drop_last": True}, 120),
}


@pytest.mark.parametrize("schedule", ["norm_test", "constant"])
@pytest.mark.parametrize(("options", "samples"), BUDGETS.values(), ids=BUDGETS)
def test_a_budget_is_a_number_of_samples_whatever_the_batch(tmp_path, options, samples, schedule):
    recorder, given = recorded(61)
    trainer = train(tmp_path, trainer=given, **KEEP, **options, batch_schedule=schedule)
    assert samples_trained(trainer) == samples
    assert len(recorder.samples) == samples
    assert trainer.state.max_steps == trainer.state.global_step
    growing = max(logged(trainer, "adaptive_batch/global_batch_size"))
    first = logged(trainer, "adaptive_batch/global_batch_size")[0]
    assert (growing > first) == (schedule == "norm_test")


@pytest.mark.parametrize("tokens", [100, 333, 61 * 8, 1000])
def test_a_budget_of_tokens_ends_with_the_step_that_reaches_it(tmp_path, tokens):
    trainer = train(tmp_path, max_train_tokens=tokens)
    seen = [0, *logged(trainer, "adaptive_batch/tokens_seen")]
    assert seen[-2] < tokens <= seen[-1]
    assert trainer.state.max_steps == trainer.state.global_step


def test_a_budget_of_tokens_leads_the_learning_rate_to_its_end(tmp_path):
    trainer = train(tmp_path, max_train_tokens=1600, batch_schedule="constant")
    rates = logged(trainer, "learning_rate")
    assert rates[0] == 3e-3
    assert 0 < rates[-1] < 3e-3 / 50  # linear: less than one of the budget's 50 whole steps to go


@pytest.mark.parametrize(
    ("epochs", "samples"), [(1, 61), (2, 61), (3, 40)], ids=["one", "two", "three"]
)
def test_training_ends_at_the_number_of_epochs(tmp_path, epochs, samples):
    trainer = train(
        tmp_path, trainer={"train_dataset": learnable(samples)}, num_train_epochs=epochs
    )
    assert trainer.state.epoch == epochs
    assert history(trainer)[-1]["epoch"] == epochs


def test_the_expected_steps_shrink_as_the_batch_grows(tmp_path):
    expected = []

    class Looking(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            expected.append(state.max_steps)

    trainer = train(tmp_path, trainer={"callbacks": [Looking()]})
    assert expected == sorted(expected, reverse=True)
    assert expected[0] > expected[-1] == trainer.state.global_step


# --------------------------------------------------------------- fractions, evaluations and saves


def crossings(trainer, every):
    """Samples seen at the steps that first reach a multiple of `every`; 80 samples in all."""
    seen = read_records(trainer.args.output_dir)["samples_seen"]
    return [b for a, b in pairwise([0, *seen]) if b // every > a // every]


def test_fractional_intervals_are_fractions_of_the_budget(tmp_path):
    data = {"train_dataset": learnable(40), "eval_dataset": learnable(8)}
    trainer = train(
        tmp_path,
        trainer=data,
        logging_steps=0.1,
        eval_strategy="steps",
        eval_steps=0.25,
        save_strategy="steps",
        save_steps=0.5,
    )
    steps = dict(
        zip(*(read_records(tmp_path)[name] for name in ("samples_seen", "step")), strict=True)
    )
    assert logged(trainer, "step") == [steps[s] for s in crossings(trainer, 8)]
    evaluated = [entry["step"] for entry in history(trainer) if "eval_loss" in entry]
    assert evaluated == [steps[s] for s in crossings(trainer, 20)]
    saved = sorted(int(path.name.split("-")[1]) for path in tmp_path.glob("checkpoint-*"))
    assert saved == [steps[s] for s in crossings(trainer, 40)]
    assert saved[-1] == trainer.state.global_step
    assert len(steps) < 20  # it grew


def test_intervals_in_steps_stay_steps(tmp_path):
    trainer = train(tmp_path, logging_steps=3)
    assert all(step % 3 == 0 for step in logged(trainer, "step"))


@pytest.mark.parametrize("strategy", ["steps", "epoch"])
def test_the_end_is_evaluated_and_saved(tmp_path, strategy):
    trainer = train(
        tmp_path,
        trainer={"eval_dataset": learnable(8)},
        eval_strategy=strategy,
        eval_steps=1000,
        save_strategy=strategy,
        save_steps=1000,
    )
    last = trainer.state.global_step
    assert (tmp_path / f"checkpoint-{last}").is_dir()
    if strategy == "epoch":
        steps = [entry["step"] for entry in history(trainer) if "eval_loss" in entry]
        assert len(steps) == 2
        assert steps[-1] == last


def test_the_best_model_is_loaded_at_the_end(tmp_path):
    trainer = train(
        tmp_path,
        trainer={"eval_dataset": learnable(8)},
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,
        num_train_epochs=3,
    )
    assert trainer.state.best_global_step != trainer.state.global_step


def test_old_checkpoints_are_deleted_as_the_trainer_does(tmp_path):
    train(tmp_path, save_strategy="steps", save_steps=2, save_total_limit=2)
    assert len(list(tmp_path.glob("checkpoint-*"))) == 2


# ---------------------------------------------------------------------------- nothing stays behind


def test_arguments_and_callbacks_are_the_users_after_training(tmp_path):
    args = arguments(tmp_path, **GROWING, gradient_accumulation_steps=3)
    before = copy.deepcopy(args.to_dict())
    trainer = AdaptiveBatchTrainer(model=llama(), args=args, train_dataset=learnable(61))
    callbacks = list(trainer.callback_handler.callbacks)
    trainer.train()
    assert args.to_dict() == before
    assert trainer.callback_handler.callbacks == callbacks


def test_progress_bars_give_way_while_training_only(tmp_path, capsys):
    trainer = adaptive(tmp_path, **GROWING, disable_tqdm=False)
    callbacks = list(trainer.callback_handler.callbacks)
    trainer.train()
    assert trainer.callback_handler.callbacks == callbacks
    assert "37" in capsys.readouterr().err.replace("74", "37")


def test_a_checkpoint_carries_the_users_arguments(tmp_path):
    train(tmp_path, gradient_accumulation_steps=2, save_strategy="steps", save_steps=2)
    for path in tmp_path.glob("checkpoint-*"):
        args = torch.load(path / "training_args.bin", weights_only=False)
        assert isinstance(args, AdaptiveBatchArguments)
        assert args.gradient_accumulation_steps == 2
        assert args.ignore_data_skip is False


def test_training_twice_trains_the_whole_budget_again(tmp_path):
    trainer = adaptive(tmp_path, **GROWING)
    for _ in range(2):
        trainer.train()
        assert samples_trained(trainer) == 74
        assert logged(trainer, "adaptive_batch/global_batch_size")[0] == 4
    assert len(list(tmp_path.glob("adaptive_batch*.jsonl"))) == 2


def test_evaluation_and_prediction_after_training_are_the_trainers(tmp_path):
    trainer = train(tmp_path, trainer={"eval_dataset": learnable(8)})
    assert math.isfinite(trainer.evaluate()["eval_loss"])
    assert trainer.predict(learnable(8)).predictions.shape == (8, 8, VOCABULARY)
    batch = next(iter(trainer.get_train_dataloader()))
    assert not isinstance(batch, StepBatch)


class Breaking(TrainerCallback):
    def __init__(self, step, event):
        self.step, self.event = step, event

    def _break(self, state, event):
        if self.event == event and state.global_step == self.step:
            raise KeyError("broken here")

    def on_step_begin(self, args, state, control, **kwargs):
        self._break(state, "on_step_begin")

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self._break(state, "on_pre_optimizer_step")

    def on_step_end(self, args, state, control, **kwargs):
        self._break(state, "on_step_end")


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("event", ["on_step_begin", "on_pre_optimizer_step", "on_step_end"])
def test_an_exception_leaves_a_trainer_that_can_be_used(tmp_path, event, workers):
    args = arguments(
        tmp_path, **GROWING, gradient_accumulation_steps=2, dataloader_num_workers=workers
    )
    before = copy.deepcopy(args.to_dict())
    trainer = AdaptiveBatchTrainer(
        model=llama(), args=args, train_dataset=learnable(61), callbacks=[Breaking(3, event)]
    )
    callbacks = list(trainer.callback_handler.callbacks)
    with pytest.raises(KeyError, match="broken here"):
        trainer.train()
    gc.collect()
    assert not multiprocessing.active_children()
    assert args.to_dict() == before
    assert trainer.callback_handler.callbacks == callbacks
    assert not any(p._backward_hooks for p in trainer.model.parameters())
    trainer.remove_callback(Breaking)
    trainer.train()
    assert samples_trained(trainer) == 122


def test_a_loss_that_raises_takes_the_hooks_off(tmp_path):
    class Raising(AdaptiveBatchTrainer):
        def compute_loss(self, *args, **kwargs):
            if self.state.global_step == 2:
                raise KeyError("broken here")
            return super().compute_loss(*args, **kwargs)

    trainer = Raising(
        model=llama(), args=arguments(tmp_path, **GROWING), train_dataset=learnable(61)
    )
    with pytest.raises(KeyError, match="broken here"):
        trainer.train()
    assert not any(p._backward_hooks for p in trainer.model.parameters())


def test_no_worker_outlives_training(tmp_path):
    trainer = adaptive(
        tmp_path, **GROWING, dataloader_num_workers=2, dataloader_persistent_workers=True
    )
    for _ in range(2):
        trainer.train()
        assert not multiprocessing.active_children()


def test_a_callback_that_stops_training_early_is_heeded(tmp_path):
    class Stopping(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step >= 4

    trainer = train(tmp_path, trainer={"callbacks": [Stopping()]}, dataloader_num_workers=2)
    assert trainer.state.global_step == 4
    assert not multiprocessing.active_children()


# --------------------------------------------------------------------------- models and trainers


@pytest.mark.parametrize("make", [frozen_embedding, unused_parameter, tied, mean_loss])
def test_other_models_train_and_grow(tmp_path, make):
    model = make()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad} | {"unused"}
    trainer = train(tmp_path, trainer={"model": model}, save_strategy="no")
    assert max(logged(trainer, "adaptive_batch/global_batch_size")) == 16
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) == (name in frozen), name


@pytest.mark.filterwarnings(  # peft 0.x still asks by the name that transformers 5 deprecated
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)
def test_a_lora_model_trains_and_grows(tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(llama(), config)
    trainer = train(tmp_path, trainer={"model": model}, save_strategy="epoch")
    assert max(logged(trainer, "adaptive_batch/global_batch_size")) == 16
    assert list(tmp_path.glob("checkpoint-*/adapter_model.safetensors"))


class Wrapping(Trainer):
    """What trainers derived from the Trainer do: wrap both methods, once per micro-batch."""

    def __init__(self, *args, **kwargs):
        self.losses = self.steps = 0
        super().__init__(*args, **kwargs)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        self.losses += 1
        assert not isinstance(inputs, StepBatch)
        return super().compute_loss(
            model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
        )

    def training_step(self, *args, **kwargs):
        self.steps += 1
        return super().training_step(*args, **kwargs)


def test_the_mixin_goes_before_any_trainer(tmp_path):
    class Adaptive(AdaptiveBatchMixin, Wrapping):
        pass

    recorder, given = recorded(61)
    trainer = Adaptive(model=llama(), args=arguments(tmp_path, **GROWING, **KEEP), **given)
    trainer.train()
    assert trainer.steps == len(recorder.micro_batches)
    assert trainer.losses == trainer.steps + 2  # two more find out how the loss is scaled
    assert max(logged(trainer, "adaptive_batch/global_batch_size")) == 16
    same = train(tmp_path / "same", trainer={**given, "data_collator": Recorder()}, **KEEP)
    assert same_weights(weights(trainer), weights(same))


def test_a_subclass_may_wrap_the_loss_and_the_step(tmp_path):
    class Own(Wrapping, AdaptiveBatchTrainer):
        pass

    trainer = Own(model=llama(), args=arguments(tmp_path, **GROWING), train_dataset=learnable(61))
    trainer.train()
    assert trainer.steps > trainer.state.global_step  # micro-batches, as under the plain Trainer
    assert trainer.losses == trainer.steps + 2
    assert max(logged(trainer, "adaptive_batch/global_batch_size")) == 16


def test_a_model_made_by_a_function_trains(tmp_path):
    trainer = AdaptiveBatchTrainer(
        model_init=lambda: llama(), args=arguments(tmp_path, **GROWING), train_dataset=learnable(61)
    )
    trainer.train()
    assert max(logged(trainer, "adaptive_batch/global_batch_size")) == 16


# ------------------------------------------------------------------------- losses not finite


class Poisoned(AdaptiveBatchTrainer):
    """Its loss is `poison` at some steps."""

    poison, poisoned = math.nan, (4,)

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        return loss * self.poison if self.state.global_step + 1 in self.poisoned else loss


class Weights(TrainerCallback):
    """The weights as each step began, and how often the optimizer has stepped."""

    def __init__(self):
        self.before = []

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.before.append({n: v.detach().clone() for n, v in model.state_dict().items()})


def poisoned_run(folder, poison=math.nan, **options):
    watcher = Weights()
    trainer = Poisoned(
        model=llama(),
        args=arguments(folder, **{**GROWING, **options}),
        train_dataset=learnable(61),
        callbacks=[watcher],
    )
    trainer.poison = poison
    trainer.train()
    return trainer, watcher


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf], ids=str)
def test_a_step_whose_loss_is_not_finite_is_skipped_and_counted(
    tmp_path, poison, accumulation, caplog
):
    trainer, watcher = poisoned_run(tmp_path, poison, gradient_accumulation_steps=accumulation)
    assert same_weights(watcher.before[3], watcher.before[4])  # step 4 changed nothing
    assert not same_weights(watcher.before[4], watcher.before[5])  # step 5 went on
    assert "loss of step 4 is not finite" in caplog.text
    assert logged(trainer, "adaptive_batch/skipped_steps")[-1] == 1
    records = read_records(tmp_path)
    index = records["step"].index(4)
    assert records["reason"][index] == "not_finite"
    assert records["next_global_batch_size"][index] == records["global_batch_size"][index]
    assert records["loss"][index] is None
    assert records["workers"][index] is None
    assert samples_trained(trainer) == 122
    for name in ("loss", "adaptive_batch/noise_trace", "adaptive_batch/grad_sq_norm"):
        assert all(map(math.isfinite, logged(trainer, name)))
    assert max(logged(trainer, "adaptive_batch/global_batch_size")) == 16


def test_a_skipped_step_leaves_the_optimizer_untouched(tmp_path):
    trainer, _ = poisoned_run(tmp_path, weight_decay=0.1)
    (state, *_rest) = trainer.optimizer.state.values()
    assert state["step"] == trainer.state.global_step - 1


def test_an_unmeasured_step_whose_loss_is_not_finite_is_skipped_too(tmp_path):
    _, watcher = poisoned_run(tmp_path, test_interval=3)
    assert same_weights(watcher.before[3], watcher.before[4])


def test_a_constant_batch_skips_too(tmp_path):
    trainer, watcher = poisoned_run(tmp_path, batch_schedule="constant")
    assert same_weights(watcher.before[3], watcher.before[4])
    assert logged(trainer, "adaptive_batch/skipped_steps")[-1] == 1


def test_without_skipping_the_step_is_left_to_the_trainer(tmp_path):
    trainer, watcher = poisoned_run(tmp_path, skip_nonfinite_steps=False)
    assert not same_weights(watcher.before[3], watcher.before[4])
    assert any(value.isnan().any() for value in watcher.before[4].values())
    assert set(logged(trainer, "adaptive_batch/global_batch_size")[4:]) <= {
        logged(trainer, "adaptive_batch/global_batch_size")[3]
    }


def test_a_gradient_that_is_not_finite_is_skipped_on_measured_steps(tmp_path):
    model = llama()
    calls = []

    def spoil(gradient):
        calls.append(1)
        return gradient * math.inf if len(calls) == 5 else gradient

    model.lm_head.weight.register_hook(spoil)
    watcher = Weights()
    trainer = train(tmp_path, trainer={"model": model, "callbacks": [watcher]})
    reasons = read_records(tmp_path)["reason"]
    assert reasons.count("not_finite") == 1
    index = reasons.index("not_finite")
    assert same_weights(watcher.before[index], watcher.before[index + 1])
    assert all(value.isfinite().all() for value in weights(trainer).values())


def test_every_loss_not_finite_never_grows_and_never_crashes(tmp_path):
    class Hopeless(Poisoned):
        poisoned = range(1, 1000)

    start = weights_of(llama())
    trainer = Hopeless(
        model=llama(), args=arguments(tmp_path, **GROWING), train_dataset=learnable(61)
    )
    trainer.train()
    assert set(logged(trainer, "adaptive_batch/global_batch_size")) == {4}
    assert same_weights(weights(trainer), start)
    assert logged(trainer, "adaptive_batch/skipped_steps")[-1] == trainer.state.global_step


def weights_of(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}
