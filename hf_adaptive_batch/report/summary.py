"""What a finished run says of itself in the terminal."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True, kw_only=True)
class RunSummary:
    """The outcome of a pretraining run.

    Attributes:
        validation_loss: Mean loss in nats per predicted token.
        tokens_per_byte: Tokens of the validation text per UTF-8 byte of it.
        samples: Samples trained on.
        tokens: Tokens trained on.
        steps: Optimizer steps.
        constant_steps: Steps that the initial batch size would have taken for the same samples.
        skipped_steps: Steps whose loss was not finite.
        seconds: Training time.
        trajectory: (samples seen, global batch size) at the start and at each change.
    """

    validation_loss: float
    tokens_per_byte: float
    samples: int
    tokens: int
    steps: int
    constant_steps: int
    skipped_steps: int
    seconds: float
    trajectory: Sequence[tuple[int, int]]

    @property
    def perplexity(self) -> float:
        """Per token."""
        return math.exp(min(self.validation_loss, 700.0))

    @property
    def bits_per_byte(self) -> float:
        """Validation loss in bits per UTF-8 byte of text: comparable across tokenizers."""
        return self.validation_loss / math.log(2) * self.tokens_per_byte

    def show(self, console: Console) -> None:
        """Print as a table of a few lines.

        Args:
            console: Where to.
        """
        saved = 1 - self.steps / max(self.constant_steps, 1)
        compared = f"({saved:.0%} fewer)" if saved > 0.005 else ""
        rows = [
            ("validation loss", f"{self.validation_loss:.4f} nats per token"),
            ("perplexity", f"{self.perplexity:.3f} per token"),
            ("bits per byte", f"{self.bits_per_byte:.4f}"),
            ("trained on", f"{self.samples:,} samples, {self.tokens:,} tokens"),
            ("optimizer steps", f"{self.steps:,}"),
            ("at constant batch", f"{self.constant_steps:,} steps for the same samples {compared}"),
            ("batch size", path_text(self.trajectory)),
            ("time", f"{self.seconds:.0f} s"),
        ]
        if self.skipped_steps:
            rows.append(("skipped", f"{self.skipped_steps} steps with a loss that was not finite"))
        table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
        for name, value in rows:
            table.add_row(f"[bold]{name}[/bold]", value)
        console.print(table)


def path_text(sizes: Sequence[tuple[int, int]]) -> str:
    """The sizes in one line: all of them, or where they first had doubled since the last named.

    Args:
        sizes: (samples seen, global batch size) at the start and at each change.

    Returns:
        Such as "4 -> 8 at 76 -> 16 at 212 samples".
    """
    (_, first), *changes = sizes
    if not changes:
        return f"{first} samples throughout"
    named = [changes[0]]
    for at, size in changes[1:]:
        if len(changes) <= 6 or size >= 2 * named[-1][1] or size <= named[-1][1] / 2:
            named.append((at, size))
    if named[-1][1] != changes[-1][1]:
        named.append(changes[-1])
    steps = [f"{first}", *(f"{size} at {at:,}" for at, size in named)]
    count = f", in {len(changes)} changes" if len(named) < len(changes) else ""
    return f"{' -> '.join(steps)} samples{count}"


def trajectory(records: Mapping[str, Sequence[Any]]) -> list[tuple[int, int]]:
    """The batch sizes of a run, from its records.

    Args:
        records: Columns as `read_records` gives them.

    Returns:
        (samples seen, global batch size) at the start and at each change; empty without records.
    """
    if not records["step"]:
        return []
    path = [(0, records["global_batch_size"][0])]
    for seen, size in zip(records["samples_seen"], records["next_global_batch_size"], strict=True):
        if size != path[-1][1]:
            path.append((seen, size))
    return path
