"""Training ends at a number of tokens or at an evaluation loss; its schedules do not know of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from hf_adaptive_batch import AdaptiveBatchTrainer, read_evaluations

from .cases import GROWING, adaptive, arguments, history, llama, same_weights, sequences, weights


LENGTH = 8  # tokens of a sample
EVALUATED: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 2}
SAVED: dict[str, Any] = {"save_strategy": "steps", "save_steps": 4}


def trainer_of(folder, **options: Any) -> Any:
    extra = {"train_dataset": sequences(61), "eval_dataset": sequences(8), "model": llama()}
    extra |= options.pop("trainer", {})
    return adaptive(folder, trainer=extra, **{**GROWING, **options})


def trained(folder, **options: Any) -> Any:
    trainer = trainer_of(folder, **options)
    trainer.train()
    return trainer


def evaluated(trainer: Any) -> dict[int, float]:
    entries = trainer.state.log_history
    return {entry["step"]: entry["eval_loss"] for entry in entries if "eval_loss" in entry}


def steps(trainer: Any) -> list[dict[str, Any]]:
    return [entry for entry in history(trainer) if "loss" in entry]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The same run without an end of its own."""
    return trained(tmp_path_factory.mktemp("whole"), **EVALUATED, **SAVED)


# ---------------------------------------------------------------------------------- by tokens


@pytest.mark.parametrize("tokens", [1, 4 * LENGTH, 4 * LENGTH + 1, 300])
def test_training_ends_with_the_step_that_reaches_the_tokens(tmp_path, whole, tokens):
    trainer = trained(tmp_path, **EVALUATED, **SAVED, stop_after_tokens=tokens)
    found, wanted = steps(trainer), steps(whole)
    assert found == wanted[: len(found)]  # learning rates and sizes, too
    seen = [entry["adaptive_batch/tokens_seen"] for entry in found]
    assert seen[-1] >= tokens
    assert all(count < tokens for count in seen[:-1])
    assert len(found) < len(wanted)


def test_it_ends_as_with_the_budget_with_an_evaluation_and_a_checkpoint(tmp_path):
    trainer = trained(tmp_path, **EVALUATED, **SAVED, stop_after_tokens=4 * LENGTH)
    assert trainer.state.global_step == 1  # where neither would have been due
    assert list(evaluated(trainer)) == [1]
    assert (tmp_path / "checkpoint-1").is_dir()
    [last] = read_evaluations(tmp_path)
    assert last["tokens_seen"] == 4 * LENGTH
    assert last["metrics"]["eval_loss"] == evaluated(trainer)[1]


def test_by_epochs_the_last_evaluation_is_at_the_end(tmp_path):
    trainer = trained(tmp_path, eval_strategy="epoch", save_strategy="epoch", stop_after_tokens=64)
    assert list(evaluated(trainer)) == [trainer.state.global_step]
    assert trainer.run.clock.tokens_seen < 61 * LENGTH
    assert (tmp_path / f"checkpoint-{trainer.state.global_step}").is_dir()


def test_a_resumed_run_goes_on_to_the_tokens_and_no_further(tmp_path, whole):
    options = {**EVALUATED, **SAVED}
    first = trained(tmp_path, **options, stop_after_tokens=100)
    end = first.state.global_step
    again = trainer_of(tmp_path, **options, stop_after_tokens=100)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == end < whole.state.global_step - 2
    assert again.run.clock.tokens_seen == first.run.clock.tokens_seen
    assert same_weights(weights(again), weights(first))
    further = trainer_of(tmp_path, **options, stop_after_tokens=300)
    further.train(resume_from_checkpoint=True)
    assert further.run.clock.tokens_seen >= 300
    assert further.state.global_step > end
    # The evaluation at the first end, where none was due, has drawn a random number.
    assert steps(further)[:end] == steps(whole)[:end]
    sizes = "adaptive_batch/global_batch_size"
    assert [e[sizes] for e in steps(further)] == [
        e[sizes] for e in steps(whole)[: further.state.global_step]
    ]


def test_the_budget_still_ends_training(tmp_path, whole):
    trainer = trained(tmp_path, **EVALUATED, **SAVED, stop_after_tokens=10**9)
    assert same_weights(weights(trainer), weights(whole))
    assert history(trainer) == history(whole)


def test_nothing_of_it_stays_behind(tmp_path):
    trainer = trainer_of(tmp_path, stop_after_tokens=1)
    before = list(trainer.callback_handler.callbacks)
    trainer.train()
    assert trainer.callback_handler.callbacks == before
    trainer.args.stop_after_tokens = None
    trainer.train()
    assert trainer.run.clock.finished


class Line(nn.Module):
    main_input_name = "pixels"

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(3, 1)

    def forward(self, pixels, labels=None):
        found = self.line(pixels)
        return {"out": found} | ({} if labels is None else {"loss": (found - labels).pow(2).mean()})


