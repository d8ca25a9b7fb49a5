"""From a Trainer's arguments and its loader to the run; what needs no Trainer is `build_run`'s."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any

from . import hf_compat, hf_parallel
from .apply.clock import TrainingClock
from .assemble_schedule import Horizon
from .build_run import build_run
from .decide.controllers import BatchController
from .hf_loader import loader_parts
from .run import AdaptiveRun


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
        ValueError: If no micro-batch fits into the dataset, the loader has batches of its own, or
            ranks have datasets of different lengths.
    """
    args, data = trainer.args, loader_parts(dataloader)
    ranks = hf_parallel.ranks_of(trainer)
    plan = args.initial_batch_plan(ranks.size)
    if data.micro_batch_size != plan.micro_batch_size:
        raise ValueError(
            f"train dataloader's batch_size ({data.micro_batch_size}) must equal "
            f"per_device_train_batch_size ({plan.micro_batch_size}), because that is what training "
            "begins with; set both alike."
        )
    return build_run(
        args,
        data,
        plan,
        ranks,
        trainer.model,
        budget=lambda samples: _budget(args, data.dataset, samples, plan.global_batch_size),
        horizon=partial(_horizon, trainer),
        seed=args.seed if args.data_seed is None else args.data_seed,
        controller=controller,
    )


def _horizon(trainer: Trainer, clock: TrainingClock) -> Horizon:
    """What a schedule may depend on."""
    args, total = trainer.args, clock.total_initial_steps
    samples: float = clock.budget_samples or total * clock.initial_global_batch_size
    if clock.budget_tokens is not None:
        samples = clock.budget_tokens / clock.tokens_per_sample
    warmup_samples = TrainingClock.samples_in_initial_steps(
        args.get_warmup_steps(total),
        epoch_samples=clock.epoch_samples,
        initial_global_batch_size=clock.initial_global_batch_size,
    )
    seesaw = args.batch_schedule == "seesaw"
    return Horizon(
        samples=samples,
        tokens_per_sample=clock.tokens_per_sample,
        warmup_samples=warmup_samples,
        epoch_samples=clock.epoch_samples,
        learning_rate=hf_compat.reference_learning_rate(trainer, total) if seesaw else None,
        total_steps=total,
    )


def _budget(
    args: Any, dataset: Any, epoch_samples: int | None, global_batch_size: int
) -> dict[str, int]:
    """The clock's budget: of tokens, of samples, or of initial steps for a stream."""
    if args.max_train_tokens is not None:
        return {"budget_tokens": args.max_train_tokens}
    if args.max_training_samples is not None:
        return {"budget_samples": args.max_training_samples}
    steps = args.max_steps
    if steps <= 0:  # the Trainer has refused a stream that does not tell its length
        per_epoch = math.ceil((epoch_samples or len(dataset)) / global_batch_size)
        steps = math.ceil(args.num_train_epochs * per_epoch)
    if epoch_samples is None:
        return {"budget_steps": steps}
    samples = TrainingClock.samples_in_initial_steps(
        steps, epoch_samples=epoch_samples, initial_global_batch_size=global_batch_size
    )
    return {"budget_samples": samples}
