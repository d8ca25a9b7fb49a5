"""The trade-off of steps against examples (McCandlish et al. 2018, arXiv 1812.06162, eq. 2.11)."""

from __future__ import annotations

from dataclasses import dataclass

from .intervals import check_positive


@dataclass(frozen=True, kw_only=True)
class TradeOff:
    """(S / S_min - 1) (E / E_min - 1) = 1: what a loss costs at every batch size.

    S = S_min (1 + knee / B) optimizer steps train on E = S B = E_min (1 + B / knee) sequences, with
    the knee at E_min / S_min. There both are twice their least. It is McCandlish's definition of a
    critical batch size, and that of Power Lines (Bergsma et al. 2025, arXiv 2505.13738: D = D_min
    (1 + B / B_crit)); Zhang et al. have another, see `critical_batch_size`.

    Args:
        min_steps: S_min, optimizer steps with batches without end.
        min_examples: E_min, sequences with the smallest batches.

    Raises:
        ValueError: If one is not positive and finite.
    """

    min_steps: float
    min_examples: float

    def __post_init__(self) -> None:
        for name in ("min_steps", "min_examples"):
            check_positive(name, [getattr(self, name)], "a loss is reached by training")

    @property
    def knee(self) -> float:
        """E_min / S_min, in sequences per step."""
        return self.min_examples / self.min_steps

    def steps_at(self, batch_size: float) -> float:
        """Optimizer steps to the target.

        Args:
            batch_size: In sequences.

        Returns:
            S_min (1 + knee / B).
        """
        return self.min_steps + self.min_examples / _batch(batch_size)

    def examples_at(self, batch_size: float) -> float:
        """Sequences to the target.

        Args:
            batch_size: In sequences.

        Returns:
            E_min (1 + B / knee).
        """
        return self.min_examples + self.min_steps * _batch(batch_size)

    def examples_for(self, steps: float) -> float:
        """The sequences that reaching the target in so many steps takes.

        Args:
            steps: Optimizer steps.

        Returns:
            Sequences, from the hyperbola; a `ValueError` if no batch reaches it in so few.
        """
        return self.min_examples * _other_side("steps", steps, self.min_steps, "a smaller batch")

    def steps_for(self, examples: float) -> float:
        """The steps that reaching the target with so many sequences takes.

        Args:
            examples: Sequences.

        Returns:
            Optimizer steps, from the hyperbola; a `ValueError` if no batch reaches it with so few.
        """
        return self.min_steps * _other_side(
            "examples", examples, self.min_examples, "a larger batch"
        )


def _batch(batch_size: float) -> float:
    return check_positive("batch_size", [batch_size], "a step trains on sequences")[0]


def _other_side(name: str, value: float, least: float, way_out: str) -> float:
    """1 + 1 / (value / least - 1)."""
    if not value > least:
        raise ValueError(
            f"{name} ({value:g}) must be above {least:g}, because no batch size reaches the target "
            f"with so few; allow for more, with {way_out}."
        )
    return 1 + least / (value - least)
