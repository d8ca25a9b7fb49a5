"""AdaptiveBatchArguments: `TrainingArguments` and what decides the batch size."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from transformers import TrainingArguments

from .apply.plan import BatchPlan
from .assemble_schedule import Horizon, begin_schedule, criterion_of
from .averaging_arguments import AveragingOptions
from .decide.controllers import BatchController
from .decide.criteria import NormTest
from .decide.stages import Duration
from .schedule_arguments import SCHEDULES, ScheduleOptions
from .schedule_arguments import option as _option


# The fields belong in front of any TrainingArguments subclass, so they cannot inherit from one.
if TYPE_CHECKING:
    from transformers import TrainingArguments as _TrainingArguments
else:
    _TrainingArguments = object


@dataclass
class AdaptiveBatchOptions(AveragingOptions, ScheduleOptions, _TrainingArguments):
    """The fields that any `TrainingArguments` subclass gains: list this class before it as a base.

    The batch starts at `per_device_train_batch_size` x `gradient_accumulation_steps` x ranks.
    Training ends when a budget is used up that does not depend on the batch size: the samples of
    `num_train_epochs`, or those that `max_steps` steps of the initial size train on, or
    `max_training_samples`, or `max_train_tokens`. Learning-rate schedules, warm-up and fractional
    `logging_steps`, `eval_steps` and `save_steps` follow that budget.

    Raises:
        ValueError: If a value is out of range, or what it asks for cannot be measured.
    """

    eta: float = _option(
        0.2,
        "Tolerated ratio of the gradient's sampling error to its size, in (0, 1). The batch "
        "settles at noise scale / eta^2: 25 times the noise scale at 0.2, 2 times at 0.7.",
    )
    norm_test_estimator: Literal["unbiased", "published"] = _option(
        "unbiased",
        "What the test compares the noise with: 'unbiased' averages unbiased estimates, "
        "'published' takes this step's measured gradient, noise included, as the paper does; "
        "it settles at noise scale x (1/eta^2 - 1).",
    )
    max_global_batch_size: int | None = _option(
        None,
        "Cap of the global batch in samples, rounded down to whole micro-batches of the largest "
        "size. Default: 32 times the initial batch.",
    )
    max_micro_batch_size: int | None = _option(
        None,
        "Largest micro-batch in samples that fits on a device. A growing batch doubles the "
        "micro-batch up to it before it accumulates. Default: per_device_train_batch_size, so "
        "that only accumulation grows.",
    )
    max_growth_factor: float = _option(
        2.0,
        "One failed test multiplies the batch by at most this.",
    )
    allow_smaller_batch: bool = _option(
        False,
        "Let the batch shrink again, down to the initial one, when a smaller one passes the "
        "test. The published schedule only grows.",
    )
    test_interval: int = _option(
        1,
        "Measure and decide every so many optimizer steps. Schedules that need no measurement "
        "measure for the logs alone; 0 switches that off.",
    )
    batch_warmup_samples: int | None = _option(
        None,
        "Samples before the batch may change. Default: those of the learning-rate warm-up.",
    )
    noise_scale_decay: float = _option(
        0.9,
        "Share of the averaged noise and gradient norms kept from one measured step to the "
        "next, in [0, 1); 0.9 averages about ten.",
    )
    split_micro_batch: bool = _option(
        True,
        "On measured steps that would be one micro-batch, cut it in two, because a single "
        "gradient says nothing of its noise. Without it such a batch is refused.",
    )
    skip_nonfinite_steps: bool = _option(
        True,
        "Leave weights and optimizer untouched in a step whose loss is NaN or infinite. The "
        "plain Trainer would write NaN into every weight.",
    )
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
        for name in ("batch_schedule", "ramp_length"):
            if not isinstance(getattr(self, name), str):
                raise ValueError(
                    f"{name} ({getattr(self, name)!r}) must be text, because it has a unit or a "
                    "name; put it into quotes."
                )
        if not Duration.parse(self.ramp_length).value > 0:
            raise ValueError(
                f"ramp_length ({self.ramp_length!r}) must be above 0, because the batch grows over "
                "it; for a constant batch choose batch_schedule constant."
            )
        if self.batch_schedule == "seesaw" and self.scale_learning_rate != "none":
            raise ValueError(
                f"scale_learning_rate ({self.scale_learning_rate!r}) must be 'none' with "
                "batch_schedule 'seesaw', because seesaw has a rule of its own; leave it out."
            )
        for name in ("cbs_coefficient", "cbs_exponent"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(
                    f"{name} ({getattr(self, name)}) must be above 0 and finite, because the batch "
                    "grows with the tokens seen; take it from a fit."
                )
        if self.batch_schedule not in SCHEDULES and ":" not in self.batch_schedule:
            raise ValueError(
                f"batch_schedule ({self.batch_schedule!r}) must be one of {', '.join(SCHEDULES)}, "
                "or stages such as '0:768 250M:1536', because there are no others; choose one."
            )
        if self.norm_test_estimator not in ("unbiased", "published"):
            raise ValueError(
                f"norm_test_estimator ({self.norm_test_estimator!r}) must be 'unbiased' or "
                "'published', because they converge to different sizes; use 'unbiased' unless "
                "you reproduce the paper."
            )
        if not 0 <= self.noise_scale_decay < 1:
            raise ValueError(
                f"noise_scale_decay ({self.noise_scale_decay}) must be in [0, 1), because it is "
                "the share of the old average that is kept; use 0.9 for about ten measured steps."
            )
        if self.batch_warmup_samples is not None and self.batch_warmup_samples < 0:
            raise ValueError(
                f"batch_warmup_samples ({self.batch_warmup_samples}) must be at least 0, because "
                "it counts samples; use 0 for no warm-up."
            )
        NormTest(self.eta, self.norm_test_estimator)
        criterion_of(self), self.co_scaling  # they check theirs
        if self.world_size == 1:  # of several, only the Trainer knows which share their samples
            self.check_initial_plan(self.initial_batch_plan())

    def check_initial_plan(self, plan: BatchPlan) -> None:
        """Refuse sizes that do not go together.

        Args:
            plan: The initial plan, for as many data-parallel ranks as there are.

        Raises:
            ValueError: If the batch cannot begin with it, grow from it, or be measured.
        """
        if self.max_micro_batch_size is not None:
            BatchPlan.nearest(
                plan.global_batch_size,
                micro_batch_size=plan.micro_batch_size,
                max_micro_batch_size=self.max_micro_batch_size,
            )
        controller, first = begin_schedule(self, plan, Horizon())
        workers = first.accumulation_steps * first.data_parallel_size
        unsplit = workers == 1 and not (self.split_micro_batch and controller.can_change)
        unmeasured = self.test_interval == 0 or unsplit
        differs = controller.can_change or first != plan
        if self.scale_learning_rate == "adascale" and unmeasured and differs:
            raise ValueError(
                "scale_learning_rate ('adascale') must go with measured steps, because its gain is "
                "measured, but none would be; set test_interval to 1, or accumulate 2 or more."
            )
        if controller.can_change and workers == 1 and not getattr(controller, "open_loop", False):
            if plan.micro_batch_size == 1:
                raise ValueError(
                    "per_device_train_batch_size (1) with gradient_accumulation_steps (1) must "
                    "give at least 2 samples a step, because one gradient says nothing of its "
                    "noise; raise one."
                )
            if not self.split_micro_batch:
                raise ValueError(
                    "split_micro_batch (False) must be True with one rank and "
                    "gradient_accumulation_steps 1, because one gradient says nothing of its "
                    "noise; or accumulate 2 or more."
                )

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
