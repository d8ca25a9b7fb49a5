"""The Trainer on streams: as the plain Trainer while the batch is constant, and resumable bitwise.

One process. What a stream hands out, and when, is tested in test_streams.py.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import json
import multiprocessing
import os
import random
import shutil

import pytest
import torch
from datasets.distributed import split_dataset_by_node
from torch.utils.data import IterableDataset
from transformers import TrainerCallback

from hf_adaptive_batch import AdaptiveBatchTrainer, read_records
from hf_adaptive_batch.apply import stream as stream_module
from hf_adaptive_batch.checkpoint import STATE_FILE

from .cases import (
    GROWING,
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
from .test_resume import assert_same, changes, finished, resumed, uninterrupted


@pytest.fixture(autouse=True)
def _not_for_ever(monkeypatch):
    """The Trainer's loop asks on and on where an epoch has nothing left; as often as it expects."""
    ask = AdaptiveBatchTrainer.get_batch_samples
    empty = []

    def asking(self, *args, **kwargs):
        batches, items = ask(self, *args, **kwargs)
        empty.append(not batches)
        assert not all(empty[-1000:]) or len(empty) < 1000, "the loop turns over nothing"
        return batches, items

    monkeypatch.setattr(AdaptiveBatchTrainer, "get_batch_samples", asking)


class Rows(IterableDataset):
    """Samples in an order that is a function of the epoch; without a state."""

    def __init__(self, samples, *, uneven=True):
        self.rows, self.epoch = sequences(samples, uneven=uneven).to_list(), 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def order(self):
        return random.Random(self.epoch).sample(range(len(self.rows)), len(self.rows))

    def __iter__(self):
        for index in self.order():
            yield self.rows[index]


class StatefulRows(Rows):
    """Knows its place."""

    begin = place = 0

    def __iter__(self):
        self.place, self.begin = self.begin, 0
        for index in self.order()[self.place :]:
            self.place += 1
            yield self.rows[index]

    def state_dict(self):
        return {"place": self.place}

    def load_state_dict(self, state):
        self.begin = state["place"]


class Sized(Rows):
    """Tells its length."""

    def __len__(self):
        return len(self.rows)


def hf(samples, *, shards=2):
    return sequences(samples, uneven=True).to_iterable_dataset(num_shards=shards)


def mapped(samples):
    return (
        hf(samples)
        .map(lambda row: {"input_ids": [1, *row["input_ids"]], "labels": [1, *row["labels"]]})
        .filter(lambda row: len(row["input_ids"]) > 3)
    )


def shuffled(samples):
    return hf(samples).shuffle(seed=3, buffer_size=7)


STREAMS = {
    "torch": Rows,
    "torch_stateful": StatefulRows,
    "datasets": hf,
    "datasets_mapped": mapped,
    "datasets_shuffled": shuffled,
}


def on(stream, samples=37, **rest):
    return {"train_dataset": stream(samples), "data_collator": pad, **rest}


# ------------------------------------------------------------------------- as the plain Trainer


def without_epochs(entries):
    return [{k: v for k, v in entry.items() if k != "epoch"} for entry in entries]


STEPS = {"within_an_epoch": 7, "to_its_end": 10, "over_epochs": 23}


@pytest.mark.parametrize("steps", STEPS.values(), ids=STEPS)
@pytest.mark.parametrize("stream", STREAMS.values(), ids=STREAMS)
def test_with_a_constant_batch_all_is_as_under_the_plain_trainer(tmp_path, stream, steps):
    """Bitwise; but `epoch` is a whole number where a stream has ended."""
    options = {"max_steps": steps, "lr_scheduler_type": "cosine", "warmup_steps": 3}
    first = plain(tmp_path / "plain", trainer=on(stream), **options)
    first.train()
    second = adaptive(
        tmp_path / "adaptive", trainer=on(stream), batch_schedule="constant", **options
    )
    second.train()
    assert second.state.global_step == first.state.global_step == steps
    assert same_weights(weights(second), weights(first))
    ours, theirs = history(second, adaptive_keys=False), history(first)
    assert without_epochs(ours) == without_epochs(theirs)
    whole = [entry["epoch"] for entry in ours if float(entry["epoch"]).is_integer()]
    assert [
        (mine["epoch"], other["epoch"])
        for mine, other in zip(ours, theirs, strict=True)
        if mine["epoch"] != other["epoch"] and not float(mine["epoch"]).is_integer()
    ] == []
    if steps == STEPS["over_epochs"] and stream is not mapped:
        assert whole == [1, 2]


