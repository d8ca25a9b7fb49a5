"""A run that is stopped at any step and resumed is the run that was never stopped, to the last bit.

Losses, gradient norms, learning rates, batch sizes, records and final weights, from every
checkpoint: within an epoch, at its end, and right before, at and right after a change of the batch.
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from hf_adaptive_batch import AdaptiveBatchTrainer, StepLoader, read_records
from hf_adaptive_batch.checkpoint import STATE_FILE, last_complete_checkpoint
from hf_adaptive_batch.report.records import RECORDS_FILE

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


class Run(NamedTuple):
    folder: Path
    history: list[dict[str, Any]]
    weights: dict[str, torch.Tensor]
    steps: int

    @property
    def records(self) -> dict[str, list[Any]]:
        return read_records(self.folder)

    @property
    def sizes(self) -> list[int]:
        """The batch size of each step."""
        key = "adaptive_batch/global_batch_size"
        return [entry[key] for entry in self.history if key in entry]


def finished(trainer, folder) -> Run:
    entries = [entry for entry in history(trainer) if "train_loss" not in entry]
    return Run(Path(folder), entries, weights(trainer), trainer.state.global_step)


def uninterrupted(folder, *, trainer=dict, **options) -> Run:
    """Train to the end, and keep a checkpoint of every step."""
    whole = adaptive(folder, trainer=trainer(), save_strategy="steps", save_steps=1, **options)
    whole.train()
    return finished(whole, folder)


def resumed(run: Run, step: int, folder, *, trainer=dict, **options) -> Run:
    """Train to the end from one of its checkpoints, in another folder and "process"."""
    folder.mkdir()
    if (run.folder / RECORDS_FILE).exists():
        shutil.copy(run.folder / RECORDS_FILE, folder)
    other = adaptive(folder, trainer=trainer(), **options)
    torch.rand(step)  # a new process stands elsewhere in torch's random numbers
    other.train(resume_from_checkpoint=str(run.folder / f"checkpoint-{step}"))
    return finished(other, folder)


def assert_same(first: Run, second: Run) -> None:
    assert second.history == first.history
    assert second.records == first.records
    assert same_weights(second.weights, first.weights)


def assert_resumes_everywhere(tmp_path, **options) -> Run:
    run = uninterrupted(tmp_path / "run", **options)
    for step in range(1, run.steps + 1):
        assert_same(run, resumed(run, step, tmp_path / f"resumed-{step}", **options))
    return run


def changes(run: Run) -> list[int]:
    """Steps whose decision changed the batch."""
    sizes, following = run.records["global_batch_size"], run.records["next_global_batch_size"]
    steps = run.records["step"]
    return [s for s, now, next_ in zip(steps, sizes, following, strict=True) if now != next_]


def padded():
    return {
        "train_dataset": sequences(61, uneven=True),
        "eval_dataset": sequences(8),
        "data_collator": pad,
    }


def mean_loss():
    return {"model": MeanLossModel(), "train_dataset": sequences(61)}


LOADING = {
    "no_workers": {},
    "workers": {"dataloader_num_workers": 2},
    "persistent_workers": {"dataloader_num_workers": 2, "dataloader_persistent_workers": True},
    "deep_prefetch": {"dataloader_num_workers": 1, "dataloader_prefetch_factor": 8},
}


@pytest.mark.parametrize("loading", LOADING.values(), ids=LOADING)
def test_every_checkpoint_resumes_bitwise(tmp_path, loading):
    run = assert_resumes_everywhere(
        tmp_path, trainer=padded, num_train_epochs=3, **GROWING, **loading
    )
    # What this went through: two changes within the first epoch, at least one of which is neither
    # its first nor its last step.
    assert sorted(set(run.sizes)) == [4, 8, 16]
    assert all(1 < step < run.steps for step in changes(run))
    ends = [entry["step"] for entry in run.history if float(entry["epoch"]).is_integer()]
    assert len(ends) == 3


OPTIONS = {
    "accumulated": {"gradient_accumulation_steps": 2, **GROWING},
    "only_accumulation_grows": {**GROWING, "max_micro_batch_size": None},
    "measured_seldom": {**GROWING, "test_interval": 3},
    "published_test": {**GROWING, "norm_test_estimator": "published"},
    "drop_last": {**GROWING, "dataloader_drop_last": True},
    "group_by_length": {**GROWING, "train_sampling_strategy": "group_by_length"},
    "sequential": {**GROWING, "train_sampling_strategy": "sequential"},
    "tokens": {**GROWING, "max_train_tokens": 500},
    "samples": {**GROWING, "max_train_samples": 101},
    "steps": {**GROWING, "max_steps": 23},
    "cosine_with_warmup": {
        **GROWING,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 5,
        "batch_warmup_samples": None,
    },
    "constant": {"batch_schedule": "constant", "gradient_accumulation_steps": 2},
    "constant_with_workers": {
        "batch_schedule": "constant",
        "gradient_accumulation_steps": 3,
        "dataloader_num_workers": 1,
    },
    "shrinking": {**GROWING, "allow_smaller_batch": True, "eta": 0.95, "noise_scale_decay": 0.3},
    "data_seed": {**GROWING, "data_seed": 5},
    "evaluated": {**GROWING, "eval_strategy": "steps", "eval_steps": 0.2},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_every_checkpoint_resumes_bitwise_with(tmp_path, options):
    assert_resumes_everywhere(tmp_path, trainer=padded, **{"num_train_epochs": 1.5, **options})


def test_a_model_with_a_plain_mean_loss_resumes_bitwise(tmp_path):
    assert_resumes_everywhere(tmp_path, trainer=mean_loss, num_train_epochs=1.5, **GROWING)


def test_group_by_length_resumes_bitwise_in_later_epochs(tmp_path):
    """Its sampler draws from torch's generator when an epoch begins."""
    assert_resumes_everywhere(
        tmp_path,
        trainer=padded,
        num_train_epochs=3,
        train_sampling_strategy="group_by_length",
        dataloader_num_workers=1,
        **GROWING,
    )


