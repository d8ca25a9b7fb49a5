"""`accelerate launch` with the files of `accelerate_configs/`: one record, however it is laid out.

The script of `examples/` trains the same small Llama on every layout, is killed and resumed, and
goes on with other numbers of processes. Steps are of micro-batches of two samples everywhere, so
that also what is measured is the same.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import shutil
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from transformers import LlamaForCausalLM

from hf_adaptive_batch import read_records
from hf_adaptive_batch.byte_tokenizer import byte_tokenizer
from hf_adaptive_batch.checkpoint import STATE_FILE, find_complete_checkpoint
from hf_adaptive_batch.corpus import load_text
from hf_adaptive_batch.packing import pack
from hf_adaptive_batch.report.records import RECORDS_FILE

from .launches import Launch, launch


pytestmark = [pytest.mark.distributed, pytest.mark.slow]

BLOCK, SAVE_STEPS, SIZES = 32, 2, [8, 8, 16, *[32] * 7]
# The batch doubles 8 -> 16 -> 32: so small an eta asks for more than the cap.
FLAGS = (
    *("--hidden_size", "64", "--intermediate_size", "128", "--num_hidden_layers", "2"),
    *("--num_attention_heads", "4", "--block_size", str(BLOCK), "--max_eval_samples", "64"),
    *("--max_train_samples", "240", "--eta", "0.1", "--max_global_batch_size", "32"),
    *("--logging_steps", "0.2", "--eval_steps", "0.5", "--save_steps", str(SAVE_STEPS)),
)
SAME = (
    *("--tie_word_embeddings", "false", "--per_device_train_batch_size", "2"),
    *("--max_micro_batch_size", "2"),
)
KEEP_ALL = ("--save_total_limit", "1000")
RESUMED = ("--save_total_limit", "2", "--resume_from_checkpoint", "true")
SHARD_SIZE = "--parallelism_config_dp_shard_size"


class Layout(NamedTuple):
    """Where the script runs: the configuration, with what the command line says otherwise."""

    config: str
    processes: int
    accumulation: int
    named: str  # how the script calls it
    shim: bool = False
    launcher: Sequence[str] = ()
    flags: Sequence[str] = ()

    def start(self, folder: Path, text: Path, flags: Sequence[str], **options: Any) -> Launch:
        """The script, its samples per step the same whatever the processes."""
        given = (*FLAGS, *SAME, *self.flags, "--dataset", str(text), "--output_dir", str(folder))
        accumulation = ("--gradient_accumulation_steps", str(self.accumulation))
        return launch(
            self.config,
            self.processes,
            (*given, *accumulation, *flags),
            folder.with_suffix(".log"),
            launcher=self.launcher,
            shim=self.shim,
            **options,
        )


FULL = ("--fsdp_state_dict_type", "FULL_STATE_DICT")
LAYOUTS = {
    "single": Layout("single", 1, 4, ""),
    "ddp": Layout("ddp_cpu", 2, 2, "DDP"),
    "fsdp2 sharded": Layout("fsdp2", 2, 2, "FSDP2", shim=True),
    "fsdp2 full": Layout("fsdp2", 2, 2, "FSDP2", shim=True, launcher=FULL),
    "hsdp": Layout(
        *("hsdp", 4, 1, "2 replicas of FSDP2 shards (HSDP)"),
        shim=True,
        launcher=("--parallelism_config_dp_replicate_size", "2", SHARD_SIZE, "2"),
    ),
    "fsdp2 at load time": Layout("ddp_cpu", 2, 2, "2 shards (FSDP2)", flags=("--fsdp_size", "2")),
    "fsdp2 and tp": Layout(
        *("fsdp2_tp", 4, 2, "2 shards (FSDP2) x 2 tensor-parallel"),
        shim=True,
        launcher=(SHARD_SIZE, "2"),
    ),
    "fsdp1": Layout(
        *("fsdp1", 2, 2, "FSDP1"), shim=True, launcher=("--fsdp_sync_module_states", "false")
    ),
}
SEVERAL = [name for name in LAYOUTS if name != "single"]
# torch's FSDP1 gathers a whole model on GPUs alone: the script ends there, its training done.
WHOLE_MODEL = [name for name in LAYOUTS if name != "fsdp1"]
KILLED = ["ddp", "fsdp2 sharded", "fsdp2 full", "fsdp2 at load time", "fsdp2 and tp"]
FRESH = ["single", "fsdp2 sharded"]  # started as a user does


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A text that every machine has."""
    path = tmp_path_factory.mktemp("text") / "argparse.txt"
    path.write_text(Path(argparse.__file__).read_text("utf-8"), "utf-8")
    return path