@pytest.mark.parametrize("stream", [Rows, shuffled])
def test_accumulation_is_as_under_the_plain_trainer_up_to_a_streams_end(tmp_path, stream):
    """There the plain Trainer carries what it has accumulated over into the next epoch's step."""
    options = {"max_steps": 12, "gradient_accumulation_steps": 2}
    first = plain(tmp_path / "plain", trainer=on(stream, 40), **options)
    first.train()
    second = adaptive(
        tmp_path / "adaptive", trainer=on(stream, 40), batch_schedule="constant", **options
    )
    second.train()
    assert same_weights(weights(second), weights(first))
    assert without_epochs(history(second, adaptive_keys=False)) == without_epochs(history(first))


EPOCHS = {"whole": 2, "part": 1.4}


@pytest.mark.parametrize("epochs", EPOCHS.values(), ids=EPOCHS)
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_stream_that_tells_its_length_trains_epochs_as_under_the_plain_trainer(
    tmp_path, epochs, accumulation
):
    options = {"num_train_epochs": epochs, "gradient_accumulation_steps": accumulation}
    first = plain(tmp_path / "plain", trainer=on(Sized), **options)
    first.train()
    second = adaptive(
        tmp_path / "adaptive", trainer=on(Sized), batch_schedule="constant", **options
    )
    second.train()
    assert second.state.global_step == first.state.global_step
    assert same_weights(weights(second), weights(first))
    assert without_epochs(history(second, adaptive_keys=False)) == without_epochs(history(first))


@pytest.mark.parametrize("stream", [Rows, Sized])
def test_grouping_by_length_is_not_for_streams_as_under_the_plain_trainer(tmp_path, stream):
    found = []
    for strategy in ("random", "group_by_length"):
        trainer = adaptive(
            tmp_path / strategy,
            trainer=on(stream),
            max_steps=7,
            batch_schedule="constant",
            train_sampling_strategy=strategy,
        )
        trainer.train()
        found.append(weights(trainer))
    assert same_weights(*found)


def test_the_last_micro_batch_of_a_stream_is_never_dropped_as_under_the_plain_trainer(tmp_path):
    options = {"max_steps": 15, "dataloader_drop_last": True}
    first = plain(tmp_path / "plain", trainer=on(Rows), **options)
    first.train()
    second = adaptive(tmp_path / "new", trainer=on(Rows), batch_schedule="constant", **options)
    second.train()
    assert same_weights(weights(second), weights(first))


def test_another_order_would_be_seen(tmp_path):
    class Other(Rows):
        def order(self):
            return super().order()[::-1]

    options = {"max_steps": 7}
    first = plain(tmp_path / "plain", trainer=on(Rows), **options)
    first.train()
    second = adaptive(tmp_path / "new", trainer=on(Other), batch_schedule="constant", **options)
    second.train()
    assert not same_weights(weights(second), weights(first))


# ------------------------------------------------------------------------------------- resuming

WORKERS = {
    "0": {},
    "1": {"dataloader_num_workers": 1},
    "3": {"dataloader_num_workers": 3},
    "persistent": {"dataloader_num_workers": 2, "dataloader_persistent_workers": True},
}


@pytest.fixture
def replays(monkeypatch):
    """How often a place was found by reading the epoch again."""
    found = []
    again = stream_module.same_random_numbers

    def counting():
        found.append(1)
        return again()

    monkeypatch.setattr(stream_module, "same_random_numbers", counting)
    return found


def assert_resumes(tmp_path, trainer, *, every=1, **options):
    run = uninterrupted(tmp_path / "run", trainer=trainer, **options)
    for step in range(1, run.steps, every):
        folder = tmp_path / f"resumed-{step}"
        try:
            assert_same(run, resumed(run, step, folder, trainer=trainer, **options))
        except AssertionError as error:
            raise AssertionError(f"resumed at {step}") from error
    return run


@pytest.mark.parametrize("stream", STREAMS.values(), ids=STREAMS)
def test_every_checkpoint_of_a_stream_resumes_bitwise(tmp_path, stream, replays):
    run = assert_resumes(tmp_path, lambda: on(stream), max_steps=40, **GROWING)
    assert sorted(set(run.sizes)) == [4, 8, 16]
    assert changes(run)
    assert sum(float(entry["epoch"]).is_integer() for entry in run.history) >= 3
    # By the state where there is one that can be trusted; nothing is read again at an epoch's end.
    assert bool(replays) == (stream in (Rows, shuffled))