def own_optimizer():
    model = llama()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=3, gamma=0.5)
    return {
        "model": model,
        "optimizers": (optimizer, schedule),
        "train_dataset": sequences(61),
    }


def test_a_schedule_that_only_knows_whole_steps_resumes_bitwise(tmp_path):
    run = assert_resumes_everywhere(
        tmp_path, trainer=own_optimizer, num_train_epochs=1.5, **GROWING
    )
    assert changes(run)


def test_resuming_from_the_last_checkpoint_of_the_output_folder(tmp_path):
    options = {**GROWING, "num_train_epochs": 1.5, "trainer": padded}
    run = uninterrupted(tmp_path / "run", **options)
    folder = tmp_path / "stopped"
    shutil.copytree(run.folder, folder)
    for step in range(6, run.steps + 1):
        shutil.rmtree(folder / f"checkpoint-{step}")
    trainer = adaptive(folder, **{**options, "trainer": padded()})
    trainer.train(resume_from_checkpoint=True)
    assert_same(run, finished(trainer, folder))


def test_a_run_resumed_twice_is_the_run_that_was_never_stopped(tmp_path):
    options = {**GROWING, "num_train_epochs": 1.5, "trainer": padded}
    run = uninterrupted(tmp_path / "run", **options)
    folder = tmp_path / "stopped"
    shutil.copytree(run.folder, folder)
    for stop in (3, 6):
        trainer = adaptive(
            folder,
            **{**options, "trainer": padded()},
            save_strategy="steps",
            save_steps=1,
        )
        trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{stop}"))
        assert_same(run, finished(trainer, folder))


