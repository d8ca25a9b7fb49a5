"""What follows the batch in a real optimizer: learning rate, beta2 and weight decay of every step.

Every value is compared with the rule written out for the batch of that very step.
"""

from __future__ import annotations

import logging
import math
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, StepLR
from transformers import TrainingArguments

from hf_adaptive_batch import AdaptiveBatchTrainer, read_records

from .cases import arguments, history, llama, same_weights, sequences, weights
from .test_schedules_in_trainer import (
    CAP,
    EPOCHS,
    FIRST,
    RATE,
    SAMPLES,
    check_resumes,
    evaluated,
    linear,
    made,
    options_of,
    padded,
    share_at,
    trained,
    trained_plainly,
    whole_run,
)


BETA2, DECAY = 0.95, 0.1
RULES = {
    "scale_learning_rate": "sqrt",
    "scale_beta2": True,
    "scale_weight_decay": True,
    "adam_beta2": BETA2,
    "weight_decay": DECAY,
}
NO_RULES = {"adam_beta2": BETA2, "weight_decay": DECAY}
STAGES = {"batch_schedule": "0:4 25%:8 50%:16"}


def naive_beta2(ratio, floor=0.9):
    """The half-life in samples is kept; a larger batch does not lead below the floor."""
    half_life = FIRST * math.log(0.5) / math.log(BETA2)
    scaled = 0.5 ** (ratio * FIRST / half_life)
    return max(scaled, floor) if ratio > 1 else scaled


def check_values(watch, rule, *, rate=linear, floor=0.9, first=FIRST, beta2=True, decay=True):
    """Rate, betas and weight decay of both parameter groups in every step."""
    for step in watch.steps:
        ratio = step["size"] / first
        factor = rule(ratio)
        reference = RATE * rate(share_at(step["before"], first=first))
        assert step["rates"] == pytest.approx([reference * factor] * 2, rel=1e-9)
        second = naive_beta2(ratio, floor) if beta2 else BETA2
        if beta2 and first != FIRST:
            second = max(BETA2**ratio, floor) if ratio > 1 else BETA2**ratio
        assert [betas[0] for betas in step["betas"]] == [0.9, 0.9]
        assert [betas[1] for betas in step["betas"]] == pytest.approx([second] * 2, rel=1e-9)
        wanted = DECAY * ratio / factor if decay else DECAY
        assert step["weight_decays"] == pytest.approx([wanted, 0.0], rel=1e-9)


def groups_of(trainer):
    names = ("betas", "weight_decay", "initial_lr")
    return [{name: group.get(name) for name in names} for group in trainer.optimizer.param_groups]


def check_base(trainer, *, beta2=BETA2, decay=DECAY):
    for group, expected in zip(trainer.optimizer.param_groups, [decay, 0.0], strict=True):
        assert tuple(group["betas"]) == (0.9, beta2)
        assert group["weight_decay"] == expected


SCHEDULES = [
    "0:4 25%:8 50%:16",
    "0:16 25%:4 50%:8",
    "0:8",
    "linear_ramp",
    "cbs_law",
    "stage_wise",
    "norm_test",
    "noise_scale",
]


@pytest.mark.parametrize("name", SCHEDULES)
def test_sqrt_and_all_other_rules_hold_in_every_step(tmp_path, name):
    own, watch = trained(tmp_path, **options_of(name), **RULES)
    check_values(watch, math.sqrt)
    assert len(set(watch.column("size"))) > 1 or name == "0:8"
    check_base(own)


def test_another_rule_is_seen_to_differ(tmp_path):
    _, watch = trained(tmp_path, **STAGES, **RULES)
    with pytest.raises(AssertionError):
        check_values(watch, lambda ratio: ratio)
    with pytest.raises(AssertionError):
        check_values(watch, math.sqrt, floor=0.0)
    watch.steps.append({**watch.steps[-1], "size": 8})
    with pytest.raises(AssertionError):
        check_values(watch, math.sqrt)


@pytest.mark.parametrize("floor", [0.0, 0.93, 0.99])
def test_beta2_does_not_fall_below_its_floor(tmp_path, floor):
    """Nor does a floor above it raise it."""
    _, watch = trained(tmp_path, **STAGES, **RULES, min_beta2=floor)
    check_values(watch, math.sqrt, floor=min(floor, BETA2))


