"""BatchOptions: what decides the batch size, the same for a Trainer and for a loop of one's own."""

import math
from dataclasses import dataclass
from typing import Literal

from .apply.plan import BatchPlan
from .assemble_schedule import Horizon, begin_schedule, criterion_of
from .decide.criteria import NormTest
from .decide.stages import Duration
from .schedule_arguments import SCHEDULES, ScheduleOptions
from .schedule_arguments import option as _option


@dataclass
class BatchOptions(ScheduleOptions):
    """How the batch follows training, what it is measured by, and its bounds."""

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

    def check_options(self) -> None:
        """Refuse values that are out of range, or do not go together.

        Raises:
            ValueError: With the reason and the way out.
        """
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
