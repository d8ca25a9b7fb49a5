"""Open-loop batch schedules as values: the size at a progress, and the progress at a step.

A schedule is a function of one kind of progress: samples, tokens, optimizer steps, or the share of
the training budget. Both questions are answered from `size_at` alone, so they cannot disagree.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from itertools import islice, takewhile
from typing import ClassVar, NamedTuple


class Unit(StrEnum):
    """What a schedule counts progress in."""

    SAMPLES = "samples"
    TOKENS = "tokens"
    STEPS = "steps"
    """Optimizer steps, whatever their size."""
    BUDGET = "budget"
    """Share of the training budget, from 0 to 1."""


class StepStart(NamedTuple):
    """Where an optimizer step begins, and how large it is.

    Attributes:
        progress: In the schedule's unit.
        samples: Samples of the steps before.
        size: Samples of this step.
    """

    progress: float
    samples: int
    size: int


class BatchSchedule(ABC):
    """The wished batch as a function of progress. Subclasses are frozen dataclasses.

    Attributes:
        unit: Of progress.
        rounds_down: Whether a wish that is not feasible is rounded down, and not up.
    """

    unit: Unit
    rounds_down: ClassVar[bool] = False

    @property
    def can_shrink(self) -> bool:
        """Whether a size is ever followed by a smaller one."""
        return False

    @property
    @abstractmethod
    def can_change(self) -> bool:
        """Whether there is more than one size."""

    @abstractmethod
    def size_at(self, progress: float) -> int:
        """The batch of a step that begins at a progress.

        Args:
            progress: In the schedule's unit, at least 0.

        Returns:
            Samples per optimizer step.
        """

    def steps(
        self, per_sample: float = 1.0, feasible: Callable[[int], int] = int
    ) -> Iterator[StepStart]:
        """Walk through the optimizer steps, without end.

        Args:
            per_sample: Progress that a sample makes: tokens of a sample, or the inverse of the
                budget in samples; 1 for samples. Without meaning for steps.
            feasible: Rounds a wished size to one that can be trained on.

        Yields:
            Where each step begins.
        """
        samples = number = 0
        while True:
            progress = number if self.unit is Unit.STEPS else samples * per_sample
            size = feasible(self.size_at(progress))
            yield StepStart(progress, samples, size)
            samples, number = samples + size, number + 1

    def progress_at(
        self, step: int, per_sample: float = 1.0, feasible: Callable[[int], int] = int
    ) -> float:
        """The progress at which a step begins.

        Args:
            step: Steps before it; the first one is 0.
            per_sample: As for `steps`.
            feasible: As for `steps`.

        Returns:
            Progress in the schedule's unit.

        Raises:
            ValueError: If `step` is negative.
        """
        if step < 0:
            raise ValueError(
                f"step ({step}) must be at least 0, because it counts the steps before; pass 0 for "
                "the first one."
            )
        return next(islice(self.steps(per_sample, feasible), step, None)).progress

    def steps_for(
        self, samples: float, per_sample: float = 1.0, feasible: Callable[[int], int] = int
    ) -> int:
        """The optimizer steps that so many samples take, a short last one included.

        Args:
            samples: To train on.
            per_sample: As for `steps`.
            feasible: As for `steps`.

        Returns:
            Steps that begin before the samples are used up.
        """
        begun = takewhile(lambda step: step.samples < samples, self.steps(per_sample, feasible))
        return sum(1 for _ in begun)


@dataclass(frozen=True, kw_only=True)
class LinearRamp(BatchSchedule):
    """From one size to another in proportion to progress, rounded up; then constant.

    Gray et al. 2024 (arXiv 2411.00999) ramp over the whole budget of tokens.

    Args:
        first_size: Samples per step at the start.
        last_size: Samples per step from `length` on.
        length: Progress that the ramp takes.
        unit: Of `length`.

    Raises:
        ValueError: If the ramp ends below its start, or has no length or size.
    """

    first_size: int
    last_size: int
    length: float
    unit: Unit

    def __post_init__(self) -> None:
        if self.first_size < 1:
            raise ValueError(
                f"first size ({self.first_size}) of the ramp must be at least 1, because a step "
                "trains on a sample or more; raise it."
            )
        if self.last_size < self.first_size:
            raise ValueError(
                f"last size ({self.last_size}) of the ramp must be at least its first size "
                f"({self.first_size}), because it ramps up; raise max_global_batch_size, or lower "
                "per_device_train_batch_size or gradient_accumulation_steps."
            )
        if not (self.length > 0 and math.isfinite(self.length)):
            raise ValueError(
                f"length ({self.length}) of the ramp must be above 0 and finite, because the "
                "batch grows over it; for a constant batch choose the constant schedule."
            )

    @property
    def can_change(self) -> bool:
        """Whether it ends above its start."""
        return self.last_size > self.first_size

    def size_at(self, progress: float) -> int:
        """The ramp's height.

        Args:
            progress: In the schedule's unit.

        Returns:
            Samples per optimizer step.
        """
        share = min(progress / self.length, 1.0)
        return round_up(self.first_size + share * (self.last_size - self.first_size))


@dataclass(frozen=True, kw_only=True)
class PowerLaw(BatchSchedule):
    """The batch follows coefficient x progress^exponent between two sizes, rounded up.

    The critical batch size grows with the data trained on as such a law (Zhang et al. 2025, arXiv
    2410.21676; Bergsma et al. 2025, arXiv 2505.13738). They measured it at the end of runs of
    different lengths; to follow it *within* a run, with the tokens seen for the run's length, is an
    assumption.

    Args:
        coefficient: Samples per step at a progress of 1.
        exponent: Of progress.
        first_size: Least samples per step.
        max_size: Most samples per step.
        unit: Of progress.

    Raises:
        ValueError: If coefficient or exponent is not positive, or the sizes are not in order.
    """

    coefficient: float
    exponent: float
    first_size: int
    max_size: int
    unit: Unit = Unit.TOKENS

    def __post_init__(self) -> None:
        for name in ("coefficient", "exponent"):
            value = getattr(self, name)
            if not (value > 0 and math.isfinite(value)):
                raise ValueError(
                    f"{name} ({value}) of the law must be above 0 and finite, because the batch is "
                    "to grow with the data; take them from a fit."
                )
        check_cap(self.first_size, self.max_size)

    @property
    def can_change(self) -> bool:
        """Whether there is room between the sizes."""
        return self.max_size > self.first_size

    def size_at(self, progress: float) -> int:
        """The law's value within the sizes.

        Args:
            progress: In the schedule's unit.

        Returns:
            Samples per optimizer step.
        """
        try:
            wanted = self.coefficient * progress**self.exponent
        except OverflowError:
            return self.max_size
        return max(round_up(min(wanted, self.max_size)), self.first_size)


def check_cap(first_size: int, max_size: int) -> None:
    """Refuse a cap below the size that training begins with.

    Args:
        first_size: In samples.
        max_size: The cap in samples.

    Raises:
        ValueError: If it is below.
    """
    if not 1 <= first_size <= max_size:
        raise ValueError(
            f"max_global_batch_size ({max_size}) must be at least the initial global batch "
            f"({first_size}), because training starts there; raise the cap, or lower "
            "per_device_train_batch_size or gradient_accumulation_steps."
        )


def round_up(size: float) -> int:
    """To whole samples; a rounding error above a whole number does not count."""
    return math.ceil(size - 1e-9 * size)
