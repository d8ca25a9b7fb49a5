"""The flags of a checkpoint's run, as its branches need them: by samples, with a budget left."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .settings import number


def in_steps_of(values: dict[str, Any], size: int, initial: int) -> dict[str, Any]:
    """Turn flags that count steps of the batch that training began with into the checkpoint's.

    Args:
        values: Flags of the checkpoint's run.
        size: Its batch.
        initial: The batch that training began with, another one.

    Returns:
        Flags that mean the same samples in steps of the checkpoint's batch.

    Raises:
        ValueError: If there are none.
    """
    for name in ("scale_learning_rate", "scale_beta2", "scale_weight_decay"):
        if str(values.get(name, "none")).lower() not in ("none", "false"):
            raise ValueError(
                f"{name} ({values[name]}) must be left out for a checkpoint whose batch ({size}) "
                f"is not the one that training began with ({initial}), because what it scales is "
                "scaled already; branch from a checkpoint before the batch grew."
            )
    found = dict(values)
    for name in ("warmup_steps", "max_steps"):
        count = number(name, values.get(name, 0))
        if count < 1:  # none, or a share of the budget
            continue
        if (count * initial) % size:
            raise ValueError(
                f"{name} ({count:g} of the {initial} samples that training began with) must be "
                f"whole steps of the checkpoint's batch ({size}), because the learning-rate "
                "schedule goes on by samples; give warmup_steps as a share of the budget, or the "
                "budget as max_training_samples."
            )
        found[name] = int(count * initial / size)
    if "steps" in str(values.get("lr_scheduler_kwargs")):
        raise ValueError(
            f"lr_scheduler_kwargs ({values['lr_scheduler_kwargs']}) must have no steps for a "
            f"checkpoint whose batch ({size}) is not the one that training began with ({initial}), "
            "because they would be of other samples; branch from a checkpoint before the batch "
            "grew."
        )
    return found


def check_budget(
    values: Mapping[str, Any], clock: Mapping[str, Any], tokens: int, per_sequence: int
) -> None:
    """Refuse branches that the budget of the checkpoint's run would end.

    Args:
        values: Flags of the checkpoint's run.
        clock: Of the checkpoint.
        tokens: Of every branch.
        per_sequence: Tokens of a sample.

    Raises:
        ValueError: If it ends before they do, as far as the flags say it.
    """
    for name, seen, more in (
        ("max_train_samples", clock["samples_seen"], tokens / per_sequence),
        ("max_training_samples", clock["samples_seen"], tokens / per_sequence),
        ("max_train_tokens", clock["tokens_seen"], tokens),
    ):
        if name in values and number(name, values[name]) < seen + more:
            raise ValueError(
                f"branch_tokens ({tokens:,}) must end within {name} ({values[name]}), because the "
                f"schedule is that of the checkpoint's run, and {seen:,} are done; give fewer, or "
                "branch from an earlier checkpoint."
            )
