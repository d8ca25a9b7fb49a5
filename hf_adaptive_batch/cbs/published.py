"""Published measurements and laws, with their sources and how well each is confirmed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from .intervals import check_positive
from .sweep_result import Sweep, SweepRun


_BATCH_SIZES = [64 * 2**i for i in range(9)]

# Zhang et al. 2025 (arXiv 2410.21676), the numbers that their notebook fits (plots/chinchilla.ipynb
# at c5b509d): parameters and sequences in millions, target loss, steps to it at 64, 128, ... 16384.
# The sequences are the budget at which the batch of 256 sets the target.
_ZHANG = (
    (85, 3.4, 3.42, "46000 23000 13282 7000 3840 2528 1917 1600 1600"),
    (151, 6, 3.24, "96000 49000 24000 12000 7128 4350 2940 2400 2300"),
    (302, 12, 3.07, "196000 90000 46000 23400 13300 7224 4980 3400 2879"),
    (604, 24, 2.92, "311000 166000 81000 37440 21320 11400 7199 4700 3800"),
    (1200, 48, 2.736, "642000 331000 176000 94000 46500 25000 15360 8900 6500"),
)

ZHANG_2025 = tuple(
    Sweep(
        name=f"{parameters}M" if parameters < 1000 else f"{parameters / 1000}B",
        runs=tuple(
            SweepRun(batch_size=size, steps=float(steps))
            for size, steps in zip(_BATCH_SIZES, words.split(), strict=True)
        ),
        target_loss=loss,
        tokens_per_sequence=512,
        parameters=parameters * 1e6,
        tokens=sequences * 1e6 * 512,
        setup={"source": "Zhang et al. 2025, arXiv 2410.21676, plots/chinchilla.ipynb"},
    )
    for parameters, sequences, loss, words in _ZHANG
)
"""Steps to target of five models on C4, the best of their hyper-parameters, Chinchilla-optimal."""


class Kind(StrEnum):
    """What a law of batch sizes is about; the two are not the same, and never averaged."""

    OPTIMAL = "optimal batch size: the lowest loss for the tokens"
    CRITICAL = "critical batch size: larger ones waste tokens"


class Evidence(StrEnum):
    """How well a law's numbers are confirmed here."""

    REFITTED = "refitted from the authors' numbers"
    SECONDARY = "as secondary sources print it"
    UNCONFIRMED = "coefficient from memory, not confirmed"


@dataclass(frozen=True, kw_only=True)
class PublishedLaw:
    """A published law of batch sizes.

    Attributes:
        name: Of its authors.
        source: arXiv number, or none.
        formula: As a reader would write it.
        kind: What it is about.
        evidence: How well it is confirmed.
        tokens_per_step: (parameters N, tokens D) -> batch size in tokens.
        definition: By which the batch was chosen.
    """

    name: str
    source: str
    formula: str
    kind: Kind
    evidence: Evidence
    tokens_per_step: Callable[[float, float], float]
    definition: str


LAWS = (
    PublishedLaw(
        name="Step Law (Li et al. 2025)",
        source="arXiv 2503.04715",
        formula="0.58 D^0.571 tokens",
        kind=Kind.OPTIMAL,
        evidence=Evidence.SECONDARY,
        tokens_per_step=lambda n, d: 0.58 * d**0.571,
        definition="lowest loss at a fixed D, with its best learning rate",
    ),
    PublishedLaw(
        name="Power Lines (Bergsma et al. 2025)",
        source="arXiv 2505.13738",
        formula="0.0306 D^0.383 sequences of 2048",
        kind=Kind.OPTIMAL,
        evidence=Evidence.UNCONFIRMED,
        tokens_per_step=lambda n, d: 0.0306 * d**0.383 * 2048,
        definition="lowest loss at a fixed D, with its best weight decay",
    ),
    PublishedLaw(
        name="DeepSeek LLM (2024)",
        source="arXiv 2401.02954",
        formula="0.292 C^0.327 tokens, C = 6 N D",
        kind=Kind.OPTIMAL,
        evidence=Evidence.SECONDARY,
        tokens_per_step=lambda n, d: 0.292 * (6 * n * d) ** 0.327,
        definition="near-optimal loss at a fixed compute",
    ),
    PublishedLaw(
        name="Zhang et al. 2025",
        source="arXiv 2410.21676",
        formula="22.72 (D/1M)^0.4682 sequences of 512",
        kind=Kind.CRITICAL,
        evidence=Evidence.REFITTED,
        tokens_per_step=lambda n, d: 22.72 * (d / 1e6) ** 0.4682 * 512,
        definition="20 % more steps than linear scaling from 256 sequences",
    ),
    PublishedLaw(
        name="Power Lines (Bergsma et al. 2025)",
        source="arXiv 2505.13738",
        formula="0.0471 D^0.462 sequences of 2048",
        kind=Kind.CRITICAL,
        evidence=Evidence.UNCONFIRMED,
        tokens_per_step=lambda n, d: 0.0471 * d**0.462 * 2048,
        definition="twice the least tokens to a loss (the knee)",
    ),
)

# Merrill et al. 2025 (arXiv 2505.23971): for OLMo 1B and 7B, over most of training.
MERRILL_PLATEAU_TOKENS = 4096 * 4096


def law_tokens(law: PublishedLaw, parameters: float, tokens: float) -> float:
    """A law's batch size in tokens.

    Args:
        law: The law.
        parameters: N.
        tokens: D.

    Returns:
        Tokens per optimizer step; a `ValueError` if no float holds it.
    """
    [value] = check_positive(
        f"batch size of {law.name}",
        [law.tokens_per_step(float(parameters), float(tokens))],
        "it is followed",
        "correct parameters or tokens",
    )
    return value
