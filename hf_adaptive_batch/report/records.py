"""One JSON line per decision, measured and decided and why; and one per evaluation."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


RECORDS_FILE = "adaptive_batch.jsonl"
EVALUATIONS_FILE = "evaluations.jsonl"
SCHEMA_VERSION = 1

FIELDS = (
    "version",  # SCHEMA_VERSION
    "step",  # optimizer step after which was decided, from 1
    "epoch",
    "samples_seen",  # this step's included
    "tokens_seen",
    "loss",  # of this step, as the Trainer reports it
    "learning_rate",  # of this step, first parameter group
    "global_batch_size",  # B of the plan in force, samples
    "micro_batch_size",  # m, samples
    "accumulation_steps",  # n
    "data_parallel_size",  # R
    "step_samples",  # samples of this step; fewer than B at the end of an epoch
    "workers",  # J, small batches measured
    "small_sq_norm",  # S, this step
    "big_sq_norm",  # L, this step
    "noise_trace",  # tr(Sigma), averaged over measured steps
    "grad_sq_norm",  # ||G||^2, averaged over measured steps
    "noise_scale",  # their ratio in samples; null while not measurable
    "noise_scale_error",  # its standard error in samples
    "norm_test",  # (Var / B) / ||.||^2, what is tested; null while not measurable
    "threshold",  # eta^2, or 1 / noise_scale_factor
    "next_global_batch_size",  # B of the plan that the decision led to
    "reason",
)

EVALUATION_FIELDS = (
    "version",  # SCHEMA_VERSION
    "step",  # optimizer steps done
    "samples_seen",
    "tokens_seen",
    "seconds",  # of training, without evaluating and saving
    "global_batch_size",  # B of the plan in force, samples
    "metrics",  # name -> number, as the Trainer logs them; none where a checkpoint was saved
)


class RecordWriter:
    """Appends lines to a file in the run's folder, each flushed at once.

    A fresh run keeps the file of an earlier one under a numbered name; a resumed run drops the
    lines after the step that it resumes from, because it will write them again.

    Args:
        folder: The run's output folder; made when the first record is written.
        resume_step: Optimizer steps done in the checkpoint that is resumed; None for a fresh run.
        name: The file's.
        fields: What a line holds.

    Attributes:
        last: The last line that a resumed run goes on after.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        resume_step: int | None = None,
        name: str = RECORDS_FILE,
        fields: tuple[str, ...] = FIELDS,
    ) -> None:
        self.path, self.fields = Path(folder) / name, fields
        self.last: dict[str, Any] = {}
        if not self.path.exists():
            return
        if resume_step is None:
            number = 1
            while (kept := self.path.with_name(f"{self.path.stem}-{number}.jsonl")).exists():
                number += 1
            self.path.rename(kept)
        else:
            lines = self.path.read_text(encoding="utf-8").splitlines()
            kept_lines = [line for line in lines if _step_of(line) <= resume_step]
            temporary = self.path.with_suffix(".tmp")
            temporary.write_text("".join(f"{line}\n" for line in kept_lines), encoding="utf-8")
            temporary.replace(self.path)
            if kept_lines:
                self.last = json.loads(kept_lines[-1])

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one record.

        Args:
            record: Values by field name; a field that is missing, NaN or infinite is written as
                null.

        Raises:
            ValueError: If a name is not one of the file's fields.
        """
        unknown = set(record) - set(self.fields)
        if unknown:
            raise ValueError(f"record fields ({sorted(unknown)}) must be among {self.fields}.")
        values = {name: without_nan(record.get(name)) for name in self.fields}
        values["version"] = SCHEMA_VERSION
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")


def read_records(path: str | os.PathLike[str]) -> dict[str, list[Any]]:
    """Read a run's records as columns.

    Args:
        path: The records file, or the folder that holds it.

    Returns:
        Field name -> one value per decision, in order; None where nothing was measurable. A last
        line that was cut off by a kill is left out.
    """
    records = _read_lines(Path(path), RECORDS_FILE)
    return {name: [record.get(name) for record in records] for name in FIELDS}


def read_evaluations(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Read a run's evaluations.

    Args:
        path: The evaluations file, or the folder that holds it.

    Returns:
        One mapping per evaluation, in order, with the names of `EVALUATION_FIELDS`; none where the
        folder has no such file. A last line that was cut off by a kill is left out.
    """
    path = Path(path)
    if path.is_dir() and not (path / EVALUATIONS_FILE).exists():
        return []
    return [line for line in _read_lines(path, EVALUATIONS_FILE) if line["metrics"]]


def _read_lines(path: Path, name: str) -> list[dict[str, Any]]:
    """The file's lines; another schema version is a ValueError."""
    if path.is_dir():
        path = path / name
    records: list[dict[str, Any]] = []
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, start=1):
        if number == len(lines) and not _is_whole(line):
            break
        record = json.loads(line)
        if record.get("version") != SCHEMA_VERSION:
            raise ValueError(
                f"version ({record.get('version')}) in line {number} of {path} must be "
                f"{SCHEMA_VERSION}, because fields are read by name; read it with the release "
                "that wrote it."
            )
        records.append(record)
    return records


def _step_of(line: str) -> float:
    """The step of a line; after all others for one that was cut off."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


def _is_whole(line: str) -> bool:
    try:
        json.loads(line)
    except json.JSONDecodeError:
        return False
    return True


def without_nan(value: Any) -> Any:
    """A value as JSON can say it, which has no NaN and no infinity.

    Args:
        value: Numbers, texts, and lists and mappings of such.

    Returns:
        The same with None in the place of numbers that are not finite.
    """
    if isinstance(value, Mapping):
        return {str(name): without_nan(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