@pytest.fixture(scope="module")
def whole(tmp_path_factory, text):
    """The folder of an uninterrupted run; each is made when it is first asked for."""
    parent, made = tmp_path_factory.mktemp("whole"), {}

    def run(name: str) -> Path:
        if name not in made:
            folder = parent / name.replace(" ", "-")
            started = LAYOUTS[name].start(folder, text, KEEP_ALL, fresh=name in FRESH)
            if name in WHOLE_MODEL:
                started.expect_success()
            else:
                started.wait()
            made[name] = folder
        return made[name]

    yield run
    shutil.rmtree(parent)  # 50 MB, which pytest would keep


def log_of(folder: Path) -> str:
    return folder.with_suffix(".log").read_text("utf-8", "replace")


def evaluations(folder: Path) -> list[float]:
    last = folder if (folder / "trainer_state.json").exists() else last_checkpoint(folder)
    state = json.loads((last / "trainer_state.json").read_text("utf-8"))
    return [entry["eval_loss"] for entry in state["log_history"] if "eval_loss" in entry]


def checkpoints(folder: Path) -> dict[int, Path]:
    found = {int(path.name.split("-")[-1]): path for path in folder.glob("checkpoint-*")}
    return dict(sorted(found.items()))


def last_checkpoint(folder: Path) -> Path:
    return list(checkpoints(folder).values())[-1]


# ----------------------------------------------------------------------------- the same everywhere


@pytest.mark.parametrize("name", SEVERAL)
def test_every_layout_leaves_the_record_of_a_single_process(whole, name):
    """Sums are in another order, and fp32 has 6e-8 of rounding: 3e-7 was the most in ten steps."""
    expected, records = read_records(whole("single")), read_records(whole(name))
    assert expected["global_batch_size"] == SIZES
    columns = ("step", "samples_seen", "tokens_seen", "step_samples", "epoch", "reason", "workers")
    sizes = ("global_batch_size", "next_global_batch_size", "micro_batch_size", "threshold")
    for column in (*columns, *sizes, "learning_rate"):
        assert records[column] == expected[column], column
    assert records["loss"] == pytest.approx(expected["loss"], rel=1e-6)
    for column in ("small_sq_norm", "big_sq_norm", "grad_sq_norm", "noise_trace"):
        assert records[column] == pytest.approx(expected[column], rel=1e-5), column
    layout = LAYOUTS[name]
    ranks = 8 // 2 // layout.accumulation
    assert set(records["data_parallel_size"]) == {ranks}
    assert [2 * ranks * steps for steps in records["accumulation_steps"]] == records[
        "global_batch_size"
    ]


@pytest.mark.parametrize("name", SEVERAL)
def test_every_layout_evaluates_as_a_single_process(whole, name):
    assert len(evaluations(whole(name))) == 2
    assert evaluations(whole(name)) == pytest.approx(evaluations(whole("single")), rel=1e-6)


