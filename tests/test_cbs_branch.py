"""`cbs branch`: which branches run from a checkpoint, and what the rule makes of their losses."""

import json
import math
import textwrap
from pathlib import Path
from typing import Any

import pytest
import yaml

from hf_adaptive_batch.cbs.training.branch_command import branch
from hf_adaptive_batch.cbs.training.branch_plan import branch_plan_of, read_branch_plan
from hf_adaptive_batch.cli import main
from hf_adaptive_batch.report.records import SCHEMA_VERSION, read_records


# Its training loss is what `losses` says for the batch, with a jitter from step to step.
PROGRAM = """
    import json, sys
    from pathlib import Path
    flags = dict(zip((word[2:] for word in sys.argv[1::2]), sys.argv[2::2], strict=True))
    folder, size = Path(flags["output_dir"]), int(flags["batch_schedule"].removeprefix("0:"))
    with (folder / "starts").open("a") as file:
        file.write(json.dumps(flags) + "\\n")
    loss = json.loads(flags["losses"])[str(size)]
    begin, end = 4000, int(flags["stop_after_tokens"])
    end = min(end, int(flags.get("budget", end)))
    steps = (end - begin) // (size * 10)
    def line(step, **more):
        seen = 400 + step * size
        return json.dumps({"version": VERSION, "step": 50 + step, "samples_seen": seen,
            "tokens_seen": seen * 10, "seconds": 1.0, "global_batch_size": size, **more}) + "\\n"
    jitter = float(flags.get("jitter", 0))
    (folder / "adaptive_batch.jsonl").write_text("".join(
        line(step, next_global_batch_size=size, reason="constant",
             loss=loss + jitter * (-1) ** step) for step in range(1, steps + 1)))
    (folder / "evaluations.jsonl").write_text(
        line(steps, metrics={"eval_loss": 10 - loss}))
"""
STATE = {
    "version": 2,
    "seed": 3,
    "random_states": [],
    "plan": {"micro_batch_size": 4, "accumulation_steps": 2, "data_parallel_size": 1},
    "clock": {"initial_global_batch_size": 8, "tokens_seen": 4000, "samples_seen": 400},
}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "run/checkpoint-50"
    folder.mkdir(parents=True)
    (folder / "trainer_state.json").write_text("{}", "utf-8")
    (folder / "adaptive_batch_state.json").write_text(json.dumps(STATE), "utf-8")
    return folder


@pytest.fixture
def write(tmp_path: Path, checkpoint: Path) -> Any:
    """Writes a settings file of the program; gives the arguments of `branch`."""
    program = tmp_path / "train.py"
    program.write_text(textwrap.dedent(PROGRAM).replace("VERSION", str(SCHEMA_VERSION)), "utf-8")

    def write(losses: dict[int, float], **changed: Any) -> list[str]:
        settings = {
            "program": ["python", str(program)],
            "branch_tokens": 12_800,
            "tokens_per_sequence": 10,
            "output_dir": str(tmp_path / "out"),
            "losses": losses,
            **changed,
        }
        path = tmp_path / "branch.yaml"
        path.write_text(yaml.safe_dump(settings, sort_keys=False), "utf-8")
        return [str(checkpoint), str(path)]

    return write


def result(tmp_path: Path) -> dict[str, Any]:
    return json.loads((tmp_path / "out/branch.json").read_text("utf-8"))


# ---------------------------------------------------------------------------------------- the rule


def test_the_largest_batch_that_loses_nothing_is_found(
    write: Any, tmp_path: Path, capsys: Any
) -> None:
    assert branch(write({8: 2.0, 16: 2.004, 32: 2.009, 64: 2.02})) == 0
    found = result(tmp_path)
    assert (found["factor"], found["outcome"]) == (4, "bracketed")
    assert found["bracket_samples"] == [32, 64]
    assert found["critical_batch_size_samples"] == pytest.approx(math.sqrt(32 * 64))
    assert [each["steps"] for each in found["branches"]] == [160, 80, 40, 20]
    printed = " ".join(capsys.readouterr().out.split())
    assert "k* = 4" in printed
    assert "from 32 to 64 samples (320 to 640 tokens); reported as 45 samples" in printed


