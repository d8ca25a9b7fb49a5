"""`cbs measure`: what runs, with which flags, what comes of it, and what is refused.

Most of it trains a program whose steps to a loss are known: a + b / B, times what a learning rate
costs. The last part trains real models.
"""

import json
import math
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from hf_adaptive_batch.cbs import fit_steps_to_target, read_sweeps
from hf_adaptive_batch.cbs.training.measure_command import measure
from hf_adaptive_batch.cbs.training.sweep_flags import read_sweep_plan, sweep_plan_of
from hf_adaptive_batch.cbs.training.sweep_plan import beta2_of, layout_of
from hf_adaptive_batch.report.records import SCHEMA_VERSION


# Its loss falls in proportion to its steps, from 3, by 1 in (A + B / batch) x cost(rate, seed).
A, B = 100.0, 1600.0
PROGRAM = """
    import json, math, sys, time
    from pathlib import Path
    flags = dict(zip((word[2:] for word in sys.argv[1::2]), sys.argv[2::2], strict=True))
    folder, seed = Path(flags["output_dir"]), int(flags["seed"])
    size = int(flags["per_device_train_batch_size"]) * int(flags["gradient_accumulation_steps"])
    size *= int(flags.get("ranks", 1))
    with (folder / "starts").open("a") as file:
        file.write(json.dumps(flags) + "\\n")
    if flags.get("fail") == str(size):
        sys.exit("error: out of luck")
    time.sleep(float(flags.get("sleep", 0)))
    cost = 1 + abs(math.log2(float(flags.get("learning_rate", 0.002)) / 0.002)) + 0.01 * seed
    needed = (100 + 1600 / size) * cost
    if size == int(flags.get("stuck", 0)):
        needed = 1e9
    target = float(flags.get("stop_at_eval_loss", "-inf"))
    most = int(flags["max_training_samples"]) // size
    every = int(flags["eval_steps"])
    lines = []
    for step in range(1, most + 1):
        loss = 3 - step / needed
        if step % every == 0 or step == most:
            lines.append((step, loss))
            if loss <= target:
                break
    def line(step, **more):
        return json.dumps({"version": VERSION, "step": step, "samples_seen": step * size,
            "tokens_seen": step * size * 10, "seconds": 0.1 * step, "global_batch_size": size,
            **more}) + "\\n"
    (folder / "evaluations.jsonl").write_text(
        "".join(line(step, metrics={"eval_loss": loss}) for step, loss in lines))
    (folder / "adaptive_batch.jsonl").write_text(
        line(lines[-1][0], next_global_batch_size=size, loss=2.5, noise_scale=10.0 * size,
             reason="constant"))
"""
SIZES = [4, 8, 16, 32, 64]


@pytest.fixture
def write(tmp_path: Path) -> Any:
    """Writes a settings file of the program; gives the arguments of `measure`."""
    program = tmp_path / "train.py"
    program.write_text(textwrap.dedent(PROGRAM).replace("VERSION", str(SCHEMA_VERSION)), "utf-8")

    def write(**changed: Any) -> list[str]:
        given = {
            "program": ["python", str(program)],
            "batch_sizes": SIZES,
            "target_samples": 1600,  # 200 steps of 8, of the 300 that a loss of 2 takes
            "reference_batch_size": 8,
            "max_samples": 20_000,
            "tokens_per_sequence": 10,
            "output_dir": str(tmp_path / "out"),
        }
        path = tmp_path / "sweep.yaml"
        settings = {k: v for k, v in {**given, **changed}.items() if v is not None}
        path.write_text(yaml.safe_dump(settings, sort_keys=False), "utf-8")
        return [str(path)]

    return write


def starts(tmp_path: Path) -> dict[str, list[dict[str, str]]]:
    """By the run's folder: the flags of each of its starts."""
    root = tmp_path / "out/runs"
    return {
        path.parent.relative_to(root).as_posix(): [
            json.loads(line) for line in path.read_text("utf-8").splitlines()
        ]
        for path in root.glob("*/*/*/starts")
    }


def settings(**changed: Any) -> dict[str, Any]:
    return {"batch_sizes": [8, 16, 32], "target_samples": 800, **changed}


# ------------------------------------------------------------------------- what a known law gives


