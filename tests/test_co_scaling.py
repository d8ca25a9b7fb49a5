"""What follows the batch: learning rate, beta2 and weight decay, and the optimizers it fits."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, StepLR
from transformers.optimization import Adafactor

from hf_adaptive_batch.apply.clock import TrainingClock
from hf_adaptive_batch.co_scaled import CoScaledOptimizer, kind_of
from hf_adaptive_batch.decide.co_scaling import (
    CoScaling,
    OptimizerKind,
    adascale_gain,
    beta2_at,
    learning_rate_factor,
    weight_decay_at,
)
from hf_adaptive_batch.decide.noise_scale import Measurability, NoiseScale
from hf_adaptive_batch.learning_rate import LearningRateOnClock
from tests import reference_schedules as reference
from tests.reference_schedules import refusal


def measured(
    noise_trace: float, grad_sq_norm: float, *, updates: int = 10, error: float = 0.0
) -> NoiseScale:
    return NoiseScale(
        updates=updates,
        noise_trace=noise_trace,
        grad_sq_norm=grad_sq_norm,
        noise_trace_error=error,
        grad_sq_norm_error=error,
        noise_scale_error=error,
    )


# ---------------------------------------------------------------------------------- learning rate


@pytest.mark.parametrize(
    ("rule", "factors"),
    [
        ("none", [1, 1, 1, 1]),
        ("sqrt", [math.sqrt(0.5), 1, math.sqrt(2), 2]),
        ("linear", [0.5, 1, 2, 4]),
    ],
)
def test_a_rule_s_factor_at_half_one_two_and_four_times_the_batch(
    rule: Any, factors: list[float]
) -> None:
    assert [learning_rate_factor(rule, ratio) for ratio in (0.5, 1, 2, 4)] == factors


@pytest.mark.parametrize("rule", ["none", "sqrt", "linear", "adascale"])
@pytest.mark.parametrize("kind", OptimizerKind)
def test_at_the_user_s_batch_every_factor_is_exactly_one(rule: Any, kind: OptimizerKind) -> None:
    noise = measured(0.3, 0.7)
    assert learning_rate_factor(rule, 1.0, kind=kind, noise=noise, base_batch_size=3) == 1.0


@given(
    ratio=st.floats(1 / 64, 64),
    noise_trace=st.floats(1e-6, 1e6),
    grad_sq_norm=st.floats(1e-6, 1e6),
    base=st.integers(1, 4096),
)
def test_the_gain_of_adascale_is_the_naive_one_between_one_and_the_ratio(
    ratio: float, noise_trace: float, grad_sq_norm: float, base: int
) -> None:
    gain = adascale_gain(ratio, measured(noise_trace, grad_sq_norm), base)
    naive = reference.adascale_gain(
        ratio, noise_trace=noise_trace, grad_sq_norm=grad_sq_norm, b0=base
    )
    assert gain == pytest.approx(naive, rel=1e-12)
    assert min(1, ratio) * (1 - 1e-12) <= gain <= max(1, ratio) * (1 + 1e-12)
    noise = measured(noise_trace, grad_sq_norm)
    by_kind = {
        kind: learning_rate_factor("adascale", ratio, kind=kind, noise=noise, base_batch_size=base)
        for kind in OptimizerKind
    }
    if ratio != 1:
        assert by_kind[OptimizerKind.SGD] == gain
        assert by_kind[OptimizerKind.ADAM] == by_kind[OptimizerKind.ADAMW] == math.sqrt(gain)


@pytest.mark.parametrize("ratio", [0.25, 2, 4])
def test_the_gain_is_one_without_noise_and_the_ratio_without_a_signal(ratio: float) -> None:
    assert adascale_gain(ratio, measured(0.0, 1.0), 8) == 1
    assert adascale_gain(ratio, measured(1e-15, 1.0), 8) == pytest.approx(1)
    assert adascale_gain(ratio, measured(1.0, 1e-15), 8) == pytest.approx(ratio)
    assert adascale_gain(ratio, measured(1.0, -0.1), 8) == ratio  # not above zero: no signal
    assert adascale_gain(ratio, measured(-0.1, 1.0), 8) == 1  # below zero by chance: no noise


@pytest.mark.parametrize("gain_at", [(2, 4 / 3), (4, 1.6), (1000, 2000 / 1001)])
def test_the_gain_where_the_base_batch_is_the_noise_scale(gain_at: tuple[float, float]) -> None:
    """B0 = B_simple: noise and signal are alike, so the gain is 2 / (1/S + 1), below 2."""
    ratio, gain = gain_at
    assert adascale_gain(ratio, measured(64.0, 1.0), 64) == pytest.approx(gain)


@pytest.mark.parametrize(
    ("noise", "state"),
    [
        (None, None),
        (measured(1.0, 1.0, updates=1), Measurability.NOT_YET),
        (measured(math.nan, math.nan, updates=0), Measurability.NOT_YET),
        (measured(0.0, 0.0), Measurability.NO_GRADIENT),
    ],
)
def test_as_long_as_nothing_is_known_the_gain_is_one(noise: Any, state: Any) -> None:
    assert noise is None or noise.measurability is state
    assert adascale_gain(4.0, noise, 8) == 1
    assert learning_rate_factor("adascale", 4.0, noise=noise, base_batch_size=8) == 1


# ------------------------------------------------------------------------------------------ beta2


def test_the_published_half_life_is_kept_in_tokens() -> None:
    """Marek et al.: 0.95 at a batch of 512 is 0.9999 at 1."""
    assert beta2_at(0.95, 1 / 512) == pytest.approx(0.9999, abs=5e-5)
    assert round(beta2_at(0.95, 1 / 512), 4) == 0.9999
    assert beta2_at(0.95, 512, floor=0.0) == pytest.approx(0.95**512)


@given(beta2=st.floats(0.5, 0.99999), ratio=st.floats(1 / 512, 64))
def test_beta2_is_that_of_its_half_life(beta2: float, ratio: float) -> None:
    scaled = beta2_at(beta2, ratio)
    naive = reference.beta2_by_half_life(beta2, ratio, tokens_per_step=4096)
    assert scaled == pytest.approx(naive, rel=1e-9)
    assert 0 <= scaled < 1
    assert (scaled < beta2) == (ratio > 1) or ratio == 1
    back = beta2_at(scaled, 1 / ratio) if scaled > 1e-3 else beta2
    assert back == pytest.approx(beta2, rel=1e-6)


@pytest.mark.parametrize(
    ("beta2", "ratio", "floor", "expected"),
    [
        (0.95, 1, 0.9, 0.95),
        (0.95, 2, 0.9, 0.95**2),  # 0.9025, above the floor
        (0.95, 3, 0.9, 0.9),  # 0.857
        (0.95, 64, 0.9, 0.9),
        (0.95, 64, 0.0, 0.95**64),
        (0.95, 2, 0.96, 0.95),  # a floor above the user's value raises nothing
        (0.8, 2, 0.9, 0.8),
        (0.8, 0.5, 0.9, 0.8**0.5),  # 0.894: nor does it where the batch is smaller
        (0.5, 0.5, 0.9, 0.5**0.5),
        (0.999, 0.5, 0.9, 0.999**0.5),
    ],
)
def test_the_floor_holds_for_larger_batches_alone_and_raises_nothing(
    beta2: float, ratio: float, floor: float, expected: float
) -> None:
    assert beta2_at(beta2, ratio, floor) == pytest.approx(expected, rel=1e-12)


# ----------------------------------------------------------------------------------- weight decay


@given(
    ratio=st.floats(1 / 64, 64),
    rule=st.sampled_from(["none", "sqrt", "linear", "adascale"]),
    learning_rate=st.floats(1e-6, 1),
    weight_decay=st.floats(1e-4, 1),
)
def test_learning_rate_by_weight_decay_over_the_batch_is_constant(
    ratio: float, rule: Any, learning_rate: float, weight_decay: float
) -> None:
    factor = learning_rate_factor(rule, ratio, noise=measured(50.0, 1.0), base_batch_size=32)
    before = reference.timescale_in_samples(
        learning_rate=learning_rate, weight_decay=weight_decay, batch=32
    )
    after = reference.timescale_in_samples(
        learning_rate=learning_rate * factor,
        weight_decay=weight_decay_at(weight_decay, ratio, factor),
        batch=32 * ratio,
    )
    assert after == pytest.approx(before, rel=1e-9)


@pytest.mark.parametrize(
    ("ratio", "factor", "expected"), [(1, 1, 0.1), (4, 1, 0.4), (4, 2, 0.2), (0.25, 0.5, 0.05)]
)
def test_weight_decay_grows_by_what_the_learning_rate_leaves(
    ratio: float, factor: float, expected: float
) -> None:
    assert weight_decay_at(0.1, ratio, factor) == pytest.approx(expected)


# --------------------------------------------------------------------------- what an optimizer is


def weights() -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(2, 2))]


class MyAdamW(torch.optim.AdamW):
    """A subclass under another name."""


class Unrelated(torch.optim.Optimizer):
    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 1.0, "betas": (0.9, 0.99)})


OPTIMIZERS: dict[str, tuple[Callable[[], Any], OptimizerKind | None]] = {
    "SGD": (lambda: torch.optim.SGD(weights(), lr=0.1, momentum=0.9), OptimizerKind.SGD),
    "Adam": (lambda: torch.optim.Adam(weights()), OptimizerKind.ADAM),
    "Adam, L2": (lambda: torch.optim.Adam(weights(), weight_decay=0.1), OptimizerKind.ADAM),
    "Adam, decoupled": (
        lambda: torch.optim.Adam(weights(), decoupled_weight_decay=True),
        OptimizerKind.ADAMW,
    ),
    "AdamW": (lambda: torch.optim.AdamW(weights()), OptimizerKind.ADAMW),
    "a subclass of AdamW": (lambda: MyAdamW(weights()), OptimizerKind.ADAMW),
    "NAdam": (lambda: torch.optim.NAdam(weights()), OptimizerKind.ADAM),
    "NAdam, decoupled": (
        lambda: torch.optim.NAdam(weights(), decoupled_weight_decay=True),
        OptimizerKind.ADAMW,
    ),
    "RAdam": (lambda: torch.optim.RAdam(weights()), OptimizerKind.ADAM),
    "RAdam, decoupled": (
        lambda: torch.optim.RAdam(weights(), decoupled_weight_decay=True),
        OptimizerKind.ADAMW,
    ),
    "Adagrad": (lambda: torch.optim.Adagrad(weights()), None),
    "Adamax": (lambda: torch.optim.Adamax(weights()), None),
    "Adadelta": (lambda: torch.optim.Adadelta(weights()), None),
    "RMSprop": (lambda: torch.optim.RMSprop(weights()), None),
    "ASGD": (lambda: torch.optim.ASGD(weights()), None),
    "LBFGS": (lambda: torch.optim.LBFGS(weights()), None),
    "Adafactor of torch": (lambda: torch.optim.Adafactor(weights()), None),
    "Adafactor of transformers": (lambda: Adafactor(weights()), None),
    "one that is not known": (lambda: Unrelated(weights()), None),
}
each_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)


@each_optimizer
def test_an_optimizer_is_known_by_its_class(name: str) -> None:
    make, kind = OPTIMIZERS[name]
    assert kind_of(make()) is kind


@each_optimizer
def test_a_wrapper_of_accelerate_hides_no_optimizer(name: str) -> None:
    make, kind = OPTIMIZERS[name]
    Accelerator(cpu=True)  # its optimizer asks for the state that this leaves
    assert kind_of(AcceleratedOptimizer(make())) is kind


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("AdamW8bit", OptimizerKind.ADAMW),
        ("PagedAdamW32bit", OptimizerKind.ADAMW),
        ("Adam8bit", OptimizerKind.ADAM),
        ("AdamWFp8", OptimizerKind.ADAMW),
        ("AdamW4bit", OptimizerKind.ADAMW),
        ("AdaMax", None),
        ("AdamWScheduleFree", None),
        ("MyAdam", None),
        ("AdamP", None),
    ],
)
def test_optimizers_of_few_bits_are_known_by_their_names(name: str, kind: Any) -> None:
    assert kind_of(type(name, (Unrelated,), {})(weights())) is kind


# ------------------------------------------------------------------------------- rules and kinds

FITTING: dict[str, tuple[CoScaling, bool, set[OptimizerKind]]] = {
    "scale_learning_rate (sqrt)": (
        CoScaling(learning_rate="sqrt"),
        False,
        {OptimizerKind.ADAM, OptimizerKind.ADAMW},
    ),
    "scale_learning_rate (linear)": (CoScaling(learning_rate="linear"), False, {OptimizerKind.SGD}),
    "scale_learning_rate (adascale)": (
        CoScaling(learning_rate="adascale"),
        False,
        set(OptimizerKind),
    ),
    "scale_beta2 (True)": (
        CoScaling(beta2=True),
        False,
        {OptimizerKind.ADAM, OptimizerKind.ADAMW},
    ),
    "scale_weight_decay (True)": (CoScaling(weight_decay=True), False, {OptimizerKind.ADAMW}),
    "batch_schedule (seesaw)": (CoScaling(), True, {OptimizerKind.ADAM, OptimizerKind.ADAMW}),
}


@pytest.mark.parametrize("setting", FITTING)
@pytest.mark.parametrize("kind", [*OptimizerKind, None])
def test_a_rule_goes_with_the_optimizers_that_it_was_derived_for(
    setting: str, kind: OptimizerKind | None
) -> None:
    rules, seesaw, kinds = FITTING[setting]
    if kind in kinds:
        rules.check_optimizer("Some", kind, seesaw=seesaw)
        return
    message = refusal(lambda: rules.check_optimizer("Some", kind, seesaw=seesaw))
    assert message.startswith(setting)
    assert "Some" in message
    assert all(str(fitting) in message for fitting in kinds)


def test_without_rules_every_optimizer_is_good() -> None:
    assert CoScaling().is_off
    for kind in (*OptimizerKind, None):
        CoScaling().check_optimizer("Some", kind, seesaw=False)
    for rules in (CoScaling(learning_rate="sqrt"), CoScaling(beta2=True)):
        assert not rules.is_off
    assert not CoScaling(weight_decay=True).is_off
    assert CoScaling(min_beta2=0.5).is_off  # a floor of nothing


@pytest.mark.parametrize("rule", ["", "cubic", "Sqrt", "sqrt ", None, 2])
def test_an_unknown_rule_is_refused(rule: Any) -> None:
    message = refusal(lambda: CoScaling(learning_rate=rule))
    assert f"scale_learning_rate ({rule!r})" in message


@pytest.mark.parametrize("floor", [-0.1, 1.0, 2.0, math.nan])
def test_a_floor_that_is_no_decay_is_refused(floor: float) -> None:
    assert f"min_beta2 ({floor})" in refusal(lambda: CoScaling(min_beta2=floor))


# ---------------------------------------------------------------------- held in a real optimizer


def two_groups() -> torch.optim.AdamW:
    """As the Trainer has it: with and without weight decay."""
    groups = [
        {"params": weights(), "weight_decay": 0.1},
        {"params": weights(), "weight_decay": 0.0, "betas": (0.8, 0.99)},
    ]
    return torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95))


def values(optimizer: Any) -> list[tuple[Any, float]]:
    return [(group["betas"], group["weight_decay"]) for group in optimizer.param_groups]


USERS = [((0.9, 0.95), 0.1), ((0.8, 0.99), 0.0)]


def test_beta2_and_weight_decay_are_set_from_the_user_s_values_and_never_twice() -> None:
    optimizer = two_groups()
    held = CoScaledOptimizer(optimizer, CoScaling(beta2=True, weight_decay=True))
    assert values(optimizer) == USERS
    for _ in range(3):
        held.set(2.0, math.sqrt(2))
    first, second = values(optimizer)
    assert first[0] == (0.9, pytest.approx(0.95**2))  # beta1 stays
    assert second[0] == (0.8, pytest.approx(0.99**2))
    assert first[1] == pytest.approx(0.1 * math.sqrt(2))
    assert second[1] == 0
    held.set(64.0, 1.0)
    assert values(optimizer)[0] == ((0.9, 0.9), pytest.approx(6.4))  # the floor
    held.set(1.0, 1.0)
    assert values(optimizer) == USERS


@pytest.mark.parametrize(
    ("rules", "changed"),
    [
        (CoScaling(), (False, False)),
        (CoScaling(learning_rate="sqrt"), (False, False)),
        (CoScaling(beta2=True), (True, False)),
        (CoScaling(weight_decay=True), (False, True)),
    ],
)
def test_a_rule_that_is_off_changes_nothing(rules: CoScaling, changed: tuple[bool, bool]) -> None:
    optimizer = two_groups()
    CoScaledOptimizer(optimizer, rules).set(4.0, 1.0)
    betas, weight_decay = values(optimizer)[0]
    assert (betas != (0.9, 0.95), weight_decay != 0.1) == changed
    assert optimizer.param_groups[0]["lr"] == 1e-3  # the schedule's to set


def test_what_is_saved_are_the_user_s_values_and_what_goes_on_are_the_scaled_ones() -> None:
    optimizer = two_groups()
    held = CoScaledOptimizer(optimizer, CoScaling(beta2=True, weight_decay=True))
    held.set(4.0, 2.0)
    scaled = values(optimizer)
    with held.at_base():
        assert values(optimizer) == USERS
    assert values(optimizer) == scaled != USERS
    with pytest.raises(RuntimeError), held.at_base():
        raise RuntimeError
    assert values(optimizer) == scaled


def test_the_values_are_set_also_after_a_checkpoint_was_loaded() -> None:
    optimizer = two_groups()
    held = CoScaledOptimizer(optimizer, CoScaling(weight_decay=True))
    optimizer.load_state_dict(two_groups().state_dict())  # replaces the groups' dictionaries
    held.set(2.0, 1.0)
    assert values(optimizer)[0][1] == pytest.approx(0.2)


def test_a_learning_rate_of_nothing_leaves_weight_decay_alone() -> None:
    """Where seesaw's reference is 0 no weight decays anyway, and nothing is divided by it."""
    optimizer = two_groups()
    held = CoScaledOptimizer(optimizer, CoScaling(weight_decay=True), seesaw=True)
    held.set(2.0, 0.0)
    assert values(optimizer)[0][1] == 0.1