@pytest.mark.parametrize(
    ("losses", "factor", "outcome", "bracket"),
    [
        ({8: 2.0, 16: 2.1, 32: 2.2, 64: 2.3}, 1, "none_passed", [8, 16]),
        ({8: 2.0, 16: 2.0, 32: 1.99, 64: 2.0}, 8, "all_passed", [64, None]),
        ({8: 2.0, 16: 2.1, 32: 2.01, 64: 2.3}, 4, "bracketed", [32, 64]),
    ],
)
def test_every_outcome_is_said(
    write: Any, tmp_path: Path, capsys: Any, losses: Any, factor: int, outcome: str, bracket: Any
) -> None:
    assert branch(write(losses)) == 0
    found = result(tmp_path)
    assert (found["factor"], found["outcome"]) == (factor, outcome)
    assert found["bracket_samples"] == bracket
    assert (found["critical_batch_size_samples"] is None) == (bracket[1] is None)
    assert (found["failed_below"] == [2]) == (losses[16] == 2.1 and factor == 4)
    assert ("without an upper end" in capsys.readouterr().out) == (bracket[1] is None)


def test_losses_are_smoothed_and_their_error_is_shown(
    write: Any, tmp_path: Path, capsys: Any
) -> None:
    words = write({8: 2.0, 16: 2.0, 32: 2.0, 64: 2.5}, jitter=0.03)
    assert branch(words) == 0
    first = result(tmp_path)["branches"][0]
    average = 2.0 - 0.03
    for step in range(2, 161):
        average = 0.5 * average + 0.5 * (2.0 + 0.03 * (-1) ** step)
    assert first["training_loss"] == pytest.approx(average, abs=1e-12)
    # Neighbours differ by 0.06: a variance of 0.0018, of which the average keeps a third.
    assert first["training_error"] == pytest.approx(math.sqrt(0.0018 / 3), rel=1e-6)
    assert result(tmp_path)["undecided"] == [2, 4]
    assert "Within their standard error of the limit: 2, 4." in capsys.readouterr().out


def test_validation_losses_can_decide(write: Any, tmp_path: Path) -> None:
    words = write({8: 2.0, 16: 2.1, 32: 2.2, 64: 2.3}, branch_loss="validation")
    assert branch(words) == 0  # the program's validation loss falls where its training loss rises
    assert result(tmp_path)["outcome"] == "all_passed"


def test_a_branch_goes_on_as_the_checkpoint_would(write: Any, tmp_path: Path) -> None:
    words = write({8: 2.0, 16: 2.0, 32: 2.0, 64: 2.0}, hidden_size=64)
    assert branch(words) == 0
    for size in (8, 16, 32, 64):
        [path] = (tmp_path / "out/runs").glob(f"{size // 8}-x-8/*/*/starts")
        flags = json.loads(path.read_text("utf-8"))
        assert flags["batch_schedule"] == f"0:{size}"
        assert flags["scale_learning_rate"] == "sqrt"
        assert flags["resume_from_checkpoint"].endswith("run/checkpoint-50")
        assert (flags["seed"], flags["stop_after_tokens"]) == ("3", "16800")
        assert (flags["per_device_train_batch_size"], flags["gradient_accumulation_steps"]) == (
            "4",
            "2",
        )
        assert flags["hidden_size"] == "64"
    assert branch(words) == 0  # done before
    assert all(
        len(path.read_text("utf-8").splitlines()) == 1
        for path in (tmp_path / "out/runs").glob("*/*/*/starts")
    )


def test_a_budget_that_ends_in_a_branch_is_refused(write: Any) -> None:
    words = write({8: 2.0, 16: 2.0, 32: 2.0, 64: 2.0}, budget=10_000)
    with pytest.raises(ValueError, match=r"must have trained on 12,800 tokens"):
        branch(words)


def test_larger_batches_are_added_to_branches_that_all_passed(
    write: Any, tmp_path: Path, capsys: Any
) -> None:
    words = write({8: 2.0, 16: 2.0, 32: 2.2})
    assert branch([*words, "--factors", "1", "2"]) == 0
    assert result(tmp_path)["outcome"] == "all_passed"
    capsys.readouterr()
    assert branch([*words, "--factors", "1", "2", "4"]) == 0
    assert capsys.readouterr().out.count("done before") == 2
    assert result(tmp_path)["bracket_samples"] == [16, 32]


