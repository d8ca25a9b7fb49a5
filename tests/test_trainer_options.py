"""What decides how data is loaded works as under the plain Trainer, or is refused with the reason.

Samplers and loaders of one's own, datasets of torch, accelerator_config, workers. A test that is
expected to fail says what is known to differ.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import random
from collections import Counter

import pytest
import torch
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Sampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_adaptive_batch import AdaptiveBatchMixin, AdaptiveBatchTrainer
from hf_adaptive_batch.apply import loader as loader_module

from .cases import GROWING, arguments, llama, pad, same_weights, sequences, weights
from .test_trainer_equals_plain import CONSTANT, assert_equal, uneven


WORKERS = {"dataloader_num_workers": 2}
PERSISTENT = {**WORKERS, "dataloader_persistent_workers": True}


def kinds(own):
    """A Trainer with methods of one's own, and the same with a batch that may adapt."""
    base = type("Own", (Trainer,), dict(own or {}))
    return base, type("Adaptive", (AdaptiveBatchMixin, base), {})


def constant(folder, own=None, *, data=uneven, **options):
    """A trainer whose batch does not change, and that has not trained."""
    args = arguments(folder, **{"num_train_epochs": 3, **options, **CONSTANT})
    return kinds(own)[1](**{"model": llama(), "args": args, **data()})


def end_workers(trainer):
    """Those of a plain Trainer outlive its training if they persist."""
    trainer.callback_handler.train_dataloader = None
    trainer.accelerator.free_memory()
    gc.collect()
    assert not multiprocessing.active_children()


def assert_trains_as_trainer(folder, own=None, *, data=uneven, **options):
    args = arguments(folder / "plain", TrainingArguments, **{"num_train_epochs": 3, **options})
    one = kinds(own)[0](**{"model": llama(), "args": args, **data()})
    one.train()
    end_workers(one)
    other = constant(folder / "adaptive", own, data=data, **options)
    other.train()
    alike = same_weights(weights(one), weights(other))
    assert alike  # first, because it says so briefly
    assert_equal(one, other)


def indexed(count=61):
    """Rows that know which they are."""
    rows = sequences(count, uneven=True)
    return rows.add_column("index", list(range(count)))


def pad_indexed(rows):
    batch = pad(rows)
    batch["index"] = torch.tensor([row["index"] for row in rows])
    batch["worker"] = torch.full((len(rows),), os.getpid())
    return batch


