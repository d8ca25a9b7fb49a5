"""The flags of `cbs measure`, and its settings file, checked before anything runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...compare.rules import RESERVED, check_program
from ...compare.values import CHECKS
from ...flags import SUFFIXES, read_settings
from ..critical import OVERHEAD
from .settings import Own, given_flags, number, parser_of, take_own, tokens_per_sequence_of, whole
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
    "stop_after_tokens": "max_samples says it",
    "load_best_model_at_end": "the last evaluation is to be of the end of training",
}


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
    parser = parser_of(
        _OWN,
        prog="hf-adaptive-batch cbs measure",
        usage="%(prog)s [FILE.yaml] --batch_sizes B ... --target_samples D [--flag value ...]",
        description="Train with several batch sizes to the same loss, and fit the steps it takes.",
        epilog=_EPILOG,
    )
    return sweep_plan_of({**settings, **given_flags(parser, words)})


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
    own = take_own(values, _OWN, _TAKEN)
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
    if samples < reference:
        raise ValueError(
            f"target_samples ({samples}) must be at least reference_batch_size ({reference}), "
            "because the reference trains on them step by step; raise it, to some hundred steps."
        )
    per_sequence = tokens_per_sequence_of(own["tokens_per_sequence"], values, program)
    defaults = default_values(samples, per_sequence)
    chosen = {
        name: default if own[name] is None else number(name, own[name])
        for name, default in defaults.items()
    }
    if "averaging_decay" in values and own["averaging_half_life_tokens"] is None:
        chosen["averaging_half_life_tokens"] = 0.0  # the user's own length of the average
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
    output = CHECKS["output_dir"]("output_dir", own["output_dir"] or "runs/cbs")
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
        output_dir=output,
        name=str(own["title"] or output.resolve().name),
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


def _overhead(value: Any) -> float:
    overhead = OVERHEAD if value is None else number("overhead", value)
    if not overhead > 0:
        raise ValueError(
            f"overhead ({overhead:g}) must be above 0, because it is the share of steps that a "
            "larger batch may waste; use 0.2."
        )
    return overhead


_OWN: dict[str, Own] = {
    "batch_sizes": Own.list(int, "in samples, such as 8 16 32 64 128"),
    "target_samples": Own(int, "samples that the reference trains on: its loss then is the target"),
    "reference_batch_size": Own(int, "scaling is linear from there (the smallest)"),
    "overhead": Own(float, "share of steps above linear scaling at the critical batch size (0.2)"),
    "target_loss": Own(float, "validation loss to reach, instead of the reference's"),
    "learning_rates": Own.list(float, "to choose from at each batch size (the program's own)"),
    "seeds": Own.list(int, "runs of each batch size (0)"),
    "tuning_seeds": Own.list(int, "to choose learning rates by (the first seed)"),
    "tokens_per_sequence": Own(int, "tokens of a sample (block_size)"),
    "warmup_samples": Own(float, "samples of learning-rate warm-up (a quarter of target_samples)"),
    "averaging_half_life_tokens": Own(
        float,
        "half-life of the averaged weights that are evaluated (an eighth of the target's tokens); "
        "0 for none",
    ),
    "beta2_half_life_tokens": Own(
        float,
        "half-life of Adam's second moments (a hundredth of the target's tokens); 0 leaves beta2",
    ),
    "eval_samples": Own(float, "samples between evaluations (a fiftieth of target_samples)"),
    "max_samples": Own(float, "samples after which a run gives up (4 times target_samples)"),
    "max_micro_batch_size": Own(int, "samples that fit on a device at a time (16)"),
    "data_parallel_size": Own(int, "ranks that the runs are launched on (1)"),
    "jobs": Own(int, "runs at a time (1)"),
    "output_dir": Own(str, "where everything goes (runs/cbs)"),
    "title": Own(str, "of the results, such as the model's (the folder's name)"),
    "program": Own.of_files(),
    "launch": Own.of_files(),
}