@each_optimizer
def test_a_rule_refuses_the_optimizer_when_it_is_made(name: str) -> None:
    make, kind = OPTIMIZERS[name]
    optimizer = make()
    if kind is OptimizerKind.ADAMW:
        CoScaledOptimizer(optimizer, CoScaling(weight_decay=True)).set(2.0, 1.0)
        return
    message = refusal(lambda: CoScaledOptimizer(optimizer, CoScaling(weight_decay=True)))
    assert type(optimizer).__name__ in message


# ----------------------------------------------------------------------- on the schedule's clock


def clock() -> TrainingClock:
    return TrainingClock(
        epoch_samples=None, initial_global_batch_size=8, initial_round_size=8, budget_samples=80
    )


def test_the_factor_multiplies_the_schedule_s_rate_and_is_asked_anew_each_time() -> None:
    optimizer = torch.optim.SGD(weights(), lr=2.0)
    scheduler = LambdaLR(optimizer, lambda step: 1 - step / 10)
    seen, factors = clock(), iter([1.0, 1.0, 4.0, 4.0, 0.5])
    on_clock = LearningRateOnClock(scheduler, seen, lambda: next(factors))
    rates = []
    for samples in (8, 8, 16, 16, 8):
        seen.advance(samples=samples, tokens=0)
        optimizer.step()
        scheduler.step()
        rates.append(scheduler.get_last_lr()[0])
    decays = [0.9, 0.8, 0.6, 0.4, 0.3]
    expected = [2 * d * f for d, f in zip(decays, [1, 1, 4, 4, 0.5], strict=True)]
    assert rates == pytest.approx(expected)
    on_clock.detach()
    assert scheduler.lr_lambdas[0](5) == 0.5  # its own again, of steps, without a factor


