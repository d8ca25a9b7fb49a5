"""`hf-adaptive-batch cbs measure`: steps to a target loss at several batch sizes, by training."""

from __future__ import annotations

import json
import math
import signal
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ...compare.check import check_flags
from ...compare.folders import LOG_FILE, check_folders, last_lines, locked, read_result
from ...compare.machine import machine, versions
from ...compare.output import print_plain
from ...compare.plan import ComparePlan, Run, Schedule
from ...compare.runs import Ended, Interrupted, run_all
from ...flags import flags_of
from ...report.history import RunHistory
from ..sweep_result import Sweep, SweepRun, write_sweeps
from .sweep_flags import read_sweep_plan
from .sweep_plan import SweepPlan


SWEEP_FILE = "sweep.json"
# By flags of the runs: what a sweep says of them where the user has not given the flag.
_SAID_BY_FLAGS = {
    "warmup_steps": "warm-up",
    "averaging_decay": "half-life of averaged weights",
    "adam_beta2": "half-life of beta2",
    "eval_steps": "evaluated every",
}


def measure(arguments: Sequence[str]) -> int:
    """Run a sweep, and fit it.

    Args:
        arguments: A settings file and flags, as on the command line.

    Returns:
        The exit status: 0; 1 if a run failed or nothing could be fitted; 128 and the signal's
        number if one came.
    """
    plan = read_sweep_plan(arguments)
    console = Console(highlight=False)
    if plan.target_loss is None:
        plan.check_reference()
    first = plan.target_plan() if plan.target_loss is None else plan.plan(plan.target_loss)
    check_folders(first)
    try:
        with locked(plan.output_dir) as lock:
            check_flags(plan.plan(plan.target_loss or 1.0))
            measuring = _Measuring(plan, console, lock)
            path = measuring.run()
    except (Interrupted, KeyboardInterrupt) as stop:
        print_plain(
            console, "Stopped. What has been done is kept: the same command goes on from there."
        )
        return 128 + (stop.number if isinstance(stop, Interrupted) else signal.SIGINT)
    if path is None:
        return 1
    print_plain(console, f"results  {path}")
    from ..report.fit_command import fit  # draws, and so takes a second to load

    return fit([str(path)]) or bool(measuring.failed)


