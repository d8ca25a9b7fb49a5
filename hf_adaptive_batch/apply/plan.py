"""BatchPlan: the feasible micro_batch_size x accumulation_steps x data_parallel_size of a step."""

import sys
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class BatchPlan:
    """How an optimizer step of B = m n R samples is laid out.

    Attributes:
        micro_batch_size: m, samples per forward on one rank.
        accumulation_steps: n, micro-batches per optimizer step on one rank.
        data_parallel_size: R, ranks that see different data.

    Raises:
        ValueError: If a factor is below 1.
    """

    micro_batch_size: int
    accumulation_steps: int = 1
    data_parallel_size: int = 1

    def __post_init__(self) -> None:
        for name in ("micro_batch_size", "accumulation_steps", "data_parallel_size"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(
                    f"{name} ({value}) must be at least 1, because a step trains on a sample."
                )

    @property
    def global_batch_size(self) -> int:
        """B = m n R, samples per optimizer step."""
        return self.micro_batch_size * self.accumulation_steps * self.data_parallel_size

    @classmethod
    def nearest(
        cls,
        global_batch_size: int,
        *,
        micro_batch_size: int,
        max_micro_batch_size: int | None = None,
        max_global_batch_size: int | None = None,
        data_parallel_size: int = 1,
    ) -> "BatchPlan":
        """The feasible plan nearest above a wished size: the micro-batch first, then accumulation.

        Up to `max_micro_batch_size` the micro-batch is doubled until one of it holds the wish;
        beyond, the largest one is accumulated. So there are few shapes to compile, and as the wish
        grows the micro-batch never shrinks: every larger plan is a whole number of the smaller
        ones' micro-batches. Sizes are rounded up, because the norm test asks for at least so many
        samples; under the cap they are rounded down.

        Args:
            global_batch_size: Wished samples per step.
            micro_batch_size: The ladder's first step: what training began with.
            max_micro_batch_size: What fits on the device; None keeps the micro-batch as it began.
            max_global_batch_size: The cap in samples; None for none.
            data_parallel_size: R.

        Returns:
            The plan; of no fewer samples than wished, where the cap allows it.

        Raises:
            ValueError: If a size is below 1, the largest micro-batch is below the first, or the cap
                is below one micro-batch on every rank.
        """
        largest_micro = micro_batch_size if max_micro_batch_size is None else max_micro_batch_size
        if largest_micro < micro_batch_size:
            raise ValueError(
                f"max_micro_batch_size ({largest_micro}) must be at least the initial micro-batch "
                f"({micro_batch_size}), because training starts there; raise it, or lower "
                "per_device_train_batch_size."
            )
        first = cls(micro_batch_size=micro_batch_size, data_parallel_size=data_parallel_size)
        if global_batch_size < 1:
            raise ValueError(
                f"global_batch_size ({global_batch_size}) must be at least 1, because a step "
                "trains on a sample."
            )
        if max_global_batch_size is not None:
            if max_global_batch_size < first.global_batch_size:
                raise ValueError(
                    f"max_global_batch_size ({max_global_batch_size}) must be at least one "
                    f"micro-batch on every rank ({first.global_batch_size}); raise the cap or "
                    "lower the micro-batch."
                )
            global_batch_size = min(global_batch_size, max_global_batch_size)
        limit = min(largest_micro * data_parallel_size, max_global_batch_size or sys.maxsize)
        micro = micro_batch_size
        while micro * data_parallel_size < global_batch_size:
            if 2 * micro * data_parallel_size > limit:
                break
            micro *= 2
        steps = -(-global_batch_size // (micro * data_parallel_size))
        if max_global_batch_size is not None:
            steps = min(steps, max_global_batch_size // (micro * data_parallel_size))
        return cls(
            micro_batch_size=micro, accumulation_steps=steps, data_parallel_size=data_parallel_size
        )
