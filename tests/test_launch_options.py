"""`accelerate launch` with options of the Trainer and of FSDP, and what is refused, and how."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
from accelerate.utils import DDPCommunicationHookType, DistributedType
from torch import nn

from hf_adaptive_batch import read_records
from hf_adaptive_batch.parallel_support import check_label_smoothing, check_parallelism
from hf_adaptive_batch.pretrain_arguments import ModelArguments
from hf_adaptive_batch.pretrain_model import build_model
from hf_adaptive_batch.support import check_support

from .launches import launch
from .test_launch import (
    FULL,
    LAYOUTS,
    SHARD_SIZE,
    Layout,
    checkpoints,
    evaluations,
    loss_of_model,
    text,
)


__all__ = ["text"]  # a fixture

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


def synchronised(each: bool) -> tuple[str, str]:
    options = {"gradient_accumulation_kwargs": {"sync_each_batch": each}}
    return "--accelerator_config", json.dumps(options)


BEST = (
    *("--load_best_model_at_end", "true", "--save_strategy", "steps", "--eval_strategy", "steps"),
    # The highest loss is the best: that of the first checkpoint, which is not the last model.
    *("--eval_steps", "2", "--metric_for_best_model", "eval_loss", "--greater_is_better", "true"),
)
COMPILED = ("--torch_compile", "true", "--torch_compile_backend", "aot_eager")
CHECKPOINTED = ("--gradient_checkpointing", "true")
WORKER = ("--dataloader_num_workers", "1")


class Run(NamedTuple):
    layout: str
    flags: tuple[str, ...]
    launcher: tuple[str, ...] = ()
    rel: float | None = 1e-5  # of the losses, to those of the plain run; None where it is another


RUNS = {
    "plain": Run("ddp", ()),
    "best, clipped, bf16, own tokens": Run(
        "fsdp2 sharded",
        (
            *(*BEST, "--bf16", "true", "--max_grad_norm", "0.1", "--tie_word_embeddings", "true"),
            *("--average_tokens_across_devices", "false"),
        ),
        rel=None,
    ),
    "best, checkpointed by accelerate, reduced last": Run(
        "fsdp2 full",
        (*synchronised(False), *BEST),
        ("--fsdp_activation_checkpointing", "true"),  # offloading pins memory, for GPUs alone
    ),
    "bf16": Run("fsdp2 at load time", ("--bf16", "true"), rel=2e-2),
    "best, reduced each, own tokens": Run(
        "fsdp2 at load time",
        (*BEST, *synchronised(True), *CHECKPOINTED, "--average_tokens_across_devices", "false"),
    ),
    "compiled, checkpointed, reduced each": Run(
        "ddp", (*COMPILED, *CHECKPOINTED, *synchronised(True))
    ),
    "compiled": Run("fsdp2 sharded", (*COMPILED, *synchronised(True), *WORKER)),
}


@pytest.fixture(scope="module")
def ran(tmp_path_factory, text):
    parent, made = tmp_path_factory.mktemp("options"), {}

    def run(name: str) -> Path:
        if name not in made:
            given = RUNS[name]
            layout = LAYOUTS[given.layout]
            layout = layout._replace(launcher=(*layout.launcher, *given.launcher))
            folder = parent / str(len(made))
            layout.start(folder, text, given.flags).expect_success()
            made[name] = folder
        return made[name]

    yield run
    shutil.rmtree(parent)


@pytest.mark.parametrize("name", RUNS)
def test_every_option_gives_a_plausible_record_and_a_model(ran, name):
    folder = ran(name)
    records = read_records(folder)
    sizes = records["global_batch_size"]
    assert sizes == sorted(sizes)
    assert (sizes[0], sizes[-1], records["samples_seen"][-1]) == (8, 32, 240)
    assert "nonfinite_loss" not in records["reason"]
    for column in ("loss", "small_sq_norm", "big_sq_norm", "norm_test"):
        values = [value for value in records[column] if value is not None]
        assert values
        assert all(math.isfinite(value) and value > 0 for value in values), column
    pairs = zip(records["small_sq_norm"], records["big_sq_norm"], strict=True)
    assert all(small > big for small, big in pairs)
    assert records["loss"][-1] < records["loss"][0] - 0.5
    assert len(checkpoints(folder)) == 2
    assert (folder / "model.safetensors").is_file()
    assert evaluations(folder)[-1] < 5


@pytest.mark.parametrize("name", [name for name in RUNS if "best" in name])
def test_the_best_model_is_loaded_at_the_end(ran, text, name):
    folder = ran(name)
    assert list(checkpoints(folder)) == [2, 10]
    first, *_, last = evaluations(folder)
    assert first > last + 0.5
    rel = 1e-2 if "bf16" in name else 1e-5
    assert loss_of_model(folder, text) == pytest.approx(first, rel=rel)


@pytest.mark.parametrize("name", [name for name in RUNS if RUNS[name].rel])
def test_what_only_computes_otherwise_measures_the_same(ran, name):
    """Checkpointing, compiling, and when gradients are reduced; bf16 is coarser."""
    expected, records, rel = read_records(ran("plain")), read_records(ran(name)), RUNS[name].rel
    for column in ("step_samples", "reason", "global_batch_size", "workers"):
        assert records[column] == expected[column], column
    assert records["loss"] == pytest.approx(expected["loss"], rel=rel)
    for column in ("small_sq_norm", "big_sq_norm"):
        assert records[column] == pytest.approx(expected[column], rel=5 * rel), column


# ---------------------------------------------------------------------------------------- refused


def launched_with(**found: Any) -> SimpleNamespace:
    """A Trainer of several processes, as far as it is looked at."""
    accelerator = {
        "distributed_type": DistributedType.FSDP,
        "parallelism_config": None,
        "ddp_handler": None,
        "split_batches": False,
        **found.pop("accelerator", {}),
    }
    args = {"n_gpu": 1, "world_size": 2, "optim": "adamw_torch", **found.pop("args", {})}
    given = {"is_deepspeed_enabled": False, "model": nn.Linear(2, 2), "model_init": None, **found}
    return SimpleNamespace(
        accelerator=SimpleNamespace(**accelerator),
        args=SimpleNamespace(**args),
        is_world_process_zero=lambda: True,
        **given,
    )


def loaded_with(**sizes: int) -> SimpleNamespace:
    model = nn.Linear(2, 2)
    config = {"fsdp_size": 2, "tp_size": 1, "dp_replicate_size": 1, **sizes}
    model.config = SimpleNamespace(distributed_config=SimpleNamespace(**config))
    model.is_distributed_loading_by_transformers = True
    return launched_with(model=model)


def on_mesh(**sizes: int) -> SimpleNamespace:
    mesh = SimpleNamespace(**{"cp_size": 1, "sp_size": 1, **sizes})
    return launched_with(accelerator={"parallelism_config": mesh})


def hooked(hook: DDPCommunicationHookType) -> SimpleNamespace:
    kind = DistributedType.MULTI_GPU
    handler = SimpleNamespace(comm_hook=hook)
    return launched_with(accelerator={"distributed_type": kind, "ddp_handler": handler})


MEGATRON = {"distributed_type": DistributedType.MEGATRON_LM}
REFUSED = {
    "context": (
        lambda: on_mesh(cp_size=2),
        ["cp_size (2)", "context parallelism", "dp_shard_size"],
    ),
    "sequence": (
        lambda: on_mesh(sp_size=2),
        ["sp_size (2)", "sequence parallelism", "dp_shard_size"],
    ),
    "experts": (
        lambda: loaded_with(ep_size=2),
        ["ep_size (2)", "all ranks", "use fsdp_size instead"],
    ),
    "pipeline": (
        lambda: loaded_with(pp_size=2),
        ["pp_size (2)", "pipeline", "fsdp_size and tp_size"],
    ),
    "deepspeed": (lambda: launched_with(is_deepspeed_enabled=True), ["deepspeed", "without it"]),
    "megatron": (lambda: launched_with(accelerator=MEGATRON), ["MEGATRON_LM", "--use_fsdp"]),
    "power sgd": (
        lambda: hooked(DDPCommunicationHookType.POWER_SGD),
        ["PowerSGD", "use fp16 or bf16"],
    ),
    "batched power sgd": (
        lambda: hooked(DDPCommunicationHookType.BATCHED_POWER_SGD),
        ["comm_hook (batched_power_sgd)", "use fp16 or bf16"],
    ),
    "data parallel": (
        lambda: launched_with(args={"n_gpu": 2}),
        ["n_gpu (2)", "CUDA_VISIBLE_DEVICES"],
    ),
    "split batches": (
        lambda: launched_with(accelerator={"split_batches": True}),
        ["split_batches (True)", "divide it by their number"],
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_measured_is_refused_with_the_reason_and_the_way_out(name):
    make, words = REFUSED[name]
    trainer = make()
    with pytest.raises(ValueError, match="must") as refusal:
        check_support(trainer)
    message = str(refusal.value)
    assert all(word in message for word in [*words, "because"]), message


@pytest.mark.parametrize("hook", ["NO", "FP16", "BF16"])
def test_hooks_that_send_the_whole_gradient_are_not_refused(hook):
    check_parallelism(hooked(DDPCommunicationHookType[hook]))


def test_sizes_that_do_not_multiply_to_the_processes_are_refused():
    args = SimpleNamespace(world_size=2, output_dir="nowhere", process_index=0)
    tokenizer = SimpleNamespace(bos_token_id=0, eos_token_id=1, pad_token_id=2)
    tokenizer = type("Tokens", (SimpleNamespace,), {"__len__": lambda self: 8})(**vars(tokenizer))
    given = ModelArguments(fsdp_size=2, tp_size=2)
    with pytest.raises(ValueError, match=r"must be the number of processes \(2\)") as refusal:
        build_model(given, args, tokenizer, 32)
    message = str(refusal.value)
    assert all(word in message for word in ("dp_replicate_size", "fsdp_size", "tp_size")), message
    assert "--num_processes" in message


LAUNCHED = {
    "a tied weight that is not divided evenly": (
        LAYOUTS["fsdp2 at load time"],
        ("--tie_word_embeddings", "true"),
        ["the tied weight", "rows) must divide evenly into its 2 shards", "tie_word_embeddings"],
    ),
    "context parallelism": (
        Layout(
            *("hsdp", 2, 1, ""),
            shim=True,
            launcher=(
                *("--parallelism_config_dp_replicate_size", "1", SHARD_SIZE, "1"),
                *("--parallelism_config_cp_size", "2"),
            ),
        ),
        (),
        ["cp_size (2) must be 1"],
    ),
}


@pytest.mark.parametrize("name", LAUNCHED)
def test_a_launch_that_is_refused_says_so_instead_of_a_traceback(tmp_path, text, name):
    layout, flags, words = LAUNCHED[name]
    started = layout.start(tmp_path / "refused", text, flags)
    assert started.wait() != 0
    lines = [line for line in started.output.splitlines() if line.startswith("error: ")]
    assert lines, started.output
    assert len(set(lines)) == 1
    assert all(word in lines[0] for word in words), lines[0]
    script = started.output.split("ChildFailedError")[0].split("Traceback")[0]
    assert lines[0] in script  # before the launcher's own
    assert not list((tmp_path / "refused").glob("*.jsonl"))


def test_a_folder_that_holds_another_run_is_refused_by_all_processes(tmp_path, text, ran):
    folder = tmp_path / "used"
    shutil.copytree(ran("plain"), folder)
    started = LAYOUTS["ddp"].start(folder, text, ())
    assert started.wait() != 0
    assert "must hold no checkpoints of an earlier run" in started.output
    before = read_records(ran("plain"))
    assert read_records(folder) == before


def test_the_script_says_that_accelerate_drops_fsdp_on_the_cpu(tmp_path, text):
    folder = tmp_path / "dropped"
    started = launch(
        "fsdp2",
        2,
        (
            *("--hidden_size", "32", "--num_hidden_layers", "1", "--num_attention_heads", "2"),
            *("--dataset", str(text), "--output_dir", str(folder), "--max_train_samples", "16"),
            *("--block_size", "32", "--max_eval_samples", "8", "--save_strategy", "no"),
        ),
        tmp_path / "log",
        launcher=FULL,
    )
    assert "ranks  2 processes, DDP" in started.expect_success().output
    assert started.output.count("FSDP was asked for") == 1


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "FSDPLlamaForCausalLM"])
def test_a_smoothed_causal_loss_is_refused_where_its_labels_would_not_be_shifted(name):
    def smoothed(kind: str, *, fsdp2: bool, factor: float = 0.1) -> SimpleNamespace:
        return SimpleNamespace(
            model=type(kind, (), {})(),
            args=SimpleNamespace(label_smoothing_factor=factor),
            accelerator=SimpleNamespace(is_fsdp2=fsdp2),
        )

    with pytest.raises(ValueError, match=r"label_smoothing_factor \(0.1\) must be 0 under FSDP2"):
        check_label_smoothing(smoothed(name, fsdp2=not name.startswith("FSDP")))
    check_label_smoothing(smoothed(name, fsdp2=True, factor=0.0))
    check_label_smoothing(smoothed("LlamaForCausalLM", fsdp2=False))
    check_label_smoothing(smoothed("BertForSequenceClassification", fsdp2=True))
