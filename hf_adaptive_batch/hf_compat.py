"""Every touch of an internal of transformers and accelerate, with the reason and when it can go.

Those of loaders are in `hf_loader`, of streams in `hf_streams`, of parallelism in `hf_parallel`.

Written against transformers 5.23 and accelerate 1.15. The oldest that the tests are run on are
transformers 5.17, accelerate 1.12, datasets 5.1 and torch 2.11 (constraints-oldest.txt); what is
different there is `argument_name`.
"""

import contextlib
import math
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainingArguments

from .apply.fetch import same_random_numbers
from .arguments import AdaptiveBatchOptions


_FIELDS = frozenset(field.name for field in fields(TrainingArguments))
# Until transformers 5.23 TrainingArguments had the names on the right.
_NEW_NAMES = {
    "activation_checkpointing": "gradient_checkpointing",
    "activation_checkpointing_kwargs": "gradient_checkpointing_kwargs",
}


def argument_name(name: str, known: Container[str] = _FIELDS) -> str:
    """The name that this version of transformers has for an argument of the Trainer.

    So that settings files need no two versions. Can go when 5.23 is the oldest supported.

    Args:
        name: Of a `TrainingArguments` of transformers 5.23, or of anything else.
        known: Names of the arguments that there are.

    Returns:
        The same, where it is known or has no older one.
    """
    return name if name in known else _NEW_NAMES.get(name, name)


@contextlib.contextmanager
def steps_from_budget(arguments: Iterable[Any]) -> Iterator[None]:
    """Make a Trainer of a stream with a budget in samples or tokens.

    Of a stream without a length its constructor wants `max_steps`, to know where to end. While it
    runs, the budget stands in. Can go when the check asks a method.

    Args:
        arguments: All arguments of the constructor.

    Yields:
        Nothing.
    """
    args = next((a for a in arguments if isinstance(a, AdaptiveBatchOptions)), None)
    stream = any(isinstance(a, torch.utils.data.IterableDataset) for a in arguments)
    budget = args and (args.max_training_samples or args.max_train_tokens)
    if args is None or not stream or not budget or args.max_steps > 0:
        yield
        return
    steps, args.max_steps = args.max_steps, budget
    try:
        yield
    finally:
        args.max_steps = steps


def report_loss(trainer: Trainer, loss: torch.Tensor) -> None:
    """Add a micro-batch's loss to the logged one, in the order and with the filter of the Trainer.

    The Trainer's loop adds what `training_step` returns, once per call; a step of several
    micro-batches is one call. Sums in fp32 depend on their order, and logs are to equal the plain
    Trainer's bitwise. Can go with `hf_parallel.micro_batch`.

    Args:
        trainer: The Trainer, in training.
        loss: Detached loss of one micro-batch, scaled by its share.
    """
    if trainer.args.logging_nan_inf_filter and not bool(torch.isfinite(loss)):
        steps = 1 + trainer.state.global_step - trainer._globalstep_last_logged
        trainer._tr_loss += trainer._tr_loss / steps
    else:
        trainer._tr_loss += loss


def target_tokens(trainer: Trainer, batch: Any) -> float | None:
    """Target tokens of one micro-batch, counted as the Trainer counts `num_items_in_batch`.

    Can go when `_get_num_items_in_batch` is public.

    Args:
        trainer: The Trainer.
        batch: The collator's micro-batch, on the host.

    Returns:
        Tokens whose loss counts, on this rank; None where the Trainer takes the loss for a mean.
    """
    with _counting_locally(trainer):
        count = trainer._get_num_items_in_batch([batch], torch.device("cpu"))
    return None if count is None else float(count)


@contextlib.contextmanager
def _counting_locally(trainer: Trainer) -> Iterator[None]:
    """Without the sum over all ranks that `average_tokens_across_devices` asks for."""
    averaged = trainer.args.average_tokens_across_devices
    trainer.args.average_tokens_across_devices = False
    try:
        yield
    finally:
        trainer.args.average_tokens_across_devices = averaged


def without_targets(batch: Any) -> Any:
    """A micro-batch in whose place the Trainer counts no target token.

    Args:
        batch: The collator's micro-batch.

    Returns:
        Its labels alone, all -100; the batch itself where there are none.
    """
    if not isinstance(batch, Mapping) or not isinstance(batch.get("labels"), torch.Tensor):
        return batch
    names = [n for n in ("labels", "shift_labels") if isinstance(batch.get(n), torch.Tensor)]
    return {name: torch.full_like(batch[name], -100) for name in names}


