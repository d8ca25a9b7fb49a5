"""What a run left behind, read back: its decisions and its evaluations."""

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .records import EVALUATIONS_FILE, FIELDS, RECORDS_FILE, read_evaluations, read_records


COMPARISON_FILE = "compare.lock"  # in the folder of a comparison, which has a report of its own


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """One evaluation of a run.

    Attributes:
        step: Optimizer steps done.
        samples_seen: Samples trained on.
        tokens_seen: Tokens trained on; 0 for data without tokens.
        seconds: Of training, without evaluating and saving; None where nobody took the time.
        loss: Validation loss; NaN where it was not finite.
        bits_per_byte: Of the validation text; None where nobody measured it.
    """

    step: int
    samples_seen: int
    tokens_seen: int
    seconds: float | None
    loss: float
    bits_per_byte: float | None = None


@dataclass(frozen=True, kw_only=True)
class RunHistory:
    """A run, finished or not, as its files tell it.

    Attributes:
        name: What the reader calls it.
        records: Columns as `read_records` gives them, possibly all empty.
        evaluations: In order.
    """

    name: str
    records: Mapping[str, Sequence[Any]]
    evaluations: Sequence[Evaluation]

    @property
    def final_loss(self) -> float | None:
        """Validation loss of the last evaluation; NaN if that diverged, None without any."""
        return self.evaluations[-1].loss if self.evaluations else None

    @property
    def bits_per_byte(self) -> float | None:
        """Of the last evaluation; None without any, and where nobody measured it."""
        return self.evaluations[-1].bits_per_byte if self.evaluations else None

    @property
    def steps(self) -> int:
        """Optimizer steps, as far as the files know."""
        return int(self._largest("step", (each.step for each in self.evaluations)) or 0)

    @property
    def samples(self) -> int:
        """Samples trained on."""
        seen = (each.samples_seen for each in self.evaluations)
        return int(self._largest("samples_seen", seen) or 0)

    @property
    def tokens(self) -> int:
        """Tokens trained on; 0 for data without tokens."""
        return int(
            self._largest("tokens_seen", (each.tokens_seen for each in self.evaluations)) or 0
        )

    @property
    def seconds(self) -> float | None:
        """Seconds of training; None where nobody took the time."""
        return self._largest("seconds", (each.seconds for each in self.evaluations))

    @property
    def average_batch_size(self) -> float | None:
        """Samples a step; None before the first."""
        return self.samples / self.steps if self.steps else None

    def steps_to(self, target_loss: float) -> float | None:
        """Steps until the validation loss is at the target for the first time.

        Args:
            target_loss: In the unit of the losses.

        Returns:
            Interpolated linearly between the two evaluations around the crossing; the step of the
            evaluation itself where the one before is missing or was not finite. None if the target
            was never reached.
        """
        before: Evaluation | None = None
        for each in self.evaluations:
            if each.loss <= target_loss:  # false for NaN
                if before is None or not math.isfinite(before.loss):
                    return float(each.step)
                share = (before.loss - target_loss) / (before.loss - each.loss)
                return before.step + share * (each.step - before.step)
            before = each
        return None

    def _largest(self, name: str, others: Iterable[float | None]) -> float | None:
        known = [value for value in (*self.records.get(name, ()), *others) if value is not None]
        return max(known, default=None)


def read_history(folder: str | os.PathLike[str], name: str | None = None) -> RunHistory:
    """Read what a run wrote into its folder so far.

    Args:
        folder: The run's output folder.
        name: What the reader calls the run; the folder's name by default.

    Returns:
        Its history. Evaluations that report no `eval_loss` are left out.

    Raises:
        ValueError: If the folder holds neither decisions nor evaluations.
    """
    path = Path(folder)
    if not is_run(path):
        raise ValueError(
            f"folder ({path}) must hold {RECORDS_FILE} or {EVALUATIONS_FILE}, because a report is "
            "made of them; name the output folder of a run that has begun."
        )
    has_records = (path / RECORDS_FILE).is_file()
    evaluations = [
        Evaluation(
            step=line["step"],
            samples_seen=line["samples_seen"],
            tokens_seen=line["tokens_seen"] or 0,
            seconds=line.get("seconds"),
            loss=_number(line["metrics"]["eval_loss"]),
            bits_per_byte=line["metrics"].get("eval_bits_per_byte"),
        )
        for line in read_evaluations(path)
        if "eval_loss" in line["metrics"]
    ]
    return RunHistory(
        name=name if name is not None else path.resolve().name,
        records=read_records(path) if has_records else {field: [] for field in FIELDS},
        evaluations=evaluations,
    )


def is_run(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder is the output folder of a run that wrote something.

    Args:
        folder: Any path.

    Returns:
        True if one of the two files is in it.
    """
    return any((Path(folder) / name).is_file() for name in (RECORDS_FILE, EVALUATIONS_FILE))


def _number(value: Any) -> float:
    """A number that was not finite is null in the file."""
    return math.nan if value is None else float(value)
