"""What a Trainer saves while its loop is our host: its own files, and the state of the run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from .arguments import AdaptiveBatchOptions
from .averaging_callback import WeightAveragingCallback
from .checkpoint import invalidate, is_checkpoint, save_run
from .co_scaled import CoScaledOptimizer
from .decide.controllers import BatchController
from .hf_parallel import whole_weights
from .report.model_card import add_section
from .run import AdaptiveRun


# For the type checker a Trainer; at run time a mixin that stands in front of any.
if TYPE_CHECKING:
    from transformers import Trainer as _Trainer
else:
    _Trainer = object

# Arguments that the loop must see otherwise while it is our host.
HOSTED_ARGUMENTS = ("gradient_accumulation_steps", "ignore_data_skip")


class HostedSavingMixin(_Trainer):
    """Saves as the Trainer does, and into a checkpoint also what a run goes on from."""

    _hosting: bool
    _co_scaled: CoScaledOptimizer | None
    _controller: BatchController | None
    _users_values: dict[str, Any]  # of the arguments that the loop sees otherwise

    if TYPE_CHECKING:

        @property
        def _active_run(self) -> AdaptiveRun | None: ...
        @property
        def weight_averaging(self) -> WeightAveragingCallback | None:
            """See `AveragedEvaluationMixin`."""

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save as the Trainer does, with the user's arguments; into a checkpoint also the state."""
        run = self._active_run
        if run is None or output_dir is None or not (_internal_call and is_checkpoint(output_dir)):
            whole = isinstance(self.args, AdaptiveBatchOptions) and not _internal_call
            weights = whole_weights(self) if whole else contextlib.nullcontext()
            with self._users_arguments(), weights:
                super().save_model(output_dir, _internal_call)
            return
        invalidate(output_dir, self.args)
        with self._users_arguments():
            super().save_model(output_dir, _internal_call)
        averaging = self.weight_averaging
        if averaging is not None:
            averaging.save(output_dir)
        save_run(run, self.args, output_dir, averaged=averaging is not None)
        run.record_evaluation({})  # the time that led to it, should a run go on from here

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Save as the Trainer does, but not in the middle of a step: then at its end.

        Between a batch and its optimizer step the place in the data and the clock do not agree;
        transformers' `JITCheckpointCallback` saves there when the process is told to end.
        """
        if self._active_run is not None and self._active_run.in_hand:
            self.control.should_save = True
            return
        scaled = self._co_scaled
        with scaled.at_base() if scaled else contextlib.nullcontext():
            super()._save_checkpoint(model, trial)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Make the Trainer's card, with a section on how the batch size was chosen.

        Once training has ended: cards that are made for each checkpoint are the Trainer's.

        Args:
            *args: As the Trainer's.
            **kwargs: As the Trainer's.
        """
        super().create_model_card(*args, **kwargs)
        if isinstance(self.args, AdaptiveBatchOptions) and not self._hosting:
            if self.is_world_process_zero():
                add_section(self.args.output_dir, self._schedule_text())

    def _schedule_text(self) -> str:
        """What decided, with the one number that matters most."""
        if self._controller is not None:
            return type(self._controller).__name__
        options = self.args
        if options.batch_schedule not in ("norm_test", "noise_scale"):
            return f"the schedule {options.batch_schedule}"
        kind = options.batch_schedule.replace("_", " ")
        if options.batch_schedule == "norm_test":
            return f"{kind}, eta {options.eta:g}, {options.norm_test_estimator} estimate"
        return kind

    @contextlib.contextmanager
    def _users_arguments(self) -> Iterator[None]:
        """What is saved carries the user's arguments, not the facade's."""
        if not self._hosting:
            yield
            return
        hosted = {name: getattr(self.args, name) for name in HOSTED_ARGUMENTS}
        for name, value in self._users_values.items():
            setattr(self.args, name, value)
        try:
            yield
        finally:
            for name, value in hosted.items():
                setattr(self.args, name, value)
