"""AdaptiveBatchTrainer: the only place where measure, decide and apply meet."""

from __future__ import annotations

import contextlib
import logging
import math
from typing import Any

import torch
from torch import nn
from transformers import Trainer

from . import hf_compat
from .apply.loader import StepBatch
from .arguments import AdaptiveBatchArguments, AdaptiveBatchOptions
from .decide.controllers import BatchController
from .hosting import HostedLoopMixin
from .measure.probe import GradientProbe
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
        super().__init__(*args, **kwargs)
        if isinstance(self.args, AdaptiveBatchOptions):
            check_support(self)
        else:
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
        divisors = self._loss_divisors(inputs)
        measured = (
            count > 1
            and run.controller.measures(run.clock.steps + 1)
            and (num_items_in_batch is not None or _weigh_samples_alike(inputs, divisors))
        )
        losses: list[torch.Tensor] = []
        with GradientProbe(model) if measured else contextlib.nullcontext() as probe:
            for index, batch in enumerate(inputs.micro_batches):
                last = index == count - 1
                self.current_gradient_accumulation_steps = divisors[index]
                with hf_compat.micro_batch(self, model, last=last):
                    losses.append(type(self).training_step(self, model, batch, num_items_in_batch))
                if probe is not None:
                    probe.end_micro_batch()
                if not last:
                    hf_compat.report_loss(self, losses[-1])
                    self.callback_handler.on_substep_end(self.args, self.state, self.control)
            loss = torch.stack(losses).sum()
            finite = bool(torch.isfinite(loss))
            if probe is not None:
                weights = self._weights(inputs, divisors, num_items_in_batch)
                finite = self._adapt(probe, weights, loss, finite=finite)
        if not finite:
            self._skip_nonfinite_step()
        return losses[-1]

    def _adapt(
        self, probe: GradientProbe, weights: list[float], loss: torch.Tensor, *, finite: bool
    ) -> bool:
        """The library on one screen: gradients -> moments -> test -> decision -> plan.

        Args:
            probe: Has seen all micro-batches of the step.
            weights: Of the micro-batches' mean gradients.
            loss: The step's loss.
            finite: Whether it is finite.

        Returns:
            Whether loss and gradients are finite.
        """
        run, scale = self.run, self._loss_scale()
        moments = probe.finish(run.step_samples, weights, loss_scale=scale) if finite else None
        if moments is not None and not moments.is_finite:
            moments, finite = None, False
        noise = run.estimator.update(moments) if moments else run.estimator.estimate()
        test = run.criterion.evaluate(moments, noise) if moments else None
        decision = run.controller.decide(run.observation(test, finite=finite))
        run.loader.set_plan(run.feasible(decision))
        learning_rate = float(self.optimizer.param_groups[0]["lr"])
        run.record(moments, test, decision, loss=float(loss), learning_rate=learning_rate)
        return finite

    def _loss_scale(self) -> float:
        scaler = self.accelerator.scaler
        return float(scaler.get_scale()) if scaler is not None else 1.0

    def _loss_divisors(self, step: StepBatch) -> list[float]:
        """What the Trainer divides each micro-batch's plain mean loss by.

        Samples weigh alike, also where the last micro-batch is short. The plain Trainer weighs
        micro-batches alike; where the batch cannot change, everything is as there.

        Returns:
            One divisor per micro-batch; their inverses sum to 1.
        """
        if self.run.controller.can_change:
            return [step.samples / size for size in step.sizes]
        return [float(len(step.sizes))] * len(step.sizes)

    def _weights(self, step: StepBatch, divisors: list[float], num_items: Any) -> list[float]:
        """How each micro-batch's mean gradient is weighted in the step's gradient."""
        if num_items is None or hf_compat.divides_loss(self):
            return [1 / divisor for divisor in divisors]
        return [hf_compat.target_tokens(self, batch) for batch in step.micro_batches]

    def _skip_nonfinite_step(self) -> None:
        """Count a step whose loss is not finite, and keep its gradient from the weights."""
        self.run.skipped_steps += 1
        # An fp16 gradient scaler skips such steps by itself, and needs the gradients to see them.
        if self.args.skip_nonfinite_steps and self.accelerator.scaler is None:
            self.optimizer.zero_grad()
            logger.warning(
                "The loss of step %d is not finite: the step is skipped.", self.run.clock.steps + 1
            )

    def log(self, logs: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        """Log as the Trainer does; a training log also says what is known of the batch."""
        run = self._active_run
        if run is not None and "loss" in logs:
            logs.update(run.log_values())
        super().log(logs, *args, **kwargs)
        if run is not None and self.state.log_history:  # evaluations, too, get their place
            entry = self.state.log_history[-1]
            entry["adaptive_batch/samples_seen"] = run.clock.samples_seen


def _weigh_samples_alike(step: StepBatch, divisors: list[float]) -> bool:
    """Else, as with a short last micro-batch under the plain Trainer, estimates are biased."""
    pairs = zip(divisors, step.sizes, strict=True)
    return all(math.isclose(divisor * size, step.samples) for divisor, size in pairs)


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
