"""BatchPlan: the feasible micro_batch_size x accumulation_steps x data_parallel_size of a step."""

from dataclasses import dataclass


# A larger micro-batch is worth a batch that overshoots the wish by at most this share: fewer,
# larger kernels against samples that were not asked for. An assumption, not a measurement.
_TOLERATED_OVERSHOOT = 1 / 8


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

        Micro-batches come from the ladder m, 2m, 4m, ... up to `max_micro_batch_size`, so that few
        shapes are ever compiled, and every size is a whole number of the smaller ones. Of the
        ladder the largest is taken that overshoots the wish by at most an eighth. Sizes are rounded
        up, because the norm test asks for at least so many samples; under the cap they are rounded
        down.

        Args:
            global_batch_size: Wished samples per step.
            micro_batch_size: The ladder's first step: what training began with.
            max_micro_batch_size: What fits on the device; None keeps the micro-batch as it began.
            max_global_batch_size: The cap in samples; None for none.
            data_parallel_size: R.

        Returns:
            The plan; of at least one and, where the cap allows it, no fewer samples than wished.

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
        best = cls._rounded(first, global_batch_size, max_global_batch_size)
        micro = 2 * micro_batch_size
        while micro <= largest_micro:
            rung = cls(micro_batch_size=micro, data_parallel_size=data_parallel_size)
            if max_global_batch_size is not None and rung.global_batch_size > max_global_batch_size:
                break
            plan = cls._rounded(rung, global_batch_size, max_global_batch_size)
            overshoot = plan.global_batch_size / global_batch_size - 1
            if 0 <= overshoot <= _TOLERATED_OVERSHOOT:
                best = plan
            micro *= 2
        return best

    @classmethod
    def _rounded(cls, rung: "BatchPlan", wished: int, cap: int | None) -> "BatchPlan":
        """`rung` accumulated until it holds `wished` samples, or as many as fit under the cap."""
        steps = -(-wished // rung.global_batch_size)
        if cap is not None:
            steps = min(steps, cap // rung.global_batch_size)
        return cls(
            micro_batch_size=rung.micro_batch_size,
            accumulation_steps=steps,
            data_parallel_size=rung.data_parallel_size,
        )
