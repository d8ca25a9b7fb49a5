"""Averaged weights on several processes: whole under DDP, in shards under FSDP2, always the same.

The scenarios are those of `average_on_ranks`, on real processes with gloo.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from hf_adaptive_batch.averaging import WeightAverage
from hf_adaptive_batch.averaging_files import AVERAGE_FOLDER

from . import layouts, reference
from .average_on_ranks import DECAYS, MESHES, in_trainer, launch, multiply
from .cases import llama, same_weights
from .train_in_shards import FSDP2


pytestmark = [pytest.mark.distributed, pytest.mark.slow]
LAYOUTS = ["ddp", "fsdp2"]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The same steps in this process."""
    return in_trainer(tmp_path_factory.mktemp("alone"))


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """An average of a model that does not divide by two, saved by a single process."""
    folder = tmp_path_factory.mktemp("fsdp2")
    model = layouts.MODELS["uneven"]()
    average = WeightAverage(model)
    multiply(model, average)
    average.save(folder / "one process")
    return folder, average


@pytest.fixture(scope="module")
def two(tmp_path_factory, one_process):
    """Results by layout and scenario, of two processes."""
    folder, _ = one_process
    return {
        "ddp": launch(2, ["in_trainer", "at_load_time"], tmp_path_factory.mktemp("ddp")),
        "fsdp2": launch(2, ["in_trainer", "from_one_process"], folder, FSDP2),
    }


@pytest.fixture(scope="module")
def folder_of_four(tmp_path_factory):
    return tmp_path_factory.mktemp("four")


@pytest.fixture(scope="module")
def four(folder_of_four):
    return launch(4, ["meshes"], folder_of_four)["meshes"]


def close(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], share: float) -> bool:
    """Within a share of the largest weight of each parameter."""
    return found.keys() == wanted.keys() and all(
        float((found[n] - wanted[n]).abs().max()) <= share * float(wanted[n].abs().max())
        for n in wanted
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_ranks_average_what_a_single_process_does(two, alone, layout):
    ranks = two[layout]["in_trainer"]
    assert same_weights(ranks[0]["averages"], ranks[1]["averages"])
    assert ranks[0]["losses"] == ranks[1]["losses"]
    assert ranks[0]["steps"] == alone["steps"]
    # Sums over ranks in another order, through Adam's division: 9e-7 here.
    assert close(ranks[0]["averages"], alone["averages"], 1e-5)
    assert not close(ranks[0]["weights"], alone["averages"], 5e-3)  # the average is another
    assert ranks[0]["losses"] == pytest.approx(alone["losses"], abs=1e-5)


def test_under_fsdp2_each_process_holds_a_part(two, alone):
    for rank in two["fsdp2"]["in_trainer"]:
        assert rank["sharded"]
        assert all(count < alone["local"][name] for name, count in rank["local"].items())
    for rank in two["ddp"]["in_trainer"]:
        assert rank["local"] == alone["local"]


@pytest.mark.parametrize("layout", ["alone", *LAYOUTS])
def test_averaging_and_evaluating_change_nothing_of_training(two, alone, layout):
    """Under FSDP2 a forward leaves the root's weights gathered: they must not be trained on."""
    for rank in [alone] if layout == "alone" else two[layout]["in_trainer"]:
        assert same_weights(rank["weights"], rank["bare weights"])
        assert same_weights(rank["weights"], rank["weights after saving"])


@pytest.mark.parametrize("layout", ["alone", *LAYOUTS])
def test_an_evaluation_that_is_cut_off_leaves_the_weights_of_training(two, alone, layout):
    for rank in [alone] if layout == "alone" else two[layout]["in_trainer"]:
        found = rank["interrupted"]
        assert found["raised"]
        assert same_weights(found["weights"], rank["weights"])
        before, after = found["of training"]
        assert before == after
        before, after = found["of the average"]
        assert before == after == rank["losses"][-1]
        assert found["of training"][0] != found["of the average"][0]


@pytest.mark.parametrize("layout", ["alone", *LAYOUTS])
def test_a_resumed_run_is_bitwise_the_one_that_was_not_interrupted(two, alone, layout):
    for rank in [alone] if layout == "alone" else two[layout]["in_trainer"]:
        again = rank["resumed"]
        assert again["losses"] == rank["losses"]
        assert same_weights(again["averages"], rank["averages"])
        assert same_weights(again["weights"], rank["weights"])
        assert again["retained"]


@pytest.mark.parametrize("layout", ["alone", *LAYOUTS])
def test_all_ranks_stop_at_the_same_evaluation(two, alone, layout):
    for rank in [alone] if layout == "alone" else two[layout]["in_trainer"]:
        assert rank["stopped"] == rank["losses"][:3]
        assert rank["losses"][2] == min(rank["losses"][:3])


def test_a_model_that_was_loaded_in_shards_is_averaged_alike(two, alone):
    for rank in two["ddp"]["at_load_time"]:
        assert rank["sharded"]
        assert close(rank["averages"], alone["averages"], 1e-5)
        assert rank["losses"] == pytest.approx(alone["losses"], abs=1e-5)
        assert same_weights(rank["resumed"], rank["averages"])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_ranks_have_saved_a_single_process_loads(two, layout):
    rank = two[layout]["in_trainer"][0]
    average = WeightAverage(llama(layers=2, tied=True))
    average.load(Path(rank["checkpoint"]) / AVERAGE_FOLDER)
    assert same_weights(dict(average.values), rank["averages"])
    assert average.updates == rank["steps"]
    saved = Path(rank["checkpoint"]).parents[1] / "averaged"
    model: Any = LlamaForCausalLM.from_pretrained(saved)
    assert same_weights(dict(model.named_parameters()), rank["averages"])


def test_what_a_single_process_has_saved_is_loaded_in_shards(two, one_process):
    _, average = one_process
    for rank in two["fsdp2"]["from_one_process"]:
        assert rank["sharded"]
        assert same_weights(rank["averages"], dict(average.values))
        assert rank["state"] == (average.updates, average.retained, average.tokens_seen)


def test_flat_parameters_are_refused(four):
    for rank in four:
        assert "must not be sharded by FSDP1, because" in rank["FSDP1"]


@pytest.mark.parametrize("name", MESHES)
def test_on_other_meshes_too_it_is_the_average(four, folder_of_four, name):
    kind, _ = MESHES[name]
    single = layouts.MODELS[kind]()
    start = {n: p.detach().clone() for n, p in single.named_parameters() if p.requires_grad}
    factors = [2, 6, 24]
    for rank in four:
        found = rank[name]
        wanted = {
            n: reference.weight_average([f * value for f in factors], DECAYS)
            for n, value in start.items()
        }
        assert close(found["averages"], wanted, 1e-6)
        assert same_weights(found["again"], found["averages"])
        assert all(torch.equal(found["inside"][n], found["averages"][n]) for n in wanted)
        assert same_weights(found["after"], found["weights"])
    assert (min(rank[name]["least"] for rank in four) == 0) == (name == "an empty shard")
    average = WeightAverage(single)
    average.load(folder_of_four / "meshes" / name)
    assert same_weights(dict(average.values), four[0][name]["averages"])
