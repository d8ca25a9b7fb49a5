"""A loop without a Trainer on two processes: whatever the layout, it is that of a single one.

The scenarios are those of `loop_on_ranks`, on real processes with gloo.
"""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch

from .cases import same_weights
from .loop_on_ranks import SAVED, given_up, launch, ragged, trained
from .train_in_shards import FSDP2


pytestmark = [pytest.mark.distributed, pytest.mark.slow]
LAYOUTS = ["ddp", "fsdp2"]
SCENARIOS = ["trained", "ragged", "given_up", "given_up_unreduced", "contrary"]
ALONE = {each.__name__: each for each in (trained, ragged, given_up)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("alone")


@pytest.fixture(scope="module")
def alone(folder):
    """The same loops in this process."""
    return {name: run(folder / name) for name, run in ALONE.items()}


@pytest.fixture(scope="module")
def two(tmp_path_factory, alone, folder):
    """Results by layout, scenario and rank."""
    ddp = tmp_path_factory.mktemp("ddp")
    shutil.copytree(folder / "trained" / f"save-{SAVED[0]}", ddp / "saved")
    return {
        "ddp": launch(2, [*SCENARIOS, "elsewhere", "unwrapped"], ddp),
        "fsdp2": launch(2, SCENARIOS, tmp_path_factory.mktemp("fsdp2"), FSDP2),
    }


def close(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> bool:
    """After some steps of AdamW, to 1e-5 of a weight's scale."""
    return found.keys() == wanted.keys() and all(
        float((found[n] - wanted[n]).abs().max()) <= 1e-5 * float(wanted[n].abs().max())
        for n in wanted
    )


def epochs_of(ranks: list[dict[str, Any]], samples: int) -> list[list[int]]:
    """What all ranks trained on, micro-batch by micro-batch, cut into epochs."""
    rounds = zip(*(rank["samples"] for rank in ranks), strict=True)
    flat = [index for parts in rounds for part in parts for index in part]
    return [flat[begin : begin + samples] for begin in range(0, len(flat), samples)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_ranks_measure_and_decide_what_a_single_process_does(two, alone, layout):
    ranks, single = two[layout]["trained"], alone["trained"]
    assert {rank["kind"] for rank in ranks} == {layout}
    assert ranks[0]["sizes"] == ranks[1]["sizes"] == single["sizes"]
    assert single["sizes"][:4] == [(16, 16), (16, 16), (32, 32), (32, 16)]  # within an epoch
    found, wanted = ranks[0]["records"], single["records"]
    for name in ("small_sq_norm", "big_sq_norm", "loss"):
        assert found[name] == pytest.approx(wanted[name], rel=1e-6), name
    for name in ("workers", "reason", "next_global_batch_size", "samples_seen", "tokens_seen"):
        assert found[name] == wanted[name], name
    assert [rank["writes"] for rank in ranks] == [True, False]


@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_ranks_stay_together(two, alone, layout, scenario):
    ranks = two[layout][scenario]
    assert ranks[0]["losses"] == ranks[1]["losses"]
    assert ranks[0]["sizes"] == ranks[1]["sizes"]
    assert same_weights(ranks[0]["weights"], ranks[1]["weights"])
    if scenario in alone:
        assert close(ranks[0]["weights"], alone[scenario]["weights"])
        assert ranks[0]["losses"] == pytest.approx(alone[scenario]["losses"], rel=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_sample_is_trained_on_once_by_one_rank_in_the_same_order(two, alone, layout):
    orders = epochs_of(two[layout]["trained"], 80)
    assert orders == epochs_of([alone["trained"]], 80)
    assert [sorted(order) for order in orders] == [list(range(80))] * 2


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_rank_without_samples_stands_in_and_weighs_nothing(two, alone, layout):
    """Of 33 samples the last one is a step alone; weights are those of a single process, above."""
    ranks = two[layout]["ragged"]
    assert (16, 1) in ranks[0]["sizes"] or (32, 1) in ranks[0]["sizes"]
    assert len({len(rank["samples"]) for rank in ranks}) == 1  # as many passes
    trained_on = [index for rank in ranks for part in rank["samples"] for index in part]
    assert len(trained_on) > 2 * 33  # those that stand in among them


@pytest.mark.parametrize("number", SAVED)
@pytest.mark.parametrize("layout", ["alone", *LAYOUTS])
def test_what_accelerate_has_saved_goes_on_bitwise(two, alone, layout, number):
    for rank in [alone["trained"]] if layout == "alone" else two[layout]["trained"]:
        again = rank["saves"][number]
        assert again["losses"] == rank["losses"][number:]
        assert again["sizes"] == rank["sizes"][number:]
        assert same_weights(again["weights"], rank["weights"])


def test_what_a_single_process_has_saved_goes_on_on_two(two, alone):
    whole, number = alone["trained"], SAVED[0]
    for rank in two["ddp"]["elsewhere"]:
        assert rank["sizes"] == whole["sizes"][number:]
        assert rank["losses"] == pytest.approx(whole["losses"][number:], rel=1e-5)
        assert close(rank["weights"], whole["weights"])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_step_that_all_ranks_gave_up_comes_again(two, alone, layout):
    whole = alone["trained"]
    for rank in two[layout]["given_up"]:
        assert rank["hooks"] == 0
        assert rank["sizes"] == whole["sizes"]
        assert rank["losses"] == pytest.approx(whole["losses"], rel=1e-5)
        assert close(rank["weights"], whole["weights"])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_was_not_reduced_of_a_step_that_was_given_up_is_forgotten(two, layout):
    for rank in two[layout]["given_up_unreduced"]:
        assert rank["losses"] == rank["whole"]["losses"]
        assert same_weights(rank["weights"], rank["whole"]["weights"])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_first_ranks_decision_holds_for_all(two, layout):
    sizes = {planned for planned, _ in two[layout]["contrary"][0]["sizes"]}
    assert sizes == {16, 32}  # the other's is 48


def test_a_model_that_nothing_wraps_is_refused(two):
    for rank in two["ddp"]["unwrapped"]:
        assert "must be wrapped by DDP or FSDP, because" in rank["refused"]
        assert "accelerator.prepare" in rank["refused"]
