"""Controllers: an observation becomes the wished batch size and the reason for it."""

import math
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

from .criteria import TestResult
from .noise_scale import Measurability
from .schedule import BatchSchedule, Unit


class Reason(StrEnum):
    """Why a decision is what it is. `explanation` says it in a sentence."""

    explanation: str

    def __new__(cls, value: str, explanation: str) -> "Reason":
        """Make a member whose value is the short name that is logged."""
        member = str.__new__(cls, value)
        member._value_ = value
        member.explanation = explanation
        return member

    FIXED = "fixed", "the batch size is constant by configuration"
    SCHEDULED = "scheduled", "the schedule says so for this point of training"
    WARMING_UP = "warming_up", "the batch stays as it is until the warm-up samples have been seen"
    NOT_FINITE = "not_finite", "a loss or a gradient was NaN or infinite; the step was not counted"
    NOT_MEASURED = (
        "not_measured",
        "the step had a single small batch, so no noise could be measured",
    )
    NOT_MEASURABLE_YET = "not_measurable_yet", "too few measured steps, or no gradient at all"
    TEST_PASSED = "test_passed", "the gradient was precise enough for this batch size"
    TEST_FAILED = "test_failed", "the gradient was too noisy for this batch size, so it grows"
    NOISE_DOMINATES = (
        "noise_dominates",
        "no gradient could be told from the noise, so the batch grows",
    )
    AT_CAP = "at_cap", "the test asks for a larger batch than the configured maximum"
    SHRUNK = "shrunk", "a smaller batch would be precise enough, and shrinking is allowed"


@dataclass(frozen=True, kw_only=True)
class BatchDecision:
    """The wished batch of the next step in samples, before it is made feasible, and why.

    Raises:
        ValueError: If the size is not a positive number of samples.
    """

    global_batch_size: int
    reason: Reason

    def __post_init__(self) -> None:
        size: object = self.global_batch_size
        if not isinstance(size, int) or not 1 <= size < 2**63:
            raise ValueError(
                f"global_batch_size ({size!r}) of a decision must be an integer of at least 1, "
                "because it counts samples; round it in the controller."
            )


@dataclass(frozen=True, kw_only=True)
class Observation:
    """What a controller may look at, alike on all ranks.

    Attributes:
        samples_seen: Samples trained on, this step's included.
        global_batch_size: B in samples that the current plan trains on. A short step at the end of
            an epoch does not lower it.
        test: The norm test of this step; None if the step could not be measured.
        finite: False if the step's loss or gradient was NaN or infinite.
        tokens_seen: Tokens trained on, this step's included.
        steps: Optimizer steps done, this one included.
        budget_share: The part of the training budget that is used up, from 0 to 1.
    """

    samples_seen: int
    global_batch_size: int
    test: TestResult | None
    finite: bool = True
    tokens_seen: int = 0
    steps: int = 0
    budget_share: float = 0.0


class BatchController(Protocol):
    """A rule from observations to decisions. Pure: the same observation gives the same decision.

    It is asked after each measured step. One that has a true attribute `open_loop` needs no
    measurement, and is asked after every step.
    """

    @property
    def can_change(self) -> bool:
        """Whether any observation can lead to another batch size."""
        ...

    def measures(self, step: int) -> bool:
        """Whether optimizer step number `step` (the first is 1) is to be measured."""
        ...

    def decide(self, observation: Observation) -> BatchDecision:
        """The wished batch size after a measured step."""
        ...


@dataclass(frozen=True)
class FixedController:
    """A constant batch, so that training equals the plain Trainer's bitwise.

    Args:
        test_interval: Measure every so many steps, for the logs alone; 0 never measures.

    Raises:
        ValueError: If `test_interval` is negative.
    """

    test_interval: int = 0

    def __post_init__(self) -> None:
        if self.test_interval < 0:
            raise ValueError(
                f"test_interval ({self.test_interval}) must be at least 0, because it counts "
                "optimizer steps; use 0 to measure nothing."
            )

    @property
    def can_change(self) -> bool:
        """Never."""
        return False

    def measures(self, step: int) -> bool:
        """Every `test_interval` steps, if that is not 0."""
        return self.test_interval > 0 and step % self.test_interval == 0

    def decide(self, observation: Observation) -> BatchDecision:
        """Keep the size."""
        return BatchDecision(global_batch_size=observation.global_batch_size, reason=Reason.FIXED)


@dataclass(frozen=True, kw_only=True)
class ScheduledController:
    """The batch of an open-loop schedule; measurements are for the logs alone.

    Args:
        schedule: The schedule.
        max_global_batch_size: The cap, in samples.
        test_interval: Measure every so many steps; 0 never measures.

    Raises:
        ValueError: If `test_interval` is negative.
    """

    schedule: BatchSchedule
    max_global_batch_size: int
    test_interval: int = 0
    open_loop: bool = field(default=True, init=False)

    def __post_init__(self) -> None:
        FixedController(self.test_interval)

    @property
    def can_change(self) -> bool:
        """Whether the schedule does."""
        return self.schedule.can_change

    def measures(self, step: int) -> bool:
        """Every `test_interval` steps, if that is not 0."""
        return self.test_interval > 0 and step % self.test_interval == 0

    def decide(self, observation: Observation) -> BatchDecision:
        """The schedule's size for the step that begins where the observed one ended.

        Args:
            observation: The step just done.

        Returns:
            The size within the cap.
        """
        progress = {
            Unit.SAMPLES: observation.samples_seen,
            Unit.TOKENS: observation.tokens_seen,
            Unit.STEPS: observation.steps,
            Unit.BUDGET: observation.budget_share,
        }[self.schedule.unit]
        size = min(self.schedule.size_at(progress), self.max_global_batch_size)
        return BatchDecision(global_batch_size=size, reason=Reason.SCHEDULED)


