"""`hf-adaptive-batch cbs branch`: the critical batch size at a checkpoint, by branches of it."""

from __future__ import annotations

import json
import math
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ...compare.check import check_flags
from ...compare.folders import LOG_FILE, check_folders, last_lines, locked, read_result
from ...compare.output import print_plain
from ...compare.runs import Ended, Interrupted, run_all
from ...report.history import RunHistory
from ...report.records import without_nan
from ..branching import BranchedBatchSize, BranchOutcome, branched_batch_size, smoothed_loss
from .branch_plan import BranchPlan, read_branch_plan


BRANCH_FILE = "branch.json"


@dataclass(frozen=True, kw_only=True)
class Branch:
    """What one branch came to.

    Attributes:
        factor: k.
        steps: Optimizer steps.
        training_loss: Smoothed, after the last step.
        training_error: Its standard error, by the scatter from step to step.
        validation_loss: After the last step; NaN if it was not finite.
    """

    factor: float
    steps: int
    training_loss: float
    training_error: float
    validation_loss: float


def branch(arguments: Sequence[str]) -> int:
    """Train the branches, and apply the rule.

    Args:
        arguments: A checkpoint and flags, as on the command line.

    Returns:
        The exit status: 0; 1 if a branch failed; 128 and the signal's number if one came.
    """
    plan = read_branch_plan(arguments)
    console = Console(highlight=False)
    check_folders(plan.compare)
    print_plain(
        console,
        f"{plan.checkpoint}: batch {plan.batch_size} after {plan.tokens_seen:,} tokens. Branches "
        f"of {plan.branch_tokens:,} tokens at {', '.join(f'{k:g}' for k in plan.factors)} times "
        "the batch.",
    )
    histories: list[RunHistory] = []

    def end(ended: Ended) -> None:
        run = ended.run
        if ended.status:
            text = f"{run.label}: failed with exit status {ended.status}; {run.folder / LOG_FILE}"
            print_plain(console, "\n    ".join([f"{text} ends with:", *last_lines(run)]))
            return
        history = read_result(run)
        histories.append(history)
        done = "done before" if ended.kept else f"{ended.seconds:.0f} s"
        print_plain(console, f"{run.label}: validation loss {history.final_loss:.4f}, {done}")

    try:
        with locked(plan.compare.output_dir) as lock:
            check_flags(plan.compare)
            run_all(plan.compare, plan.compare.possible_runs(), end, lock=lock)
    except (Interrupted, KeyboardInterrupt) as stop:
        print_plain(
            console, "Stopped. What has been done is kept: the same command goes on from there."
        )
        return 128 + (stop.number if isinstance(stop, Interrupted) else signal.SIGINT)
    if len(histories) < len(plan.factors):
        print_plain(console, "error: a branch failed, and the rule needs all of them.")
        return 1
    named = {history.name: history for history in histories}
    branches = [
        _branch(plan, factor, named[run.label])
        for factor, run in zip(plan.factors, plan.compare.possible_runs(), strict=True)
    ]
    found = _apply_rule(plan, branches)
    _show(plan, branches, found, console)
    path = _write(plan, branches, found)
    print_plain(console, f"\nresults  {path}")
    return 0


def _branch(plan: BranchPlan, factor: float, history: RunHistory) -> Branch:
    """Read a branch's losses, and refuse one that did not train as it should."""
    losses = [math.nan if loss is None else float(loss) for loss in history.records["loss"]]
    tokens = history.tokens - plan.tokens_seen
    size = factor * plan.batch_size
    if not losses or abs(tokens / plan.branch_tokens - 1) > 0.02 + 1 / len(losses):
        raise ValueError(
            f"branch {factor:g} ({tokens:,} tokens in {len(losses)} recorded steps) must have "
            f"trained on {plan.branch_tokens:,} tokens, because branches are compared after the "
            "same; its budget may have ended before (flags must be those of the checkpoint's run, "
            "and the checkpoint must leave as many), or tokens_per_sequence "
            f"({plan.tokens_per_sequence}) or data_parallel_size is another."
        )
    sizes = {int(each) for each in history.records["global_batch_size"]}
    if sizes != {round(size)}:
        raise ValueError(
            f"batch of branch {factor:g} ({', '.join(map(str, sizes))}) must be {size:g}, because "
            "the rule is about it; correct data_parallel_size, and give a new output_dir."
        )
    last = history.final_loss
    return Branch(
        factor=factor,
        steps=len(losses),
        training_loss=smoothed_loss(losses, plan.smoothing),
        training_error=_error(losses, plan.smoothing),
        validation_loss=math.nan if last is None else last,
    )


