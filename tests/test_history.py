"""Histories: what is read back from a run's folder, and the runs that the command finds."""

import json
import math
from pathlib import Path

import pytest

from hf_adaptive_batch.report.history import Evaluation, RunHistory, is_run, read_history
from hf_adaptive_batch.report.records import (
    EVALUATION_FIELDS,
    EVALUATIONS_FILE,
    FIELDS,
    RECORDS_FILE,
    RecordWriter,
)
from hf_adaptive_batch.report_command import find_histories, report


def evaluation(step: int, loss: float, **values) -> Evaluation:
    given = {"samples_seen": 4 * step, "tokens_seen": 64 * step, "seconds": 0.5 * step}
    return Evaluation(step=step, loss=loss, **{**given, **values})


def history(*evaluations: Evaluation, **columns) -> RunHistory:
    records = {name: [] for name in FIELDS} | columns
    return RunHistory(name="run", records=records, evaluations=evaluations)


def write_run(folder: Path, steps: int = 3, losses: tuple[float | None, ...] = (3.0, 2.0)) -> Path:
    records = RecordWriter(folder)
    for step in range(1, steps + 1):
        progress = {"step": step, "samples_seen": 4 * step, "tokens_seen": 64 * step}
        sizes = {"global_batch_size": 4, "next_global_batch_size": 4}
        records.write({**progress, **sizes, "loss": 5.0 - step})
    evaluations = RecordWriter(folder, name=EVALUATIONS_FILE, fields=EVALUATION_FIELDS)
    for step, loss in enumerate(losses, start=1):
        progress = {"step": step, "samples_seen": 4 * step, "tokens_seen": 64 * step}
        metrics = {"eval_loss": loss, "eval_runtime": 1.0}
        evaluations.write({**progress, "seconds": 0.5 * step, "metrics": metrics})
    return folder


def test_a_run_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    run = read_history(write_run(tmp_path / "mine"))
    assert run.name == "mine"
    assert run.records["loss"] == [4.0, 3.0, 2.0]
    assert list(run.evaluations) == [evaluation(1, 3.0), evaluation(2, 2.0)]
    assert (run.steps, run.samples, run.tokens, run.seconds) == (3, 12, 192, 1.0)
    assert run.final_loss == 2.0
    assert run.average_batch_size == 4.0
    assert read_history(tmp_path / "mine", "called otherwise").name == "called otherwise"


def test_a_loss_that_was_not_finite_is_nan_and_not_a_number_of_some_kind(tmp_path: Path) -> None:
    run = read_history(write_run(tmp_path, losses=(3.0, math.nan)))
    assert run.final_loss is not None
    assert math.isnan(run.final_loss)


def test_evaluations_of_other_things_than_the_loss_are_left_out(tmp_path: Path) -> None:
    write_run(tmp_path, losses=(3.0,))
    line = {"version": 1, "step": 2, "samples_seen": 8, "tokens_seen": 128}
    with (tmp_path / EVALUATIONS_FILE).open("a") as file:
        file.write(json.dumps({**line, "metrics": {"eval_other_loss": 1.0}}) + "\n")
        file.write(json.dumps({**line, "metrics": {"eval_loss": 2.5}}) + "\n")
    run = read_history(tmp_path)
    assert [each.loss for each in run.evaluations] == [3.0, 2.5]
    assert run.evaluations[-1].seconds is None  # a line without the field


def test_a_running_run_with_a_last_line_that_is_cut_is_read(tmp_path: Path) -> None:
    write_run(tmp_path)
    for name in (RECORDS_FILE, EVALUATIONS_FILE):
        with (tmp_path / name).open("a") as file:
            file.write('{"version": 1, "step": 9')
    run = read_history(tmp_path)
    assert run.steps == 3
    assert len(run.evaluations) == 2


@pytest.mark.parametrize("missing", [RECORDS_FILE, EVALUATIONS_FILE])
def test_one_of_the_two_files_is_enough(tmp_path: Path, missing: str) -> None:
    (write_run(tmp_path) / missing).unlink()
    run = read_history(tmp_path)
    assert run.steps == (2 if missing == RECORDS_FILE else 3)
    assert (run.final_loss is None) == (missing == EVALUATIONS_FILE)


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    assert not is_run(tmp_path)
    with pytest.raises(ValueError, match=r"folder \(.*\) must hold adaptive_batch.jsonl or"):
        read_history(tmp_path)


