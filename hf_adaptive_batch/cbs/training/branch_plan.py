"""What `cbs branch` runs: the same training, on from a checkpoint, with larger batches."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...compare.plan import ComparePlan, Schedule
from ...compare.rules import RESERVED, check_program
from ...compare.values import CHECKS
from ...flags import SUFFIXES, read_settings
from ..branching import SMOOTHING, TOLERANCE
from .checkpoint_flags import check_budget, in_steps_of
from .settings import (
    Own,
    choice,
    given_flags,
    number,
    parser_of,
    take_own,
    tokens_per_sequence_of,
    whole,
)
from .sweep_plan import layout_of


_EPILOG = """\
All other flags are those that the checkpoint was trained with, its budget included, because the
learning-rate schedule goes on. They may stand in a settings file after the checkpoint. Merrill et
al. (arXiv 2505.23971) take 2 billion tokens a branch, a tolerance of 0.01 and a smoothing of 0.5.
"""
_TAKEN = {
    **{name: "every branch has its own" for name in RESERVED if name != "seed"},
    "seed": "it is that of the checkpoint",
    "per_device_train_batch_size": "it follows from the checkpoint's batch",
    "gradient_accumulation_steps": "it follows from the checkpoint's batch",
    "batch_schedule": "the factors say it",
    "stop_after_tokens": "branch_tokens says it",
    "stop_at_eval_loss": "branches are compared after the same tokens",
}
_FACTORS = (1, 2, 4, 8)


@dataclass(frozen=True, kw_only=True)
class BranchPlan:
    """A checked set of branches.

    Attributes:
        checkpoint: To branch from.
        batch_size: B of the checkpoint, in samples.
        tokens_seen: Of the checkpoint.
        seed: Of the checkpoint.
        factors: k, rising; each branch trains with k B.
        branch_tokens: Of every branch, whole steps of the largest batch.
        tokens_per_sequence: Of a sample.
        rule: What the learning rate is multiplied by: sqrt, linear or none.
        tolerance: In units of the loss.
        smoothing: Weight of each new loss in the average.
        validation: Whether validation losses are compared, and not smoothed training losses.
        compare: The runs; their schedules are the factors, in order.
    """

    checkpoint: Path
    batch_size: int
    tokens_seen: int
    seed: int
    factors: Sequence[float]
    branch_tokens: int
    tokens_per_sequence: int
    rule: str
    tolerance: float
    smoothing: float
    validation: bool
    compare: ComparePlan

    def learning_rate_factor(self, factor: float) -> float:
        """What multiplies the learning rate of a branch.

        Args:
            factor: k.

        Returns:
            f(k): sqrt(k), k or 1.
        """
        return {"sqrt": math.sqrt(factor), "linear": factor, "none": 1.0}[self.rule]


def read_branch_plan(arguments: Sequence[str]) -> BranchPlan:
    """Read and check what is to be branched.

    Args:
        arguments: The words of the command line: a checkpoint, a settings file if any, flags.

    Returns:
        The plan.

    Raises:
        ValueError: If something does not fit.
    """
    first_flag = next((i for i, w in enumerate(arguments) if w.startswith("-")), len(arguments))
    names, flags = list(arguments[:first_flag]), list(arguments[first_flag:])
    files = [name for name in names[1:] if name.lower().endswith(SUFFIXES)]
    if not names or len(names) > 2 or len(files) != len(names) - 1:
        raise ValueError(
            f"cbs branch ({' '.join(names) or 'nothing'}) must be given a checkpoint, and a "
            "settings file if you have one, before any flag, because it goes on from there; write "
            "such as: cbs branch runs/mine/checkpoint-500 --branch_tokens 1000000."
        )
    settings = read_settings(files[0]) if files else {}
    parser = parser_of(
        _OWN,
        prog="hf-adaptive-batch cbs branch",
        usage="%(prog)s CHECKPOINT [FILE.yaml] --branch_tokens N [--flag value ...]",
        description="Branch from a checkpoint with larger batches, and say which lose nothing.",
        epilog=_EPILOG,
    )
    return branch_plan_of(Path(names[0]), {**settings, **given_flags(parser, flags)})


def branch_plan_of(checkpoint: Path, settings: Mapping[str, Any]) -> BranchPlan:
    """Check settings, and make them a plan.

    Args:
        checkpoint: To branch from, of an AdaptiveBatchTrainer.
        settings: Values by the names of flags.

    Returns:
        The plan.

    Raises:
        ValueError: If one is missing, taken or does not fit.
    """
    values = dict(settings)
    own = take_own(values, _OWN, _TAKEN)
    if not checkpoint.is_dir():
        there = sorted(
            checkpoint.parent.glob("checkpoint-*"), key=lambda each: each.stat().st_mtime
        )
        names = ", ".join(each.name for each in there) or "no checkpoint"
        raise ValueError(
            f"checkpoint ({checkpoint}) must be a folder, because branches go on from it; name "
            f"one of those that were kept (in {checkpoint.parent}: {names})."
        )
    from ...checkpoint import check_checkpoint, read_state  # torch and transformers take seconds

    check_checkpoint(checkpoint)
    state = read_state(checkpoint)
    size = math.prod(int(part) for part in state["plan"].values())
    program = CHECKS["program"]("program", own["program"])
    ranks = whole("data_parallel_size", own["data_parallel_size"], 1)
    per_sequence = tokens_per_sequence_of(own["tokens_per_sequence"], values, program)
    factors = _factors(own["factors"], size)
    # What fitted while the checkpoint was trained.
    most = whole("max_micro_batch_size", own["max_micro_batch_size"], _micro_batch_size(state))
    micro, _ = layout_of(math.gcd(*(round(k * size) for k in (1, *factors))), most, ranks)
    rule = choice("branch_learning_rate", own["branch_learning_rate"], ("sqrt", "linear", "none"))
    initial = int(state["clock"]["initial_global_batch_size"])
    if initial != size:
        values = in_steps_of(values, size, initial)
    tokens = whole("branch_tokens", own["branch_tokens"], 0)
    step = round(factors[-1] * size) * per_sequence
    if tokens < step:
        raise ValueError(
            f"branch_tokens ({tokens}) must be at least a step of the largest batch ({step} "
            "tokens), because losses are compared after the same tokens; raise it."
        )
    tokens = -(-tokens // step) * step
    if not program:
        check_budget(values, state["clock"], tokens, per_sequence)
    measure = choice("branch_loss", own["branch_loss"], ("training", "validation"))
    shared = {
        "eval_strategy": "no",
        **values,
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": size // (micro * ranks),
        # Larger ones could make a step of a single micro-batch, whose loss is not recorded.
        "max_micro_batch_size": micro,
        "scale_learning_rate": rule,
        "stop_after_tokens": int(state["clock"]["tokens_seen"]) + tokens,
        "resume_from_checkpoint": str(checkpoint),
        "test_interval": 1,
        "save_strategy": "no",
    }
    plan = BranchPlan(
        checkpoint=checkpoint,
        batch_size=size,
        tokens_seen=int(state["clock"]["tokens_seen"]),
        seed=int(state["seed"]),
        factors=factors,
        branch_tokens=tokens,
        tokens_per_sequence=per_sequence,
        rule=rule,
        tolerance=TOLERANCE if own["tolerance"] is None else number("tolerance", own["tolerance"]),
        smoothing=SMOOTHING if own["smoothing"] is None else number("smoothing", own["smoothing"]),
        validation=measure == "validation",
        compare=ComparePlan(
            title="branches",
            note="",
            shared=CHECKS["shared"]("shared", shared),
            seeds=(int(state["seed"]),),
            tuning_seeds=(int(state["seed"]),),
            target_loss=None,
            jobs=CHECKS["jobs"]("jobs", own["jobs"]),
            program=program,
            launch=CHECKS["launch"]("launch", own["launch"]),
            output_dir=Path(own["output_dir"] or "runs/branch"),
            schedules=[
                Schedule(
                    name=f"{factor:g} x {size}",
                    settings={
                        "batch_schedule": f"0:{round(factor * size)}",
                        "max_global_batch_size": round(max(factor, 1) * size),
                    },
                )
                for factor in factors
            ],
        ),
    )
    check_program(plan.compare)
    return plan


def _micro_batch_size(state: Mapping[str, Any]) -> int:
    return int(state["plan"]["micro_batch_size"])


def _factors(value: Any, size: int) -> list[float]:
    given = _FACTORS if value is None else value
    entries = [
        number("factor", each) for each in (given if isinstance(given, list | tuple) else [given])
    ]
    if len(set(entries)) < 2 or len(set(entries)) != len(entries) or min(entries) <= 0:
        raise ValueError(
            f"factors ({', '.join(map(str, entries))}) must be two or more different numbers above "
            "0, because their losses are compared; use 1 2 4 8."
        )
    for factor in entries:
        if round(factor * size) < 2 or not math.isclose(factor * size, round(factor * size)):
            raise ValueError(
                f"factor ({factor:g}) must make a whole batch of two samples or more of the "
                f"checkpoint's ({size}), because sizes are not rounded here, and the loss of a "
                "single sample is not recorded; choose another."
            )
    return sorted(entries)


_OWN: dict[str, Own] = {
    "branch_tokens": Own(int, "tokens of each branch, rounded up to steps of the largest batch"),
    "factors": Own.list(float, "of the checkpoint's batch (1 2 4 8)"),
    "tolerance": Own(float, "loss that a larger batch may lose (0.01)"),
    "smoothing": Own(float, "weight of each new loss in the average (0.5)"),
    "branch_loss": Own(str, "training (smoothed; Merrill's) or validation (after the branch)"),
    "branch_learning_rate": Own(
        str, "sqrt (Adam), linear (SGD) or none: how it follows the factor"
    ),
    "tokens_per_sequence": Own(int, "tokens of a sample (block_size)"),
    "max_micro_batch_size": Own(
        int, "samples that fit on a device at a time (the checkpoint's micro-batch)"
    ),
    "data_parallel_size": Own(int, "ranks that the branches are launched on (1)"),
    "jobs": Own(int, "branches at a time (1)"),
    "output_dir": Own(str, "where everything goes (runs/branch)"),
    "program": Own.of_files(),
    "launch": Own.of_files(),
}
