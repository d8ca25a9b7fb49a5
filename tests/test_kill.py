"""A real run that is killed without warning and resumed ends as the run that was never killed."""

import argparse
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hf_adaptive_batch import read_records
from hf_adaptive_batch.report.records import RECORDS_FILE


KILLS = 3
FLAGS = [
    *("--hidden_size", "32", "--num_hidden_layers", "2", "--num_attention_heads", "2"),
    *("--intermediate_size", "64", "--block_size", "32", "--max_eval_samples", "8"),
    *("--max_train_samples", "12000", "--max_global_batch_size", "64", "--logging_steps", "1"),
    *("--eval_strategy", "no", "--save_steps", "3", "--dataloader_num_workers", "1"),
    *("--use_cpu", "true", "--disable_tqdm", "true"),
]


def start(folder: Path, text: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "hf_adaptive_batch", "pretrain", *FLAGS]
    command += ["--dataset", str(text), "--output_dir", str(folder)]
    if list(folder.glob("checkpoint-*/trainer_state.json")):
        command += ["--resume_from_checkpoint", "true"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment
    )


def decisions(folder: Path) -> int:
    path = folder / RECORDS_FILE
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.mark.slow
def test_a_run_that_is_killed_at_random_moments_ends_as_the_one_that_was_not(tmp_path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(Path(argparse.__file__).read_text("utf-8"), "utf-8")
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert start(whole, text).wait() == 0
    total = decisions(whole)

    moments = random.Random(0)
    for kill in range(KILLS):
        process = start(broken, text)
        # Somewhere in the next stretch of the run, saves and growth included.
        until = total * (kill + moments.random()) / (KILLS + 1)
        while process.poll() is None and decisions(broken) < until:
            time.sleep(0.001)
        assert process.poll() is None, "the run ended before it was killed"
        process.kill()
        process.wait()
    assert start(broken, text).wait() == 0

    assert read_records(broken) == read_records(whole)
    assert len(set(read_records(whole)["global_batch_size"])) > 2  # it grew meanwhile
    expected = load_file(whole / "model.safetensors")
    found = load_file(broken / "model.safetensors")
    assert all(torch.equal(found[name], expected[name]) for name in expected)