class Pixels(torch.utils.data.Dataset):
    def __init__(self, *, labels: bool = True) -> None:
        self.labels = labels

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        labels = {"labels": torch.zeros(1)} if self.labels else {}
        return {"pixels": torch.full((3,), index / 16), **labels}


def test_tokens_are_refused_where_there_are_none(tmp_path):
    extra = {"model": Line(), "train_dataset": Pixels()}
    trainer = trainer_of(tmp_path, trainer=extra, stop_after_tokens=100)
    with pytest.raises(ValueError, match=r"stop_after_tokens \(100\) must be left out, because"):
        trainer.train()


# ------------------------------------------------------------------------ by the evaluation loss


def test_training_ends_after_the_first_evaluation_that_is_low_enough(tmp_path, whole):
    losses = evaluated(whole)
    at = list(losses)[2]
    assert all(loss > losses[at] for step, loss in losses.items() if step < at)
    assert at % SAVED["save_steps"] != 0
    trainer = trained(tmp_path, **EVALUATED, **SAVED, stop_at_eval_loss=losses[at])  # equal is low
    assert trainer.state.global_step == at
    assert evaluated(trainer) == {step: loss for step, loss in losses.items() if step <= at}
    assert steps(trainer) == steps(whole)[:at]
    assert (tmp_path / f"checkpoint-{at}").is_dir()
    assert read_evaluations(tmp_path)[-1]["step"] == at
    again = trainer_of(tmp_path, **EVALUATED, **SAVED, stop_at_eval_loss=losses[at])
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == at
    lower = trainer_of(tmp_path, **EVALUATED, **SAVED, stop_at_eval_loss=losses[at] - 1e-4)
    lower.train(resume_from_checkpoint=True)
    assert lower.state.global_step > at


def test_a_loss_that_is_never_reached_changes_nothing(tmp_path, whole):
    trainer = trained(tmp_path, **EVALUATED, **SAVED, stop_at_eval_loss=0.0)
    assert same_weights(weights(trainer), weights(whole))
    assert history(trainer) == history(whole)


def test_a_model_that_is_good_enough_at_the_start_is_not_trained(tmp_path):
    trainer = trained(tmp_path, **EVALUATED, eval_on_start=True, stop_at_eval_loss=1e9)
    assert trainer.state.global_step == 0
    assert same_weights(weights(trainer), {n: v.clone() for n, v in llama().state_dict().items()})


def test_it_is_the_loss_of_the_average_where_weights_are_averaged(tmp_path):
    averaged = trained(tmp_path / "a", **EVALUATED, averaging_decay=0.9)
    target = list(evaluated(averaged).values())[2]
    again = trained(tmp_path / "b", **EVALUATED, averaging_decay=0.9, stop_at_eval_loss=target)
    assert again.state.global_step == list(evaluated(averaged))[2]
    assert evaluated(again)[again.state.global_step] == target


def test_an_evaluation_of_the_users_own_ends_nothing(tmp_path):
    class Own(AdaptiveBatchTrainer):
        def evaluate(self, *args: Any, **kwargs: Any) -> Any:
            super().evaluate(self.train_dataset, metric_key_prefix="own")
            return super().evaluate(*args, **kwargs)

    extra = {"train_dataset": sequences(61), "eval_dataset": sequences(8), "model": llama()}
    given = arguments(tmp_path, **EVALUATED, stop_at_eval_loss=0.0, num_train_epochs=1)
    trainer = Own(args=given, **extra)
    trainer.train()
    assert trainer.run.clock.finished


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"stop_at_eval_loss": 3.0},
            r"stop_at_eval_loss \(3.0\) must go with evaluations, because",
        ),
        ({"stop_at_eval_loss": float("nan"), **EVALUATED}, r"\(nan\) must be a number, because"),
        ({"stop_after_tokens": 0}, r"stop_after_tokens \(0\) must be at least 1, because"),
    ],
)
def test_an_end_that_never_comes_is_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        arguments(tmp_path, **options)


def test_several_evaluation_datasets_are_refused(tmp_path):
    extra = {"eval_dataset": {"one": sequences(8), "two": sequences(8)}}
    with pytest.raises(ValueError, match=r"must go with one eval_dataset, because of several"):
        trainer_of(tmp_path, trainer=extra, **EVALUATED, stop_at_eval_loss=3.0)


def test_an_evaluation_without_a_loss_is_refused(tmp_path):
    extra = {"model": Line(), "train_dataset": Pixels(), "eval_dataset": Pixels(labels=False)}
    trainer = trainer_of(tmp_path, trainer=extra, **EVALUATED, stop_at_eval_loss=0.0)
    with pytest.raises(ValueError, match="must go with an eval_loss, because"):
        trainer.train()
