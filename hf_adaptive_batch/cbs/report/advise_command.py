"""`hf-adaptive-batch cbs advise`: a range of batch sizes, its sources and where they disagree."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ...apply.plan import BatchPlan
from ..advice import Advice, advise
from ..published import MERRILL_PLATEAU_TOKENS, Kind
from .fit_laws import schedule_of
from .fit_report import report_of
from .fit_sentences import definition
from .quantities import compact, quantity
from .sweep_input import sweeps_of


_KINDS = {Kind.OPTIMAL: "optimum", Kind.CRITICAL: "critical"}


def advise_batch_size(arguments: Sequence[str]) -> int:
    """Print a range of batch sizes, and everything that it was made of.

    Args:
        arguments: Flags, as on the command line.

    Returns:
        The exit status, 0.
    """
    words = _parser().parse_args(arguments)
    parameters = quantity("parameters", words.parameters)
    tokens = quantity("tokens", words.tokens)
    own = None if words.measured is None else measured_at(words.measured, tokens)
    advice = advise(
        parameters=parameters,
        tokens=tokens,
        tokens_per_sequence=int(quantity("tokens_per_sequence", words.tokens_per_sequence)),
        data_parallel_size=words.data_parallel_size,
        micro_batch_size=words.micro_batch_size,
        max_micro_batch_size=words.max_micro_batch_size,
        measured_tokens=None if own is None else own.tokens,
    )
    show(advice, own, Console(highlight=False))
    return 0


@dataclass(frozen=True, kw_only=True)
class Measured:
    """The user's own critical batch size at the tokens that were asked about.

    Attributes:
        tokens: In tokens.
        sentences: How it was come by.
    """

    tokens: float
    sentences: tuple[str, ...]


def measured_at(file: str, tokens: float) -> Measured:
    """The law of measured sweeps, as a schedule follows it, at so many tokens.

    Args:
        file: Of sweeps, or `published`.
        tokens: D.

    Returns:
        The critical batch size.

    Raises:
        ValueError: If the sweeps have no law in tokens.
    """
    report = report_of(sweeps_of([file]))
    law, note = schedule_of(report.sweeps)
    if law is None:
        raise ValueError(
            f"measured ({file}) must give a critical batch size in tokens, because it is compared "
            f"with those of the papers, but: {note.removeprefix('No schedule: ')} See what cbs fit "
            "says of it, or leave the flag out."
        )
    budgets = [each.sweep.tokens for each in report.sweeps if each.is_finite and each.sweep.tokens]
    beyond = max(tokens / max(budgets), min(budgets) / tokens)
    sentences = [
        f"Your own: {law.coefficient:.4g} D^{law.exponent:.3f} tokens. {note}",
        definition(report),
    ]
    if beyond > 1:
        sentences.append(
            f"Your own is extrapolated: D is {compact(beyond)} times outside its range."
        )
    return Measured(tokens=law.coefficient * tokens**law.exponent, sentences=tuple(sentences))


def sentences_of(advice: Advice) -> list[str]:
    """What a reader of the advice has to know.

    Args:
        advice: The advice.

    Returns:
        How far the sources disagree, notes, and what is not known.
    """
    sentences = [
        f"The {'optima' if kind is Kind.OPTIMAL else 'critical sizes'} differ by a factor of "
        f"{factor:.3g} between sources."
        for kind, factor in advice.disagreement.items()
        if factor > 1
    ]
    sentences += advice.notes
    return [
        *sentences,
        "An optimum and a critical size are two quantities: sizes between them cost a little loss "
        "or tokens, and save steps.",
        f"Merrill et al. 2025 (arXiv 2505.23971) saw a plateau of about "
        f"{compact(MERRILL_PLATEAU_TOKENS)} tokens over most of training, for 1B and 7B models by "
        "branched runs. It is a third definition, and not in the range.",
    ]


UNKNOWN = (
    "Your data, optimizer and learning rate: the papers tuned theirs, and a size without its "
    "learning rate is no optimum.",
    "Whether it is faster on your hardware: time a step of each plan.",
    "The start of training, when the critical size is small. Start below the range, and grow: "
    "--batch_schedule cbs_law, norm_test or stage_wise.",
    "Coefficients from memory were not checked against their papers; see the evidence of each.",
)


def show(advice: Advice, own: Measured | None, console: Console) -> None:
    """Print the advice.

    Args:
        advice: The advice.
        own: Where the user's own measurement is from; None without one.
        console: Where to.
    """
    per = advice.tokens_per_sequence
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("source", overflow="fold", max_width=44, ratio=1)
    for title in ("kind", "tokens", "sequences"):
        table.add_column(title, justify="right", no_wrap=True)
    for each in advice.opinions:
        evidence = "measured by you" if each.evidence is None else str(each.evidence)
        lines = [each.formula, each.definition, f"evidence: {evidence}\n"]
        source = Text(each.source) + Text("\n" + "\n".join(filter(None, lines)), style="dim")
        sizes = (compact(each.tokens), compact(each.tokens / per))
        table.add_row(source, _KINDS[each.kind], *sizes)
    _print(
        console,
        f"\nBatch sizes for N = {compact(advice.parameters)} parameters, "
        f"D = {compact(advice.tokens)} tokens, {compact(per)} tokens a sequence\n",
    )
    console.print(table)
    for kind, word in _KINDS.items():
        console.print(f"{word}: {kind.partition(': ')[2]}", style="dim", markup=False)
    _title(console, "Range")
    _print(console, _range(advice, own is not None))
    _title(console, "Plans (micro-batch x accumulation x ranks)")
    for plan in dict.fromkeys(advice.plans):
        _print(console, _plan(plan, per))
    _title(console, "What to know")
    for sentence in [*(own.sentences if own else ()), *sentences_of(advice)]:
        _print(console, f"- {sentence}")
    _title(console, "What this does not know")
    for sentence in UNKNOWN:
        _print(console, f"- {sentence}")


def _range(advice: Advice, measured: bool) -> str:
    per, (low, high) = advice.tokens_per_sequence, advice.tokens_range
    critical = "your own critical size" if measured else "the smallest critical size"
    ends = ["the smallest optimum", critical]
    optima = [each.tokens for each in advice.opinions if each.kind is Kind.OPTIMAL]
    if min(optima) > low:  # the sources contradict each other, and a note says so
        ends.reverse()
    return (
        f"{compact(low)} to {compact(high)} tokens, {compact(low / per)} to {compact(high / per)} "
        f"sequences: from {ends[0]} to {ends[1]}."
    )


def _plan(plan: BatchPlan, per: float) -> str:
    size = plan.global_batch_size
    return (
        f"{plan.micro_batch_size} x {plan.accumulation_steps} x {plan.data_parallel_size} = "
        f"{size:,} sequences, {compact(size * per)} tokens: --per_device_train_batch_size "
        f"{plan.micro_batch_size} --gradient_accumulation_steps {plan.accumulation_steps}"
    )


def _title(console: Console, text: str) -> None:
    console.print(f"\n{text}", style="bold", markup=False)


def _print(console: Console, text: str) -> None:
    console.print(text, markup=False)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hf-adaptive-batch cbs advise",
        description="A range of batch sizes for a model, its data and the hardware, from published "
        "laws and your own measurement, with their sources and disagreements. Numbers may be "
        "written 1.2B, 300M or 24e9.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--parameters", metavar="N", required=True, help="of the model, without embeddings")
    add("--tokens", metavar="D", required=True, help="to train on")
    add("--tokens_per_sequence", metavar="T", required=True, help="of a sample")
    add("--data_parallel_size", metavar="R", type=int, default=1, help="ranks that see other data")
    add("--micro_batch_size", metavar="m", type=int, default=1, help="smallest one, in samples")
    add("--max_micro_batch_size", metavar="M", type=int, help="largest that fits; m if unset")
    add("--measured", metavar="FILE", help="your sweeps: a file or folder as for cbs fit")
    return parser
