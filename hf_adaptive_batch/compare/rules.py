"""What a comparison may not ask for, because its runs would not be comparable."""

import os
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .plan import ComparePlan


# What a run is told by the comparison itself.
RESERVED = ("output_dir", "seed", "resume_from_checkpoint", "overwrite_output_dir")

BUDGETS = (
    "max_train_samples",
    "max_training_samples",
    "max_train_tokens",
    "max_steps",
    "num_train_epochs",
)

# B0, which learning rates are meant for, and warm-up, `max_steps` and default caps count in.
_INITIAL_BATCH = ("per_device_train_batch_size", "gradient_accumulation_steps")

DATA = (
    "dataset",
    "dataset_config",
    "dataset_split",
    "validation_split",
    "validation_fraction",
    "text_column",
    "tokenizer",
    "block_size",
    "max_eval_samples",
    "streaming",
    "shuffle_blocks",
    "data_seed",
)

MODEL = (
    "model_name_or_path",
    "config_name",
    "tokenizer_name",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
    "rms_norm_eps",
    "tie_word_embeddings",
)


def check_schedule_settings(name: str, settings: Mapping[str, Any]) -> None:
    """Refuse flags by which a schedule would differ in more than its batch size.

    Args:
        name: The schedule's.
        settings: Its flags.

    Raises:
        ValueError: If there is one.
    """
    where = f"schedule {name!r}"
    _refuse_reserved(where, settings)
    if "learning_rate" in settings:
        raise ValueError(
            f"learning_rate ({settings['learning_rate']}) of {where} must be given as a list, "
            "because one is chosen from it; write learning_rates: "
            f"[{settings['learning_rate']}]."
        )
    for flags, why in (
        (BUDGETS, "every run must have the same budget"),
        (DATA, "every run must see the same data"),
        (MODEL, "every run must train the same model"),
        (_INITIAL_BATCH, "learning rates, warm-up and steps count in it: as a batch write '0:64'"),
    ):
        for flag in flags:
            if flag in settings:
                raise ValueError(
                    f"{flag} ({settings[flag]}) must not stand in {where}, because {why}; put it "
                    "under shared."
                )


def check_shared(plan: ComparePlan, common_rates: Sequence[float]) -> None:
    """Refuse shared flags that do not go with the rest.

    Args:
        plan: The plan.
        common_rates: The learning rates that all schedules may choose from.

    Raises:
        ValueError: If there is one.
    """
    _refuse_reserved("shared", plan.shared)
    if "learning_rate" in plan.shared and common_rates:
        raise ValueError(
            f"learning_rate ({plan.shared['learning_rate']}) must not be shared where there are "
            f"learning_rates ({', '.join(map(str, common_rates))}), because one of these is chosen "
            "for each schedule; leave out one of the two."
        )
    if plan.shared.get("load_best_model_at_end"):
        raise ValueError(
            "load_best_model_at_end (True) must be left out, because the last evaluation would be "
            "of the best checkpoint, and not of the end of training; remove it."
        )


def check_program(plan: ComparePlan) -> None:
    """Refuse a command that cannot be started.

    Args:
        plan: The plan.

    Raises:
        ValueError: If it cannot.
    """
    program = plan.program
    if program and plan.launches_python and re.fullmatch(r"python[\d.]*", Path(program[0]).name):
        raise ValueError(
            f"program ({' '.join(program)}) must begin with the script, because {plan.launch[0]} "
            f"starts Python by itself; leave out {program[0]}."
        )
    name, words = ("launch", plan.launch) if plan.launch else ("program", program)
    if words and shutil.which(words[0], path=search_path()) is None:
        raise ValueError(
            f"{name} ({' '.join(words)}) must begin with a command that can be run, because every "
            f"run is started with it, but {words[0]} was not found; correct it."
        )


def search_path() -> str:
    """Where commands are looked for: first beside the Python of an environment, active or not."""
    path = os.environ.get("PATH", os.defpath)
    if sys.prefix == sys.base_prefix:
        return path
    return os.pathsep.join([str(Path(sys.executable).parent), path])


def _refuse_reserved(where: str, settings: Mapping[str, Any]) -> None:
    for flag in RESERVED:
        if flag in settings:
            plural = {"seed": "seeds", "output_dir": "output_dir"}.get(flag)
            instead = f"give {plural} of the comparison instead" if plural else "leave it out"
            raise ValueError(
                f"{flag} ({settings[flag]}) must not stand in {where}, because the comparison "
                f"gives each run its own; {instead}."
            )
