"""A loop without a Trainer: the same numbers, no sample lost, exact resumption, clear errors."""

from __future__ import annotations

import json
import logging
import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import DistributedType, GradientAccumulationPlugin
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import default_data_collator, set_seed

from hf_adaptive_batch import AdaptiveBatch, FixedController, read_records, target_tokens
from hf_adaptive_batch.cli import main

from . import reference
from .cases import (
    GROWING,
    MeanLossModel,
    Recorder,
    adaptive,
    llama,
    pad,
    same_weights,
    sequences,
    weights,
)
from .loops import RATE, loader_of, new_accelerator, setting


NOT_EXACT = ("loss", "small_sq_norm", "big_sq_norm", "noise_trace", "grad_sq_norm")
RATIOS = ("noise_scale", "noise_scale_error", "norm_test")


def trainer_of(folder: Path, model: nn.Module, data: Any, collate: Any, **options: Any) -> Any:
    """An `AdaptiveBatchTrainer` with the same optimizer."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    parts = {
        "model": model,
        "train_dataset": data,
        "data_collator": collate,
        "optimizers": (optimizer, None),
    }
    return adaptive(
        folder, trainer=parts, **{"lr_scheduler_type": "constant", **GROWING, **options}
    )


def indexed(samples: int) -> Any:
    data = sequences(samples)
    return data.add_column("index", list(range(samples)))


# ---------------------------------------------------------------------------- the same numbers


@pytest.mark.parametrize(
    "options",
    [{}, {"batch_schedule": "0:4 16samples:8 40samples:16"}, {"batch_schedule": "constant"}],
    ids=["norm test", "stages", "constant"],
)
@pytest.mark.parametrize("workers", [0, 2])
def test_the_loop_trains_bitwise_as_the_trainer_does(tmp_path, options, workers):
    """With dropout, clipping, growth in the middle of an epoch and short last steps."""
    data = sequences(37)
    trainer = trainer_of(
        tmp_path / "trainer",
        MeanLossModel(),
        data,
        default_data_collator,
        dataloader_num_workers=workers,
        **options,
    )
    trainer.train()
    loader = loader_of(data, default_data_collator, num_workers=workers)
    found = setting(MeanLossModel(), loader, tmp_path / "loop", **options).train()
    assert same_weights(found.weights, weights(trainer))
    if options.get("batch_schedule") != "constant":  # of which a single micro-batch tells nothing
        assert read_records(tmp_path / "loop") == read_records(tmp_path / "trainer")
        assert {size for size, _ in found.sizes} == {4, 8, 16}
        assert any(samples < planned for planned, samples in found.sizes)
    for name in ("noise_scale", "noise_trace", "reason", "samples_seen", "global_batch_size"):
        key = f"adaptive_batch/{name}"
        assert found.adaptive.logs.get(key) == trainer.state.log_history[-2].get(key)


def test_weighed_by_target_tokens_the_loop_is_the_trainer_of_a_language_model(tmp_path):
    """The Trainer divides by the step's tokens, the loop weighs means: equal but for rounding."""
    data = sequences(37, uneven=True)
    trainer = trainer_of(
        tmp_path / "trainer", llama(dropout=0.0), data, pad, lr_scheduler_type="linear"
    )
    trainer.train()
    found = setting(llama(dropout=0.0), loader_of(data), tmp_path / "loop", weigh=target_tokens)
    falling = torch.optim.lr_scheduler.LambdaLR(
        found.optimizer, lambda _: 1 - found.adaptive.progress
    )
    found.train(schedule=falling)
    wanted, records = read_records(tmp_path / "trainer"), read_records(tmp_path / "loop")
    assert len(set(wanted["learning_rate"])) == len(wanted["learning_rate"]) > 4
    for name, column in wanted.items():
        if name in NOT_EXACT or name == "learning_rate":
            assert records[name] == pytest.approx(column, rel=1e-5, abs=1e-7), name
        elif name in RATIOS:
            found_columns = zip(records[name], column, strict=True)
            assert all(a == b or a == pytest.approx(b, rel=1e-4) for a, b in found_columns), name
        else:
            assert records[name] == column, name
    other = weights(trainer)
    for name, value in found.weights.items():
        torch.testing.assert_close(value, other[name], rtol=0, atol=1e-5)
    unweighed = setting(llama(dropout=0.0), loader_of(data), tmp_path / "unweighed").train()
    assert unweighed.losses[0] != pytest.approx(wanted["loss"][0], rel=1e-4)