def test_a_known_law_is_measured_and_fitted(write: Any, tmp_path: Path, capsys: Any) -> None:
    assert measure([*write(learning_rates=[0.001, 0.002, 0.004], seeds=[0])]) == 0
    [sweep] = read_sweeps(tmp_path / "out")
    # The reference makes the target: 200 of its 300 steps, with the best learning rate.
    assert sweep.target_loss == pytest.approx(3 - 200 / 300)
    fit = sweep.fit()
    # Interpolated between evaluations, on a straight line: exact. 2/3 of the steps to a loss of 2.
    assert fit.a == pytest.approx(A * 2 / 3, rel=1e-6)
    assert fit.b == pytest.approx(B * 2 / 3, rel=1e-6)
    assert {run.learning_rate for run in sweep.runs if run.chosen} == {0.002}
    assert len(sweep.runs) == 3 * len(SIZES)
    assert sweep.critical_batch_size().sequences == pytest.approx(1.2 * 8 + 0.2 * 16, rel=1e-6)
    assert sweep.tokens == pytest.approx(1600 * 10, rel=1e-6)
    assert sweep.noise_scales() == pytest.approx({size: 10.0 * size for size in SIZES})
    printed = capsys.readouterr().out
    assert "target loss 2.3333: batch 8 with learning rate 0.002 after 1,600 samples" in printed
    assert "[18/18] batch 64, lr 0.004, seed 0: reached after" in printed


def test_another_learning_rate_would_give_another_law(write: Any, tmp_path: Path) -> None:
    assert measure(write(learning_rates=[0.001, 0.002], seeds=[0])) == 0
    [sweep] = read_sweeps(tmp_path / "out")
    slow = [run for run in sweep.runs if run.learning_rate == 0.001]
    fit = fit_steps_to_target([r.batch_size for r in slow], [r.steps for r in slow])
    assert fit.a == pytest.approx(2 * A * 2 / 3, rel=1e-6)


def test_seeds_are_runs_of_the_best_learning_rate(write: Any, tmp_path: Path) -> None:
    assert measure(write(learning_rates=[0.002, 0.004], seeds=[0, 1, 2], tuning_seeds=[1])) == 0
    [sweep] = read_sweeps(tmp_path / "out")
    chosen = [run for run in sweep.runs if run.chosen]
    assert len(chosen) == 3 * len(SIZES)
    assert {run.learning_rate for run in chosen} == {0.002}
    assert [run.seed for run in sweep.runs if run.learning_rate == 0.004] == [1] * len(SIZES)
    # Seeds differ by a hundredth of their cost: the mean of three is fitted.
    mean = (1 * 1.01 * 1.02) ** (1 / 3)
    assert sweep.fit().a == pytest.approx(A * mean * (3 - sweep.target_loss), rel=1e-6)
    assert len(sweep.fit().measurements) == len(SIZES)


def test_a_given_target_needs_no_run_of_its_own(write: Any, tmp_path: Path) -> None:
    assert measure([*write(), "--target_loss", "2.5"]) == 0
    assert not [name for name in starts(tmp_path) if "target" in name]
    [sweep] = read_sweeps(tmp_path / "out")
    assert sweep.target_loss == 2.5
    assert sweep.fit().a == pytest.approx(A / 2, rel=1e-6)


