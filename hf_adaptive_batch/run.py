"""One call of `train()`: the objects of the three stages, their state, and what is logged."""

from array import array
from dataclasses import asdict, dataclass, field

from .apply.clock import TrainingClock
from .apply.loader import StepLoader
from .apply.plan import BatchPlan
from .apply.step import StepBatch
from .decide.controllers import BatchController, BatchDecision, Observation, Reason
from .decide.criteria import NormTest, TestResult
from .decide.noise_scale import NoiseScaleEstimator
from .measure.moments import GradientMoments
from .ranks import Ranks
from .report.records import RecordWriter


@dataclass(kw_only=True)
class AdaptiveRun:
    """Everything that lives from the beginning to the end of one training run.

    Attributes:
        initial_plan: The plan of the arguments.
        max_micro_batch_size: Largest micro-batch in samples; None keeps the initial one.
        clock: Progress that reached the optimizer.
        ranks: Who trains on the same steps.
        seed: Of the data's order.
        loader: Yields steps cut by the plan in force.
        controller: Decides.
        criterion: The norm test.
        estimator: Averages the moments.
        records: Where decisions are written; None on all ranks but the first.
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
    criterion: NormTest
    estimator: NoiseScaleEstimator
    records: RecordWriter | None
    skipped_steps: int = 0
    step: StepBatch | None = None
    in_hand: bool = False
    norm_test: float | None = None
    reason: str | None = None
    _measured: dict[int, bool] = field(default_factory=dict, repr=False)

    @property
    def plan(self) -> BatchPlan:
        """The plan in force for the next step."""
        return self.loader.plan

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
        return Observation(
            samples_seen=self.clock.samples_seen + self.step_samples,
            global_batch_size=self.plan.global_batch_size,
            test=test,
            finite=finite,
        )

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
        plan = BatchPlan.nearest(
            decision.global_batch_size,
            micro_batch_size=self.initial_plan.micro_batch_size,
            max_micro_batch_size=self.max_micro_batch_size,
            max_global_batch_size=getattr(self.controller, "max_global_batch_size", None),
            data_parallel_size=self.initial_plan.data_parallel_size,
        )
        grows = decision.global_batch_size > size
        return plan if (plan.global_batch_size > size) == grows else self.plan

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
        if self.records is None:
            return
        assert self.step is not None
        clock, noise, samples = self.clock, self.estimator.estimate(), self.step_samples
        self.records.write(
            {
                "step": clock.steps + 1,
                "epoch": clock.epoch_after(samples),
                "samples_seen": clock.samples_seen + samples,
                "tokens_seen": clock.tokens_seen + self.step.tokens,
                "loss": loss,
                "learning_rate": learning_rate,
                **_plan_values(self.step.plan),
                "step_samples": samples,
                "workers": moments.workers if moments else None,
                "small_sq_norm": moments.small_sq_norm if moments else None,
                "big_sq_norm": moments.big_sq_norm if moments else None,
                "noise_trace": noise.noise_trace,
                "grad_sq_norm": noise.grad_sq_norm,
                "noise_scale": noise.noise_scale,
                "noise_scale_error": noise.noise_scale_error,
                "norm_test": self.norm_test,
                "threshold": test.threshold if test else None,
                "next_global_batch_size": self.plan.global_batch_size,
                "reason": self.reason,
            }
        )

    def log_values(self) -> dict[str, float | str]:
        """What goes into the Trainer's log; a value that is not measurable is left out."""
        noise = self.estimator.estimate()
        values: dict[str, float | str | None] = {
            **_plan_values(self.step.plan if self.step else self.plan),
            "samples_seen": self.clock.samples_seen,
            "tokens_seen": self.clock.tokens_seen,
            "noise_scale": noise.noise_scale,
            "noise_trace": noise.noise_trace if noise.updates else None,
            "grad_sq_norm": noise.grad_sq_norm if noise.updates else None,
            "norm_test": self.norm_test,
            "reason": self.reason,
            "skipped_steps": self.skipped_steps or None,
        }
        return {f"adaptive_batch/{name}": v for name, v in values.items() if v is not None}


def _plan_values(plan: BatchPlan) -> dict[str, int]:
    return {"global_batch_size": plan.global_batch_size, **asdict(plan)}
