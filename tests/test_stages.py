"""Stages: how they are written, which size a step takes at each boundary, and what is refused."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_adaptive_batch.decide.schedule import Unit
from hf_adaptive_batch.decide.stages import Duration, Stage, Stages, paper_stages, parse_stages
from tests import reference_schedules as reference
from tests.reference_schedules import refusal


# -------------------------------------------------------------------------------------- durations


@pytest.mark.parametrize(
    ("text", "value", "unit"),
    [
        ("0", 0, Unit.TOKENS),
        ("250", 250, Unit.TOKENS),
        ("250M", 250_000_000, Unit.TOKENS),
        ("250Mtokens", 250_000_000, Unit.TOKENS),
        ("2.5B", 2_500_000_000, Unit.TOKENS),
        ("1T", 10**12, Unit.TOKENS),
        ("4Ksamples", 4000, Unit.SAMPLES),
        ("4samples", 4, Unit.SAMPLES),
        ("100steps", 100, Unit.STEPS),
        ("1.5Ksteps", 1500, Unit.STEPS),
        ("100%", 1, Unit.BUDGET),
        ("2.5%", 0.025, Unit.BUDGET),
        (".5%", 0.005, Unit.BUDGET),
        ("5.%", 0.05, Unit.BUDGET),
        ("0%", 0, Unit.BUDGET),
    ],
)
def test_a_duration_is_a_number_a_multiple_and_a_unit(text: str, value: float, unit: Unit) -> None:
    assert Duration.parse(text) == Duration(pytest.approx(value, rel=1e-15), unit)


@given(
    number=st.integers(0, 10**6),
    multiple=st.sampled_from(["", "K", "M", "B", "T"]),
    word=st.sampled_from(["", "tokens", "samples", "steps"]),
)
def test_a_multiple_is_a_power_of_a_thousand(number: int, multiple: str, word: str) -> None:
    value, unit = Duration.parse(f"{number}{multiple}{word}")
    zeros = {"": "", "K": "000", "M": "000000", "B": "000000000", "T": "000000000000"}
    assert value == int(f"{number}{zeros[multiple]}")
    assert unit.value == (word or "tokens")


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "M",
        "%",
        "tokens",
        "-5",
        "+5",
        "nan",
        "inf",
        "1e9",
        "1_000",
        "1,5K",
        "5 M",
        "5k",
        "5m",
        "5G",
        "5KM",
        "5tokenK",
        "5Tokens",
        "5token",
        "5epochs",
        "5hours",
        "5%%",
        "5K%",
        "5%tokens",
        "5tokens%",
        "five",
        "5.5.5",
        ".",
        "0x10",
        "5\n",
    ],
)
def test_a_duration_with_an_unknown_unit_or_without_a_number_is_refused(text: str) -> None:
    message = refusal(lambda: Duration.parse(text))
    assert f"duration ({text!r})" in message
    for word in ("tokens", "samples", "steps", "%"):
        assert word in message


# ------------------------------------------------------------------------------------ the grammar


def test_stages_are_written_as_in_megatron() -> None:
    schedule = parse_stages("0:768 250M:1536 500M:3072")
    expected = ((0, 768), (250_000_000, 1536), (500_000_000, 3072))
    assert schedule == Stages(tuple(Stage(*pair) for pair in expected), Unit.TOKENS)


@pytest.mark.parametrize(
    "text",
    ["0:8 4K:16", "0:8,4K:16", " 0:8 ,  4K:16,", "0:8\n4K:16", "0:8\t4000:16", "0tokens:8 4K:16"],
)
def test_stages_are_separated_by_spaces_or_commas(text: str) -> None:
    assert parse_stages(text) == Stages((Stage(0, 8), Stage(4000, 16)), Unit.TOKENS)


UNITS = {Unit.TOKENS: "", Unit.SAMPLES: "samples", Unit.STEPS: "steps", Unit.BUDGET: "%"}


@pytest.mark.parametrize("unit", Unit)
@pytest.mark.parametrize("first", ["0", "00", "with its unit"])
@pytest.mark.parametrize(
    ("at", "size"),
    [(0, 8), (1, 8), (9, 8), (10, 16), (11, 16), (49, 16), (50, 24), (51, 24), (99, 24), (100, 24)],
)
def test_a_step_takes_the_size_of_the_stage_that_it_begins_in(
    unit: Unit, first: str, at: int, size: int
) -> None:
    word = UNITS[unit]
    start = f"0{word}" if first == "with its unit" else first
    schedule = parse_stages(f"{start}:8 10{word}:16 50{word}:24")
    assert schedule.unit is unit
    assert schedule.size_at(at / 100 if unit is Unit.BUDGET else at) == size


def test_a_stage_begins_exactly_at_its_start_and_not_a_sample_before() -> None:
    schedule = parse_stages("0:8 1Msamples:16")
    assert schedule.size_at(999_999) == 8
    assert schedule.size_at(999_999.999) == 8
    assert schedule.size_at(1_000_000) == 16


def test_a_single_stage_is_a_constant_batch() -> None:
    schedule = parse_stages("0:8")
    assert not schedule.can_change
    assert schedule.size_at(0) == schedule.size_at(10**12) == 8


@pytest.mark.parametrize(
    ("text", "can_change"), [("0:8 10:8", False), ("0:8 10:16", True), ("0:16 10:8", True)]
)
def test_stages_can_change_exactly_if_there_are_two_sizes(text: str, can_change: bool) -> None:
    assert parse_stages(text).can_change is can_change


@given(
    sizes=st.lists(st.integers(1, 10**6), min_size=1, max_size=6),
    gaps=st.lists(st.integers(1, 10**9), min_size=5, max_size=5),
    word=st.sampled_from(["tokens", "samples", "steps"]),
    progress=st.integers(0, 6 * 10**9),
)
def test_any_stages_that_are_written_are_read(
    sizes: list[int], gaps: list[int], word: str, progress: int
) -> None:
    starts = [sum(gaps[:index]) for index in range(len(sizes))]
    pairs = list(zip(starts, sizes, strict=True))
    schedule = parse_stages(" ".join(f"{start}{word}:{size}" for start, size in pairs))
    assert [tuple(stage) for stage in schedule.stages] == pairs
    size = sizes[0]
    for start, later in pairs:
        if progress >= start:
            size = later
    assert schedule.size_at(progress) == size


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "(None)"),
        (",", "(None)"),
        (":", "stage (':')"),
        ("0:", "stage ('0:')"),
        (":8", "duration ('')"),
        ("8", "stage ('8')"),
        ("5:8", "start of the first stage (5.0)"),
        ("5%:8", "start of the first stage (0.05)"),
        ("0:8 8", "stage ('8')"),
        ("0:8,8", "stage ('8')"),
        ("0:8:16", "stage ('0:8:16')"),
        ("0: 8", "stage ('0:')"),
        ("0:8;100:16", "stage ('0:8;100:16')"),
        ("0:8.0", "stage ('0:8.0')"),
        ("0:8 10:1K", "stage ('10:1K')"),
        ("0:8 10:-4", "stage ('10:-4')"),
        ("0:+8", "stage ('0:+8')"),
        ("0:8_0", "stage ('0:8_0')"),
        ("0:²", "stage ('0:²')"),
        ("0:8 100 steps:16", "stage ('100')"),
        ("0:8 5k:16", "duration ('5k')"),
        ("0:8 5epochs:16", "duration ('5epochs')"),
        ("0:8 -5:16", "duration ('-5')"),
        ("0:8 5K:16 5000:32", "start of a stage (5000 tokens)"),  # overlapping
        ("0:8 10:16 5:32", "start of a stage (5 tokens)"),  # unsorted
        ("0:8 10samples:16 5samples:32", "start of a stage (5 samples)"),
        ("0:8 0:16", "start of a stage (0"),
        ("0:8 5%:16 100:32", "units of the stages (budget, tokens)"),
        ("0:8 5samples:16 6steps:4", "units of the stages (samples, steps)"),
        ("0%:8 100:16", "units of the stages (budget, tokens)"),
        ("0steps:8 100samples:16", "units of the stages (samples, steps)"),
        pytest.param(
            "0:0",
            "size of a stage (0)",
        ),
        pytest.param(
            "0:8 100:0",
            "size of a stage (0)",
        ),
        pytest.param(
            "0:8 100%:16",
            "start of the last stage (100%)",
        ),
        pytest.param(
            "0:8 150%:16",
            "start of the last stage (150%)",
        ),
        pytest.param(
            "0:8 100.1%:16",
            "start of the last stage (100.1%)",
        ),
        pytest.param(
            "0:8 10:" + "9" * 5000,
            "stage ('10:999",
        ),
        pytest.param(
            "0:8 10:9999999999999999999999",
            "size of a stage",
        ),
        pytest.param(
            "0:8 " + "9" * 400 + ":16",
            "duration",
        ),
        pytest.param(
            "0:٣",
            "stage ('0:٣')",
        ),
    ],
    ids=lambda value: value[:30],
)
def test_stages_that_are_written_otherwise_are_refused(text: str, said: str) -> None:
    assert said in refusal(lambda: parse_stages(text))


@pytest.mark.parametrize("text", ["0.0:8 10steps:16", "0.:8 10steps:16", "0K:8 10steps:16"])
def test_a_zero_without_a_unit_is_a_zero_in_every_unit(text: str) -> None:
    assert parse_stages(text).unit is Unit.STEPS


@pytest.mark.parametrize(
    ("stages", "said"),
    [
        ((), "(None)"),
        ((Stage(1, 8),), "(1)"),
        ((Stage(0, 8), Stage(10, 16), Stage(10, 32)), "start of a stage (10 steps)"),
        ((Stage(0, 8), Stage(10, 16), Stage(5, 32)), "start of a stage (5 steps)"),
    ],
)
def test_stages_made_in_python_are_checked_as_well(stages: tuple[Stage, ...], said: str) -> None:
    assert said in refusal(lambda: Stages(stages, Unit.STEPS))


# -------------------------------------------------------------------------------- Lau et al. 2025


BUDGET = 2_000_000  # sequences


def test_the_paper_s_stages_are_a_quarter_a_half_and_all() -> None:
    schedule = paper_stages(8192)
    assert schedule.unit is Unit.BUDGET
    assert schedule.size_at(0) == 2048
    assert {stage.size for stage in schedule.stages} == {2048, 4096, 8192}


@pytest.mark.parametrize(
    ("samples", "size"),
    [
        (0, 2048),
        (1, 2048),
        (49_999, 2048),
        (50_000, 4096),  # 2.5 % of the samples
        (50_001, 4096),
        (99_999, 4096),
        (100_000, 8192),
        (100_001, 8192),
        (1_999_999, 8192),
        (2_000_000, 8192),
    ],
)
def test_the_paper_s_stages_change_at_their_share_of_the_samples(samples: int, size: int) -> None:
    assert paper_stages(8192).size_at(samples / BUDGET) == size
    assert reference.lau_stages(samples, max_samples=BUDGET, largest=8192) == size


def test_the_paper_s_stages_take_269_steps() -> None:
    """25 of 2048, 12 of 4096 and 232 of 8192, the last of which is short."""
    schedule = paper_stages(8192)
    assert schedule.steps_for(BUDGET, 1 / BUDGET) == 269

    def theirs(samples: float) -> int:
        return reference.lau_stages(samples, max_samples=BUDGET, largest=8192)

    assert reference.steps_to(BUDGET, theirs, unit="samples") == 269
    sizes = [size for _, size in reference.walk(theirs, unit="samples", steps=269, per_sample=1)]
    assert [sizes.count(size) for size in (2048, 4096, 8192)] == [25, 12, 232]
    assert [step.size for step, _ in zip(schedule.steps(1 / BUDGET), range(269), strict=False)] == (
        sizes
    )


def test_the_same_stages_written_out_are_the_paper_s() -> None:
    assert parse_stages("0:2048 2.5%:4096 5%:8192").stages == paper_stages(8192).stages


@pytest.mark.parametrize("largest", [-4, 0, 1, 2, 3, 5, 6, 8190])
def test_a_largest_batch_without_a_quarter_is_refused(largest: int) -> None:
    assert f"max_global_batch_size ({largest})" in refusal(lambda: paper_stages(largest))


@pytest.mark.parametrize("text", ["16.1K", "4.03M", "32.2K", "0.29T"])
def test_a_duration_is_the_number_that_was_written(text: str) -> None:
    """As floats 16.1 x 1000 is above 16100, and a stage would begin a step late."""
    multiple = {"K": 10**3, "M": 10**6, "T": 10**12}[text[-1]]
    whole = round(Fraction(text[:-1]) * multiple)
    assert Duration.parse(text).value == whole
    schedule = parse_stages(f"0samples:10 {text}samples:20")
    assert [schedule.size_at(at) for at in (whole - 1, whole)] == [10, 20]


def test_a_float_product_would_be_another_number() -> None:
    assert 16.1 * 1000 != 16100
