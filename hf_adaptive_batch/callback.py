"""GradientNoiseCallback: the gradient noise of any Trainer's run, measured and logged."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .arguments import AdaptiveBatchOptions
from .decide.criteria import NormTest
from .decide.noise_scale import NoiseScaleEstimator
from .measure.probe import GradientProbe


if TYPE_CHECKING:
    from transformers import Trainer


class GradientNoiseCallback(TrainerCallback):
    """Logs `adaptive_batch/noise_scale` and its parts under a plain `Trainer`; decides nothing.

        trainer = Trainer(..., callbacks=[GradientNoiseCallback()])

    The values are added to the training logs. Callbacks that come before this one, such as
    trackers, do not see them; `GradientNoiseCallback.first_in(trainer)` puts it before all others.

    Args:
        eta: Of the norm test that is logged.
        test_interval: Measure every so many optimizer steps.
        noise_scale_decay: See `NoiseScaleEstimator`.

    Raises:
        ValueError: If an argument is out of its range.
    """

    def __init__(
        self, eta: float = 0.2, test_interval: int = 1, noise_scale_decay: float = 0.9
    ) -> None:
        if test_interval < 1:
            raise ValueError(
                f"test_interval ({test_interval}) must be at least 1, because it counts "
                "optimizer steps; remove the callback to measure nothing."
            )
        self._interval = test_interval
        self._estimator = NoiseScaleEstimator(noise_scale_decay)
        self._criterion = NormTest(eta)
        self._probe: GradientProbe | None = None
        self._forward_hook: Any = None
        self._inputs: list[_Inputs] = []
        self._open, self._ended = True, 0
        self._values: dict[str, float] = {}

    @classmethod
    def first_in(cls, trainer: Trainer, **kwargs: Any) -> GradientNoiseCallback:
        """Add a callback before all others, so that trackers log its values too.

        Args:
            trainer: Any Trainer.
            **kwargs: As the constructor's.

        Returns:
            The callback.
        """
        callback = cls(**kwargs)
        trainer.callback_handler.callbacks.insert(0, callback)
        return callback

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Refuse what cannot be measured from a callback.

        Args:
            args: The Trainer's arguments.
            state: Unused.
            control: Unused.
            **kwargs: Unused.

        Raises:
            ValueError: With the reason and the way out.
        """
        self._detach()
        if isinstance(args, AdaptiveBatchOptions):
            raise ValueError(
                f"args ({type(args).__name__}) must be plain TrainingArguments, because an "
                "adaptive Trainer measures and logs the same by itself; remove the callback."
            )
        if args.gradient_accumulation_steps < 2:
            raise ValueError(
                f"gradient_accumulation_steps ({args.gradient_accumulation_steps}) must be at "
                "least 2, because one gradient says nothing of its noise and a callback cannot "
                "split a micro-batch; halve per_device_train_batch_size and accumulate 2, or use "
                "AdaptiveBatchTrainer."
            )
        if args.world_size > 1 or args.n_gpu > 1 or args.deepspeed:
            raise ValueError(
                f"world_size ({args.world_size}) and n_gpu ({args.n_gpu}) must be 1, without "
                "DeepSpeed, because this version measures a single process; run it on one device."
            )
        if args.label_smoothing_factor > 0:
            raise ValueError(
                f"label_smoothing_factor ({args.label_smoothing_factor}) must be 0, because then "
                "the model is not given the labels that micro-batches are weighted by; use "
                "AdaptiveBatchTrainer."
            )
        if args.fp16:
            raise ValueError(
                "fp16 (True) must be False, because a callback cannot see the loss scale in the "
                "gradients; use bf16, or AdaptiveBatchTrainer."
            )

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Put the hooks on for a measured step."""
        if model is not None and (state.global_step + 1) % self._interval == 0:
            self._probe = GradientProbe(model, total_from_backward=True)
            self._probe.attach()
            self._forward_hook = model.register_forward_pre_hook(self._see_inputs, with_kwargs=True)

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Close a micro-batch."""
        if self._probe is not None:
            self._probe.end_micro_batch()
            self._ended += 1
            self._open = True

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Close the last micro-batch and take the step in; `.grad` is clipped by now."""
        if self._probe is None:
            return
        self._probe.end_micro_batch()
        self._ended += 1
        inputs = self._inputs
        if len(inputs) != self._ended or not all(seen.samples for seen in inputs):
            raise RuntimeError(
                f"The model's forward ({len(inputs)} calls seen) must run in each of the step's "
                f"{self._ended} micro-batches, because their samples are counted there; if "
                "compute_loss calls parts of the model instead, use AdaptiveBatchTrainer."
            )
        weights = _weights(inputs)
        moments = self._probe.finish(sum(seen.samples for seen in inputs), weights)
        self._detach()
        if inputs[0].items is None and len({seen.samples for seen in inputs}) > 1:
            return  # the Trainer weighs a short micro-batch like a whole one: a biased measurement
        if moments is None or not moments.is_finite:
            return  # a short step of one micro-batch, or a loss that was not finite
        noise = self._estimator.update(moments)
        values = {
            "noise_scale": noise.noise_scale,
            "noise_trace": noise.noise_trace,
            "grad_sq_norm": noise.grad_sq_norm,
            "norm_test": self._criterion.evaluate(moments, noise).statistic,
        }
        self._values = {f"adaptive_batch/{k}": v for k, v in values.items() if v is not None}

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the values to a training log, for the callbacks that follow and the log history."""
        if logs is not None and "loss" in logs:
            logs.update(self._values)
            state.log_history[-1].update(self._values)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take the hooks off."""
        self._detach()

    def _see_inputs(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if (
            self._open and torch.is_grad_enabled()
        ):  # a second forward of the same micro-batch counts once
            self._inputs.append(_Inputs.of(args, kwargs))
            self._open = False

    def _detach(self) -> None:
        if self._probe is not None:
            self._probe.detach()
        if self._forward_hook is not None:
            self._forward_hook.remove()
        self._probe = self._forward_hook = None
        self._inputs = []
        self._open, self._ended = True, 0


class _Inputs(NamedTuple):
    """What a forward pass tells of its micro-batch."""

    samples: int
    items: float | None  # num_items_in_batch: target tokens of the whole step
    targets: tuple[int, ...]  # target tokens of this micro-batch, by each way of counting them

    @classmethod
    def of(cls, positional: tuple[Any, ...], inputs: Mapping[str, Any]) -> _Inputs:
        given = (*positional, *inputs.values())
        tensors = [value for value in given if isinstance(value, torch.Tensor)]
        samples = next((len(value) for value in tensors if value.dim() > 0), 0)
        items = inputs.get("num_items_in_batch")
        labels = inputs.get("shift_labels", inputs.get("labels"))
        targets: tuple[int, ...] = ()
        if items is not None and isinstance(labels, torch.Tensor):
            counted = labels.ne(-100)
            # Causal models do not predict the first token; the Trainer's total tells which holds.
            targets = (int(counted[..., 1:].sum()), int(counted.sum()))
        return cls(samples, None if items is None else float(items), targets)


def _weights(inputs: list[_Inputs]) -> list[float]:
    """The weight of each micro-batch in the step: its target tokens, or the same for all.

    Returns:
        One weight per micro-batch.

    Raises:
        RuntimeError: If the loss is weighted by tokens that the model does not see.
    """
    items = inputs[0].items
    if items is None:
        return [1.0] * len(inputs)
    for counts in zip(*(seen.targets for seen in inputs), strict=True):
        if sum(counts) == items:
            return [float(count) for count in counts]
    raise RuntimeError(
        f"num_items_in_batch ({items:g}) must be the count of the labels that the model is "
        "given, because micro-batches are weighted by it; with compute_loss_func, which keeps "
        "the labels to itself, use AdaptiveBatchTrainer."
    )
