"""Several schedules trained alike: their means, and their differences paired by seed."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, stdev
from typing import Any

from scipy.stats import t as student_t

from .findings import limits, shown
from .history import RunHistory
from .records import without_nan


CONFIDENCE = 0.95


@dataclass(frozen=True, kw_only=True)
class Contender:
    """One schedule and its runs.

    Attributes:
        name: The user's text.
        settings: The flags that make it differ.
        learning_rate: The chosen one; None if not swept.
        tried: Learning rate -> mean final validation loss of the tuning seeds, NaN for a diverged
            run; empty if not swept.
        seeds: Of the runs.
        runs: At the chosen learning rate, one per seed, in their order.
        tuning_seeds: Of the runs that the learning rate was chosen by.
    """

    name: str
    settings: Mapping[str, Any]
    learning_rate: float | None
    tried: Mapping[float, float]
    seeds: Sequence[int]
    runs: Sequence[RunHistory]
    tuning_seeds: Sequence[int] = ()

    def losses(self) -> dict[int, float]:
        """Final validation loss by seed; NaN for a diverged run."""
        losses = (run.final_loss for run in self.runs)
        return {
            seed: math.nan if loss is None or not math.isfinite(loss) else loss
            for seed, loss in zip(self.seeds, losses, strict=True)
        }


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Final validation loss minus the baseline's, over the seeds that both have.

    Attributes:
        mean: Of the differences, one per seed.
        low: Lower end of the interval; None for a single seed.
        high: Upper end.
        seeds: How many there are.
    """

    mean: float
    low: float | None
    high: float | None
    seeds: int

    @property
    def is_clear(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


@dataclass(frozen=True, kw_only=True)
class Row:
    """A contender in numbers: means over its seeds.

    Attributes:
        name: The contender's.
        learning_rate: The chosen one; None if not swept.
        seeds: How many runs there are.
        diverged: How many of them ended with a loss that is not finite.
        loss_mean: Of the final validation loss; None if a run diverged.
        loss_spread: Its sample standard deviation over seeds; None for one seed.
        bits_per_byte: Mean of the final evaluations; None if not all runs measured it.
        difference: To the baseline; None for the baseline, and where a run diverged.
        steps: Optimizer steps.
        steps_saved: Share of the baseline's steps that it did without; None for the baseline.
        samples: Trained on.
        tokens: Trained on.
        seconds: Of training, without evaluation and saving.
        average_batch_size: Samples per step.
        reached: How many runs reached the target loss.
        steps_to_target: None if any run never reached it.
    """

    name: str
    learning_rate: float | None
    seeds: int
    diverged: int
    loss_mean: float | None
    loss_spread: float | None
    bits_per_byte: float | None
    difference: Difference | None
    steps: float
    steps_saved: float | None
    samples: float
    tokens: float
    seconds: float | None
    average_batch_size: float | None
    reached: int
    steps_to_target: float | None


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What a comparison came to.

    Attributes:
        title: Of the report.
        contenders: With at least one run each; the first is the baseline.
        target_loss: Given, or the highest final loss of the baseline's runs.
        failed: Runs that failed, in words.
        note: The user's own remark; may be empty.
        setup: Shared flags, versions, machine, date: text by name.
        jobs: Runs at a time; several numbers if the runs are of several comparisons.
        target_given: Whether the target was, instead of being taken from the baseline.
        versions: Different sets of versions that the runs were made with.
        machines: Different machines that they were made on.
    """

    title: str
    contenders: Sequence[Contender]
    target_loss: float
    failed: Sequence[str]
    note: str
    setup: Mapping[str, Any]
    jobs: Sequence[int] = (1,)
    target_given: bool = True
    versions: Sequence[str] = ()
    machines: Sequence[str] = ()

    def rows(self) -> list[Row]:
        """The contenders in numbers, in their order."""
        return [self._row(contender) for contender in self.contenders]

    def _row(self, contender: Contender) -> Row:
        baseline = self.contenders[0]
        runs, losses = contender.runs, list(contender.losses().values())
        diverged = sum(math.isnan(loss) for loss in losses)
        steps = fmean(run.steps for run in runs)
        to_target = [run.steps_to(self.target_loss) for run in runs]
        reached = [count for count in to_target if count is not None]
        is_baseline = contender is baseline
        return Row(
            name=contender.name,
            learning_rate=contender.learning_rate,
            seeds=len(runs),
            diverged=diverged,
            loss_mean=None if diverged else fmean(losses),
            loss_spread=None if diverged or len(losses) < 2 else stdev(losses),
            bits_per_byte=_mean_of_known([run.bits_per_byte for run in runs]),
            difference=None if is_baseline else paired_difference(contender, baseline),
            steps=steps,
            steps_saved=None if is_baseline else 1 - steps / fmean(r.steps for r in baseline.runs),
            samples=fmean(run.samples for run in runs),
            tokens=fmean(run.tokens for run in runs),
            seconds=_mean_of_known([run.seconds for run in runs]),
            average_batch_size=_mean_of_known([run.average_batch_size for run in runs]),
            reached=len(reached),
            steps_to_target=fmean(reached) if len(reached) == len(runs) else None,
        )

    def findings(self) -> list[str]:
        """What the numbers show, in plain sentences."""
        return shown(self)

    def limits(self) -> list[str]:
        """What they do not show, or only with a reservation."""
        return limits(self)

    def as_json(self) -> dict[str, Any]:
        """Everything as JSON can say it: NaN as null."""
        contenders = [
            {
                "name": contender.name,
                "settings": dict(contender.settings),
                "learning_rate": contender.learning_rate,
                "tried": [
                    {"learning_rate": rate, "loss": loss}
                    for rate, loss in sorted(contender.tried.items())
                ],
                "tuning_seeds": list(contender.tuning_seeds),
                "final_losses": [
                    {"seed": seed, "loss": loss} for seed, loss in contender.losses().items()
                ],
            }
            for contender in self.contenders
        ]
        values = {
            "version": 1,
            "title": self.title,
            "note": self.note,
            "target_loss": self.target_loss,
            "target_given": self.target_given,
            "jobs": list(self.jobs),
            "setup": dict(self.setup),
            "versions": list(self.versions),
            "machines": list(self.machines),
            "contenders": contenders,
            "rows": [asdict(row) for row in self.rows()],
            "findings": self.findings(),
            "limits": self.limits(),
            "failed": list(self.failed),
        }
        cleaned: dict[str, Any] = without_nan(values)
        return cleaned


def paired_difference(contender: Contender, baseline: Contender) -> Difference | None:
    """The difference of final losses, seed by seed, with Student's interval for its mean.

    The seed decides initial weights and the order of the data, so that what it does to both drops
    out.

    Args:
        contender: One contender.
        baseline: The other.

    Returns:
        The difference; None without a common seed, or where a run of a common seed diverged.
    """
    first, other = contender.losses(), baseline.losses()
    differences = [first[seed] - other[seed] for seed in first if seed in other]
    count = len(differences)
    if not differences or not all(math.isfinite(difference) for difference in differences):
        return None
    mean = fmean(differences)
    if count == 1:
        return Difference(mean=mean, low=None, high=None, seeds=1)
    quantile = float(student_t.ppf((1 + CONFIDENCE) / 2, count - 1))
    half = quantile * stdev(differences) / math.sqrt(count)
    return Difference(mean=mean, low=mean - half, high=mean + half, seeds=count)


def _mean_of_known(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known and len(known) == len(values) else None
