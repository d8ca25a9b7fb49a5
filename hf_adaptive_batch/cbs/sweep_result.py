"""What a sweep over batch sizes measured, as a value and as a file."""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from ..report.records import without_nan
from .critical import OVERHEAD, REFERENCE, CriticalBatchSize, critical_batch_size
from .steps_to_target import StepsToTargetFit, fit_steps_to_target


_VERSION = 1
_COLUMNS = ("batch_size", "steps", "trained_steps", "learning_rate", "seed", "noise_scale")


@dataclass(frozen=True, kw_only=True)
class SweepRun:
    """One training run of a sweep.

    Attributes:
        batch_size: In sequences.
        steps: Optimizer steps to the target loss; None if it was not reached.
        trained_steps: Optimizer steps that it was trained for.
        learning_rate: Its peak; None where it is not known.
        seed: Of weights and data; None where it is not known.
        noise_scale: `tr(Sigma) / |G|^2` in sequences, averaged at its end; None if not measured.
        chosen: Whether it has the best learning rate of its batch size, and so is fitted.
    """

    batch_size: float
    steps: float | None
    trained_steps: float | None = None
    learning_rate: float | None = None
    seed: int | None = None
    noise_scale: float | None = None
    chosen: bool = True


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """The runs of one model on one set of data to one target loss.

    Attributes:
        name: What the reader calls it.
        runs: In any order.
        target_loss: Validation loss that was to be reached.
        tokens_per_sequence: None if it is not known.
        parameters: N of the model; None if it is not known.
        tokens: D, what the reference batch took to the target; None if it is not known.
        overhead: Of the definition.
        reference: Of the definition, in sequences.
        setup: How it was made, in words.
    """

    name: str
    runs: Sequence[SweepRun]
    target_loss: float | None = None
    tokens_per_sequence: float | None = None
    parameters: float | None = None
    tokens: float | None = None
    overhead: float = OVERHEAD
    reference: float = REFERENCE
    setup: Mapping[str, Any] = field(default_factory=dict)

    def fit(self, confidence: float = 0.95) -> StepsToTargetFit:
        """Fit steps to the target of the chosen runs: of several at a batch size, their mean.

        What is off by the learning rate of a batch size is off in all of its runs. Taken for
        independent, they would make intervals too narrow: of 95 %, three seeds that differ by 1 %,
        with learning rates that cost 5 %, leave 78 %.

        Args:
            confidence: Of the intervals.

        Returns:
            The fit.

        Raises:
            ValueError: If fewer than three batch sizes reached the target, with the sweep's name.
        """
        reached: dict[float, list[float]] = {}
        bounds: list[SweepRun] = []
        for run in self.runs:
            if not run.chosen:
                continue
            if run.steps is None or math.isnan(run.steps) or run.steps == math.inf:
                bounds.append(run)
            else:
                reached.setdefault(run.batch_size, []).append(run.steps)
        try:
            return fit_steps_to_target(
                [*reached, *(run.batch_size for run in bounds)],
                [*map(_geometric_mean, reached.values()), *(None for _ in bounds)],
                trained_steps=[*(None for _ in reached), *(run.trained_steps for run in bounds)],
                tokens_per_sequence=self.tokens_per_sequence,
                confidence=confidence,
            )
        except ValueError as error:
            raise ValueError(f"In {self.name}: {error}") from error

    def critical_batch_size(
        self, overhead: float | None = None, reference: float | None = None
    ) -> CriticalBatchSize:
        """The critical batch size, by the sweep's definition if no other is given.

        Args:
            overhead: Share of steps above linear scaling.
            reference: In sequences.

        Returns:
            The critical batch size.
        """
        return critical_batch_size(
            self.fit(),
            self.overhead if overhead is None else overhead,
            self.reference if reference is None else reference,
        )

    def noise_scales(self) -> dict[float, float]:
        """Batch size -> geometric mean of the noise scales of its chosen runs, in sequences."""
        logs: dict[float, list[float]] = {}
        for run in self.runs:
            if run.chosen and run.noise_scale is not None and run.noise_scale > 0:
                logs.setdefault(run.batch_size, []).append(math.log(run.noise_scale))
        return {
            size: math.exp(math.fsum(values) / len(values)) for size, values in sorted(logs.items())
        }


def _geometric_mean(steps: Sequence[float]) -> float:
    """Of one number itself; of some that have no logarithm one of these, to be refused."""
    if len(steps) == 1 or min(steps) <= 0:
        return min(steps)
    return math.exp(math.fsum(map(math.log, steps)) / len(steps))


def write_sweeps(sweeps: Sequence[Sweep], path: str | os.PathLike[str]) -> Path:
    """Write sweeps as JSON, whole or not at all.

    Args:
        sweeps: To write.
        path: Of the file.

    Returns:
        The path.
    """
    file = Path(path)
    values = {"version": _VERSION, "sweeps": [asdict(sweep) for sweep in sweeps]}
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f"{file.name}.tmp")
    text = json.dumps(without_nan(values), indent=1, default=_plain)
    temporary.write_text(text + "\n", encoding="utf-8")
    temporary.replace(file)
    return file


