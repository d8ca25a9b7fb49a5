"""A run that goes on with more and fewer ranks is the run that never changed them.

In every leg per-device batch x accumulation x ranks is 16, the micro-batch stays 4 and only
accumulation grows, so that every step has the same small batches whoever trains them. What is left
to differ is the order of sums in fp32.
"""

from __future__ import annotations

import json

import pytest

from hf_adaptive_batch import read_records
from hf_adaptive_batch.checkpoint import STATE_FILE

from .train_on_ranks import Job, launch


pytestmark = [pytest.mark.distributed, pytest.mark.slow]

# The batch grows 16 -> 32 -> 48 (the cap) in the first two legs: 61 samples an epoch, five epochs.
GROWS = {"max_global_batch_size": 48, "save_strategy": "steps", "save_steps": 1}
EPOCHS = {**GROWS, "num_train_epochs": 5}
SAMPLES = {**GROWS, "num_train_epochs": 0, "max_training_samples": 305}
KINDS = {
    "map": {"data": "rows", "options": EPOCHS},
    "stream": {"data": "stream", "options": SAMPLES},
    "stream_workers": {
        "data": "stream",
        "options": {**SAMPLES, "dataloader_num_workers": 1},
    },
    "mean": {"data": "even", "model": "mean", "options": EPOCHS},
}
LEGS = [(1, 2), (2, 4), (4, 7), (1, None)]  # ranks, and the step to stop at


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("elastic")


@pytest.fixture(scope="module")
def alone(folder):
    (folder / "alone").mkdir()
    jobs = [Job(name, watch=False, **kind) for name, kind in KINDS.items()]
    return launch(1, jobs, folder / "alone")


@pytest.fixture(scope="module")
def legs(folder):
    """Results of the four legs, which all go on in the same folder."""
    (folder / "legs").mkdir()
    found, last = [], None
    for ranks, stop in LEGS:
        jobs = []
        for name, kind in KINDS.items():
            resume = None if last is None else str(folder / "legs" / name / f"checkpoint-{last}")
            jobs.append(Job(name, resume=resume, stop=stop, watch=False, **kind))
        if ranks == 2:  # for the refusals below
            jobs.append(Job("parts", data="four_shards", options=SAMPLES, stop=2, watch=False))
        if ranks == 4:
            parts = str(folder / "legs" / "parts" / "checkpoint-2")
            jobs.append(Job("parts", data="four_shards", options=SAMPLES, resume=parts))
            cap = {**EPOCHS, "max_global_batch_size": 32}
            at = str(folder / "legs" / "map" / f"checkpoint-{last}")
            jobs.append(Job("lower_cap", options=cap, resume=at, watch=False))
        found.append(launch(ranks, jobs, folder / "legs"))
        last = stop
    return found


@pytest.mark.parametrize("name", KINDS)
def test_the_legs_train_on_the_batches_of_the_run_on_one_rank(folder, alone, legs, name):
    expected = alone[name][0]["records"]
    records = read_records(folder / "legs" / name)
    for column in (
        "step",
        "samples_seen",
        "tokens_seen",
        "step_samples",
        "global_batch_size",
        "next_global_batch_size",
        "workers",
        "reason",
    ):
        assert records[column] == expected[column], column
    assert sorted(set(expected["global_batch_size"])) == [16, 32, 48]
    sizes = zip(records["data_parallel_size"], records["accumulation_steps"], strict=True)
    assert [ranks for ranks, _ in sizes] == [1] * 2 + [2] * 2 + [4] * 3 + [1] * (
        len(records["step"]) - 7
    )


@pytest.mark.parametrize("name", KINDS)
def test_losses_and_weights_are_those_of_one_rank_but_for_the_order_of_sums(
    folder, alone, legs, name
):
    """fp32 has 6e-8 of relative rounding, and 7e-8 is the largest difference of a loss measured.

    Ranks add up what one process accumulates: a handful of terms in another order. Adam divides
    by the gradient's size, so that weights of 1e-1 in steps of 3e-3 differ by 6e-8 at most. The
    tolerances leave a factor of about fifteen; a wrong weight of a single sample would be 1e-2.
    """
    expected = alone[name][0]
    records = read_records(folder / "legs" / name)
    assert records["loss"] == pytest.approx(expected["records"]["loss"], rel=1e-6)
    for column in ("small_sq_norm", "big_sq_norm"):  # where all small batches are whole
        pairs = zip(records[column], expected["records"][column], strict=True)
        for found, value, size in zip(
            *zip(*pairs, strict=True), records["step_samples"], strict=True
        ):
            assert size % 16 or found == pytest.approx(value, rel=1e-5)
    weights = legs[-1][name][0]["weights"]
    for key, value in expected["weights"].items():
        assert float((weights[key] - value).abs().max()) < 1e-6


def test_another_seed_would_be_seen(folder, alone):
    """The comparison of the losses can fail: another model of the same data is far away."""
    assert alone["map"][0]["records"]["loss"] != pytest.approx(
        alone["mean"][0]["records"]["loss"], rel=1e-3
    )


def test_a_checkpoint_tells_the_ranks_it_was_made_on(folder, legs):
    for step, ranks in ((2, 1), (4, 2), (7, 4)):
        path = folder / "legs" / "map" / f"checkpoint-{step}" / STATE_FILE
        state = json.loads(path.read_text(encoding="utf-8"))
        assert state["plan"]["data_parallel_size"] == ranks
        assert len(state["random_states"]) == ranks


def test_a_split_stream_is_refused_on_another_number_of_ranks(folder, legs):
    assert len(legs[1]["parts"][0]["records"]["step"]) == 2
    for rank in legs[2]["parts"]:  # on all of them, at once
        assert "a stream in 4 parts) must be split as in the checkpoint (2)" in rank["error"]
    parts = str(folder / "legs" / "parts" / "checkpoint-2")
    job = Job("parts_alone", data="stream", options=SAMPLES, resume=parts)
    [found] = launch(1, [job], folder / "legs")["parts_alone"]
    assert "a stream in 1 part) must be split as in the checkpoint (2)" in found["error"]


def test_a_cap_that_was_changed_holds_from_the_resumed_step_on(legs):
    records = legs[2]["lower_cap"][0]["records"]
    assert records["step"][0] == 5
    assert set(records["global_batch_size"]) == {32}
    assert max(records["step_samples"]) <= 32
    assert records["samples_seen"][-1] == 5 * 61