MANY_WORKERS = pytest.mark.filterwarnings("ignore:This DataLoader will create")  # on few cores


@pytest.mark.slow
@MANY_WORKERS
@pytest.mark.parametrize("workers", list(WORKERS)[1:])
@pytest.mark.parametrize("stream", STREAMS.values(), ids=STREAMS)
def test_every_checkpoint_of_a_stream_resumes_bitwise_with_workers(tmp_path, stream, workers):
    run = assert_resumes(tmp_path, lambda: on(stream), max_steps=30, **GROWING, **WORKERS[workers])
    assert changes(run)


def test_a_resume_at_another_place_is_seen_to_differ(tmp_path):
    """At the beginning of the epoch, where no sample that comes next is compared."""
    options = {**GROWING, "max_steps": 20}
    run = uninterrupted(tmp_path / "run", trainer=lambda: on(Rows), **options)
    path = run.folder / "checkpoint-3" / STATE_FILE
    state = json.loads(path.read_text())
    state["loader"]["source"]["places"][0].update(offset=0, following=None)
    path.write_text(json.dumps(state))
    with pytest.raises(AssertionError):
        assert_same(run, resumed(run, 3, tmp_path / "new", trainer=lambda: on(Rows), **options))


BUDGETS = {
    "steps": {"max_steps": 15},
    "samples": {"max_train_samples": 61},
    "samples_of_an_epoch": {"max_train_samples": 37},
    "tokens": {"max_train_tokens": 350},
}


@pytest.mark.parametrize("budget", BUDGETS.values(), ids=BUDGETS)
def test_any_budget_of_a_stream_is_used_up_and_resumes(tmp_path, budget):
    run = assert_resumes(tmp_path, lambda: on(hf), every=3, **GROWING, **budget)
    last = run.history[-1]
    if "max_train_samples" in budget:
        assert last["adaptive_batch/samples_seen"] == budget["max_train_samples"]
    elif "max_train_tokens" in budget:
        before = run.history[-2]["adaptive_batch/tokens_seen"]
        assert before < 350 <= last["adaptive_batch/tokens_seen"]
    else:  # 10 steps are an epoch's 37 samples
        assert last["adaptive_batch/samples_seen"] == 37 + 5 * 4
    assert last["learning_rate"] < 3e-3 / 2


def test_a_stream_that_tells_its_length_resumes(tmp_path):
    run = assert_resumes(tmp_path, lambda: on(Sized), every=2, num_train_epochs=2.5, **GROWING)
    # 2.5 epochs of 10 steps of the initial size
    assert run.history[-1]["adaptive_batch/samples_seen"] == 2 * 37 + 5 * 4


@MANY_WORKERS
def test_the_number_of_workers_may_change_at_a_resume(tmp_path):
    options = {"max_steps": 18, "batch_schedule": "constant"}
    run = uninterrupted(tmp_path / "run", trainer=lambda: on(shuffled), **options)
    other = uninterrupted(
        tmp_path / "workers", trainer=lambda: on(shuffled), **options, **WORKERS["3"]
    )
    losses = [entry["loss"] for entry in run.history]
    assert len(losses) == 18
    more = resumed(
        run, 7, tmp_path / "more", trainer=lambda: on(shuffled), **options, **WORKERS["3"]
    )
    fewer = resumed(other, 7, tmp_path / "fewer", trainer=lambda: on(shuffled), **options)
    for found in (other, more, fewer):
        seen = [entry["adaptive_batch/tokens_seen"] for entry in found.history]
        assert seen == [entry["adaptive_batch/tokens_seen"] for entry in run.history]


def test_a_killed_run_goes_on_from_its_last_checkpoint(tmp_path):
    options = {**GROWING, "max_steps": 20}
    run = uninterrupted(tmp_path / "run", trainer=lambda: on(hf), **options)
    folder = tmp_path / "killed"
    shutil.copytree(run.folder, folder)
    for step in range(6, run.steps + 1):
        shutil.rmtree(folder / f"checkpoint-{step}")
    (folder / "checkpoint-5" / STATE_FILE).unlink()  # it was being written
    trainer = adaptive(folder, trainer=on(hf), **options)
    trainer.train(resume_from_checkpoint=True)
    assert_same(run, finished(trainer, folder))