@pytest.mark.parametrize("beta2", [True, False])
@pytest.mark.parametrize("decay", [True, False])
@pytest.mark.parametrize("rule", ["none", "sqrt"])
def test_each_rule_is_in_force_alone(tmp_path, rule, beta2, decay):
    own, watch = trained(
        tmp_path,
        **STAGES,
        **{
            **RULES,
            "scale_learning_rate": rule,
            "scale_beta2": beta2,
            "scale_weight_decay": decay,
        },
    )
    factor = math.sqrt if rule == "sqrt" else lambda ratio: 1.0
    check_values(watch, factor, beta2=beta2, decay=decay)
    check_base(own)


@pytest.mark.parametrize("stages", ["0:8 50%:32", "0:8", "0:64 50%:16", "0:4 50%:16"])
def test_a_batch_below_the_arguments_scales_downwards(tmp_path, stages):
    if "64" in stages:
        stages = stages.replace("64", "32")
    own, watch = trained(tmp_path, batch_schedule=stages, gradient_accumulation_steps=4, **RULES)
    check_values(watch, math.sqrt, first=16)
    assert own.run.clock.samples_seen == EPOCHS * SAMPLES


def test_the_rule_multiplies_a_cosine_with_warmup_and_every_own_rate(tmp_path):
    """Groups with rates, betas and weight decays of their own keep their differences."""
    model = llama()
    parameters = list(model.parameters())
    groups = [
        {"params": parameters[:2], "lr": 1e-2, "betas": (0.8, 0.9), "weight_decay": 0.3},
        {"params": parameters[2:5], "weight_decay": 0.0},
        {"params": parameters[5:], "betas": (0.5, 0.99)},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, weight_decay=0.01)
    falls = [lambda step: 1 / (1 + step), lambda step: 1.0, lambda step: 1 - step / 60]
    schedule = LambdaLR(optimizer, falls)
    rules = {**RULES, "min_beta2": 0.0}
    _, watch = trained(
        tmp_path,
        trainer={"model": model, "optimizers": (optimizer, schedule)},
        **STAGES,
        **rules,
    )
    base = [(1e-2, 0.9, 0.3), (1e-3, 0.999, 0.0), (1e-3, 0.99, 0.01)]
    total = EPOCHS * math.ceil(SAMPLES / FIRST)
    for step in watch.steps:
        ratio, done = step["size"] / FIRST, share_at(step["before"]) * total
        for index, (rate, beta2, decay) in enumerate(base):
            wanted = rate * falls[index](done) * math.sqrt(ratio)
            assert step["rates"][index] == pytest.approx(wanted)
            assert step["betas"][index][1] == pytest.approx(beta2**ratio)
            assert step["weight_decays"][index] == pytest.approx(decay * math.sqrt(ratio))
    assert [group["betas"] for group in optimizer.param_groups] == [
        (0.8, 0.9),
        (0.9, 0.999),
        (0.5, 0.99),
    ]
    assert schedule.lr_lambdas == falls


def test_a_rate_in_a_tensor_is_scaled_as_well(tmp_path):
    model = llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=torch.tensor(RATE), foreach=False)
    given = {"model": model, "optimizers": (optimizer, None)}
    _, watch = trained(tmp_path, trainer=given, batch_schedule="0:16 50%:4", **RULES)
    for step in watch.steps:
        wanted = RATE * linear(share_at(step["before"])) * math.sqrt(step["size"] / FIRST)
        assert step["rates"][0] == pytest.approx(wanted, rel=1e-6)


def naive_gain(ratio, trace, norm):
    variance = trace / FIRST
    return (variance + norm) / (variance / ratio + norm)


def same_rows(samples):
    """All samples nearly alike: the gradient stands out of the noise at once."""
    data = sequences(samples)

    def near(row, index):
        tokens = [3, 5, 7, 9, 11, 13, 15, index % 32]
        return {"input_ids": tokens, "labels": tokens}

    return data.map(near, with_indices=True)