def test_a_resume_in_an_empty_folder_writes_the_records_from_there_on(tmp_path):
    options = {**GROWING, "num_train_epochs": 1.5, "trainer": padded}
    run = uninterrupted(tmp_path / "run", **options)
    trainer = adaptive(tmp_path / "new", **{**options, "trainer": padded()})
    trainer.train(resume_from_checkpoint=str(run.folder / "checkpoint-5"))
    expected = {
        name: [v for v, step in zip(column, run.records["step"], strict=True) if step > 5]
        for name, column in run.records.items()
    }
    assert read_records(tmp_path / "new") == expected


def test_a_fresh_run_keeps_the_records_of_the_one_before(tmp_path):
    for _ in range(2):
        adaptive(tmp_path, num_train_epochs=1, **GROWING).train()
    kept = tmp_path / RECORDS_FILE.replace(".jsonl", "-1.jsonl")
    assert read_records(kept) == read_records(tmp_path)


def test_fractional_intervals_resume_where_they_were(tmp_path):
    """The loss of a log is averaged since the resume, as under the plain Trainer."""
    options = {
        **GROWING,
        "num_train_epochs": 3,
        "logging_steps": 0.1,
        "eval_strategy": "steps",
        "eval_steps": 0.3,
    }
    run = uninterrupted(tmp_path / "run", trainer=padded, **options)

    def logs(of):
        return [{k: v for k, v in entry.items() if k != "loss"} for entry in of.history]

    for step in range(1, run.steps + 1):
        other = resumed(run, step, tmp_path / f"resumed-{step}", trainer=padded, **options)
        assert logs(other) == logs(run)
        assert same_weights(other.weights, run.weights)


# That the comparison can fail: what the state holds is needed.


@pytest.mark.parametrize("lost", ["pending", "rng_state", "estimator", "plan"])
def test_a_resume_without_a_part_of_the_state_is_seen_to_differ(tmp_path, lost, monkeypatch):
    options = {
        **GROWING,
        "num_train_epochs": 1.5,
        "dataloader_num_workers": 1,
        "dataloader_prefetch_factor": 8,
        "train_sampling_strategy": "group_by_length",
    }
    run = uninterrupted(tmp_path / "run", trainer=padded, **options)
    step = changes(run)[0] + 1
    path = run.folder / f"checkpoint-{step}" / STATE_FILE
    state = json.loads(path.read_text())
    if lost == "pending":
        assert state["loader"]["pending"], "nothing was fetched ahead"
        state["loader"]["pending"] = []
    elif lost == "rng_state":
        assert state["loader"]["source"]["rng_state"] is not None
        state["loader"]["source"]["rng_state"] = None
    elif lost == "estimator":
        state["estimator"]["sums"]["signal"] *= 2
    else:
        state["plan"] = {**state["plan"], "micro_batch_size": 4, "accumulation_steps": 1}
    path.write_text(json.dumps(state))
    if lost == "rng_state":  # the order is another one, and is recognised as that
        with pytest.raises(ValueError, match="order"):
            resumed(run, step, tmp_path / "resumed", trainer=padded, **options)
        return
    with pytest.raises(AssertionError):
        assert_same(run, resumed(run, step, tmp_path / "resumed", trainer=padded, **options))


def test_a_loader_that_draws_again_is_seen_to_differ(tmp_path, monkeypatch):
    """One draw from torch's generator too many, and the dropout of the resumed run is another."""
    run = uninterrupted(tmp_path / "run", **GROWING)
    iterate = StepLoader.__iter__

    def drawing(self):
        torch.rand(())
        return iterate(self)

    monkeypatch.setattr(StepLoader, "__iter__", drawing)
    # On resume the Trainer restores the generator before it asks for the iterator, or after the
    # first batch was fetched; either way the draw must be noticed somewhere.
    differs = []
    for step in range(1, run.steps):
        other = resumed(run, step, tmp_path / f"resumed-{step}", **GROWING)
        differs.append(not same_weights(run.weights, other.weights))
    assert any(differs)


# What is taken from the new arguments.


