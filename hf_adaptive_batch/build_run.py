"""From options, data and ranks to the run: every part is built here, once."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import datasets
from torch import nn

from . import hf_streams
from .apply.clock import TrainingClock
from .apply.digest import digest
from .apply.fetch import same_random_numbers, set_generators
from .apply.loader import StepLoader
from .apply.plan import BatchPlan
from .apply.sampler import EpochOrder
from .apply.sources import MapSource, StreamSource
from .apply.stream import StreamReader
from .assemble_schedule import Horizon, begin_schedule, criterion_of, needs_tokens
from .batch_options import BatchOptions
from .decide.controllers import BatchController
from .decide.noise_scale import NoiseScaleEstimator
from .hf_loader import LoaderParts
from .ranks import Ranks
from .run import AdaptiveRun
from .tokens import count_tokens, mean_tokens


logger = logging.getLogger(__name__)


def build_run(
    options: BatchOptions,
    data: LoaderParts,
    plan: BatchPlan,
    ranks: Ranks,
    model: nn.Module,
    *,
    budget: Callable[[int | None], dict[str, int]],
    horizon: Callable[[TrainingClock], Horizon],
    seed: int,
    controller: BatchController | None = None,
) -> AdaptiveRun:
    """Build a run.

    Args:
        options: What decides the batch size.
        data: What the train loader is made of.
        plan: What training begins with, if no schedule says otherwise.
        ranks: Who trains on the same steps.
        model: Names the input whose tokens are counted.
        budget: From the samples of an epoch, None for a stream, to the clock's budget.
        horizon: From the clock to what a schedule may depend on.
        seed: What random draws in loader workers depend on.
        controller: Instead of the one that the options describe.

    Returns:
        A run at its beginning, without a record writer.

    Raises:
        ValueError: If no micro-batch fits into the dataset, or ranks have datasets of different
            lengths.
    """
    dataset, sampler = data.dataset, data.sampler
    round_size = plan.micro_batch_size * plan.data_parallel_size
    epoch_samples = None if sampler is None else len(sampler)
    if epoch_samples is not None and data.drop_last:
        epoch_samples -= epoch_samples % round_size
    if epoch_samples == 0:
        least = f"one micro-batch ({round_size} samples) with dataloader_drop_last"
        raise ValueError(
            f"train_dataset ({len(sampler)} samples) must hold at least "
            f"{least if data.drop_last else 'one sample'}, because nothing is left to train on; "
            "lower per_device_train_batch_size, keep the last batch, or mend the sampler."
        )
    tokens_per_sample = 0.0
    limits = budget(epoch_samples)
    max_tokens = limits.get("budget_tokens")
    if max_tokens is not None or needs_tokens(options):
        size, collate = plan.micro_batch_size, data.options["collate_fn"]
        asked = "batch_schedule" if max_tokens is None else "max_train_tokens"
        tokens_per_sample = mean_tokens(dataset, collate, model, size, asked=asked)
        if not tokens_per_sample and max_tokens is not None:
            raise ValueError(
                f"max_train_tokens ({max_tokens}) must be left out, because there are "
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
        **limits,
        tokens_per_sample=math.fsum(row[1] for row in rows) / len(rows),
    )
    first_plan = plan
    if controller is None:
        controller, first_plan = begin_schedule(options, plan, horizon(clock))

    def cut_in_two(step: int) -> bool:
        return controller.can_change and options.split_micro_batch and run.measures(step)

    # A constant batch is to draw as the plain Trainer does; and the main process as training does.
    draws_seed = seed if controller.can_change and data.options.get("num_workers") else None
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
        max_micro_batch_size=options.max_micro_batch_size,
        ranks=ranks,
        seed=seed,
        clock=clock,
        loader=StepLoader(
            source,
            first_plan,
            clock,
            cut_in_two,
            data.options,
            ranks=ranks,
            count_tokens=partial(count_tokens, model=model),
        ),
        controller=controller,
        criterion=criterion_of(options),
        estimator=NoiseScaleEstimator(options.noise_scale_decay),
        co_scaling=options.co_scaling,
    )
    run.loader.set_plan(run.scheduled_plan() or first_plan)
    return run


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
