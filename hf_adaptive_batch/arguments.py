"""AdaptiveBatchArguments: `TrainingArguments` and what decides the batch size."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from transformers import TrainingArguments

from .apply.plan import BatchPlan
from .assemble_schedule import Horizon, begin_schedule
from .averaging_arguments import AveragingOptions
from .batch_options import BatchOptions
from .decide.controllers import BatchController
from .schedule_arguments import option as _option


# The fields belong in front of any TrainingArguments subclass, so they cannot inherit from one.
if TYPE_CHECKING:
    from transformers import TrainingArguments as _TrainingArguments
else:
    _TrainingArguments = object


@dataclass
class AdaptiveBatchOptions(AveragingOptions, BatchOptions, _TrainingArguments):
    """The fields that any `TrainingArguments` subclass gains: list this class before it as a base.

    The batch starts at `per_device_train_batch_size` x `gradient_accumulation_steps` x ranks.
    Training ends when a budget is used up that does not depend on the batch size: the samples of
    `num_train_epochs`, or those that `max_steps` steps of the initial size train on, or
    `max_training_samples`, or `max_train_tokens`. Learning-rate schedules, warm-up and fractional
    `logging_steps`, `eval_steps` and `save_steps` follow that budget.

    Raises:
        ValueError: If a value is out of range, or what it asks for cannot be measured.
    """

    max_training_samples: int | None = _option(
        None,
        "Budget in samples; replaces num_train_epochs. In Python also max_train_samples, which as "
        "a flag belongs to the many scripts that cut their dataset by it.",
    )
    max_train_tokens: int | None = _option(
        None,
        "Budget in tokens, without padding where there is an attention mask; replaces "
        "num_train_epochs. Training ends with "
        "the step that reaches it.",
    )

    def __post_init__(self) -> None:
        if self.auto_find_batch_size:
            raise ValueError(
                "auto_find_batch_size (True) must be False, because it restarts training with "
                "another batch and so undoes the schedule; set max_micro_batch_size to what fits."
            )
        if self.deepspeed:
            raise ValueError(
                f"deepspeed ({self.deepspeed}) must not be set, because DeepSpeed reduces and "
                "steps inside backward, where no gradient of a single micro-batch can be "
                "measured; train without it."
            )
        super().__post_init__()
        self.check_averaging_and_stops()
        for name in ("max_training_samples", "max_train_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(
                    f"{name} ({value}) must be at least 1, because it is how much to train on; "
                    "leave it out to train for num_train_epochs."
                )
        budgets = ("max_training_samples", "max_train_tokens", "max_steps")
        given = [
            f"{name} ({getattr(self, name)})" for name in budgets if (getattr(self, name) or 0) > 0
        ]
        if len(given) > 1:
            raise ValueError(
                f"{' and '.join(given)}: only one must be given, because training ends when the "
                "budget is used up; remove the others."
            )
        self.check_options()
        if self.world_size == 1:  # of several, only the Trainer knows which share their samples
            self.check_initial_plan(self.initial_batch_plan())

    @property
    def max_train_samples(self) -> int | None:
        """`max_training_samples`, by its shorter name."""
        return self.max_training_samples

    def initial_batch_plan(self, data_parallel_size: int | None = None) -> BatchPlan:
        """The plan that training starts with.

        Args:
            data_parallel_size: Ranks that see different samples, if not every process does.

        Returns:
            The plan.
        """
        return BatchPlan(
            micro_batch_size=self.train_batch_size,
            accumulation_steps=self.gradient_accumulation_steps,
            data_parallel_size=data_parallel_size or self.world_size,
        )

    def batch_controller(
        self, plan: BatchPlan, *, warmup_samples: int = 0, epoch_samples: int | None = None
    ) -> BatchController:
        """The controller that these arguments describe, as far as it does not depend on the data.

        Args:
            plan: The initial plan.
            warmup_samples: Samples before the batch may change, where `batch_warmup_samples` is
                unset.
            epoch_samples: Samples of an epoch, which no step can exceed.

        Returns:
            A `FixedController` where the batch cannot change, so that training equals the plain
            Trainer's.
        """
        horizon = Horizon(warmup_samples=warmup_samples, epoch_samples=epoch_samples)
        return begin_schedule(self, plan, horizon)[0]


@dataclass
class _AdaptiveBatchArguments(AdaptiveBatchOptions, TrainingArguments):
    """The fields of both."""


class AdaptiveBatchArguments(_AdaptiveBatchArguments):
    """`TrainingArguments` for `AdaptiveBatchTrainer`, with the fields of `AdaptiveBatchOptions`.

    Args:
        *args: As the `TrainingArguments`'.
        max_train_samples: Another name of `max_training_samples`.
        **kwargs: As the `TrainingArguments`' and the `AdaptiveBatchOptions`'.
    """

    def __init__(self, *args: Any, max_train_samples: int | None = None, **kwargs: Any) -> None:
        if max_train_samples is not None:
            kwargs["max_training_samples"] = max_train_samples
        super().__init__(*args, **kwargs)
