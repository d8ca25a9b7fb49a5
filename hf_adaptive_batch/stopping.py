"""Ends of training beside the budget: at a number of tokens, or at an evaluation loss."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .run import AdaptiveRun


if TYPE_CHECKING:
    from transformers import Trainer


class StoppingCallback(TrainerCallback):
    """Ends training as the budget's end does: with an evaluation and a checkpoint, if by steps.

    Budget, learning-rate schedule and the number of expected steps stay as they are.

    Args:
        run_in_progress: Gives the run that is ended.
        eval_loss: End after the first evaluation whose loss is at most this.
        tokens: End with the step that reaches so many tokens.
    """

    def __init__(
        self,
        run_in_progress: Callable[[], AdaptiveRun],
        *,
        eval_loss: float | None,
        tokens: int | None,
    ) -> None:
        self._run_in_progress = run_in_progress
        self._eval_loss, self._tokens = eval_loss, tokens
        self.has_ended = False

    @classmethod
    def of(cls, args: Any, run_in_progress: Callable[[], AdaptiveRun]) -> StoppingCallback | None:
        """The callback that arguments ask for.

        Args:
            args: With `AdaptiveBatchOptions`.
            run_in_progress: See the class.

        Returns:
            None where training ends with its budget alone.
        """
        if args.stop_at_eval_loss is None and args.stop_after_tokens is None:
            return None
        return cls(run_in_progress, eval_loss=args.stop_at_eval_loss, tokens=args.stop_after_tokens)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Look whether a resumed run has ended already."""
        losses = (entry.get("eval_loss") for entry in state.log_history)
        self.has_ended = any(self._is_reached(loss) for loss in losses if loss is not None)
        if self._tokens is not None:
            self.has_ended |= self._run_in_progress().clock.tokens_seen >= self._tokens

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """End before another step, where the end was reached between two epochs or before."""
        if self.has_ended:
            control.should_epoch_stop = control.should_training_stop = True

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """End with the step that reaches the tokens.

        Args:
            args: Whether to evaluate and save at the end.
            state: How far training is.
            control: Told to end.
            **kwargs: Unused.

        Raises:
            ValueError: If the data have no tokens.
        """
        if self._tokens is None:
            return
        seen = self._run_in_progress().clock.tokens_seen
        if seen == 0:
            raise ValueError(
                f"stop_after_tokens ({self._tokens}) must be left out, because there are no tokens "
                "in the collated samples: no attention_mask, and no integers under the model's "
                "main input; give a budget in samples."
            )
        if seen >= self._tokens:
            self._end(args, control)
            by_steps = args.eval_strategy == "steps" and args.eval_delay <= state.global_step
            control.should_evaluate |= by_steps

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """End after an evaluation whose loss is low enough.

        Args:
            args: Whether to save at the end.
            state: Unused.
            control: Told to end.
            metrics: What the evaluation found.
            **kwargs: Unused.

        Raises:
            ValueError: If the evaluation has no loss.
        """
        if self._eval_loss is None or metrics is None or "eval_runtime" not in metrics:
            return  # or one of the user's own, under another name
        if "eval_loss" not in metrics:
            raise ValueError(
                f"stop_at_eval_loss ({self._eval_loss}) must go with an eval_loss, because "
                "training ends by it, but the evaluation gave none; add labels to eval_dataset."
            )
        # Computed of what all ranks have gathered; but a loss that differed would leave them
        # waiting for each other for ever, and `evaluate` is the user's to override.
        mine = array("q", [self._is_reached(metrics["eval_loss"])])
        if self._run_in_progress().ranks.of_first(mine)[0]:
            self._end(args, control)

    def _is_reached(self, loss: float) -> bool:
        return self._eval_loss is not None and loss <= self._eval_loss

    def _end(self, args: TrainingArguments, control: TrainerControl) -> None:
        self.has_ended = control.should_training_stop = True
        control.should_save |= args.save_strategy == "steps"


def check_stopping(trainer: Trainer) -> None:
    """Refuse to look for one loss among those of several datasets.

    Args:
        trainer: A trainer with adaptive arguments, constructed.

    Raises:
        ValueError: With the reason and the way out.
    """
    target, dataset = trainer.args.stop_at_eval_loss, trainer.eval_dataset
    if target is not None and isinstance(dataset, dict):
        raise ValueError(
            f"stop_at_eval_loss ({target}) must go with one eval_dataset, because of several "
            f"({', '.join(dataset)}) each has a loss of its own name, and none is eval_loss; pass "
            "one, and evaluate the others yourself."
        )