def _plain(value: Any) -> Any:
    """A number of NumPy as Python's; of anything else, its text."""
    return value.item() if hasattr(value, "item") else str(value)


def read_sweeps(path: str | os.PathLike[str]) -> list[Sweep]:
    """Read sweeps.

    Args:
        path: A JSON file of `write_sweeps`, a folder with its `sweep.json`, or a CSV file of one
            sweep with the columns `batch_size` and `steps`, an empty cell where the target was not
            reached, and if you have them `trained_steps`, `learning_rate`, `seed`, `noise_scale`.
            Of several learning rates at a batch size, the one with the fewest steps is fitted: of
            those that reached the target most often, by the geometric mean.

    Returns:
        The sweeps.

    Raises:
        ValueError: If there is no such file, or it holds something else.
    """
    file = Path(path)
    if file.is_dir():
        file /= "sweep.json"
    try:
        text = file.read_text(encoding="utf-8-sig")
        if file.suffix.lower() == ".csv":
            return [_of_csv(text, file.stem)]
        values = json.loads(text)
        if values["version"] != _VERSION:
            raise ValueError(f"version {values['version']} is not {_VERSION}, of this release")
        return [_of_json(each) for each in values["sweeps"]]
    except OSError as error:
        raise ValueError(
            f"FILE ({path}) must be one that can be read, because the measured steps are in it, "
            f"but: {error.strerror}; check the path."
        ) from error
    except (ValueError, TypeError, KeyError, csv.Error) as error:
        raise ValueError(
            f"FILE ({path}) must be the JSON of `cbs measure`, or CSV with the columns batch_size "
            f"and steps, because these are fitted, but: {type(error).__name__}: {error}; mend it."
        ) from error


def _of_json(values: Mapping[str, Any]) -> Sweep:
    known = {each.name for each in fields(Sweep)}
    unknown = set(values) - known
    if unknown:
        raise ValueError(f"unknown names {sorted(unknown)}")
    for name, kind, what in (("name", str, "text"), ("runs", list, "list"), ("setup", dict, "map")):
        if name in values and not isinstance(values[name], kind):
            raise ValueError(f"{name} is {values[name]!r}, and no {what}")
    _check_numbers(values, ("target_loss", "tokens_per_sequence", "parameters", "tokens"))
    given = {name: value for name, value in values.items() if name in ("overhead", "reference")}
    _check_numbers(given, tuple(given), known=True)
    runs = tuple(SweepRun(**run) for run in values["runs"])
    for run in runs:
        _check_numbers(vars(run), _COLUMNS)
        _check_numbers(vars(run), ("batch_size",), known=True)
    return Sweep(**{**values, "runs": runs})


def _check_numbers(values: Mapping[str, Any], names: Sequence[str], *, known: bool = False) -> None:
    """Refuse what is no number, where it must be known also null."""
    for name in names:
        value = values.get(name)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number and (known or value is not None):
            raise ValueError(f"{name} is {value!r}, and no number")


def _of_csv(text: str, name: str) -> Sweep:
    reader = csv.DictReader(text.splitlines(), skipinitialspace=True)
    columns = [column.strip() for column in reader.fieldnames or ()]
    rows = list(reader)
    if not rows or not {"batch_size", "steps"} <= set(columns):
        raise ValueError("no row, or no such columns")
    unknown = set(columns) - set(_COLUMNS)
    if unknown:
        raise ValueError(f"unknown columns {sorted(unknown)}; known are {_COLUMNS}")
    runs = []
    for number, row in enumerate(rows, 1):
        if None in row:
            raise ValueError(f"row {number} has more cells than there are columns")
        cells: dict[str, Any] = {
            column: float(cell)
            for column, cell in zip(columns, row.values(), strict=True)
            if cell and cell.strip()
        }
        if "batch_size" not in cells:
            raise ValueError(f"row {number} has no batch_size")
        if (seed := cells.get("seed")) is not None:
            if not seed.is_integer():
                raise ValueError(f"seed is {seed:g} in row {number}, and no whole number")
            cells["seed"] = int(seed)
        runs.append(SweepRun(**{"steps": None, **cells}))
    return Sweep(name=name, runs=_with_chosen(runs))


def _with_chosen(runs: Sequence[SweepRun]) -> tuple[SweepRun, ...]:
    """The runs, of which those with the best learning rate of their batch size are chosen."""
    groups: dict[float, dict[float | None, list[SweepRun]]] = {}
    for run in runs:
        groups.setdefault(run.batch_size, {}).setdefault(run.learning_rate, []).append(run)
    best = {size: min(rates, key=lambda r: _cost(rates[r])) for size, rates in groups.items()}
    return tuple(replace(run, chosen=run.learning_rate == best[run.batch_size]) for run in runs)


def _cost(runs: Sequence[SweepRun]) -> tuple[float, float]:
    """The share that did not reach the target, and the mean log steps of the others."""
    logs = [math.log(run.steps) for run in runs if run.steps and 0 < run.steps < math.inf]
    return 1 - len(logs) / len(runs), math.fsum(logs) / len(logs) if logs else math.inf
