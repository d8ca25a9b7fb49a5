"""From a Trainer's arguments and its loader to the run: every part is built here, once."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from . import hf_compat
from .apply.clock import TrainingClock
from .apply.loader import StepLoader
from .apply.sampler import EpochOrder
from .decide.controllers import BatchController
from .decide.criteria import NormTest
from .decide.noise_scale import NoiseScaleEstimator
from .run import AdaptiveRun
from .tokens import mean_tokens


if TYPE_CHECKING:
    from transformers import Trainer


def assemble(
    trainer: Trainer, dataloader: Any, controller: BatchController | None = None
) -> AdaptiveRun:
    """Build the run that the Trainer's arguments describe.

    Args:
        trainer: With `AdaptiveBatchOptions` among its arguments.
        dataloader: The Trainer's own train loader.
        controller: Instead of the one that the arguments describe.

    Returns:
        A run at its beginning, without a record writer.

    Raises:
        ValueError: If no micro-batch fits into the dataset, or the loader has batches of its own.
    """
    args = trainer.args
    dataset, sampler, micro_batch_size, drop_last, options = hf_compat.loader_parts(dataloader)
    plan = args.initial_batch_plan()
    if micro_batch_size != plan.micro_batch_size:
        raise ValueError(
            f"train dataloader's batch_size ({micro_batch_size}) must equal "
            f"per_device_train_batch_size ({plan.micro_batch_size}), because that is what training "
            "begins with; set both alike."
        )
    round_size = plan.micro_batch_size * plan.data_parallel_size
    samples = epoch_samples = len(sampler)
    if drop_last:
        epoch_samples -= epoch_samples % round_size
    if epoch_samples == 0:
        raise ValueError(
            f"train_dataset ({samples} samples) must hold at least one micro-batch "
            f"({round_size} samples) with dataloader_drop_last, because nothing is left to train "
            "on; lower per_device_train_batch_size, or keep the last batch."
        )
    clock = TrainingClock(
        epoch_samples=epoch_samples,
        initial_global_batch_size=plan.global_batch_size,
        initial_round_size=round_size,
        budget_samples=_budget_samples(args, epoch_samples, plan.global_batch_size),
        budget_tokens=args.max_train_tokens,
        tokens_per_sample=(
            mean_tokens(dataset, options["collate_fn"], trainer.model, plan.micro_batch_size)
            if args.max_train_tokens is not None
            else 0.0
        ),
    )
    if controller is None:
        warmup_steps = args.get_warmup_steps(clock.total_initial_steps)
        warmup_samples = TrainingClock.samples_in_initial_steps(
            warmup_steps,
            epoch_samples=epoch_samples,
            initial_global_batch_size=plan.global_batch_size,
        )
        controller = args.batch_controller(
            plan, warmup_samples=warmup_samples, epoch_samples=epoch_samples
        )

    def cut_in_two(step: int) -> bool:
        return controller.can_change and args.split_micro_batch and controller.measures(step)

    return AdaptiveRun(
        initial_plan=plan,
        max_micro_batch_size=args.max_micro_batch_size,
        clock=clock,
        loader=StepLoader(dataset, EpochOrder(sampler), plan, clock, cut_in_two, options),
        controller=controller,
        criterion=NormTest(args.eta, args.norm_test_estimator),
        estimator=NoiseScaleEstimator(args.noise_scale_decay),
        records=None,
    )


def _budget_samples(args: Any, epoch_samples: int, global_batch_size: int) -> int | None:
    """The samples of `max_training_samples`, `max_steps` or `num_train_epochs`."""
    if args.max_train_tokens is not None:
        return None
    if args.max_training_samples is not None:
        return int(args.max_training_samples)
    steps = args.max_steps
    if steps <= 0:
        per_epoch = math.ceil(epoch_samples / global_batch_size)
        steps = math.ceil(args.num_train_epochs * per_epoch)
    return TrainingClock.samples_in_initial_steps(
        steps, epoch_samples=epoch_samples, initial_global_batch_size=global_batch_size
    )