def loss_of_model(folder: Path, text: Path) -> float:
    """Of the model that was saved last, on what the script validates on."""
    model = LlamaForCausalLM.from_pretrained(folder).eval()
    blocks = pack(load_text(text)[1], byte_tokenizer(), BLOCK)
    count = min(64, len(blocks))
    rows = torch.tensor([blocks[i * len(blocks) // count]["input_ids"] for i in range(count)])
    with torch.no_grad():
        return float(model(input_ids=rows, labels=rows).loss)


@pytest.mark.parametrize("name", WHOLE_MODEL)
def test_the_last_model_is_loaded_by_one_process_and_has_the_loss_that_was_logged(
    whole, text, name
):
    found = loss_of_model(whole(name), text)
    assert found == pytest.approx(evaluations(whole(name))[-1], rel=1e-5)


@pytest.mark.parametrize("name", SEVERAL)
def test_one_process_prints_draws_and_records(whole, name):
    folder, layout = whole(name), LAYOUTS[name]
    printed = [line.rsplit("\r", 1)[-1] for line in log_of(folder).splitlines()]
    assert f"ranks  {layout.processes} processes, {layout.named}" in printed
    logs = re.findall(r"\d+ samples  (?:eval )?loss [\d.]+", log_of(folder))
    assert len(logs) >= 6
    lines = Counter([*logs, *(line for line in printed if line.startswith(("text ", "batch ")))])
    assert set(lines.values()) == {1}, lines
    steps = [json.loads(line)["step"] for line in (folder / RECORDS_FILE).read_text().splitlines()]
    assert steps == [*range(1, len(SIZES) + 1)]
    assert len(list(folder.glob(f"{Path(RECORDS_FILE).stem}*"))) == 1
    bars = re.findall(r"100%\S+ 240/240", log_of(folder))
    assert bars
    if name in WHOLE_MODEL:
        ends = ("validation loss", "perplexity", "picture")
        assert [sum(line.startswith(end) for line in printed) for end in ends] == [1, 1, 1]
        assert (folder / "run.png").is_file()


@pytest.mark.parametrize("name", LAYOUTS)
def test_checkpoints_are_complete_and_of_the_kind_that_was_asked_for(whole, name):
    saved, layout = checkpoints(whole(name)), LAYOUTS[name]
    assert list(saved) == [*range(SAVE_STEPS, len(SIZES) + 1, SAVE_STEPS)]
    for step, path in saved.items():
        state = json.loads((path / STATE_FILE).read_text("utf-8"))
        assert state["clock"]["samples_seen"] == min(sum(SIZES[:step]), 240)
        files = {file.name for file in path.iterdir()}
        states = {f"rng_state_{rank}.pth" for rank in range(layout.processes)}
        assert files >= (states if layout.processes > 1 else {"rng_state.pth"})
        if name in ("fsdp2 sharded", "hsdp", "fsdp1"):
            assert files >= {"pytorch_model_fsdp_0", "optimizer_0"}
            assert "model.safetensors" not in files
        elif name == "fsdp2 full":
            assert files >= {"pytorch_model_fsdp.bin", "optimizer.bin"}
        elif name in ("fsdp2 at load time", "fsdp2 and tp"):
            assert files >= {"model.safetensors", "optimizer_shards"}
        else:
            assert files >= {"model.safetensors", "optimizer.pt"}


# -------------------------------------------------------------------------------- killed, resumed


def kill_at_step(started: Launch, folder: Path, step: int, delay: float) -> None:
    """Once a step was recorded, and a little later."""
    wait_for(started, lambda: len(recorded(folder)) >= step)
    time.sleep(delay)
    started.kill()


def kill_inside_save(started: Launch, folder: Path, after: int) -> bool:
    """In the middle of a save; whether there was one that was not over too soon."""
    wait_for(started, lambda: len(recorded(folder)) > after or started.ended)
    processes = started.processes()
    while not started.ended:
        saving = max(checkpoints(folder), default=0)
        path = folder / f"checkpoint-{saving}"
        if saving > after and not (path / "trainer_state.json").exists():
            started.stop(processes)
            if find_complete_checkpoint(folder) != str(path) and path.exists():
                started.kill()
                return True
            started.go_on(processes)
    started.kill()
    return False


def wait_for(started: Launch, condition: Any) -> None:
    end = time.monotonic() + 120
    while not condition():
        assert not started.ended, started.output[-4000:]
        assert time.monotonic() < end, started.output[-4000:]
        time.sleep(0.001)


def recorded(folder: Path) -> list[str]:
    path = folder / RECORDS_FILE
    return path.read_text("utf-8").splitlines() if path.exists() else []


@pytest.mark.parametrize("name", KILLED)
def test_a_launch_that_is_killed_and_resumed_ends_as_the_one_that_was_not(
    tmp_path, whole, text, name
):
    expected, layout, folder = whole(name), LAYOUTS[name], tmp_path / "killed"
    dice = random.Random(name)
    first = layout.start(folder, text, ("--save_total_limit", "2"))
    kill_at_step(first, folder, SAVE_STEPS + 1, dice.uniform(0, 0.1))
    before = find_complete_checkpoint(folder)
    assert before is not None
    done = int(before.rpartition("-")[2])
    assert done >= SAVE_STEPS
    for _ in range(3):  # a save may be over before it is seen
        kept = tmp_path / "kept"
        shutil.copytree(folder, kept, dirs_exist_ok=True)
        if kill_inside_save(layout.start(folder, text, RESUMED), folder, done):
            break
        shutil.rmtree(folder)
        kept.rename(folder)
    else:
        pytest.fail("no launch was killed inside a save")
    layout.start(folder, text, RESUMED, fresh=name == "ddp").expect_success()
    assert (folder / RECORDS_FILE).read_bytes() == (expected / RECORDS_FILE).read_bytes()
    weights = "model.safetensors"
    assert (folder / weights).read_bytes() == (expected / weights).read_bytes()
    assert evaluations(folder) == evaluations(expected)
    assert list(checkpoints(folder)) == [len(SIZES) - SAVE_STEPS, len(SIZES)]


# ------------------------------------------------------------------------- other numbers of ranks

FULL_ON_FOUR = LAYOUTS["fsdp2 full"]._replace(processes=4, accumulation=1)
OTHERS = {**LAYOUTS, "fsdp2 full x 4": FULL_ON_FOUR}
ELASTIC = [
    ("ddp", "single"),
    ("single", "ddp"),
    ("fsdp2 sharded", "hsdp"),
    ("hsdp", "fsdp2 sharded"),
    ("fsdp2 full", "fsdp2 full x 4"),
    ("fsdp2 at load time", "fsdp2 and tp"),
    ("fsdp1", "fsdp2 sharded"),
]


def go_on_elsewhere(whole: Path, other: str, folder: Path, text: Path) -> Launch:
    shutil.copytree(whole / "checkpoint-2", folder / "checkpoint-2")
    shutil.copy(whole / RECORDS_FILE, folder)
    return OTHERS[other].start(folder, text, RESUMED)


@pytest.mark.parametrize(("name", "other"), ELASTIC)
def test_a_checkpoint_goes_on_elsewhere_with_the_same_samples_and_decisions(
    tmp_path, whole, text, name, other
):
    expected, folder = whole(name), tmp_path / "other"
    go_on_elsewhere(expected, other, folder, text).expect_success()
    found, records = read_records(folder), read_records(expected)
    for column in ("samples_seen", "step_samples", "reason", "global_batch_size", "workers"):
        assert found[column] == records[column], column
    assert set(found["data_parallel_size"][2:]) == {4 // OTHERS[other].accumulation}
    assert found["loss"] == pytest.approx(records["loss"], rel=1e-6)
    assert found["small_sq_norm"] == pytest.approx(records["small_sq_norm"], rel=1e-5)
    assert evaluations(folder) == pytest.approx(evaluations(expected), rel=1e-6)


OF_ANOTHER_KIND = [
    ("ddp", "fsdp2 at load time"),
    ("fsdp2 at load time", "ddp"),
    ("ddp", "fsdp2 sharded"),
    ("fsdp2 sharded", "fsdp2 full"),
    ("fsdp2 full", "fsdp2 sharded"),
    ("fsdp2 sharded", "single"),
    ("fsdp2 sharded", "fsdp2 at load time"),
]


@pytest.mark.parametrize(("name", "other"), OF_ANOTHER_KIND)
def test_a_checkpoint_of_another_kind_is_refused_with_a_message(tmp_path, whole, text, name, other):
    folder = tmp_path / "other"
    started = go_on_elsewhere(whole(name), other, folder, text)
    assert started.wait() != 0
    lines = [line for line in started.output.splitlines() if line.startswith("error: ")]
    assert lines, started.output[-4000:]
    assert all("resume_from_checkpoint" in line and "because" in line for line in lines)
    assert len(recorded(folder)) <= len(SIZES)
