"""Every adaptive_batch/* value reaches every tracker: read back from what each left on the disk."""

import json
import os
import sqlite3
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.proto import wandb_internal_pb2


ROOT = Path(__file__).resolve().parents[1]
PREFIX = "train/adaptive_batch/"

RUN = """
import json, sys
import datasets
from hf_adaptive_batch import AdaptiveBatchTrainer, GradientNoiseCallback
from tests.cases import arguments, llama, plain

rows = [[i % 4] * 8 for i in range(96)]  # there is something to learn, so noise is measurable
dataset = datasets.Dataset.from_dict({"input_ids": rows, "labels": rows})
given = {"model": llama(), "train_dataset": dataset}
common = {"report_to": ["tensorboard", "wandb", "trackio"], "logging_steps": 1}
if sys.argv[1] == "trainer":
    args = arguments("out", eta=0.1, batch_warmup_samples=8, max_global_batch_size=16, **common)
    trainer = AdaptiveBatchTrainer(args=args, **given)
else:
    trainer = plain("out", trainer=given, gradient_accumulation_steps=2, **common)
    GradientNoiseCallback.first_in(trainer)
trainer.train()
with open("history.json", "w") as file:
    json.dump(trainer.state.log_history, file)
"""


@pytest.fixture(scope="module", params=["trainer", "callback"])
def tracked(request, tmp_path_factory):
    """A folder in which a run was tracked, and what the Trainer itself remembers."""
    folder = tmp_path_factory.mktemp(request.param)
    environment = {
        **os.environ,
        "WANDB_MODE": "offline",
        "WANDB_SILENT": "true",
        "TRACKIO_DIR": str(folder / "trackio"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        [sys.executable, "-c", RUN, request.param],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr
    assert "attempting to log a value" not in done.stdout + done.stderr  # what a tracker drops
    history = json.loads((folder / "history.json").read_text("utf-8"))
    logged = {}
    for entry in history:
        ours = {k.removeprefix("adaptive_batch/"): v for k, v in entry.items() if "batch/" in k}
        if "loss" in entry:
            logged[entry["step"]] = ours
    assert {"noise_trace", "grad_sq_norm", "noise_scale"} <= set().union(*logged.values())
    return folder, logged


def test_tensorboard_has_every_value(tracked):
    folder, logged = tracked
    [events] = {path.parent for path in (folder / "out" / "runs").rglob("events.*")}
    reader = EventAccumulator(str(events), {"scalars": 0, "tensors": 0})  # all of them
    reader.Reload()
    found: dict[int, dict] = {}
    for tag in reader.Tags()["scalars"]:
        if tag.startswith(PREFIX):
            for event in reader.Scalars(tag):
                found.setdefault(event.step, {})[tag.removeprefix(PREFIX)] = event.value
    for tag in reader.Tags()["tensors"]:
        if tag.startswith(PREFIX):
            for event in reader.Tensors(tag):
                name = tag.removeprefix(PREFIX).removesuffix("/text_summary")
                [text] = event.tensor_proto.string_val
                found.setdefault(event.step, {})[name] = text.decode()
    same(found, logged, rel=1e-6)  # it keeps 32 bits


def test_wandb_has_every_value(tracked):
    folder, logged = tracked
    [path] = (folder / "wandb").glob("offline-run-*/*.wandb")
    found = {}
    for record in wandb_records(path):
        if not record.HasField("history"):
            continue
        row = {
            "/".join(item.nested_key) or item.key: json.loads(item.value_json)
            for item in record.history.item
        }
        ours = {k.removeprefix(PREFIX): v for k, v in row.items() if k.startswith(PREFIX)}
        if "train/loss" in row:
            found[row["train/global_step"]] = ours
    same(found, logged)


def test_trackio_has_every_value(tracked):
    folder, logged = tracked
    [path] = (folder / "trackio").glob("*.db")
    connection = sqlite3.connect(path)
    found = {}
    for (metrics,) in connection.execute("SELECT metrics FROM metrics"):
        row = json.loads(metrics)
        ours = {k.removeprefix(PREFIX): v for k, v in row.items() if k.startswith(PREFIX)}
        if "train/loss" in row:
            found[row["train/global_step"]] = ours
    connection.close()
    same(found, logged)


def same(found: dict, logged: dict, rel: float = 1e-12) -> None:
    """Every value of every logged step, and no other."""
    assert found.keys() == logged.keys()
    for step, values in logged.items():
        assert found[step].keys() == values.keys()
        for name, value in values.items():
            expected = value if isinstance(value, str) else pytest.approx(value, rel=rel)
            assert found[step][name] == expected, (step, name)


def test_a_value_that_is_missing_is_found():
    with pytest.raises(AssertionError):
        same({1: {"noise_scale": 2.0}}, {1: {"noise_scale": 2.0, "reason": "at_cap"}})
    with pytest.raises(AssertionError):
        same({1: {"noise_scale": 2.0}}, {1: {"noise_scale": 2.1}})


def wandb_records(path: Path):
    """The records of an offline run's file: LevelDB's log format after a header of 7 bytes."""
    data, block = path.read_bytes(), 32768
    place, parts = 7, []
    while place + 7 <= len(data):
        if block - place % block < 7:  # no room for a header: the rest of the block is empty
            place += block - place % block
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        place += 7
        parts.append(data[place : place + length])
        place += length
        if kind in (1, 4):  # whole, or the last of several parts
            record = wandb_internal_pb2.Record()
            record.ParseFromString(b"".join(parts))
            parts = []
            yield record
