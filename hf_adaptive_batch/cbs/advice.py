"""What batch size to train with: the published laws, your own measurement, and your hardware."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..apply.plan import BatchPlan
from .intervals import Interval, check_positive
from .published import LAWS, Evidence, Kind, PublishedLaw, law_tokens


_FEWER_RANKS = (
    "more ranks than the batch can use. Spread the model over some of them (tensor, context or "
    "pipeline parallelism; fully sharded ranks see different data). "
)


@dataclass(frozen=True, kw_only=True)
class Opinion:
    """What one source says.

    Attributes:
        source: Who, and where.
        formula: As a reader would write it.
        kind: An optimum or a critical size.
        definition: By which it was chosen.
        evidence: How well it is confirmed; None for the user's own measurement.
        tokens: Batch size in tokens.
    """

    source: str
    formula: str
    kind: Kind
    definition: str
    evidence: Evidence | None
    tokens: float


@dataclass(frozen=True, kw_only=True)
class Advice:
    """A range of batch sizes, and everything that it was made of.

    Attributes:
        parameters: N.
        tokens: D, to train on.
        tokens_per_sequence: Of a sample.
        opinions: All sources, the user's own first.
        tokens_range: From the smallest optimum to the smallest critical size, in tokens.
        plans: The smallest and the largest feasible layout in the range; where there is none, twice
            the nearest below it, or the least that the hardware can do.
        disagreement: By kind, how many times the largest opinion is the smallest.
        notes: What a reader has to know.
    """

    parameters: float
    tokens: float
    tokens_per_sequence: float
    opinions: tuple[Opinion, ...]
    tokens_range: Interval
    plans: tuple[BatchPlan, BatchPlan]
    disagreement: dict[Kind, float]
    notes: tuple[str, ...]


def advise(
    *,
    parameters: float,
    tokens: float,
    tokens_per_sequence: int,
    data_parallel_size: int = 1,
    micro_batch_size: int = 1,
    max_micro_batch_size: int | None = None,
    measured_tokens: float | None = None,
    laws: Sequence[PublishedLaw] = LAWS,
) -> Advice:
    """Turn a model, its data and its hardware into a range of batch sizes.

    The range goes from the smallest optimum to the smallest critical batch size of all sources:
    below it steps are wasted, above it somebody's measurements say that tokens are. Your own
    critical batch size replaces those of the papers; theirs stay listed.

    Args:
        parameters: N, without embeddings where you know it.
        tokens: D, to train on.
        tokens_per_sequence: Of a sample.
        data_parallel_size: Ranks that see different data.
        micro_batch_size: Smallest micro-batch, in samples.
        max_micro_batch_size: Largest micro-batch that fits on a device; None keeps the smallest.
        measured_tokens: Your own critical batch size at D, in tokens, such as of a fitted law.
        laws: Published ones to ask.

    Returns:
        The advice.

    Raises:
        ValueError: If a number is not positive, micro-batches do not fit together, or there is no
            optimum or no critical size to ask.
    """
    given = {"parameters": parameters, "tokens": tokens, "tokens_per_sequence": tokens_per_sequence}
    for name, value in given.items():
        check_positive(name, [value], "laws are functions of it")
    opinions = [
        Opinion(
            source=f"{law.name}, {law.source}",
            formula=law.formula,
            kind=law.kind,
            definition=law.definition,
            evidence=law.evidence,
            tokens=law_tokens(law, parameters, tokens),
        )
        for law in laws
    ]
    if measured_tokens is not None:
        check_positive("measured_tokens", [measured_tokens], "it is a batch size")
        own = Opinion(
            source="your own measurement",
            formula="",
            kind=Kind.CRITICAL,
            definition="as you measured it",
            evidence=None,
            tokens=measured_tokens,
        )
        opinions.insert(0, own)
    by_kind = {kind: sorted(o.tokens for o in opinions if o.kind is kind) for kind in Kind}
    for kind, sizes in by_kind.items():
        if not sizes:
            raise ValueError(
                f"laws ({len(laws)}) must hold one of the {kind.name.lower()} batch size, because "
                "the range goes from the smallest optimum to a critical size; add one."
            )
    critical = by_kind[Kind.CRITICAL][0] if measured_tokens is None else measured_tokens
    optimal = by_kind[Kind.OPTIMAL][0]
    notes: list[str] = []
    if optimal > critical:
        notes.append(
            "The smallest optimum lies above the critical size: the sources contradict each other "
            "here, and the range is between the two."
        )
    found = Interval(min(optimal, critical), max(optimal, critical))

    plans = _plans(
        Interval(*(end / tokens_per_sequence for end in found)),
        micro_batch_size=micro_batch_size,
        max_micro_batch_size=max_micro_batch_size,
        data_parallel_size=data_parallel_size,
    )
    smallest, largest = [plan.global_batch_size * tokens_per_sequence for plan in plans]
    if smallest > found.high:
        notes.append(
            f"{data_parallel_size} x {micro_batch_size} sequences (ranks x micro-batch), the least "
            f"of a step, are {smallest:,} tokens, which is above the range: "
            + (_FEWER_RANKS if data_parallel_size > 1 else "")
            + "Lower the micro-batch or the tokens of a sequence, or accept that tokens are wasted."
        )
    elif largest < found.low:
        notes.append(
            f"No multiple of {data_parallel_size} x {micro_batch_size} sequences (ranks x "
            "micro-batch) lies in the range: the plan is the nearest below it."
        )
    return Advice(
        parameters=parameters,
        tokens=tokens,
        tokens_per_sequence=tokens_per_sequence,
        opinions=tuple(opinions),
        tokens_range=found,
        plans=plans,
        disagreement={kind: sizes[-1] / sizes[0] for kind, sizes in by_kind.items() if sizes},
        notes=tuple(notes),
    )


def _plans(
    wanted: Interval,
    *,
    micro_batch_size: int,
    max_micro_batch_size: int | None,
    data_parallel_size: int,
) -> tuple[BatchPlan, BatchPlan]:
    """The smallest and the largest layout of so many sequences; or the nearest below, twice."""
    first = BatchPlan(micro_batch_size=micro_batch_size, data_parallel_size=data_parallel_size)
    if first.global_batch_size > wanted.high:
        return first, first
    # Large micro-batches are coarse: where no layout of theirs will do, the smallest are taken.
    for most in (max_micro_batch_size, micro_batch_size):
        smallest, largest = [
            BatchPlan.nearest(
                max(math.ceil(size), 1),
                micro_batch_size=micro_batch_size,
                max_micro_batch_size=most,
                max_global_batch_size=math.floor(wanted.high),
                data_parallel_size=data_parallel_size,
            )
            for size in wanted
        ]
        if largest.global_batch_size >= wanted.low:
            break
    return smallest, largest
