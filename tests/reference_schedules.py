"""The oracle for open-loop schedules and co-scaling: the papers' rules written out naively.

Nothing here calls the library. A rule that the paper gives as a loop is a loop.

    Gray et al. 2024, arXiv 2411.00999: `train.py` of their repository nanoGNS
    Lau et al. 2025, "Adaptive Batch Size Schedules for Distributed Training", arXiv 2412.21124
    Meterez et al. 2025, "Seesaw", arXiv 2510.14717
    Zhang et al. 2025, "How Does Critical Batch Size Scale in Pre-training?", arXiv 2410.21676
    Johnson et al. 2020, "AdaScale SGD", arXiv 2007.05105
    Marek et al. 2025, arXiv 2507.07101
"""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest


# ------------------------------------------------------------------------------ walking through


def walk(
    size_of: Callable[[float], int], *, unit: str, steps: int, per_sample: float
) -> list[tuple[float, int]]:
    """(progress, size) of the first steps: each begins where the sizes before it end."""
    begun: list[tuple[float, int]] = []
    sizes: list[int] = []
    for step in range(steps):
        progress = step if unit == "steps" else sum(sizes) * per_sample
        sizes.append(size_of(progress))
        begun.append((progress, sizes[-1]))
    return begun


def steps_to(budget: float, size_of: Callable[[float], int], *, unit: str, total: float = 1) -> int:
    """Steps until `budget` samples are used up; `total` is the progress that one sample makes."""
    samples = steps = 0
    while samples < budget:
        samples += size_of(steps if unit == "steps" else samples * total)
        steps += 1
    return steps


def up_to_multiple(size: float, of: int) -> int:
    """The least multiple that is not below."""
    return math.ceil(size / of) * of


# -------------------------------------------------------------------------------- Gray et al.

GRAY_TOKENS = 2_219_950_080  # max_tokens of their configuration: 9033 * 8 * 15 * 2048
GRAY_SEQUENCES = 8  # batch_size
GRAY_LENGTH = 2048  # block_size
GRAY_FINAL_STEPS = 15  # gradient_accumulation_steps


def gray_accumulation_steps(*, bs_schedule: bool) -> list[int]:
    """`ga_steps` of each iteration of their training loop.

    The loop marks the iteration *after* the tokens have exceeded max_tokens as the final one.
    """
    grad_accum_steps = np.linspace(2, GRAY_FINAL_STEPS, 10, dtype=np.int64)
    assert grad_accum_steps.tolist() == [2, 3, 4, 6, 7, 9, 10, 12, 13, 15]
    grad_accum_tokens = np.interp(
        grad_accum_steps, [grad_accum_steps[0], grad_accum_steps[-1]], [0, GRAY_TOKENS]
    ).astype(np.int64)
    tokens_processed, final_iter, done = 0, False, []
    while True:
        if bs_schedule:
            ga = math.ceil(np.interp(tokens_processed, grad_accum_tokens, grad_accum_steps))
        else:
            ga = GRAY_FINAL_STEPS
        tokens_processed += ga * GRAY_SEQUENCES * GRAY_LENGTH
        done.append(ga)
        if final_iter:
            return done
        if tokens_processed > GRAY_TOKENS:
            final_iter = True


# --------------------------------------------------------------------------------- Lau et al.


def lau_stages(samples_seen: float, *, max_samples: float, largest: int) -> int:
    """Quarter, half and whole of the largest batch, for 2.5 %, 2.5 % and 95 % of the samples."""
    if samples_seen < max_samples * 25 / 1000:
        return largest // 4
    if samples_seen < max_samples * 50 / 1000:
        return largest // 2
    return largest


# ------------------------------------------------------------------------------------ Seesaw


def seesaw_by_cuts(
    reference: Callable[[float], float], t: float, *, alpha: float, eta0: float, b0: float
) -> tuple[float, float]:
    """Algorithm 1, (B, eta) at t: wherever the reference has been cut by another alpha,
    eta <- eta / sqrt(alpha) and B <- B alpha."""
    eta, batch, threshold = eta0, b0, eta0 / alpha
    while eta0 * reference(t) <= threshold * (1 + 1e-12):
        eta, batch, threshold = eta / math.sqrt(alpha), batch * alpha, threshold / alpha
    return batch, eta


def seesaw_limit(eta_ref: float, *, eta0: float, b0: float) -> tuple[float, float]:
    """(B, eta) for infinitely small cuts: B = B0 eta0/eta_ref, eta = sqrt(eta0 eta_ref)."""
    return b0 * eta0 / eta_ref, math.sqrt(eta0 * eta_ref)


def seesaw_step_fraction(reference: Callable[[float], float], *, points: int = 100_000) -> float:
    """Steps over those at B0, integral of eta_ref/eta0: midpoint rule."""
    return sum(reference((index + 0.5) / points) for index in range(points)) / points


