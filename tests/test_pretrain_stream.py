"""`pretrain --streaming`: trained on shards as they are read, and resumed in their middle."""

import bisect
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from hf_adaptive_batch import read_records
from hf_adaptive_batch.cli import main
from hf_adaptive_batch.packed_stream import PackedStream
from hf_adaptive_batch.pretrain_arguments import DataArguments
from hf_adaptive_batch.report.records import RECORDS_FILE


TINY = [
    *("--hidden_size", "16", "--num_hidden_layers", "1", "--num_attention_heads", "2"),
    *("--intermediate_size", "32", "--block_size", "64", "--max_eval_samples", "8"),
    *("--max_global_batch_size", "32", "--use_cpu", "true", "--save_total_limit", "9"),
    *("--streaming", "--shuffle_blocks", "50"),
]
BUDGET = ["--max_train_samples", "1000"]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real text: the paragraphs of three modules, a shard each."""
    folder = tmp_path_factory.mktemp("shards")
    for module in (json, re, bisect):
        assert module.__file__
        text = Path(module.__file__).read_text("utf-8")
        rows = [json.dumps({"text": part}) for part in text.split("\n\n")]
        (folder / f"{module.__name__}.jsonl").write_text("\n".join(rows), "utf-8")
    return folder


def train(shards: Path, folder: Path, *flags: str) -> None:
    given = ["--dataset", str(shards), "--output_dir", str(folder), *BUDGET, *flags]
    assert main(["pretrain", *TINY, *given]) == 0


@pytest.fixture(scope="module")
def finished(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "whole"
    train(shards, folder)
    return folder


def test_a_run_trains_on_its_budget_and_says_what_it_knows(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(shards, tmp_path, "--save_strategy", "no")
    shown = capsys.readouterr().out
    assert "a stream of 3 shards to train on, 8 to validate" in shown
    assert read_records(tmp_path)["samples_seen"][-1] == 1000
    assert re.search(r"trained on +1,000 samples, 64,000 tokens", shown)
    # Several epochs: the whole text is not that long, and each of them has its own order.
    assert 64_000 > 1.2 * sum(file.stat().st_size for file in shards.iterdir())
    assert (tmp_path / "model.safetensors").is_file()


def test_a_broken_off_run_goes_on_as_if_it_had_not_been(
    shards: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = []
    load = PackedStream.load_state_dict

    def load_state_dict(stream: PackedStream, state: dict[str, Any]) -> None:
        places.append((state["epoch"], state["window"], state["yielded"]))
        load(stream, state)

    monkeypatch.setattr(PackedStream, "load_state_dict", load_state_dict)
    checkpoints = sorted(finished.glob("checkpoint-*"), key=lambda path: int(path.name[11:]))
    assert len(checkpoints) == 4
    for kept in checkpoints[:-1]:
        folder = tmp_path / kept.name
        folder.mkdir()
        shutil.copytree(kept, folder / kept.name)
        shutil.copy(finished / RECORDS_FILE, folder)
        train(shards, folder, "--resume_from_checkpoint", "true")
        assert read_records(folder) == read_records(finished)
        found, expected = ((f / "model.safetensors").read_bytes() for f in (folder, finished))
        assert found == expected
    # Not found by reading all again, and not all of them in one epoch.
    assert len(set(places)) == 3
    assert sorted(places) == places
    assert places[0][0] < places[-1][0]


def test_the_order_is_that_of_the_seed_and_not_of_the_workers(shards: Path, tmp_path: Path) -> None:
    def weights(name: str, *flags: str) -> bytes:
        train(shards, tmp_path / name, "--batch_schedule", "constant", *flags)
        return (tmp_path / name / "model.safetensors").read_bytes()

    plain = weights("plain")
    assert weights("one", "--dataloader_num_workers", "1") == plain
    assert weights("unshuffled", "--shuffle_blocks", "0") != plain
    assert weights("other", "--data_seed", "5") != plain


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num_train_epochs", "2"], r"num_train_epochs \(2\.0\) must not be the only budget"),
        (["--dataset", "python-stdlib"], r"source \('python-stdlib'\) must be files or a Hub"),
        (["--shuffle_blocks", "-1"], r"shuffle_blocks \(-1\) must not be negative"),
    ],
)
def test_what_does_not_fit_a_stream_is_one_line_and_status_2(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    given = ["--dataset", str(shards), "--output_dir", str(tmp_path), *flags]
    assert main(["pretrain", *TINY, *given]) == 2
    error = capsys.readouterr().err
    assert re.match(rf"error: {message}", error)
    assert error.count("\n") == 1


def test_without_a_number_of_validation_blocks_a_stream_is_refused() -> None:
    with pytest.raises(ValueError, match=r"max_eval_samples \(None\) must be given with streaming"):
        DataArguments(streaming=True, max_eval_samples=None)