@pytest.mark.parametrize("optim", ["adamw_torch", "sgd"])
def test_adascale_takes_the_gain_of_what_was_measured_before_the_step(tmp_path, optim):
    """Its root for Adam; between none and the ratio; 1 before anything is known."""
    rules = {**RULES, "scale_learning_rate": "adascale"}
    if optim == "sgd":
        rules |= {"scale_beta2": False, "scale_weight_decay": False}
    model = llama(dropout=0.0)
    _, watch = trained(
        tmp_path,
        trainer={"model": model, "train_dataset": same_rows(SAMPLES)},
        **STAGES,
        **rules,
        optim=optim,
    )
    records = read_records(tmp_path)
    assert records["step"] == list(range(1, len(watch.steps) + 1))
    known = 0
    for number, step in enumerate(watch.steps):
        ratio = step["size"] / FIRST
        reference = RATE * linear(share_at(step["before"]))
        factor = step["rates"][0] / reference
        if ratio == 1:
            assert factor == pytest.approx(1.0)
            continue
        trace, norm = (records[name][number - 1] for name in ("noise_trace", "grad_sq_norm"))
        if records["noise_scale"][number - 1] is None:
            continue
        known += 1
        gain = naive_gain(ratio, trace, norm)
        wanted = gain if optim == "sgd" else math.sqrt(gain)
        assert factor == pytest.approx(wanted, rel=1e-9)
        if optim != "sgd":
            assert step["weight_decays"][0] == pytest.approx(DECAY * ratio / wanted)
    assert known > 5


@pytest.mark.parametrize("unmeasured", [{"test_interval": 0}, {"split_micro_batch": False}])
def test_adascale_without_measurements_is_refused(tmp_path, unmeasured):
    rule = {"scale_learning_rate": "adascale", "batch_schedule": "0:4 50%:8"}
    with pytest.raises(ValueError, match=r"adascale.* must go with measured steps"):
        trained(tmp_path, **rule, **{"gradient_accumulation_steps": 1, **unmeasured})
    trained(tmp_path, **{**rule, "batch_schedule": "constant"}, **unmeasured)  # nothing to scale


def test_linear_is_for_sgd(tmp_path):
    _, watch = trained(tmp_path, **STAGES, scale_learning_rate="linear", optim="sgd")
    for step in watch.steps:
        wanted = RATE * linear(share_at(step["before"])) * step["size"] / FIRST
        assert step["rates"] == pytest.approx([wanted] * 2)


@pytest.mark.parametrize("alpha", [None, 2.0])
def test_seesaw_keeps_the_timescale_of_the_weight_decay(tmp_path, alpha):
    """Rate x weight decay is that of the reference, times the batch's ratio."""
    rules = {**RULES, "scale_learning_rate": "none"}
    own, watch = trained(
        tmp_path,
        batch_schedule="seesaw",
        max_global_batch_size=CAP,
        seesaw_alpha=alpha,
        lr_scheduler_type="cosine",
        **rules,
    )
    for step in watch.steps:
        ratio, share = step["size"] / FIRST, share_at(step["before"])
        reference = RATE * 0.5 * (1 + math.cos(math.pi * share))
        product = step["rates"][0] * step["weight_decays"][0]
        assert product == pytest.approx(reference * DECAY * ratio)
        assert step["betas"][0][1] == pytest.approx(naive_beta2(ratio))
    check_base(own)


# ------------------------------------------------------------------ nothing where nothing changes


@pytest.mark.parametrize("rule", ["sqrt", "adascale"])
@pytest.mark.parametrize("shape", ["linear", "cosine"])
@pytest.mark.parametrize("schedule", ["constant", "0:8"])
def test_a_constant_batch_with_all_rules_trains_as_the_plain_trainer(
    tmp_path, schedule, shape, rule
):
    options = {
        **NO_RULES,
        "gradient_accumulation_steps": 2,
        "lr_scheduler_type": shape,
        "warmup_steps": 3,
    }
    one = trained_plainly(tmp_path / "plain", trainer=padded(), **options)
    rules = {**RULES, "scale_learning_rate": rule}
    own, _ = trained(
        tmp_path / "own", trainer=padded(), batch_schedule=schedule, **{**options, **rules}
    )
    assert history(own, adaptive_keys=False) == history(one)
    assert same_weights(weights(own), weights(one))
    assert groups_of(own) == groups_of(one)


def test_a_constant_batch_with_the_rules_keeps_a_rate_of_zero(tmp_path):
    _, watch = trained(tmp_path, batch_schedule="0:16", **RULES, warmup_steps=8)
    assert watch.rates[0] == 0.0
    assert watch.rates[1] == pytest.approx(RATE * 2 * 4 / 8)


