"""Learning-rate schedules that follow samples, or tokens, instead of optimizer steps."""

import inspect
import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from .apply.clock import TrainingClock


class LearningRateOnClock:
    """Makes a learning-rate scheduler follow the clock's initial steps instead of optimizer steps.

    A `LambdaLR` (all schedules of transformers but those driven by metrics) has its functions
    evaluated at the clock, fractions included; while the batch has not grown that is the step
    itself. Another scheduler is stepped on until it has made as many whole steps. One whose `step`
    takes metrics is left alone. Can go when `LambdaLR` takes its progress from outside.

    Args:
        scheduler: The Trainer's scheduler.
        clock: The run's clock.
        factor: What the rates are multiplied by; None for nothing.

    Raises:
        ValueError: If there is a factor, but no function whose values it could multiply.
    """

    def __init__(
        self,
        scheduler: LRScheduler,
        clock: TrainingClock,
        factor: Callable[[], float] | None = None,
    ) -> None:
        self._factor = factor
        self._scheduler: Any = scheduler
        self._clock = clock
        self._begin = getattr(scheduler, "last_epoch", 0)
        self._lambdas: list[Callable[[int], float]] | None = None
        if isinstance(scheduler, LambdaLR):
            self._lambdas = scheduler.lr_lambdas
            scheduler.lr_lambdas = [self._at_clock(function) for function in self._lambdas]
        elif factor is not None:
            raise ValueError(
                f"learning-rate schedule ({type(scheduler).__name__}) must be a LambdaLR where the "
                "batch scales the learning rate, because another one goes on from the rate before; "
                "choose an lr_scheduler_type such as cosine, or scale_learning_rate none."
            )
        driven_by_metrics = "metrics" in inspect.signature(scheduler.step).parameters
        steps_of_its_own = hasattr(scheduler, "last_epoch") and not driven_by_metrics
        self._chainable = self._lambdas is None and steps_of_its_own

    def catch_up(self) -> None:
        """Make up the whole steps by which a larger batch went ahead; after `step` itself."""
        if self._chainable:
            target = self._begin + math.floor(self._clock.initial_steps)
            while self._scheduler.last_epoch < target:
                self._scheduler.step()

    def align(self) -> None:
        """Set the rates to where the clock stands; a resumed optimizer has those of its saving."""
        if self._lambdas is None:
            with warnings.catch_warnings():  # of steps before the first one of the optimizer
                warnings.simplefilter("ignore", UserWarning)
                self.catch_up()
            return
        scheduler = self._scheduler
        rates = [
            base * function(0)
            for base, function in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
        ]
        for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
        scheduler._last_lr = rates

    def detach(self) -> None:
        """Give the scheduler its own functions back."""
        if self._lambdas is not None:
            self._scheduler.lr_lambdas = self._lambdas

    def _at_clock(self, function: Callable[[int], float]) -> Callable[[int], float]:
        # A plain closure: LambdaLR saves the attributes of any other callable with the checkpoint.
        def at_clock(_step: int) -> float:
            steps = self._begin + self._clock.initial_steps
            rate = function(int(steps) if steps == int(steps) else steps)  # type: ignore[arg-type]
            return rate if self._factor is None else rate * self._factor()

        return at_clock
