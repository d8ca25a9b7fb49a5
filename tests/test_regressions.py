"""Defects that a review found, one test each: a single process. Those of ranks have their own file.

What the tests would see is shown by companions that put the old behaviour back, where that is easy.
"""

from __future__ import annotations

import json
import logging
import math
import pickle
from types import SimpleNamespace

import pytest
import torch
from datasets.distributed import split_dataset_by_node
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info
from transformers import Trainer as PlainTrainer
from transformers import TrainerCallback
from transformers.trainer_callback import ProgressCallback

from hf_adaptive_batch import AdaptiveBatchMixin, AdaptiveBatchTrainer
from hf_adaptive_batch.apply.sampler import StepSampler
from hf_adaptive_batch.apply.stream import Place, ReadRound, StreamReader
from hf_adaptive_batch.checkpoint import STATE_FILE
from hf_adaptive_batch.progress import SampleProgressCallback
from hf_adaptive_batch.ranks import Ranks
from hf_adaptive_batch.saving import HostedSavingMixin

from .cases import GROWING, adaptive, arguments, llama, pad, same_weights, sequences, weights
from .test_resume import assert_same, changes, finished, padded, resumed, uninterrupted
from .test_trainer_streams import Rows, StatefulRows, _not_for_ever, hf, on  # noqa: F401


def rows_stream():
    return on(Rows)


def stateful_stream():
    return on(StatefulRows)


DATA = {"map": padded, "stream": rows_stream, "stateful_stream": stateful_stream}


# ------------------------------------------------------------- 1. saving in the middle of a step


class Saving(TrainerCallback):
    """Saves at once in one event of one step, as a process that is told to end may do."""

    def __init__(self, event, step):
        self.trainer, self.step = None, step
        setattr(self, event, self.save)

    def save(self, args, state, control, **kwargs):
        if state.global_step == self.step - 1:
            self.trainer._save_checkpoint(self.trainer.model, None)


def trained_with(callback, folder, data, **options):
    trainer = adaptive(folder, trainer={**data(), "callbacks": [callback]}, **options)
    callback.trainer = trainer
    trainer.train()
    return finished(trainer, folder)


IN_A_STEP = ["on_step_begin", "on_substep_end", "on_pre_optimizer_step"]
STEP = 4


@pytest.mark.parametrize("event", IN_A_STEP)
@pytest.mark.parametrize("data", DATA.values(), ids=DATA)
def test_what_is_saved_in_the_middle_of_a_step_is_saved_at_its_end(tmp_path, data, event):
    options = {**GROWING, "max_steps": 16}
    run = uninterrupted(tmp_path / "run", trainer=data, **options)
    saving = trained_with(Saving(event, STEP), tmp_path / "saving", data, **options)
    assert [f.name for f in saving.folder.glob("checkpoint-*")] == [f"checkpoint-{STEP}"]
    assert_same(run, saving)
    assert_same(run, resumed(saving, STEP, tmp_path / "resumed", trainer=data, **options))


def test_a_save_in_the_middle_of_a_step_would_be_seen(tmp_path, monkeypatch):
    monkeypatch.delattr(HostedSavingMixin, "_save_checkpoint")
    options = {**GROWING, "max_steps": 16}
    run = uninterrupted(tmp_path / "run", trainer=stateful_stream, **options)
    saving = Saving("on_pre_optimizer_step", STEP)
    saved = trained_with(saving, tmp_path / "saving", stateful_stream, **options)
    other = resumed(saved, STEP - 1, tmp_path / "resumed", trainer=stateful_stream, **options)
    assert not same_weights(run.weights, other.weights)


class Terminated(TrainerCallback):
    """What SIGTERM does under `enable_jit_checkpoint`, some time after a step."""

    trainer = None

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == STEP - 1:  # the callback that looks stands before this one
            (jit,) = [
                c for c in self.trainer.callback_handler.callbacks if hasattr(c, "jit_manager")
            ]
            jit.jit_manager.is_checkpoint_requested = True


