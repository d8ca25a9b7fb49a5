"""From a Trainer's arguments and its loader to the run: every part is built here, once."""

from __future__ import annotations

import logging
import math
from functools import partial
from typing import TYPE_CHECKING, Any

import datasets

from . import hf_compat, hf_parallel, hf_streams
from .apply.clock import TrainingClock
from .apply.digest import digest
from .apply.fetch import same_random_numbers, set_generators
from .apply.loader import StepLoader
from .apply.sampler import EpochOrder
from .apply.sources import MapSource, StreamSource
from .apply.stream import StreamReader
from .assemble_schedule import Horizon, begin_schedule, criterion_of, needs_tokens
from .decide.controllers import BatchController
from .decide.noise_scale import NoiseScaleEstimator
from .ranks import Ranks
from .run import AdaptiveRun
from .tokens import count_tokens, mean_tokens


logger = logging.getLogger(__name__)

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
    args = trainer.args
    dataset, sampler, micro_batch_size, drop_last, options = hf_compat.loader_parts(dataloader)
    ranks = hf_parallel.ranks_of(trainer)
    plan = args.initial_batch_plan(ranks.size)
    if micro_batch_size != plan.micro_batch_size:
        raise ValueError(
            f"train dataloader's batch_size ({micro_batch_size}) must equal "
            f"per_device_train_batch_size ({plan.micro_batch_size}), because that is what training "
            "begins with; set both alike."
        )
    round_size = plan.micro_batch_size * plan.data_parallel_size
    epoch_samples = None if sampler is None else len(sampler)
    if epoch_samples is not None and drop_last:
        epoch_samples -= epoch_samples % round_size
    if epoch_samples == 0:
        least = f"one micro-batch ({round_size} samples) with dataloader_drop_last"
        raise ValueError(
            f"train_dataset ({len(sampler)} samples) must hold at least "
            f"{least if drop_last else 'one sample'}, because nothing is left to train on; lower "
            "per_device_train_batch_size, keep the last batch, or mend the sampler."
        )
    tokens_per_sample = 0.0
    if args.max_train_tokens is not None or needs_tokens(args):
        size = plan.micro_batch_size
        asked = "batch_schedule" if args.max_train_tokens is None else "max_train_tokens"
        collate = options["collate_fn"]
        tokens_per_sample = mean_tokens(dataset, collate, trainer.model, size, asked=asked)
        if not tokens_per_sample and args.max_train_tokens is not None:
            raise ValueError(
                f"max_train_tokens ({args.max_train_tokens}) must be left out, because there are "
                "no tokens in the collated samples: no attention_mask, and no integers under the "
                "model's main input; give max_train_samples."
            )
    rows = ranks.gather(epoch_samples or 0, tokens_per_sample)
    if len({row[0] for row in rows}) > 1:
        raise ValueError(
            f"train_dataset ({[int(row[0]) for row in rows]} samples on the ranks) must be the "
            "same on all ranks, because they share every step's samples; do not split a map-style "
            "dataset yourself."
        )
    if sampler is not None and ranks.size > 1:
        _check_same_samples(dataset, ranks)
    clock = TrainingClock(
        epoch_samples=epoch_samples,
        initial_global_batch_size=plan.global_batch_size,
        initial_round_size=round_size,
        **_budget(args, dataset, epoch_samples, plan.global_batch_size),
        tokens_per_sample=math.fsum(row[1] for row in rows) / len(rows),
    )
    first_plan = plan
    if controller is None:
        controller, first_plan = begin_schedule(args, plan, _horizon(trainer, clock))

    def cut_in_two(step: int) -> bool:
        return controller.can_change and args.split_micro_batch and run.measures(step)

    seed = args.seed if args.data_seed is None else args.data_seed
    # A constant batch is to draw as the plain Trainer does; and the main process as training does.
    draws_seed = seed if controller.can_change and options.get("num_workers") else None
    source: MapSource | StreamSource
    if sampler is None:
        split = hf_streams.parts_of(dataset) is not None
        restorable = hf_streams.shuffle_buffer(dataset) <= 1
        reader = StreamReader(
            dataset,
            ranks,
            split=split,
            private=hf_streams.private,
            settle=hf_streams.settle,
            restorable=restorable,
            draws_seed=draws_seed,
        )
        source = StreamSource(reader, clock, ranks, split=split)
    else:
        source = MapSource(dataset, EpochOrder(sampler), clock, ranks, draws_seed=draws_seed)
    run = AdaptiveRun(
        initial_plan=plan,
        max_micro_batch_size=args.max_micro_batch_size,
        ranks=ranks,
        seed=seed,
        clock=clock,
        loader=StepLoader(
            source,
            first_plan,
            clock,
            cut_in_two,
            options,
            ranks=ranks,
            count_tokens=partial(count_tokens, model=trainer.model),
        ),
        controller=controller,
        criterion=criterion_of(args),
        estimator=NoiseScaleEstimator(args.noise_scale_decay),
        co_scaling=args.co_scaling,
    )
    run.loader.set_plan(run.scheduled_plan() or first_plan)
    return run


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


def _check_same_samples(dataset: Any, ranks: Ranks) -> None:
    """Ranks share every step by indices, which must mean the same on all of them.

    Raises:
        ValueError: If a stored sample differs; where samples are made, that is only a warning.
    """
    with same_random_numbers():
        set_generators(0)
        found = [digest(dataset[index]) for index in (0, len(dataset) // 2, len(dataset) - 1)]
    if len({tuple(row) for row in ranks.gather(*found)}) == 1:
        return
    stored = isinstance(dataset, datasets.Dataset) and dataset.format["type"] != "custom"
    message = (
        f"train_dataset ({type(dataset).__name__}) must be the same on all ranks, because they "
        "share every step's samples by their indices, but its first, middle or last samples "
        "differ; seed train_test_split() and shuffle(), and do not split the data yourself."
    )
    if stored:
        raise ValueError(message)
    if ranks.is_first:
        logger.warning("%s (Or they are made at random on each rank; then all is well.)", message)


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
