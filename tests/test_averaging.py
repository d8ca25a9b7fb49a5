"""The average of the weights: equal to a naive one, swapped in and out, resumed bitwise."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from hf_adaptive_batch import AdaptiveBatchTrainer, WeightAveragingCallback
from hf_adaptive_batch.averaging import WeightAverage
from hf_adaptive_batch.averaging_files import AVERAGE_FOLDER, is_saved
from hf_adaptive_batch.checkpoint import find_complete_checkpoint
from hf_adaptive_batch.pretrain import pretrain

from . import reference
from .cases import (
    GROWING,
    MeanLossModel,
    adaptive,
    arguments,
    history,
    llama,
    plain,
    same_weights,
    sequences,
    weights,
)
from .layouts import lora
from .test_cli import TINY


DECAYS = [0.9, 0.5, 0.99, 0.3, 0.95, 0.999, 0.8]
LENGTH = 8  # tokens of a sample, none of them padding


def step(model: nn.Module, seed: int, *, size: float = 0.1) -> None:
    """What an optimizer does, for the trainable parameters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                change = torch.randn(parameter.shape, generator=generator)
                parameter.add_(change.to(parameter.dtype), alpha=size)


def trained(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def followed(
    model: nn.Module, average: WeightAverage, decays: list[float]
) -> list[dict[str, torch.Tensor]]:
    """Steps whose weights are averaged; the weights after each."""
    seen = []
    for seed, decay in enumerate(decays):
        average.enter_trainable()
        step(model, seed)
        average.update(decay)
        seen.append(trained(model))
    return seen


def naive(seen: list[dict[str, torch.Tensor]], decays: list[float], start: Any = None) -> Any:
    return {
        name: reference.weight_average(
            [each[name] for each in seen], decays, None if start is None else start[name]
        )
        for name in seen[0]
    }


def furthest(found: Any, wanted: Any) -> float:
    """The largest relative error of any tensor, in the maximum norm."""
    return max(
        float((found[name].double() - wanted[name]).abs().max() / wanted[name].abs().max())
        for name in found
    )


# ------------------------------------------------------------------------------- the mechanism


@pytest.mark.parametrize("decays", [[0.9] * 7, DECAYS, [0.0, 0.9, 1.0, 0.5]], ids=str)
@pytest.mark.parametrize("initialisation", ["zero", "weights"])
def test_it_equals_the_naive_average_in_float64(initialisation, decays):
    model = llama()
    start = trained(model) if initialisation == "weights" else None
    average = WeightAverage(model, initialisation)
    seen = followed(model, average, decays)
    assert average.values.keys() == seen[0].keys()
    assert all(value.dtype is torch.float32 for value in average.values.values())
    assert furthest(average.values, naive(seen, decays, start)) < 1e-6
    assert average.updates == len(decays)


def test_without_the_correction_it_would_be_another():
    model = llama()
    average = WeightAverage(model)
    seen = followed(model, average, DECAYS)
    zeros = {name: torch.zeros_like(value) for name, value in seen[0].items()}
    uncorrected = naive(seen, DECAYS, zeros)
    assert furthest(average.values, uncorrected) > 1e-3
    assert average.retained == pytest.approx(math.prod(DECAYS))


def test_parameters_in_float64_are_averaged_in_it():
    model = llama().double()
    average = WeightAverage(model)
    seen = followed(model, average, DECAYS)
    assert furthest(average.values, naive(seen, DECAYS)) < 1e-14


def test_parameters_in_bfloat16_are_averaged_in_float32():
    model = llama().bfloat16()
    average = WeightAverage(model)
    seen = followed(model, average, [0.99] * 50)
    wanted = naive(seen, [0.99] * 50)
    assert furthest(average.values, wanted) < 1e-6
    with average.averaged():
        assert all(p.dtype is torch.bfloat16 for p in model.parameters())
        assert 1e-4 < furthest(trained(model), wanted) < 5e-3  # rounded, for the evaluation alone


@pytest.mark.parametrize("decay", [0.999, 0.9999])
def test_float32_is_enough_for_long_averages(decay):
    model = MeanLossModel()
    average = WeightAverage(model)
    decays = [decay] * 1000
    seen = followed(model, average, decays)
    # 6e-7 and 1e-6 here. Averaging as decay * average + (1 - decay) * weight, 3e-8 off in each
    # step because the two do not add up to one in float32, would be 3e-8 / (1 - decay) off.
    assert furthest(average.values, naive(seen, decays)) < 3e-6


def test_the_first_weights_are_taken_exactly():
    model = llama()
    average = WeightAverage(model)
    seen = followed(model, average, [0.9995])
    assert same_weights(dict(average.values), seen[0])


def test_before_the_first_step_an_average_from_zero_leaves_the_weights_as_they_are():
    model = llama()
    average = WeightAverage(model)
    before = trained(model)
    assert not average.is_defined
    with average.averaged():
        assert same_weights(trained(model), before)
    average.update(1.0)  # a step without tokens
    assert not average.is_defined
    assert WeightAverage(model, "weights").is_defined


@pytest.mark.parametrize("kind", [None, ValueError, KeyboardInterrupt], ids=str)
def test_the_weights_come_back_bitwise_whatever_happens(kind):
    model = llama(tied=True)
    average = WeightAverage(model)
    seen = followed(model, average, DECAYS)
    tensors = [id(p) for p in model.parameters()]
    kept = dict(average.values)

    def inside():
        with average.averaged():
            assert same_weights(trained(model), kept)
            assert model.lm_head.weight is model.model.embed_tokens.weight
            if kind is not None:
                raise kind

    if kind is None:
        inside()
    else:
        with pytest.raises(kind):
            inside()
    assert same_weights(trained(model), seen[-1])
    assert [id(p) for p in model.parameters()] == tensors
    followed(model, average, [0.5])  # and training goes on


@pytest.mark.parametrize("times", [1, 2])
def test_an_interruption_while_the_weights_are_exchanged_leaves_them_as_they_were(
    monkeypatch, times
):
    """Of the way in, and of the way back."""
    model = llama()
    average = WeightAverage(model)
    seen = followed(model, average, DECAYS)
    fill, calls = average._fill, []

    def partly(values):
        for name, parameter in list(average._parameters.items())[:3]:
            parameter.data.copy_(values[name])
        raise KeyboardInterrupt

    def interrupted(values):
        calls.append(1)
        (partly if len(calls) == times else fill)(values)

    monkeypatch.setattr(average, "_fill", interrupted)
    with pytest.raises(KeyboardInterrupt), average.averaged():
        pass
    assert same_weights(trained(model), seen[-1])
    assert len(calls) == times + 1


def test_nested_in_itself_it_does_nothing_more():
    model = llama()
    average = WeightAverage(model)
    seen = followed(model, average, DECAYS)
    with average.averaged():
        with average.averaged():
            pass
        assert same_weights(trained(model), dict(average.values))
    assert same_weights(trained(model), seen[-1])


def test_the_average_is_never_averaged():
    model = llama()
    average = WeightAverage(model)
    followed(model, average, DECAYS)
    with average.averaged(), pytest.raises(RuntimeError, match="leave averaged_weights"):
        average.update(0.9)


@pytest.mark.parametrize("initialisation", ["zero", "weights"])
def test_a_layer_that_is_unfrozen_or_frozen_under_way_has_the_average_of_what_it_was(
    initialisation,
):
    model = MeanLossModel()
    model.head.requires_grad_(False)
    start = trained(model) if initialisation == "weights" else None
    average = WeightAverage(model, initialisation)
    seen = followed(model, average, DECAYS[:3])
    assert set(average.values) == {"embedding.weight"}
    model.head.requires_grad_(True)
    model.embedding.requires_grad_(False)
    seen += followed(model, average, DECAYS[3:])
    assert set(average.values) == set(seen[0])
    assert furthest(average.values, naive(seen, DECAYS, start)) < 1e-6


def test_of_adapters_only_they_are_averaged():
    model = lora()
    average = WeightAverage(model)
    before = trained(model)
    followed(model, average, DECAYS)
    assert average.values
    assert all("lora_" in name for name in average.values)
    with average.averaged():
        inside = trained(model)
    changed = {name for name in before if not torch.equal(inside[name], before[name])}
    assert changed == set(average.values)


def test_names_are_those_of_the_model_without_its_wrappers():
    model = llama()
    wrapped = torch.compile(model)
    assert next(iter(trained(wrapped))).startswith("_orig_mod.")
    assert WeightAverage(wrapped).values.keys() == WeightAverage(model).values.keys()


# ----------------------------------------------------------------------------------- its files


def test_it_is_saved_and_loaded_bitwise_also_over_an_older_one(tmp_path):
    model = llama(tied=True)
    average = WeightAverage(model)
    followed(model, average, DECAYS[:2])
    average.save(tmp_path / "average")
    followed(model, average, DECAYS[2:])
    average.save(tmp_path / "average")
    again = WeightAverage(llama(tied=True), "weights")
    again.load(tmp_path / "average")
    assert same_weights(dict(again.values), dict(average.values))
    assert (again.updates, again.retained) == (average.updates, average.retained)


def test_what_was_trainable_is_loaded_though_it_is_frozen_now(tmp_path):
    model = MeanLossModel()
    average = WeightAverage(model)
    followed(model, average, DECAYS)
    average.save(tmp_path / "average")
    frozen = MeanLossModel().requires_grad_(False)
    again = WeightAverage(frozen)
    again.load(tmp_path / "average")
    assert same_weights(dict(again.values), dict(average.values))


@pytest.mark.parametrize("lost", ["average.json", ".metadata", "all"])
def test_an_average_in_pieces_is_refused(tmp_path, lost):
    WeightAverage(llama(), "weights").save(tmp_path / "average")
    assert is_saved(tmp_path / "average")
    if lost == "all":
        shutil.rmtree(tmp_path / "average")
    else:
        (tmp_path / "average" / lost).unlink()
    assert not is_saved(tmp_path / "average")
    with pytest.raises(ValueError, match="must hold an average of the weights, because"):
        WeightAverage(llama()).load(tmp_path / "average")


def test_another_models_average_is_refused(tmp_path):
    WeightAverage(llama(layers=2)).save(tmp_path / "average")
    with pytest.raises(ValueError, match="must be a parameter of the model, of the same shape"):
        WeightAverage(llama()).load(tmp_path / "average")


def test_another_versions_average_is_refused(tmp_path):
    WeightAverage(llama()).save(tmp_path)
    state = json.loads((tmp_path / "average.json").read_text())
    (tmp_path / "average.json").write_text(json.dumps({**state, "version": 0}))
    with pytest.raises(ValueError, match=r"version \(0\) of .* must be 1, because"):
        WeightAverage(llama()).load(tmp_path)


# ------------------------------------------------------------------------------ in the Trainer


class Watching(TrainerCallback):
    """Keeps the weights after every step, and the tokens seen by then."""

    def __init__(self) -> None:
        self.weights: list[dict[str, torch.Tensor]] = []
        self.tokens: list[int] = []
        self.trainer: Any = None

    def on_step_end(self, args, state, control, model=None, **kwargs):
        counted = state.num_input_tokens_seen
        self.weights.append(trained(model))
        self.tokens.append(self.trainer.run.clock.tokens_seen if self.trainer else counted)

    def decays(self, half_life: float) -> list[float]:
        before = [0, *self.tokens[:-1]]
        return [0.5 ** ((n - b) / half_life) for n, b in zip(self.tokens, before, strict=True)]


EVALUATED = {"eval_strategy": "steps", "eval_steps": 1}


def data() -> dict[str, Any]:
    return {"train_dataset": sequences(61), "eval_dataset": sequences(8), "model": llama()}


def watched(folder, **options: Any) -> tuple[Any, Watching]:
    watching = Watching()
    given = {"trainer": {**data(), "callbacks": [watching]}, **EVALUATED, **GROWING, **options}
    watching.trainer = adaptive(folder, **given)
    watching.trainer.train()
    return watching.trainer, watching


def evaluations(trainer: Any) -> list[float]:
    return [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]


def loss_of(average: dict[str, torch.Tensor], folder) -> float:
    """Of a model that holds these weights."""
    model = llama()
    model.load_state_dict({name: value.float() for name, value in average.items()}, strict=False)
    return plain(folder, trainer={**data(), "model": model}).evaluate()["eval_loss"]


@pytest.fixture(scope="module")
def by_half_life(tmp_path_factory):
    return watched(tmp_path_factory.mktemp("half-life"), averaging_half_life_tokens=300.0)


def test_evaluations_see_the_average_whose_half_life_survives_a_growing_batch(
    by_half_life, tmp_path
):
    trainer, watching = by_half_life
    decays = watching.decays(300.0)
    assert len(set(decays)) == 4  # three sizes, and the short step at an epoch's end
    found = evaluations(trainer)
    assert len(found) == len(watching.weights)
    for count in (1, 2, 5, len(found)):
        wanted = naive(watching.weights[:count], decays[:count])
        assert found[count - 1] == pytest.approx(loss_of(wanted, tmp_path), abs=2e-6)
    assert furthest(trainer.weight_averaging.average.values, wanted) < 1e-6
    # What would fail here: the weights of training, or a decay that does not follow the batch.
    assert abs(found[-1] - loss_of(watching.weights[-1], tmp_path)) > 1e-3
    constant = naive(watching.weights, [decays[0]] * len(decays))
    assert furthest(trainer.weight_averaging.average.values, constant) > 1e-3


def test_a_decay_is_that_of_every_step(tmp_path, by_half_life):
    trainer, watching = watched(tmp_path, averaging_decay=0.8)
    wanted = naive(watching.weights, [0.8] * len(watching.weights))
    assert furthest(trainer.weight_averaging.average.values, wanted) < 1e-6
    assert all(map(same_weights, watching.weights, by_half_life[1].weights))


def test_training_goes_on_as_without_an_average(tmp_path, by_half_life):
    bare, watching = watched(tmp_path)
    assert bare.weight_averaging is None
    assert all(map(same_weights, watching.weights, by_half_life[1].weights))

    def losses(trainer):
        return [
            {key: value for key, value in entry.items() if key != "eval_loss"}
            for entry in history(trainer)
        ]

    assert losses(bare) == losses(by_half_life[0])
    assert evaluations(bare)[3:] != evaluations(by_half_life[0])[3:]


def test_predictions_and_evaluations_after_training_see_the_average_too(by_half_life):
    trainer, watching = by_half_life
    loss = evaluations(trainer)[-1]
    assert trainer.evaluate()["eval_loss"] == loss
    assert trainer.predict(sequences(8)).metrics["test_loss"] == loss
    assert same_weights(trained(trainer.model), watching.weights[-1])


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt])
def test_an_evaluation_that_fails_leaves_the_weights_of_training(by_half_life, kind):
    trainer, watching = by_half_life
    seen = []

    def metrics(prediction):
        seen.append(trained(trainer.model))
        raise kind

    trainer.compute_metrics = metrics
    with pytest.raises(kind):
        trainer.evaluate()
    trainer.compute_metrics = None
    assert same_weights(seen[0], dict(trainer.weight_averaging.average.values))
    assert same_weights(trained(trainer.model), watching.weights[-1])