@pytest.mark.parametrize("fails", [False, True])
def test_after_training_the_optimizer_holds_the_users_values(tmp_path, fails):
    own, watch = made(tmp_path, **STAGES, **RULES)
    if fails:

        def broken(args, state, control, **kwargs):
            if state.global_step == 14:
                raise KeyError("a broken callback")

        watch.on_step_end = broken
        with pytest.raises(KeyError, match="a broken callback"):
            own.train()
        assert watch.steps[-1]["size"] > FIRST
    else:
        own.train()
    check_base(own)
    assert [group["initial_lr"] for group in own.optimizer.param_groups] == [RATE, RATE]


def test_training_again_scales_the_users_values_once_more(tmp_path):
    own, watch = trained(tmp_path, **STAGES, **RULES)
    before = list(watch.steps)
    watch.steps = []
    own.train()
    check_values(watch, math.sqrt)
    assert watch.steps == before


def test_what_is_saved_between_is_the_users_and_training_goes_on_scaled(tmp_path):
    whole, watch = whole_run(tmp_path, **STAGES, **RULES)
    check_values(watch, math.sqrt)
    changed = 0
    for number in range(1, whole.state.global_step + 1):
        folder = tmp_path / f"checkpoint-{number}"
        groups = torch.load(folder / "optimizer.pt", weights_only=True)["param_groups"]
        assert [tuple(group["betas"]) for group in groups] == [(0.9, BETA2)] * 2
        assert [group["weight_decay"] for group in groups] == [DECAY, 0.0]
        changed += watch.steps[number - 1]["betas"][0] != (0.9, BETA2)
    assert changed > 3


# ---------------------------------------------------------------------------------------- resume


RESUMED = {
    "sqrt": {**STAGES, **RULES},
    "sqrt_first_larger": {"batch_schedule": "0:16 25%:4 50%:8", **RULES},
    "sqrt_first_smaller": {
        "batch_schedule": "0:4 30%:8",
        "gradient_accumulation_steps": 4,
        **RULES,
    },
    "one_stage": {"batch_schedule": "0:16", **RULES},
    "adascale": {**STAGES, **RULES, "scale_learning_rate": "adascale"},
    "adascale_seldom": {
        **options_of("linear_ramp"),
        "scale_learning_rate": "adascale",
        "test_interval": 3,
    },
    "seesaw": {**options_of("seesaw"), **RULES, "scale_learning_rate": "none"},
    "closed_loop": {**options_of("norm_test"), **RULES},
    "workers": {**STAGES, **RULES, "dataloader_num_workers": 1},
    "cosine": {**STAGES, **RULES, "lr_scheduler_type": "cosine", "warmup_steps": 4},
    "linear_sgd": {**STAGES, "scale_learning_rate": "linear", "optim": "sgd"},
}


@pytest.mark.parametrize("options", RESUMED.values(), ids=RESUMED)
def test_every_checkpoint_resumes_bitwise_with_rules_in_force(tmp_path, options):
    every = 1 if "25%" in options["batch_schedule"] else 3
    check_resumes(tmp_path, trainer=padded, every=every, **options, num_train_epochs=2)


def own_groups():
    model = llama()
    parameters = list(model.parameters())
    groups = [{"params": parameters[:3], "weight_decay": 0.2}, {"params": parameters[3:]}]
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, BETA2))
    schedule = LambdaLR(optimizer, lambda step: 0.9**step)
    return {"model": model, "optimizers": (optimizer, schedule)}


def test_a_resume_of_an_optimizer_that_was_passed_in_is_bitwise(tmp_path):
    check_resumes(tmp_path, trainer=own_groups, every=3, **STAGES, **RULES, num_train_epochs=2)


def test_a_resume_without_the_rules_trains_with_the_users_values(tmp_path):
    whole_run(tmp_path / "run", **STAGES, **RULES)
    checkpoint = str(tmp_path / "run" / "checkpoint-13")
    own, watch = trained(tmp_path / "own", resume=checkpoint, **STAGES, **NO_RULES)
    assert watch.steps[0]["size"] > FIRST
    check_values(watch, lambda ratio: 1.0, beta2=False, decay=False)
    check_base(own)


def test_a_resume_with_rules_that_were_off_scales_from_there_on(tmp_path):
    whole_run(tmp_path / "run", **STAGES, **NO_RULES)
    checkpoint = str(tmp_path / "run" / "checkpoint-12")
    own, watch = trained(tmp_path / "own", resume=checkpoint, **STAGES, **RULES)
    check_values(watch, math.sqrt)
    check_base(own)


