"""TrainingClock: with a constant batch the plain Trainer's counts, with a growing one samples."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from hf_adaptive_batch.apply.clock import TrainingClock


@dataclass(frozen=True)
class Sizes:
    """A dataset and the initial layout of a step."""

    dataset: int
    micro: int
    accumulation: int
    ranks: int

    @property
    def batch(self) -> int:
        return self.micro * self.accumulation * self.ranks

    @property
    def round(self) -> int:
        return self.micro * self.ranks

    def clock(self, budget: int | None = None, **kwargs: float) -> TrainingClock:
        return TrainingClock(
            epoch_samples=self.dataset,
            initial_global_batch_size=self.batch,
            initial_round_size=self.round,
            budget_samples=budget,
            **kwargs,  # type: ignore[arg-type]
        )


SIZES = st.builds(
    Sizes,
    dataset=st.integers(1, 300),
    micro=st.integers(1, 12),
    accumulation=st.integers(1, 6),
    ranks=st.integers(1, 4),
)


@dataclass(frozen=True)
class PlainTrainer:
    """What transformers 5.23 counts: `Trainer.set_initial_training_values` and its epoch loop."""

    sizes: Sizes
    num_train_epochs: float

    @property
    def micro_batches(self) -> int:
        """`len_dataloader`: on each rank."""
        return math.ceil(self.sizes.dataset / self.sizes.round)

    @property
    def steps_per_epoch(self) -> int:
        """`num_update_steps_per_epoch`."""
        accumulation = self.sizes.accumulation
        whole, rest = divmod(self.micro_batches, accumulation)
        return max(whole + int(rest > 0), 1)

    @property
    def max_steps(self) -> int:
        return math.ceil(self.num_train_epochs * self.steps_per_epoch)

    def steps(self) -> Iterator[tuple[int, float]]:
        """The samples of every step, and `state.epoch` after it."""
        for step in range(self.max_steps):
            epoch, index = divmod(step, self.steps_per_epoch)
            begin = index * self.sizes.batch
            samples = min(self.sizes.batch, self.sizes.dataset - begin)
            micro_batch = min((index + 1) * self.sizes.accumulation, self.micro_batches) - 1
            yield samples, epoch + (micro_batch + 1) / self.micro_batches


def run_through(clock: TrainingClock, size: int) -> list[int]:
    """Train at one size to the end of the budget; the samples of every step."""
    taken = []
    while not clock.finished:
        samples = min(size, clock.epoch_limit - clock.epoch_offset)
        assert samples > 0
        clock.advance(samples=samples, tokens=0)
        taken.append(samples)
    return taken


# ------------------------------------------------------------------- a constant batch: as Trainer


@given(SIZES, st.floats(0.1, 4))
def test_with_a_constant_batch_everything_is_what_the_plain_trainer_counts(
    sizes: Sizes, epochs: float
) -> None:
    """Bitwise: no tolerance anywhere."""
    plain = PlainTrainer(sizes, epochs)
    budget = TrainingClock.samples_in_initial_steps(
        plain.max_steps, epoch_samples=sizes.dataset, initial_global_batch_size=sizes.batch
    )
    clock = sizes.clock(budget)
    assert clock.initial_steps_per_epoch == plain.steps_per_epoch
    assert clock.total_initial_steps == plain.max_steps
    assert clock.remaining_steps(sizes.batch) == plain.max_steps
    for step, (samples, epoch) in enumerate(plain.steps(), start=1):
        assert not clock.finished
        assert min(sizes.batch, clock.epoch_limit - clock.epoch_offset) == samples
        assert clock.epoch_after(samples) == epoch
        clock.advance(samples=samples, tokens=0)
        assert clock.steps == clock.initial_steps == step
        assert clock.epoch == epoch
        assert clock.remaining_steps(sizes.batch) == plain.max_steps - step
    assert clock.finished
    assert clock.samples_seen == budget


def test_counting_the_short_step_by_its_samples_would_not_be_what_the_trainer_counts() -> None:
    sizes = Sizes(dataset=10, micro=4, accumulation=1, ranks=1)
    clock = sizes.clock(30)
    assert clock.total_initial_steps == PlainTrainer(sizes, 3).max_steps == 9
    assert math.ceil(30 / sizes.batch) == 8


@given(SIZES, st.integers(0, 500))
def test_the_samples_of_initial_steps_are_those_that_the_steps_train_on(
    sizes: Sizes, steps: int
) -> None:
    plain = PlainTrainer(sizes, steps / PlainTrainer(sizes, 1).steps_per_epoch)
    assume(plain.max_steps == steps)  # the quotient may round up
    found = TrainingClock.samples_in_initial_steps(
        steps, epoch_samples=sizes.dataset, initial_global_batch_size=sizes.batch
    )
    assert found == sum(samples for samples, _ in plain.steps())


# ------------------------------------------------------------------------- a batch that changes

GROWTH = st.lists(st.integers(1, 40), min_size=1, max_size=6)


@given(SIZES, st.integers(1, 900), GROWTH)
def test_any_batches_use_up_the_budget_exactly_and_end_every_epoch(
    sizes: Sizes, budget: int, batches: list[int]
) -> None:
    clock = sizes.clock(budget)
    ends, progress = [], []
    while not clock.finished:
        size = batches[min(clock.steps // 3, len(batches) - 1)]
        samples = min(size, clock.epoch_limit - clock.epoch_offset)
        assert samples > 0
        before = clock.epoch_index
        expected = clock.epoch_after(samples)
        clock.advance(samples=samples, tokens=2 * samples)
        progress.append((clock.initial_steps, clock.epoch, clock.samples_seen))
        assert clock.epoch == expected
        assert clock.initial_steps <= clock.total_initial_steps
        if clock.epoch_index > before:
            ends.append(clock.samples_seen)
            # Whole epochs are whole numbers, whatever the batch was.
            assert clock.epoch == clock.epoch_index == before + 1
            assert clock.initial_steps == clock.epoch_index * clock.initial_steps_per_epoch
    assert clock.samples_seen == budget
    assert clock.tokens_seen == 2 * budget
    assert ends == list(range(sizes.dataset, budget + 1, sizes.dataset))
    assert all(low < high for low, high in pairwise(progress))
    assert clock.remaining_steps(1) == 0


@given(SIZES, st.integers(1, 900), st.integers(1, 40), st.integers(1, 40), st.integers(0, 10))
def test_the_remaining_steps_are_those_that_are_then_taken(
    sizes: Sizes, budget: int, first: int, size: int, steps: int
) -> None:
    clock = sizes.clock(budget)
    for _ in range(steps):
        if not clock.finished:
            clock.advance(samples=min(first, clock.epoch_limit - clock.epoch_offset), tokens=0)
    remaining = clock.remaining_steps(size)
    assert len(run_through(clock, size)) == remaining


def test_a_grown_batch_moves_the_clock_by_its_samples() -> None:
    clock = Sizes(dataset=100, micro=2, accumulation=2, ranks=1).clock(200)
    clock.advance(samples=4, tokens=0)
    assert (clock.steps, clock.initial_steps, clock.epoch) == (1, 1, 0.04)
    clock.advance(samples=10, tokens=0)
    assert (clock.steps, clock.initial_steps, clock.epoch) == (2, 3.5, 0.14)
    clock.advance(samples=86, tokens=0)
    assert (clock.steps, clock.initial_steps, clock.epoch) == (3, 25, 1)
    assert (clock.epoch_index, clock.epoch_offset) == (1, 0)


def test_the_limit_of_the_last_epoch_is_where_the_budget_ends() -> None:
    clock = Sizes(dataset=10, micro=4, accumulation=1, ranks=1).clock(25)
    assert run_through(clock, 4) == [4, 4, 2, 4, 4, 2, 4, 1]
    clock = Sizes(dataset=10, micro=4, accumulation=1, ranks=1).clock(25)
    clock.advance(samples=20, tokens=0)
    assert clock.epoch_limit == 5


# ------------------------------------------------------------------------------ a token budget


def token_clock(budget: int = 1000, tokens_per_sample: float = 10.0) -> TrainingClock:
    return TrainingClock(
        epoch_samples=30,
        initial_global_batch_size=4,
        initial_round_size=2,
        budget_tokens=budget,
        tokens_per_sample=tokens_per_sample,
    )


def test_a_token_budget_counts_initial_steps_in_tokens() -> None:
    clock = token_clock()
    assert clock.total_initial_steps == 25  # 40 tokens each
    clock.advance(samples=4, tokens=60)
    assert clock.initial_steps == 1.5
    assert clock.remaining_steps(4) == math.ceil(940 / 40)
    assert clock.remaining_steps(8) == math.ceil(940 / 80)
    assert clock.epoch == 4 / 30


def test_a_token_budget_ends_with_the_step_that_reaches_it() -> None:
    clock = token_clock()
    clock.advance(samples=99, tokens=999)
    assert not clock.finished
    assert clock.remaining_steps(10**6) == 1  # never none while there is something left
    clock.advance(samples=1, tokens=1)
    assert clock.finished
    assert clock.remaining_steps(1) == 0
    assert clock.initial_steps == clock.total_initial_steps


@given(st.lists(st.integers(0, 90), min_size=30, max_size=60), st.integers(1, 1000))
def test_token_progress_never_goes_back_and_ends(lengths: list[int], budget: int) -> None:
    clock = token_clock(budget)
    before = 0.0
    for tokens in lengths:
        if clock.finished:
            break
        clock.advance(samples=4, tokens=tokens)
        assert clock.initial_steps >= before
        before = clock.initial_steps
    assert clock.finished == (clock.tokens_seen >= budget)
    assert clock.tokens_seen < budget + 90


def test_a_token_budget_does_not_limit_the_epoch() -> None:
    clock = token_clock(budget=50)
    assert clock.epoch_limit == 30


# -------------------------------------------------------------------------- state and bad input


def test_the_state_is_plain_json_and_goes_on_exactly_where_it_was() -> None:
    sizes = Sizes(dataset=10, micro=2, accumulation=2, ranks=1)
    clock, resumed = sizes.clock(25), sizes.clock(25)
    for samples in (4, 6, 3):
        clock.advance(samples=samples, tokens=7 * samples)
    assert resumed != clock
    resumed.load_state_dict(json.loads(json.dumps(clock.state_dict())))
    assert resumed == clock
    assert run_through(resumed, 4) == run_through(clock, 4) == [4, 3, 4, 1]


def test_loading_keeps_the_configured_budget_and_batch() -> None:
    saved = Sizes(dataset=10, micro=2, accumulation=2, ranks=1).clock(25)
    saved.advance(samples=4, tokens=9)
    clock = Sizes(dataset=10, micro=1, accumulation=2, ranks=1).clock(40)
    clock.load_state_dict(saved.state_dict())
    assert (clock.steps, clock.samples_seen, clock.tokens_seen) == (1, 4, 9)
    assert (clock.budget_samples, clock.initial_global_batch_size) == (40, 2)
    assert clock.initial_steps == 2


@pytest.mark.parametrize("version", [0, 1, 3, None])
def test_a_state_of_another_version_is_refused(version: int | None) -> None:
    clock = Sizes(dataset=10, micro=2, accumulation=2, ranks=1).clock(25)
    state = clock.state_dict() | {"version": version}
    with pytest.raises(ValueError, match=rf"version \({version}\) of the clock state must be 2"):
        clock.load_state_dict(state)


def test_a_state_of_another_dataset_is_refused() -> None:
    state = Sizes(dataset=11, micro=2, accumulation=2, ranks=1).clock(25).state_dict()
    clock = Sizes(dataset=10, micro=2, accumulation=2, ranks=1).clock(25)
    with pytest.raises(
        ValueError, match=r"train_dataset \(10 samples an epoch\) must be .* \(11 samples"
    ):
        clock.load_state_dict(state)
    assert clock.steps == 0


@pytest.mark.parametrize(
    ("budgets", "message"),
    [
        (
            {},
            r"budget_samples .* and budget_steps \(None\): exactly one must be given",
        ),
        (
            {"budget_samples": 5, "budget_tokens": 6},
            r"budget_samples \(5\), budget_tokens \(6\) and .*: exactly one must be given",
        ),
        ({"budget_tokens": 6}, r"tokens_per_sample \(0\.0\) must be above 0"),
        ({"budget_tokens": 6, "tokens_per_sample": -1.0}, r"tokens_per_sample \(-1\.0\) must be"),
    ],
    ids=["no budget", "two budgets", "no tokens", "negative tokens"],
)
def test_a_budget_that_cannot_be_counted_is_refused(budgets: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainingClock(
            epoch_samples=10, initial_global_batch_size=4, initial_round_size=4, **budgets
        )
