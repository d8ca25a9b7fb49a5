"""AdaptiveBatchTrainer: a Trainer whose steps are measured, and whose batch then adapts."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import Trainer

from . import hf_compat, hf_parallel, hf_sharded
from .adapt import finish_step
from .apply.step import StepBatch
from .arguments import AdaptiveBatchArguments, AdaptiveBatchOptions
from .decide.controllers import BatchController
from .hosting import LOSS_IS_SCALED, HostedLoopMixin
from .journal import log_values
from .measure.probe import GradientProbe
from .stopping import check_stopping
from .support import check_support


logger = logging.getLogger(__name__)


class AdaptiveBatchMixin(HostedLoopMixin):
    """Gives any `Trainer` subclass a global batch size that follows the gradient noise.

        class MyTrainer(AdaptiveBatchMixin, SomeTrainer): ...

    With plain `TrainingArguments` everything is left to the Trainer.

    Args:
        *args: As the Trainer's.
        controller: Decides instead of the one that the arguments describe.
        **kwargs: As the Trainer's.

    Raises:
        ValueError: If something is configured whose gradients cannot be measured.
    """

    def __init__(
        self, *args: Any, controller: BatchController | None = None, **kwargs: Any
    ) -> None:
        self._controller = controller
        given = (*args, *kwargs.values())
        with hf_compat.steps_from_budget(given), hf_sharded.resumable(given):
            super().__init__(*args, **kwargs)
        if isinstance(self.args, AdaptiveBatchOptions):
            check_support(self)
            check_stopping(self)
            self._add_weight_averaging()
        elif self.is_world_process_zero():
            logger.warning(
                "%s was given %s: it trains as Trainer does, with a constant batch. Pass "
                "AdaptiveBatchArguments to let the batch adapt.",
                type(self).__name__,
                type(self.args).__name__,
            )

    def _run_step(
        self, model: nn.Module, inputs: StepBatch, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """Run the micro-batches of one optimizer step; after a measured one, decide the next size.

        Each goes through `training_step`, the Trainer's or a subclass's.

        Args:
            model: The prepared model.
            inputs: The step.
            num_items_in_batch: Target tokens of the whole step, or None for a plain mean loss.

        Returns:
            The detached loss of the last micro-batch, scaled by its share. The others' are added to
            the logged loss here, in the order of the plain Trainer.
        """
        run, count = self.run, len(inputs.micro_batches)
        can_change = run.controller.can_change
        divisors = self._loss_divisors(inputs)
        items = self._items_in_batch(inputs, num_items_in_batch)
        measured = (
            count * run.ranks.size > 1
            and run.measures(run.clock.steps + 1)
            and (num_items_in_batch is not None or _weigh_alike(inputs, divisors))
        )
        losses: list[torch.Tensor] = []
        sums: Sequence[float] = ()
        with self._probe_of(model) if measured else contextlib.nullcontext() as probe:
            for index, batch in enumerate(inputs.micro_batches):
                last = index == count - 1
                self.current_gradient_accumulation_steps = divisors[index]
                with hf_parallel.micro_batch(self, model, last=last, keep_sharded=can_change):
                    losses.append(type(self).training_step(self, model, batch, items[index]))
                if probe is not None:
                    probe.end_micro_batch()
                if not last:
                    hf_compat.report_loss(self, losses[-1])
                    self.callback_handler.on_substep_end(self.args, self.state, self.control)
            if probe is not None:
                weights = self._weights(inputs, divisors, num_items_in_batch)
                sums = probe.sums(weights, loss_scale=self._loss_scale())
        rate = float(self.optimizer.param_groups[0]["lr"])
        _, finite = finish_step(run, float(torch.stack(losses).sum()), sums, learning_rate=rate)
        if not finite:
            self._skip_nonfinite_step()
        return losses[-1]

    def _probe_of(self, model: nn.Module) -> GradientProbe:
        """One for the run: under FSDP2 it takes a while to find out where gradients appear."""
        ranks = self.run.ranks
        if ranks.processes > 1:
            hf_parallel.check_reduced(model, self._trainable)
        if self._probe is None:
            self._probe = GradientProbe(model, processes=ranks.processes, copies=ranks.copies)
        return self._probe

    def _loss_scale(self) -> float:
        scaler = self.accelerator.scaler
        return float(scaler.get_scale()) if scaler is not None else 1.0

    def _find_loss_scale(self, batch: Any) -> None:
        """Make the Trainer divide a loss that is not divided by the step's items already."""
        if getattr(self, LOSS_IS_SCALED, None) is not None:
            self._loss_scale_unknown = False  # a subclass has said it
            return
        ranks = self.run.ranks
        tokens = hf_compat.target_tokens(self, batch)
        if tokens is None:  # on no rank are they counted: a plain mean
            self._loss_scale_unknown = False
            return
        if not all(row[0] for row in ranks.gather(tokens)):
            return  # the next step's batch may tell
        found = hf_compat.loss_scale_exponent(self, self.model, batch)
        rows = ranks.gather(math.nan if found is None else found)
        exponent = next((value for [value] in rows if not math.isnan(value)), None)
        self._loss_scale_unknown = exponent is None  # then the next step's batch may tell
        if exponent is None or abs(exponent - 1) < 0.01:
            return
        if abs(exponent) < 0.01:
            self._loss_is_summed = not self.run.controller.can_change
            if self.compute_loss_func is None:
                self.model_accepts_loss_kwargs = False
            else:
                setattr(self, LOSS_IS_SCALED, False)
            return
        if not ranks.is_first:
            return
        logger.warning(
            "A part of the loss is not divided by num_items_in_batch (doubling it divides the loss "
            "by %.3f, not by 2), such as a router's auxiliary loss: it gains weight with every "
            "micro-batch that a growing batch adds. Raise max_micro_batch_size to accumulate less.",
            2**exponent,
        )

    def _loss_divisors(self, step: StepBatch) -> list[float]:
        """What the Trainer divides each micro-batch's plain mean loss by, before ranks average.

        Samples weigh alike, also where the last micro-batch is short; one that only stands in
        weighs nothing. The plain Trainer weighs micro-batches alike; on a single rank, where the
        batch cannot change, everything is as there.

        Returns:
            One divisor per micro-batch; over all ranks, their inverses sum to the ranks.
        """
        ranks = self.run.ranks.size
        if ranks > 1 or self.run.controller.can_change:
            share = step.global_samples / ranks
            if self._loss_is_summed:
                share /= ranks * len(step.sizes)
            return [share / size if size else math.inf for size in step.sizes]
        return [float(len(step.sizes))] * len(step.sizes)

    def _items_in_batch(self, step: StepBatch, num_items: Any) -> list[Any]:
        """What each micro-batch's sum of losses is divided by, where target tokens are counted.

        Without `average_tokens_across_devices` every rank has its own mean; those of a short step
        are weighted by the ranks' samples.

        Returns:
            One count per micro-batch; infinite for one that only stands in.
        """
        if num_items is None or hf_compat.divides_loss(self):  # a plain mean over its samples
            return [None] * len(step.sizes)
        if not self._tokens_are_averaged and step.samples:
            share = step.global_samples / (self.run.ranks.size * step.samples)
            num_items = num_items if share == 1 else num_items * share
        nothing = torch.as_tensor(math.inf, device=self.args.device)
        return [num_items if size else nothing for size in step.sizes]

    def _weights(self, step: StepBatch, divisors: list[float], num_items: Any) -> list[float]:
        """How each micro-batch's mean gradient is weighted in the step's gradient."""
        if num_items is None or hf_compat.divides_loss(self):
            return [1 / divisor for divisor in divisors]
        tokens = [
            (hf_compat.target_tokens(self, batch) or 0.0) if size else 0.0
            for batch, size in zip(step.micro_batches, step.sizes, strict=True)
        ]
        if self._tokens_are_averaged or not sum(tokens):
            return tokens
        return [step.samples * count / sum(tokens) for count in tokens]

    @property
    def _tokens_are_averaged(self) -> bool:
        return self.run.ranks.size == 1 or self.args.average_tokens_across_devices

    def _skip_nonfinite_step(self) -> None:
        """Count a step whose loss is not finite, and keep its gradient from the weights."""
        self.run.skipped_steps += 1
        # An fp16 gradient scaler skips such steps by itself, and needs the gradients to see them.
        if self.args.skip_nonfinite_steps and self.accelerator.scaler is None:
            self.optimizer.zero_grad()
            if self.run.ranks.is_first:
                step = self.run.clock.steps + 1
                logger.warning("The loss of step %d is not finite: the step is skipped.", step)

    def log(self, logs: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        """Log as the Trainer does; a training log also says what is known of the batch."""
        run = self._active_run
        if run is not None and "loss" in logs:
            logs.update(log_values(run))
        super().log(logs, *args, **kwargs)
        if self._run is not None and any(name.startswith("eval_") for name in logs):
            self._run.record_evaluation(logs)  # also after training has ended
        if run is not None and self.state.log_history:  # evaluations, too, get their place
            entry = self.state.log_history[-1]
            entry["adaptive_batch/samples_seen"] = run.clock.samples_seen


def _weigh_alike(step: StepBatch, divisors: list[float]) -> bool:
    """Whether samples do; else, as with a plain short last micro-batch, estimates are biased."""
    of_sample = [d * size for d, size in zip(divisors, step.sizes, strict=True) if size]
    return all(math.isclose(value, of_sample[0]) for value in of_sample)


class AdaptiveBatchTrainer(AdaptiveBatchMixin, Trainer):
    """`transformers.Trainer` with a global batch size that follows the gradient noise.

        trainer = AdaptiveBatchTrainer(model=model, args=AdaptiveBatchArguments(...), ...)

    Takes what `Trainer` takes; `args` defaults to `AdaptiveBatchArguments("tmp_trainer")`.

    Args:
        model: As the Trainer's.
        args: `AdaptiveBatchArguments`.
        *rest: As the Trainer's.
        **kwargs: As the Trainer's, and `controller`.
    """

    def __init__(self, model: Any = None, args: Any = None, *rest: Any, **kwargs: Any) -> None:
        if args is None:
            args = AdaptiveBatchArguments(output_dir="tmp_trainer")
        super().__init__(model, args, *rest, **kwargs)
