"""How a scaling law changes with the two constants in the definition of the critical batch size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .critical import OVERHEAD, REFERENCE, critical_batch_size
from .scaling_law import ScalingLaw, Space, fit_power_law
from .steps_to_target import StepsToTargetFit


@dataclass(frozen=True, kw_only=True)
class Sensitivity:
    """A law, and the constants of the definition that it holds for.

    Attributes:
        overhead: Share of steps above linear scaling.
        reference: In sequences.
        law: Of the critical batch size so defined.
    """

    overhead: float
    reference: float
    law: ScalingLaw


def law_sensitivity(
    x: Sequence[float] | Sequence[Sequence[float]],
    fits: Sequence[StepsToTargetFit],
    *,
    overheads: Sequence[float] = (0.1, OVERHEAD, 0.5, 1.0),
    references: Sequence[float] = (64, REFERENCE, 1024),
    space: Space = "log",
    names: Sequence[str] | None = None,
    confidence: float = 0.95,
) -> list[Sensitivity]:
    """How the law changes with the two constants of the definition.

    Args:
        x: Of each fit, as for `fit_power_law`.
        fits: Of steps to a target, one for each x.
        overheads: To try.
        references: To try, in sequences.
        space: As for `fit_power_law`.
        names: As for `fit_power_law`.
        confidence: As for `fit_power_law`.

    Returns:
        One for each pair, overheads slowest.
    """
    return [
        Sensitivity(
            overhead=overhead,
            reference=reference,
            law=fit_power_law(
                x,
                [float(critical_batch_size(fit, overhead, reference)) for fit in fits],
                space=space,
                names=names,
                confidence=confidence,
            ),
        )
        for overhead in overheads
        for reference in references
    ]