def seesaw_step_fraction_by_cuts(share_at: Callable[[float], float], *, alpha: float) -> float:
    """The same for finite cuts: the sum of the budget between cuts k and k + 1, over alpha^k.

    `share_at(decay)` is where the reference has fallen to that part of its peak.
    """
    cuts = math.ceil(math.log(1e12) / math.log(alpha))  # then the batch is that many times B0
    ends = [*(share_at(alpha**-k) for k in range(cuts)), 1.0]
    return sum((ends[k + 1] - ends[k]) * alpha**-k for k in range(cuts))


def quarter_cosine(t: float) -> float:
    """cos(pi t / 2)."""
    return math.cos(math.pi * t / 2)


def linear_to_zero(t: float) -> float:
    """1 - t."""
    return 1 - t


# ------------------------------------------------------------------------------ Zhang et al.

ZHANG_BATCHES = (64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)  # sequences of 512 tokens
ZHANG_LENGTH = 512
# Model: optimizer steps at a batch of 256, and the steps to the target loss at ZHANG_BATCHES. From
# `plots/chinchilla.ipynb` of the authors' repository.
ZHANG_STEPS: dict[str, tuple[int, Sequence[float]]] = {
    "85M": (13_282, (46000, 23000, 13282, 7000, 3840, 2528, 1917, 1600, 1600)),
    "151M": (23_438, (96000, 49000, 24000, 12000, 7128, 4350, 2940, 2400, 2300)),
    "302M": (46_875, (196000, 90000, 46000, 23400, 13300, 7224, 4980, 3400, 2879)),
    "604M": (93_750, (311000, 166000, 81000, 37440, 21320, 11400, 7199, 4700, 3800)),
    "1.2B": (187_500, (642000, 331000, 176000, 94000, 46500, 25000, 15360, 8900, 6500)),
}


def fit_steps(steps: Sequence[float]) -> tuple[float, float]:
    """(a, b) of Y(B) = a + b/B by least squares on log Y: Gauss-Newton."""
    inverse, wanted = 1 / np.array(ZHANG_BATCHES, dtype=float), np.log(np.array(steps, dtype=float))
    a, b = min(steps) / 2, max(steps) * ZHANG_BATCHES[0]
    for _ in range(200):
        model = a + b * inverse
        jacobian = np.stack([a / model, b * inverse / model], axis=1)  # by log a, log b
        change, *_ = np.linalg.lstsq(jacobian, wanted - np.log(model), rcond=None)
        a, b = a * math.exp(change[0]), b * math.exp(change[1])
    return a, b


def critical_batch_size(a: float, b: float, *, optimal: int = 256, excess: float = 1.2) -> float:
    """B* where a + b/B* is 20 % above linear scaling from 256: the root of b - 5aB + 5a 1.2 256."""
    assert math.isclose(excess, 1.2)
    return excess * optimal + b / (5 * a)


def fit_power_law(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """(coefficient, exponent) by least squares on the logarithms."""
    exponent, intercept = np.polyfit(np.log(x), np.log(y), 1)
    return math.exp(intercept), float(exponent)


def zhang_points() -> Iterator[tuple[float, float]]:
    """(tokens trained on, critical batch in sequences) of each model."""
    for goal, steps in ZHANG_STEPS.values():
        yield goal * 256 * ZHANG_LENGTH, critical_batch_size(*fit_steps(steps))


# -------------------------------------------------------------------------------- co-scaling


def adascale_gain(ratio: float, *, noise_trace: float, grad_sq_norm: float, b0: int) -> float:
    """r = E[sigma^2 + mu^2] / E[sigma^2/S + mu^2]: sigma^2 of a gradient at B0, S = B/B0."""
    sigma_sq = noise_trace / b0
    return (sigma_sq + grad_sq_norm) / (sigma_sq / ratio + grad_sq_norm)


def beta2_by_half_life(beta2: float, ratio: float, *, tokens_per_step: float = 1.0) -> float:
    """beta2' = 0.5^(tokens per step / t2), with the half-life t2 that beta2 has at B0 (Marek)."""
    half_life = tokens_per_step * math.log(0.5) / math.log(beta2)
    return 0.5 ** (ratio * tokens_per_step / half_life)


def timescale_in_samples(*, learning_rate: float, weight_decay: float, batch: float) -> float:
    """tau = B / (eta lambda): samples that AdamW's weights are an average of (Wang & Aitchison)."""
    return batch / (learning_rate * weight_decay)


# ------------------------------------------------------------------------------- bad input

FORM = re.compile(r"[^()]+\(.*\)[^()]* must .+, because .+; .+\.")


def refusal(make: Callable[[], Any]) -> str:
    """The one line that bad input gives: name (value) must ..., because ...; what to do."""
    with pytest.raises(ValueError, match="must") as caught:
        make()
    message = str(caught.value)
    assert FORM.fullmatch(message), message  # a line break does not match either
    return message
