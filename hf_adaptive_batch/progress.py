"""The progress bar of an adaptive run: samples, the batch in force and the noise scale."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ProgressCallback


if TYPE_CHECKING:
    from .run import AdaptiveRun


# What an evaluation logs beside its metrics.
_NO_METRICS = (
    "eval_loss",
    "_token_loss",
    "_runtime",
    "_per_second",
    "_time",
    "epoch",
    "samples_seen",
)


class SampleProgressCallback(ProgressCallback):
    """The Trainer's bar, counting the budget's samples or tokens; steps would shrink as it grows.

    Args:
        run: The run to show.
        replaced: The callback whose place it takes.
    """

    def __init__(self, run: AdaptiveRun, replaced: ProgressCallback) -> None:
        super().__init__(replaced.max_str_len)
        self.replaced_by_samples = replaced
        self._run = run

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Open the bar where the run stands."""
        if state.is_world_process_zero:
            clock = self._run.clock
            unit = "samples" if clock.budget_tokens is None else "tokens"
            self.training_bar = tqdm(
                total=clock.budget_tokens or clock.budget_samples,
                initial=self._seen(),
                unit=f" {unit}",
                dynamic_ncols=True,
            )
        self.current_step = state.global_step

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Move the bar; beside it stand the next step's batch and the noise scale."""
        if state.is_world_process_zero:
            self.training_bar.set_postfix_str(batch_in_force(self._run), refresh=False)
            self.training_bar.update(self._seen() - self.training_bar.n)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write a training log as one short line, another as the Trainer does."""
        if not state.is_world_process_zero or self.training_bar is None or logs is None:
            return
        if isinstance(logs.get("loss"), float) and "adaptive_batch/global_batch_size" in logs:
            self.training_bar.write(_line(logs))
        elif "eval_loss" in logs:
            seen = self._run.clock.samples_seen
            metrics = [
                f"{name.removeprefix('eval_').replace('_', ' ')} {value:.4g}"
                for name, value in logs.items()
                if isinstance(value, float | int) and not name.endswith(_NO_METRICS)
            ]
            line = "  ".join([f"eval loss {logs['eval_loss']:.4f}", *metrics])
            self.training_bar.write(f"{seen:>10,} samples  {line}")
        elif "train_runtime" not in logs:
            super().on_log(args, state, control, logs=logs, **kwargs)

    def _seen(self) -> int:
        clock = self._run.clock
        return clock.samples_seen if clock.budget_tokens is None else clock.tokens_seen


def show_samples(callbacks: list[TrainerCallback], run: AdaptiveRun) -> None:
    """Let a bar that counts samples take the place of the Trainer's plain one, if it has one.

    Args:
        callbacks: The Trainer's callbacks, changed in place.
        run: The run to show.
    """
    # A callback of a notebook is there only if its module, which needs IPython, was imported.
    notebook = sys.modules.get("transformers.utils.notebook")
    for index, callback in enumerate(callbacks):
        if type(callback) is ProgressCallback:
            callbacks[index] = SampleProgressCallback(run, callback)
        elif notebook is not None and type(callback) is notebook.NotebookProgressCallback:
            from .notebook_progress import NotebookSamplesCallback

            callbacks[index] = NotebookSamplesCallback(run, callback)


def show_steps(callbacks: list[TrainerCallback]) -> None:
    """Undo `show_samples`.

    Args:
        callbacks: The Trainer's callbacks, changed in place.
    """
    for index, callback in enumerate(callbacks):
        if hasattr(callback, "replaced_by_samples"):
            callbacks[index] = callback.replaced_by_samples


def batch_in_force(run: AdaptiveRun) -> str:
    """What stands beside a bar: the next step's batch, and the noise scale where it is known.

    Args:
        run: The run to show.

    Returns:
        A few words.
    """
    noise_scale = run.estimator.estimate().noise_scale
    shown = f"batch {run.plan.global_batch_size}"
    return shown if noise_scale is None else f"{shown}, noise scale {noise_scale:.3g}"


def _line(logs: dict[str, Any]) -> str:
    def value(name: str) -> Any:
        return logs.get(f"adaptive_batch/{name}")

    factors = [value("micro_batch_size"), value("accumulation_steps")]
    if value("data_parallel_size") > 1:
        factors.append(value("data_parallel_size"))
    parts = [
        f"{value('samples_seen'):>10,} samples",
        f"loss {logs['loss']:.4f}",
        *([f"lr {logs['learning_rate']:.2e}"] if "learning_rate" in logs else []),
        f"batch {value('global_batch_size')} = {' x '.join(map(str, factors))}",
    ]
    if value("noise_scale") is not None:
        parts.append(f"noise scale {value('noise_scale'):.3g}")
    if value("reason") is not None:
        parts.append(str(value("reason")).replace("_", " "))
    return "  ".join(parts)
