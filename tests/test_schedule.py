"""Open-loop schedules as values: tables, properties, published step counts, and bad input."""

import dataclasses
import math
from itertools import islice, pairwise, takewhile
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_adaptive_batch.decide.controllers import Observation, Reason, ScheduledController
from hf_adaptive_batch.decide.schedule import (
    BatchSchedule,
    LinearRamp,
    PowerLaw,
    Unit,
    check_cap,
    round_up,
)
from hf_adaptive_batch.decide.seesaw import Seesaw
from hf_adaptive_batch.decide.stages import Stage, Stages
from hf_adaptive_batch.schedule_arguments import ScheduleOptions
from tests import reference_schedules as reference
from tests.reference_schedules import refusal


EVERY_UNIT = pytest.mark.parametrize("unit", Unit)


def ramp(**changes: Any) -> LinearRamp:
    given_ = {"first_size": 8, "last_size": 16, "length": 80.0, "unit": Unit.SAMPLES}
    return LinearRamp(**{**given_, **changes})


def law(**changes: Any) -> PowerLaw:
    given_ = {"coefficient": 2.0, "exponent": 0.5, "first_size": 4, "max_size": 16}
    return PowerLaw(**{**given_, **changes})


# ------------------------------------------------------------------------------------- tables


@EVERY_UNIT
@pytest.mark.parametrize(
    ("progress", "size"),
    [
        (0, 8),  # the first step is the first size
        (1, 9),  # any progress at all is rounded up
        (9, 9),
        (10, 9),  # exactly on the line: 8 + 10/80 x 8
        (11, 10),
        (39, 12),
        (40, 12),
        (41, 13),
        (70, 15),
        (71, 16),
        (79, 16),
        (80, 16),  # the end
        (81, 16),
        (10**9, 16),
    ],
)
def test_a_linear_ramp_is_rounded_up_at_each_boundary(unit: Unit, progress: int, size: int) -> None:
    assert ramp(unit=unit).size_at(progress) == size
    exact = 8 + min(progress * 10, 800) / 100  # in hundredths, without a division before
    assert size == math.ceil(exact)


