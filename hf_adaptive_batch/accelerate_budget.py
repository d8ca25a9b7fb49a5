"""What ends a loop without a Trainer: epochs, samples or tokens."""

import math

from .apply.clock import TrainingClock
from .assemble_schedule import Horizon


class LoopBudget:
    """Exactly one of epochs, samples and tokens.

    Args:
        epochs: `num_train_epochs`.
        samples: `max_train_samples`.
        tokens: `max_train_tokens`.

    Raises:
        ValueError: If none is given, or more than one, or nothing is to be trained on.
    """

    def __init__(self, epochs: float | None, samples: int | None, tokens: int | None) -> None:
        values = {
            "num_train_epochs": epochs,
            "max_train_samples": samples,
            "max_train_tokens": tokens,
        }
        given = {name: value for name, value in values.items() if value is not None}
        if len(given) != 1 or not min(given.values()) > 0:
            found = ", ".join(f"{name} ({value})" for name, value in given.items()) or "none"
            raise ValueError(
                f"The budget ({found}) must be one of {', '.join(values)}, above 0, because the "
                "loop ends when it is used up, and learning rates follow it; give exactly one."
            )
        self._epochs, self._samples, self._tokens = epochs, samples, tokens

    def __call__(self, epoch_samples: int | None) -> dict[str, int]:
        """The clock's budget.

        Args:
            epoch_samples: Samples of an epoch; None for a stream.

        Returns:
            Its argument.

        Raises:
            ValueError: If there are epochs of a stream to count.
        """
        if self._tokens is not None:
            return {"budget_tokens": self._tokens}
        if self._samples is not None:
            return {"budget_samples": self._samples}
        assert self._epochs is not None
        if epoch_samples is None:
            raise ValueError(
                f"num_train_epochs ({self._epochs}) must not be the budget of a stream, because "
                "its length is not known; give max_train_samples or max_train_tokens."
            )
        return {"budget_samples": math.ceil(self._epochs * epoch_samples)}


def horizon_of(clock: TrainingClock) -> Horizon:
    """What a schedule may depend on; of learning rates nothing is known here.

    Args:
        clock: At the beginning.

    Returns:
        The budget in the units of schedules.
    """
    samples: float = clock.budget_samples or 0
    if clock.budget_tokens is not None:
        samples = clock.budget_tokens / clock.tokens_per_sample
    return Horizon(
        samples=samples,
        tokens_per_sample=clock.tokens_per_sample,
        epoch_samples=clock.epoch_samples,
        total_steps=clock.total_initial_steps,
    )