def test_a_batch_that_does_not_get_there_is_a_bound(write: Any, tmp_path: Path) -> None:
    assert measure([*write(), "--stuck", "64"]) == 0
    [sweep] = read_sweeps(tmp_path / "out")
    fit = sweep.fit()
    assert fit.not_reached == ((64.0, 20_000 // 64),)
    assert fit.a == pytest.approx(A * 2 / 3, rel=1e-6)


def test_too_few_that_get_there_are_no_fit(write: Any, tmp_path: Path, capsys: Any) -> None:
    words = write(batch_sizes=[4, 8, 16])
    assert measure([*words, "--stuck", "16"]) == 1
    assert "three or more" in " ".join(capsys.readouterr().out.split())
    [sweep] = read_sweeps(tmp_path / "out")  # nothing that was measured is lost
    assert [run.steps is None for run in sweep.runs] == [False, False, True]


def test_a_failed_run_is_said_and_the_rest_fitted(write: Any, tmp_path: Path, capsys: Any) -> None:
    assert measure([*write(), "--fail", "64"]) == 1
    printed = capsys.readouterr().out
    assert "batch 64, seed 0: failed with exit status 1" in printed
    assert "out of luck" in printed
    [sweep] = read_sweeps(tmp_path / "out")
    assert {run.batch_size for run in sweep.runs} == {4, 8, 16, 32}
    assert "batch 64" in sweep.setup["failed runs"]


def test_what_is_done_is_not_done_again(write: Any, tmp_path: Path, capsys: Any) -> None:
    words = write()
    assert measure([*words, "--fail", "64"]) == 1
    first = {name: len(runs) for name, runs in starts(tmp_path).items()}
    with pytest.raises(ValueError, match=r"fail .*not given.*there 64"):
        measure(words)
    assert measure([*words, "--fail", "64"]) == 1
    again = {name: len(runs) for name, runs in starts(tmp_path).items()}
    assert {name for name in first if again[name] > first[name]} == {"batch-64/lr-default/seed-0"}
    assert ", done before" in capsys.readouterr().out


def test_a_stopped_sweep_goes_on(write: Any, tmp_path: Path) -> None:
    words = [sys.executable, "-m", "hf_adaptive_batch", "cbs", "measure", *write()]
    words += ["--sleep", "0.6"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.time() + 60
    while len(list((tmp_path / "out/runs").glob("*/*/*/finished.json"))) < 2:
        assert process.poll() is None
        assert time.time() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert "the same command goes on from there" in printed
    kept = len(list((tmp_path / "out/runs").glob("*/*/*/finished.json")))
    assert kept < 1 + len(SIZES)
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("done before") == kept
    assert read_sweeps(tmp_path / "out")[0].fit().a == pytest.approx(A * 2 / 3, rel=1e-6)


def test_smaller_batches_are_added_with_the_reference_that_set_the_target(
    write: Any, tmp_path: Path, capsys: Any
) -> None:
    assert measure(write(batch_sizes=[8, 16, 32], reference_batch_size=None)) == 0
    words = write(reference_batch_size=None)  # the smallest, and so another
    before = starts(tmp_path)
    with pytest.raises(ValueError, match=r"reference_batch_size \(4\) must be .*out \(8\)"):
        measure(words)
    assert starts(tmp_path) == before
    capsys.readouterr()
    assert measure([*words, "--reference_batch_size", "8"]) == 0
    assert capsys.readouterr().out.count("done before") == 1 + 3
    [sweep] = read_sweeps(tmp_path / "out")
    assert [run.batch_size for run in sweep.runs] == SIZES


def test_sweeps_are_named_by_their_folders(write: Any, tmp_path: Path) -> None:
    assert measure(write(batch_sizes=[8, 16, 32])) == 0
    [sweep] = read_sweeps(tmp_path / "out")
    assert sweep.name == "out"
    assert sweep_plan_of(settings()).name == "cbs"
    assert sweep_plan_of(settings(title="151M")).name == "151M"


def test_what_a_reader_has_to_know_is_said(write: Any, tmp_path: Path, capsys: Any) -> None:
    words = write(batch_sizes=[8, 16, 32], learning_rates=[0.002, 0.004])
    assert measure([*words, "--target_loss", "2.999"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    # Every 32 samples: 4 steps of 8, of which 0.3 are enough.
    assert "reached after 4.0 steps or before, as its first evaluation found" in printed
    assert "best learning rate at an edge of those tried: batch 8, batch 16, batch 32" in printed
    [sweep] = read_sweeps(tmp_path / "out")
    assert sweep.setup["learning rates chosen by seeds"] == "0"


def test_ranks_that_were_not_said_are_found_out(write: Any) -> None:
    with pytest.raises(ValueError, match=r"data_parallel_size \(1\) must be the ranks"):
        measure([*write(), "--ranks", "2"])


# -------------------------------------------------------------------- how flags follow the batch


def test_flags_follow_the_batch_in_samples_and_tokens(write: Any, tmp_path: Path) -> None:
    words = write(beta2_half_life_tokens=4000, averaging_half_life_tokens=2500)
    assert measure([*words, "--hidden_size", "64"]) == 0
    for name, [flags] in starts(tmp_path).items():
        size = int(flags["per_device_train_batch_size"]) * int(flags["gradient_accumulation_steps"])
        assert int(flags["gradient_accumulation_steps"]) >= 2  # so that the noise is measured
        assert int(flags["warmup_steps"]) == max(1, round(400 / size))
        assert int(flags["eval_steps"]) == max(1, round(32 / size))
        beta2 = min(max(0.5 ** (10 * size / 4000), 0.95), 0.9995)
        assert float(flags["adam_beta2"]) == pytest.approx(beta2, abs=1e-6)
        assert float(flags["averaging_half_life_tokens"]) == 2500
        assert flags["lr_scheduler_type"] == "constant_with_warmup"
        assert (flags["batch_schedule"], flags["hidden_size"]) == ("constant", "64")
        is_target = name.startswith("target")
        assert int(flags["max_training_samples"]) == (1600 if is_target else 20_000)
        assert ("stop_at_eval_loss" in flags) == (not is_target)


def test_the_users_way_to_train_wins(write: Any, tmp_path: Path) -> None:
    words = write(batch_sizes=[8, 16, 32], averaging_half_life_tokens=0, beta2_half_life_tokens=0)
    assert measure([*words, "--lr_scheduler_type", "linear", "--weight_decay", "0.1"]) == 0
    for [flags] in starts(tmp_path).values():
        assert (flags["lr_scheduler_type"], flags["weight_decay"]) == ("linear", "0.1")
        assert "adam_beta2" not in flags
        assert "averaging_half_life_tokens" not in flags


def test_an_average_of_the_users_own_length_wins(write: Any, tmp_path: Path) -> None:
    words = write(batch_sizes=[8, 16, 32])
    assert measure([*words, "--averaging_decay", "0.9", "--warmup_steps", "7"]) == 0
    for [flags] in starts(tmp_path).values():
        assert (flags["averaging_decay"], flags["warmup_steps"]) == ("0.9", "7")
        assert "averaging_half_life_tokens" not in flags  # only one of the two is a length
    [sweep] = read_sweeps(tmp_path / "out")
    assert sweep.setup["half-life of averaged weights"] == "--averaging_decay 0.9"
    assert sweep.setup["warm-up"] == "--warmup_steps 7"


@pytest.mark.parametrize(
    ("size", "most", "ranks", "expected"),
    [
        (64, 16, 1, (16, 4)),
        (16, 16, 1, (8, 2)),  # a single rank takes two
        (16, 16, 2, (8, 1)),
        (2, 16, 1, (1, 2)),
        (24, 16, 1, (12, 2)),
        (26, 4, 1, (2, 13)),
        (34, 16, 2, (1, 17)),
    ],
)
def test_a_batch_is_laid_out_in_the_largest_micro_batches(size, most, ranks, expected):
    assert layout_of(size, most, ranks) == expected
    assert math.prod(expected) * ranks == size


def test_ranks_must_divide_the_batch():
    with pytest.raises(ValueError, match=r"batch size \(6\) must be a multiple"):
        layout_of(6, 16, 4)


def test_beta2_keeps_its_half_life_within_the_papers_range():
    assert beta2_of(1000, 50_000) ** 50 == pytest.approx(0.5, rel=1e-3)
    assert beta2_of(1e9, 50_000) == 0.95
    assert beta2_of(1, 50_000) == 0.9995


# ---------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"batch_sizes": None}, r"batch_sizes \(none\) must be three or more"),
        ({"batch_sizes": [8, 16]}, r"batch_sizes \(8, 16\) must be three or more"),
        ({"batch_sizes": [8, 8, 16]}, "three or more different"),
        ({"batch_sizes": [1, 8, 16]}, "whole numbers from 2"),
        ({"batch_sizes": [8, 16, 32.5]}, "whole numbers from 2"),
        ({"target_samples": None}, r"target_samples \(none\) must be given"),
        ({"target_samples": 7}, r"target_samples \(7\) must be at least reference_batch_size"),
        ({"stop_after_tokens": 10}, r"stop_after_tokens \(10\) must not be given"),
        ({"output_dir": 5}, r"output_dir \(5\) must be the path"),
        ({"target_samples": 0}, r"target_samples \(0\) must be given"),
        ({"reference_batch_size": 12}, r"reference_batch_size \(12\) must be one of batch_sizes"),
        ({"max_samples": 700}, r"max_samples \(700\) must be at least target_samples"),
        ({"overhead": 0}, r"overhead \(0\) must be above 0"),
        ({"overhead": "much"}, "overhead .* must be a number"),
        ({"warmup_samples": -1}, r"warmup_samples \(-1\) must be a number of at least 0"),
        ({"data_parallel_size": 3}, r"batch size \(8\) must be a multiple"),
        ({"program": ["python", "x.py"]}, r"tokens_per_sequence \(none\) must be given"),
        ({"max_steps": 5}, "max_steps .* must not be given, because max_samples"),
        ({"seed": 5}, "seed .* must not be given"),
        ({"batch_schedule": "norm_test"}, "batch_schedule .* must not be given"),
        ({"stop_at_eval_loss": 2}, "stop_at_eval_loss .* because target_loss says it"),
        ({"learning_rate": 1e-3, "learning_rates": [1e-3, 2e-3]}, "leave out one"),
        ({"learning_rates": [1e-3, 1e-3]}, "must be different ones"),
        ({"seeds": [0, -1]}, "whole numbers from 0"),
        ({"jobs": 0}, "jobs .* must be a whole number from 1"),
        ({"launch": ["no-such-launcher"]}, "no-such-launcher was not found"),
    ],
)
def test_what_cannot_be_measured_is_refused(changed, message):
    with pytest.raises(ValueError, match=message):
        sweep_plan_of({k: v for k, v in settings(**changed).items() if v is not None})
    sweep_plan_of(settings())  # and nothing else is wrong with it


def test_words_before_the_flags_must_be_a_settings_file():
    with pytest.raises(ValueError, match=r"word \(8\) must be a settings file"):
        read_sweep_plan(["8", "16", "32"])


def test_flags_win_over_the_file(write: Any) -> None:
    plan = read_sweep_plan([*write(), "--batch_sizes", "8", "24", "72", "--block_size", "64"])
    assert plan.batch_sizes == [8, 24, 72]
    assert plan.shared["block_size"] == "64"
    assert plan.max_samples == 20_000


def test_the_block_size_says_what_a_sequence_is():
    assert sweep_plan_of(settings(block_size="64")).tokens_per_sequence == 64
    assert sweep_plan_of(settings()).tokens_per_sequence == 128


# ----------------------------------------------------------------------------------- the real thing


@pytest.mark.slow
def test_real_models_are_measured_fitted_and_reported(tmp_path: Path, capsys: Any) -> None:
    text = tmp_path / "text.txt"
    text.write_text(Path(json.__file__).read_text("utf-8") * 8, "utf-8")
    words = [
        *("--batch_sizes", "4", "8", "16", "--target_samples", "96", "--max_samples", "800"),
        *("--dataset", str(text), "--hidden_size", "32", "--num_hidden_layers", "1"),
        *("--num_attention_heads", "2", "--intermediate_size", "64", "--block_size", "32"),
        *("--max_eval_samples", "8", "--eval_samples", "16", "--warmup_samples", "16"),
        *("--learning_rates", "0.004", "--output_dir", str(tmp_path / "out"), "--use_cpu", "true"),
        *("--save_strategy", "no"),
    ]
    assert measure(words) == 0
    [sweep] = read_sweeps(tmp_path / "out")
    assert sweep.parameters == pytest.approx(19_936, rel=0.2)
    assert sweep.tokens_per_sequence == 32
    by_size = {run.batch_size: run for run in sweep.runs}
    # The reference's run to the target repeats what made it, step by step.
    assert by_size[4].steps == pytest.approx(96 / 4, abs=4)
    assert all(run.steps is not None and run.steps <= run.trained_steps for run in sweep.runs)
    assert by_size[16].trained_steps < 800 / 16  # it stopped at the target
    assert all(run.noise_scale is None or run.noise_scale > 0 for run in sweep.runs)
    assert (tmp_path / "out/report.html").is_file()
    assert "target loss" in capsys.readouterr().out
