"""What a sweep over batch sizes consists of: the runs, and how their flags follow the batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...compare.plan import ComparePlan, Schedule


# The values that Zhang et al. 2025 (arXiv 2410.21676) tuned batch by batch keep their half-lives in
# tokens: of their 3.07 billion (151M parameters) the average's is an eighth, that of beta2 a
# hundredth (formulas in docs/critical_batch_size.md). Warm-up is a quarter of the budget of the
# reference. That smaller models want the same shares is an assumption.
_WARMUP_SHARE = 0.25
_AVERAGING_SHARE = 0.125
_BETA2_SHARE = 0.01
_MIN_BETA2 = 0.95  # theirs, at the largest batches
_MAX_BETA2 = 0.9995  # and at the smallest

_EVALUATIONS = 50  # up to the tokens of the reference
_CAP_FACTOR = 4


@dataclass(frozen=True, kw_only=True)
class SweepPlan:
    """A checked sweep.

    Attributes:
        batch_sizes: In sequences, rising.
        reference: Batch size from which scaling is linear, and that sets the target.
        overhead: Of the definition of the critical batch size.
        target_samples: D in sequences: what the reference trains on to set the target.
        target_loss: Given by the user; None for that of the reference.
        learning_rates: To choose from at each batch size; empty for the program's own.
        seeds: The runs of each batch size that are fitted.
        tuning_seeds: The runs that its learning rate is chosen by.
        tokens_per_sequence: Of a sample.
        warmup_samples: Of the learning rate, at every batch size.
        averaging_half_life_tokens: Of the averaged weights; 0 for none.
        beta2_half_life_tokens: Of Adam's second moments; 0 leaves beta2 as it is.
        eval_samples: Sequences between evaluations, at the least.
        max_samples: Sequences after which a run gives up.
        max_micro_batch_size: In samples on a device.
        data_parallel_size: Ranks that every run is launched on.
        shared: Flags of all runs.
        program: As a comparison's.
        launch: As a comparison's.
        jobs: Runs at a time.
        output_dir: Where everything goes.
        name: Of the sweep.
    """

    batch_sizes: Sequence[int]
    reference: int
    overhead: float
    target_samples: int
    target_loss: float | None
    learning_rates: Sequence[float]
    seeds: Sequence[int]
    tuning_seeds: Sequence[int]
    tokens_per_sequence: int
    warmup_samples: int
    averaging_half_life_tokens: float
    beta2_half_life_tokens: float
    eval_samples: int
    max_samples: int
    max_micro_batch_size: int
    data_parallel_size: int
    shared: Mapping[str, Any]
    program: Sequence[str]
    launch: Sequence[str]
    jobs: int
    output_dir: Path
    name: str

    def check_reference(self) -> None:
        """Refuse to set another target than the one that runs in the folder trained to.

        Raises:
            ValueError: If another batch size set it.
        """
        [schedule] = self.target_plan().schedules
        folders = (self.output_dir / "runs").glob(schedule.slug.replace(str(self.reference), "*"))
        others = {folder.name.rpartition("-")[2] for folder in folders} - {str(self.reference)}
        if others:
            raise ValueError(
                f"reference_batch_size ({self.reference}) must be that of the sweep in "
                f"{self.output_dir} ({', '.join(sorted(others))}), because its loss is the target "
                "of the runs there; give that one, or another output_dir."
            )

    def target_plan(self) -> ComparePlan:
        """The runs of the reference that set the target, to the end of its budget."""
        flags = self._flags(self.reference)
        # A prefix of what the reference trains on later, and so as a constant rate leaves it.
        flags["max_training_samples"] = self.target_samples
        return self._plan({f"target at batch {self.reference}": flags}, self.tuning_seeds)

    def plan(self, target_loss: float) -> ComparePlan:
        """The runs of all batch sizes, each until it reaches the target or gives up.

        Args:
            target_loss: Validation loss.

        Returns:
            A plan whose schedules are the batch sizes, in order.
        """
        named = {
            f"batch {size}": {
                **self._flags(size),
                "max_training_samples": self.max_samples,
                "stop_at_eval_loss": target_loss,
            }
            for size in self.batch_sizes
        }
        return self._plan(named, self.seeds)

    def _plan(self, named: Mapping[str, Mapping[str, Any]], seeds: Sequence[int]) -> ComparePlan:
        return ComparePlan(
            title=self.name,
            note="",
            shared=self.shared,
            seeds=seeds,
            tuning_seeds=self.tuning_seeds,
            target_loss=None,
            jobs=self.jobs,
            program=self.program,
            launch=self.launch,
            output_dir=self.output_dir,
            schedules=[
                Schedule(name=name, settings=flags, learning_rates=self.learning_rates)
                for name, flags in named.items()
            ],
        )

    def _flags(self, size: int) -> dict[str, Any]:
        """What a batch size sets; the user's own flags win where they say how to train."""
        micro, accumulated = layout_of(size, self.max_micro_batch_size, self.data_parallel_size)
        tokens = size * self.tokens_per_sequence
        flags: dict[str, Any] = {
            "lr_scheduler_type": "constant_with_warmup",
            "warmup_steps": max(round(self.warmup_samples / size), min(self.warmup_samples, 1)),
            "weight_decay": 0.0,
            "eval_strategy": "steps",
            "eval_steps": max(round(self.eval_samples / size), 1),
        }
        if self.beta2_half_life_tokens:
            flags["adam_beta2"] = beta2_of(tokens, self.beta2_half_life_tokens)
        if self.averaging_half_life_tokens:
            flags["averaging_half_life_tokens"] = self.averaging_half_life_tokens
        return {
            **{name: value for name, value in flags.items() if name not in self.shared},
            "batch_schedule": "constant",
            "per_device_train_batch_size": micro,
            "gradient_accumulation_steps": accumulated,
            "max_micro_batch_size": micro,
        }