def test_a_run_that_did_nothing_has_no_numbers_rather_than_zeros() -> None:
    run = history()
    assert (run.final_loss, run.seconds, run.average_batch_size) == (None, None, None)
    assert (run.steps, run.samples, run.tokens) == (0, 0, 0)
    assert run.steps_to(1.0) is None


def test_amounts_are_the_largest_that_either_file_knows() -> None:
    columns = {"step": [1, 7], "samples_seen": [4, 28], "tokens_seen": [64, None]}
    run = history(evaluation(5, 2.0, tokens_seen=320), **columns, seconds=[None, 3.5])
    assert (run.steps, run.samples, run.tokens, run.seconds) == (7, 28, 320, 3.5)


@pytest.mark.parametrize(
    ("target", "steps"),
    [
        (4.0, 10.0),  # the first evaluation is there already
        (3.0, 10.0),
        (2.75, 15.0),  # half of the way from 3.0 to 2.5
        (2.5, 20.0),
        (2.1, 28.0),  # the first crossing: it goes up again later
        (1.9, None),
    ],
)
def test_steps_to_a_target_are_interpolated_at_the_first_crossing(
    target: float, steps: float | None
) -> None:
    run = history(*(evaluation(s, x) for s, x in [(10, 3.0), (20, 2.5), (30, 2.0), (40, 2.4)]))
    assert run.steps_to(target) == (steps if steps is None else pytest.approx(steps))


def test_nothing_is_interpolated_from_a_loss_that_is_not_finite() -> None:
    run = history(evaluation(10, math.nan), evaluation(20, 2.0))
    assert run.steps_to(2.5) == 20.0
    assert history(evaluation(10, math.nan)).steps_to(2.5) is None
    assert run.steps_to(math.nan) is None


def test_two_evaluations_of_the_same_step_do_not_divide_by_zero() -> None:
    run = history(evaluation(10, 3.0), evaluation(10, 3.0), evaluation(20, 2.0))
    assert run.steps_to(2.5) == pytest.approx(15.0)


def test_runs_are_found_at_any_depth_and_named_by_what_tells_them_apart(tmp_path: Path) -> None:
    for name in ("sweep/run-10", "sweep/run-2", "other/run-2"):
        write_run(tmp_path / name)
    (tmp_path / "sweep/run-2/checkpoint-3").mkdir()
    found = find_histories([tmp_path])
    assert [run.name for run in found] == ["other/run-2", "sweep/run-2", "sweep/run-10"]
    first, second = find_histories([tmp_path / "sweep/run-10", tmp_path / "sweep/run-2"])
    assert (first.name, second.name) == ("run-10", "run-2")
    (alone,) = find_histories([tmp_path / "sweep/run-2", tmp_path / "sweep/../sweep/run-2"])
    assert alone.name == "run-2"


def test_a_folder_without_any_run_is_one_clear_error(tmp_path: Path) -> None:
    write_run(tmp_path / "a")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"DIR \(.*empty\) must hold a run at some depth"):
        report([str(tmp_path / "a"), str(tmp_path / "empty")])
    with pytest.raises(ValueError, match=r"DIR \(nowhere\) must be a folder"):
        report(["nowhere"])
    assert not (tmp_path / "a" / "report.html").exists()


def test_the_command_writes_into_the_first_folder_or_where_it_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path / "runs/a"), write_run(tmp_path / "runs/b")
    assert report([str(tmp_path / "runs")]) == 0
    page = tmp_path / "runs/report.html"
    assert capsys.readouterr().out == f"2 runs: {page}\n"
    assert "Runs, side by side" in page.read_text()
    assert report([str(tmp_path / "runs/a"), "--output", str(tmp_path / "o"), "--title", "T"]) == 0
    assert "<title>T</title>" in (tmp_path / "o/report.html").read_text()
    assert json.loads((tmp_path / "o/report.json").read_text())["title"] == "T"


def test_the_report_of_a_comparison_is_not_written_over(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "one"
    write_run(run)
    (tmp_path / "compare.lock").touch()
    with pytest.raises(ValueError, match=r"output \(.*\) must be another folder, because"):
        report([str(tmp_path)])
    assert report([str(tmp_path), "--output", str(tmp_path / "other")]) == 0
    assert (tmp_path / "other" / "report.html").exists()
