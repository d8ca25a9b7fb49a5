"""Real processes with gloo: gradients, moments and decisions are those of a single process.

A few launches run all jobs; the tests look at what came back. References are computed by autograd
in float64, with the weights that each step began with.
"""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn

from hf_adaptive_batch.checkpoint import STATE_FILE

from . import reference
from .cases import pad, same_weights, sequences
from .train_on_ranks import DATA, MODELS, Job, launch, results


pytestmark = [pytest.mark.distributed, pytest.mark.slow]

RANKS = [1, 2, 4]
SEVERAL = [2, 4]
CONSTANT = {"batch_schedule": "constant", "num_train_epochs": 1}
STREAM = {"num_train_epochs": 0, "max_training_samples": 122}
JOBS = [
    Job("tokens", options={"save_strategy": "steps", "save_steps": 2}),
    Job("own_tokens", options={"average_tokens_across_devices": False}),
    Job("mean", data="even", model="mean"),
    Job("one_left", data="17", options=CONSTANT),
    Job(
        "one_left_own_tokens",
        data="17",
        options={**CONSTANT, "average_tokens_across_devices": False},
    ),
    Job("three_left", data="19", options=CONSTANT),
    Job("nan", data="marked", model="poisoned"),
    Job("stream", data="stream", options=STREAM),
    Job("stream_workers", data="stream", options={**STREAM, "dataloader_num_workers": 1}),
    Job("three_shards", data="three_shards", options=STREAM),
    Job("four_shards", data="four_shards", options=STREAM),
    Job("by_length", options={"train_sampling_strategy": "group_by_length"}),
    Job("own_sampler", own_sampler=True),
    Job("seeded", options={"data_seed": 5}),
    Job("contrary", contrary=True),
    Job("on_their_own", agree=False),
    Job("evaluated", evaluated=True),
]
MEASURED = ["tokens", "own_tokens", "mean", "stream"]
GRADIENTS = [*MEASURED, "one_left", "one_left_own_tokens", "three_left", "three_shards"]
REFUSED = [
    Job("unseeded", data="unseeded", options=STREAM),
    Job("by_hand", data="by_hand"),
    Job("split_batches", options={"accelerator_config": {"split_batches": True}}),
    Job(
        "dispatch",
        data="stream",
        options={**STREAM, "accelerator_config": {"dispatch_batches": False}},
    ),
    Job("unfrozen", unfrozen=True, watch=False),
    Job("after", options={"max_steps": 2, "num_train_epochs": 0}),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def trained(folder):
    """Results by number of ranks, job and rank."""
    found = {}
    for ranks in RANKS:
        (folder / str(ranks)).mkdir()
        jobs = JOBS if ranks == 1 else JOBS + REFUSED
        found[ranks] = launch(ranks, jobs, folder / str(ranks))
    return found


SAMPLERS = ["by_length", "own_sampler"]
OTHERS = [job.name for job in JOBS if job.name not in SAMPLERS]


# -------------------------------------------------------------------------------------- reference


def loss_sum(model, rows):
    """The summed loss of samples over their target tokens, and how many these are."""
    if isinstance(model, nn.Module) and hasattr(model, "lm_head"):
        logits = model(input_ids=rows["input_ids"], attention_mask=rows["attention_mask"]).logits
        logits, labels = logits[:, :-1], rows["labels"][:, 1:]
    else:
        logits = model(rows["input_ids"], rows["labels"])["logits"]
        labels = rows["labels"]
    losses = nn.functional.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), reduction="sum", ignore_index=-100
    )
    return losses, int((labels != -100).sum())


def gradient_of(job, weights, batches):
    """The gradient of the summed loss of some samples in float64, and their target tokens."""
    model = MODELS[job.model]().double()
    model.load_state_dict({name: value.double() for name, value in weights.items()})
    tokens = 0
    for rows in batches:
        losses, count = loss_sum(model, rows)
        losses.backward()
        tokens += count
    return reference.flat_gradient(model), tokens


def counted(step):
    """The micro-batches of a step on a rank, without those that only stand in."""
    pairs = zip(step["batches"], step["sizes"], strict=True)
    return [(batch, size) for batch, size in pairs if size]


def by_step(found):
    """[step][rank]"""
    return list(zip(*(rank["steps"] for rank in found), strict=True))


