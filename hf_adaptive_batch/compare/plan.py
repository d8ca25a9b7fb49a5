"""What a comparison consists of: schedules, and the runs that each takes."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..flags import flags_of


PRETRAIN = ("-m", "hf_adaptive_batch", "pretrain")

# A launcher puts Python before the program by itself.
_PYTHON_LAUNCHERS = ("accelerate", "torchrun")


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """One of those compared.

    Attributes:
        name: The user's.
        settings: The flags that make it differ.
        learning_rates: To choose from; empty where the shared one, or the program's, holds.
    """

    name: str
    settings: Mapping[str, Any]
    learning_rates: Sequence[float] = ()

    @property
    def slug(self) -> str:
        """The name, as that of a folder."""
        return re.sub(r"[^\w.]+", "-", self.name.lower()).strip("-._")

    @property
    def is_swept(self) -> bool:
        """Whether there is a learning rate to choose."""
        return len(self.learning_rates) > 1


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training run.

    Attributes:
        schedule: Name of its schedule.
        learning_rate: None for the program's own.
        seed: Of initial weights and data order.
        flags: All of them by name, but for the output folder and resuming.
        folder: Where it leaves its files.
    """

    schedule: str
    learning_rate: float | None
    seed: int
    flags: Mapping[str, Any] = field(hash=False)
    folder: Path

    @property
    def label(self) -> str:
        """Which one it is, in words."""
        rate = "" if self.learning_rate is None else f", lr {self.learning_rate:g}"
        return f"{self.schedule}{rate}, seed {self.seed}"

    def words(self, resume: str | None = None) -> list[str]:
        """The flags of its command.

        Args:
            resume: Value of `--resume_from_checkpoint`; None for that of the flags, if any.

        Returns:
            The words.
        """
        end = {"output_dir": str(self.folder)}
        if resume is not None:
            end["resume_from_checkpoint"] = resume
        return flags_of({**self.flags, **end})


@dataclass(frozen=True, kw_only=True)
class ComparePlan:
    """A checked compare file, or command line.

    Attributes:
        title: Of the report.
        note: The user's remark on it.
        shared: Flags of all runs.
        seeds: The runs of each schedule that are averaged.
        tuning_seeds: The runs that its learning rate is chosen by.
        target_loss: None for the highest final loss of the first schedule's runs, which all of
            them reach.
        jobs: Runs at a time.
        program: Words of the command that trains; empty for `hf-adaptive-batch pretrain`.
        launch: Words before it, such as those of `accelerate launch`.
        output_dir: Where everything goes.
        schedules: To compare; the first is the baseline.
    """

    title: str
    note: str
    shared: Mapping[str, Any]
    seeds: Sequence[int]
    tuning_seeds: Sequence[int]
    target_loss: float | None
    jobs: int
    program: Sequence[str]
    launch: Sequence[str]
    output_dir: Path
    schedules: Sequence[Schedule]

    @property
    def launches_python(self) -> bool:
        """Whether the words of `launch` want a script or a module, and not a command."""
        return bool(self.launch) and Path(self.launch[0]).name in _PYTHON_LAUNCHERS

    def run(self, schedule: Schedule, learning_rate: float | None, seed: int) -> Run:
        """One run.

        Args:
            schedule: One of the plan's.
            learning_rate: One of those it tries, or None for the shared one.
            seed: Its seed.

        Returns:
            The run.
        """
        if learning_rate is None:
            learning_rate = self.shared.get("learning_rate")
        flags = {**self.shared, **schedule.settings, "seed": seed}
        if learning_rate is not None:
            flags["learning_rate"] = learning_rate
        rate = "default" if learning_rate is None else repr(learning_rate)
        folder = self.output_dir / "runs" / schedule.slug / f"lr-{rate}" / f"seed-{seed}"
        return Run(
            schedule=schedule.name,
            learning_rate=learning_rate,
            seed=seed,
            flags=flags,
            folder=folder,
        )

    def tuning_runs(self, schedule: Schedule) -> list[Run]:
        """The runs that a schedule's learning rate is chosen by; none without a choice."""
        if not schedule.is_swept:
            return []
        rates = schedule.learning_rates
        return [self.run(schedule, rate, seed) for seed in self.tuning_seeds for rate in rates]

    def runs_at(self, schedule: Schedule, learning_rate: float | None) -> list[Run]:
        """The runs of a schedule that are averaged, one for each seed.

        Args:
            schedule: One of the plan's.
            learning_rate: The chosen one; None without a choice.

        Returns:
            The runs, in the order of the seeds.
        """
        if learning_rate is None and schedule.learning_rates:
            (learning_rate,) = schedule.learning_rates
        return [self.run(schedule, learning_rate, seed) for seed in self.seeds]

    def possible_runs(self) -> list[Run]:
        """Every run that may come to pass, whatever learning rates are chosen."""
        found: dict[Path, Run] = {}
        for schedule in self.schedules:
            rates: Sequence[float | None] = schedule.learning_rates or [None]
            seeds = {*self.seeds, *(self.tuning_seeds if schedule.is_swept else ())}
            for run in (self.run(schedule, rate, seed) for rate in rates for seed in sorted(seeds)):
                found[run.folder] = run
        return list(found.values())

    def count_runs(self) -> int:
        """How many of them will come to pass."""
        more = len(set(self.seeds) - set(self.tuning_seeds))
        return sum(
            len(self.tuning_runs(schedule)) + more if schedule.is_swept else len(self.seeds)
            for schedule in self.schedules
        )

    def identity(self, run: Run) -> dict[str, str]:
        """What has to be equal for a run to be the same one.

        Args:
            run: One of the plan's.

        Returns:
            Text by name: the program, how it is launched, and each flag's words.
        """
        named = {"program": list(self.program), "launch": list(self.launch)}
        flags = {
            name: flags_of({name: value})[1:]
            for name, value in run.flags.items()
            if value is not None
        }
        return {
            name: " ".join(words) if len(words) < 2 else json.dumps(words)
            for name, words in {**named, **flags}.items()
            if words
        }