class Regression(nn.Module):
    """No Transformer, no keyword, no mapping."""

    def __init__(self) -> None:
        super().__init__()
        set_seed(0)
        self.layers = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 1))

    def loss(self, batch: Any) -> torch.Tensor:
        inputs, targets = batch
        return nn.functional.mse_loss(self.layers(inputs), targets)


def test_a_plain_model_is_measured_as_the_formulas_say_and_its_samples_weigh_alike(tmp_path):
    """Of 22 samples in steps of 8 the last one is 6, in micro-batches of 4 and 2."""
    generator = torch.Generator().manual_seed(3)
    data = TensorDataset(
        torch.randn(22, 5, generator=generator), torch.randn(22, 1, generator=generator)
    )
    model, accelerator = Regression(), new_accelerator()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loop = AdaptiveBatch(
        accelerator,
        model,
        optimizer,
        DataLoader(data, batch_size=4),
        accumulation_steps=2,
        num_train_epochs=1,
        batch_schedule="constant",
        output_dir=tmp_path,
    )
    copy, wanted, means = Regression(), [], []
    for step in loop:
        copy.load_state_dict(model.state_dict())
        batches = []
        for batch in step:
            batches.append(batch)
            step.backward(model.loss(batch))
        gradients = reference.micro_batch_gradients(copy, batches, Regression.loss)
        sizes = [float(len(inputs)) for inputs, _ in batches]
        wanted.append(reference.moments(gradients, sizes, step.samples))
        together = tuple(torch.cat(parts) for parts in zip(*batches, strict=True))
        (whole,) = reference.micro_batch_gradients(copy, [together], Regression.loss)
        torch.testing.assert_close(reference.flat_gradient(model), whole, rtol=0, atol=1e-6)
        means.append(float(copy.loss(together).detach()))
        assert step.loss == pytest.approx(means[-1], rel=1e-6)
        optimizer.step()
        optimizer.zero_grad()
    records = read_records(tmp_path)
    assert records["step_samples"] == [8, 8, 6]
    assert records["loss"] == pytest.approx(means, rel=1e-6)
    assert records["small_sq_norm"] == pytest.approx([w["S"] for w in wanted], rel=1e-6)
    assert records["big_sq_norm"] == pytest.approx([w["L"] for w in wanted], rel=1e-6)
    assert records["noise_trace"][0] == pytest.approx(wanted[0]["noise_trace"], rel=1e-5)


# ----------------------------------------------------------------------- every sample, in order


@pytest.mark.parametrize("workers", [0, 2])
def test_every_sample_of_an_epoch_is_trained_on_once(workers):
    seen: list[int] = []
    loader = loader_of(indexed(37), with_index, num_workers=workers)
    found = setting(MeanLossModel(), loader)
    found.model.register_forward_pre_hook(noting(seen), with_kwargs=True)
    found.train()
    assert sorted(seen[:37]) == sorted(seen[37:]) == list(range(37))
    assert seen[:37] != seen[37:]
    assert all(samples <= planned for planned, samples in found.sizes)
    assert found.adaptive.run.clock.samples_seen == 74