@pytest.mark.parametrize("data", DATA.values(), ids=DATA)
def test_the_checkpoint_of_a_process_that_is_told_to_end_resumes_bitwise(tmp_path, data):
    options = {**GROWING, "max_steps": 16}
    run = uninterrupted(tmp_path / "run", trainer=data, **options)
    folder = tmp_path / "ended"
    ended = trained_with(Terminated(), folder, data, enable_jit_checkpoint=True, **options)
    assert ended.steps == STEP
    trainer = adaptive(folder, trainer=data(), **options)
    torch.rand(5)
    trainer.train(resume_from_checkpoint=True)
    assert_same(run, finished(trainer, folder))


class SavingAgain(TrainerCallback):
    """Saves when a resumed epoch begins, before anything is read."""

    trainer = None

    def on_epoch_begin(self, args, state, control, **kwargs):
        if state.global_step == STEP:
            self.trainer._save_checkpoint(self.trainer.model, None)


def still(data):
    """Without dropout: the Trainer restores the random state later than this saves it."""
    return lambda: {**data(), "model": llama(dropout=0.0)}


SAVED_AGAIN = [
    padded,
    rows_stream,
    stateful_stream,
]


@pytest.mark.parametrize("data", SAVED_AGAIN, ids=DATA)
def test_what_is_saved_before_a_resumed_epoch_goes_on_resumes(tmp_path, data):
    options = {**GROWING, "max_steps": 16}
    run = uninterrupted(tmp_path / "run", trainer=still(data), **options)
    again = SavingAgain()
    trainer = adaptive(
        tmp_path / "again", trainer={**still(data)(), "callbacks": [again]}, **options
    )
    again.trainer = trainer
    trainer.train(resume_from_checkpoint=str(run.folder / f"checkpoint-{STEP}"))
    saved = run._replace(folder=tmp_path / "again")
    other = resumed(saved, STEP, tmp_path / "resumed", trainer=still(data), **options)
    assert same_weights(other.weights, run.weights)


# ---------------------------------------------------------------- 2. readers in spawned workers


class Numbers(IterableDataset):
    def __init__(self, samples):
        self.samples = samples

    def __iter__(self):
        return iter(range(self.samples))


def sent(reader):
    return pickle.loads(pickle.dumps(reader))


def test_a_reader_in_another_process_finds_nothing_in_an_empty_stream():
    found = sent(StreamReader(Numbers(0), Ranks()))(ReadRound(4, Place(0)))
    assert found.samples == []
    assert (found.size, found.read, found.place.following) == (0, 0, None)


def test_a_reader_in_another_process_lets_a_real_sample_stand_in_where_its_part_ended():
    reader = sent(StreamReader(Numbers(3), Ranks(0, 2), split=True))
    found = [reader(ReadRound(4, Place(0))), reader(ReadRound(4, None)), reader(ReadRound(4, None))]
    assert [(round_.samples, round_.size) for round_ in found] == [([0, 1], 2), ([2], 1), ([2], 0)]


def test_a_reader_in_another_process_that_begins_at_the_end_lets_a_real_sample_stand_in():
    reader = sent(StreamReader(Numbers(3), Ranks(0, 2), split=True))
    found = reader(ReadRound(4, Place(0, offset=3)))
    assert (found.samples, found.size) == ([0], 0)


# ------------------------------------------------------------- 3. rounds still to be replayed


class Noting:
    """A collator that keeps what it was given."""

    def __init__(self):
        self.micro_batches = []

    def __call__(self, rows):
        self.micro_batches.append([row["input_ids"] for row in rows])
        return pad(rows)