def _error(losses: Sequence[float], smoothing: float) -> float:
    """The standard error of a smoothed loss, if losses scatter independently from step to step."""
    # Half the mean squared difference of neighbours is the variance, whatever the trend; the
    # average has smoothing / (2 - smoothing) of it.
    if len(losses) < 2:
        return math.inf
    squares = [(later - now) ** 2 for now, later in pairwise(losses)]
    variance = math.fsum(squares) / len(squares) / 2
    return math.sqrt(variance * smoothing / (2 - smoothing))


def _apply_rule(plan: BranchPlan, branches: Sequence[Branch]) -> BranchedBatchSize:
    return branched_batch_size(
        {
            each.factor: each.validation_loss if plan.validation else each.training_loss
            for each in branches
        },
        batch_size=plan.batch_size,
        tolerance=plan.tolerance,
        errors=None if plan.validation else {e.factor: e.training_error for e in branches},
    )


def sentences(plan: BranchPlan, found: BranchedBatchSize) -> list[str]:
    """What the branches say, in words.

    Args:
        plan: The plan.
        found: What the rule gave.

    Returns:
        Sentences.
    """
    said = [
        f"k* = {found.factor:g}: {found.outcome}.",
        f"Critical batch size after {plan.tokens_seen:,} tokens: {_range_of(plan, found)}",
        f"Learning rate there: {plan.learning_rate_factor(found.factor):.3g} times the "
        f"checkpoint's ({plan.rule}).",
    ]
    if found.failed_below:
        failed = ", ".join(f"{factor:g}" for factor in found.failed_below)
        said.append(f"Factors below k* that did not pass themselves: {failed}. Losses are noisy.")
    if found.undecided:
        unsure = ", ".join(f"{factor:g}" for factor in found.undecided)
        said.append(
            f"Within their standard error of the limit: {unsure}. More tokens a branch, a smaller "
            "smoothing or branch_loss validation would tell."
        )
    return said


def _range_of(plan: BranchPlan, found: BranchedBatchSize) -> str:
    """The bracket in samples and tokens, open where no branch closes it."""
    low, high = found.bracket
    low_tokens, high_tokens = (size * plan.tokens_per_sequence for size in (low, high))
    point = found.critical_batch_size
    if point is None:
        return f"{low:,.0f} samples ({low_tokens:,.0f} tokens) or more, without an upper end."
    if found.outcome is BranchOutcome.NONE_PASSED:
        return (
            f"below {high:,.0f} samples ({high_tokens:,.0f} tokens), without a lower end; by "
            f"Merrill's rule, for which the smallest batch always passes, {point:,.0f} samples."
        )
    return (
        f"from {low:,.0f} to {high:,.0f} samples ({low_tokens:,.0f} to {high_tokens:,.0f} tokens); "
        f"reported as {point:,.0f} samples, {point * plan.tokens_per_sequence:,.0f} tokens."
    )


def _show(
    plan: BranchPlan, branches: Sequence[Branch], found: BranchedBatchSize, console: Console
) -> None:
    table = Table(box=None, padding=(0, 2, 0, 0))
    for title in ("k", "batch", "lr x", "steps", "training loss", "validation loss", ""):
        table.add_column(title, justify="left" if not title else "right", no_wrap=True)
    for each in branches:
        error = f" ± {each.training_error:.4f}" if math.isfinite(each.training_error) else ""
        table.add_row(
            f"{each.factor:g}",
            f"{each.factor * plan.batch_size:,.0f}",
            f"{plan.learning_rate_factor(each.factor):.3g}",
            f"{each.steps:,}",
            f"{each.training_loss:.4f}{error}",
            f"{each.validation_loss:.4f}",
            "k*" if each.factor == found.factor else "",
        )
    console.print()
    console.print(table)
    console.print()
    for sentence in sentences(plan, found):
        print_plain(console, f"- {sentence}")


def _write(plan: BranchPlan, branches: Sequence[Branch], found: BranchedBatchSize) -> Path:
    low, high = found.bracket
    values: dict[str, Any] = {
        "version": 1,
        "checkpoint": str(plan.checkpoint),
        "tokens_seen": plan.tokens_seen,
        "branch_tokens": plan.branch_tokens,
        "tokens_per_sequence": plan.tokens_per_sequence,
        "tolerance": plan.tolerance,
        "smoothing": plan.smoothing,
        "loss": "validation" if plan.validation else "training",
        "learning_rate_rule": plan.rule,
        "branches": [vars(each) for each in branches],
        "factor": found.factor,
        "outcome": found.outcome.name.lower(),
        "bracket_samples": [low, None if math.isinf(high) else high],
        "critical_batch_size_samples": found.critical_batch_size,
        "failed_below": list(found.failed_below),
        "undecided": list(found.undecided),
        "sentences": sentences(plan, found),
    }
    path = plan.compare.output_dir / BRANCH_FILE
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(without_nan(values), indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)
    return path