def test_a_resumed_run_takes_the_cap_of_the_new_arguments(tmp_path):
    run = uninterrupted(tmp_path / "run", **GROWING)
    step = changes(run)[0] + 1
    assert run.sizes[step] > 4
    higher = resumed(run, step, tmp_path / "higher", **{**GROWING, "max_global_batch_size": 32})
    assert max(higher.sizes) == 32
    lower = resumed(run, step, tmp_path / "lower", **{**GROWING, "max_global_batch_size": 4})
    assert set(lower.sizes[step:]) == {4}
    assert lower.history[-1]["adaptive_batch/samples_seen"] == 74


def test_a_resumed_run_takes_the_micro_batch_of_the_new_arguments(tmp_path):
    run = uninterrupted(tmp_path / "run", **GROWING)
    step = changes(run)[-1] + 1
    narrow = resumed(run, step, tmp_path / "narrow", **{**GROWING, "max_micro_batch_size": 4})
    assert set(narrow.records["micro_batch_size"][step:]) == {4}
    assert narrow.sizes == run.sizes


def test_what_was_fetched_ahead_is_cut_to_the_micro_batch_of_the_new_arguments(tmp_path):
    """The reason to lower it is that a larger one did not fit."""
    ahead = {"dataloader_num_workers": 1, "dataloader_prefetch_factor": 8, "num_train_epochs": 4}
    run = uninterrupted(tmp_path / "run", **{**GROWING, **ahead})
    step = next(  # with large micro-batches waiting
        step
        for step in range(1, run.steps)
        if 8
        in json.loads((run.folder / f"checkpoint-{step}" / STATE_FILE).read_text())["loader"][
            "pending"
        ]
    )
    sizes = []

    class Looking(AdaptiveBatchTrainer):
        def training_step(self, model, inputs, *args):
            sizes.append(len(inputs["input_ids"]))
            return super().training_step(model, inputs, *args)

    args = arguments(tmp_path / "narrow", **{**GROWING, **ahead, "max_micro_batch_size": 4})
    trainer = Looking(model=llama(), args=args, train_dataset=sequences(37))
    trainer.train(resume_from_checkpoint=str(run.folder / f"checkpoint-{step}"))
    assert max(sizes) <= 4


def test_a_resumed_run_takes_the_accumulation_of_the_new_arguments(tmp_path):
    options = {"batch_schedule": "constant"}
    run = uninterrupted(tmp_path / "run", **options)
    wider = resumed(run, 4, tmp_path / "wider", **options, gradient_accumulation_steps=3)
    assert wider.sizes[:4] == [4] * 4
    assert set(wider.sizes[4:]) == {12}
    assert wider.history[-1]["adaptive_batch/samples_seen"] == 74


def test_a_resumed_run_takes_the_budget_of_the_new_arguments(tmp_path):
    run = uninterrupted(tmp_path / "run", **GROWING)
    longer = resumed(run, 5, tmp_path / "longer", **{**GROWING, "num_train_epochs": 3})
    assert longer.history[-1]["adaptive_batch/samples_seen"] == 3 * 37
    assert longer.history[-1]["epoch"] == 3.0


def test_a_resumed_run_takes_the_workers_of_the_new_arguments(tmp_path):
    run = uninterrupted(tmp_path / "run", trainer=padded, **GROWING)
    step = changes(run)[0]
    other = resumed(
        run, step, tmp_path / "workers", trainer=padded, **GROWING, dataloader_num_workers=2
    )
    assert other.sizes == run.sizes
    assert other.records["samples_seen"] == run.records["samples_seen"]


def test_a_run_without_growth_so_far_resumes_with_room_to_grow(tmp_path):
    constant = {"batch_schedule": "constant", "gradient_accumulation_steps": 2}
    run = uninterrupted(tmp_path / "run", **constant)
    other = resumed(
        run,
        3,
        tmp_path / "growing",
        **{**GROWING, "gradient_accumulation_steps": 2},
    )
    assert other.sizes[:3] == [8] * 3
    assert max(other.sizes) == 16