def test_the_average_is_saved_as_a_model(by_half_life, tmp_path):
    trainer, watching = by_half_life
    with trainer.weight_averaging.averaged_weights():
        trainer.save_model(str(tmp_path))
        assert trainer.evaluate()["eval_loss"] == evaluations(trainer)[-1]
    again = type(trainer.model).from_pretrained(tmp_path)
    assert same_weights(trained(again), dict(trainer.weight_averaging.average.values))
    assert same_weights(trained(trainer.model), watching.weights[-1])


def test_every_training_begins_another_average(tmp_path):
    trainer, watching = watched(tmp_path, averaging_decay=0.8, max_steps=2)
    trainer.train()
    wanted = naive(watching.weights[2:], [0.8] * 2)
    assert furthest(trainer.weight_averaging.average.values, wanted) < 1e-6


def test_the_average_of_another_trainers_model_is_no_evaluation(tmp_path):
    averaging = WeightAveragingCallback(decay=0.8)
    first, second = (
        adaptive(tmp_path, trainer={**data(), "callbacks": [averaging]}, max_steps=2)
        for _ in range(2)
    )
    first.train()
    first.evaluate()
    second.train()
    second.evaluate()
    # What it would be instead, in silence: the loss of the weights of training.
    with pytest.raises(ValueError, match="give every Trainer a callback of its own"):
        first.evaluate()