@dataclass(frozen=True, kw_only=True)
class NormTestController:
    """Grow the batch while a test fails, as for the norm test (Lau et al. 2025, arXiv 2412.21124).

    Args:
        initial_global_batch_size: Samples per step at the start, and the least there will ever be.
        max_global_batch_size: The cap, in samples.
        test_interval: Optimizer steps from one test to the next. The authors' code (AdAdaGrad)
            defaults to 1.
        warmup_samples: No change before so many samples were seen.
        max_growth_factor: A failed test multiplies the batch by at most this, before it is rounded
            up to whole micro-batches. One doubling at a time is the rule of Merrill et al. 2025
            (arXiv 2505.23971); the paper's own step is unbounded.
        monotone: Never shrink, as published. If False, the batch follows the test down as well, at
            most by `max_growth_factor` at a time.

    Raises:
        ValueError: If an argument is out of its range.
    """

    initial_global_batch_size: int
    max_global_batch_size: int
    test_interval: int = 1
    warmup_samples: int = 0
    max_growth_factor: float = 2.0
    monotone: bool = True

    def __post_init__(self) -> None:
        if self.initial_global_batch_size < 1:
            raise ValueError(
                f"initial_global_batch_size ({self.initial_global_batch_size}) must be at least 1, "
                "because a step trains on a sample or more."
            )
        if self.max_global_batch_size < self.initial_global_batch_size:
            raise ValueError(
                f"max_global_batch_size ({self.max_global_batch_size}) must be at least the "
                f"initial global batch ({self.initial_global_batch_size}), because training "
                "starts there; raise the cap, or lower per_device_train_batch_size or "
                "gradient_accumulation_steps."
            )
        if self.test_interval < 1:
            raise ValueError(
                f"test_interval ({self.test_interval}) must be at least 1, because it counts "
                "optimizer steps from test to test; for a constant batch choose the constant "
                "schedule."
            )
        if self.warmup_samples < 0:
            raise ValueError(
                f"warmup_samples ({self.warmup_samples}) must be at least 0, because it counts "
                "samples; use 0 for no warm-up."
            )
        if not (self.max_growth_factor > 1 and math.isfinite(self.max_growth_factor)):
            raise ValueError(
                f"max_growth_factor ({self.max_growth_factor}) must be above 1 and finite, "
                "because a failed test multiplies the batch by it at most; use 2 to double at "
                "most."
            )

    @property
    def can_change(self) -> bool:
        """Whether there is room between the initial size and the cap."""
        return self.max_global_batch_size > self.initial_global_batch_size

    def measures(self, step: int) -> bool:
        """Every `test_interval` steps."""
        return step % self.test_interval == 0

    def decide(self, observation: Observation) -> BatchDecision:
        """Grow towards the batch that would pass; keep the size where nothing can be said.

        Args:
            observation: The step just measured.

        Returns:
            The wished size within [initial, cap] and the reason for it.
        """
        size, test = observation.global_batch_size, observation.test
        if not observation.finite:
            return BatchDecision(global_batch_size=size, reason=Reason.NOT_FINITE)
        if test is None:
            return BatchDecision(global_batch_size=size, reason=Reason.NOT_MEASURED)
        if observation.samples_seen < self.warmup_samples:
            return BatchDecision(global_batch_size=size, reason=Reason.WARMING_UP)
        largest = min(math.ceil(size * self.max_growth_factor), self.max_global_batch_size)
        if test.measurability is Measurability.NOISE_DOMINATES:
            wanted, reason = largest, Reason.NOISE_DOMINATES
        elif test.passing_batch_size is None:
            return BatchDecision(global_batch_size=size, reason=Reason.NOT_MEASURABLE_YET)
        elif test.passing_batch_size > size:
            wanted = min(math.ceil(test.passing_batch_size), largest)
            reason = Reason.TEST_FAILED
        elif self.monotone or (test.tested_batch_size or size) < size:
            # A short step of an epoch's end says nothing for shrinking: as published, the test
            # compares with a gradient that holds its noise, so that a smaller batch asks for less.
            return BatchDecision(global_batch_size=size, reason=Reason.TEST_PASSED)
        else:
            smallest = max(int(size / self.max_growth_factor), self.initial_global_batch_size)
            wanted = max(math.ceil(test.passing_batch_size), smallest)
            reason = Reason.SHRUNK if wanted < size else Reason.TEST_PASSED
            return BatchDecision(global_batch_size=min(wanted, size), reason=reason)
        if wanted <= size:
            return BatchDecision(global_batch_size=size, reason=Reason.AT_CAP)
        return BatchDecision(global_batch_size=wanted, reason=reason)
