"""Defects that a review found, one test each: two real processes with gloo, against one.

The jobs are those of `train_on_ranks`, and a little more: loss functions, other data on every rank,
another checkpoint for every rank, and what was logged as a warning.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import random
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset

from hf_adaptive_batch import AdaptiveBatchTrainer

from . import train_on_ranks
from .cases import MeanLossModel, sequences
from .test_distributed import by_step, counted, distance, gradient_of
from .train_on_ranks import DATA, MODELS, Job, launch, without_dropout


pytestmark = [pytest.mark.distributed, pytest.mark.slow]

CONSTANT = {"batch_schedule": "constant", "num_train_epochs": 1}
SAVED = {"save_strategy": "steps", "save_steps": 1, "num_train_epochs": 1}


# ------------------------------------------------------------------------------ jobs and ranks


@dataclass(frozen=True)
class Special(Job):
    """A job of this file; unpickling one makes its data and models known in another process.

    Attributes:
        plain_mean: Whether `compute_loss_func` is a plain mean.
    """

    plain_mean: bool = False


def plain_mean(outputs, labels, num_items_in_batch=None):
    logits = outputs["logits"][:, :-1].flatten(0, 1)
    return torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten())


class IgnoresItems(MeanLossModel):
    """The Trainer takes it for one that divides by `num_items_in_batch`."""

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor, **kwargs: Any) -> Any:
        return super().forward(input_ids, labels)


def rank_here() -> int:
    return int(os.environ.get("RANK", 0))


class Made(Dataset):
    """Samples that are made at random, by a generator of the rank's own or by torch's."""

    def __init__(self, *, own: bool) -> None:
        self.own, self.generator = own, random.Random(rank_here())

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        if self.own:
            row = [self.generator.randrange(32) for _ in range(8)]
        else:
            row = torch.randint(0, 32, (8,)).tolist()
        return {"input_ids": row, "labels": row}


DATA |= {
    "even_17": lambda: sequences(17),
    "even_19": lambda: sequences(19),
    "even_25": lambda: sequences(25),
    "even_33": lambda: sequences(33),
    "split_otherwise": lambda: sequences(61).shuffle(seed=rank_here()),
    "half_each": lambda: sequences(60).shard(2, rank_here()),
    "made_by_ranks": partial(Made, own=True),
    "made_by_torch": partial(Made, own=False),
}
MODELS["ignores_items"] = lambda: without_dropout(IgnoresItems())
_perform, _work = train_on_ranks.perform, train_on_ranks.work


class Warnings(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def perform(job: Job, folder: Path) -> dict[str, Any]:
    """As `train_on_ranks` does, and what else a `Special` job asks for."""
    if job.resume is not None:
        job = dataclasses.replace(job, resume=job.resume.format(2 + rank_here()))
    heard, logger = Warnings(), logging.getLogger("hf_adaptive_batch")
    logger.addHandler(heard)
    with pytest.MonkeyPatch.context() as patch:
        if getattr(job, "plain_mean", False):
            kind = partial(AdaptiveBatchTrainer, compute_loss_func=plain_mean)
            patch.setattr(train_on_ranks, "AdaptiveBatchTrainer", kind)
        try:
            return {**_perform(job, folder), "warnings": heard.messages}
        finally:
            logger.removeHandler(heard)


def work(*given: Any) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_on_ranks, "perform", perform)
        _work(*given)


IGNORING = [
    Special(f"ignoring_{data}", data=data, model="ignores_items", options=CONSTANT)
    for data in ("even_17", "even_19", "even_25")
]
JOBS = [
    Special("plain_mean", data="even", plain_mean=True),
    Special("one_left", data="even_33", plain_mean=True),
    *IGNORING,
    Special("saved", options=SAVED),
]
ON_TWO = [
    Special("split_otherwise", data="split_otherwise", options=CONSTANT),
    Special("half_each", data="half_each", options=CONSTANT),
    Special("made_by_ranks", data="made_by_ranks", options=CONSTANT),
    Special("made_by_torch", data="made_by_torch", options=CONSTANT),
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Results by number of ranks, job and rank."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_on_ranks, "work", work)
        for ranks in (1, 2):
            folder = tmp_path_factory.mktemp(f"ranks-{ranks}")
            jobs = JOBS if ranks == 1 else JOBS + ON_TWO
            if ranks == 2:
                each = str(folder / "saved" / "checkpoint-{}")
                jobs = [*jobs, Special("resumed", options=SAVED, resume=each)]
                jobs = [*jobs, Special("after", options={"max_steps": 2, "num_train_epochs": 0})]
            found[ranks] = launch(ranks, jobs, folder)
    return found


def job_named(name: str) -> Job:
    return next(job for job in JOBS + ON_TWO if job.name == name)


def column(found: dict[str, Any], name: str) -> list[float]:
    return [entry[name] for entry in found["history"] if name in entry]


# -------------------------------------------------------------------- 15. a plain mean of ones own


@pytest.mark.parametrize("name", ["plain_mean", "one_left"])
def test_a_loss_function_that_is_a_plain_mean_trains_on_two_ranks_as_on_one(trained, name):
    """The tolerances are those of test_elastic: fp32 sums in another order, and Adam."""
    [alone], ours = trained[1][name], trained[2][name]
    sizes = [sum(sum(s["sizes"]) for s in steps) for steps in by_step(ours)]
    assert sizes == [sum(step["sizes"]) for step in alone["steps"]]
    assert sizes[-1] % 16  # ragged
    assert max(sizes) == 32  # it has grown
    for rank in ours:
        for key, value in alone["weights"].items():
            assert float((rank["weights"][key] - value).abs().max()) < 1e-6
    for logged in ("loss", "grad_norm"):
        values = column(alone, logged)
        assert len(values) == len(sizes)
        assert column(ours[0], logged) == pytest.approx(
            values, rel=1e-6 if logged == "loss" else 1e-5
        )
    # A step of a single sample is measured nowhere, and has a record only where ranks decide.
    recorded = dict(zip(*(ours[0]["records"][c] for c in ("step", "loss")), strict=True))
    for number, loss in zip(*(alone["records"][c] for c in ("step", "loss")), strict=True):
        assert recorded[number] == pytest.approx(loss, rel=1e-6)


def test_the_logged_loss_is_the_mean_over_the_samples(trained):
    """Of random data before anything is learnt: near log 32, not some multiple of it."""
    for ranks in (1, 2):
        for loss in column(trained[ranks]["plain_mean"][0], "loss"):
            assert 3.0 < loss < 4.0


# ---------------------------------------------------------- 16. a model that ignores the items


def factors(job: Job, found: list[dict[str, Any]]) -> list[tuple[float, int]]:
    """How far each step's gradient is from the multiple of the samples' mean, and which that is."""
    told = []
    for steps in by_step(found):
        batches = [batch for step in steps for batch, _ in counted(step)]
        gradient, tokens = gradient_of(job, steps[0]["weights"], batches)
        factor = len(steps) * len(steps[0]["sizes"])
        for step in steps:
            told.append((distance(step["gradient"], factor * gradient / tokens), factor))
    return told


LAST = {"even_17": [[1], [0]], "even_19": [[2], [1]], "even_25": [[4, 1], [4, 0]]}


@pytest.mark.parametrize("job", IGNORING, ids=lambda job: job.data)
def test_samples_weigh_alike_under_a_model_that_ignores_the_items(trained, job):
    """All but for the factor that the plain Trainer has: ranks x micro-batches of the step."""
    found = trained[2][job.name]
    told = factors(job, found)
    assert max(off for off, _ in told) < 1e-6
    assert told[0][1] == 4
    last = [step["sizes"] for step in by_step(found)[-1]]
    assert last == LAST[job.data]


def test_a_stand_in_that_weighs_would_be_seen(trained):
    """The check of the gradients can fail."""
    found = trained[2]["ignoring_even_25"]
    weighing = [
        {"steps": [{**s, "sizes": [size or 1 for size in s["sizes"]]} for s in rank["steps"]]}
        for rank in found
    ]
    assert factors(job_named("ignoring_even_25"), weighing)[-1][0] > 1e-2


# ----------------------------------------------------------------- 17. data that differ on ranks


def test_data_of_the_same_length_that_differ_are_refused_on_all_ranks(trained):
    for name in ("split_otherwise", "half_each"):
        for rank in trained[2][name]:
            assert "must be the same on all ranks" in rank["error"]
            assert "first, middle or last samples differ" in rank["error"]
            assert "seed train_test_split() and shuffle()" in rank["error"]


def test_samples_that_are_made_at_random_on_each_rank_are_a_warning(trained):
    said = []
    for rank in trained[2]["made_by_ranks"]:
        assert "error" not in rank
        assert len(rank["steps"]) == 3
        said.append([text for text in rank["warnings"] if "train_dataset" in text])
    [[warning], others] = said  # once, by the first
    assert "made at random on each rank" in warning
    assert others == []


def test_samples_that_are_made_by_torchs_generator_are_none(trained):
    for rank in trained[2]["made_by_torch"]:
        assert "error" not in rank
        assert not any("train_dataset" in text for text in rank["warnings"])


# ------------------------------------------------------------------ 18. other checkpoints on ranks


def test_ranks_that_resume_different_checkpoints_are_refused_on_all(trained):
    for rank in trained[2]["resumed"]:
        assert "resume_from_checkpoint (steps [2, 3] on the ranks) must be one" in rank["error"]


def test_the_ranks_are_in_step_after_the_refusals(trained):
    assert [len(rank["steps"]) for rank in trained[2]["after"]] == [2, 2]