def micro_batches_of(job, steps):
    """Every small batch of a step: its mean gradient, and its weight in the step's gradient."""
    gradients, weights = [], []
    total = sum(sum(step["sizes"]) for step in steps)
    own = job.options.get("average_tokens_across_devices") is False
    for step in steps:
        parts = [gradient_of(job, step["weights"], [batch]) for batch, _ in counted(step)]
        rank_tokens = sum(tokens for _, tokens in parts)
        for (gradient, tokens), (_, size) in zip(parts, counted(step), strict=True):
            gradients.append(gradient / tokens)
            if job.model != "llama":
                weights.append(size / total)
            elif own:  # a rank's mean over its tokens, weighted by its samples
                weights.append(tokens / rank_tokens * sum(step["sizes"]) / total)
            else:
                weights.append(float(tokens))
    return gradients, weights


def distance(found, expected):
    return float((found - expected).norm() / expected.norm())


def samples_of(steps):
    """The rows of a step over all ranks, round by round, as tuples of tokens."""
    rows = []
    for parts in zip(*([*zip(s["batches"], s["sizes"], strict=True)] for s in steps), strict=True):
        for batch, size in parts:
            labels = batch["labels"][:size].tolist()
            rows += [tuple(token for token in row if token != -100) for row in labels]
    return rows


# ------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("name", GRADIENTS)
@pytest.mark.parametrize("ranks", RANKS)
def test_the_steps_gradient_is_the_mean_over_its_samples(trained, ranks, name):
    """To 1e-6 of its norm: what fp32 sums leave. Ragged steps included, whoever trains what."""
    job = next(job for job in JOBS if job.name == name)
    for steps in by_step(trained[ranks][name]):
        expected = reference.step_gradient(*micro_batches_of(job, steps))
        for step in steps:
            assert distance(step["gradient"], expected) < 1e-6


@pytest.mark.parametrize("ranks", SEVERAL)
def test_each_target_token_weighs_the_same_whatever_rank_it_lands_on(trained, ranks):
    """The same again, without the library's micro-batches: one sum over the global step."""
    job = JOBS[0]
    ragged = 0
    for steps in by_step(trained[ranks]["tokens"]):
        rows = [{"input_ids": list(row), "labels": list(row)} for row in samples_of(steps)]
        gradient, tokens = gradient_of(job, steps[0]["weights"], [pad(rows)])
        assert distance(steps[0]["gradient"], gradient / tokens) < 1e-6
        ragged += len(rows) % 16 != 0
    assert ragged


@pytest.mark.parametrize(("name", "left"), [("one_left", 1), ("three_left", 3)])
def test_fewer_samples_than_ranks_are_left_to_the_first(trained, name, left):
    last = by_step(trained[4][name])[-1]
    assert [step["sizes"] for step in last] == [[1]] * left + [[0]] * (4 - left)


def test_ranks_with_stand_ins_weighing_would_be_seen(trained):
    """The check of the gradients can fail."""
    job = next(job for job in JOBS if job.name == "three_left")
    last = [{**step, "sizes": [1]} for step in by_step(trained[4]["three_left"])[-1]]
    expected = reference.step_gradient(*micro_batches_of(job, last))
    assert distance(last[0]["gradient"], expected) > 1e-2


# ------------------------------------------------------------------------- moments and decisions


@pytest.mark.parametrize("name", MEASURED)
@pytest.mark.parametrize("ranks", RANKS)
def test_the_moments_of_every_step_are_those_of_its_small_batches(trained, ranks, name):
    job = next(job for job in JOBS if job.name == name)
    found = trained[ranks][name]
    records = found[0]["records"]
    for number, steps in enumerate(by_step(found)):
        gradients, weights = micro_batches_of(job, steps)
        samples = sum(sum(step["sizes"]) for step in steps)
        expected = reference.moments(gradients, weights, samples)
        assert records["step_samples"][number] == samples
        assert records["workers"][number] == len(gradients)
        assert records["small_sq_norm"][number] == pytest.approx(expected["S"], rel=1e-6)
        assert records["big_sq_norm"][number] == pytest.approx(expected["L"], rel=1e-6)


