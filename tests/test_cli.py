"""The command as a person uses it: a tiny run on real text, its files, and its errors."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import hf_adaptive_batch
from hf_adaptive_batch import read_evaluations, read_records
from hf_adaptive_batch.cli import main
from hf_adaptive_batch.report.records import RECORDS_FILE


TINY = [
    *("--hidden_size", "16", "--num_hidden_layers", "1", "--num_attention_heads", "2"),
    *("--intermediate_size", "32", "--block_size", "32", "--max_eval_samples", "8"),
    *("--max_train_samples", "300", "--max_global_batch_size", "32", "--use_cpu", "true"),
]


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    """Real text: modules of the standard library, as one file and as lines of JSON."""
    folder = tmp_path_factory.mktemp("text")
    modules = [Path(module.__file__).read_text("utf-8") for module in (json, re, subprocess)]
    (folder / "one.txt").write_text("".join(modules), "utf-8")
    rows = [json.dumps({"code": part}) for part in "".join(modules).split("\n\n") if part.strip()]
    (folder / "rows.jsonl").write_text("\n".join(rows), "utf-8")
    return folder


@pytest.fixture(scope="module")
def finished(text, tmp_path_factory) -> tuple[Path, str]:
    """The folder of one finished run, and what the terminal showed."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    command = [sys.executable, "-m", "hf_adaptive_batch", "pretrain", *TINY]
    command += ["--dataset", str(text / "one.txt"), "--output_dir", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout + done.stderr


def test_a_run_leaves_records_a_picture_a_model_and_checkpoints(finished) -> None:
    folder, _ = finished
    columns = read_records(folder)
    assert columns["samples_seen"][-1] == 300
    assert columns["next_global_batch_size"][-1] > columns["global_batch_size"][0] == 4
    with Image.open(folder / "run.png") as picture:
        assert picture.width > 800
        assert len(picture.convert("RGB").getcolors(2**20) or []) > 10  # curves, not a blank page
    assert (folder / "model.safetensors").is_file()
    assert (folder / "tokenizer.json").is_file()
    assert len(list(folder.glob("checkpoint-*"))) == 2


def test_the_terminal_shows_progress_in_samples_and_a_summary(finished) -> None:
    folder, shown = finished
    assert re.search(r"\d+/300 \[.* samples/s, batch \d+", shown)
    assert re.search(r"[\d,]+ samples  loss \d\.\d{4}  lr \S+  batch \d+ = \d+ x \d+", shown)
    loss = float(re.search(r"validation loss +(\d+\.\d+)", shown)[1])
    # Also in the line of each evaluation; the summary's come last.
    perplexity = float(re.findall(r"perplexity +(\d+\.\d+)", shown)[-1])
    bits = float(re.findall(r"bits per byte +(\d+\.\d+)", shown)[-1])
    assert perplexity == pytest.approx(math.exp(loss), rel=1e-3)
    # One token per byte and one for the end of the single document.
    assert bits == pytest.approx(loss / math.log(2), rel=1e-3)
    metrics = read_evaluations(folder)[-1]["metrics"]
    assert metrics["eval_token_loss"] == pytest.approx(metrics["eval_loss"], rel=1e-6)
    assert metrics["eval_perplexity"] == pytest.approx(perplexity, abs=1e-3)  # as printed
    assert metrics["eval_bits_per_byte"] == pytest.approx(bits, abs=1e-4)
    steps = int(re.search(r"optimizer steps +(\d+)", shown)[1])
    assert steps == len(read_records(folder)["step"])
    assert re.search(r"at constant batch +75 steps for the same samples", shown)
    assert "run.png" in shown
    assert "Warning" not in shown


def test_a_finished_or_broken_off_run_goes_on_only_when_asked(finished, text, capsys) -> None:
    folder, _ = finished
    flags = ["pretrain", *TINY, "--dataset", str(text / "one.txt"), "--output_dir", str(folder)]
    assert main(flags) == 2
    assert "must hold no checkpoints of an earlier run" in capsys.readouterr().err
    before = read_records(folder)
    assert main([*flags, "--resume_from_checkpoint", "true"]) == 0
    assert read_records(folder) == before


def test_rows_of_json_and_a_constant_batch(text, tmp_path, capsys) -> None:
    flags = ["pretrain", *TINY, "--dataset", str(text / "rows.jsonl"), "--text_column", "code"]
    flags += [
        "--output_dir",
        str(tmp_path),
        "--batch_schedule",
        "constant",
        "--save_strategy",
        "no",
    ]
    assert main(flags) == 0
    shown = capsys.readouterr().out
    assert "batch size         4 samples throughout" in shown
    assert not list(tmp_path.glob("checkpoint-*"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--dataset", "no/such/file.txt"], r"source .* must exist"),
        (["--eta", "1.5"], r"eta \(1\.5\) must be in \(0, 1\)"),
        (["--max_global_batch_size", "2"], r"max_global_batch_size \(2\) must be at least"),
        (["--max_micro_batch_size", "2"], r"max_micro_batch_size \(2\) must be at least"),
        (["--block_size", "10000000"], r"block_size \(10000000\) must not exceed"),
    ],
)
def test_what_does_not_fit_is_one_line_and_status_2(flags, message, tmp_path, text, capsys) -> None:
    given = ["--dataset", str(text / "one.txt"), "--output_dir", str(tmp_path), *flags]
    assert main(["pretrain", *TINY, *given]) == 2
    error = capsys.readouterr().err
    assert re.match(rf"error: {message}", error)
    assert error.count("\n") == 1
    assert not (tmp_path / RECORDS_FILE).exists()


def test_a_file_that_is_not_text_is_refused(tmp_path, capsys) -> None:
    (tmp_path / "noise.txt").write_bytes(bytes(range(256)))
    assert main(["pretrain", *TINY, "--dataset", str(tmp_path / "noise.txt")]) == 2
    assert "must be UTF-8 text" in capsys.readouterr().err


def test_help_lists_commands_and_every_flag(capsys) -> None:
    assert main([]) == main(["--help"]) == 0
    assert capsys.readouterr().out.count("pretrain   pretrain a causal language model") == 2
    with pytest.raises(SystemExit, match="0"):
        main(["pretrain", "--help"])
    shown = capsys.readouterr().out
    for flag in ("--eta", "--dataset", "--hidden_size", "--learning_rate", "--max_train_tokens"):
        assert flag in shown


def test_version_and_unknown_commands(capsys) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == hf_adaptive_batch.__version__
    assert main(["pretrian"]) == 2
    assert "command (pretrian) must be: pretrain" in capsys.readouterr().err


def test_a_finished_run_is_reported(finished, tmp_path, capsys) -> None:
    folder, shown = finished
    assert main(["report", str(folder), "--output", str(tmp_path)]) == 0
    page = (tmp_path / "report.html").read_text("utf-8")
    assert str(tmp_path / "report.html") in capsys.readouterr().out
    loss = re.search(r"validation loss +(\d\.\d{4})", shown)
    assert loss is not None
    assert loss[1] in page
    [run] = json.loads((tmp_path / "report.json").read_text("utf-8"))["runs"]
    assert run["samples"] == 300
    assert run["seconds"] > 0


@pytest.mark.parametrize("command", ["compare", "report"])
def test_commands_say_what_is_wrong_in_one_line(command, capsys, tmp_path) -> None:
    assert main([command, str(tmp_path / "nothing.yaml")]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: ")
    assert "must" in shown
    assert shown.count("\n") == 1
