"""What all tests share: one thread, so that they are as fast beside others, and the same twice."""

import os


os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # no warning from workers that were forked

import pytest
import torch
from hypothesis import HealthCheck, settings


torch.set_num_threads(1)

# Derandomized: a red test is red again. No deadline: the machine is shared, and speed is measured
# in benchmarks/.
settings.register_profile(
    "repository",
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("repository")


@pytest.fixture(autouse=True)
def _same_random_numbers():
    torch.manual_seed(0)