def default_values(target_samples: int, tokens_per_sequence: int) -> dict[str, float]:
    """What follows the reference's budget where the user has not said it.

    Args:
        target_samples: Of the reference.
        tokens_per_sequence: Of a sample.

    Returns:
        Values by the names of a plan.
    """
    tokens = target_samples * tokens_per_sequence
    return {
        "warmup_samples": round(_WARMUP_SHARE * target_samples),
        "averaging_half_life_tokens": _AVERAGING_SHARE * tokens,
        "beta2_half_life_tokens": _BETA2_SHARE * tokens,
        "eval_samples": max(target_samples // _EVALUATIONS, 1),
        "max_samples": _CAP_FACTOR * target_samples,
    }


def beta2_of(tokens_per_step: float, half_life_tokens: float) -> float:
    """Adam's beta2 with a half-life in tokens, within the range that Zhang et al. use.

    Args:
        tokens_per_step: Of the batch.
        half_life_tokens: Tokens after which half of a squared gradient is forgotten.

    Returns:
        0.5 ^ (tokens per step / half-life), between 0.95 and 0.9995, to 6 digits.
    """
    exact = 0.5 ** (tokens_per_step / half_life_tokens)
    return float(f"{min(max(exact, _MIN_BETA2), _MAX_BETA2):.6f}")


def layout_of(size: int, max_micro_batch_size: int, data_parallel_size: int) -> tuple[int, int]:
    """Micro-batch and accumulation of a batch size, so that its noise is measured where it can be.

    Args:
        size: B in samples.
        max_micro_batch_size: What fits on a device.
        data_parallel_size: Ranks.

    Returns:
        The largest micro-batch that divides a rank's share, and how many of them. A single rank
        takes two or more, because one gradient says nothing of its noise.

    Raises:
        ValueError: If the ranks do not divide the batch.
    """
    share, rest = divmod(size, data_parallel_size)
    if rest or not share:
        raise ValueError(
            f"batch size ({size}) must be a multiple of data_parallel_size "
            f"({data_parallel_size}), because every rank takes an equal part of it; change it."
        )
    most = min(max_micro_batch_size, share // 2 if data_parallel_size == 1 else share)
    micro = max((m for m in range(1, most + 1) if share % m == 0), default=1)
    return micro, share // micro
