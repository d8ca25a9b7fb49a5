"""Settings files become the words of a command line: the same as a person would type."""

import json
import re
import subprocess
import sys
from argparse import ArgumentParser
from datetime import date

import pytest

from hf_adaptive_batch.flags import expand_settings, flags_of, read_settings


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({}, []),
        ({"eta": 0.3}, ["--eta", "0.3"]),
        ({"learning_rate": 1e-05}, ["--learning_rate", "1e-05"]),
        ({"learning_rate": "1e-3"}, ["--learning_rate", "1e-3"]),
        ({"max_steps": 10, "seed": 0}, ["--max_steps", "10", "--seed", "0"]),
        ({"streaming": True, "bf16": False}, ["--streaming", "true", "--bf16", "false"]),
        ({"x": None, "y": 1}, ["--y", "1"]),
        ({"betas": [1, 2]}, ["--betas", "1", "2"]),
        ({"report_to": ("wandb", "mlflow")}, ["--report_to", "wandb", "mlflow"]),
        ({"flags": [True, 0.5]}, ["--flags", "true", "0.5"]),
        ({"batch_schedule": "0:8 2.5%:16"}, ["--batch_schedule", "0:8 2.5%:16"]),
        ({"name": ""}, ["--name", ""]),
        ({"kwargs": {"min_lr_rate": 0.1}}, ["--kwargs", '{"min_lr_rate": 0.1}']),
        ({"kwargs": {}}, ["--kwargs", "{}"]),
        (
            {"kwargs": {"a": {"b": [True, None, "c d"]}}},
            ["--kwargs", '{"a": {"b": [true, null, "c d"]}}'],
        ),
        # Numbers to everybody but YAML 1.1; in JSON text the quotes would make them text.
        (
            {"kwargs": {"min_lr": "1e-5", "n": ["2E3"]}},
            ["--kwargs", '{"min_lr": 1e-05, "n": [2000.0]}'],
        ),
        (
            {"kwargs": {"name": "e5", "more": "1e-5 m"}},
            ["--kwargs", '{"name": "e5", "more": "1e-5 m"}'],
        ),
        ({"shift": -1, "text": "--x"}, ["--shift=-1", "--text=--x"]),
    ],
)
def test_settings_are_written_as_a_person_would(values, words) -> None:
    assert flags_of(values) == words


@pytest.mark.parametrize("value", ["-1", -1, "-1e-3", "--x", "-", "0:8 2.5%:16", ""])
def test_a_parser_reads_back_every_text(value) -> None:
    parser = ArgumentParser()
    parser.add_argument("--value")
    parser.add_argument("--x")
    assert parser.parse_args(flags_of({"value": value})).value == str(value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({True: 1}, "name of a setting (True) must be that of a flag"),
        ({"--eta": 1}, "name of a setting ('--eta') must be that of a flag without its dashes"),
        ({"a b": 1}, "name of a setting ('a b') must be"),
        ({"report_to": []}, "report_to ([]) must have an entry"),
        ({"x": [[1]]}, "x ([1]) must be text, a number, true or false, or a list of these"),
        ({"x": [None]}, "x (None) must be text"),
        ({"day": date(2025, 1, 2)}, "and this is a date; put text into quotes"),
        ({"kwargs": {"day": date(2025, 1, 2)}}, "must hold what JSON can say"),
    ],
)
def test_what_is_no_word_is_refused(values, message) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        flags_of(values)


YAML = """\
# a comment
eta: 0.3
learning_rate: 1e-3   # text, to YAML 1.1
streaming: on
bf16: no
batch_schedule: 0:8 2.5%:16
cap: 2_000
save_strategy: "no"
nothing: ~
report_to: [wandb, mlflow]
lr_scheduler_kwargs: {min_lr_rate: 0.1}
"""
VALUES = {
    "eta": 0.3,
    "learning_rate": "1e-3",
    "streaming": True,
    "bf16": False,
    "batch_schedule": "0:8 2.5%:16",
    "cap": 2000,
    "save_strategy": "no",
    "nothing": None,
    "report_to": ["wandb", "mlflow"],
    "lr_scheduler_kwargs": {"min_lr_rate": 0.1},
}


