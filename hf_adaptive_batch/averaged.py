"""How a Trainer evaluates, saves and resumes the average of its weights."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .averaging_callback import WeightAveragingCallback
from .run import AdaptiveRun


# For the type checker a Trainer; at run time a mixin that stands in front of any.
if TYPE_CHECKING:
    from transformers import Trainer as _Trainer
else:
    _Trainer = object


class AveragedEvaluationMixin(_Trainer):
    """Has evaluations see the average that a `WeightAveragingCallback` keeps, if there is one."""

    _hosting: bool

    if TYPE_CHECKING:

        @property
        def run(self) -> AdaptiveRun:
            """See `HostedLoopMixin`."""

    @property
    def weight_averaging(self) -> WeightAveragingCallback | None:
        """The callback that averages, the user's or the one that the arguments ask for.

        Raises:
            ValueError: If there are several.
        """
        callbacks = self.callback_handler.callbacks
        found = [each for each in callbacks if isinstance(each, WeightAveragingCallback)]
        if len(found) > 1:
            raise ValueError(
                f"callbacks ({len(found)} WeightAveragingCallbacks) must hold one at most, because "
                "an evaluation is of one average; remove the others, or averaging_decay and "
                "averaging_half_life_tokens, which add one."
            )
        return found[0] if found else None

    def _add_weight_averaging(self) -> None:
        """Add the callback that the arguments ask for."""
        decay, half_life = self.args.averaging_decay, self.args.averaging_half_life_tokens
        if decay is not None or half_life is not None:
            self.add_callback(WeightAveragingCallback(decay=decay, half_life_tokens=half_life))
        self.weight_averaging  # noqa: B018  # refuses a second

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Train, and average as the callback says.

        Args:
            resume_from_checkpoint: As the Trainer's.
            *args: As the Trainer's.
            **kwargs: As the Trainer's.

        Returns:
            The Trainer's `TrainOutput`.
        """
        averaging = self.weight_averaging
        if averaging is None:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        clock: Callable[[], int] = lambda: self.run.clock.tokens_seen  # noqa: E731
        with averaging.hosted(clock if self._hosting else None):
            if isinstance(resume_from_checkpoint, str | os.PathLike):
                averaging.resume_from(resume_from_checkpoint)
            return super().train(resume_from_checkpoint, *args, **kwargs)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate or predict as the Trainer does, with the average in the weights' place.

        Args:
            *args: As the Trainer's.
            **kwargs: As the Trainer's.

        Returns:
            The Trainer's `EvalLoopOutput`.
        """
        averaging = self.weight_averaging
        with averaging.averaged_weights(self.model) if averaging else contextlib.nullcontext():
            return super().evaluation_loop(*args, **kwargs)
