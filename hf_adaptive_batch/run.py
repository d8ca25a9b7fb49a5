"""One call of `train()`: the objects of the three stages, their state, and what is logged."""

from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from time import perf_counter
from typing import Any

from . import journal
from .apply.clock import TrainingClock
from .apply.loader import StepLoader
from .apply.plan import BatchPlan
from .apply.step import StepBatch
from .decide.co_scaling import CoScaling, OptimizerKind, learning_rate_factor
from .decide.controllers import BatchController, BatchDecision, Observation, Reason
from .decide.criteria import Criterion, TestResult
from .decide.noise_scale import NoiseScaleEstimator
from .decide.seesaw import Seesaw
from .measure.moments import GradientMoments
from .ranks import Ranks
from .report.records import EVALUATION_FIELDS, EVALUATIONS_FILE, RecordWriter


@dataclass(kw_only=True)
class AdaptiveRun:
    """Everything that lives from the beginning to the end of one training run.

    Attributes:
        initial_plan: The plan of the arguments, whose size learning rates are meant for. A schedule
            may begin with another.
        max_micro_batch_size: Largest micro-batch in samples; None keeps the initial one.
        clock: Progress that reached the optimizer.
        ranks: Who trains on the same steps.
        seed: Of the data's order.
        loader: Yields steps cut by the plan in force.
        controller: Decides.
        criterion: The norm test, or another.
        estimator: Averages the moments.
        co_scaling: What else changes with the batch.
        records: Where decisions are written; None on all ranks but the first.
        evaluations: Where evaluations are written; likewise.
        seconds: Spent on the steps that were committed, without evaluating and saving.
        skipped_steps: Steps whose loss or gradient was not finite.
        step: The step that is being trained on, or was last.
        in_hand: Whether it has not reached the optimizer yet.
        norm_test: Statistic of the last measured step; None where it was not measurable.
        reason: Of the last decision.
    """

    initial_plan: BatchPlan
    max_micro_batch_size: int | None
    ranks: Ranks
    seed: int
    clock: TrainingClock
    loader: StepLoader
    controller: BatchController
    criterion: Criterion
    estimator: NoiseScaleEstimator
    co_scaling: CoScaling = field(default_factory=CoScaling)
    records: RecordWriter | None = None
    evaluations: RecordWriter | None = None
    seconds: float = 0.0
    skipped_steps: int = 0
    step: StepBatch | None = None
    in_hand: bool = False
    norm_test: float | None = None
    reason: str | None = None
    _measured: dict[int, bool] = field(default_factory=dict, repr=False)
    _step_began: float | None = field(default=None, repr=False)

    @property
    def plan(self) -> BatchPlan:
        """The plan in force for the next step."""
        return self.loader.plan

    @property
    def batch_ratio(self) -> float:
        """B / B0 of the step in hand, or of the next one.

        A short step at an epoch's end counts as a whole one, as for the plain Trainer; one that
        holds more than planned, because the batch shrank behind what was fetched, as what it holds.
        """
        size = self.plan.global_batch_size
        if self.in_hand:
            size = max(self.step_samples, size)
        return size / self.initial_plan.global_batch_size

    @property
    def seesaw(self) -> Seesaw | None:
        """The schedule in force, if it is the one that shares the learning rate's work."""
        schedule = getattr(self.controller, "schedule", None)
        return schedule if isinstance(schedule, Seesaw) else None

    @property
    def scales_learning_rate(self) -> bool:
        """Whether the learning rate follows the batch."""
        return self.seesaw is not None or self.co_scaling.learning_rate != "none"

    def learning_rate_factor(self, kind: OptimizerKind | None) -> float:
        """What multiplies the learning rate of the step, for a kind of optimizer."""
        if self.seesaw is not None:
            return self.seesaw.learning_rate_factor(self.clock.budget_share, self.batch_ratio)
        return learning_rate_factor(
            self.co_scaling.learning_rate,
            self.batch_ratio,
            kind=kind or OptimizerKind.ADAMW,
            noise=self.estimator.estimate(),
            base_batch_size=self.initial_plan.global_batch_size,
        )

    def start_timer(self) -> None:
        """Take the time from here, where the loader is asked for the next step."""
        self._step_began = perf_counter()

    def begin_step(self, step: StepBatch) -> None:
        """Take note of the step that is handed to training.

        Args:
            step: The step.
        """
        self.step, self.in_hand = step, True

    def commit_step(self) -> None:
        """Count the step: it reached the optimizer, or was skipped for good."""
        assert self.step is not None
        self.in_hand = False
        if self._step_began is not None:
            self.seconds += perf_counter() - self._step_began
            self._step_began = None
        self.clock.advance(
            samples=self.step.global_samples,
            tokens=self.step.tokens,
            ends_stream=self.step.ends_stream,
        )

    @property
    def step_samples(self) -> int:
        """Samples of the step in hand, over all ranks."""
        assert self.step is not None
        return self.step.global_samples

    def observation(self, test: TestResult | None, *, finite: bool) -> Observation:
        """What the controller may look at after the step in hand."""
        assert self.step is not None
        after = replace(self.clock)
        after.advance(
            samples=self.step_samples, tokens=self.step.tokens, ends_stream=self.step.ends_stream
        )
        return self._observation_at(after, test, finite=finite)

    def scheduled_plan(self) -> BatchPlan | None:
        """The plan of an open-loop schedule for where the clock stands; None for others."""
        if not self.open_loop:
            return None
        here = self._observation_at(self.clock, None, finite=True)
        return self.feasible(self.agreed(self.controller.decide(here)))

    def _observation_at(
        self, clock: TrainingClock, test: TestResult | None, *, finite: bool
    ) -> Observation:
        return Observation(
            samples_seen=clock.samples_seen,
            global_batch_size=self.plan.global_batch_size,
            test=test,
            finite=finite,
            tokens_seen=clock.tokens_seen,
            steps=clock.steps,
            budget_share=clock.budget_share,
        )

    @property
    def open_loop(self) -> bool:
        """Whether the controller is asked after every step, measured or not."""
        return getattr(self.controller, "open_loop", False)

    def measures(self, step: int) -> bool:
        """Whether a step is measured: what the controller of the first process says, for all.

        Args:
            step: Its number, from 1.

        Returns:
            The same on all processes, so that they run the same hooks, micro-batches and exchanges.
        """
        if self.ranks.processes == 1:
            return self.controller.measures(step)
        if step not in self._measured:  # the first of a run; then it is told with each exchange
            answer = array("q", [self.controller.measures(step)])
            self._measured[step] = bool(self.ranks.of_first(answer)[0])
        return self._measured[step]

    def exchange(self, *numbers: float) -> list[float]:
        """Add up some numbers of the step in hand over all processes.

        Args:
            *numbers: As many on every process.

        Returns:
            Their sums.
        """
        following = self.clock.steps + 2
        told = self.ranks.is_first and self.controller.measures(following)
        *sums, measures = self.ranks.total(*numbers, told)
        self._measured = {following: measures > 0}
        return sums

    def agreed(self, decision: BatchDecision) -> BatchDecision:
        """The decision of the first process, for all.

        They decide alike, as all of them know the same; but a size that differed would leave ranks
        waiting for each other for ever, and a controller is the user's to write.

        Args:
            decision: This process's own.

        Returns:
            That of process 0.
        """
        if self.ranks.processes == 1:
            return decision
        reasons = list(Reason)
        mine = array("q", [decision.global_batch_size, reasons.index(decision.reason)])
        size, reason = self.ranks.of_first(mine)
        return BatchDecision(global_batch_size=size, reason=reasons[reason])

    def feasible(self, decision: BatchDecision) -> BatchPlan:
        """The plan for a decision; the one in force where rounding would undo it."""
        size = self.plan.global_batch_size
        if decision.global_batch_size == size:
            return self.plan
        cap = getattr(self.controller, "max_global_batch_size", None)
        schedule = getattr(self.controller, "schedule", None)
        if getattr(schedule, "rounds_down", False):
            cap = decision.global_batch_size
        # What was fetched ahead cannot be cut: a smaller batch needs small micro-batches.
        shrinks = getattr(schedule, "can_shrink", False)
        plan = BatchPlan.nearest(
            decision.global_batch_size,
            micro_batch_size=self.initial_plan.micro_batch_size,
            max_micro_batch_size=None if shrinks else self.max_micro_batch_size,
            max_global_batch_size=cap,
            data_parallel_size=self.initial_plan.data_parallel_size,
        )
        grows = decision.global_batch_size > size
        return plan if (plan.global_batch_size > size) == grows else self.plan

    def open_records(self, folder: str, resume_step: int | None) -> None:
        """Write decisions and evaluations from here on; on the first rank only.

        Args:
            folder: Where to.
            resume_step: Optimizer steps done in the checkpoint that is resumed; None for a new run.
        """
        self.records = RecordWriter(folder, resume_step=resume_step)
        self.evaluations = RecordWriter(
            folder, resume_step=resume_step, name=EVALUATIONS_FILE, fields=EVALUATION_FIELDS
        )
        # Not in the checkpoint, whose files are the same whenever it is saved.
        self.seconds = float(self.evaluations.last.get("seconds", 0.0))

    def record(
        self,
        moments: GradientMoments | None,
        test: TestResult | None,
        decision: BatchDecision,
        *,
        loss: float,
        learning_rate: float,
    ) -> None:
        """Keep the decision for the logs, and write its record.

        Args:
            moments: What the step measured; None if it could not be measured.
            test: The norm test of it.
            decision: What was decided.
            loss: The step's loss.
            learning_rate: The step's learning rate.
        """
        self.norm_test = test.statistic if test else None
        self.reason = decision.reason.value
        if self.records is not None:
            record = journal.decision_record(
                self, moments, test, loss=loss, learning_rate=learning_rate
            )
            self.records.write(record)

    def record_evaluation(self, metrics: Mapping[str, Any]) -> None:
        """Write what an evaluation found, and how long training has taken.

        Args:
            metrics: As the Trainer logs them; none where a checkpoint was saved.
        """
        if self.evaluations is not None:
            self.evaluations.write(journal.evaluation_record(self, metrics))