def with_index(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    return default_data_collator(rows)


def noting(seen: list[int]) -> Any:
    def hook(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        seen.extend(kwargs.pop("index").tolist())
        return args, kwargs

    return hook


@pytest.mark.parametrize("prepared", [False, True])
def test_the_order_is_that_of_the_users_loader_prepared_or_not(prepared):
    recorder = Recorder()
    accelerator, model = new_accelerator(), llama()
    loader = DataLoader(indexed(37), batch_size=4, shuffle=True, collate_fn=recorder)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    if prepared:
        loader = accelerator.prepare(loader)
    set_seed(3)
    list(loader)
    wanted, recorder.micro_batches = recorder.samples, []
    model, optimizer = accelerator.prepare(model, optimizer)
    loop = AdaptiveBatch(accelerator, model, optimizer, loader, num_train_epochs=1, **GROWING)
    if prepared:
        loader.set_epoch(0)
    set_seed(3)
    for step in loop:
        for batch in step:
            step.backward(model(**batch).loss)
        optimizer.step()
        optimizer.zero_grad()
    assert recorder.samples == wanted != sorted(wanted)


def test_a_stream_is_trained_on_to_its_budget():
    stream = sequences(40).to_iterable_dataset()
    loader = DataLoader(stream, batch_size=4, collate_fn=pad)
    found = setting(llama(), loader, max_train_samples=70).train()
    assert sum(samples for _, samples in found.sizes) == 70
    assert {size for size, _ in found.sizes} == {4, 8, 16}
    assert found.adaptive.run.clock.finished


def test_a_budget_in_tokens_ends_with_the_step_that_reaches_it():
    found = setting(llama(), max_train_tokens=400, batch_schedule="constant").train()
    assert found.adaptive.run.clock.tokens_seen == 424  # of 8 each
    assert [samples for _, samples in found.sizes] == [4] * 9 + [1] + [4] * 4


# ---------------------------------------------------------------------------------- resumption


ORDERS = {
    "seeded": lambda: (loader_of(sequences(37)), False),
    "random": lambda: (DataLoader(sequences(37), 4, shuffle=True, collate_fn=pad), False),
    "prepared": lambda: (DataLoader(sequences(37), 4, shuffle=True, collate_fn=pad), True),
}


@pytest.mark.parametrize(
    ("order", "at"),
    [("seeded", 1), ("seeded", 3), ("seeded", 4), ("random", 4), ("prepared", 4), ("random", 6)],
)
def test_a_loop_resumes_bitwise(tmp_path, order, at):
    """Before and after a growth, near an epoch's end (step 5), in the next epoch; with dropout."""

    def begin(folder: str) -> Any:
        loader, prepared = ORDERS[order]()
        torch.manual_seed(1)  # the order of a prepared loader depends on it
        return setting(llama(), loader, tmp_path / folder, prepared=prepared)

    whole, first = begin("whole").train(), begin("again").train(stop=at)
    first.accelerator.save_state(str(tmp_path / "saved"))
    first.train(stop=at + 1)  # what came after the save is forgotten
    again = begin("again")
    with torch.no_grad():
        for parameter in again.model.parameters():
            parameter.zero_()
    set_seed(5)
    again.accelerator.load_state(str(tmp_path / "saved"))
    again.train()
    assert again.losses == whole.losses[at:]
    assert again.sizes == whole.sizes[at:]
    assert same_weights(again.weights, whole.weights)
    assert read_records(tmp_path / "again") == read_records(tmp_path / "whole")


@pytest.mark.parametrize("kind", ["map-style", "stream"])
def test_a_loop_that_has_ended_is_saved_and_a_larger_budget_goes_on(kind):
    def begin(samples: int) -> Any:
        data = sequences(37) if kind == "map-style" else sequences(37).to_iterable_dataset()
        loader = loader_of(data) if kind == "map-style" else DataLoader(data, 4, collate_fn=pad)
        return setting(llama(dropout=0.0), loader, max_train_samples=samples)

    ended, again, longer = begin(50).train(), begin(50), begin(70)
    assert list(ended.adaptive) == []
    state = ended.adaptive.state_dict()
    again.adaptive.load_state_dict(state)
    assert list(again.adaptive) == []
    longer.adaptive.load_state_dict(state)
    assert sum(samples for _, samples in longer.train().sizes) == 20


def test_the_state_is_plain_and_that_of_the_data(tmp_path):
    first = setting(llama()).train(stop=3)
    state = first.adaptive.state_dict()
    assert json.loads(json.dumps(state)) == state
    other = setting(llama(), loader_of(sequences(38)))
    with pytest.raises(ValueError, match="38 samples"):
        other.adaptive.load_state_dict(state)
    with pytest.raises(ValueError, match=r"version \(7\) of the AdaptiveBatch state must be 1"):
        other.adaptive.load_state_dict({**state, "version": 7})
    with pytest.raises(RuntimeError, match="must be called before the loop"):
        first.adaptive.load_state_dict(state)


def test_loading_leaves_what_the_loop_was_made_with():
    state = setting(llama()).train(stop=5).adaptive.state_dict()
    smaller = setting(llama(), max_global_batch_size=8)
    smaller.adaptive.load_state_dict(state)
    assert state["plan"]["accumulation_steps"] == 2
    assert smaller.adaptive.plan.global_batch_size == 8


# ------------------------------------------------------------------------ leaving and returning


def test_a_loop_that_is_left_goes_on_behind_its_last_step():
    whole = setting(llama(dropout=0.0)).train()
    parts = setting(llama(dropout=0.0))
    while not parts.adaptive.run.clock.finished:
        parts.train(stop=parts.adaptive.run.clock.steps + 1)
    assert parts.sizes == whole.sizes
    assert same_weights(parts.weights, whole.weights)


@pytest.mark.parametrize("leave", ["in forward", "in the loop over micro-batches", "before"])
def test_a_step_that_was_given_up_leaves_nothing_and_comes_again(leave):
    whole = setting(llama(dropout=0.0)).train()
    found = setting(llama(dropout=0.0)).train(stop=3)
    leaves = list(found.model.parameters())
    with pytest.raises(KeyboardInterrupt):
        cut_short(found, leave)
    assert not any(parameter._backward_hooks for parameter in leaves)
    assert all(parameter.grad is None for parameter in leaves)
    assert found.accelerator.sync_gradients
    found.train()
    assert found.sizes == whole.sizes
    assert same_weights(found.weights, whole.weights)


def cut_short(found: Any, leave: str) -> None:
    """The fourth step has two micro-batches."""
    for step in found.adaptive:
        if leave == "before":
            raise KeyboardInterrupt
        for index, batch in enumerate(step):
            hooked = [p for p in found.model.parameters() if p._backward_hooks]
            assert len(hooked) == len(list(found.model.parameters()))
            if index == 1 and leave == "in forward":
                raise KeyboardInterrupt
            step.backward(found.model(**batch).loss)
            if leave == "in the loop over micro-batches":
                break
        raise KeyboardInterrupt


def test_a_step_whose_loss_is_not_finite_changes_nothing(caplog):
    found = setting(MeanLossModel(), loader_of(sequences(37), default_data_collator))
    before, steps = None, []
    with caplog.at_level(logging.WARNING, logger="hf_adaptive_batch"):
        for number, step in enumerate(found.adaptive, start=1):
            if number == 3:
                before = found.weights
            for batch in step:
                loss = found.model(**batch)["loss"]
                step.backward(loss * torch.nan if number == 3 else loss)
            found.optimizer.step()
            found.optimizer.zero_grad()
            steps.append(step.finite)
            if number == 3:
                assert same_weights(found.weights, before)
                assert found.adaptive.logs["adaptive_batch/reason"] == "not_finite"
    assert steps.count(False) == 1
    assert not same_weights(found.weights, before)
    assert found.adaptive.run.skipped_steps == 1
    assert "The loss of step 3 is not finite" in caplog.text


def test_micro_batches_without_targets_have_no_weight():
    def nothing_to_learn(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = pad(rows)
        calls.append(1)
        if len(calls) == 2:
            batch["labels"][:] = -100
        return batch

    calls: list[int] = []
    loader = loader_of(sequences(8), nothing_to_learn)
    found = setting(llama(), loader, accumulation_steps=2, num_train_epochs=1, weigh=target_tokens)
    found.train()
    assert found.adaptive.run.skipped_steps == 0
    assert found.losses == [pytest.approx(found.losses[0])]
    assert all(torch.isfinite(value).all() for value in found.weights.values())


def test_the_optimizer_may_step_within_the_loop_as_scripts_of_accelerate_do():
    """Its wrapper waits for the last micro-batch, which is measured by then."""
    found, other = setting(llama(dropout=0.0)), setting(llama(dropout=0.0)).train()
    for step in found.adaptive:
        for batch in step:
            step.backward(found.model(**batch).loss)
            if found.accelerator.sync_gradients:
                found.accelerator.clip_grad_norm_(found.model.parameters(), 1.0)
            found.optimizer.step()
            found.optimizer.zero_grad()
        found.losses.append(step.loss)
    assert found.losses == other.losses
    assert same_weights(found.weights, other.weights)


# ------------------------------------------------------------------------- records and the page


def test_the_report_reads_the_folder_of_a_loop(tmp_path, capsys):
    found = setting(llama(), folder=tmp_path / "run").train()
    found.adaptive.record_evaluation(eval_loss=3.25)
    assert main(["report", str(tmp_path / "run")]) in (None, 0)
    (page,) = (tmp_path / "run").glob("*.html")
    assert "norm" in page.read_text(encoding="utf-8")
    assert found.adaptive.logs["loss"] == found.losses[-1]
    assert found.adaptive.logs["epoch"] == 2.0


def test_the_example_trains_on_the_text_of_this_machine(tmp_path, capsys):
    example = runpy.run_path(str(Path(__file__).parents[1] / "examples" / "accelerate_loop.py"))
    example["main"](str(tmp_path), max_train_samples=300)
    records = read_records(tmp_path)
    assert records["samples_seen"][-1] == 300
    assert records["loss"][-1] < records["loss"][0] - 0.5
    assert records["next_global_batch_size"][-1] > 4
    assert "samples  loss" in capsys.readouterr().out


# -------------------------------------------------------------------------------------- misuse


def without_backward(found: Any) -> None:
    for step in found.adaptive:
        for batch in step:
            found.accelerator.backward(found.model(**batch).loss)


def with_two_backwards(found: Any) -> None:
    for step in found.adaptive:
        for batch in step:
            step.backward(found.model(**batch).loss)
            step.backward(found.model(**batch).loss)


def with_an_early_break(found: Any) -> None:
    for step in found.adaptive:
        for batch in step:
            step.backward(found.model(**batch).loss)
            break
        found.optimizer.step()


def stepping_within(found: Any) -> None:
    inner = found.optimizer.optimizer  # accelerate's wrapper would wait for the last one
    for step in found.adaptive:
        for batch in step:
            step.backward(found.model(**batch).loss)
            inner.step()


def without_optimizer(found: Any) -> None:
    for step in found.adaptive:
        for batch in step:
            step.backward(found.model(**batch).loss)


def without_optimizer_in_two_loops(found: Any) -> None:
    for step in found.adaptive:
        for batch in step:
            step.backward(found.model(**batch).loss)
        break
    next(iter(found.adaptive))


def saving_too_early(found: Any) -> None:
    for step in found.adaptive:
        for batch in step:
            step.backward(found.model(**batch).loss)
        found.adaptive.state_dict()


def twice(found: Any) -> None:
    for step in found.adaptive:
        for _ in range(2):
            for batch in step:
                step.backward(found.model(**batch).loss)


def within_itself(found: Any) -> None:
    for _ in found.adaptive:
        next(iter(found.adaptive))


def stepping_in_backward(found: Any) -> None:
    def take(parameter: torch.Tensor) -> None:
        parameter.grad = None

    for parameter in found.model.parameters():
        parameter.register_post_accumulate_grad_hook(take)
    found.train()


MISUSES = {
    stepping_in_backward: "must be left in `.grad` by backward",
    without_backward: "micro-batch 1 had none; call it instead of accelerator.backward",
    with_two_backwards: "must be called once in every micro-batch",
    with_an_early_break: "must run to its end in every step",
    stepping_within: r"optimizer.step\(\) must come after the step's last micro-batch",
    without_optimizer: r"optimizer.step\(\) must be called after each step's micro-batches",
    without_optimizer_in_two_loops: r"optimizer.step\(\) must be called after each step",
    saving_too_early: r"must be called after optimizer.step\(\)",
    twice: "must be iterated over once",
    within_itself: "One loop must be left before another begins",
}


@pytest.mark.parametrize("misuse", MISUSES, ids=lambda misuse: misuse.__name__)
def test_a_loop_that_is_written_wrong_is_an_error(misuse):
    found = setting(llama())
    with pytest.raises(RuntimeError, match=MISUSES[misuse]):
        misuse(found)
    assert not any(parameter._backward_hooks for parameter in found.model.parameters())


def made(accelerator: Any = None, **options: Any) -> AdaptiveBatch:
    model = llama()
    optimizer = torch.optim.AdamW(model.parameters())
    accelerator = accelerator or new_accelerator()
    given = {"num_train_epochs": 1, **options}
    loader = given.pop("loader") if "loader" in given else loader_of(sequences(16))
    return AdaptiveBatch(accelerator, model, optimizer, loader, **given)


def of_kind(kind: DistributedType, **parts: Any) -> Any:
    accelerator = new_accelerator()
    accelerator.state.__dict__.update(distributed_type=kind, **parts)
    return accelerator


REFUSED = {
    "accumulation": (
        lambda: made(new_accelerator(gradient_accumulation_steps=2)),
        r"gradient_accumulation_steps \(2\) of the Accelerator must be 1",
    ),
    "deepspeed": (
        lambda: made(of_kind(DistributedType.DEEPSPEED)),
        r"distributed_type \(DEEPSPEED\) must be that of DDP or FSDP",
    ),
    "megatron": (
        lambda: made(of_kind(DistributedType.MEGATRON_LM)),
        r"distributed_type \(MEGATRON_LM\) must be that of DDP or FSDP",
    ),
    "FSDP1": (
        lambda: made(of_kind(DistributedType.FSDP, fsdp_plugin=SimpleNamespace(fsdp_version=1))),
        r"fsdp_version \(1\) must be 2",
    ),
    "tensor-parallel": (
        lambda: made(of_kind(DistributedType.NO, parallelism_config=SimpleNamespace(tp_size=2))),
        r"tp_size \(2\) must be 1",
    ),
    "no budget": (lambda: made(num_train_epochs=None), r"The budget \(none\) must be one of"),
    "two budgets": (lambda: made(max_train_samples=4), "give exactly one"),
    "no samples": (lambda: made(num_train_epochs=0), r"num_train_epochs \(0\)"),
    "epochs of a stream": (
        lambda: made(loader=DataLoader(sequences(8).to_iterable_dataset(), 4, collate_fn=pad)),
        r"num_train_epochs \(1\) must not be the budget of a stream",
    ),
    "seesaw": (lambda: made(batch_schedule="seesaw"), "learning rate of this loop is yours"),
    "co-scaling": (lambda: made(scale_beta2=True), "optimizer of this loop is yours"),
    "eta": (lambda: made(eta=2.0), r"eta \(2.0\) must be in \(0, 1\)"),
    "a cap below": (lambda: made(max_global_batch_size=2), r"max_global_batch_size \(2\)"),
    "one sample": (
        lambda: made(loader=loader_of(sequences(8), size=1)),
        "at least 2 samples a step",
    ),
    "batches of one's own": (
        lambda: made(loader=DataLoader(sequences(8), batch_sampler=[[0, 1], [2, 3]])),
        "must be torch's BatchSampler",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_done_is_refused_at_the_start(name):
    build, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        build()


def test_an_option_that_does_not_exist_is_an_error():
    with pytest.raises(TypeError, match="max_batch"):
        made(max_batch=3)


def test_a_controller_of_ones_own_decides():
    assert isinstance(made(controller=FixedController()).run.controller, FixedController)


def test_sync_each_batch_is_the_users_word():
    plugin = GradientAccumulationPlugin(num_steps=1, sync_each_batch=True)
    found = setting(
        llama(dropout=0.0), accelerator=new_accelerator(gradient_accumulation_plugin=plugin)
    )
    other = setting(llama(dropout=0.0))
    assert same_weights(found.train().weights, other.train().weights)