def divides_loss(trainer: Trainer) -> bool:
    """Whether a subclass said that its loss is a plain mean although tokens were counted.

    `loss_is_scaled_for_ga` came between transformers 5.17 and 5.23. Can go when 5.17 is dropped.

    Args:
        trainer: The Trainer.

    Returns:
        True if the Trainer divides the loss by the number of micro-batches.
    """
    return getattr(trainer, "loss_is_scaled_for_ga", None) is False


def loss_scale_exponent(trainer: Trainer, model: nn.Module, batch: Any) -> float | None:
    """How the loss depends on `num_items_in_batch`: 1 if divided by it, 0 if it is ignored.

    The Trainer takes a model whose forward has keyword arguments for one that divides; most
    classification and encoder models ignore the count, and neither side then divides by the number
    of micro-batches. Under the plain Trainer that is a constant factor; here it would change with
    every batch size. Two forward passes in evaluation mode tell, with all random states restored.
    Can go when the Trainer knows by itself.

    Args:
        trainer: The Trainer.
        model: The model; all ranks do this at the same time, as FSDP gathers it.
        batch: One micro-batch of the collator, with targets.

    Returns:
        log2 of the ratio of the losses at N and 2N items; None where this batch cannot tell: its
        loss is zero or not finite.
    """
    with _counting_locally(trainer):
        items: Any = trainer._get_num_items_in_batch([batch], trainer.args.device)
    training = model.training
    model.eval()
    # On a CPU bitsandbytes 0.50 lays 4-bit weights out anew when they are evaluated, in a way
    # through which no gradient passes from then on. Can go when it passes.
    for module in model.modules():
        if type(module).__module__.startswith("bitsandbytes."):
            module.train()
    try:
        with (
            same_random_numbers(),
            torch.random.fork_rng(),
            torch.no_grad(),
            trainer.compute_loss_context_manager(),
        ):
            seeds = torch.random.get_rng_state()
            losses = []
            for factor in (1, 2):
                torch.random.set_rng_state(seeds)
                inputs = trainer._prepare_inputs(dict(batch))
                loss = trainer.compute_loss(model, inputs, num_items_in_batch=items * factor)
                losses.append(float(loss))
    finally:
        model.train(training)
    if not all(math.isfinite(loss) and loss != 0 for loss in losses):
        return None
    return math.log2(abs(losses[0] / losses[1]))


def reference_learning_rate(trainer: Trainer, total_steps: int) -> Callable[[float], float]:
    """The Trainer's learning-rate schedule as a function, before there is an optimizer.

    Makes the schedule as the Trainer does, for an optimizer that is thrown away, and reads the
    function of a `LambdaLR`. Can go when schedules of transformers are functions of progress.

    Args:
        trainer: Before it has made its schedule, or with one of the user's.
        total_steps: The budget in initial steps.

    Returns:
        Share of the budget -> share of the learning rate.

    Raises:
        ValueError: If the schedule is no function of progress alone.
    """
    scheduler = trainer.lr_scheduler
    if scheduler is None or getattr(trainer, "_created_lr_scheduler", False):  # of a run before
        optimizer = trainer.optimizer
        rate = trainer.args.learning_rate if optimizer is None else optimizer.defaults["lr"]
        # The Trainer's own has two: with weight decay and without.
        count = 2 if optimizer is None else len(optimizer.param_groups)
        groups = [{"params": [nn.Parameter(torch.zeros(()))]} for _ in range(count)]
        stand_in = torch.optim.SGD(groups, lr=rate)
        trainer.lr_scheduler, trainer.optimizer = None, stand_in
        try:
            made = type(trainer).create_scheduler(trainer, total_steps, stand_in)
            scheduler = trainer.lr_scheduler or made  # the Trainer takes its attribute
        finally:
            trainer.lr_scheduler, trainer.optimizer = None, optimizer
            trainer._created_lr_scheduler = False
    if not isinstance(scheduler, LambdaLR):
        raise ValueError(
            f"learning-rate schedule ({type(scheduler).__name__}) must be a function of progress, "
            "because seesaw has to know where it will fall; choose an lr_scheduler_type such as "
            "cosine or linear."
        )
    function, begin = scheduler.lr_lambdas[0], scheduler.last_epoch

    def at(share: float) -> float:
        steps = begin + share * total_steps
        nearest = round(steps)
        whole = abs(steps - nearest) < 1e-9 * total_steps
        return function(nearest if whole else steps)  # type: ignore[arg-type]

    return at
