"""`compare`: its file, its runs as processes of a tiny program, and what it leaves behind."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml

from hf_adaptive_batch.compare.command import choose_learning_rate, compare
from hf_adaptive_batch.compare.file import plan_of, read_plan
from hf_adaptive_batch.compare.folders import locked
from hf_adaptive_batch.compare.machine import visible_gpus
from hf_adaptive_batch.compare.rules import DATA, MODEL
from hf_adaptive_batch.report.records import SCHEMA_VERSION


# Leaves the two files that a training run leaves; `--behave` says what else it does.
PROGRAM = """
    import json, math, os, subprocess, sys, time
    from pathlib import Path
    words = sys.argv[1:]
    flags = dict(zip((word[2:] for word in words[::2]), words[1::2], strict=True))
    folder, seed = Path(flags["output_dir"]), int(flags["seed"])
    with (folder / "starts").open("a") as file:
        file.write(json.dumps({
            "words": words, "threads": os.environ.get("OMP_NUM_THREADS"),
            "devices": os.environ.get("CUDA_VISIBLE_DEVICES"),
        }) + "\\n")
    behave = flags.get("behave", "")
    if behave == "fail" and seed == 1:
        print("loading [bold]text[/bold]\\rloading all")
        sys.exit("error: out of luck")
    if behave == "hang":
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        (folder / "pids").write_text(f"{os.getpid()} {child.pid}")
        time.sleep(600)
    (folder / "active").touch()
    most, end = 0, time.time() + float(flags.get("sleep", 0))
    while time.time() < end:
        most = max(most, len(list(folder.parents[2].glob("*/*/*/active"))))
        time.sleep(0.02)
    (folder / "active").unlink()
    (folder / "most").write_text(str(most))
    rate = float(flags.get("learning_rate", 0.002))
    loss = 2 + abs(math.log2(rate / 0.002)) + 0.01 * seed
    size = 32 if flags["batch_schedule"] == "norm_test" else 8
    samples = int(flags.get("max_train_samples", 800)) + size * (behave == "more")
    steps = samples // size
    if behave == "diverge":
        loss = None
    with (folder / "adaptive_batch.jsonl").open("w") as file:
        for step in range(1, steps + 1):
            line = {"version": VERSION, "step": step, "samples_seen": step * size,
                    "tokens_seen": step * size * 10, "seconds": 0.1 * step,
                    "global_batch_size": size, "next_global_batch_size": size, "loss": 2.5,
                    "reason": "constant"}
            file.write(json.dumps(line) + "\\n")
    with (folder / "evaluations.jsonl").open("w") as file:
        for step, value in ((steps // 2, 3.0), (steps, loss)):
            if behave == "blind" or (behave == "half" and step == steps):
                break
            line = {"version": VERSION, "step": step, "samples_seen": step * size,
                    "tokens_seen": step * size * 10, "seconds": 0.1 * step,
                    "global_batch_size": size, "metrics": {"eval_loss": value}}
            file.write(json.dumps(line) + "\\n")
"""

CONSTANT = {"batch_schedule": "constant"}
ADAPTIVE = {"batch_schedule": "norm_test", "eta": 0.3}


@pytest.fixture
def program(tmp_path: Path) -> list[str]:
    path = tmp_path / "train.py"
    path.write_text(textwrap.dedent(PROGRAM).replace("VERSION", str(SCHEMA_VERSION)), "utf-8")
    return ["python", str(path)]


@pytest.fixture
def write(tmp_path: Path, program: list[str]) -> Any:
    """Writes a compare file of the tiny program; gives the arguments of `compare`."""

    def write(**settings: Any) -> list[str]:
        given = {
            "program": program,
            "output_dir": str(tmp_path / "out"),
            "schedules": {"plain": CONSTANT, "adaptive": ADAPTIVE},
        }
        path = tmp_path / "runs.yaml"
        path.write_text(yaml.safe_dump({**given, **settings}, sort_keys=False), "utf-8")
        return [str(path)]

    return write


def starts(folder: Path) -> list[dict[str, Any]]:
    """One entry for each time that a run's program was started."""
    path = folder / "starts"
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()] * path.exists()


def report(tmp_path: Path) -> dict[str, Any]:
    return json.loads((tmp_path / "out" / "report.json").read_text("utf-8"))


def settings(**changed: Any) -> dict[str, Any]:
    return {"schedules": {"plain": CONSTANT}, **changed}


# ----------------------------------------------------------------------------------------- the file


BAD = [
    ({}, r"schedules \(none\) must be at least one"),
    ({"schedules": None}, r"schedules \(none\) must be at least one"),
    ({"schedules": ["constant"]}, r"schedules .* must be a mapping"),
    (settings(schedule=1), r"names in the compare file \(schedule\) must be among title, note"),
    (settings(title=3), r"title \(3\) must be text"),
    (settings(note=["a"]), r"note .* must be text"),
    (settings(seeds=0), r"seeds \(0\) must be a list of whole numbers"),
    (settings(seeds=[0.5]), r"seeds \(\[0.5\]\) must be a list of whole numbers"),
    (settings(seeds=[True]), r"seeds .* must be a list of whole numbers"),
    (settings(seeds=[-1]), r"seeds .* must be a list of whole numbers"),
    (settings(seeds=[]), r"seeds .* must be a list"),
    (settings(seeds=[1, 2, 1]), r"seeds \(1, 2, 1\) must be different ones"),
    (settings(tuning_seeds=[1, 1]), r"tuning_seeds .* must be different ones"),
    (settings(learning_rates=[0.1, 0]), r"learning_rates .* must be a list of numbers above 0"),
    (settings(learning_rates=["fast"]), r"learning_rates .* must be a list of numbers above 0"),
    (settings(learning_rates=[float("inf")]), r"learning_rates .* numbers above 0"),
    (settings(learning_rates=0.1), r"learning_rates \(0.1\) must be a list"),
    (settings(learning_rates=[0.001, "1e-3"]), r"learning_rates .* must be different ones"),
    (settings(target_loss="low"), r"target_loss \('low'\) must be a number"),
    (settings(target_loss=float("nan")), r"target_loss \(nan\) must be a number"),
    (settings(jobs=0), r"jobs \(0\) must be a whole number from 1"),
    (settings(jobs=True), r"jobs \(True\) must be a whole number"),
    (settings(program="python x.py"), r"program .* must be a list of words"),
    (settings(program=["no-such-program"]), r"no-such-program was not found"),
    (settings(launch=["no-such-launcher"]), r"no-such-launcher was not found"),
    (
        settings(launch=["accelerate", "launch"], program=["python3", "train.py"]),
        r"program \(python3 train.py\) must begin with the script, because accelerate starts",
    ),
    (settings(output_dir=3), r"output_dir \(3\) must be the path of a folder"),
    (settings(shared=[1]), r"shared .* must be a mapping"),
    (settings(shared={"block size": 1}), r"In shared: name of a setting \('block size'\)"),
    (settings(shared={"output_dir": "x"}), r"output_dir \(x\) must not stand in shared"),
    (settings(shared={"seed": 1}), r"seed \(1\) must not stand in shared.*give seeds"),
    (settings(shared={"resume_from_checkpoint": True}), r"resume_from_checkpoint .* must not"),
    (settings(shared={"overwrite_output_dir": True}), r"overwrite_output_dir .* must not"),
    (settings(shared={"learning_rate": [0.1, 0.2]}), r"learning_rate .* must be one number"),
    (settings(shared={"learning_rate": -1}), r"learning_rate \(-1\) must be one number above 0"),
    (
        settings(shared={"learning_rate": 0.1}, learning_rates=[0.1]),
        r"learning_rate \(0.1\) must not be shared where there are learning_rates \(0.1\)",
    ),
    (settings(schedules={"": CONSTANT}), r"name of a schedule \(''\) must be text"),
    (settings(schedules={8: CONSTANT}), r"name of a schedule \(8\) must be text"),
    (settings(schedules={"!?": CONSTANT}), r"name of a schedule .* must have a letter"),
    (settings(schedules={"..": CONSTANT}), r"name of a schedule .* must have a letter"),
    (settings(schedules={"a" * 101: CONSTANT}), r"at most 100 characters"),
    (settings(schedules={"a b": CONSTANT, "A-b": CONSTANT}), r"\('a b' and 'A-b'\) must differ"),
    (settings(schedules={"a": "constant"}), r"schedule 'a' \('constant'\) must be a mapping"),
    (settings(schedules={"a": None}), r"schedule 'a' \(None\) must be a mapping"),
    (settings(schedules={"a": {"eta": {1, 2}}}), r"In schedule 'a': eta .* must be text"),
    (settings(schedules={"a": {"seed": 1}}), r"seed \(1\) must not stand in schedule 'a'"),
    (settings(schedules={"a": {"learning_rate": 1}}), r"write learning_rates: \[1\]"),
    (settings(schedules={"a": {"learning_rates": [-1]}}), r"learning_rates of 'a' .* above 0"),
    (settings(schedules={"a": {"max_steps": 9}}), r"every run must have the same budget"),
    (settings(schedules={"a": {"max_train_tokens": 9}}), r"every run must have the same budget"),
    (settings(schedules={"a": {"dataset": "x"}}), r"every run must see the same data"),
    (settings(schedules={"a": {"hidden_size": 8}}), r"every run must train the same model"),
    (
        settings(schedules={"a": {"per_device_train_batch_size": 8}}),
        r"per_device_train_batch_size \(8\) must not stand in schedule 'a', because .* count in it",
    ),
    (settings(shared={"load_best_model_at_end": True}), r"load_best_model_at_end .* left out"),
]


@pytest.mark.parametrize(("bad", "message"), BAD, ids=[message for _, message in BAD])
def test_a_bad_file_is_refused_with_one_message(bad: Mapping[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        plan_of(bad)
    assert "because" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "must be given a file, or schedules, before any flag"),
        (["--seeds", "0"], "must be given a file, or schedules, before any flag"),
        (["a.yaml", "constant"], "must be given one file or a list of schedules"),
        (["a.yaml"], "settings file .* must be a text file that can be read"),
        (["constant", "constant"], "schedules .* must be different ones"),
        (["constant", "--seed", "1"], r"seed \(1\) must not stand in shared"),
        (["constant", "--output-dir", "x"], r"output_dir \(x\) must not stand in shared"),
        (["constant", "--jobs", "0"], "jobs .* must be a whole number"),
        (["constant", "--jobs", "2", "norm_test"], r"word \(norm_test\) must come after a flag"),
        (
            ["constant", "--learning_rates", "1e-3", "--learning_rate", "1e-3"],
            "learning_rate .* must not be shared",
        ),
    ],
)
def test_a_bad_command_line_is_refused_with_one_message(words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_plan(words)


def test_a_name_given_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "runs.yaml"
    path.write_text("schedules:\n  a: {batch_schedule: constant}\n  a: {eta: 0.3}\n", "utf-8")
    with pytest.raises(ValueError, match="a is given twice"):
        read_plan([str(path)])


def test_flags_of_the_model_and_the_data_are_those_of_pretrain() -> None:
    from hf_adaptive_batch.pretrain_arguments import DataArguments, ModelArguments

    layout = {"fsdp_size", "dp_replicate_size", "tp_size"}  # how it is computed, not what
    assert {f.name for f in fields(ModelArguments)} - layout <= set(MODEL)
    assert {f.name for f in fields(DataArguments)} <= set(DATA)


# ----------------------------------------------------------------------------------------- the plan


def test_a_list_of_schedules_stands_for_a_file() -> None:
    plan = read_plan(
        ["constant", "0:8 5%:16", "--seeds", "0", "1", "--max_train_samples", "4000", "--bf16"]
    )
    assert [schedule.name for schedule in plan.schedules] == ["constant", "0:8 5%:16"]
    assert plan.schedules[1].settings == {"batch_schedule": "0:8 5%:16"}
    assert plan.shared == {"max_train_samples": "4000", "bf16": True}
    runs = plan.possible_runs()
    assert [run.label for run in runs] == [
        "constant, seed 0",
        "constant, seed 1",
        "0:8 5%:16, seed 0",
        "0:8 5%:16, seed 1",
    ]
    assert runs[3].folder == Path("runs/compare/runs/0-8-5-16/lr-default/seed-1")
    assert runs[3].words() == [
        *("--max_train_samples", "4000", "--bf16", "true", "--batch_schedule", "0:8 5%:16"),
        *("--seed", "1", "--output_dir", "runs/compare/runs/0-8-5-16/lr-default/seed-1"),
    ]


def test_the_command_line_wins_over_the_file(write: Any) -> None:
    words = write(seeds=[0], jobs=3, title="T", shared={"block_size": 64, "max_train_samples": 9})
    plan = read_plan(
        [*words, "--max_train_samples=5", "--seeds", "4", "5", "--betas", "1", "2", "--jobs", "2"]
    )
    assert plan.shared == {"block_size": 64, "max_train_samples": "5", "betas": ["1", "2"]}
    assert (plan.seeds, plan.tuning_seeds, plan.jobs, plan.title) == ((4, 5), (4,), 2, "T")


def test_a_schedule_with_its_own_learning_rates_has_no_others() -> None:
    plan = plan_of(
        settings(
            learning_rates=["1e-3", 0.002],
            seeds=[0, 1, 2],
            tuning_seeds=[0, 5],
            schedules={"a": CONSTANT, "b": {**ADAPTIVE, "learning_rates": [0.5]}},
        )
    )
    a, b = plan.schedules
    assert [(run.seed, run.learning_rate) for run in plan.tuning_runs(a)] == [
        *((0, 0.001), (0, 0.002)),
        *((5, 0.001), (5, 0.002)),
    ]
    assert plan.tuning_runs(b) == []
    assert [(run.seed, run.learning_rate) for run in plan.runs_at(b, None)] == [
        (seed, 0.5) for seed in (0, 1, 2)
    ]
    assert len(plan.possible_runs()) == 4 * 2 + 3
    assert plan.count_runs() == (2 * 2 + 2) + 3


def test_the_shared_learning_rate_names_the_folder_as_a_tried_one_does() -> None:
    shared = plan_of(settings(shared={"learning_rate": "1e-3"})).possible_runs()[0]
    tried = plan_of(settings(learning_rates=[0.001, 0.002])).possible_runs()[0]
    assert shared == tried
    assert shared.folder.parts[-2:] == ("lr-0.001", "seed-0")


@pytest.mark.parametrize(
    ("tried", "best"),
    [
        ({0.1: 2.0, 0.2: 1.0, 0.4: 3.0}, 0.2),
        ({0.4: 1.0, 0.2: 1.0}, 0.2),
        ({0.1: float("nan"), 0.2: 5.0}, 0.2),
        ({0.4: float("nan"), 0.2: float("nan")}, 0.2),
        ({}, None),
    ],
)
def test_the_learning_rate_with_the_lowest_loss_is_chosen(
    tried: Mapping[float, float], best: float | None
) -> None:
    assert choose_learning_rate(tried) == best


# ----------------------------------------------------------------------------------------- the runs


def test_a_comparison_tunes_runs_and_reports(write: Any, tmp_path: Path, capsys: Any) -> None:
    words = write(seeds=[0, 1, 2], learning_rates=[0.001, 0.002, 0.004], title="The title")
    assert compare(words) == 0
    folders = {
        str(path.parent.relative_to(tmp_path / "out" / "runs"))
        for path in (tmp_path / "out").rglob("finished.json")
    }
    wanted = {f"lr-{rate}/seed-0" for rate in (0.001, 0.002, 0.004)}
    wanted |= {f"lr-0.002/seed-{seed}" for seed in (1, 2)}
    assert folders == {f"{name}/{run}" for name in ("plain", "adaptive") for run in wanted}
    shown = capsys.readouterr().out
    lines = [line for line in shown.splitlines() if line.startswith("[")]
    assert len(lines) == 10
    assert lines[0].startswith("[ 1/10] plain, lr 0.001, seed 0: validation loss 3.0000 after 100")
    assert lines[-1].startswith("[10/10] adaptive, lr 0.002, seed 2: validation loss 2.0200 after")
    assert "75 % fewer steps (25 against 100)" in " ".join(shown.split())
    assert str(tmp_path / "out" / "report.html") in shown
    values = report(tmp_path)
    assert [row["learning_rate"] for row in values["rows"]] == [0.002, 0.002]
    assert values["rows"][0]["loss_mean"] == pytest.approx(2.01)
    assert values["contenders"][0]["tried"][2] == {"learning_rate": 0.004, "loss": 3.0}
    assert values["setup"]["seeds"] == "0, 1, 2"
    assert "The title" in (tmp_path / "out" / "report.html").read_text("utf-8")


def test_finished_runs_are_not_run_again(write: Any, tmp_path: Path, capsys: Any) -> None:
    assert compare(write(seeds=[0])) == 0
    more = {"plain": CONSTANT, "adaptive": ADAPTIVE, "third": {"batch_schedule": "seesaw"}}
    assert compare(write(seeds=[0, 1], schedules=more)) == 0
    counts = {
        str(path.parent.relative_to(tmp_path / "out" / "runs")): len(starts(path.parent))
        for path in (tmp_path / "out").rglob("starts")
    }
    assert counts == {
        f"{name}/lr-default/seed-{seed}": 1
        for name in ("plain", "adaptive", "third")
        for seed in (0, 1)
    }
    assert capsys.readouterr().out.count("done before") == 2


def test_a_run_that_was_broken_off_goes_on_or_starts_anew(write: Any, tmp_path: Path) -> None:
    words = write()
    assert compare(words) == 0
    begun, other = (
        tmp_path / "out/runs" / name / "lr-default/seed-0" for name in ("plain", "adaptive")
    )
    (begun / "finished.json").unlink()
    (other / "finished.json").unlink()
    checkpoint = begun / "checkpoint-3"
    checkpoint.mkdir()
    for name in ("trainer_state.json", "adaptive_batch_state.json"):
        (checkpoint / name).write_text("{}", "utf-8")
    (other / "checkpoint-3").mkdir()  # in pieces
    assert compare(words) == 0
    assert starts(begun)[1]["words"][-2:] == ["--resume_from_checkpoint", str(checkpoint)]
    assert "--resume_from_checkpoint" not in starts(other)[1]["words"]


def test_a_folder_with_another_run_is_refused_before_anything_runs(
    write: Any, tmp_path: Path
) -> None:
    assert compare(write(shared={"max_train_samples": 800, "block_size": 64})) == 0
    assert compare(write(shared={"max_train_samples": 8e2, "block_size": "64"})) == 0  # the same
    with pytest.raises(ValueError, match="must hold the same run") as caught:
        compare(write(seeds=[7, 0], shared={"max_train_samples": 1600, "bf16": True}))
    assert "max_train_samples (1600; there 800)" in str(caught.value)
    assert "bf16 (true; there not given)" in str(caught.value)
    assert "block_size (not given; there 64)" in str(caught.value)
    assert "seed (" not in str(caught.value)
    assert not list((tmp_path / "out").rglob("seed-7"))
    with pytest.raises(ValueError, match="differ: program"):
        compare(write(shared={"max_train_samples": 800, "block_size": 64}, program=["true"]))


def test_an_output_dir_that_is_a_file_is_refused(write: Any, tmp_path: Path) -> None:
    (tmp_path / "out").touch()
    with pytest.raises(
        ValueError, match=r"must be a folder that can be written to, .* File exists"
    ):
        compare(write())


def test_a_failed_run_is_reported_and_the_others_go_on(
    write: Any, tmp_path: Path, capsys: Any
) -> None:
    schedules = {"plain": CONSTANT, "adaptive": {**ADAPTIVE, "behave": "fail"}}
    assert compare(write(seeds=[0, 1, 2], schedules=schedules)) == 1
    shown = capsys.readouterr().out
    log = tmp_path / "out/runs/adaptive/lr-default/seed-1/log.txt"
    assert f"[5/6] adaptive, seed 1: failed with exit status 1; {log} ends with:" in shown
    assert "    loading all\n    error: out of luck\n" in shown
    assert "[6/6] adaptive, seed 2: validation loss 2.0200" in shown
    values = report(tmp_path)
    assert values["failed"] == ["adaptive, seed 1 (exit status 1)"]
    assert [row["seeds"] for row in values["rows"]] == [3, 2]
    assert values["rows"][1]["difference"]["seeds"] == 2
    assert compare(write(seeds=[0, 2], schedules=schedules)) == 0
    assert len(starts(log.parent)) == 1


def test_a_schedule_of_which_all_runs_failed_is_left_out(
    write: Any, tmp_path: Path, capsys: Any
) -> None:
    failing = {**ADAPTIVE, "behave": "fail"}
    assert compare(write(seeds=[1], schedules={"plain": CONSTANT, "bad": failing})) == 1
    assert [row["name"] for row in report(tmp_path)["rows"]] == ["plain"]
    (tmp_path / "out/report.json").unlink()
    words = write(seeds=[1], schedules={"bad": failing, "plain": CONSTANT})
    assert compare(words) == 1
    assert (
        "error: no run of bad, which the others would be compared with" in capsys.readouterr().out
    )
    assert not (tmp_path / "out/report.json").exists()


def test_a_learning_rate_that_failed_is_not_chosen(write: Any, tmp_path: Path) -> None:
    schedules = {
        "plain": CONSTANT,
        "bad": {**ADAPTIVE, "behave": "fail", "learning_rates": [0.002, 0.004]},
    }
    assert compare(write(seeds=[0], tuning_seeds=[1], schedules=schedules)) == 1
    values = report(tmp_path)
    assert values["failed"] == [
        f"bad, lr {rate}, seed 1 (exit status 1)" for rate in (0.002, 0.004)
    ]
    assert [row["name"] for row in values["rows"]] == ["plain"]
    assert not (tmp_path / "out/runs/bad/lr-0.002/seed-0").exists()


def test_a_diverged_run_has_not_failed(write: Any, tmp_path: Path, capsys: Any) -> None:
    schedules = {"plain": CONSTANT, "wild": {**ADAPTIVE, "behave": "diverge"}}
    assert compare(write(schedules=schedules)) == 0
    assert "wild, seed 0: diverged, its validation loss is not finite after 25" in (
        capsys.readouterr().out
    )
    values = report(tmp_path)
    assert values["rows"][1]["loss_mean"] is None
    assert any(finding.startswith("wild diverged") for finding in values["findings"])
    assert values["target_loss"] == 2.0


@pytest.mark.parametrize(
    ("behave", "message"),
    [
        ("blind", r"must evaluate at the end of training \(100 steps\), .* but it never did"),
        ("half", r"must evaluate at the end of training \(100 steps\), .* last is of step 50"),
    ],
)
def test_a_program_that_does_not_evaluate_at_the_end_is_refused(
    write: Any, tmp_path: Path, behave: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        compare(write(shared={"behave": behave}))
    assert not list((tmp_path / "out").rglob("finished.json"))
    assert not (tmp_path / "out/runs/adaptive").exists()


def test_a_program_that_leaves_no_records_is_refused(write: Any) -> None:
    with pytest.raises(ValueError, match="must leave the records of an AdaptiveBatchTrainer"):
        compare(write(program=["true"]))


def test_runs_that_trained_on_more_are_found_out(write: Any, tmp_path: Path) -> None:
    schedules = {"plain": CONSTANT, "more": {**CONSTANT, "behave": "more"}}
    assert compare(write(schedules=schedules)) == 0
    assert any("800 to 808 samples" in limit for limit in report(tmp_path)["limits"])


def test_two_jobs_run_at_a_time(
    write: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert compare([*write(seeds=[0, 1, 2], shared={"sleep": 0.6}), "--jobs", "2"]) == 0
    folders = [path.parent for path in (tmp_path / "out").rglob("starts")]
    assert max(int((folder / "most").read_text("utf-8")) for folder in folders) == 2
    threads = {starts(folder)[0]["threads"] for folder in folders}
    assert threads == {str(max(1, len(os.sched_getaffinity(0)) // 2))}
    assert report(tmp_path)["jobs"] == [2]


def test_jobs_are_spread_over_the_gpus(
    write: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "nvidia-smi").write_text(
        '#!/bin/sh\nfor i in 0 1 2; do echo "$i, GPU-ab$i, NVIDIA H200"; done\n', "utf-8"
    )
    (tools / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [gpu.device for gpu in visible_gpus()] == ["0", "1", "2"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,GPU-ab1,7,0")
    assert [gpu.device for gpu in visible_gpus()] == ["2", "GPU-ab1"]
    assert compare([*write(seeds=[0, 1], shared={"sleep": 0.3}), "--jobs", "2"]) == 0
    folders = [path.parent for path in (tmp_path / "out").rglob("starts")]
    used = [starts(folder)[0]["devices"] for folder in folders]
    assert set(used) == {"2", "GPU-ab1"}
    assert report(tmp_path)["setup"]["machine"].endswith("2 x NVIDIA H200")


# -------------------------------------------------------------------------------------- interrupted


def begin(words: Sequence[str]) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "hf_adaptive_batch", "compare", *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, preexec_fn=_heed_signals)


def _heed_signals() -> None:
    """Where the tests run under nohup or in the background, what they start would not."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def wait_for(path: Path) -> str:
    for _ in range(600):
        if path.exists() and path.read_text("utf-8"):
            return path.read_text("utf-8")
        time.sleep(0.05)
    raise AssertionError(f"{path} did not come")


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text("utf-8").rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_runs_with_all_of_their_processes(
    write: Any, tmp_path: Path, number: signal.Signals
) -> None:
    schedules = {"plain": CONSTANT, "adaptive": {**ADAPTIVE, "behave": "hang"}}
    process = begin(write(schedules=schedules, seeds=[0, 1], jobs=2))
    pids = [
        int(pid)
        for seed in (0, 1)
        for pid in wait_for(tmp_path / f"out/runs/adaptive/lr-default/seed-{seed}/pids").split()
    ]
    assert all(is_alive(pid) for pid in pids)
    process.send_signal(number)
    shown, _ = process.communicate(timeout=30)
    assert process.returncode == 128 + number
    assert "Stopped. What has been done is kept: the same command goes on from there." in shown
    assert not any(is_alive(pid) for pid in pids)
    assert len(list((tmp_path / "out").rglob("finished.json"))) == 2


def test_a_run_left_behind_by_a_kill_holds_the_folder(write: Any, tmp_path: Path) -> None:
    words = write(schedules={"plain": {**CONSTANT, "behave": "hang"}})
    process = begin(words)
    pid, child = map(int, wait_for(tmp_path / "out/runs/plain/lr-default/seed-0/pids").split())
    process.kill()
    process.communicate()
    try:
        assert is_alive(pid)
        with pytest.raises(ValueError, match="must be used by one comparison at a time"):
            compare(words)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.kill(child, signal.SIGKILL)
    while is_alive(pid):
        time.sleep(0.05)
    with locked(tmp_path / "out"):
        pass


# ----------------------------------------------------------------------------------- the real thing


TINY = [
    *("--max_train_samples", "64", "--hidden_size", "32", "--num_hidden_layers", "1"),
    *("--num_attention_heads", "2", "--intermediate_size", "64", "--block_size", "32"),
    *("--max_eval_samples", "8", "--use_cpu", "true"),
]


@pytest.fixture
def text(tmp_path: Path) -> list[str]:
    path = tmp_path / "text.txt"
    path.write_text(Path(json.__file__).read_text("utf-8") * 4, "utf-8")
    return ["--dataset", str(path)]


@pytest.mark.slow
def test_pretrain_is_compared_from_start_to_end(text: list[str], tmp_path: Path) -> None:
    words = ["constant", "norm_test", *TINY, *text, "--output_dir", str(tmp_path / "out")]
    assert compare(words) == 0
    values = report(tmp_path)
    assert [row["samples"] for row in values["rows"]] == [64, 64]
    assert values["rows"][0]["steps"] == 16
    assert not any("as much" in finding for finding in values["findings"])
    assert (tmp_path / "out/report.html").is_file()


@pytest.fixture
def odd(tmp_path: Path) -> Any:
    """Writes a file with an eta that pretrain refuses; gives the arguments of `compare`."""

    def odd(**settings: Any) -> list[str]:
        schedules = {"plain": CONSTANT, "odd": {"batch_schedule": "norm_test", "eta": 3}}
        path = tmp_path / "runs.yaml"
        given = {"schedules": schedules, "output_dir": str(tmp_path / "out"), **settings}
        path.write_text(yaml.safe_dump(given, sort_keys=False), "utf-8")
        return [str(path), *TINY]

    return odd


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], r"In odd, seed 0: eta \(3.0\) must be"),
        (["--max_samples", "3"], r"In plain, seed 0: flags \(--max_samples 3\) must be known"),
        (["--eta", "abc"], "In plain, seed 0: argument --eta: invalid float value: 'abc'"),
    ],
)
def test_flags_of_pretrain_are_checked_before_anything_runs(
    odd: Any, tmp_path: Path, flags: list[str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        compare([*odd(), *flags])
    assert not (tmp_path / "out/runs").exists()


@pytest.mark.slow
@pytest.mark.distributed
def test_flags_are_checked_by_the_launcher(odd: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="In odd, seed 0: eta"):
        compare(odd(launch=["torchrun", "--nproc_per_node=2"]))
    with pytest.raises(ValueError, match=r"command .torchrun --no-such-option .* must start"):
        compare(odd(launch=["torchrun", "--no-such-option"]))
    assert not (tmp_path / "out/runs").exists()


@pytest.mark.slow
@pytest.mark.distributed
def test_runs_are_launched_on_several_processes(text: list[str], tmp_path: Path) -> None:
    path = tmp_path / "runs.yaml"
    launch = ["torchrun", "--nproc_per_node=2"]
    path.write_text(yaml.safe_dump({"launch": launch, "schedules": {"plain": CONSTANT}}), "utf-8")
    assert compare([str(path), *TINY, *text, "--output_dir", str(tmp_path / "out")]) == 0
    assert report(tmp_path)["rows"][0]["steps"] == 8  # of 2 x 4 samples