BUDGETS = {
    "epochs": {"num_train_epochs": 2},
    "half_epochs": {"num_train_epochs": 1.5},
    "steps": {"max_steps": 13},
    "samples": {"max_train_samples": 50},
    "tokens": {"max_train_tokens": 300},
    "tokens_of_an_epoch": {"max_train_tokens": 37 * 8},
}


@pytest.mark.parametrize("schedule", ["norm_test", "constant"])
@pytest.mark.parametrize("budget", BUDGETS.values(), ids=BUDGETS)
def test_a_run_that_was_finished_trains_no_further(tmp_path, budget, schedule):
    options = {**GROWING, **budget, "batch_schedule": schedule}
    run = uninterrupted(tmp_path / "run", **options)
    again = resumed(run, run.steps, tmp_path / "again", **options)
    assert again.steps == run.steps
    assert same_weights(again.weights, run.weights)


@pytest.mark.parametrize(
    "budget",
    [{"num_train_epochs": 1}, {"max_train_samples": 40}, {"max_train_tokens": 40 * 8}],
    ids=["epochs", "samples", "tokens"],
)
def test_a_budget_that_is_used_up_already_trains_nothing(tmp_path, budget):
    run = uninterrupted(tmp_path / "run", **GROWING)
    step = next(e["step"] for e in run.history if e["adaptive_batch/samples_seen"] > 45)
    other = resumed(run, step, tmp_path / "other", **GROWING, **budget)
    assert other.steps == step


# What is refused.


def checkpoint(tmp_path, step=3, **options) -> Path:
    return uninterrupted(tmp_path / "run", **{**GROWING, **options}).folder / f"checkpoint-{step}"


def test_a_checkpoint_of_the_plain_trainer_is_refused(tmp_path):
    other = plain(tmp_path / "plain", save_strategy="steps", save_steps=5)
    other.train()
    trainer = adaptive(tmp_path / "new", **GROWING)
    before = weights(trainer)
    folder = tmp_path / "plain" / "checkpoint-5"
    with pytest.raises(ValueError, match=f"resume_from_checkpoint.*{folder.name}.*{STATE_FILE}"):
        trainer.train(resume_from_checkpoint=str(folder))
    assert same_weights(weights(trainer), before)
    trainer.train()  # and it can still train


def test_another_size_of_the_dataset_is_refused(tmp_path):
    folder = checkpoint(tmp_path)
    trainer = adaptive(tmp_path / "new", trainer={"train_dataset": sequences(38)}, **GROWING)
    with pytest.raises(ValueError, match=r"train_dataset \(38 samples.*37 samples"):
        trainer.train(resume_from_checkpoint=str(folder))


@pytest.mark.parametrize(
    "other",
    [{"seed": 7}, {"data_seed": 7}, {"seed": 7, "dataloader_num_workers": 2}],
    ids=["seed", "data_seed", "seed_and_workers"],
)
def test_another_seed_is_refused(tmp_path, other):
    folder = checkpoint(tmp_path)
    trainer = adaptive(tmp_path / "new", **GROWING, **other)
    with pytest.raises(ValueError, match=r"seed, or data_seed, \(7\) must be .* \(42\)"):
        trainer.train(resume_from_checkpoint=str(folder))
    gc.collect()  # where an unfinished iterator would complain
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("workers", [0, 2])
def test_another_order_of_the_dataset_is_refused(tmp_path, workers):
    folder = checkpoint(tmp_path)
    other = {"train_sampling_strategy": "sequential", "dataloader_num_workers": workers}
    trainer = adaptive(tmp_path / "new", **GROWING, **other)
    with pytest.raises(ValueError, match=r"order .* must be that of the checkpoint"):
        trainer.train(resume_from_checkpoint=str(folder))
    gc.collect()  # where an unfinished iterator would complain
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("part", [None, "clock", "loader", "estimator"])
def test_a_state_of_another_version_is_refused(tmp_path, part):
    path = checkpoint(tmp_path) / STATE_FILE
    state = json.loads(path.read_text())
    (state[part] if part else state)["version"] = 99
    path.write_text(json.dumps(state))
    trainer = adaptive(tmp_path / "new", **GROWING)
    with pytest.raises(ValueError, match=r"version \(99\)"):
        trainer.train(resume_from_checkpoint=str(path.parent))