@pytest.mark.parametrize(
    ("name", "enough"),
    [("max_train_samples", 1680), ("max_training_samples", "1680"), ("max_train_tokens", 16_800)],
)
def test_a_budget_that_ends_in_a_branch_is_refused_before_it_trains(
    checkpoint: Path, name: str, enough: Any
) -> None:
    settings = {"branch_tokens": 12_800, "tokens_per_sequence": 10}
    branch_plan_of(checkpoint, {**settings, name: enough})
    with pytest.raises(ValueError, match=rf"branch_tokens \(12,800\) must end within {name}"):
        branch_plan_of(checkpoint, {**settings, name: int(enough) - 1})


# ---------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"branch_tokens": None}, r"branch_tokens \(none\) must be given"),
        ({"branch_tokens": 639}, r"branch_tokens \(639\) must be at least a step"),
        ({"factors": [1]}, "factors .* must be two or more"),
        ({"factors": [1, 1]}, "must be two or more different"),
        ({"factors": [0, 1]}, "numbers above 0"),
        ({"factors": [1, 1.3]}, r"factor \(1.3\) must make a whole batch"),
        ({"factors": [0.125, 1]}, r"factor \(0.125\) must make a whole batch of two samples"),
        ({"branch_learning_rate": "cube"}, "must be one of sqrt, linear, none"),
        ({"branch_loss": "test"}, "must be one of training, validation"),
        ({"tolerance": -1}, "tolerance .* at least 0"),
        ({"seed": 1}, "seed .* must not be given, because it is that of the checkpoint"),
        ({"batch_schedule": "seesaw"}, "batch_schedule .* must not be given"),
        ({"data_parallel_size": 3}, "must be a multiple of data_parallel_size"),
    ],
)
def test_what_makes_no_branch_is_refused(checkpoint: Path, changed: Any, message: str) -> None:
    settings = {"branch_tokens": 12_800, "tokens_per_sequence": 10}
    branch_plan_of(checkpoint, settings)  # and nothing else is wrong with it
    with pytest.raises(ValueError, match=message):
        branch_plan_of(
            checkpoint, {k: v for k, v in {**settings, **changed}.items() if v is not None}
        )


def grown(checkpoint: Path) -> None:
    """Its training began with 4 samples a step."""
    state = {**STATE, "clock": {**STATE["clock"], "initial_global_batch_size": 4}}
    (checkpoint / "adaptive_batch_state.json").write_text(json.dumps(state), "utf-8")


def test_a_rate_that_is_scaled_already_is_refused(checkpoint: Path) -> None:
    grown(checkpoint)
    settings = {"branch_tokens": 12_800, "tokens_per_sequence": 10}
    assert branch_plan_of(checkpoint, settings).batch_size == 8
    with pytest.raises(ValueError, match=r"batch \(8\) is not the one that training began with"):
        branch_plan_of(checkpoint, {**settings, "scale_learning_rate": "sqrt"})


def test_warm_up_and_budget_in_steps_stay_the_samples_that_they_were(checkpoint: Path) -> None:
    grown(checkpoint)
    settings = {"branch_tokens": 12_800, "tokens_per_sequence": 10}
    steps = {"warmup_steps": "50", "max_steps": 4000}
    shared = branch_plan_of(checkpoint, {**settings, **steps}).compare.shared
    assert (shared["warmup_steps"], shared["max_steps"]) == (25, 2000)
    for share in (0, 0.05):
        plan = branch_plan_of(checkpoint, {**settings, "warmup_steps": share})
        assert plan.compare.shared["warmup_steps"] == share
    for name, value, message in (
        ("warmup_steps", 51, r"warmup_steps \(51 of the 4 samples .* whole steps of .* \(8\)"),
        (
            "lr_scheduler_kwargs",
            {"num_decay_steps": 8},
            "lr_scheduler_kwargs .* must have no steps",
        ),
        ("scale_beta2", True, r"scale_beta2 \(True\) must be left out"),
    ):
        with pytest.raises(ValueError, match=message):
            branch_plan_of(checkpoint, {**settings, name: value})