class Noting(AdaptiveBatchTrainer):
    """Notes what reaches the model: samples, who fetched them, and the size of the step."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        inputs = dict(inputs)
        entry = (inputs.pop("index").tolist(), set(inputs.pop("worker").tolist()))
        self.__dict__.setdefault("noted", []).append((*entry, self.run.plan.global_batch_size))
        return super().training_step(model, inputs, num_items_in_batch)

    @property
    def samples(self):
        return [index for batch, _, _ in self.noted for index in batch]


def grown(folder, own=None, *, dataset=None, model=None, **options):
    """A run of three epochs whose batch grew from 4 to 16."""
    data = indexed() if dataset is None else dataset
    given = {"remove_unused_columns": False, "num_train_epochs": 3, **GROWING, **options}
    kind = type("Own", (Noting,), dict(own or {}))
    trainer = kind(
        model=model or llama(),
        args=arguments(folder, **given),
        train_dataset=data,
        data_collator=pad_indexed,
    )
    trainer.train()
    assert {4, 16} <= {size for _, _, size in trainer.noted}
    return trainer


def assert_each_epoch_trains_on(samples, epochs):
    assert len(samples) == sum(map(len, epochs))
    for epoch in epochs:
        now, samples = samples[: len(epoch)], samples[len(epoch) :]
        assert Counter(now) == Counter(epoch)


# ---------------------------------------------------------------------------- samplers


class Listed(Sampler):
    """Given indices in a given order; knows no epochs."""

    def __init__(self, indices):
        self.indices = list(indices)

    def __len__(self):
        return len(self.indices)

    def __iter__(self):
        return iter(self.indices)


class ByEpoch(Listed):
    """Shuffles by the epoch that it is told."""

    epoch = 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        return iter(random.Random(self.epoch).sample(self.indices, len(self.indices)))


def own_generator():
    return torch.Generator().manual_seed(3)


def weighted(data, generator=None):
    return WeightedRandomSampler(range(1, len(data) + 1), len(data), generator=generator)


SAMPLERS = {
    "weighted": weighted,
    "weighted_by_a_generator": lambda data: weighted(data, own_generator()),
    "with_replacement": lambda data: RandomSampler(data, replacement=True, num_samples=50),
    "random_subset": lambda data: SubsetRandomSampler(range(0, 30, 2)),
    "fewer": lambda data: Listed(range(0, len(data), 2)),
    "more": lambda data: Listed([*range(len(data)), *range(20)]),
    "told_the_epoch": lambda data: ByEpoch(range(len(data))),
    "none": lambda data: None,
}


def sampled_by(make):
    def _get_train_sampler(self, train_dataset):
        assert "input_ids" in train_dataset.column_names
        return make(train_dataset)

    return {"_get_train_sampler": _get_train_sampler}


@pytest.mark.parametrize("make", SAMPLERS.values(), ids=SAMPLERS)
def test_a_sampler_of_ones_own_orders_training_as_under_the_trainer(tmp_path, make):
    assert_trains_as_trainer(tmp_path, sampled_by(make), gradient_accumulation_steps=2)


@pytest.mark.parametrize("name", ["weighted", "told_the_epoch"])
def test_a_sampler_of_ones_own_and_workers_train_as_the_trainer(tmp_path, name):
    assert_trains_as_trainer(tmp_path, sampled_by(SAMPLERS[name]), **WORKERS)


@pytest.mark.parametrize(
    "options",
    [
        {"max_steps": 11},
        {"num_train_epochs": 2.5, "gradient_accumulation_steps": 2},
        {"dataloader_drop_last": True},
    ],
    ids=["max_steps", "half_epochs", "drop_last"],
)
@pytest.mark.parametrize("name", ["fewer", "more"])
def test_an_epoch_is_as_long_as_the_sampler_and_not_as_the_dataset(tmp_path, name, options):
    assert_trains_as_trainer(tmp_path, sampled_by(SAMPLERS[name]), **options)


@pytest.mark.parametrize("workers", [{}, PERSISTENT], ids=["alone", "workers"])
@pytest.mark.parametrize("name", ["weighted_by_a_generator", "fewer", "more", "told_the_epoch"])
def test_every_index_of_a_sampler_is_trained_on_as_often_as_it_says(tmp_path, name, workers):
    data, own = indexed(), sampled_by(SAMPLERS[name])
    trainer = grown(tmp_path, own, dataset=data, num_train_epochs=4, **workers)
    again = SAMPLERS[name](data)  # one with a generator of its own goes on with every epoch
    assert_each_epoch_trains_on(trainer.samples, [list(again) for _ in range(4)])


def test_the_last_samples_are_dropped_as_the_batch_grows(tmp_path):
    trainer = grown(tmp_path, dataloader_drop_last=True, train_sampling_strategy="sequential")
    assert_each_epoch_trains_on(trainer.samples, [range(60)] * 3)


# Where persistent workers go on to the next epoch, the loader draws its order and then puts torch's
# generator back, so that it draws the same again.
DRAWS_AGAIN = "persistent workers: what a sampler draws from torch's generator is taken back"


@pytest.mark.parametrize(
    ("own", "options"),
    [
        (None, {"train_sampling_strategy": "group_by_length"}),
        (None, {"accelerator_config": {"use_seedable_sampler": False}}),
        (sampled_by(weighted), {}),
    ],
    ids=["group_by_length", "unseeded", "weighted"],
)
def test_persistent_workers_and_a_sampler_that_draws_train_as_the_trainer(tmp_path, own, options):
    assert_trains_as_trainer(tmp_path, own, **PERSISTENT, **options)


def test_persistent_workers_and_a_sampler_that_draws_shuffle_every_epoch_anew(tmp_path):
    trainer = grown(
        tmp_path,
        **PERSISTENT,
        model=llama(dropout=0.0),  # so that nothing else draws
        accelerator_config={"use_seedable_sampler": False},
    )
    epochs = {tuple(trainer.samples[61 * i : 61 * (i + 1)]) for i in range(3)}
    assert len(epochs) == 3


def test_persistent_workers_and_a_sampler_with_a_generator_train_as_the_trainer(tmp_path):
    assert_trains_as_trainer(
        tmp_path, sampled_by(SAMPLERS["weighted_by_a_generator"]), **PERSISTENT
    )


def test_batches_that_are_balanced_beforehand_are_refused(tmp_path):
    trainer = constant(tmp_path, train_sampling_strategy="batch_rebalance")
    with pytest.raises(ValueError, match=r"batch_sampler \(BatchRebalanceSampler\)"):
        trainer.train()


def test_a_sampler_without_indices_is_refused(tmp_path):
    with pytest.raises(ValueError, match="sampler"):
        constant(tmp_path, sampled_by(lambda data: Listed([]))).train()


# ------------------------------------------------------------------------- accelerator


ACCELERATOR = {
    "even_batches": {"even_batches": False},
    "unseeded": {"use_seedable_sampler": False},
    "non_blocking": {"non_blocking": True},
    "dispatched": {"dispatch_batches": True},
    "dispatched_unseeded": {"dispatch_batches": True, "use_seedable_sampler": False},
    "not_dispatched": {"dispatch_batches": False},
    "split": {"split_batches": True},
    "accumulated": {"gradient_accumulation_kwargs": {"num_steps": 2}},
}


@pytest.mark.parametrize("name", ACCELERATOR)
def test_accelerator_config_does_what_it_does_under_the_trainer(tmp_path, name):
    """The Trainer writes into the innermost dictionary, so each gets its own."""
    one, other = [tmp_path / "plain", tmp_path / "adaptive"]
    config = [
        {k: v.copy() if k[0] == "g" else v for k, v in ACCELERATOR[name].items()} for _ in "12"
    ]
    args = arguments(one, TrainingArguments, accelerator_config=config[0])
    first = Trainer(model=llama(), args=args, **uneven())
    first.train()
    second = constant(other, accelerator_config=config[1], num_train_epochs=2)
    second.train()
    assert_equal(first, second)
    assert first.state.global_step == (10 if name == "accumulated" else 20)


@pytest.mark.parametrize("options", [{"data_seed": 3}, WORKERS], ids=["data_seed", "workers"])
def test_an_unseeded_sampler_orders_training_as_under_the_trainer(tmp_path, options):
    assert_trains_as_trainer(
        tmp_path, accelerator_config={"use_seedable_sampler": False}, **options
    )


@pytest.mark.parametrize("name", ["unseeded", "dispatched"])
def test_every_sample_is_trained_on_once_whatever_accelerator_config_says(tmp_path, name):
    trainer = grown(tmp_path, accelerator_config=ACCELERATOR[name])
    assert_each_epoch_trains_on(trainer.samples, [range(61)] * 3)


def test_workers_that_hand_over_out_of_order_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"dataloader_in_order \(False\)"):
        constant(tmp_path, dataloader_in_order=False, **WORKERS).train()


# ----------------------------------------------------------------- loaders of one's own


def seeded_worker(worker):
    random.seed(worker)
    torch.manual_seed(7 + worker)


def pad_noisily(rows):
    """Draws, as a collator that masks tokens does."""
    batch = pad(rows)
    noise = torch.randint(0, 2, batch["input_ids"].shape)
    batch["input_ids"] = (batch["input_ids"] + noise) % 32
    return batch


def loaded_by(kind=DataLoader, **options):
    def get_train_dataloader(self):
        given = {"batch_size": 4, "collate_fn": self.data_collator, **options}
        if "generator" in given:
            given["generator"] = own_generator()
        return kind(self.train_dataset, **given)

    return {"get_train_dataloader": get_train_dataloader}


def noisy():
    return {**uneven(), "data_collator": pad_noisily}


LOADERS = {
    "in_order": {},
    "shuffled": {"shuffle": True},
    "shuffled_by_a_generator": {"shuffle": True, "generator": True},
    "drop_last": {"shuffle": True, "drop_last": True},
    "workers": {"num_workers": 2, "shuffle": True, "prefetch_factor": 3},
    "workers_and_a_generator": {"num_workers": 2, "shuffle": True, "generator": True},
    "worker_init_fn": {"num_workers": 2, "worker_init_fn": seeded_worker},
    "persistent": {"num_workers": 2, "persistent_workers": True, "worker_init_fn": seeded_worker},
}


@pytest.mark.parametrize("options", LOADERS.values(), ids=LOADERS)
def test_a_loader_of_ones_own_trains_as_under_the_trainer(tmp_path, options):
    assert_trains_as_trainer(
        tmp_path, loaded_by(**options), data=noisy, gradient_accumulation_steps=2
    )


@pytest.mark.slow
@pytest.mark.parametrize("whose", ["loader", "argument"])
def test_workers_that_are_spawned_train_as_under_the_trainer(tmp_path, whose):
    own = loaded_by(num_workers=1, multiprocessing_context="spawn", worker_init_fn=seeded_worker)
    options = {"dataloader_num_workers": 1, "dataloader_multiprocessing_context": "spawn"}
    chosen = {"own": own} if whose == "loader" else options
    assert_trains_as_trainer(tmp_path, data=noisy, num_train_epochs=1, **chosen)


def test_what_a_loader_was_made_with_reaches_the_one_that_fetches(tmp_path, monkeypatch):
    made = []

    class Noted(DataLoader):
        def __init__(self, dataset, **options):
            made.append(options)
            super().__init__(dataset, **options)

    monkeypatch.setattr(loader_module, "DataLoader", Noted)
    options = {
        "num_workers": 1,
        "prefetch_factor": 5,
        "persistent_workers": True,
        "timeout": 50,
        "worker_init_fn": seeded_worker,
        "pin_memory": False,
        "collate_fn": pad_noisily,
    }
    constant(tmp_path, loaded_by(**options)).train()
    assert {name: made[0][name] for name in options} == options


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true")
def test_pinned_memory_is_asked_for_where_the_loader_does(tmp_path, monkeypatch):
    asked = []

    class Noted(DataLoader):
        def __init__(self, dataset, **options):
            asked.append(options["pin_memory"])
            super().__init__(dataset, **options)

    monkeypatch.setattr(loader_module, "DataLoader", Noted)
    constant(tmp_path, loaded_by(pin_memory=True), num_train_epochs=1).train()
    constant(tmp_path, num_train_epochs=1, dataloader_pin_memory=False).train()
    assert asked == [True, False]


class Changing(DataLoader):
    """Does something to every batch that it made."""

    def __iter__(self):
        for batch in super().__iter__():
            yield {**batch, "input_ids": (batch["input_ids"] + 1) % 32}


class Wrapped:
    """A loader around another."""

    def __init__(self, *args, **options):
        self.loader = DataLoader(*args, **options)
        self.dataset = self.loader.dataset

    def __len__(self):
        return len(self.loader)

    def __iter__(self):
        return iter(self.loader)


@pytest.mark.parametrize("kind", [Changing, Wrapped])
def test_a_loader_that_cannot_be_taken_apart_is_refused(tmp_path, kind):
    with pytest.raises(ValueError, match="train dataloader"):
        constant(tmp_path, loaded_by(kind)).train()


class Stream(IterableDataset):
    def __iter__(self):
        return iter(sequences(37, uneven=True))


def test_a_loader_of_a_stream_that_drops_the_last_is_refused(tmp_path):
    trainer = constant(
        tmp_path,
        loaded_by(drop_last=True),
        data=lambda: {**uneven(), "train_dataset": Stream()},
        max_steps=25,
    )
    with pytest.raises(ValueError, match=r"drop_last \(True\) must be False for a stream"):
        trainer.train()


def test_a_loader_that_was_not_prepared_hears_of_its_epoch(tmp_path):
    """Under the Trainer it does not, and the sampler gives the same order in every epoch."""
    sampler = ByEpoch(range(37))
    constant(tmp_path, loaded_by(sampler=sampler)).train()
    assert sampler.epoch == 2


# ------------------------------------------------------------------ datasets, collators


class Rows(Dataset):
    """A dataset of torch; the epoch that it is told moves it on."""

    def __init__(self, count=37, *, broken=None):
        self.rows, self.broken, self.epoch = list(indexed(count)), broken, 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        if index == self.broken:
            raise KeyError("this sample is broken")
        return self.rows[(index + self.epoch) % len(self.rows)]


class RowsAtOnce(Rows):
    def __getitems__(self, indices):
        return [self[index] for index in indices]


@pytest.mark.parametrize("workers", [{}, WORKERS, PERSISTENT], ids=["alone", "workers", "persist"])
@pytest.mark.parametrize("kind", [Rows, RowsAtOnce])
def test_a_dataset_of_torch_trains_as_under_the_trainer(tmp_path, kind, workers):
    assert_trains_as_trainer(
        tmp_path, data=lambda: {"train_dataset": kind(), "data_collator": pad}, **workers
    )


@pytest.mark.parametrize("workers", [{}, WORKERS], ids=["alone", "workers"])
def test_a_dataset_hears_of_each_epoch_once_as_the_batch_grows(tmp_path, workers):
    trainer = grown(
        tmp_path, dataset=RowsAtOnce(61), train_sampling_strategy="sequential", **workers
    )
    expected = [(i + epoch) % 61 for epoch in range(3) for i in range(61)]
    assert trainer.samples == expected


def pad_by_index(rows):
    """Needs a column that the model does not take."""
    batch = pad(rows)
    batch["input_ids"] = (batch["input_ids"] + rows[0]["index"]) % 32
    return batch


@pytest.mark.parametrize("kind", [indexed, Rows])
def test_a_collator_gets_the_columns_that_it_needs(tmp_path, kind):
    assert_trains_as_trainer(
        tmp_path,
        data=lambda: {"train_dataset": kind(37), "data_collator": pad_by_index},
        remove_unused_columns=False,
    )


@pytest.mark.parametrize("kind", [indexed, Rows])
def test_columns_that_the_model_does_not_take_are_removed(tmp_path, kind):
    seen = set()

    def noting(rows):
        seen.update(*rows)
        return pad(rows)

    data = {"train_dataset": kind(37), "data_collator": noting}
    constant(tmp_path, data=lambda: data).train()
    assert seen == {"input_ids", "labels"}


@pytest.mark.parametrize("workers", [WORKERS, PERSISTENT], ids=["workers", "persistent"])
def test_a_collator_that_draws_in_workers_draws_as_under_the_trainer(tmp_path, workers):
    assert_trains_as_trainer(tmp_path, data=noisy, gradient_accumulation_steps=2, **workers)


def test_a_collator_that_draws_beside_a_model_that_does_not_draws_as_under_the_trainer(tmp_path):
    assert_trains_as_trainer(tmp_path, data=lambda: {**noisy(), "model": llama(dropout=0.0)})


def test_a_collator_and_a_model_that_draw_in_one_process_draw_in_turn(tmp_path):
    """accelerate's loader collates one batch ahead, so that a resumed run would draw otherwise."""
    with pytest.raises(AssertionError):
        assert_trains_as_trainer(tmp_path, data=noisy)


