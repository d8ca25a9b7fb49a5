"""What learning rate, beta2 and weight decay do when the batch changes: pure functions of B / B0.

B0 is the batch that the user's values are meant for. Each rule gives a value for the batch B of a
step from the value for B0, so that nothing is ever multiplied in place, and a resumed run needs no
memory of it.
"""

import math
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

from .noise_scale import Measurability, NoiseScale


class OptimizerKind(StrEnum):
    """What the rules need to know of an optimizer."""

    SGD = "SGD"
    ADAM = "Adam"
    """Divides by a running root mean square of the gradient, with L2 in the gradient if at all."""
    ADAMW = "AdamW"
    """Likewise, with decoupled weight decay."""


LearningRateRule = Literal["none", "sqrt", "linear", "adascale"]

_FITTING: dict[str, tuple[OptimizerKind, ...]] = {
    "sqrt": (OptimizerKind.ADAM, OptimizerKind.ADAMW),
    "linear": (OptimizerKind.SGD,),
    "adascale": (OptimizerKind.SGD, OptimizerKind.ADAM, OptimizerKind.ADAMW),
}


def learning_rate_factor(
    rule: LearningRateRule,
    ratio: float,
    *,
    kind: OptimizerKind = OptimizerKind.ADAMW,
    noise: NoiseScale | None = None,
    base_batch_size: int = 1,
) -> float:
    """What the learning rate is multiplied by.

    `sqrt`: sqrt(B / B0), for Adam (Malladi et al. 2022, arXiv 2205.10287; Merrill et al. 2025,
    arXiv 2505.23971). `linear`: B / B0, for SGD (Goyal et al. 2017, arXiv 1706.02677).
    `adascale`: the gain of AdaScale (Johnson et al. 2020, arXiv 2007.05105) for SGD, its root for
    Adam, as Pollux has it (Qiao et al. 2021, arXiv 2008.12260); progress stays counted in samples,
    and not in gains.

    Args:
        rule: The rule.
        ratio: B / B0.
        kind: The optimizer.
        noise: The averaged measurements; needed for `adascale`.
        base_batch_size: B0 in samples; needed for `adascale`.

    Returns:
        A factor above 0, which is 1 at a ratio of 1.
    """
    if rule == "none" or ratio == 1:
        return 1.0
    if rule == "sqrt":
        return math.sqrt(ratio)
    if rule == "linear":
        return ratio
    gain = adascale_gain(ratio, noise, base_batch_size)
    return gain if kind is OptimizerKind.SGD else math.sqrt(gain)


def adascale_gain(ratio: float, noise: NoiseScale | None, base_batch_size: int) -> float:
    """The steps at B0 that a step at B is worth: (var + sqr) / (var / ratio + sqr).

    Johnson et al. 2020 (arXiv 2007.05105), with var = tr(Sigma) / B0 and sqr = ||G||^2. It lies
    between 1 and B / B0.

    Args:
        ratio: B / B0.
        noise: The averaged measurements.
        base_batch_size: B0 in samples.

    Returns:
        The gain; B / B0 where the noise drowns the gradient, 1 as long as nothing is known.
    """
    if noise is None or noise.measurability in (
        Measurability.NOT_YET,
        Measurability.NO_GRADIENT,
    ):
        return 1.0
    if noise.measurability is Measurability.NOISE_DOMINATES:
        return ratio
    var, sqr = max(noise.noise_trace, 0.0) / base_batch_size, noise.grad_sq_norm
    return (var + sqr) / (var / ratio + sqr)


def beta2_at(beta2: float, ratio: float, floor: float = 0.0) -> float:
    """Adam's beta2 with a half-life that is constant in tokens: beta2^(B / B0).

    Marek et al. 2025 (arXiv 2507.07101): 0.95 at 512 is 0.9999 at 1. They keep it for a whole run;
    after a change within one, Adam's bias correction is off for about 1 / (1 - beta2) steps.

    Args:
        beta2: For B0.
        ratio: B / B0.
        floor: The least that a larger batch may lead to: too short an average is no average.

    Returns:
        beta2 for B.
    """
    scaled = float(beta2**ratio)
    return max(scaled, min(floor, beta2)) if ratio > 1 else scaled


def weight_decay_at(weight_decay: float, ratio: float, learning_rate_factor: float = 1.0) -> float:
    """AdamW's weight decay with a timescale that is constant in samples.

    The weights are an average over the last 1 / (learning rate x weight decay) steps. That it spans
    equally many samples (Wang & Aitchison 2024, arXiv 2405.13698; Bergsma et al. 2025, arXiv
    2505.13738) keeps learning rate x weight decay / B constant.

    Args:
        weight_decay: For B0.
        ratio: B / B0.
        learning_rate_factor: What the learning rate is multiplied by for B.

    Returns:
        The weight decay for B.
    """
    return weight_decay * ratio / learning_rate_factor


@dataclass(frozen=True, kw_only=True)
class CoScaling:
    """Which rules are in force; all off by default.

    Args:
        learning_rate: Rule of the learning rate.
        beta2: Whether beta2 keeps its half-life in tokens.
        min_beta2: The least that a larger batch may lead to.
        weight_decay: Whether weight decay keeps its timescale in samples.

    Raises:
        ValueError: If a rule is unknown, or `min_beta2` is outside [0, 1).
    """

    learning_rate: LearningRateRule = "none"
    beta2: bool = False
    min_beta2: float = 0.9
    weight_decay: bool = False

    def __post_init__(self) -> None:
        if self.learning_rate not in ("none", *_FITTING):
            raise ValueError(
                f"scale_learning_rate ({self.learning_rate!r}) must be one of "
                f"{', '.join(['none', *_FITTING])}, because there are no other rules; use sqrt "
                "with Adam, linear with SGD."
            )
        if not 0 <= self.min_beta2 < 1:
            raise ValueError(
                f"min_beta2 ({self.min_beta2}) must be in [0, 1), because it is a decay; use 0 for "
                "no floor."
            )

    @property
    def is_off(self) -> bool:
        """Whether nothing is changed."""
        return self.learning_rate == "none" and not self.beta2 and not self.weight_decay

    def check_optimizer(self, name: str, kind: OptimizerKind | None, *, seesaw: bool) -> None:
        """Refuse an optimizer that a rule does not fit.

        Args:
            name: The optimizer's.
            kind: What it is; None if that is not known.
            seesaw: Whether the Seesaw schedule scales the learning rate.

        Raises:
            ValueError: With the rule and the optimizers that it fits.
        """
        fitting = {
            f"scale_learning_rate ({self.learning_rate})": _FITTING.get(self.learning_rate),
            "scale_beta2 (True)": _FITTING["sqrt"] if self.beta2 else None,
            "scale_weight_decay (True)": (OptimizerKind.ADAMW,) if self.weight_decay else None,
            "batch_schedule (seesaw)": _FITTING["sqrt"] if seesaw else None,
        }
        for setting, kinds in fitting.items():
            if kinds is not None and kind not in kinds:
                raise ValueError(
                    f"{setting} must go with {' or '.join(kinds)}, because its rule was derived "
                    f"for no other optimizer, and this one is {name}; choose another optim, or "
                    "leave the rule out."
                )