@pytest.mark.parametrize("name", MEASURED)
@pytest.mark.parametrize("ranks", SEVERAL)
def test_ranks_and_accumulation_measure_and_decide_alike(trained, ranks, name):
    """(1 rank, 4 micro-batches), (2, 2) and (4, 1): the small batches are the same ones."""
    ours, alone = (trained[n][name][0]["records"] for n in (ranks, 1))
    for column in ("step_samples", "samples_seen", "tokens_seen", "workers", "reason"):
        assert ours[column] == alone[column]
    assert ours["global_batch_size"] == alone["global_batch_size"]
    assert ours["next_global_batch_size"] == alone["next_global_batch_size"]
    assert ours["global_batch_size"][0] == 16
    assert ours["global_batch_size"][-1] == 32
    if name != "own_tokens":  # whose loss is another one
        assert ours["small_sq_norm"][0] == pytest.approx(alone["small_sq_norm"][0], rel=1e-6)
        assert ours["big_sq_norm"][0] == pytest.approx(alone["big_sq_norm"][0], rel=1e-6)
        assert ours["loss"] == pytest.approx(alone["loss"], rel=1e-5)


@pytest.mark.parametrize("ranks", SEVERAL)
def test_a_model_that_was_evaluated_before_is_trained_as_one_that_was_not(trained, ranks):
    """The plain Trainer leaves it without DDP then, and the ranks drift apart."""
    for found, without in zip(trained[ranks]["evaluated"], trained[ranks]["tokens"], strict=True):
        assert same_weights(found["weights"], without["weights"])
    ours, without = (trained[ranks][name][0]["records"] for name in ("evaluated", "tokens"))
    assert ours == without


@pytest.mark.parametrize("ranks", SEVERAL)
def test_the_first_rank_decides_where_controllers_do_not_agree(trained, ranks):
    """Which steps are measured as well; else the ranks would wait for each other for ever."""
    ours, alone = (trained[n]["contrary"][0]["records"] for n in (ranks, 1))
    for column in ("step", "step_samples", "reason", "next_global_batch_size"):
        assert ours[column] == alone[column]
    assert {step % 2 for step in ours["step"]} == {0}
    assert ours["next_global_batch_size"][-1] == 32


@pytest.mark.parametrize("ranks", SEVERAL)
def test_the_broadcast_changes_nothing_where_controllers_agree(trained, ranks):
    for own, agreed in zip(trained[ranks]["on_their_own"], trained[ranks]["tokens"], strict=True):
        assert same_weights(own["weights"], agreed["weights"])
    own, agreed = (trained[ranks][name][0]["records"] for name in ("on_their_own", "tokens"))
    assert own == agreed


# ----------------------------------------------------------------------------- ranks among them


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("ranks", SEVERAL)
def test_ranks_end_with_the_same_weights_after_as_many_passes(trained, ranks, name):
    first, *others = trained[ranks][name]
    for other in others:
        assert same_weights(first["weights"], other["weights"])
        assert other["calls"] == first["calls"]
        assert other["skipped"] == first["skipped"]
        assert [len(s["sizes"]) for s in other["steps"]] == [
            len(s["sizes"]) for s in first["steps"]
        ]


@pytest.mark.parametrize("ranks", SEVERAL)
def test_the_first_rank_alone_writes(trained, folder, ranks):
    found = trained[ranks]["tokens"]
    assert [rank["writes"] for rank in found] == [True] + [False] * (ranks - 1)
    steps = found[0]["records"]["step"]
    assert steps == sorted(set(steps))
    assert len(steps) == len(found[0]["steps"])
    checkpoints = list((folder / str(ranks) / "tokens").glob("checkpoint-*"))
    assert checkpoints
    for checkpoint in checkpoints:
        state = json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))
        assert state["plan"]["data_parallel_size"] == ranks
        assert len(list(checkpoint.glob("rng_state_*.pth"))) == ranks
        assert not list(checkpoint.glob("*.tmp"))


@pytest.mark.parametrize("ranks", SEVERAL)
def test_logs_are_printed_by_one_rank(trained, ranks):
    printed = [rank["printed"] for rank in trained[ranks]["tokens"]]
    assert printed[0].count("train_runtime") == 1
    assert set(printed[1:]) == {""}