class _Measuring:
    """The runs of a sweep: those that set the target, then every batch size up to it."""

    def __init__(self, plan: SweepPlan, console: Console, lock: int) -> None:
        self.plan, self.console, self.lock = plan, console, lock
        self.ended: dict[Path, RunHistory | None] = {}  # by folder; None for one that failed
        self.failed: list[str] = []
        self.target = plan.target_loss

    def run(self) -> Path | None:
        """Run all, and write what was measured; None if there is no target to reach."""
        plan = self.plan
        with _progress(self.console) as self._bar:
            self._task = self._bar.add_task("runs", total=self._count())
            if self.target is None:
                self.target = self._set_target()
            if self.target is None:
                return None
            sizes = plan.plan(self.target)
            check_folders(sizes)
            tuning = [run for each in sizes.schedules for run in sizes.tuning_runs(each)]
            self._run(sizes, tuning)
            rates = {each.name: self._best_rate(sizes, each) for each in sizes.schedules}
            self._run(
                sizes,
                [run for each in sizes.schedules for run in sizes.runs_at(each, rates[each.name])],
            )
        if edges := self._at_edges(rates):
            text = f"best learning rate at an edge of those tried: {', '.join(edges)}; others may "
            print_plain(self.console, text + "need fewer steps.")
        return self._write(sizes, rates)

    def _count(self) -> int:
        target = self.plan.target_plan() if self.target is None else None
        return self.plan.plan(1.0).count_runs() + (target.count_runs() if target else 0)

    def _set_target(self) -> float | None:
        """The loss of the reference after its budget, with the best of the learning rates."""
        plan = self.plan.target_plan()
        [schedule] = plan.schedules
        runs = plan.tuning_runs(schedule) or plan.runs_at(schedule, None)
        self._run(plan, runs)
        losses: dict[float | None, list[float]] = {}
        for run in runs:
            history = self.ended[run.folder]
            loss = math.nan if history is None else history.final_loss or math.nan
            losses.setdefault(run.learning_rate, []).append(loss)
        means = {rate: math.fsum(found) / len(found) for rate, found in losses.items()}
        finite = {rate: loss for rate, loss in means.items() if math.isfinite(loss)}
        if not finite:
            print_plain(
                self.console,
                f"error: no run of batch {self.plan.reference} ended with a finite loss, so there "
                f"is no target; see {LOG_FILE} in the folders under {plan.output_dir / 'runs'}.",
            )
            return None
        rate = min(finite, key=lambda each: finite[each])
        at = "" if rate is None else f" with learning rate {rate:g}"
        text = f"target loss {finite[rate]:.4f}: batch {self.plan.reference}{at} after "
        print_plain(self.console, f"{text}{self.plan.target_samples:,} samples")
        return finite[rate]

    def _run(self, plan: ComparePlan, runs: Sequence[Run]) -> None:
        new = [run for run in runs if run.folder not in self.ended]
        run_all(plan, new, self._end, lock=self.lock)

    def _end(self, end: Ended) -> None:
        """Say how a run ended, and keep it."""
        run = end.run
        self.ended[run.folder] = history = read_result(run) if end.status == 0 else None
        total = self._bar.tasks[0].total or 0
        line = f"[{len(self.ended):{len(str(round(total)))}}/{total:.0f}] {run.label}: "
        self._bar.update(self._task, completed=len(self.ended))
        if history is None:
            self.failed.append(f"{run.label} (exit status {end.status})")
            line += f"failed with exit status {end.status}; {run.folder / LOG_FILE} ends with:"
            print_plain(self.console, "\n    ".join([line, *last_lines(run)]))
            return
        self._check_batch(run, history)
        steps = None if self.target is None else history.steps_to(self.target)
        if self.target is None:
            line += f"validation loss {history.final_loss:.4f} after {history.steps:,} steps"
        elif steps is None:
            line += f"not reached in {history.steps:,} steps ({history.final_loss:.4f})"
        else:
            line += f"reached after {steps:,.1f} steps"
            if self._is_bound(history):
                line += " or before, as its first evaluation found"
        done = ", done before" if end.kept else f", {end.seconds:.0f} s"
        print_plain(self.console, line + done)

    def _check_batch(self, run: Run, history: RunHistory) -> None:
        """A launcher may have started another number of ranks than was said."""
        flags = run.flags
        size = flags["per_device_train_batch_size"] * flags["gradient_accumulation_steps"]
        size *= self.plan.data_parallel_size
        found = history.average_batch_size
        # Less, where epochs end with short steps; none, where the target was there at the start.
        if found is not None and not size / 1.5 < found <= size:
            raise ValueError(
                f"data_parallel_size ({self.plan.data_parallel_size}) must be the ranks that the "
                f"runs are launched on, because batch sizes are divided by them, but {run.label} "
                f"trained on {found:.1f} samples a step; correct it, or leave out batches that are "
                "larger than an epoch, and give a new output_dir."
            )

    def _best_rate(self, plan: ComparePlan, schedule: Schedule) -> float | None:
        """The learning rate with the fewest steps; with the lowest loss where none gets there."""
        tried: dict[float, list[tuple[float, float]]] = {}
        for run in plan.tuning_runs(schedule):
            history = self.ended[run.folder]
            steps = self._steps(history)
            loss = None if history is None else history.final_loss
            cost = math.inf if steps is None else math.log(max(steps, 1e-9))
            known = loss is not None and math.isfinite(loss)
            assert run.learning_rate is not None
            tried.setdefault(run.learning_rate, []).append((cost, loss if known else math.inf))  # type: ignore[arg-type]
        if not tried:
            return None
        return min(tried, key=lambda rate: tuple(map(sum, zip(*tried[rate], strict=True))))

    def _steps(self, history: RunHistory | None) -> float | None:
        assert self.target is not None
        return None if history is None else history.steps_to(self.target)

    def _is_bound(self, history: RunHistory) -> bool:
        """Whether the first evaluation was at the target already: it may have been there before."""
        return history.steps_to(self.target or 0.0) == history.evaluations[0].step

    def _write(self, plan: ComparePlan, rates: dict[str, float | None]) -> Path:
        found: list[SweepRun] = []
        for size, schedule in zip(self.plan.batch_sizes, plan.schedules, strict=True):
            chosen = {run.folder for run in plan.runs_at(schedule, rates[schedule.name])}
            for run in plan.possible_runs():
                history = self.ended.get(run.folder)
                if run.schedule == schedule.name and history is not None:
                    found.append(self._measured(size, run, history, run.folder in chosen))
        reference = [r for r in found if r.chosen and r.batch_size == self.plan.reference]
        reached = [run.steps for run in reference if run.steps is not None]
        per = self.plan.tokens_per_sequence
        mean = math.fsum(reached) / len(reached) if reached else None
        folder = next((f for f, history in self.ended.items() if history is not None), None)
        sweep = Sweep(
            name=self.plan.name,
            runs=tuple(found),
            target_loss=self.target,
            tokens_per_sequence=per,
            parameters=None if folder is None else _parameters_in(folder),
            tokens=None if mean is None else mean * self.plan.reference * per,
            overhead=self.plan.overhead,
            reference=self.plan.reference,
            setup=self._setup(rates),
        )
        return write_sweeps([sweep], self.plan.output_dir / SWEEP_FILE)

    def _measured(self, size: int, run: Run, history: RunHistory, chosen: bool) -> SweepRun:
        noise = [value for value in history.records["noise_scale"] if value is not None]
        return SweepRun(
            batch_size=size,
            steps=self._steps(history),
            trained_steps=history.steps,
            learning_rate=run.learning_rate,
            seed=run.seed,
            noise_scale=noise[-1] if noise else None,
            chosen=chosen,
        )

    def _setup(self, rates: dict[str, float | None]) -> dict[str, Any]:
        plan = self.plan
        values = {
            "shared flags": " ".join(flags_of(plan.shared)) or "none",
            "program": " ".join([*plan.launch, *(plan.program or ["hf-adaptive-batch pretrain"])]),
            "learning rates tried": ", ".join(f"{rate:g}" for rate in sorted(plan.learning_rates))
            or "the program's own",
            "best learning rate at an edge of those": ", ".join(self._at_edges(rates)) or "none",
            "warm-up": f"{plan.warmup_samples:,} samples",
            "half-life of averaged weights": f"{plan.averaging_half_life_tokens:,.0f} tokens",
            "half-life of beta2": f"{plan.beta2_half_life_tokens:,.0f} tokens",
            "evaluated every": f"{plan.eval_samples:,} samples or step",
            "given up after": f"{plan.max_samples:,} samples",
            "seeds": ", ".join(map(str, plan.seeds)),
            "machine": machine(),
            "versions": versions(),
            "date": f"{datetime.now(UTC):%Y-%m-%d}",
        }
        # The user's own flags win, and are among the shared ones.
        for flag, name in _SAID_BY_FLAGS.items():
            if flag in plan.shared:
                values[name] = f"--{flag} {plan.shared[flag]}"
        if len(plan.learning_rates) > 1:
            values["learning rates chosen by seeds"] = ", ".join(map(str, plan.tuning_seeds))
        if self.failed:
            values["failed runs"] = "; ".join(self.failed)
        return values

    def _at_edges(self, rates: dict[str, float | None]) -> list[str]:
        """The batch sizes whose best learning rate may lie beyond those tried."""
        tried = sorted(self.plan.learning_rates)
        ends = (tried[0], tried[-1]) if len(tried) > 1 else ()
        return [name for name, rate in rates.items() if rate in ends]


def _progress(console: Console) -> Progress:
    """A bar over the whole sweep; nothing of it where there is no terminal."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


def _parameters_in(folder: Path) -> float | None:
    """Parameters of the model that a run saved, by the headers of its safetensors files."""
    count = 0
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as opened:
            header = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
        shapes = [entry["shape"] for name, entry in header.items() if name != "__metadata__"]
        count += sum(math.prod(shape) for shape in shapes)
    return float(count) or None