def test_a_stream_that_is_split_already_resumes(tmp_path):
    """As the one part of one rank; and then it may not be resumed whole."""

    def split(samples):
        return split_dataset_by_node(hf(samples), rank=0, world_size=1)

    run = assert_resumes(tmp_path, lambda: on(split), every=4, max_steps=15, **GROWING)
    with pytest.raises(ValueError, match="must be split as in the checkpoint"):
        resumed(run, 3, tmp_path / "whole", trainer=lambda: on(hf), max_steps=15, **GROWING)


def test_the_epoch_is_begun_anew_where_that_is_asked_for(tmp_path):
    options = {**GROWING, "max_train_samples": 70}
    seen = []

    class Noting(Rows):
        def __iter__(self):
            for index in self.order():
                seen.append(index)
                yield self.rows[index]

    run = uninterrupted(tmp_path / "run", trainer=lambda: on(Noting), **options)
    seen.clear()
    trainer = adaptive(tmp_path / "anew", trainer=on(Noting), ignore_data_skip=True, **options)
    trainer.train(resume_from_checkpoint=str(run.folder / "checkpoint-3"))
    assert trainer.run.clock.samples_seen == 70
    assert trainer.args.ignore_data_skip
    assert seen[:37] == Noting(37).order()


class Unseeded(Rows):
    """Every object has an order of its own."""

    seeds = itertools.count()

    def __init__(self, samples):
        super().__init__(samples)
        self.seed = next(self.seeds)

    def order(self):
        return random.Random(self.seed).sample(range(len(self.rows)), len(self.rows))


CHANGED = {
    "another": lambda: on(Rows, 36),
    "unseeded": lambda: on(Unseeded),
}


@pytest.mark.parametrize("workers", ["0", "1"])
@pytest.mark.parametrize("changed", CHANGED.values(), ids=CHANGED)
def test_a_stream_that_goes_on_otherwise_is_refused(tmp_path, changed, workers):
    stream = Unseeded if changed is CHANGED["unseeded"] else Rows
    options = {**GROWING, "max_steps": 8, **WORKERS[workers]}
    run = uninterrupted(tmp_path / "run", trainer=lambda: on(stream), **options)
    with pytest.raises(
        ValueError,
        match=r"train_dataset \(its sample \d+ in epoch 0\) must be .* shuffle\(\) a seed",
    ):
        resumed(run, 3, tmp_path / "resumed", trainer=changed, **options)
    gc.collect()
    assert not multiprocessing.active_children()


def test_a_map_style_checkpoint_is_not_resumed_on_a_stream_nor_the_reverse(tmp_path):
    options = {**GROWING, "max_steps": 8}
    streamed = uninterrupted(tmp_path / "stream", trainer=lambda: on(hf), **options)
    mapped = uninterrupted(tmp_path / "map", trainer=lambda: on(sequences), **options)
    for run, other in ((streamed, sequences), (mapped, hf)):
        with pytest.raises(
            ValueError, match=r"train_dataset \(.*must be the one of the checkpoint"
        ):
            resumed(
                run, 3, tmp_path / f"on_{other.__name__}", trainer=lambda o=other: on(o), **options
            )


# ----------------------------------------------------------------------- around the data


def test_evaluating_saving_and_columns_are_as_ever(tmp_path):
    """Unused columns are taken out, evaluations leave the stream's place alone."""

    def more_columns():
        data = sequences(37, uneven=True).add_column("index", list(range(37)))
        return {**on(lambda samples: data.to_iterable_dataset()), "eval_dataset": sequences(8)}

    options = {**GROWING, "max_train_samples": 70, "eval_strategy": "steps", "eval_steps": 2}
    run = assert_resumes(tmp_path, more_columns, every=4, **options)
    quiet = uninterrupted(
        tmp_path / "quiet", trainer=lambda: on(hf), max_train_samples=70, **GROWING
    )
    assert sum("eval_loss" in entry for entry in run.history) > 2
    for name in ("samples_seen", "tokens_seen"):
        assert run.records[name][-1] == quiet.records[name][-1]


@pytest.mark.parametrize("stream", STREAMS.values(), ids=STREAMS)
def test_a_second_training_begins_at_the_beginning(tmp_path, stream):
    """Also after one that was resumed, which set the place in a copy of the dataset."""
    options = {**GROWING, "max_steps": 15}
    run = uninterrupted(tmp_path / "run", trainer=lambda: on(stream), **options)
    data = on(stream)
    resumed(run, 3, tmp_path / "resumed", trainer=lambda: data, **options)
    again = uninterrupted(tmp_path / "again", trainer=lambda: {**data, "model": llama()}, **options)
    assert_same(run, again)


