"""StepBatch: what a loader hands to training at once, the micro-batches of one optimizer step."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from .plan import BatchPlan


class StepBatch(Mapping[str, Any]):
    """The micro-batches of one optimizer step on this rank.

    To code that only counts (tokens, floating-point operations) it looks like one flat batch: a
    mapping whose tensors are the micro-batches' tensors, concatenated.

    Attributes:
        micro_batches: What the collator made, in order.
        sizes: Samples of each micro-batch, on this rank. 0 for one that stands in where a short
            step has none left for this rank: every rank runs as many, and this one is to have no
            weight. To code that counts it is not there, unless there is nothing else.
        plan: What it was cut by; the step never holds more samples.
        ends_epoch: Whether no sample of the epoch, or of the budget, is left behind this step.
        ends_stream: Whether the epoch of a stream was found to end with it.
        global_samples: Samples over all ranks.
        tokens: Tokens that are not padding: of this rank, and once it was trained on of all ranks.
    """

    def __init__(
        self,
        micro_batches: list[Any],
        sizes: list[int],
        plan: BatchPlan,
        *,
        ends_epoch: bool = False,
        ends_stream: bool = False,
        global_samples: int | None = None,
        tokens: int = 0,
    ) -> None:
        self.micro_batches = micro_batches
        self.sizes = sizes
        self.plan = plan
        self.ends_epoch, self.ends_stream = ends_epoch, ends_stream
        self.global_samples = sum(sizes) if global_samples is None else global_samples
        self.tokens = tokens

    @property
    def samples(self) -> int:
        """Samples of the step on this rank."""
        return sum(self.sizes)

    def __getitem__(self, key: str) -> Any:
        """The micro-batches' values for `key`, tensors joined into one."""
        counted = [b for b, size in zip(self.micro_batches, self.sizes, strict=True) if size]
        values = [micro_batch[key] for micro_batch in counted or self.micro_batches[:1]]
        if not all(isinstance(value, torch.Tensor) for value in values):
            return values
        if len({value.shape[1:] for value in values}) == 1 and values[0].dim() > 0:
            return torch.cat(values)
        return torch.cat([value.reshape(-1) for value in values])  # padded to different lengths

    def __contains__(self, key: object) -> bool:
        """Whether the collator makes it."""
        return key in self.micro_batches[0]

    def __iter__(self) -> Iterator[str]:
        """The collator's keys."""
        return iter(self.micro_batches[0])

    def __len__(self) -> int:
        """How many keys there are."""
        return len(self.micro_batches[0])
