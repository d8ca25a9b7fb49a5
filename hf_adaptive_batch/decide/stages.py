"""Stages, and how they are written: `"0:768 250M:1536 500M:3072"`, as in Megatron-LM."""

import re
from dataclasses import dataclass
from decimal import Decimal
from itertools import pairwise
from typing import NamedTuple

from .schedule import BatchSchedule, Unit


_MULTIPLES = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
_UNITS = {
    "": Unit.TOKENS,  # as Megatron-LM has it for text
    "tokens": Unit.TOKENS,
    "samples": Unit.SAMPLES,
    "steps": Unit.STEPS,
    "%": Unit.BUDGET,
}
_DURATION = re.compile(
    r"(?P<number>\d+(\.\d*)?|\.\d+)(?P<multiple>[KMBT]?)(?P<unit>[a-z]*|%)", re.ASCII
)
_LONGEST = 40  # characters of a number and its unit: a slip of the keyboard, not a batch
_KNOWN = "K, M, B or T and then tokens (also without a word), samples, steps or %"


class Stage(NamedTuple):
    """One stage of a stage-wise schedule.

    Attributes:
        start: Progress at which it begins, in the schedule's unit.
        size: Samples per optimizer step from there on.
    """

    start: float
    size: int


@dataclass(frozen=True)
class Stages(BatchSchedule):
    """Piece-wise constant: a step takes the size of the stage that it begins in.

    Args:
        stages: In order; the first begins at 0.
        unit: Of the stages' starts.

    Raises:
        ValueError: If the first stage does not begin at 0, they overlap or are not in order, or a
            size is not positive.
    """

    stages: tuple[Stage, ...]
    unit: Unit

    def __post_init__(self) -> None:
        if not self.stages or self.stages[0].start != 0:
            first = self.stages[0].start if self.stages else None
            raise ValueError(
                f"start of the first stage ({first}) must be 0, because training has to begin with "
                "some size; write the first stage as 0:SIZE."
            )
        for before, after in pairwise(self.stages):
            if after.start <= before.start:
                raise ValueError(
                    f"start of a stage ({after.start:g} {self.unit}) must be above that of the "
                    f"stage before it ({before.start:g}), because stages follow each other; sort "
                    "them, and give each start once."
                )
        for stage in self.stages:
            if not 1 <= stage.size < 2**63:
                raise ValueError(
                    f"size of a stage ({stage.size}) must be from 1 to 2^63 - 1, because it counts "
                    "the samples of a step; change it."
                )

    @property
    def can_change(self) -> bool:
        """Whether there are stages of different sizes."""
        return len({stage.size for stage in self.stages}) > 1

    @property
    def can_shrink(self) -> bool:
        """Whether a stage is smaller than the one before it."""
        return any(after.size < before.size for before, after in pairwise(self.stages))

    def size_at(self, progress: float) -> int:
        """The size of the last stage that has begun.

        Args:
            progress: In the schedule's unit.

        Returns:
            Samples per optimizer step.
        """
        return [stage.size for stage in self.stages if stage.start <= progress][-1]


class Duration(NamedTuple):
    """An amount of training.

    Attributes:
        value: In the unit; a share of the budget is between 0 and 1.
        unit: Its unit.
    """

    value: float
    unit: Unit

    @classmethod
    def parse(cls, text: str) -> "Duration":
        """Read `250M`, `250Mtokens`, `4Ksamples`, `100steps` or `2.5%`.

        Args:
            text: A number, a multiple K, M, B or T if any, and a unit. Without one it is tokens.

        Returns:
            The duration.

        Raises:
            ValueError: If it is not written so.
        """
        match = _DURATION.fullmatch(text)
        if (
            match is None
            or len(text) > _LONGEST
            or match["unit"] not in _UNITS
            or (match["multiple"] and "%" in text)
        ):
            raise ValueError(
                f"duration ({text!r}) must be a number with a known unit, because it could mean "
                f"anything else; write {_KNOWN}, such as 250M, 4Ksamples, 100steps or 2.5%."
            )
        unit = _UNITS[match["unit"]]
        # In decimals: as a float 16.1 x 1000 is above 16100, where a step may begin.
        value = Decimal(match["number"]) * _MULTIPLES[match["multiple"]]
        return cls(float(value / 100 if unit is Unit.BUDGET else value), unit)


def parse_stages(text: str) -> Stages:
    """Read a stage-wise schedule: `START:SIZE`, separated by spaces or commas.

    Args:
        text: Such as `"0:768 250M:1536 500M:3072"`. A start is a `Duration` of one and the same
            unit in all stages, but for the first, which is 0. A size is in samples.

    Returns:
        The schedule.

    Raises:
        ValueError: If it is not written so, units are mixed, or stages are not in order.
    """
    stages, units = [], []
    for word in text.replace(",", " ").split():
        start, colon, size = word.partition(":")
        if not colon or not size.isdecimal() or not size.isascii() or len(size) > _LONGEST:
            raise ValueError(
                f"stage ({word!r}) must be START:SIZE with a whole number of samples, because a "
                "step trains on so many; write such as 250M:1536."
            )
        duration = Duration.parse(start)
        stages.append(Stage(duration.value, int(size)))
        if start.strip("0.KMBT"):  # a zero without a unit is 0 in every unit
            units.append(duration.unit)
    if len(set(units)) > 1:
        raise ValueError(
            f"units of the stages ({', '.join(sorted(set(units)))}) must be one, because else "
            "nobody knows their order before training; write all starts in the same unit."
        )
    unit = units[0] if units else Unit.SAMPLES
    schedule = Stages(tuple(stages), unit)
    if unit is Unit.BUDGET and schedule.stages[-1].start >= 1:
        raise ValueError(
            f"start of the last stage ({100 * schedule.stages[-1].start:g}%) must be below 100%, "
            "because training ends there; begin it earlier."
        )
    return schedule


def paper_stages(max_global_batch_size: int) -> Stages:
    """The stage-wise warm-up that Lau et al. 2025 (arXiv 2412.21124) compare with.

    A quarter of the largest batch for 2.5 % of the samples, a half for 2.5 %, then all of it:
    2048-4096-8192. The shares are known from memory, not from the text.

    Args:
        max_global_batch_size: The largest batch in samples.

    Returns:
        The schedule.

    Raises:
        ValueError: If the batch cannot be divided by 4.
    """
    if max_global_batch_size < 4 or max_global_batch_size % 4:
        raise ValueError(
            f"max_global_batch_size ({max_global_batch_size}) must be a multiple of 4, because the "
            "stages are a quarter of it, a half and all; round it."
        )
    quarter = max_global_batch_size // 4
    stages = (Stage(0.0, quarter), Stage(0.025, 2 * quarter), Stage(0.05, 4 * quarter))
    return Stages(stages, Unit.BUDGET)
