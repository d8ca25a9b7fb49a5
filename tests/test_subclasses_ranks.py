"""TRL's SFTTrainer and adapters of peft on two processes, with DDP."""

import pytest

from tests.scenarios import launch


pytestmark = [pytest.mark.slow, pytest.mark.distributed]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    return launch("tests.subclasses_on_ranks", 2, ["sft", "adapters"], folder)


def test_a_constant_batch_trains_bitwise_as_sft_trainer(ranks):
    for rank in ranks["sft"]:
        assert rank["constant"]["losses"] == rank["plain"]["losses"] != []
        assert rank["constant"]["weights"] == rank["plain"]["weights"]
        assert rank["growing"]["weights"] != rank["plain"]["weights"]


@pytest.mark.parametrize(
    ("scenario", "name"), [("sft", "growing"), ("adapters", "none"), ("adapters", "4 bits")]
)
def test_the_batch_grows_alike_on_both_and_every_sample_is_trained_on_once(ranks, scenario, name):
    first, second = (rank[name] for rank in ranks[scenario])
    assert first["weights"] == second["weights"]
    records = first["records"]
    assert records["global_batch_size"][0] < max(records["global_batch_size"]) == 16
    assert set(records["data_parallel_size"]) == {2}
    assert sum(records["step_samples"]) == first["samples"]
    norms = zip(records["small_sq_norm"], records["big_sq_norm"], strict=True)
    assert all(small > big > 0 for small, big in norms)