def test_a_resumed_rate_has_its_factor() -> None:
    optimizer = torch.optim.SGD(weights(), lr=2.0)
    scheduler = LambdaLR(optimizer, lambda step: 1 - step / 10)
    seen = clock()
    on_clock = LearningRateOnClock(scheduler, seen, lambda: 3.0)
    seen.advance(samples=40, tokens=0)
    on_clock.align()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(2 * 0.5 * 3)
    assert scheduler.get_last_lr() == [pytest.approx(3.0)]


def test_a_schedule_that_goes_on_from_the_rate_before_takes_no_factor() -> None:
    scheduler = StepLR(torch.optim.SGD(weights(), lr=1.0), step_size=1)
    message = refusal(lambda: LearningRateOnClock(scheduler, clock(), lambda: 1.0))
    assert "(StepLR)" in message
    LearningRateOnClock(scheduler, clock())


@pytest.mark.parametrize(("beta2", "steps", "too_large"), [(0.999, 100, 1.9), (0.95, 25, 1.5)])
def test_adam_s_step_after_a_change_of_beta2_is_too_large_by_as_much_as_documented(
    beta2: float, steps: int, too_large: float
) -> None:
    """The gradient is 1 throughout, so that every step of an unchanged Adam has the size 1."""
    weight = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    small = beta2_at(beta2, 0.25)
    optimizer = torch.optim.Adam([weight], lr=1.0, betas=(0.9, small), eps=0.0)
    moved = []
    for step in range(steps + 1):
        if step == steps:
            optimizer.param_groups[0]["betas"] = (0.9, beta2)
        before = weight.item()
        weight.grad = torch.ones_like(weight)
        optimizer.step()
        moved.append(before - weight.item())
    assert moved[:-1] == pytest.approx([1.0] * steps)
    assert round(moved[-1], 1) == too_large