def test_a_folder_without_a_checkpoint_is_refused_as_by_the_trainer(tmp_path):
    with pytest.raises(ValueError, match="No valid checkpoint"):
        adaptive(tmp_path, **GROWING).train(resume_from_checkpoint=True)


def test_the_state_is_plain_json_and_whole(tmp_path):
    folder = checkpoint(tmp_path)
    state = json.loads((folder / STATE_FILE).read_text())
    assert state["clock"]["steps"] == 3
    assert not list(folder.glob("*.tmp"))


def test_the_final_model_carries_no_state_of_a_run(tmp_path):
    trainer = adaptive(tmp_path, **GROWING)
    trainer.train()
    trainer.save_model(str(tmp_path / "model"))
    assert not (tmp_path / "model" / STATE_FILE).exists()


def test_a_checkpoint_that_is_not_there_is_refused_as_by_the_trainer(tmp_path):
    with pytest.raises(ValueError, match=r"Can't find a valid checkpoint at .*gone"):
        adaptive(tmp_path, **GROWING).train(resume_from_checkpoint=str(tmp_path / "gone"))


@pytest.mark.parametrize(
    "missing", ["trainer_state.json", STATE_FILE, "half of trainer_state.json"]
)
def test_a_checkpoint_that_a_kill_left_in_pieces_is_passed_over(tmp_path, missing):
    run = uninterrupted(tmp_path / "run", **GROWING)
    last = max(run.folder.glob("checkpoint-*"), key=lambda folder: int(folder.name.split("-")[1]))
    if missing.startswith("half of "):
        path = last / missing.removeprefix("half of ")
        path.write_text(path.read_text()[:100])
    else:
        (last / missing).unlink()
    trainer = adaptive(run.folder, **GROWING)
    trainer.train(resume_from_checkpoint=True)
    assert same_weights(finished(trainer, run.folder).weights, run.weights)


def test_without_a_complete_checkpoint_nothing_is_resumed(tmp_path):
    (tmp_path / "checkpoint-3").mkdir()
    with pytest.raises(
        ValueError, match=r"No valid checkpoint found in output directory .* none is complete"
    ):
        adaptive(tmp_path, **GROWING).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("invalidated", [True, False])
def test_a_checkpoint_that_is_written_again_is_incomplete_until_it_is_whole(
    tmp_path, monkeypatch, invalidated
):
    """Else old files would stand among new ones, with the old state of the Trainer over both."""
    options = {**GROWING, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 5}
    adaptive(tmp_path, **options).train()
    for folder in tmp_path.glob("checkpoint-*"):
        if int(folder.name.split("-")[1]) > 5:
            shutil.rmtree(folder)

    def killed(self, folder):
        raise KeyboardInterrupt

    if not invalidated:
        monkeypatch.setattr("hf_adaptive_batch.saving.invalidate", lambda folder, args: None)
    monkeypatch.setattr(AdaptiveBatchTrainer, "_save_optimizer_and_scheduler", killed)
    before = last_complete_checkpoint(tmp_path)
    earlier = str(tmp_path / "checkpoint-4")
    with pytest.raises(KeyboardInterrupt):
        adaptive(tmp_path, **options).train(resume_from_checkpoint=earlier)
    assert before == str(tmp_path / "checkpoint-5")
    assert last_complete_checkpoint(tmp_path) == (earlier if invalidated else before)