def test_training_inside_the_average_is_refused_as_it_would_be_lost(tmp_path):
    trainer, watching = watched(tmp_path, averaging_decay=0.8, max_steps=2)
    with (
        pytest.raises(RuntimeError, match=r"must begin outside averaged_weights\(\)"),
        trainer.weight_averaging.averaged_weights(),
    ):
        trainer.train()
    assert same_weights(trained(trainer.model), watching.weights[-1])


def test_whoever_acts_at_the_end_of_a_step_finds_it_in_the_average(tmp_path):
    """Such as transformers' callback that saves when the process is told to end."""

    class Looking(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            updates.append((averaging.average.updates, state.global_step))

    updates: list[tuple[int, int]] = []
    averaging = WeightAveragingCallback(decay=0.9)
    extra = {**data(), "callbacks": [Looking(), averaging]}
    adaptive(tmp_path, trainer=extra, max_steps=3).train()
    assert updates == [(1, 1), (2, 2), (3, 3)]


def test_a_layer_that_a_later_callback_unfreezes_is_averaged_from_its_first_step(tmp_path):
    class Unfreezing(Watching):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            model.head.requires_grad_(state.global_step >= 2)

    model = MeanLossModel()
    model.head.requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    averaging, watching = WeightAveragingCallback(decay=0.8), Unfreezing()
    extra = {"model": model, "train_dataset": sequences(61), "optimizers": (optimizer, None)}
    extra["callbacks"] = [averaging, watching]
    options = {"batch_schedule": "constant", "max_steps": 5}
    watching.trainer = adaptive(tmp_path, trainer=extra, **options)
    watching.trainer.train()
    heads = [each["head.weight"] for each in watching.weights]
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[1], heads[2])
    assert furthest(averaging.average.values, naive(watching.weights, [0.8] * 5)) < 1e-6