def micro_batches_of_two_resumes(tmp_path):
    """Those of a run resumed right after a growth, and of one resumed a step later from it."""
    ahead = {"dataloader_num_workers": 2, "dataloader_prefetch_factor": 4}
    options = {**GROWING, "eta": 0.3, "num_train_epochs": 3}
    run = uninterrupted(tmp_path / "run", trainer=padded, **options, **ahead)
    step = changes(run)[0]
    state = json.loads((run.folder / f"checkpoint-{step}" / STATE_FILE).read_text())
    assert len(state["loader"]["pending"]) > 4
    found, folder = [], run.folder
    for number in range(2):
        noting = Noting()
        trainer = adaptive(
            tmp_path / f"{number}",
            trainer={**padded(), "data_collator": noting},
            save_strategy="steps",
            save_steps=1,
            **options,
        )
        trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{step + number}"))
        found.append(noting.micro_batches)
        folder = tmp_path / f"{number}"
    return found


def test_rounds_still_to_be_replayed_survive_a_second_save(tmp_path):
    first, second = micro_batches_of_two_resumes(tmp_path)
    assert 0 < len(second) < len(first)
    assert first[-len(second) :] == second


def test_rounds_that_are_forgotten_at_a_second_save_would_be_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(StepSampler, "waiting", property(lambda sampler: [*sampler.pending]))
    first, second = micro_batches_of_two_resumes(tmp_path)
    assert first[-len(second) :] != second


# ----------------------------------------------------------------- 4. what a worker_init_fn sees


class Opened(Dataset):
    """Reads from what a `worker_init_fn` has opened."""

    def __init__(self):
        self.rows, self.opened = sequences(40).to_list(), None

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        if self.opened != len(self.rows):
            raise RuntimeError(f"opened: {self.opened}")
        return self.rows[index]


class OpenedStream(Opened, IterableDataset):
    def __iter__(self):
        return (self[index] for index in range(len(self)))


def open_in_worker(worker):
    data = get_worker_info().dataset
    data.opened = len(data)


class WithInit(AdaptiveBatchTrainer):
    def get_train_dataloader(self):
        return DataLoader(
            self.train_dataset,
            batch_size=4,
            num_workers=1,
            worker_init_fn=open_in_worker,
            collate_fn=pad,
        )


@pytest.mark.parametrize("kind", [Opened, OpenedStream])
def test_a_worker_init_fn_sees_the_users_dataset_where_the_batch_can_change(tmp_path, kind):
    args = arguments(tmp_path, **{**GROWING, "num_train_epochs": 1})
    trainer = WithInit(model=llama(), args=args, train_dataset=kind(), data_collator=pad)
    trainer.train()
    assert trainer.run.controller.can_change
    assert trainer.run.clock.samples_seen == 40
    assert trainer.num_examples(trainer.run.loader) == 40
    assert trainer.train_dataset.opened is None  # in this process nobody has opened it


# --------------------------------------------------------------------------- 5. a frozen model


@pytest.mark.parametrize("data", DATA.values(), ids=DATA)
def test_a_model_that_is_frozen_is_refused_at_start(tmp_path, data):
    with pytest.raises(ValueError, match="model must have a trainable parameter"):
        adaptive(tmp_path, trainer={**data(), "model": llama().requires_grad_(False)}, max_steps=3)


# ---------------------------------------------------------------------------- 6. another seed


@pytest.mark.parametrize("data", [rows_stream, stateful_stream])
def test_a_stream_resumes_with_another_seed(tmp_path, data):
    options = {**GROWING, "max_steps": 12}
    run = uninterrupted(tmp_path / "run", trainer=data, **options)
    other = resumed(run, 3, tmp_path / "other", trainer=data, **options, seed=7)
    assert other.steps == run.steps
    assert other.sizes == run.sizes


def shuffled_by(seed):
    return lambda: {**on(hf), "train_dataset": hf(37).shuffle(seed=seed, buffer_size=9)}


def test_a_stream_in_the_order_of_another_seed_is_refused(tmp_path):
    options = {**GROWING, "max_steps": 12}
    run = uninterrupted(tmp_path / "run", trainer=shuffled_by(42), **options)
    with pytest.raises(ValueError, match="must be the sample that was to come next"):
        resumed(run, 3, tmp_path / "other", trainer=shuffled_by(7), **options, seed=7)


