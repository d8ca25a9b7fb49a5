"""The recipes of `examples/recipes/`: real flags, the right sizes, twins that keep the ratios."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import yaml

from hf_adaptive_batch import read_records
from hf_adaptive_batch.decide.stages import paper_stages, parse_stages
from hf_adaptive_batch.flags import expand_settings, read_settings
from hf_adaptive_batch.hf_compat import argument_name
from hf_adaptive_batch.pretrain import parse_flags, pretrain
from hf_adaptive_batch.pretrain_model import build_model


ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "examples" / "recipes"
PARAMETERS = {
    "microllama_300m": 304_636_928,  # counted; published as 304.6M
    "tinyllama_1b": 1_100_048_384,  # as in public repositories that load it
    "openllama_3b": 3_426_473_600,  # as in a public repository that loads it
}
NAMES = [f"{name}{twin}" for name in PARAMETERS for twin in ("", "_twin")]
FIRST_BATCH = {"": 256, "_twin": 4}
VOCABULARY = 32_000

# What a twin may have of its own: sizes, the text, the speed of a CPU, and what is written to disk.
SCALED = {
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("intermediate_size", "block_size", "dataset", "dataset_config", "streaming"),
    *("validation_split", "max_eval_samples", "tokenizer", "max_train_samples", "learning_rate"),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "max_micro_batch_size"),
    *("max_global_batch_size", "bf16", "per_device_eval_batch_size", "dataloader_num_workers"),
    *("output_dir", "logging_steps", "eval_steps", "save_steps", "save_strategy"),
    "save_total_limit",
}


class Launched(NamedTuple):
    """The command at the top of a recipe."""

    config: Path
    processes: int
    recipe: str


def path_of(name: str) -> Path:
    return FOLDER / f"{name}.yaml"


def flags(name: str, *more: str) -> tuple[Any, Any, Any]:
    return parse_flags([str(path_of(name)), *more])


def launched(name: str) -> Launched:
    """As the first lines of the file say, with what the command leaves to its configuration."""
    head = path_of(name).read_text("utf-8").replace("\\\n#", "")
    command = re.search(r"accelerate launch --config_file (\S+) (.*)", head)
    assert command is not None
    config = ROOT / command[1]
    count = re.search(r"--num_processes (\d+)", command[2])
    processes = count[1] if count else yaml.safe_load(config.read_text("utf-8"))["num_processes"]
    recipe = re.search(r"examples/pretrain_llama\.py (\S+)", command[2])
    assert recipe is not None
    return Launched(config, int(processes), recipe[1])


def first_batch(values: dict[str, Any], processes: int) -> int:
    per_rank = values["per_device_train_batch_size"] * values["gradient_accumulation_steps"]
    return int(per_rank * processes)


def test_every_recipe_of_the_folder_is_tested_here() -> None:
    assert sorted(path.stem for path in FOLDER.glob("*.yaml")) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_every_value_arrives_where_it_belongs(name) -> None:
    parsed = flags(name)
    for setting, value in read_settings(path_of(name)).items():
        flag = argument_name(setting)
        owner = next(part for part in parsed if hasattr(part, flag))
        arrived = getattr(owner, flag)
        if isinstance(arrived, float):
            value = float(value)
        assert getattr(arrived, "value", arrived) == value, flag


def test_a_misspelled_flag_is_refused(tmp_path) -> None:
    file = tmp_path / "wrong.yaml"
    file.write_text(path_of("microllama_300m").read_text("utf-8") + "etta: 0.3\n", "utf-8")
    with pytest.raises(ValueError, match="etta"):
        parse_flags([str(file)])


@pytest.mark.parametrize("name", NAMES)
def test_the_command_in_the_file_is_right_and_gives_the_first_batch(name) -> None:
    command = launched(name)
    assert command.config.is_file()
    assert command.recipe == f"examples/recipes/{name}.yaml"
    values = read_settings(path_of(name))
    size = first_batch(values, command.processes)
    assert size == FIRST_BATCH["_twin" if name.endswith("twin") else ""]
    said = re.search(r"^# Sizes: (.+?) = (\d+) at first", path_of(name).read_text("utf-8"), re.M)
    assert said is not None
    assert [int(number) for number in re.findall(r"\d+", said[1])] == [
        values["per_device_train_batch_size"],
        values["gradient_accumulation_steps"],
        command.processes,
    ]
    assert int(said[2]) == size


@pytest.mark.parametrize("name", NAMES)
def test_the_readme_names_every_recipe_and_its_size(name) -> None:
    readme = (FOLDER / "README.md").read_text("utf-8")
    assert f"({name}.yaml)" in readme
    if name in PARAMETERS:
        assert f"{PARAMETERS[name]:,}" in readme
        assert f"{PARAMETERS[name]:,} parameters" in path_of(name).read_text("utf-8")


class Tokenizer(SimpleNamespace):
    """As much of the one on the Hub as the model asks for."""

    bos_token_id, eos_token_id, pad_token_id = 1, 2, None

    def __len__(self) -> int:
        return VOCABULARY


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_model_has_the_published_number_of_parameters(name) -> None:
    counts = []
    for more in ((), ("--num_key_value_heads", "1")):
        model_args, data_args, args = flags(name, *more)
        with torch.device("meta"):
            tokenizer: Any = Tokenizer()
            model = build_model(model_args, args, tokenizer, data_args.block_size)
        assert model.config.rms_norm_eps == model_args.rms_norm_eps
        counts.append(sum(parameter.numel() for parameter in model.parameters()))
    assert counts[0] == PARAMETERS[name]
    assert counts[1] != PARAMETERS[name]  # the groups count


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("--num_key_value_heads", "3", r"num_key_value_heads \(3\) must divide .*\(16\)"),
        ("--num_key_value_heads", "0", r"num_key_value_heads \(0\) must divide"),
        ("--rms_norm_eps", "0", r"rms_norm_eps \(0.0\) must be above 0"),
        ("--rms_norm_eps", "nan", r"rms_norm_eps \(nan\) must be above 0"),
    ],
)
def test_what_no_model_can_have_is_refused(flag, value, message) -> None:
    with pytest.raises(ValueError, match=message):
        flags("microllama_300m", flag, value)


def ratios(values: dict[str, Any], processes: int) -> dict[str, float]:
    size = first_batch(values, processes)
    return {
        "cap / first batch": values["max_global_batch_size"] / size,
        "budget / first batch": values["max_train_samples"] / size,
        "MLP / width": values["intermediate_size"] / values["hidden_size"],
        "heads / groups": values["num_attention_heads"] / values["num_key_value_heads"],
    }


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_twin_keeps_the_ratios_and_what_is_no_size(name) -> None:
    large, small = read_settings(path_of(name)), read_settings(path_of(f"{name}_twin"))
    processes = launched(name).processes, launched(f"{name}_twin").processes
    assert ratios(small, processes[1]) == ratios(large, processes[0])
    assert ratios(large | {"max_global_batch_size": 4096}, processes[0]) != ratios(
        large, processes[0]
    )
    assert {key: large[key] for key in large.keys() - SCALED} == {
        key: small[key] for key in small.keys() - SCALED
    }


def test_the_baselines_take_the_steps_that_the_readme_says() -> None:
    readme = (FOLDER / "README.md").read_text("utf-8")
    budget = read_settings(path_of("microllama_300m"))["max_train_samples"]
    for schedule, wanted in (
        ("0:4096", parse_stages("0:4096")),
        ("0:8192", parse_stages("0:8192")),
        ("stage_wise", paper_stages(8192)),
    ):
        per_sample = 1 / budget if schedule == "stage_wise" else 1.0
        steps = wanted.steps_for(budget, per_sample)
        assert re.search(rf"^\|.*--batch_schedule {schedule} .*\| {steps} \|$", readme, re.M)


@pytest.mark.parametrize("name", PARAMETERS)
@pytest.mark.parametrize("schedule", ["0:4096", "0:8192", "stage_wise"])
def test_the_baselines_are_flags_of_every_recipe(name, schedule) -> None:
    *_, args = flags(name, "--batch_schedule", schedule, "--max_global_batch_size", "8192")
    assert args.batch_schedule == schedule


@pytest.mark.slow
@pytest.mark.parametrize("name", PARAMETERS)
def test_a_twin_trains_and_its_batch_grows(name, tmp_path) -> None:
    words = [
        *("--gradient_accumulation_steps", "4", "--max_train_samples", "1500"),
        *("--max_eval_samples", "32", "--output_dir", str(tmp_path), "--use_cpu", "true"),
    ]
    summary = pretrain(expand_settings([str(path_of(f"{name}_twin")), *words]))
    columns = read_records(tmp_path)
    assert columns["samples_seen"][-1] == summary.samples == 1500
    assert columns["global_batch_size"][0] == 4 < columns["global_batch_size"][-1] <= 128
    assert summary.validation_loss < 5.0  # of 256 bytes alike: 5.5


def test_a_setting_has_the_name_that_this_version_of_transformers_knows() -> None:
    older = {"gradient_checkpointing", "gradient_checkpointing_kwargs", "seed"}
    names = ("activation_checkpointing", "activation_checkpointing_kwargs", "seed", "eta")
    assert [argument_name(name, older) for name in names] == [
        "gradient_checkpointing",
        "gradient_checkpointing_kwargs",
        "seed",
        "eta",
    ]
    assert [argument_name(name, set(names)) for name in names] == list(names)