def test_smaller_batches_are_branches_too(checkpoint: Path) -> None:
    settings = {"branch_tokens": 12_800, "tokens_per_sequence": 10}
    for factors, micro in (([0.5, 1, 2], 2), ([0.25, 0.5], 1), ([1, 1.25, 2], 1), ([1, 2], 4)):
        plan = branch_plan_of(checkpoint, {**settings, "factors": factors})
        shared = plan.compare.shared
        assert shared["per_device_train_batch_size"] == shared["max_micro_batch_size"] == micro
        assert shared["gradient_accumulation_steps"] * micro == 8
        caps = [each.settings["max_global_batch_size"] for each in plan.compare.schedules]
        assert caps == [max(8 * factor, 8) for factor in factors]
        # Of a single micro-batch a step says nothing of its noise, and is not recorded.
        assert all(8 * factor >= 2 * micro for factor in factors)


def test_micro_batches_are_those_that_fitted_before(checkpoint: Path) -> None:
    settings = {"branch_tokens": 12_800, "tokens_per_sequence": 10}
    state = {**STATE, "plan": {**STATE["plan"], "micro_batch_size": 1, "accumulation_steps": 8}}
    (checkpoint / "adaptive_batch_state.json").write_text(json.dumps(state), "utf-8")
    assert branch_plan_of(checkpoint, settings).compare.shared["max_micro_batch_size"] == 1
    larger = branch_plan_of(checkpoint, {**settings, "max_micro_batch_size": 2})
    assert larger.compare.shared["per_device_train_batch_size"] == 2


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path: Path, checkpoint: Path) -> None:
    for folder in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(ValueError, match=r"checkpoint \(.*must be|resume_from_checkpoint \("):
            branch_plan_of(folder, {"branch_tokens": 12_800})
    with pytest.raises(ValueError, match="must be given a checkpoint"):
        read_branch_plan(["--branch_tokens", "5"])
    with pytest.raises(ValueError, match="must be given a checkpoint"):
        read_branch_plan([str(checkpoint), "more", "--branch_tokens", "5"])


# ----------------------------------------------------------------------------------- the real thing


@pytest.mark.slow
def test_branches_of_a_real_checkpoint(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(Path(json.__file__).read_text("utf-8") * 8, "utf-8")
    shared = [
        *("--dataset", str(text), "--hidden_size", "32", "--num_hidden_layers", "1"),
        *("--num_attention_heads", "2", "--intermediate_size", "64", "--block_size", "32"),
        *("--max_eval_samples", "8", "--use_cpu", "true", "--max_train_samples", "320"),
        *("--warmup_steps", "8"),
    ]
    run = tmp_path / "run"
    words = ["--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "2"]
    words += ["--batch_schedule", "constant", "--save_steps", "40", "--output_dir", str(run)]
    assert main(["pretrain", *shared, *words]) == 0
    words = ["--branch_tokens", "1024", "--factors", "1", "2", "4", *shared]
    words += ["--output_dir", str(tmp_path / "out")]
    assert branch([str(run / "checkpoint-40"), *words]) == 0
    whole = read_records(run)
    records = {
        factor: read_records(tmp_path / f"out/runs/{factor}-x-4/lr-default/seed-42")
        for factor in (1, 2, 4)
    }
    # Factor 1 is the run itself: bitwise, with the learning rate of its own schedule.
    for column in ("loss", "learning_rate", "samples_seen", "global_batch_size"):
        assert records[1][column] == whole[column][40:48]
    for factor, found in records.items():
        assert found["global_batch_size"] == [4 * factor] * (8 // factor)
        assert found["samples_seen"][-1] == 160 + 32  # all saw the same samples
        # The schedule goes on, by samples, times sqrt(k): as the run has it where steps begin.
        before = [whole["learning_rate"][40 + step * factor] for step in range(8 // factor)]
        expected = [rate * math.sqrt(factor) for rate in before]
        assert found["learning_rate"] == pytest.approx(expected, rel=1e-9)
    values = result(tmp_path)
    assert [each["factor"] for each in values["branches"]] == [1, 2, 4]
    assert all(math.isfinite(each["validation_loss"]) for each in values["branches"])