@pytest.mark.parametrize("name", ["a.yaml", "a.yml", "A.YAML", "a.json"])
def test_yaml_and_json_hold_the_same_settings(tmp_path, name) -> None:
    file = tmp_path / name
    file.write_text(json.dumps(VALUES) if name.endswith("json") else YAML, "utf-8")
    assert read_settings(file) == read_settings(str(file)) == VALUES
    assert "--learning_rate 1e-3 --streaming true --bf16 false" in " ".join(flags_of(VALUES))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.yaml", "- eta\n- 0.2\n", "must hold a mapping from names to values"),
        ("a.yaml", "- eta\n", "but holds a list"),
        ("a.yaml", "eta\n", "but holds a str"),
        ("a.yaml", "", "but holds nothing"),
        ("a.json", "[1]", "but holds a list"),
        ("a.yaml", "eta: 0.2\nseed: 1\neta: 0.3\n", "eta is given twice, in line 3"),
        ("a.yaml", "kwargs:\n  a: 1\n  a: 2\n", "a is given twice, in line 3"),
        ("a.json", '{"eta": 1, "eta": 2}', "eta is given twice"),
        ("a.yaml", "eta: [1\n", "must be YAML with every name once"),
        ("a.yaml", "a: 1\n---\nb: 2\n", "must be YAML"),
        ("a.yaml", "? [1]\n: 2\n", "must be YAML"),
        ("a.yaml", "day: 2025-13-41\n", "must be YAML"),
        ("a.yaml", "x: !!python/object/apply:os.getcwd []\n", "must be YAML"),
        ("a.json", "{'eta': 1}", "must be JSON"),
        ("a.yaml", b"eta: \xff\n", "not UTF-8 text"),
        ("a.toml", "eta = 1\n", "must end in .yaml, .yml, .json"),
    ],
)
def test_what_is_no_settings_file_is_named_with_the_reason(
    tmp_path, name, content, message
) -> None:
    file = tmp_path / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        read_settings(file)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there_or_is_a_folder_is_named(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"missing\.yaml.*No such file"):
        read_settings(tmp_path / "missing.yaml")
    (tmp_path / "folder.yaml").mkdir()
    with pytest.raises(ValueError, match=r"folder\.yaml.*directory"):
        read_settings(tmp_path / "folder.yaml")


def test_a_merged_mapping_may_be_overwritten(tmp_path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("first: &x {a: 1, b: 2}\nsecond: {<<: *x, b: 3}\n", "utf-8")
    assert read_settings(file)["second"] == {"a": 1, "b": 3}


def test_flags_on_the_command_line_win_over_the_file(tmp_path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("eta: 0.3\nbetas: [1, 2]\n", "utf-8")
    words = expand_settings([str(file), "--eta", "0.5", "--betas", "3"])
    assert words == ["--eta", "0.3", "--betas", "1", "2", "--eta", "0.5", "--betas", "3"]
    parser = ArgumentParser()
    parser.add_argument("--eta", type=float)
    parser.add_argument("--betas", type=int, nargs="+")
    assert vars(parser.parse_args(words)) == {"eta": 0.5, "betas": [3]}


@pytest.mark.parametrize(
    "words", [[], ["--eta", "0.2"], ["--dataset", "x.yaml"], ["x"], ["--x.yaml"], ["yaml"]]
)
def test_other_words_stay_as_they_are(words) -> None:
    assert expand_settings(words) == words


def test_only_the_first_word_can_be_a_file(tmp_path) -> None:
    with pytest.raises(ValueError, match="No such file"):
        expand_settings([str(tmp_path / "missing.json")])
    assert expand_settings(["--a", "missing.json"]) == ["--a", "missing.json"]


def test_settings_are_read_without_torch() -> None:
    code = (
        "import hf_adaptive_batch.flags, sys; print({'torch', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