def test_samples_that_a_budget_in_tokens_looks_at_are_trained_on(tmp_path):
    seen = []

    def noting(rows):
        seen.extend(row["input_ids"] for row in rows)
        return pad(rows)

    data = Rows(37)
    trainer = adaptive(
        tmp_path,
        trainer={"train_dataset": data, "data_collator": noting},
        max_train_tokens=150,
        batch_schedule="constant",
    )
    trainer.train()
    begin = len(seen) - trainer.run.clock.samples_seen
    assert begin == 37  # all were looked at
    expected = [data.rows[index]["input_ids"] for index in data.order()]
    assert seen[begin:] == expected[: len(seen) - begin]


# ------------------------------------------------------------------------------------- processes


def is_alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


class Noting(IterableDataset):
    """Writes down in which process each sample was read."""

    def __init__(self, samples, fails_at=None, error=KeyError):
        self.rows, self.fails_at, self.error = sequences(samples).to_list(), fails_at, error

    def __iter__(self):
        for index, row in enumerate(self.rows):
            if index == self.fails_at:
                raise self.error("a broken sample")
            yield {**row, "pid": os.getpid()}


class NotingMap(torch.utils.data.Dataset):
    def __init__(self, samples):
        self.rows = sequences(samples).to_list()

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return {**self.rows[index], "pid": os.getpid()}


class Processes(TrainerCallback):
    """Notes the loader's processes and the batch at each step."""

    def __init__(self, *, stop_at=None):
        self.children, self.stop_at = [], stop_at

    def on_step_end(self, args, state, control, **kwargs):
        self.children.append({p.pid for p in multiprocessing.active_children()})
        if state.global_step == self.stop_at:
            raise KeyboardInterrupt


def keeping_pids(seen):
    def collate(rows):
        return {**pad(rows), "pids": torch.tensor([row["pid"] for row in rows])}

    class Looking(AdaptiveBatchTrainer):
        def training_step(self, model, inputs, *args):
            seen.append((self.state.global_step, inputs["pids"].tolist()))
            return super().training_step(model, inputs, *args)

        def compute_loss(self, model, inputs, *args, **kwargs):
            inputs = {name: value for name, value in inputs.items() if name != "pids"}
            return super().compute_loss(model, inputs, *args, **kwargs)

    return Looking, collate


@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize("data", [Noting, NotingMap])
def test_a_worker_outlives_changes_of_the_batch_and_what_it_has_queued_is_used(
    tmp_path, data, persistent
):
    seen, processes = [], Processes()
    trainer_class, collate = keeping_pids(seen)
    trainer = trainer_class(
        model=llama(),
        args=arguments(
            tmp_path,
            max_train_samples=60,
            dataloader_num_workers=1,
            dataloader_prefetch_factor=4,
            dataloader_persistent_workers=persistent,
            remove_unused_columns=False,
            **GROWING,
        ),
        train_dataset=data(60),
        data_collator=collate,
        callbacks=[processes],
    )
    trainer.train()
    sizes = read_records(tmp_path)["global_batch_size"]
    assert {4, 8} <= set(sizes)
    pids = {pid for _, batch in seen for pid in batch}
    assert len(pids) == 1
    assert pids != {os.getpid()}
    assert all(children == pids for children in processes.children[:-1])
    change = sizes.index(8)
    first_larger = [len(batch) for step, batch in seen if step == change]
    assert sum(first_larger) == 8
    assert set(first_larger) == {4} or max(first_larger) < 8  # had been queued
    assert sum(len(batch) for _, batch in seen) == 60
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("workers", ["0", "1", "persistent"])
def test_no_process_is_left_after_a_sample_that_raises(tmp_path, workers):
    trainer = adaptive(
        tmp_path,
        trainer=on(lambda n: Noting(n, fails_at=30)),
        max_steps=20,
        **GROWING,
        **WORKERS[workers],
    )
    with pytest.raises(KeyError, match="a broken sample"):
        trainer.train()
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("workers", ["0", "1", "persistent"])
def test_no_process_is_left_after_an_interrupt_in_a_callback(tmp_path, workers):
    processes = Processes(stop_at=4)
    trainer = adaptive(
        tmp_path,
        trainer=on(Rows, callbacks=[processes]),
        max_steps=20,
        **GROWING,
        **WORKERS[workers],
    )
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert bool(processes.children[-1]) == (workers != "0")  # the test would see them
    assert not multiprocessing.active_children()
    trainer.remove_callback(processes)
    trainer.train()
    assert not multiprocessing.active_children()
    assert trainer.run.clock.finished