@pytest.mark.parametrize("percent", range(101))
def test_a_rounding_error_above_a_whole_size_does_not_count(percent: int) -> None:
    """0.07 / 0.7 x 10 is 1.0000000000000002 in floats."""
    tenth = ramp(first_size=0 + 10, last_size=20, length=1.0, unit=Unit.BUDGET)
    assert tenth.size_at(percent / 100) == 10 + -(-percent // 10)
    seventh = ramp(first_size=10, last_size=20, length=0.7, unit=Unit.BUDGET)
    assert seventh.size_at(0.07) == 11


@pytest.mark.parametrize(
    ("size", "rounded"), [(8, 8), (8.0, 8), (8 + 1e-12, 8), (8.001, 9), (8.999, 9), (0, 0)]
)
def test_sizes_are_rounded_up_to_whole_samples(size: float, rounded: int) -> None:
    assert round_up(size) == rounded
    assert isinstance(round_up(size), int)


@EVERY_UNIT
@pytest.mark.parametrize(
    ("progress", "size"),
    [
        (0, 4),  # the law says 0: the first size
        (3, 4),  # 3.46
        (4, 4),  # exactly 4
        (5, 5),  # 4.47
        (8, 6),  # 5.66
        (9, 6),  # exactly 6
        (10, 7),  # 6.32
        (56, 15),  # 14.97
        (63, 16),  # 15.87
        (64, 16),  # exactly the largest
        (65, 16),
        (10**12, 16),
    ],
)
def test_a_power_law_is_rounded_up_between_its_sizes(unit: Unit, progress: int, size: int) -> None:
    assert law(unit=unit).size_at(progress) == size
    assert size == min(max(math.ceil(2 * math.sqrt(progress)), 4), 16)


def test_a_power_law_follows_its_exponent() -> None:
    steep = law(coefficient=0.5, exponent=2.0, first_size=1, max_size=10**6)
    assert [steep.size_at(at) for at in (1, 2, 3, 10)] == [1, 2, 5, 50]


def test_a_schedule_that_has_no_room_cannot_change() -> None:
    assert not ramp(last_size=8).can_change
    assert ramp(last_size=9).can_change
    assert not law(max_size=4).can_change
    assert law(max_size=5).can_change


def test_schedules_are_values() -> None:
    assert ramp() == ramp()
    assert hash(law()) == hash(law())
    assert ramp() != ramp(unit=Unit.TOKENS)
    with pytest.raises(dataclasses.FrozenInstanceError):
        ramp().length = 1.0  # type: ignore[misc]


# --------------------------------------------------------------------------------- properties


def sizes_in(low: int, high: int) -> st.SearchStrategy[int]:
    return st.integers(low, high)


@st.composite
def growing(draw: st.DrawFn) -> BatchSchedule:
    """Schedules whose size never falls."""
    unit = draw(st.sampled_from(Unit))
    scale = 1.0 if unit is Unit.BUDGET else draw(st.sampled_from([20.0, 333.0, 5000.0]))
    first = draw(sizes_in(1, 40))
    last = first + draw(sizes_in(0, 100))
    match draw(st.sampled_from(["ramp", "law", "seesaw", "stages"])):
        case "ramp":
            length = scale * draw(st.floats(0.05, 2))
            return LinearRamp(first_size=first, last_size=last, length=length, unit=unit)
        case "law":
            exponent = draw(st.floats(0.1, 2))
            coefficient = draw(st.floats(0.1, 50))
            return PowerLaw(
                coefficient=coefficient,
                exponent=exponent,
                first_size=first,
                max_size=last,
                unit=unit,
            )
        case "seesaw":
            alpha = draw(st.none() | st.floats(1.01, 4))
            fall = draw(st.sampled_from([reference.quarter_cosine, reference.linear_to_zero]))
            return Seesaw(reference=fall, first_size=first, max_size=last, alpha=alpha)
        case _:
            starts = sorted({draw(st.floats(0.01, 0.99)) for _ in range(3)})
            rises = sorted(draw(sizes_in(first, last)) for _ in starts)
            later = (Stage(scale * at, size) for at, size in zip(starts, rises, strict=True))
            return Stages((Stage(0.0, first), *later), unit)


@st.composite
def walks(draw: st.DrawFn) -> tuple[BatchSchedule, float, int]:
    """A schedule, the progress of a sample, and samples in a micro-batch of all ranks."""
    schedule = draw(growing())
    if schedule.unit is Unit.BUDGET:
        per_sample = 1 / draw(st.integers(50, 3000))
    elif schedule.unit is Unit.TOKENS:
        per_sample = draw(st.floats(1, 64))
    else:
        per_sample = 1.0
    return schedule, per_sample, draw(st.sampled_from([1, 3, 8]))


@given(walks(), st.integers(0, 40))
def test_a_step_begins_where_the_sizes_before_it_end(
    drawn: tuple[BatchSchedule, float, int], step: int
) -> None:
    schedule, per_sample, multiple = drawn

    def feasible(size: int) -> int:
        return reference.up_to_multiple(size, multiple)

    naive = reference.walk(
        lambda at: feasible(schedule.size_at(at)),
        unit=schedule.unit.value,
        steps=step + 1,
        per_sample=per_sample,
    )
    walked = list(islice(schedule.steps(per_sample, feasible), step + 1))
    assert [(begun.progress, begun.size) for begun in walked] == naive
    assert schedule.progress_at(step, per_sample, feasible) == naive[-1][0]
    assert walked[-1].samples == sum(size for _, size in naive[:-1])


@given(walks(), st.integers(1, 40))
def test_the_steps_for_so_many_samples_are_the_inverse_of_where_a_step_begins(
    drawn: tuple[BatchSchedule, float, int], step: int
) -> None:
    schedule, per_sample, multiple = drawn

    def feasible(size: int) -> int:
        return reference.up_to_multiple(size, multiple)

    begun = next(islice(schedule.steps(per_sample, feasible), step, None)).samples
    assert schedule.steps_for(begun, per_sample, feasible) == step
    assert schedule.steps_for(begun - 0.5, per_sample, feasible) == step  # a short last one counts
    assert schedule.steps_for(begun + 1, per_sample, feasible) == step + 1
    if schedule.unit is not Unit.STEPS:
        progress = schedule.progress_at(step, per_sample, feasible)
        assert round(progress / per_sample) == begun


@given(growing(), st.floats(0, 1), st.floats(0, 1))
def test_a_size_does_not_fall_with_progress(
    schedule: BatchSchedule, one: float, other: float
) -> None:
    scale = 1 if schedule.unit is Unit.BUDGET else 12_000
    early, late = sorted((one, other))
    assert schedule.size_at(scale * early) <= schedule.size_at(scale * late)


@given(growing(), st.floats(0, 1))
def test_a_size_is_a_whole_one_between_the_first_and_the_last(
    schedule: BatchSchedule, share: float
) -> None:
    scale = 1 if schedule.unit is Unit.BUDGET else 12_000
    size = schedule.size_at(scale * share)
    assert isinstance(size, int)
    assert schedule.size_at(0) <= size <= schedule.size_at(scale)
    sizes = {schedule.size_at(scale * index / 50) for index in range(51)}
    assert schedule.can_change or len(sizes) == 1


def test_no_samples_take_no_step() -> None:
    assert ramp().steps_for(0) == 0
    assert ramp().progress_at(0) == 0
    assert ramp().steps_for(8) == 1
    assert ramp().steps_for(9) == 2


def test_steps_are_counted_as_steps_whatever_a_sample_is_worth() -> None:
    by_steps = ramp(length=4.0, unit=Unit.STEPS)
    walked = list(islice(by_steps.steps(per_sample=512.0), 6))
    assert [begun.progress for begun in walked] == [0, 1, 2, 3, 4, 5]
    assert [begun.size for begun in walked] == [8, 10, 12, 14, 16, 16]
    assert [begun.samples for begun in walked] == [0, 8, 18, 30, 44, 60]


# ------------------------------------------------------------------------- the loop it controls


UNITS_OF_OBSERVATIONS = {
    Unit.SAMPLES: "samples_seen",
    Unit.TOKENS: "tokens_seen",
    Unit.STEPS: "steps",
    Unit.BUDGET: "budget_share",
}


@EVERY_UNIT
def test_the_controller_looks_at_the_progress_of_its_unit_alone(unit: Unit) -> None:
    schedule = Stages((Stage(0, 8), Stage(0.5, 24)), unit)
    controller = ScheduledController(schedule=schedule, max_global_batch_size=24)
    before = Observation(samples_seen=0, global_batch_size=8, test=None)
    assert controller.decide(before).global_batch_size == 8
    for other, name in UNITS_OF_OBSERVATIONS.items():
        after = dataclasses.replace(before, **{name: 1})
        expected = 24 if other is unit else 8
        assert controller.decide(after).global_batch_size == expected


@given(walks(), st.integers(2, 30))
def test_the_controller_trains_on_the_sizes_that_the_schedule_predicts(
    drawn: tuple[BatchSchedule, float, int], steps: int
) -> None:
    schedule, per_sample, multiple = drawn

    def feasible(size: int) -> int:
        return reference.up_to_multiple(size, multiple)

    controller = ScheduledController(schedule=schedule, max_global_batch_size=10**6)
    size, samples, trained = feasible(schedule.size_at(0)), 0, []
    for step in range(steps):
        trained.append(size)
        samples += size
        progress = samples * per_sample
        seen = Observation(
            samples_seen=samples,
            global_batch_size=size,
            test=None,
            tokens_seen=progress,  # type: ignore[arg-type]  # a mean of tokens
            steps=step + 1,
            budget_share=progress,
        )
        decision = controller.decide(seen)
        assert decision.reason is Reason.SCHEDULED
        size = feasible(decision.global_batch_size)
    predicted = [begun.size for begun in islice(schedule.steps(per_sample, feasible), steps)]
    assert trained == predicted


# ------------------------------------------------------------------------- published step counts


def gray_schedule(first: int) -> LinearRamp:
    return LinearRamp(
        first_size=first * reference.GRAY_SEQUENCES,
        last_size=reference.GRAY_FINAL_STEPS * reference.GRAY_SEQUENCES,
        length=reference.GRAY_TOKENS,
        unit=Unit.TOKENS,
    )


def whole_accumulation_steps(size: int) -> int:
    return reference.up_to_multiple(size, reference.GRAY_SEQUENCES)


@pytest.mark.parametrize(
    ("first", "logged", "within_budget"), [(15, 9_035, 9_033), (2, 18_954, 18_953)]
)
def test_the_ramp_of_gray_et_al_takes_as_many_steps_as_their_loop(
    first: int, logged: int, within_budget: int
) -> None:
    """9,035 is what their repository logs for the baseline; theirs goes on after the budget."""
    theirs = reference.gray_accumulation_steps(bs_schedule=first == 2)
    assert len(theirs) == logged
    schedule = gray_schedule(first)
    ours = schedule.steps(reference.GRAY_LENGTH, whole_accumulation_steps)
    begun = list(takewhile(lambda step: step.progress <= reference.GRAY_TOKENS, ours))
    assert len(begun) + 1 == logged
    sizes = [step.size // reference.GRAY_SEQUENCES for step in begun]
    assert sizes == theirs[:-1]  # each of them
    samples = reference.GRAY_TOKENS / reference.GRAY_LENGTH
    steps = schedule.steps_for(samples, reference.GRAY_LENGTH, whole_accumulation_steps)
    assert steps == within_budget


def test_the_ramp_of_gray_et_al_would_take_another_number_of_steps_if_rounded_otherwise() -> None:
    samples = reference.GRAY_TOKENS / reference.GRAY_LENGTH
    down = gray_schedule(2).steps_for(samples, reference.GRAY_LENGTH, lambda size: size // 8 * 8)
    assert down > 18_953 + 500
    assert gray_schedule(2).steps_for(samples, reference.GRAY_LENGTH) not in (down, 18_953)


@pytest.mark.parametrize(("size", "whole", "begun"), [(4096, 488, 489), (8192, 244, 245)])
def test_the_constant_batches_of_lau_et_al_take_the_steps_of_their_budget(
    size: int, whole: int, begun: int
) -> None:
    constant = ramp(first_size=size, last_size=size, length=1.0)
    assert 2_000_000 // size == whole
    assert constant.steps_for(whole * size) == whole
    assert constant.steps_for(2_000_000) == begun  # the short last one included
    assert reference.steps_to(2_000_000, lambda _: size, unit="samples") == begun


# ------------------------------------------------------------------ the fitted law of the defaults


NOTED = {  # a, b and B* as the authors' notebook has them
    "85M": (1293.8, 2.834e6, 745.3),
    "151M": (1752.4, 5.677e6, 955.2),
    "302M": (2095.3, 1.138e7, 1393.7),
    "604M": (2459.9, 1.945e7, 1888.5),
    "1.2B": (3897.3, 4.338e7, 2533.4),
}


@pytest.mark.parametrize("model", NOTED)
def test_the_oracle_refits_the_critical_batch_sizes_of_zhang_et_al(model: str) -> None:
    a, b = reference.fit_steps(reference.ZHANG_STEPS[model][1])
    assert (a, b) == pytest.approx(NOTED[model][:2], rel=5e-4)
    star = reference.critical_batch_size(a, b)
    assert star == pytest.approx(NOTED[model][2], rel=1e-4)
    assert a + b / star == pytest.approx(1.2 * (a + b / 256) * 256 / star)  # its definition


def test_the_oracle_refits_the_published_law_of_parameters() -> None:
    millions = [85, 151, 302, 604, 1200]
    stars = [star for _, star in reference.zhang_points()]
    coefficient, exponent = reference.fit_power_law(millions, stars)
    assert coefficient == pytest.approx(93.20, abs=5e-3)
    assert exponent == pytest.approx(0.468, abs=5e-4)


def test_the_default_law_is_the_fit_to_the_critical_batch_sizes_in_tokens() -> None:
    defaults = {field.name: field.default for field in dataclasses.fields(ScheduleOptions)}
    tokens, stars = zip(*reference.zhang_points(), strict=True)
    in_tokens = [reference.ZHANG_LENGTH * star for star in stars]
    coefficient, exponent = reference.fit_power_law(tokens, in_tokens)
    assert defaults["cbs_exponent"] == pytest.approx(exponent, abs=5e-4)
    assert defaults["cbs_coefficient"] == pytest.approx(coefficient, rel=5e-3)
    fitted = [coefficient * seen**exponent for seen in tokens]
    for seen, star, value in zip(tokens, in_tokens, fitted, strict=True):
        schedule = law(
            coefficient=defaults["cbs_coefficient"],
            exponent=defaults["cbs_exponent"],
            first_size=1,
            max_size=10**9,
        )
        assert schedule.size_at(seen) == pytest.approx(value, rel=3e-3)
        assert schedule.size_at(seen) == pytest.approx(star, rel=0.05)  # the fit's own residuals


# ------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"last_size": 7}, ["last size (7)", "first size (8)"]),
        ({"length": 0.0}, ["length (0.0)"]),
        ({"length": -1.0}, ["length (-1.0)"]),
        ({"length": math.nan}, ["length (nan)"]),
        pytest.param(
            {"first_size": 0},
            ["(0)"],
        ),
        pytest.param(
            {"first_size": -8},
            ["(-8)"],
        ),
        pytest.param(
            {"length": math.inf},
            ["length (inf)"],
        ),
    ],
)
def test_a_ramp_that_cannot_be_is_refused(changes: dict[str, Any], said: list[str]) -> None:
    message = refusal(lambda: ramp(**changes))
    assert all(part in message for part in said)


@pytest.mark.parametrize("name", ["coefficient", "exponent"])
@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_a_law_that_does_not_grow_is_refused(name: str, value: float) -> None:
    assert f"{name} ({value})" in refusal(lambda: law(**{name: value}))


@pytest.mark.parametrize("sizes", [(4, 3), (0, 16), (-1, 16)])
def test_sizes_out_of_order_are_refused(sizes: tuple[int, int]) -> None:
    first, largest = sizes
    message = refusal(lambda: law(first_size=first, max_size=largest))
    assert f"max_global_batch_size ({largest})" in message
    assert f"({first})" in message
    check_cap(4, 4)


def test_a_law_beyond_all_floats_is_capped() -> None:
    assert law(exponent=200.0).size_at(1e9) == 16


def test_sizes_that_fall_would_be_found_out() -> None:
    class Falling(LinearRamp):
        def size_at(self, progress: float) -> int:
            return self.last_size + self.first_size - super().size_at(progress)

    falling = Falling(first_size=8, last_size=16, length=80.0, unit=Unit.SAMPLES)
    sizes = [begun.size for begun in islice(falling.steps(), 20)]
    assert any(after < before for before, after in pairwise(sizes))
