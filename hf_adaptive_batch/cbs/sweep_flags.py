"""The flags of `cbs measure`, and its settings file, checked before anything runs."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..compare.file import shared_flags
from ..compare.rules import RESERVED, check_program
from ..compare.values import CHECKS
from ..flags import SUFFIXES, read_settings
from .critical import OVERHEAD
from .sweep_plan import SweepPlan, default_values, layout_of


_EPILOG = """\
All other flags are those of `hf-adaptive-batch pretrain`, shared by all runs: the model, the data.
The first word may be a YAML or JSON file with any of them, and with `program` and `launch` as in a
compare file, for a script of your own. The defaults follow Zhang et al. (arXiv 2410.21676): a
constant learning rate, averaged weights, no weight decay.
"""

# What the sweep sets by itself.
_TAKEN = {
    **dict.fromkeys(RESERVED, "every run has its own"),
    "per_device_train_batch_size": "batch_sizes says it",
    "gradient_accumulation_steps": "batch_sizes says it",
    "batch_schedule": "a run has one batch size",
    "max_training_samples": "max_samples says it",
    "max_train_samples": "max_samples says it",
    "max_train_tokens": "max_samples says it",
    "max_steps": "max_samples says it",
    "num_train_epochs": "max_samples says it",
    "max_global_batch_size": "a run has one batch size",
    "stop_at_eval_loss": "target_loss says it",
    "load_best_model_at_end": "the last evaluation is to be of the end of training",
}
_PRETRAIN_BLOCK_SIZE = 128


def read_sweep_plan(arguments: Sequence[str]) -> SweepPlan:
    """Read and check what is to be measured.

    Args:
        arguments: The words of the command line: a settings file, if any, then flags.

    Returns:
        The plan.

    Raises:
        ValueError: If something does not fit.
    """
    words, settings = list(arguments), {}
    if words and not words[0].startswith("-"):
        if not words[0].lower().endswith(SUFFIXES):
            raise ValueError(
                f"word ({words[0]}) must be a settings file ({', '.join(SUFFIXES)}) or come after "
                "a flag, because else it belongs to none; write such as --batch_sizes 8 16 32."
            )
        settings = read_settings(words.pop(0))
    given, others = _parser().parse_known_args(words)
    settings.update((name, value) for name, value in vars(given).items() if value is not None)
    settings.update(shared_flags(others))
    return sweep_plan_of(settings)


def sweep_plan_of(settings: Mapping[str, Any]) -> SweepPlan:
    """Check settings, and make them a plan.

    Args:
        settings: Values by the names of flags.

    Returns:
        The plan.

    Raises:
        ValueError: If one is missing, taken or does not fit.
    """
    values = dict(settings)
    own = {name: values.pop(name, None) for name in _OWN}
    for name, why in _TAKEN.items():
        if name in values:
            raise ValueError(
                f"{name} ({values[name]}) must not be given, because {why}; leave it out."
            )
    program, launch = (
        CHECKS["program"]("program", own["program"]),
        CHECKS["launch"]("launch", own["launch"]),
    )
    ranks = whole("data_parallel_size", own["data_parallel_size"], 1)
    micro = whole("max_micro_batch_size", own["max_micro_batch_size"], 16)
    sizes = _batch_sizes(own["batch_sizes"])
    for size in sizes:
        layout_of(size, micro, ranks)
    reference = whole("reference_batch_size", own["reference_batch_size"], sizes[0])
    if reference not in sizes:
        raise ValueError(
            f"reference_batch_size ({reference}) must be one of batch_sizes "
            f"({', '.join(map(str, sizes))}), because scaling is linear from what it measured; add "
            "it, or choose another."
        )
    samples = whole("target_samples", own["target_samples"], 0)
    per_sequence = tokens_per_sequence_of(own["tokens_per_sequence"], values, program)
    defaults = default_values(samples, per_sequence)
    chosen = {
        name: default if own[name] is None else number(name, own[name])
        for name, default in defaults.items()
    }
    for name in ("eval_samples", "max_samples"):
        if chosen[name] < 1:
            raise ValueError(
                f"{name} ({chosen[name]:g}) must be at least 1, because it counts samples; leave "
                "it out for the default."
            )
    if chosen["max_samples"] < samples:
        raise ValueError(
            f"max_samples ({chosen['max_samples']:g}) must be at least target_samples ({samples}), "
            "because the reference takes as many to its target; raise it."
        )
    seeds = CHECKS["seeds"]("seeds", own["seeds"])
    target = CHECKS["target_loss"]("target_loss", own["target_loss"])
    plan = SweepPlan(
        batch_sizes=sizes,
        reference=reference,
        overhead=_overhead(own["overhead"]),
        target_samples=samples,
        target_loss=target,
        learning_rates=CHECKS["learning_rates"]("learning_rates", own["learning_rates"]),
        seeds=seeds,
        tuning_seeds=CHECKS["tuning_seeds"]("tuning_seeds", own["tuning_seeds"]) or seeds[:1],
        tokens_per_sequence=per_sequence,
        warmup_samples=round(chosen["warmup_samples"]),
        averaging_half_life_tokens=chosen["averaging_half_life_tokens"],
        beta2_half_life_tokens=chosen["beta2_half_life_tokens"],
        eval_samples=round(chosen["eval_samples"]),
        max_samples=round(chosen["max_samples"]),
        max_micro_batch_size=micro,
        data_parallel_size=ranks,
        shared=CHECKS["shared"]("shared", values),
        program=program,
        launch=launch,
        jobs=CHECKS["jobs"]("jobs", own["jobs"]),
        output_dir=Path(own["output_dir"] or "runs/cbs"),
        name=str(own["title"] or "Critical batch size"),
    )
    if "learning_rate" in plan.shared and plan.learning_rates:
        raise ValueError(
            f"learning_rate ({plan.shared['learning_rate']}) must not be given with "
            "learning_rates, because one of these is chosen at each batch size; leave out one."
        )
    check_program(plan.target_plan())
    return plan


def _batch_sizes(value: Any) -> list[int]:
    entries = value if isinstance(value, list | tuple) else []
    sizes = sorted({entry for entry in entries if type(entry) is int and entry >= 2})
    if len(sizes) < 3 or len(sizes) != len(entries):
        shown = "none" if value is None else ", ".join(map(str, entries or [value]))
        raise ValueError(
            f"batch_sizes ({shown}) must be three or more different whole numbers from 2, because "
            "two numbers are fitted to their steps, and noise is seen from 2 samples on; five or "
            "more are better, such as 8 16 32 64 128."
        )
    return sizes


def tokens_per_sequence_of(value: Any, shared: Mapping[str, Any], program: Sequence[str]) -> int:
    """The tokens of a sample, given or by the block size of `pretrain`.

    Args:
        value: Given by the user; None for the block size.
        shared: Flags of all runs.
        program: A command of the user's, whose samples nobody knows.

    Returns:
        Tokens.

    Raises:
        ValueError: If they are not known.
    """
    if value is None and program:
        raise ValueError(
            "tokens_per_sequence (none) must be given with a program of your own, because "
            "half-lives and results are in tokens; give the length of its samples."
        )
    if value is None:
        value = shared.get("block_size", _PRETRAIN_BLOCK_SIZE)
    return whole("tokens_per_sequence", value, 0)


def _overhead(value: Any) -> float:
    overhead = OVERHEAD if value is None else number("overhead", value)
    if not overhead > 0:
        raise ValueError(
            f"overhead ({overhead:g}) must be above 0, because it is the share of steps that a "
            "larger batch may waste; use 0.2."
        )
    return overhead


def whole(name: str, value: Any, default: int) -> int:
    """Take a value for a count.

    Args:
        name: Of the value.
        value: The value; None for the default.
        default: 0 for one that must be given.

    Returns:
        A whole number from 1.

    Raises:
        ValueError: If it is none.
    """
    count = default if value is None else number(name, value)
    if count < 1 or count != int(count):
        shown = "none" if value is None else value
        raise ValueError(
            f"{name} ({shown}) must be given as a whole number from 1, because it is a count; "
            "write such as 16."
        )
    return int(count)


def number(name: str, value: Any) -> float:
    """Take a value for an amount.

    Args:
        name: Of the value.
        value: The value, or text of it.

    Returns:
        A finite number of at least 0.

    Raises:
        ValueError: If it is none.
    """
    try:
        found = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        found = math.nan
    if not (found >= 0 and math.isfinite(found)):
        raise ValueError(
            f"{name} ({value!r}) must be a number of at least 0, because it is an amount; correct "
            "it, or leave it out for the default."
        )
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hf-adaptive-batch cbs measure",
        usage="%(prog)s [FILE.yaml] --batch_sizes B ... --target_samples D [--flag value ...]",
        description="Train with several batch sizes to the same loss, and fit the steps it takes.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    for name, (kind, text) in _OWN.items():
        if kind is not None:
            many = {"nargs": "+"} if text.startswith("*") else {}
            parser.add_argument(f"--{name}", type=kind, help=text.lstrip("*"), **many)  # type: ignore[arg-type]
    return parser


# By name: its type, and its help, with a star before that of a list. Without a type: of files.
_OWN: dict[str, tuple[type | None, str]] = {
    "batch_sizes": (int, "*in samples, such as 8 16 32 64 128"),
    "target_samples": (int, "samples that the reference trains on: its loss then is the target"),
    "reference_batch_size": (int, "scaling is linear from there (the smallest)"),
    "overhead": (float, "share of steps above linear scaling at the critical batch size (0.2)"),
    "target_loss": (float, "validation loss to reach, instead of the reference's"),
    "learning_rates": (float, "*to choose from at each batch size (the program's own)"),
    "seeds": (int, "*runs of each batch size (0)"),
    "tuning_seeds": (int, "*to choose learning rates by (the first seed)"),
    "tokens_per_sequence": (int, "tokens of a sample (block_size)"),
    "warmup_samples": (float, "samples of learning-rate warm-up (a quarter of target_samples)"),
    "averaging_half_life_tokens": (
        float,
        "half-life of the averaged weights that are evaluated (an eighth of the target's tokens); "
        "0 for none",
    ),
    "beta2_half_life_tokens": (
        float,
        "half-life of Adam's second moments (a hundredth of the target's tokens); 0 leaves beta2",
    ),
    "eval_samples": (float, "samples between evaluations (a fiftieth of target_samples)"),
    "max_samples": (float, "samples after which a run gives up (4 times target_samples)"),
    "max_micro_batch_size": (int, "samples that fit on a device at a time (16)"),
    "data_parallel_size": (int, "ranks that the runs are launched on (1)"),
    "jobs": (int, "runs at a time (1)"),
    "output_dir": (str, "where everything goes (runs/cbs)"),
    "title": (str, "of the results"),
    "program": (None, ""),
    "launch": (None, ""),
}
