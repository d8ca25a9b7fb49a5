"""AdaptiveStep: one optimizer step of a loop of one's own, micro-batch by micro-batch."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import send_to_device
from torch import nn

from .adapt import finish_step
from .apply.plan import BatchPlan
from .apply.step import StepBatch
from .hf_parallel import check_reduced, forget_unreduced, synchronised
from .measure.probe import GradientProbe
from .run import AdaptiveRun


if TYPE_CHECKING:
    from accelerate import Accelerator


logger = logging.getLogger(__name__)


@dataclass
class Trained:
    """What a loop trains, and how: the same for all of its steps.

    Attributes:
        accelerator: The user's.
        model: As accelerate has prepared it.
        optimizer: Prepared or not.
        run: The run.
        weigh: Weight of a micro-batch's loss; None for its samples.
        skip_nonfinite: Whether a step whose loss is not finite leaves the weights as they are.
        trainable: Ids of the parameters that were trainable when the model was prepared.
        probe: Made for the first measured step: under FSDP2 it takes a while to find out where
            gradients appear.
    """

    accelerator: Accelerator
    model: nn.Module
    optimizer: Any
    run: AdaptiveRun
    weigh: Callable[[Any], float] | None
    skip_nonfinite: bool
    trainable: set[int]
    probe: GradientProbe | None = None

    def check_reduced(self) -> None:
        """Refuse a model whose ranks would drift apart."""
        if self.run.ranks.processes > 1:
            check_reduced(self.model, self.trainable)

    def probe_of_step(self) -> GradientProbe:
        """The probe, for a measured step."""
        self.check_reduced()
        ranks = self.run.ranks
        if self.probe is None:
            self.probe = GradientProbe(self.model, processes=ranks.processes, copies=ranks.copies)
        return self.probe


class _State(Enum):
    NEW = auto()
    RUNNING = auto()
    ENDED = auto()  # measured and decided
    GIVEN_UP = auto()


class AdaptiveStep:
    """The micro-batches of one optimizer step; iterate over them once, to the end.

    Attributes:
        loss: The step's, over all ranks, once its last backward was run.
        finite: Whether loss and gradients are. If not, the gradients were dropped, so that
            `optimizer.step()` changes nothing.
    """

    def __init__(self, batch: StepBatch, trained: Trained) -> None:
        self.loss: float | None = None
        self.finite = True
        self._batch, self._trained = batch, trained
        self._state = _State.NEW
        self._probe: GradientProbe | None = None  # of a measured step
        self._open = False  # whether a micro-batch waits for its backward
        self._divisors: list[float] = []  # of the micro-batches' losses
        self._losses: list[torch.Tensor] = []  # as divided

    @property
    def plan(self) -> BatchPlan:
        """What the step was cut by."""
        return self._batch.plan

    @property
    def samples(self) -> int:
        """Samples over all ranks; fewer than planned at the end of an epoch."""
        return self._batch.global_samples

    @property
    def ends_epoch(self) -> bool:
        """Whether nothing of the epoch, or of the budget, is left behind it."""
        return self._batch.ends_epoch

    @property
    def running(self) -> bool:
        """Whether micro-batches are still to come, or to be given to `backward`."""
        return self._state is _State.RUNNING

    @property
    def ended(self) -> bool:
        """Whether its last backward was run, and the step is measured and counted."""
        return self._state is _State.ENDED

    def __iter__(self) -> Iterator[Any]:
        """Yield the micro-batches on the accelerator's device, each to be given to `backward`.

        Yields:
            What the collator made.

        Raises:
            RuntimeError: If the step was begun before, or a micro-batch had no backward.
        """
        if self._state is not _State.NEW:
            raise RuntimeError(
                "A step must be iterated over once, because its gradients are accumulated; go on "
                "with the next one."
            )
        self._state = _State.RUNNING
        trained, batch = self._trained, self._batch
        run, accelerator = trained.run, trained.accelerator
        count = len(batch.micro_batches)
        try:
            self._divisors = self._divisors_of_losses()
            if count * run.ranks.size > 1 and run.measures(run.clock.steps + 1):
                self._probe = trained.probe_of_step()
                self._probe.attach()
            for index, micro_batch in enumerate(batch.micro_batches):
                self._open = True
                with synchronised(
                    accelerator,
                    trained.model,
                    last=index == count - 1,
                    keep_sharded=run.controller.can_change,
                    reduce_each=accelerator.gradient_state.plugin_kwargs.get("sync_each_batch"),
                ):
                    yield send_to_device(micro_batch, accelerator.device)
                if self._open:
                    raise RuntimeError(
                        f"step.backward(loss) must be called in each of the step's {count} "
                        f"micro-batches, because it weighs their losses, but micro-batch "
                        f"{index + 1} had none; call it instead of accelerator.backward(loss)."
                    )
        finally:
            if not self.ended:
                self.give_up()

    def backward(self, loss: torch.Tensor, **kwargs: Any) -> None:
        """Weigh the micro-batch's mean loss by its share of the step, and run backward.

        That of the last micro-batch ends the step: its gradients are reduced and measured, and the
        next batch size is decided.

        Args:
            loss: Mean over the micro-batch: over its samples, or over what `weigh` counts.
            **kwargs: As those of `accelerator.backward`.

        Raises:
            RuntimeError: If it was called already for this micro-batch, or outside of one.
        """
        if not self._open:
            raise RuntimeError(
                "step.backward(loss) must be called once in every micro-batch, because each counts "
                "once; add up losses before, and call it within `for batch in step`."
            )
        self._open = False
        divisor = self._divisors[len(self._losses)]
        loss = loss / divisor
        self._trained.accelerator.backward(loss, **kwargs)
        # A mean over nothing is NaN, and of no weight.
        self._losses.append(loss.detach() if divisor < math.inf else torch.zeros_like(loss))
        if self._probe is not None:
            self._probe.end_micro_batch()
        if len(self._losses) == len(self._divisors):
            self._end()

    def give_up(self) -> None:
        """Drop what has been accumulated: the next step must not add to it."""
        trained, self._state, self._open = self._trained, _State.GIVEN_UP, False
        if self._probe is not None:
            self._probe.detach()
        trained.accelerator.gradient_state._set_sync_gradients(True)
        forget_unreduced(trained.model)
        trained.optimizer.zero_grad()

    def _divisors_of_losses(self) -> list[float]:
        """What each mean loss is divided by, before ranks average.

        Returns:
            One divisor per micro-batch; infinite for one without weight, such as one that only
            stands in where a short step has no samples left for this rank. Over all ranks, their
            inverses sum to the ranks.
        """
        batch, ranks, weigh = self._batch, self._trained.run.ranks, self._trained.weigh
        weights, total = [float(size) for size in batch.sizes], float(batch.global_samples)
        if weigh is not None:
            pairs = zip(batch.micro_batches, batch.sizes, strict=True)
            weights = [float(weigh(found)) if size else 0.0 for found, size in pairs]
            total = ranks.total(sum(weights))[0] / ranks.copies
        share = total / ranks.size
        return [share / weight if weight else math.inf for weight in weights]

    def _end(self) -> None:
        trained = self._trained
        run, optimizer, scaler = trained.run, trained.optimizer, trained.accelerator.scaler
        sums: Sequence[float] = ()
        if self._probe is not None:
            self._check_gradients()
            scale = float(scaler.get_scale()) if scaler is not None else 1.0
            sums = self._probe.sums([1 / d for d in self._divisors], loss_scale=scale)
            self._probe.detach()
        self.loss, self.finite = finish_step(
            run,
            float(torch.stack(self._losses).sum()),
            sums,
            learning_rate=float(optimizer.param_groups[0]["lr"]),
        )
        if not self.finite:
            run.skipped_steps += 1
            # An fp16 gradient scaler skips such steps by itself, and needs the gradients for it.
            if trained.skip_nonfinite and scaler is None:
                optimizer.zero_grad()
                if run.ranks.is_first:
                    number = run.clock.steps + 1
                    logger.warning("The loss of step %d is not finite: it is skipped.", number)
        run.commit_step()
        self._state = _State.ENDED

    def _check_gradients(self) -> None:
        """Refuse an optimizer that has taken the gradients before they could be measured.

        Raises:
            RuntimeError: With the way out.
        """
        if all(parameter.grad is None for parameter in self._trained.model.parameters()):
            raise RuntimeError(
                "The step's gradients must be left in `.grad` by backward, because their norm is "
                "measured, but there is none: an optimizer or a hook that steps inside backward "
                "has taken them; let optimizer.step() do it."
            )