# ----------------------------------------------------------------------------- workers


def test_persistent_workers_survive_every_growth(tmp_path):
    trainer = grown(tmp_path, **PERSISTENT)
    assert len(set.union(*(workers for _, workers, _ in trainer.noted))) == 2
    assert_each_epoch_trains_on(trainer.samples, [range(61)] * 3)


def test_workers_survive_every_growth_in_their_epoch(tmp_path):
    trainer = grown(tmp_path, **WORKERS)
    epochs = [[], [], []]
    done = 0
    for samples, workers, size in trainer.noted:
        epochs[done // 61].append((workers, size))
        done += len(samples)
    assert len({size for _, size in epochs[0]}) > 1  # it grew there
    assert [len(set.union(*(workers for workers, _ in epoch))) for epoch in epochs] == [2, 2, 2]


class Interrupting(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3:
            raise KeyboardInterrupt


@pytest.mark.parametrize("workers", [WORKERS, PERSISTENT], ids=["workers", "persistent"])
@pytest.mark.parametrize("schedule", [CONSTANT, GROWING], ids=["constant", "growing"])
def test_an_interrupt_leaves_no_workers_and_a_trainer_that_can_be_used(tmp_path, workers, schedule):
    trainer = AdaptiveBatchTrainer(
        model=llama(),
        args=arguments(tmp_path, **schedule, **workers),
        callbacks=[Interrupting()],
        **uneven(),
    )
    with pytest.raises(KeyboardInterrupt) as interrupted:
        trainer.train()
    assert interrupted.tb is not None  # its frames hold the loader, and yet:
    assert not multiprocessing.active_children()
    trainer.remove_callback(Interrupting)
    trainer.train()
    assert trainer.run.clock.samples_seen == 74
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("workers", [{}, WORKERS, PERSISTENT], ids=["alone", "workers", "persist"])
def test_a_sample_that_raises_is_told_and_leaves_no_workers(tmp_path, workers):
    data = Rows(broken=11)
    trainer = constant(
        tmp_path, data=lambda: {"train_dataset": data, "data_collator": pad}, **workers
    )
    with pytest.raises(KeyError, match="this sample is broken"):
        trainer.train()
    assert not multiprocessing.active_children()
    data.broken = None
    trainer.train()
    assert trainer.run.clock.samples_seen == 3 * 37


def test_training_twice_with_workers_goes_on_as_under_the_trainer(tmp_path):
    own = sampled_by(SAMPLERS["weighted_by_a_generator"])
    args = arguments(tmp_path / "plain", TrainingArguments, num_train_epochs=3, **PERSISTENT)
    one = kinds(own)[0](model=llama(), args=args, **uneven())
    one.train()
    one.train()
    end_workers(one)
    other = constant(tmp_path / "adaptive", own, **PERSISTENT)
    other.train()
    other.train()
    assert not multiprocessing.active_children()
    assert_equal(one, other)


class Counting(TrainerCallback):
    def __init__(self):
        self.children = []

    def on_epoch_end(self, args, state, control, **kwargs):
        self.children.append(len(multiprocessing.active_children()))


def test_workers_that_do_not_persist_go_with_their_epoch(tmp_path):
    counting = Counting()
    constant(tmp_path, data=lambda: {**uneven(), "callbacks": [counting]}, **WORKERS).train()
    assert counting.children == [0, 0, 0]
