"""How a Trainer's loop is made to run optimizer steps of any size: one `StepBatch` is one "batch".

The loop of `transformers.Trainer` counts micro-batches and takes their number per step as constant;
assigning `args.gradient_accumulation_steps` under way makes it synchronise at the wrong ones. So
while training it sees accumulation 1, and a loader whose items are whole steps.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers

from . import hf_compat
from .arguments import AdaptiveBatchOptions
from .assemble import assemble
from .averaged import AveragedEvaluationMixin
from .checkpoint import check_checkpoint, last_complete_checkpoint, load_run
from .co_scaled import CoScaledOptimizer
from .decide.controllers import BatchController
from .flow import TrainingFlowCallback, initial_training_values
from .hf_parallel import forget_unreduced, wrap_anew
from .hf_sharded import ShardedCheckpointMixin, check_layout
from .learning_rate import LearningRateOnClock
from .measure.probe import GradientProbe
from .progress import show_samples, show_steps
from .run import AdaptiveRun
from .saving import HOSTED_ARGUMENTS, HostedSavingMixin
from .stopping import StoppingCallback


logger = logging.getLogger(__name__)

# By this a Trainer subclass says whether its loss is divided by num_items_in_batch already.
LOSS_IS_SCALED = "loss_is_scaled_for_ga"


class HostedLoopMixin(HostedSavingMixin, AveragedEvaluationMixin, ShardedCheckpointMixin):
    """Overrides what the Trainer's loop asks for, while a run is in progress and not before."""

    _controller: BatchController | None = None
    _checkpoint: str | None = None
    _hosting = False
    _loss_scale_unknown = True
    _loss_is_summed = False  # over micro-batches and ranks, as the plain Trainer leaves it
    _run_step: Callable[..., torch.Tensor]  # one optimizer step, of micro-batches
    _find_loss_scale: Callable[[Any], None]  # by its first batches
    model_accepts_loss_kwargs: bool
    _run: AdaptiveRun | None = None
    _probe: GradientProbe | None = None  # on the prepared model, once a step was measured
    _learning_rate_on_clock: LearningRateOnClock | None = None
    _co_scaled: CoScaledOptimizer | None = None  # where a rule is in force
    _stopping: StoppingCallback | None = None  # where training may end before its budget

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Refuse a base class that comes before the mixin, whose methods would hide it.

        Raises:
            TypeError: With the order that works.
        """
        super().__init_subclass__(**kwargs)
        order = list(cls.__mro__)
        trainer = transformers.Trainer
        if trainer in order and order.index(trainer) < order.index(HostedLoopMixin):
            raise TypeError(
                f"bases of {cls.__name__} must begin with AdaptiveBatchMixin, because methods of a "
                "Trainer in front would hide it; write class X(AdaptiveBatchMixin, SomeTrainer)."
            )

    @property
    def run(self) -> AdaptiveRun:
        """The run that `train()` is at work on, or the last one.

        Raises:
            RuntimeError: Before the first `train()`.
        """
        if self._run is None:
            raise RuntimeError("There is no run before train() was called.")
        return self._run

    @property
    def _active_run(self) -> AdaptiveRun | None:
        return self._run if self._hosting else None

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Train as `Trainer.train` does, with a batch size that follows the controller.

        Args:
            resume_from_checkpoint: As the Trainer's; a checkpoint of this class.
            trial: As the Trainer's.
            ignore_keys_for_eval: As the Trainer's.
            **kwargs: As the Trainer's.

        Returns:
            The Trainer's `TrainOutput`.
        """
        if not isinstance(self.args, AdaptiveBatchOptions):
            return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval, **kwargs)
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_complete_checkpoint(self.args.output_dir)
        self._checkpoint = os.fspath(resume_from_checkpoint) if resume_from_checkpoint else None
        if self._checkpoint is not None and Path(self._checkpoint).is_dir():
            check_checkpoint(self._checkpoint)  # before anything of it is loaded
            check_layout(self, self._checkpoint)
        wrap_anew(self)
        with self._hosted():
            return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval, **kwargs)

    def _loader_of_run(self) -> Any:
        """The loader whose items are optimizer steps, made of the Trainer's or a subclass's."""
        dataloader = type(self).get_train_dataloader(self)
        if self._run is not None:
            return dataloader
        self._run = self._begin_run(dataloader)
        return self._run.loader

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """Hand over one optimizer step, its target tokens counted by the Trainer."""
        if self._active_run is None:
            return super().get_batch_samples(epoch_iterator, num_batches, device)
        if self._stopping is not None and self._stopping.has_ended:
            return [], None
        self._active_run.start_timer()
        step = next(epoch_iterator, None)
        if step is None:  # resumed at the very end: the loop must not wait for the steps it expects
            self.control.should_epoch_stop = True
            return [], None
        run = self._active_run
        if self._loss_scale_unknown and (run.controller.can_change or run.ranks.size > 1):
            self._find_loss_scale(step.micro_batches[0])
        given = step.micro_batches
        # One that only stands in has no targets to be counted, but goes through the model as it is.
        counted = [
            batch if size else hf_compat.without_targets(batch)
            for batch, size in zip(given, step.sizes, strict=True)
        ]
        found, items = super().get_batch_samples(iter(counted), len(counted), device)
        step.micro_batches = [
            new if size else old for new, old, size in zip(found, given, step.sizes, strict=True)
        ]
        run.begin_step(step)
        self._scale_for_step(run)
        return [step], items

    def set_initial_training_values(
        self, args: Any, dataloader: Any
    ) -> tuple[int, int, int, int, int, int | None, int]:
        """The Trainer's counts, with the steps that the rest of the budget is expected to take."""
        if self._active_run is None or dataloader is not self.run.loader:
            return super().set_initial_training_values(args, dataloader)
        return initial_training_values(self.run, lambda: self.num_examples(dataloader))

    def _scheduler_of_run(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The Trainer's schedule, or a subclass's, over the whole budget, following samples."""
        run, factor = self.run, None
        made = type(self).create_scheduler(self, run.clock.total_initial_steps, optimizer)
        scheduler = self.lr_scheduler or made  # the Trainer takes its attribute
        if run.scales_learning_rate or not run.co_scaling.is_off:
            self._co_scaled = CoScaledOptimizer(
                optimizer or self.optimizer, run.co_scaling, seesaw=run.seesaw is not None
            )
            if run.scales_learning_rate:
                factor = partial(run.learning_rate_factor, self._co_scaled.kind)
        self._learning_rate_on_clock = LearningRateOnClock(scheduler, run.clock, factor)
        return scheduler

    @contextlib.contextmanager
    def _hosted(self) -> Iterator[None]:
        """The facade around one `train()`: whatever happens, nothing of it stays behind."""
        args, flow = self.args, TrainingFlowCallback(lambda: self.run, self._catch_up, self._align)
        self._users_values = {name: getattr(args, name) for name in HOSTED_ARGUMENTS}
        # The loop would skip as many "batches" as there were steps; the place is in our own state.
        args.ignore_data_skip = True
        self._stopping = StoppingCallback.of(args, lambda: self.run)
        first = [flow] if self._stopping is None else [flow, self._stopping]
        self.callback_handler.callbacks[:0] = first
        self._run, self._probe, self._hosting, self._co_scaled = None, None, True, None
        self._loss_scale_unknown, self._loss_is_summed = True, False
        # On the object, in front of a subclass's own: what users override sees micro-batches.
        hosted = {
            "get_train_dataloader": self._loader_of_run,
            "create_scheduler": self._scheduler_of_run,
            "training_step": self._run_step,
        }
        self.__dict__.update(hosted)
        accepts, scaled = self.model_accepts_loss_kwargs, getattr(self, LOSS_IS_SCALED, None)
        try:
            yield
        except BaseException:
            forget_unreduced(self.model_wrapped)
            raise
        finally:
            self._hosting = False
            for name in hosted:
                del self.__dict__[name]
            self.model_accepts_loss_kwargs = accepts
            setattr(self, LOSS_IS_SCALED, scaled)
            for name, value in self._users_values.items():
                setattr(args, name, value)
            for callback in first:
                self.callback_handler.remove_callback(callback)
            show_steps(self.callback_handler.callbacks)
            if self._learning_rate_on_clock is not None:
                self._learning_rate_on_clock.detach()
            if self._run is not None:
                self._run.loader.close()
            if self._co_scaled is not None:
                self._co_scaled.set(1.0, 1.0)
            self._learning_rate_on_clock = self._probe = self._co_scaled = None
            self._stopping = None

    def _catch_up(self) -> None:
        """Bring a schedule that only knows whole steps to where the clock stands."""
        if self._learning_rate_on_clock is not None:
            self._learning_rate_on_clock.catch_up()

    def _scale_for_step(self, run: AdaptiveRun) -> None:
        """Let rates, betas and weight decay be those for the batch of the step in hand."""
        if self._co_scaled is None or self._learning_rate_on_clock is None:
            return
        if run.scales_learning_rate:
            self._learning_rate_on_clock.align()
        self._co_scaled.set(run.batch_ratio, run.learning_rate_factor(self._co_scaled.kind))

    def _align(self) -> None:
        """Let a resumed run begin with the learning rate of where the clock stands."""
        if self._co_scaled is not None:
            self._co_scaled.begin()  # a checkpoint's values are the user's, as for the Trainer
        if self._learning_rate_on_clock is not None and self._checkpoint is not None:
            self._learning_rate_on_clock.align()

    def _begin_run(self, dataloader: Any) -> AdaptiveRun:
        self._trainable = {id(p) for p in self.model.parameters() if p.requires_grad}
        run = assemble(self, dataloader, self._controller)
        resume_step = None
        if self._checkpoint is not None:
            load_run(run, self._checkpoint, anew=self._users_values["ignore_data_skip"])
            resume_step = run.clock.steps
        if self.args.should_save:
            run.open_records(self.args.output_dir, resume_step)
        show_samples(self.callback_handler.callbacks, run)
        return run
