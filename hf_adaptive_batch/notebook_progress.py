"""The Trainer's bar of a notebook, in samples. Imported only there: it needs IPython."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.utils.notebook import NotebookProgressCallback

from .progress import batch_in_force


if TYPE_CHECKING:
    from .run import AdaptiveRun


class NotebookSamplesCallback(NotebookProgressCallback):
    """The Trainer's bar and table of losses; the bar counts the budget's samples or tokens.

    Args:
        run: The run to show.
        replaced: The callback whose place it takes.
    """

    training_tracker: Any
    _force_next_update: bool

    def __init__(self, run: AdaptiveRun, replaced: NotebookProgressCallback) -> None:
        super().__init__()
        self.replaced_by_samples = replaced
        self._run = run

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Open the bar and the table; steps would become fewer as the batch grows."""
        super().on_train_begin(args, state, control, **kwargs)
        clock = self._run.clock
        total = clock.budget_tokens or clock.budget_samples
        if total is None:  # a stream's budget in steps: about as many samples
            total = (clock.budget_steps or 0) * clock.initial_global_batch_size
        self.training_tracker.total = total

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Move the bar."""
        self._show(self._force_next_update)
        self._force_next_update = False

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Show where the run ended."""
        self._show(True)
        self.training_tracker = None

    def _show(self, force: bool) -> None:
        clock = self._run.clock
        of_tokens = clock.budget_tokens is not None
        self.training_tracker.update(
            clock.tokens_seen if of_tokens else clock.samples_seen,
            force_update=force,
            comment=f"{'tokens' if of_tokens else 'samples'}, {batch_in_force(self._run)}",
        )
