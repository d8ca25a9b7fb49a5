"""`hf-adaptive-batch compare`: is an adaptive batch better for this model and this data?"""

import math
import signal
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean

from rich.console import Console

from ..flags import flags_of
from ..report.comparison import Comparison, Contender
from ..report.comparison_table import show
from ..report.history import RunHistory
from .check import check_flags
from .file import read_plan
from .folders import (
    LOG_FILE,
    check_folders,
    last_lines,
    locked,
    read_finished,
    read_result,
)
from .machine import machine
from .output import print_plain
from .plan import ComparePlan, Run, Schedule
from .runs import Ended, Interrupted, run_all


def compare(arguments: Sequence[str]) -> int:
    """Train with each schedule, and report which was better by how much.

    Args:
        arguments: A file or schedules, and flags, as on the command line.

    Returns:
        The exit status: 0; 1 if a run failed; 128 and the signal's number if one came.
    """
    plan = read_plan(arguments)
    console = Console(highlight=False)
    check_folders(plan)
    try:
        with locked(plan.output_dir) as lock:
            check_flags(plan)
            comparison = _Comparing(plan, console, lock).run()
    except (Interrupted, KeyboardInterrupt) as stop:
        print_plain(
            console,
            "Stopped. What has been done is kept: the same command goes on from there.",
        )
        return 128 + (stop.number if isinstance(stop, Interrupted) else signal.SIGINT)
    if comparison is None:
        return 1
    from ..report.page import write_comparison  # draws, and so takes a second to load

    page = write_comparison(comparison, plan.output_dir)
    show(comparison, console)
    print_plain(console, f"\nreport  {page}")
    return 1 if comparison.failed else 0


class _Comparing:
    """The runs of a plan, first those that choose learning rates, and what came of them."""

    def __init__(self, plan: ComparePlan, console: Console, lock: int) -> None:
        self.plan, self.console, self.lock = plan, console, lock
        self.count = plan.count_runs()
        self.ended: dict[Path, RunHistory | None] = {}  # by folder; None for one that failed
        self.failed: list[str] = []

    def run(self) -> Comparison | None:
        """Run all; None if the baseline has no run that ended well."""
        plan = self.plan
        tuning = [run for schedule in plan.schedules for run in plan.tuning_runs(schedule)]
        self._run(tuning)
        tried = {schedule.name: self._tried(schedule) for schedule in plan.schedules}
        averaged = {
            schedule.name: plan.runs_at(schedule, choose_learning_rate(tried[schedule.name]))
            for schedule in plan.schedules
            if tried[schedule.name] or not schedule.is_swept
        }
        self._run([run for runs in averaged.values() for run in runs])
        contenders = [
            self._contender(schedule, tried[schedule.name], averaged.get(schedule.name, []))
            for schedule in plan.schedules
        ]
        if not contenders[0].runs:
            print_plain(
                self.console,
                f"error: no run of {contenders[0].name}, which the others would be compared with, "
                f"has ended well, so there is no report; see {LOG_FILE} in the folders under "
                f"{plan.output_dir / 'runs'}.",
            )
            return None
        finished = [
            read_finished(run)
            for runs in averaged.values()
            for run in runs
            if self.ended[run.folder]
        ]
        target, losses = plan.target_loss, contenders[0].losses().values()
        return Comparison(
            title=plan.title,
            contenders=[contender for contender in contenders if contender.runs],
            target_loss=max(losses) if target is None else target,
            failed=self.failed,
            note=plan.note,
            setup=_setup(plan),
            jobs=sorted({made["jobs"] for made in finished}),
            target_given=target is not None,
            versions=list(dict.fromkeys(made["versions"] for made in finished)),
            machines=list(dict.fromkeys(made["machine"] for made in finished)),
        )

    def _run(self, runs: Sequence[Run]) -> None:
        new = [run for run in runs if run.folder not in self.ended]
        run_all(self.plan, new, self._end, lock=self.lock)

    def _end(self, end: Ended) -> None:
        """Say how a run ended, and keep it."""
        run = end.run
        self.ended[run.folder] = history = read_result(run) if end.status == 0 else None
        width = len(str(self.count))
        line = f"[{len(self.ended):{width}}/{self.count}] {run.label}: "
        if history is None:
            self.failed.append(f"{run.label} (exit status {end.status})")
            line += f"failed with exit status {end.status}; {run.folder / LOG_FILE} ends with:"
            print_plain(self.console, "\n    ".join([line, *last_lines(run)]))
            return
        loss = history.final_loss
        diverged = loss is None or not math.isfinite(loss)
        line += "diverged, its validation loss is not finite" if diverged else ""
        line += "" if diverged else f"validation loss {loss:.4f}"
        line += f" after {history.steps:,} steps, "
        print_plain(self.console, line + ("done before" if end.kept else f"{end.seconds:.0f} s"))

    def _tried(self, schedule: Schedule) -> dict[float, float]:
        """Learning rate -> mean final loss of the tuning seeds, of those where none failed."""
        losses: dict[float, list[float | None]] = {}
        for run in self.plan.tuning_runs(schedule):
            assert run.learning_rate is not None
            history = self.ended[run.folder]
            loss = None if history is None else history.final_loss
            losses.setdefault(run.learning_rate, []).append(loss)
        means = {}
        for rate, found in losses.items():
            known = [loss for loss in found if loss is not None]
            if len(known) == len(found):
                means[rate] = fmean(known)  # NaN if one diverged
        return means

    def _contender(
        self, schedule: Schedule, tried: Mapping[float, float], averaged: Sequence[Run]
    ) -> Contender:
        ended = [(run.seed, self.ended[run.folder]) for run in averaged]
        done = [(seed, history) for seed, history in ended if history is not None]
        return Contender(
            name=schedule.name,
            settings=schedule.settings,
            learning_rate=averaged[0].learning_rate
            if averaged and schedule.learning_rates
            else None,
            tried=tried,
            seeds=[seed for seed, _ in done],
            runs=[history for _, history in done],
            tuning_seeds=self.plan.tuning_seeds if schedule.is_swept else (),
        )


def choose_learning_rate(tried: Mapping[float, float]) -> float | None:
    """The learning rate with the lowest loss.

    Args:
        tried: Learning rate -> loss; NaN where a run diverged.

    Returns:
        The best one; the smallest if all diverged, None if there are none.
    """
    finite = {rate: loss for rate, loss in tried.items() if math.isfinite(loss)}
    if not finite:
        return min(tried, default=None)
    return min(finite, key=lambda rate: (finite[rate], rate))


def _setup(plan: ComparePlan) -> dict[str, str]:
    values = {
        "shared flags": " ".join(flags_of(plan.shared)) or "none",
        "program": " ".join([*plan.launch, *(plan.program or ["hf-adaptive-batch", "pretrain"])]),
        "seeds": ", ".join(map(str, plan.seeds)),
        "jobs at a time": str(plan.jobs),
        "machine": machine(),
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
    }
    return values
