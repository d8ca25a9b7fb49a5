"""Records: one JSON line per decision, read back as columns."""

import json
import math
from pathlib import Path

import pytest

from hf_adaptive_batch.report.records import (
    FIELDS,
    RECORDS_FILE,
    SCHEMA_VERSION,
    RecordWriter,
    read_records,
)


def written(folder: Path, steps: list[int], *, resume_step: int | None = None) -> RecordWriter:
    writer = RecordWriter(folder, resume_step=resume_step)
    for step in steps:
        writer.write({"step": step, "loss": step / 2, "reason": "test_passed"})
    return writer


def test_records_come_back_as_columns(tmp_path: Path) -> None:
    writer = RecordWriter(tmp_path)
    records = [
        {name: index if name != "reason" else "at_cap" for name in FIELDS} for index in (1, 2, 3)
    ]
    for record in records:
        writer.write(record)
    columns = read_records(tmp_path)
    assert tuple(columns) == FIELDS
    assert columns.pop("version") == [SCHEMA_VERSION] * 3
    assert columns.pop("reason") == ["at_cap"] * 3
    assert set(map(tuple, columns.values())) == {(1, 2, 3)}


def test_floats_survive_to_the_last_bit(tmp_path: Path) -> None:
    values = [0.1, 1 / 3, 5e-324, 1.7976931348623157e308, -0.0]
    writer = RecordWriter(tmp_path)
    for step, value in enumerate(values, start=1):
        writer.write({"step": step, "loss": value})
    assert [v.hex() for v in read_records(tmp_path)["loss"]] == [v.hex() for v in values]


def test_the_file_and_its_folder_are_read_alike(tmp_path: Path) -> None:
    writer = written(tmp_path, [1, 2])
    assert writer.path == tmp_path / RECORDS_FILE
    assert read_records(writer.path) == read_records(tmp_path) == read_records(str(tmp_path))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_null_and_read_as_none(tmp_path: Path, value: float) -> None:
    RecordWriter(tmp_path).write({"step": 1, "loss": value, "noise_scale": 2.0})
    (line,) = (tmp_path / RECORDS_FILE).read_text().splitlines()
    record = json.loads(line, parse_constant=pytest.fail)  # no NaN and no Infinity: strict JSON
    assert record["loss"] is None
    assert read_records(tmp_path)["loss"] == [None]
    assert read_records(tmp_path)["noise_scale"] == [2.0]


def test_a_missing_field_is_null(tmp_path: Path) -> None:
    RecordWriter(tmp_path).write({"step": 1})
    columns = read_records(tmp_path)
    assert columns["step"] == [1]
    assert all(columns[name] == [None] for name in FIELDS if name not in ("version", "step"))


def test_an_unknown_field_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    writer = written(tmp_path, [1])
    with pytest.raises(ValueError, match=r"record fields \(\['lost'\]\) must be among"):
        writer.write({"step": 2, "lost": 1.0})
    assert read_records(tmp_path)["step"] == [1]


def test_the_folder_is_made_with_the_first_record_and_not_before(tmp_path: Path) -> None:
    writer = RecordWriter(tmp_path / "runs" / "one")
    assert not (tmp_path / "runs").exists()
    writer.write({"step": 1})
    assert read_records(tmp_path / "runs" / "one")["step"] == [1]


def test_every_record_is_on_disk_at_once(tmp_path: Path) -> None:
    writer = RecordWriter(tmp_path)
    for step in (1, 2):
        writer.write({"step": step})
        assert read_records(tmp_path)["step"] == list(range(1, step + 1))


# ---------------------------------------------------------------------------------- cut-off files


@pytest.mark.parametrize("kept", [1, 20, -2], ids=["first byte", "middle", "last brace"])
def test_a_last_line_that_was_cut_off_is_left_out(tmp_path: Path, kept: int) -> None:
    path = written(tmp_path, [1, 2, 3]).path
    *whole, last = path.read_text().splitlines(keepends=True)
    path.write_text("".join(whole) + last[:kept])
    assert read_records(path)["step"] == [1, 2]


def test_a_last_line_without_its_line_break_is_whole(tmp_path: Path) -> None:
    path = written(tmp_path, [1, 2]).path
    path.write_text(path.read_text().rstrip("\n"))
    assert read_records(path)["step"] == [1, 2]


def test_a_broken_line_in_the_middle_is_an_error(tmp_path: Path) -> None:
    path = written(tmp_path, [1, 2, 3]).path
    first, second, third = path.read_text().splitlines(keepends=True)
    path.write_text(first + second[:20] + "\n" + third)
    with pytest.raises(ValueError, match=r"Unterminated|Expecting"):
        read_records(path)


@pytest.mark.parametrize("version", [0, 2, None])
@pytest.mark.parametrize("line", [1, 2], ids=["first line", "last line"])
def test_another_schema_version_is_refused(tmp_path: Path, version: int | None, line: int) -> None:
    path = written(tmp_path, [1, 2]).path
    lines = path.read_text().splitlines()
    lines[line - 1] = json.dumps(json.loads(lines[line - 1]) | {"version": version})
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(ValueError, match=rf"version \({version}\) in line {line} of .* must be 1"):
        read_records(path)


def test_another_schema_version_is_refused_also_where_it_has_no_steps(tmp_path: Path) -> None:
    (tmp_path / RECORDS_FILE).write_text('{"version": 2, "optimizer_step": 1}\n')
    with pytest.raises(ValueError, match=r"version \(2\) in line 1"):
        read_records(tmp_path)


# ------------------------------------------------------------------------------ fresh and resumed


def test_a_fresh_run_keeps_the_file_of_earlier_ones_under_numbered_names(tmp_path: Path) -> None:
    written(tmp_path, [1, 2, 3])
    written(tmp_path, [1, 2])
    written(tmp_path, [1])
    assert read_records(tmp_path)["step"] == [1]
    stem = Path(RECORDS_FILE).stem
    assert read_records(tmp_path / f"{stem}-1.jsonl")["step"] == [1, 2, 3]
    assert read_records(tmp_path / f"{stem}-2.jsonl")["step"] == [1, 2]
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize(
    ("resume_step", "kept"),
    [(0, []), (1, [1]), (3, [1, 3]), (4, [1, 3]), (5, [1, 3, 5]), (99, [1, 3, 5])],
)
def test_a_resumed_run_drops_what_comes_after_its_checkpoint(
    tmp_path: Path, resume_step: int, kept: list[int]
) -> None:
    written(tmp_path, [1, 3, 5])
    written(tmp_path, [100], resume_step=resume_step)
    assert read_records(tmp_path)["step"] == [*kept, 100]
    assert [path.name for path in tmp_path.iterdir()] == [RECORDS_FILE]


def test_a_resumed_run_drops_a_line_that_was_cut_off(tmp_path: Path) -> None:
    path = written(tmp_path, [1, 2, 3]).path
    path.write_text(path.read_text()[:-10])
    written(tmp_path, [3], resume_step=2)
    assert read_records(tmp_path)["step"] == [1, 2, 3]
    assert len(path.read_text().splitlines()) == 3


def test_a_resumed_run_goes_on_behind_a_line_without_its_line_break(tmp_path: Path) -> None:
    path = written(tmp_path, [1, 2]).path
    path.write_text(path.read_text().rstrip("\n"))
    written(tmp_path, [3], resume_step=2)
    assert read_records(tmp_path)["step"] == [1, 2, 3]


def test_a_resumed_run_without_a_file_begins_one(tmp_path: Path) -> None:
    written(tmp_path, [8], resume_step=7)
    assert read_records(tmp_path)["step"] == [8]