def test_a_resume_with_another_first_batch_scales_by_that_one(tmp_path):
    whole_run(tmp_path / "run", **STAGES, **RULES)
    checkpoint = str(tmp_path / "run" / "checkpoint-5")
    own, watch = trained(
        tmp_path / "own", resume=checkpoint, gradient_accumulation_steps=4, **STAGES, **RULES
    )
    check_values(watch, math.sqrt, first=16)
    assert own.run.clock.samples_seen == EPOCHS * SAMPLES


def test_a_resume_with_a_constant_batch_has_the_rates_of_the_plain_trainer(tmp_path):
    whole_run(tmp_path / "run", batch_schedule="0:4 1%:16", **RULES)
    checkpoint = str(tmp_path / "run" / "checkpoint-4")
    _, watch = trained(tmp_path / "own", resume=checkpoint, batch_schedule="constant", **RULES)
    assert set(watch.column("size")) == {FIRST}
    check_values(watch, lambda ratio: 1.0)


@pytest.mark.parametrize("rules", [RULES, NO_RULES], ids=["rules", "no_rules"])
def test_values_of_the_checkpoint_go_on_whether_rules_are_in_force_or_not(tmp_path, rules):
    """As under the plain Trainer, whose resumed optimizer has the betas of its checkpoint."""
    whole_run(tmp_path / "run", **STAGES, **rules)
    checkpoint = str(tmp_path / "run" / "checkpoint-2")
    changed = {**rules, "adam_beta2": 0.8, "weight_decay": 0.5, "num_train_epochs": EPOCHS}
    _, watch = trained(tmp_path / "own", resume=checkpoint, **STAGES, **changed)
    assert watch.steps[0]["size"] == FIRST
    assert watch.steps[0]["betas"][0] == (0.9, BETA2)
    assert watch.steps[0]["weight_decays"][0] == DECAY


# --------------------------------------------------------------------------------------- refused


PLATEAU = {
    "lr_scheduler_type": "reduce_lr_on_plateau",
    "eval_strategy": "epoch",
    "metric_for_best_model": "eval_loss",
}
REFUSED = {
    "sqrt_of_sgd": ({"scale_learning_rate": "sqrt", "optim": "sgd"}, "SGD"),
    "linear_of_adam": ({"scale_learning_rate": "linear"}, "AdamW"),
    "sqrt_of_adafactor": ({"scale_learning_rate": "sqrt", "optim": "adafactor"}, "Adafactor"),
    "adascale_of_adagrad": ({"scale_learning_rate": "adascale", "optim": "adagrad"}, "Adagrad"),
    "sqrt_of_rmsprop": ({"scale_learning_rate": "sqrt", "optim": "rmsprop"}, "RMSprop"),
    "beta2_of_sgd": ({"scale_beta2": True, "optim": "sgd"}, "SGD"),
    "decay_of_sgd": ({"scale_weight_decay": True, "optim": "sgd"}, "SGD"),
    "decay_of_adafactor": ({"scale_weight_decay": True, "optim": "adafactor"}, "Adafactor"),
    "plateau": ({"scale_learning_rate": "sqrt", **PLATEAU}, "ReduceLROnPlateau"),
}


@pytest.mark.parametrize("schedule", [STAGES["batch_schedule"], "constant", "norm_test"])
@pytest.mark.parametrize(("options", "words"), REFUSED.values(), ids=REFUSED)
def test_a_rule_that_does_not_fit_is_refused_before_the_first_step(
    tmp_path, options, words, schedule
):
    own, watch = made(tmp_path, trainer=evaluated(), batch_schedule=schedule, **options)
    with pytest.raises(ValueError, match="must") as raised:
        own.train()
    message = str(raised.value)
    assert words in message
    assert "Accelerated" not in message  # the user's optimizer has another name
    assert watch.steps == []
    assert own.state.global_step == 0


def test_a_run_that_was_refused_can_be_mended_and_trained(tmp_path):
    own, watch = made(tmp_path, **{**STAGES, **NO_RULES}, scale_learning_rate="linear")
    with pytest.raises(ValueError, match="linear"):
        own.train()
    check_base(own)
    own.args.scale_learning_rate = "sqrt"
    own.train()
    check_values(watch, math.sqrt, beta2=False, decay=False)


def with_own(kind, schedule=None, **options):
    model = llama()
    optimizer = kind(model.parameters(), lr=RATE, **options)
    return {"model": model, "optimizers": (optimizer, schedule and schedule(optimizer))}