@pytest.mark.parametrize("workers", ["0", "1"])
def test_no_process_is_left_after_an_interrupt_in_the_dataset(tmp_path, workers):
    """A worker that is interrupted ends; the Trainer says so."""
    trainer = adaptive(
        tmp_path,
        trainer=on(lambda n: Noting(n, fails_at=30, error=KeyboardInterrupt)),
        max_steps=20,
        **GROWING,
        **WORKERS[workers],
    )
    # What is said depends on whether tensors of the worker's were still on their way.
    with pytest.raises((KeyboardInterrupt, RuntimeError, OSError, EOFError)):
        trainer.train()
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("workers", ["1", "persistent"])
def test_training_twice_leaves_no_process(tmp_path, workers):
    trainer = adaptive(tmp_path, trainer=on(Rows), max_steps=12, **GROWING, **WORKERS[workers])
    for _ in range(2):
        trainer.train()
        assert trainer.run.clock.finished
        assert not multiprocessing.active_children()


def test_the_worker_seen_is_the_only_one_of_a_stream(tmp_path):
    """However many are asked for."""
    processes = Processes()
    trainer = adaptive(
        tmp_path,
        trainer=on(Rows, callbacks=[processes]),
        max_steps=12,
        **GROWING,
        **WORKERS["persistent"],
    )
    trainer.train()
    assert {len(children) for children in processes.children} == {1}


# ------------------------------------------------------------------------------- known defects


class OneShot(IterableDataset):
    """Can be iterated over once."""

    def __init__(self, samples):
        self.iterator = iter(sequences(samples, uneven=True).to_list())

    def __iter__(self):
        return self.iterator


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_run_of_a_stream_that_was_finished_trains_no_further(tmp_path, workers):
    options = {**GROWING, "max_steps": 12, **WORKERS[workers]}
    run = uninterrupted(tmp_path / "run", trainer=lambda: on(Rows), **options)
    again = resumed(run, run.steps, tmp_path / "again", trainer=lambda: on(Rows), **options)
    assert again.steps == run.steps
    assert same_weights(again.weights, run.weights)


def test_a_stream_that_can_be_read_once_ends_training_or_is_refused(tmp_path):
    trainer = adaptive(tmp_path, trainer=on(OneShot), max_steps=20, **GROWING)
    with contextlib.suppress(ValueError):
        trainer.train()
    assert trainer.run.clock.samples_seen == 37


def test_a_stream_that_can_be_read_once_loses_nothing_to_a_budget_in_tokens(tmp_path):
    seen = []

    def noting(rows):
        seen.append([row["input_ids"] for row in rows])
        return pad(rows)

    data = sequences(100, uneven=True).to_list()
    trainer = adaptive(
        tmp_path,
        trainer={"train_dataset": OneShot(100), "data_collator": noting},
        max_train_tokens=100,
        batch_schedule="constant",
    )
    with contextlib.suppress(ValueError):
        trainer.train()
        assert seen[-1][-1] in [row["input_ids"] for row in data[:30]]


class Continuing(Rows):
    """Goes on where it stands, whoever asks."""

    place = 0

    def __iter__(self):
        while self.place < len(self.rows):
            self.place += 1
            yield self.rows[self.place - 1]
        self.place = 0


def test_a_stream_that_goes_on_where_it_stands_loses_nothing_to_a_budget_in_tokens(tmp_path):
    seen, data = [], Continuing(100)

    def noting(rows):
        seen.append([row["input_ids"] for row in rows])
        return pad(rows)

    trainer = adaptive(
        tmp_path,
        trainer={"train_dataset": data, "data_collator": noting},
        max_train_tokens=100,
        batch_schedule="constant",
    )
    trainer.train()
    trained = list(itertools.chain.from_iterable(seen))[-trainer.run.clock.samples_seen :]
    assert trained == [row["input_ids"] for row in data.rows[: len(trained)]]


def test_a_budget_in_tokens_means_the_same_whatever_was_done_with_the_stream_before(tmp_path):
    means = []
    for epoch in (0, 2):
        data = sequences(300, uneven=True).to_iterable_dataset(num_shards=4)
        data = data.shuffle(seed=1, buffer_size=50)
        data.set_epoch(epoch)  # as an earlier training did
        trainer = adaptive(
            tmp_path / f"{epoch}",
            trainer={"train_dataset": data, "data_collator": pad},
            max_train_tokens=100,
        )
        trainer.train()
        means.append(trainer.run.clock.tokens_per_sample)
    assert means[0] == means[1]