def test_another_seed_of_map_style_data_is_refused(tmp_path):
    run = uninterrupted(tmp_path / "run", trainer=padded, max_steps=5)
    with pytest.raises(ValueError, match=r"seed, or data_seed, \(7\) must be .* \(42\)"):
        resumed(run, 3, tmp_path / "other", trainer=padded, max_steps=5, seed=7)


# -------------------------------------------------------- 7. budgets and the epochs of a stream


@pytest.mark.parametrize("budget", [18, 50, 71])
def test_a_budget_of_a_split_stream_is_exceeded_by_less_than_a_round(tmp_path, budget):
    data = split_dataset_by_node(hf(200), rank=0, world_size=1)
    options = {**GROWING, "max_micro_batch_size": 4, "max_global_batch_size": 64}
    trainer = adaptive(
        tmp_path,
        trainer={"train_dataset": data, "data_collator": pad},
        max_train_samples=budget,
        **{**options, "gradient_accumulation_steps": 4},
    )
    trainer.train()
    assert trainer.run.loader.source.split
    assert budget <= trainer.run.clock.samples_seen < budget + 4


class EpochEnds(TrainerCallback):
    def __init__(self):
        self.steps = []

    def on_epoch_end(self, args, state, control, **kwargs):
        self.steps.append(state.global_step)


class Lengths(IterableDataset):
    """The samples that are looked at to estimate a step's tokens are longer than the others."""

    def __init__(self, long, short):
        self.lengths = [8] * long + [2] * short

    def __iter__(self):
        for length in self.lengths:
            yield {"input_ids": [1] * length, "labels": [1] * length}


TOKENS = {  # budget, and the steps where an epoch ends
    "in_the_first_epoch": (Lengths(64, 400), 64 * 8 + 144 * 2, [52]),
    "in_the_third": (Lengths(30, 0), 30 * 8 * 2 + 12 * 8, [8, 16, 19]),
}


@pytest.mark.parametrize(("data", "budget", "ends"), TOKENS.values(), ids=TOKENS)
@pytest.mark.parametrize("schedule", ["constant", "norm_test"])
def test_an_epoch_of_a_stream_ends_only_where_the_stream_or_the_budget_does(
    tmp_path, data, budget, ends, schedule
):
    noted = EpochEnds()
    trainer = adaptive(
        tmp_path,
        trainer={"train_dataset": data, "data_collator": pad, "callbacks": [noted]},
        max_train_tokens=budget,
        batch_schedule=schedule,
        batch_warmup_samples=10**6,
    )
    trainer.train()
    assert noted.steps == ends
    assert trainer.run.clock.tokens_seen >= budget


# -------------------------------------------------------- 8. the learning rate after a resume


def even():
    return {"train_dataset": sequences(400), "data_collator": pad}


RATES = {
    "linear": lambda t, total: 1 - t / total,
    "cosine": lambda t, total: 0.5 * (1 + math.cos(math.pi * t / total)),
}
CHANGED = {
    "nothing": ({}, {}),
    "only_the_model_was_saved": ({"save_only_model": True}, {}),
    "more_steps": ({}, {"max_steps": 60}),
    "fewer_steps": ({}, {"max_steps": 25}),
    "cosine": ({}, {"lr_scheduler_type": "cosine"}),
    "all": ({"save_only_model": True}, {"max_steps": 60, "lr_scheduler_type": "cosine"}),
}


@pytest.mark.parametrize(("before", "after"), CHANGED.values(), ids=CHANGED)
def test_the_learning_rate_after_a_resume_is_that_of_the_clock(tmp_path, before, after):
    options = {**GROWING, "max_steps": 40, "lr_scheduler_type": "linear"}
    run = uninterrupted(tmp_path / "run", trainer=even, **options, **before)
    step = changes(run)[0] + 1
    now = {**options, **after}
    other = resumed(run, step, tmp_path / "other", trainer=even, **now)
    done = [0, *other.records["samples_seen"]]
    assert done[step] > 4 * step  # it has grown
    for number in range(step, other.steps):
        rate = RATES[now["lr_scheduler_type"]](done[number] / 4, now["max_steps"])
        assert other.records["learning_rate"][number] == pytest.approx(3e-3 * rate, rel=1e-9)