@pytest.mark.parametrize("ranks", SEVERAL)
def test_a_loss_that_is_not_finite_on_one_rank_skips_the_step_on_all(trained, ranks):
    found = trained[ranks]["nan"]
    assert {rank["skipped"] for rank in found} == {2}  # once in each of two epochs
    records = found[0]["records"]
    assert records["reason"].count("not_finite") == 2
    for (before, after), reason in zip(
        pairwise([s["weights"] for s in found[0]["steps"]]), records["reason"], strict=False
    ):
        assert same_weights(before, after) == (reason == "not_finite")
    assert all(torch.isfinite(value).all() for value in found[0]["weights"].values())


# ------------------------------------------------------------------------------ streams and order


@pytest.mark.parametrize("name", ["tokens", "stream", "stream_workers"])
@pytest.mark.parametrize("ranks", SEVERAL)
def test_the_steps_hold_the_samples_of_a_single_process(trained, ranks, name):
    alone = [samples_of(steps) for steps in by_step(trained[1][name])]
    assert [samples_of(steps) for steps in by_step(trained[ranks][name])] == alone


@pytest.mark.parametrize("name", [name for name in OTHERS if "left" not in name])
@pytest.mark.parametrize("ranks", RANKS)
def test_every_sample_is_trained_on_once_per_epoch(trained, ranks, name):
    job = next(job for job in JOBS if job.name == name)
    data = sequences(61) if "shards" in job.data else DATA[job.data]()
    epoch = Counter(tuple(row["input_ids"]) for row in data)
    assert max(epoch.values()) == 1  # rows can be told apart
    found = Counter(row for steps in by_step(trained[ranks][name]) for row in samples_of(steps))
    assert found == Counter(dict.fromkeys(epoch, 2))


@pytest.mark.parametrize("name", ["three_shards", "four_shards"])
def test_ranks_read_their_own_shards(trained, name):
    steps = by_step(trained[2][name])
    mine = [{row for step in steps for row in samples_of([step[rank]])} for rank in range(2)]
    assert not mine[0] & mine[1]


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("ranks", SEVERAL)
def test_the_order_of_any_sampler_is_the_first_ranks(trained, ranks, name):
    """One draws from torch's generator, the other was seeded otherwise on every rank."""
    found = trained[ranks][name]
    assert "error" not in found[0]
    rows = [row for steps in by_step(found) for row in samples_of(steps)]
    assert Counter(rows) == Counter({tuple(row): 2 for row in DATA["rows"]()["input_ids"]})
    assert rows[:61] != rows[61:]
    assert all(same_weights(found[0]["weights"], other["weights"]) for other in found)
    if name == "own_sampler":
        assert rows == [row for steps in by_step(trained[1][name]) for row in samples_of(steps)]


# -------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("unseeded", r"must be the same on all ranks, but rank 1 read other samples"),
        ("by_hand", r"train_dataset .*on all ranks"),
        ("split_batches", r"split_batches \(True\)"),
        ("dispatch", r"dispatch_batches \(False\)"),
        ("unfrozen", r"must be trainable before training starts, because DDP averages"),
    ],
)
@pytest.mark.parametrize("ranks", SEVERAL)
def test_what_ranks_cannot_agree_on_is_refused_on_all(trained, ranks, name, message):
    errors = [rank.get("error") for rank in trained[ranks][name]]
    for error in errors:
        assert error is not None
        assert re.search(message, error)


@pytest.mark.parametrize("ranks", SEVERAL)
def test_the_ranks_are_in_step_after_a_refusal(trained, ranks):
    assert [len(rank["steps"]) for rank in trained[ranks]["after"]] == [2] * ranks


# -------------------------------------------------------------------------------------- launchers


def test_a_real_launcher_trains_the_same(trained, tmp_path):
    script = Path(__file__).with_name("train_on_ranks.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    ended = subprocess.run(
        [*command, "--nproc_per_node", "2", str(script), str(tmp_path), "rows"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    found = results(2, tmp_path)["rows"]
    assert same_weights(found[0]["weights"], found[1]["weights"])
    # Another environment may have other kernels, which sum in another order.
    for name, expected in trained[2]["tokens"][0]["weights"].items():
        torch.testing.assert_close(found[0]["weights"][name], expected, rtol=0, atol=1e-6)
    assert math.isfinite(found[0]["records"]["loss"][-1])
