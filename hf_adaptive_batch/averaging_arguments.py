"""The fields that say which weights are evaluated, and by what training ends early."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from .schedule_arguments import option


@dataclass
class AveragingOptions:
    """An average of the weights to evaluate, and ends of training beside the budget."""

    averaging_decay: float | None = option(
        None,
        "Evaluate an exponential average of the weights instead of the weights: the share of the "
        "old average kept from one step to the next, in [0, 1). Where the batch grows, prefer "
        "averaging_half_life_tokens.",
    )
    averaging_half_life_tokens: float | None = option(
        None,
        "The same, by the tokens after which half of the old average is left, whatever the batch "
        "does; such as 3e8.",
    )
    stop_at_eval_loss: float | None = option(
        None,
        "End training after the first evaluation whose eval_loss is at most this. Budget and "
        "learning-rate schedule stay as they are.",
    )
    stop_after_tokens: int | None = option(
        None,
        "End training with the step that reaches so many tokens in all, without padding where "
        "there is an attention mask. Budget and learning-rate schedule stay as they are.",
    )

    def check_averaging_and_stops(self) -> None:
        """Refuse values that are out of range, or that nothing would come of.

        Raises:
            ValueError: With the reason and the way out.
        """
        check_decay(
            "averaging_decay",
            self.averaging_decay,
            "averaging_half_life_tokens",
            self.averaging_half_life_tokens,
        )
        averages = self.averaging_decay is not None or self.averaging_half_life_tokens is not None
        if averages and getattr(self, "load_best_model_at_end", False):
            raise ValueError(BEST_IS_ANOTHER)
        target: Any = self.stop_at_eval_loss
        if target is not None and math.isnan(target):
            raise ValueError(
                f"stop_at_eval_loss ({target}) must be a number, because each eval_loss is "
                "compared with it; leave it out to train for the whole budget."
            )
        if target is not None and getattr(self, "eval_strategy", "no") == "no":
            raise ValueError(
                f"stop_at_eval_loss ({target}) must go with evaluations, because training ends "
                "after one of them, but eval_strategy is 'no'; set eval_strategy to steps."
            )
        if self.stop_after_tokens is not None and self.stop_after_tokens < 1:
            raise ValueError(
                f"stop_after_tokens ({self.stop_after_tokens}) must be at least 1, because "
                "training ends with the step that reaches it; leave it out to train for the whole "
                "budget."
            )


BEST_IS_ANOTHER = (
    "load_best_model_at_end (True) must be False with an average of the weights, because the best "
    "checkpoint holds the weights of training, and not those whose loss was the best; save the "
    "average by `with callback.averaged_weights(): trainer.save_model(...)`."
)


def check_decay(
    decay_name: str, decay: float | None, half_life_name: str, half_life: float | None
) -> None:
    """Refuse an average whose length is given twice, or is none.

    Args:
        decay_name: What the decay is called where it is given.
        decay: The share of the old average that is kept.
        half_life_name: Likewise.
        half_life: Tokens after which half of the old average is left.

    Raises:
        ValueError: With the reason and the way out.
    """
    if decay is not None and half_life is not None:
        raise ValueError(
            f"{decay_name} ({decay}) and {half_life_name} ({half_life}): only one must be given, "
            "because each says how long the average is; remove one."
        )
    if decay is not None and not 0 <= decay < 1:
        raise ValueError(
            f"{decay_name} ({decay}) must be in [0, 1), because it is the share of the old average "
            "that a step keeps; use e.g. 0.999."
        )
    if half_life is not None and not 0 < half_life < math.inf:
        raise ValueError(
            f"{half_life_name} ({half_life}) must be above 0 and finite, because after so many "
            "tokens half of the old average is left; use e.g. 3e8."
        )
