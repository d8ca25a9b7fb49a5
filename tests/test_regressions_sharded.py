"""Defects that a review of sharded models found: each is tried as a user would come upon it.

The scenarios are those of `train_in_shards`, on real processes with gloo.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from transformers import LlamaForCausalLM

from hf_adaptive_batch.pretrain_arguments import ModelArguments
from hf_adaptive_batch.pretrain_model import _mesh

from .train_in_shards import FSDP2, HSDP, launch


CONFIGS = Path(__file__).resolve().parents[1] / "accelerate_configs"


def on_ranks(test: Any) -> Any:
    """Marks a test that waits for a launch."""
    return pytest.mark.distributed(pytest.mark.slow(test))


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    """Bitwise."""
    return first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Results by scenario and rank, on two processes."""
    return launch(2, ["experts", "pipeline", "mean_loss"], tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def folder_under_fsdp2(tmp_path_factory):
    return tmp_path_factory.mktemp("fsdp2")


@pytest.fixture(scope="module")
def under_fsdp2(folder_under_fsdp2):
    """The same where the launcher was told to use accelerate's FSDP2."""
    scenarios = ["sharded_twice", "sharded_twice_weights_only", "save_model"]
    return launch(2, scenarios, folder_under_fsdp2, FSDP2)


@pytest.fixture(scope="module")
def under_hsdp(tmp_path_factory):
    return launch(4, ["interrupted"], tmp_path_factory.mktemp("hsdp"), HSDP)


# ------------------------------------------- 1. a model whose saved names are not those in memory


@on_ranks
def test_the_experts_are_saved_by_other_names_than_they_have_in_memory(two):
    """What the following tests are about."""
    saved, in_memory = two["experts"][0]["names"]
    assert len(saved - in_memory) > len(in_memory - saved) > 0


@on_ranks
def test_experts_loaded_in_shards_resume_bitwise(two):
    for rank in two["experts"]:
        first, again = rank["records"]
        assert first == again
        assert first["step"] == [1, 2, 3, 4]
        assert first["global_batch_size"][-1] > first["global_batch_size"][0]
        assert [sorted(rank[key]) for key in ("saves", "saves_again")] == [[2, 4], [4]]
        assert same(rank["saves"][4], rank["saves_again"][4])
        assert rank["losses"][0] == rank["losses"][1]


@on_ranks
def test_the_weights_of_a_checkpoint_are_loaded_as_they_were(two):
    for rank in two["experts"]:
        assert same(rank["loaded"], rank["saves"][2])
        assert same(rank["read_whole"], rank["saves"][2])
        before = rank["before_loading"]
        assert not any(torch.equal(before[name], value) for name, value in rank["loaded"].items())


@on_ranks
def test_experts_loaded_in_shards_end_with_the_best_of_their_checkpoints(two):
    for rank in two["experts"]:
        assert rank["losses"][0][0] > rank["losses"][0][1]
        assert rank["best"] == "checkpoint-2"
        assert same(rank["at_end"], rank["saves"][2])
        assert same(rank["at_end_again"], rank["saves"][2])
        assert not same(rank["at_end"], rank["saves"][4])


# ----------------------------------------------------------------------------------- 2. pipelines


@on_ranks
def test_a_model_loaded_in_stages_of_a_pipeline_is_refused(two):
    for rank in two["pipeline"]:
        assert "pp_size (2) of distributed_config must be 1, because" in str(rank["error"])
        assert rank["save_only_model"] is False


# ------------------------------------------------------- 3. what the processes say in every step


@on_ranks
def test_a_plain_mean_loss_gathers_nothing_however_long_the_run(two):
    for rank in two["mean_loss"]:
        assert [len(rank[n]["steps"]) for n in ("4", "12")] == [4, 8]  # the batch grows
        short, long = (sum(rank[n]["steps"], Counter()) for n in ("4", "12"))
        for name in ("all_gather", "all_gather_object"):
            assert short[name] == long[name]
            assert not any(step[name] for step in rank["12"]["steps"][1:])


@on_ranks
def test_a_step_is_one_all_reduce_and_one_broadcast_where_it_is_measured(two):
    for rank in two["mean_loss"]:
        for length in ("4", "12"):
            steps, measured = rank[length]["steps"], rank[length]["measured"]
            assert 1 < len(measured) < len(steps)
            for number, calls in enumerate(steps[1:], start=2):
                assert calls["all_reduce"] == 1, number
                assert calls["broadcast"] == (number in measured), number


# ------------------------------------------------------------------- 4. the launcher's mesh


@pytest.fixture
def launched(monkeypatch):
    """Sets what `accelerate launch` does for a file with a parallelism_config."""

    def of(*, replicas: int, shards: int, tensors: int) -> None:
        monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
        for name, size in (
            ("DP_REPLICATE", replicas),
            ("DP_SHARD", shards),
            ("TP", tensors),
            ("CP", 1),
        ):
            monkeypatch.setenv(f"PARALLELISM_CONFIG_{name}_SIZE", str(size))

    return of


def sizes(replicas: int, shards: int, tensors: int) -> dict[str, int]:
    return {"dp_replicate_size": replicas, "fsdp_size": shards, "tp_size": tensors}


@pytest.mark.parametrize("flags", [{}, sizes(2, 2, 2)], ids=["no flags", "the same flags"])
def test_replicas_with_tensor_parallelism_by_the_launcher_are_refused(launched, flags):
    launched(replicas=2, shards=2, tensors=2)
    with pytest.raises(ValueError, match=r"dp_replicate_size \(2\) must be 1 with .*tp_size \(2\)"):
        _mesh(ModelArguments(**flags))


@pytest.mark.parametrize(
    "flags",
    [{"fsdp_size": 4}, {"tp_size": 2}, sizes(2, 2, 2), sizes(1, 2, 4)],
    ids=["shards", "tensors", "replicas", "turned round"],
)
def test_flags_that_contradict_the_mesh_of_the_launcher_are_refused(launched, flags):
    launched(replicas=1, shards=4, tensors=2)
    with pytest.raises(ValueError, match=r"launcher's parallelism_config \(4 and 2\).*give one"):
        _mesh(ModelArguments(**flags))


def test_the_mesh_of_the_launcher_holds_alone_and_with_flags_that_say_the_same(launched):
    launched(replicas=1, shards=4, tensors=2)
    assert _mesh(ModelArguments()) == sizes(1, 4, 2)
    assert _mesh(ModelArguments(fsdp_size=4, tp_size=2)) == sizes(1, 4, 2)


def test_the_flags_hold_where_the_launcher_has_no_tensor_parallelism(launched):
    flags = ModelArguments(dp_replicate_size=2, fsdp_size=2, tp_size=2)
    assert _mesh(flags) == sizes(2, 2, 2)
    launched(replicas=2, shards=4, tensors=1)
    assert _mesh(flags) == sizes(2, 2, 2)


# --------------------------------------------------------------- 5. an exception in mid-step


@on_ranks
@pytest.mark.parametrize("schedule", ["norm_test", "constant"])
def test_training_again_after_an_exception_under_hsdp_is_as_without_it(under_hsdp, schedule):
    for rank in under_hsdp["interrupted"]:
        without, after = (rank[f"{schedule}, {n}"] for n in ("undisturbed", "interrupted"))
        assert without["mesh"] == after["mesh"] == (2, 2)
        assert (after["raised"], after["steps_before"]) == (True, 0)
        assert len(without["gradients"]) == len(after["gradients"]) == 2
        for expected, gradient in zip(without["gradients"], after["gradients"], strict=True):
            assert float(expected.norm()) > 0
            assert torch.equal(expected, gradient)
        assert same(without["weights"], after["weights"])


# ---------------------------------------------------------------------- 6. sharded by two


@on_ranks
def test_a_model_loaded_in_shards_is_refused_where_accelerate_is_to_shard_it(under_fsdp2):
    for name, of_user in (("sharded_twice", False), ("sharded_twice_weights_only", True)):
        for rank in under_fsdp2[name]:
            assert "must be MULTI_GPU, because the model was loaded in shards" in rank["error"]
            assert "save_only_model" not in rank["error"]
            assert rank["save_only_model"] is of_user


@on_ranks
def test_save_only_model_stays_what_the_user_said_where_it_is_trained(two):
    for rank in two["experts"]:
        assert rank["save_only_model"] == [False, False]
        assert rank["save_only_model_of_user"] is True


# ------------------------------------------------------------------------ 7. save_model


@on_ranks
@pytest.mark.parametrize("when", ["under way", "by user"])
def test_save_model_writes_a_whole_model_where_checkpoints_are_sharded(
    under_fsdp2, folder_under_fsdp2, when
):
    folder = folder_under_fsdp2 / "save_model" / when
    assert (folder / "model.safetensors").is_file()
    found = dict(LlamaForCausalLM.from_pretrained(folder).named_parameters())
    for rank in under_fsdp2["save_model"]:
        assert rank["sharded"]
        assert same(found, rank[when])


@on_ranks
def test_checkpoints_are_sharded_after_save_model(under_fsdp2, folder_under_fsdp2):
    for rank in under_fsdp2["save_model"]:
        assert rank["kinds"] == ["SHARDED_STATE_DICT"] * 3
        assert not same(rank["under way"], rank["by user"])
    checkpoint = folder_under_fsdp2 / "save_model" / "out" / "checkpoint-2"
    assert list(checkpoint.glob("pytorch_model_fsdp_0/*.distcp"))
    assert not (checkpoint / "model.safetensors").exists()


# ------------------------------------------------------------------ 9. the configurations


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_reads_every_configuration(path):
    config = load_config_from_file(str(path))
    assert config.num_processes >= 1
    assert config.mixed_precision in ("no", "bf16")
    if path.stem == "single":
        assert config.num_processes == 1
        assert config.gpu_ids == "0"