@pytest.mark.parametrize(
    "kind", [torch.optim.Adam, torch.optim.Adamax, torch.optim.SGD, torch.optim.Adagrad]
)
def test_weight_decay_in_the_gradient_is_not_scaled(tmp_path, kind):
    with pytest.raises(ValueError, match=r"scale_weight_decay .* must go with AdamW") as raised:
        trained(tmp_path, trainer=with_own(kind), **STAGES, scale_weight_decay=True)
    assert kind.__name__ in str(raised.value)


class MyAdamW(torch.optim.AdamW):
    """As people derive from it."""


@pytest.mark.parametrize("kind", [torch.optim.AdamW, MyAdamW, torch.optim.NAdam, torch.optim.RAdam])
def test_what_is_an_adam_is_known_as_one(tmp_path, kind):
    options = {"decoupled_weight_decay": True} if "AdamW" not in kind.__name__ else {}
    given = with_own(kind, weight_decay=DECAY, betas=(0.9, BETA2), **options)
    _, watch = trained(tmp_path, trainer=given, **STAGES, **RULES)
    for step in watch.steps:
        ratio = step["size"] / FIRST
        assert step["weight_decays"] == pytest.approx([DECAY * math.sqrt(ratio)])
        assert step["betas"][0][1] == pytest.approx(naive_beta2(ratio))


def test_a_chained_scheduler_is_refused_where_the_rate_is_scaled(tmp_path):
    given = with_own(torch.optim.AdamW, lambda optimizer: StepLR(optimizer, 3))
    with pytest.raises(ValueError, match=r"\(StepLR\) must be a LambdaLR"):
        trained(tmp_path, trainer=given, **STAGES, scale_learning_rate="sqrt")


@pytest.mark.parametrize("rule", ["scale_beta2", "scale_weight_decay"])
def test_any_scheduler_does_where_the_rate_is_not_scaled(tmp_path, rule):
    """What is refused for the rate's sake must be about the rate."""
    given = with_own(
        torch.optim.AdamW,
        lambda optimizer: StepLR(optimizer, 3, gamma=0.5),
        betas=(0.9, BETA2),
        weight_decay=DECAY,
    )
    _, watch = trained(tmp_path, trainer=given, **STAGES, **{rule: True})
    for step in watch.steps:
        ratio = step["size"] / FIRST
        beta2 = naive_beta2(ratio) if rule == "scale_beta2" else BETA2
        decay = DECAY * (ratio if rule == "scale_weight_decay" else 1)
        assert step["betas"][0][1] == pytest.approx(beta2)
        assert step["weight_decays"] == pytest.approx([decay])


def test_the_plain_trainers_arguments_scale_nothing(tmp_path, caplog):
    args = arguments(tmp_path, TrainingArguments, num_train_epochs=1)
    with caplog.at_level(logging.WARNING):
        own = AdaptiveBatchTrainer(model=llama(), args=args, train_dataset=sequences(SAMPLES))
    own.train()
    assert own._co_scaled is None


# ------------------------------------------------------------------------------- what else happens


class Poisoned(nn.Module):
    """Its loss is NaN for one sample of 37."""

    mark = tuple(sequences(SAMPLES)["input_ids"][20])

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head = nn.Embedding(32, 8), nn.Linear(8, 32)

    def forward(self, input_ids, labels):
        logits = self.head(self.embedding(input_ids))
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        if any(tuple(row) == self.mark for row in input_ids.tolist()):
            loss = loss * torch.nan
        return {"loss": loss}


def test_a_step_that_is_skipped_leaves_the_rules_in_force(tmp_path):
    own, watch = trained(tmp_path, trainer={"model": Poisoned()}, **STAGES, **RULES)
    assert own.run.skipped_steps == EPOCHS
    for step in watch.steps:
        ratio = step["size"] / FIRST
        wanted = RATE * linear(share_at(step["before"])) * math.sqrt(ratio)
        assert step["rates"][0] == pytest.approx(wanted)
        assert step["betas"][0][1] == pytest.approx(naive_beta2(ratio))


def test_what_is_logged_is_the_rate_of_the_step(tmp_path):
    own, watch = trained(tmp_path, **STAGES, **RULES)
    logged = [entry["learning_rate"] for entry in history(own) if "loss" in entry]
    assert logged == watch.rates
    assert read_records(tmp_path)["learning_rate"] == watch.rates
    jumps = [b / a for a, b in pairwise(watch.rates) if b > a]
    assert len(jumps) == 2  # where the stages begin