def stepped():
    model = llama()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=3, gamma=0.5)
    return {**even(), "model": model, "optimizers": (optimizer, schedule)}


def test_the_rate_of_a_schedule_of_whole_steps_is_that_of_the_clock_without_its_state(tmp_path):
    options = {**GROWING, "max_steps": 16}
    run = uninterrupted(tmp_path / "run", trainer=stepped, save_only_model=True, **options)
    step = changes(run)[0] + 1
    assert run.records["learning_rate"][step] < 0.1
    other = resumed(run, step, tmp_path / "other", trainer=stepped, **options)
    assert other.records["learning_rate"] == run.records["learning_rate"]


# ------------------------------------------------------------------------ 9. budgets at a resume

ENOUGH = {"stream": rows_stream, "map": padded}


@pytest.mark.parametrize("data", ENOUGH.values(), ids=ENOUGH)
def test_a_budget_that_was_changed_is_told(tmp_path, data, caplog):
    run = uninterrupted(tmp_path / "run", trainer=data, max_train_samples=40, **GROWING)
    assert "budget" not in caplog.text
    with caplog.at_level(logging.WARNING, logger="hf_adaptive_batch.run_state"):
        resumed(run, 3, tmp_path / "same", trainer=data, max_train_samples=40, **GROWING)
        assert "budget" not in caplog.text
        other = resumed(run, 3, tmp_path / "other", trainer=data, max_train_samples=70, **GROWING)
    assert "The budget is 70 samples; it was 40 samples in the checkpoint." in caplog.text
    assert other.history[-1]["adaptive_batch/samples_seen"] == 70


USED_UP = {
    "samples": {"max_train_samples": 20},
    "tokens": {"max_train_tokens": 60},
    "steps": {"max_steps": 4},
}


@pytest.mark.parametrize("budget", USED_UP.values(), ids=USED_UP)
@pytest.mark.parametrize("data", ENOUGH.values(), ids=ENOUGH)
def test_a_budget_that_is_used_up_already_is_told(tmp_path, data, budget, caplog):
    run = uninterrupted(tmp_path / "run", trainer=data, max_train_samples=50, **GROWING)
    with caplog.at_level(logging.WARNING, logger="hf_adaptive_batch.run_state"):
        other = resumed(run, run.steps, tmp_path / "other", trainer=data, **budget, **GROWING)
    assert "Nothing is left to train on: the checkpoint has seen 50 samples" in caplog.text
    assert other.steps == run.steps
    assert same_weights(other.weights, run.weights)


# ------------------------------------------------------------------- 10. checkpoints in pieces

PIECES = ["trainer_state.json", STATE_FILE, "rng_state.pth", "optimizer.pt", "scheduler.pt"]


@pytest.fixture(scope="module")
def run_to_break(tmp_path_factory):
    return uninterrupted(tmp_path_factory.mktemp("pieces"), max_steps=3, **GROWING)


def resume_broken(run, tmp_path, name, break_it):
    """Resume with one file of the checkpoint broken, and then put right again."""
    path = run.folder / "checkpoint-2" / name
    whole = path.read_bytes()
    trainer = adaptive(tmp_path, max_steps=3, **GROWING)
    before = weights(trainer)
    break_it(path)
    try:
        trainer.train(resume_from_checkpoint=str(path.parent))
    finally:
        path.write_bytes(whole)
        assert same_weights(weights(trainer), before)


@pytest.mark.parametrize("name", PIECES)
def test_a_checkpoint_with_a_file_that_is_cut_is_refused(run_to_break, tmp_path, name):
    def cut(path):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    with pytest.raises(
        ValueError, match=r"resume_from_checkpoint .*checkpoint-2\) must be complet"
    ):
        resume_broken(run_to_break, tmp_path, name, cut)


