"""What a measured step says to the other processes, counted on up to 4,096 that are simulated.

docs/scaling.md gives these numbers.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


pytestmark = [pytest.mark.distributed, pytest.mark.slow]

SCRIPT = Path(__file__).with_name("count_collectives.py")
SIZES = [(8, 1), (512, 1), (4096, 1), (4096, 8)]


@pytest.fixture(scope="module")
def counted() -> dict[tuple[int, int], dict[str, Any]]:
    found = {}
    for sizes in SIZES:
        words = [sys.executable, str(SCRIPT), *map(str, sizes)]
        ended = subprocess.run(words, capture_output=True, text=True, timeout=120)
        assert ended.returncode == 0, ended.stderr
        found[sizes] = json.loads(ended.stdout)
    return found


@pytest.mark.parametrize("sizes", SIZES)
def test_a_measured_step_adds_32_bytes_to_the_exchange_and_broadcasts_a_decision(counted, sizes):
    steps = counted[sizes]
    assert steps["plain"]["own"] == [["allreduce", 24]]
    assert steps["measured"]["own"] == [["allreduce", 24 + 32], ["broadcast", 16]]


@pytest.mark.parametrize("sizes", SIZES)
def test_measuring_gathers_and_reduces_no_parameter_once_the_leaves_are_known(counted, sizes):
    plain, measured = counted[sizes]["plain"]["calls"], counted[sizes]["measured"]["calls"]
    assert {**measured, "broadcast": 0} == {**plain, "broadcast": 0}
    first = counted[sizes]["first measured"]["calls"]
    units = 3  # two layers and the root
    assert first["allgather_base"] == plain["allgather_base"] + units
    assert first["reduce_scatter_base"] == plain["reduce_scatter_base"]


@pytest.mark.parametrize("kind", ["stream", "split stream"])
def test_a_step_of_a_stream_takes_one_small_all_reduce(counted, kind):
    for sizes in SIZES:
        assert counted[sizes][kind]["calls"] == {"allreduce": 1}
        assert counted[sizes][kind]["bytes"] <= 64


def test_what_is_said_does_not_depend_on_the_number_of_processes(counted):
    first = counted[SIZES[0]]
    for sizes in SIZES[1:]:
        for kind, found in counted[sizes].items():
            assert found["own"] == first[kind]["own"]
            assert found["calls"] == first[kind]["calls"]
    # FSDP's own traffic does, so that the comparison can fail.
    assert counted[SIZES[2]]["plain"]["bytes"] > counted[SIZES[0]]["plain"]["bytes"]
