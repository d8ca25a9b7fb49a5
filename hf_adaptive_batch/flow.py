"""Tells the Trainer's own loop how far training is, in samples, before any other callback looks."""

import math
import sys
from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .run import AdaptiveRun


class TrainingFlowCallback(TrainerCallback):
    """Runs first while training: commits steps, and corrects what the loop counts in steps.

    One optimizer step passes these events, in this order:

        on_train_begin       the learning rate of a resumed run, by the clock; the user's betas
        on_epoch_begin       accumulation is hidden: for the loop a StepBatch is one "batch"
        (forward, backward)  the trainer's _run_step measures, decides, applies
        on_optimizer_step    the clock moves on, before the learning-rate schedule reads it
        on_step_end          epoch, expected steps, fractional intervals, end of the epoch

    Args:
        run_in_progress: Gives the run that is followed.
        catch_up: Brings a learning-rate schedule of whole steps to where the clock stands.
        align: Sets the learning rate of a resumed run.
    """

    def __init__(
        self,
        run_in_progress: Callable[[], AdaptiveRun],
        catch_up: Callable[[], None],
        align: Callable[[], None],
    ) -> None:
        self._run_in_progress = run_in_progress
        self._catch_up, self._align = catch_up, align
        self._steps_before = 0.0

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Begin, or go on, with the learning rate of where the clock stands."""
        self._align()

    def on_epoch_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Hide accumulation from the loop: its phase cannot change under it."""
        args.gradient_accumulation_steps = 1

    def on_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Commit the step."""
        run = self._run_in_progress()
        self._steps_before = run.clock.initial_steps
        run.commit_step()

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Correct what the other callbacks and the log are about to read."""
        run = self._run_in_progress()
        clock = run.clock
        self._catch_up()
        state.epoch = clock.epoch
        state.max_steps = state.global_step + clock.remaining_steps(run.plan.global_batch_size)
        for kind in ("logging", "eval", "save"):
            share = getattr(args, f"{kind}_steps")
            if share is not None and 0 < share < 1:
                interval = math.ceil(share * clock.total_initial_steps)
                due = clock.initial_steps // interval > self._steps_before // interval
                # The default flow acts on multiples of this number: now, or never before the next
                # look.
                setattr(state, f"{kind}_steps", state.global_step + (not due))
        if run.step is not None and run.step.ends_epoch:
            control.should_epoch_stop = True


def initial_training_values(
    run: AdaptiveRun, count_examples: Callable[[], int]
) -> tuple[int, int, int, int, int, int | None, int]:
    """What the loop counts with, for the steps that the rest of the budget is expected to take.

    Args:
        run: The run.
        count_examples: Of a stream, what the Trainer knows of its length.

    Returns:
        As `Trainer.set_initial_training_values`.
    """
    clock = run.clock
    samples, epoch_samples = clock.budget_samples, clock.epoch_samples
    nominal = clock.total_initial_steps * run.initial_plan.global_batch_size
    epochs = sys.maxsize  # unless it is known how long they are, and how much to train on
    if samples is not None and epoch_samples is not None:
        epochs = math.ceil(samples / epoch_samples)
    # An upper bound, as the epoch's end is told by the clock. On resume the loop divides the
    # steps done by this, and must get epoch 0: the real one is in the clock, too.
    steps = clock.initial_steps_per_epoch
    if run.controller.can_change or run.plan != run.initial_plan:
        steps = sys.maxsize if epoch_samples is None else epoch_samples
    if epoch_samples is None and clock.budget_tokens is not None:
        steps = sys.maxsize  # known only on average
    steps = max(steps, clock.steps + 1)
    return (
        epochs,
        steps,
        nominal if epoch_samples is None else count_examples(),
        nominal if samples is None else samples,
        run.initial_plan.global_batch_size,
        steps,
        clock.steps + clock.remaining_steps(run.plan.global_batch_size),
    )