@pytest.mark.parametrize("name", ["trainer_state.json", "rng_state.pth"])
def test_a_checkpoint_that_lacks_a_file_is_refused(run_to_break, tmp_path, name):
    with pytest.raises(
        ValueError, match=r"resume_from_checkpoint .*checkpoint-2\) must be complet"
    ):
        resume_broken(run_to_break, tmp_path, name, lambda path: path.unlink())


def test_a_checkpoint_without_our_state_is_that_of_another_trainer(run_to_break, tmp_path):
    with pytest.raises(ValueError, match="saved by another Trainer"):
        resume_broken(run_to_break, tmp_path, STATE_FILE, lambda path: path.unlink())


# --------------------------------------------------------------------------- 11. the progress bar


def test_the_bar_shows_the_other_metrics_of_an_evaluation():
    run = SimpleNamespace(clock=SimpleNamespace(samples_seen=1234))
    callback, lines = SampleProgressCallback(run, ProgressCallback()), []
    callback.training_bar = SimpleNamespace(write=lines.append)
    logs = {
        "eval_loss": 2.5,
        "eval_accuracy": 0.125,
        "eval_matches": 7,
        "eval_runtime": 1.5,
        "eval_samples_per_second": 3.5,
        "eval_steps_per_second": 4.5,
        "epoch": 1.25,
    }
    callback.on_log(None, SimpleNamespace(is_world_process_zero=True), None, logs=logs)
    [line] = lines
    assert line.split() == "1,234 samples eval loss 2.5000 accuracy 0.125 matches 7".split()


# ------------------------------------------------------------------------ 12. data without tokens


def test_a_budget_in_tokens_is_refused_for_data_without_tokens(tmp_path):
    trainer = adaptive(
        tmp_path,
        trainer={"data_collator": lambda rows: {"pixels": torch.ones(len(rows), 3)}},
        max_train_tokens=100,
    )
    with pytest.raises(ValueError, match=r"max_train_tokens \(100\) must be left out"):
        trainer.train()


# -------------------------------------------------------------------------------- 13. base classes


def test_a_trainer_may_have_the_name_of_the_one_it_extends(tmp_path):
    class Trainer(AdaptiveBatchTrainer):
        pass

    class Further(Trainer):
        pass

    for kind in (Trainer, Further):
        trainer = kind(
            model=llama(), args=arguments(tmp_path, max_steps=2), train_dataset=sequences(16)
        )
        trainer.train()
        assert trainer.run.clock.steps == 2


def test_a_mixin_behind_a_trainer_of_any_name_is_refused():
    class Own(PlainTrainer):
        pass

    for base in (PlainTrainer, Own):
        with pytest.raises(TypeError, match=r"bases of Trainer must begin with AdaptiveBatchMixin"):
            type("Trainer", (base, AdaptiveBatchMixin), {})


# ------------------------------------------------------------- 14. streams that are read once only


class Generated(IterableDataset):
    """A generator, which cannot be copied."""

    def __init__(self, samples):
        self.rows = (row for row in sequences(samples).to_list())

    def __iter__(self):
        return self.rows


def test_a_generator_with_a_budget_in_tokens_is_refused(tmp_path):
    trainer = adaptive(tmp_path, trainer=on(Generated), max_train_tokens=100, **GROWING)
    with pytest.raises(ValueError, match=r"max_train_tokens must .*; count in samples or steps"):
        trainer.train()


@pytest.mark.parametrize("schedule", ["constant", "norm_test"])
def test_a_generator_that_ends_before_its_budget_is_told(tmp_path, schedule):
    options = {**GROWING, "batch_schedule": schedule}
    trainer = adaptive(tmp_path, trainer=on(Generated), max_steps=20, **options)
    with pytest.raises(
        ValueError, match=r"epoch 1\) must yield at least one sample in every epoch"
    ):
        trainer.train()
    assert trainer.run.clock.samples_seen == 37