# ------------------------------------------------------------------------------------- resuming


OPTIONS = {**GROWING, **EVALUATED, "save_strategy": "steps", "save_steps": 1}
KINDS: dict[str, dict[str, Any]] = {
    "half-life": {"averaging_half_life_tokens": 300.0},
    "decay": {"averaging_decay": 0.8},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_is_the_one_that_was_not_interrupted(tmp_path, kind):
    options = {**OPTIONS, **KINDS[kind], "num_train_epochs": 1}
    whole = adaptive(tmp_path / "whole", trainer=data(), **options)
    whole.train()
    sizes = [e.get("adaptive_batch/global_batch_size") for e in whole.state.log_history]
    assert {4, 8, 16} <= set(sizes)
    steps = whole.state.global_step
    for at in (1, 2, 4, steps - 1):
        again = adaptive(tmp_path / f"from-{at}", trainer=data(), **options)
        again.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{at}"))
        found, wanted = (t.weight_averaging.average for t in (again, whole))
        assert evaluations(again) == evaluations(whole)
        assert same_weights(dict(found.values), dict(wanted.values))
        assert (found.updates, found.retained) == (wanted.updates, wanted.retained)
        assert same_weights(weights(again), weights(whole))


def test_a_checkpoint_that_lost_its_average_is_in_pieces(tmp_path):
    adaptive(tmp_path, trainer=data(), **OPTIONS, **KINDS["decay"], max_steps=2).train()
    last = tmp_path / "checkpoint-2"
    assert find_complete_checkpoint(tmp_path) == str(last)
    (last / AVERAGE_FOLDER / "average.json").unlink()
    assert find_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-1")
    again = adaptive(tmp_path, trainer=data(), **OPTIONS, **KINDS["decay"])
    with pytest.raises(ValueError, match="must be complete, because"):
        again.train(resume_from_checkpoint=str(last))


@pytest.mark.parametrize("killed_at", ["saving.save_run", "averaging_files.dcp.save"])
def test_a_save_that_is_killed_around_the_average_is_never_taken_for_whole(
    tmp_path, monkeypatch, killed_at
):
    options = {**OPTIONS, **KINDS["decay"], "max_steps": 2}
    adaptive(tmp_path, trainer=data(), **options).train()
    last = tmp_path / "checkpoint-2"
    assert find_complete_checkpoint(tmp_path) == str(last)

    def kill(*args, **kwargs):
        raise KeyboardInterrupt

    again = adaptive(tmp_path, trainer=data(), **options)
    with monkeypatch.context() as patch:  # while it saves the same checkpoint once more
        patch.setattr(f"hf_adaptive_batch.{killed_at}", kill)
        with pytest.raises(KeyboardInterrupt):
            again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert find_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-1")
    assert is_saved(last / AVERAGE_FOLDER) == (killed_at == "saving.save_run")
    again.train(resume_from_checkpoint=True)
    assert find_complete_checkpoint(tmp_path) == str(last)


def test_a_checkpoint_without_an_average_is_refused_where_one_is_wanted(tmp_path):
    adaptive(tmp_path, trainer=data(), **OPTIONS, max_steps=1).train()
    again = adaptive(tmp_path, trainer=data(), **OPTIONS, **KINDS["decay"])
    with pytest.raises(ValueError, match="must hold an average of the weights, because"):
        again.train(resume_from_checkpoint=True)


def test_a_checkpoint_with_an_average_resumes_without_one(tmp_path):
    adaptive(tmp_path, trainer=data(), **OPTIONS, **KINDS["decay"], max_steps=1).train()
    again = adaptive(tmp_path, trainer=data(), **OPTIONS, max_steps=2)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 2


# ------------------------------------------------------------------------ other kinds of Trainer


def of_kind(kind: type, folder, averaging: WeightAveragingCallback, **options: Any) -> Any:
    """With plain `TrainingArguments`."""
    args = arguments(folder, TrainingArguments, save_strategy="steps", save_steps=2, **options)
    return kind(args=args, callbacks=[averaging], **data())


@pytest.mark.parametrize("by", [{"decay": 0.8}, {"half_life_tokens": 100.0}], ids=str)
@pytest.mark.parametrize("adapts", [False, True], ids=["Trainer", "AdaptiveBatchTrainer"])
def test_with_plain_arguments_a_run_is_averaged_saved_and_resumed(tmp_path, adapts, by):
    kind = AdaptiveBatchTrainer if adapts else Trainer
    options = {"max_steps": 6, "include_num_input_tokens_seen": "all"}
    options |= EVALUATED if adapts else {}
    whole = of_kind(kind, tmp_path / "whole", first := WeightAveragingCallback(**by), **options)
    watching = Watching()
    whole.add_callback(watching)
    whole.train()
    decays = [by["decay"]] * 6 if "decay" in by else watching.decays(100.0)
    assert watching.tokens == [4 * LENGTH * n for n in range(1, 7)]
    assert furthest(first.average.values, naive(watching.weights, decays)) < 1e-6
    with first.averaged_weights():
        assert same_weights(trained(whole.model), dict(first.average.values))

    shutil.rmtree(tmp_path / "whole" / "checkpoint-6")
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    again = of_kind(kind, tmp_path / "again", second := WeightAveragingCallback(**by), **options)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 6
    assert same_weights(dict(second.average.values), dict(first.average.values))
    assert evaluations(again) == evaluations(whole)
    assert len(evaluations(whole)) == (6 if adapts else 0)

    shutil.rmtree(tmp_path / "again" / "checkpoint-4" / AVERAGE_FOLDER)
    shutil.rmtree(tmp_path / "again" / "checkpoint-6")
    third = of_kind(kind, tmp_path / "again", WeightAveragingCallback(**by), **options)
    with pytest.raises(ValueError, match="must hold an average of the weights, because"):
        third.train(resume_from_checkpoint=True)


def test_a_checkpoint_elsewhere_is_named_to_the_callback(tmp_path):
    of_kind(Trainer, tmp_path / "a", WeightAveragingCallback(decay=0.8), max_steps=2).train()
    averaging = WeightAveragingCallback(decay=0.8)
    trainer = of_kind(Trainer, tmp_path / "b", averaging, max_steps=3)
    averaging.resume_from(tmp_path / "a" / "checkpoint-2")
    trainer.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert averaging.average.updates == 3


class WithOtherWeights(torch.optim.SGD):
    """As those that are free of schedules."""

    def eval(self) -> None:
        pass


def test_what_would_average_wrongly_is_refused(tmp_path):
    averaging = WeightAveragingCallback(half_life_tokens=100.0)
    for options, message in (
        (EVALUATED, r"eval_strategy \('steps'\) must be 'no' under a plain Trainer, because"),
        ({}, r"include_num_input_tokens_seen \(no\) must be 'all' or 'non_padding'"),
    ):
        with pytest.raises(ValueError, match=message):
            of_kind(Trainer, tmp_path, averaging, **options).train()
    best = {**EVALUATED, "save_strategy": "steps", "save_steps": 2, "load_best_model_at_end": True}
    with pytest.raises(ValueError, match=r"load_best_model_at_end \(True\) must be False"):
        arguments(tmp_path, **best, averaging_decay=0.9)
    given = {**data(), "callbacks": [averaging]}
    with pytest.raises(ValueError, match=r"load_best_model_at_end \(True\) must be False"):
        adaptive(tmp_path, trainer=given, **best).train()
    own = {**given, "optimizers": (WithOtherWeights(given["model"].parameters()), None)}
    with pytest.raises(
        ValueError, match=r"optim \(WithOtherWeights\) must not bring other weights"
    ):
        adaptive(tmp_path, trainer=own).train()
    with pytest.raises(ValueError, match=r"callbacks \(2 WeightAveragingCallbacks\) must hold one"):
        adaptive(tmp_path, trainer=given, averaging_decay=0.9)


@pytest.mark.parametrize(("name", "value"), [("_n_gpu", 2), ("deepspeed", "ds.json")])
def test_what_copies_or_moves_the_parameters_is_refused(tmp_path, name, value):
    args = arguments(tmp_path, TrainingArguments)
    setattr(args, name, value)
    given = args, TrainerState(), TrainerControl()
    with pytest.raises(ValueError, match=r"n_gpu \([02]\) must be 1, without DeepSpeed, because"):
        WeightAveragingCallback(decay=0.9).on_train_begin(*given, model=llama())


def test_a_half_life_needs_tokens(tmp_path):
    class Pixels(torch.utils.data.Dataset):
        def __len__(self):
            return 8

        def __getitem__(self, index):
            return {"pixels": torch.ones(3), "labels": torch.zeros(1)}

    class Line(nn.Module):
        main_input_name = "pixels"

        def __init__(self):
            super().__init__()
            self.line = nn.Linear(3, 1)

        def forward(self, pixels, labels):
            return {"loss": (self.line(pixels) - labels).square().mean()}

    extra = {"model": Line(), "train_dataset": Pixels()}
    with pytest.raises(
        ValueError, match=r"half_life_tokens \(100.0\) must go with tokens, because"
    ):
        adaptive(tmp_path, trainer=extra, averaging_half_life_tokens=100.0).train()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"decay \(None\) or half_life_tokens \(None\) must be given, because"),
        ({"decay": 0.9, "half_life_tokens": 5.0}, "only one must be given, because"),
        ({"decay": 1.0}, r"decay \(1.0\) must be in \[0, 1\), because"),
        (
            {"half_life_tokens": 0.0},
            r"half_life_tokens \(0.0\) must be above 0 and finite, because",
        ),
        ({"decay": 0.9, "initialisation": "one"}, r"initialisation \('one'\) must be 'zero' or"),
    ],
)
def test_what_is_no_average_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        WeightAveragingCallback(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"averaging_decay": -0.1}, r"averaging_decay \(-0.1\) must be in \[0, 1\), because"),
        ({"averaging_decay": 0.9, "averaging_half_life_tokens": 5.0}, "only one must be given"),
        (
            {"averaging_half_life_tokens": math.inf},
            r"averaging_half_life_tokens \(inf\) must be above 0 and finite, because",
        ),
    ],
)
def test_arguments_that_are_no_average_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        arguments(tmp_path, **options)


def test_there_is_no_average_before_training():
    with pytest.raises(RuntimeError, match="There is no average before training has begun"):
        WeightAveragingCallback(decay=0.9).average  # noqa: B018
    with WeightAveragingCallback(decay=0.9).averaged_weights():
        pass


def test_the_command_leaves_both_models(tmp_path, capsys):
    (tmp_path / "text.txt").write_text(Path(__file__).read_text("utf-8") * 3, "utf-8")
    words = ["--dataset", str(tmp_path / "text.txt"), "--output_dir", str(tmp_path / "run")]
    words += ["--averaging_half_life_tokens", "2000", "--save_strategy", "no"]
    summary = pretrain([*TINY, *words])
    shown = " ".join(capsys.readouterr().out.split())
    assert f"average {tmp_path / 'run' / 'averaged'}, the weights that were validated" in shown
    folders = (tmp_path / "run", tmp_path / "run" / "averaged")
    own, averaged = map(LlamaForCausalLM.from_pretrained, folders)
    assert not same_weights(trained(own), trained(averaged))
    assert math.isfinite(summary.validation_loss)
