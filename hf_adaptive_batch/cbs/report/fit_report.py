"""What `cbs fit` found, as one value: the terminal, the page and the JSON say the same."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from ..critical import critical_batch_size
from ..intervals import check_positive, check_share
from ..scaling_law import ScalingLaw, Space
from ..schedule import ScheduleLaw
from ..sweep_result import Sweep
from .fit_laws import (
    VARIABLES,
    FittedSweep,
    LawPrediction,
    LawSensitivity,
    fit_laws,
    predictions_of,
    schedule_of,
    sensitivity_of,
)


@dataclass(frozen=True, kw_only=True)
class FitReport:
    """Fits, laws, and what could not be told.

    Attributes:
        sweeps: All that were given, fitted or not.
        confidence: Of all intervals.
        laws: Of the critical batch size in sequences, by "N", "D" and "ND", in millions.
        reasons: Sentences on laws and predictions that could not be told.
        predictions: Of the laws.
        sensitivity: Of the exponent to the definition; None without a law.
        schedule: In tokens; None if it is not known.
        schedule_note: Where its exponent is from, or why there is none.
    """

    sweeps: tuple[FittedSweep, ...]
    confidence: float
    laws: Mapping[str, ScalingLaw]
    reasons: tuple[str, ...]
    predictions: tuple[LawPrediction, ...]
    sensitivity: LawSensitivity | None
    schedule: ScheduleLaw | None
    schedule_note: str

    @property
    def is_empty(self) -> bool:
        """Whether no sweep could be fitted."""
        return all(each.fit is None for each in self.sweeps)

    @property
    def schedule_flags(self) -> list[str]:
        """The flags of the schedule, each with its value; empty if there is none."""
        arguments = {} if self.schedule is None else self.schedule.arguments
        return [f"--{name} {value}" for name, value in arguments.items()]

    def as_json(self) -> dict[str, Any]:
        """The numbers, for a file.

        Returns:
            Numbers, texts, and lists and mappings of such; numbers may be infinite.
        """
        sensitivity = self.sensitivity
        return {
            "version": 1,
            "confidence": self.confidence,
            "sweeps": [_sweep_as_json(each) for each in self.sweeps],
            "laws": {name: _law_as_json(law) for name, law in self.laws.items()},
            "predictions": [
                {"variable": each.variable, "at": each.at, **_values(each.prediction)}
                for each in self.predictions
            ],
            "sensitivity": None
            if sensitivity is None
            else {
                "variable": sensitivity.variable,
                "knee": None if sensitivity.knee is None else _law_as_json(sensitivity.knee),
                "rows": [
                    {
                        "overhead": row.overhead,
                        "reference": row.reference,
                        **_law_as_json(row.law),
                    }
                    for row in sensitivity.rows
                ],
            },
            "schedule": None if self.schedule is None else self.schedule.arguments,
            "schedule_note": self.schedule_note,
        }


def report_of(
    sweeps: Sequence[Sweep],
    *,
    overhead: float | None = None,
    reference: float | None = None,
    confidence: float = 0.95,
    space: Space = "log",
    predict_parameters: Sequence[float] = (),
    predict_tokens: Sequence[float] = (),
) -> FitReport:
    """Fit every sweep, and what they say together.

    Args:
        sweeps: At least one.
        overhead: Share of steps above linear scaling; None for that of each sweep.
        reference: In sequences; None for that of each sweep.
        confidence: Of all intervals.
        space: In which laws are fitted.
        predict_parameters: N at which the law is asked.
        predict_tokens: D at which the law is asked.

    Returns:
        The report. A sweep that cannot be fitted is in it with its error.
    """
    # What is wrong with the question is no property of a sweep.
    check_share("confidence", confidence, "it is the share of such intervals that hold the truth")
    for name, value in (("overhead", overhead), ("reference", reference)):
        if value is not None:
            check_positive(name, [value], "it defines the critical batch size")
    fitted = tuple(_fitted(sweep, overhead, reference, confidence) for sweep in sweeps)
    laws, reasons = fit_laws(fitted, confidence, space)
    predictions, missing = predictions_of(laws, predict_parameters, predict_tokens)
    schedule, note = schedule_of(fitted)
    return FitReport(
        sweeps=fitted,
        confidence=confidence,
        laws=laws,
        reasons=(*reasons, *missing),
        predictions=tuple(predictions),
        sensitivity=sensitivity_of(fitted, laws, space),
        schedule=schedule,
        schedule_note=note,
    )


def _fitted(
    sweep: Sweep, overhead: float | None, reference: float | None, confidence: float
) -> FittedSweep:
    share = sweep.overhead if overhead is None else overhead
    start = sweep.reference if reference is None else reference
    unfitted = FittedSweep(sweep=sweep, overhead=share, reference=start)
    try:
        fit = sweep.fit(confidence)
        return replace(unfitted, fit=fit, critical=critical_batch_size(fit, share, start))
    except ValueError as error:
        return replace(unfitted, error=str(error).removeprefix(f"In {sweep.name}: "))


def _sweep_as_json(each: FittedSweep) -> dict[str, Any]:
    fit, critical = each.fit, each.critical
    return {
        **asdict(each.sweep),
        "overhead": each.overhead,
        "reference": each.reference,
        "error": each.error,
        "fit": None
        if fit is None
        else {
            **_values(fit),
            "knee": fit.knee,
            "flags": [flag.name.lower() for flag in fit.flags],
        },
        "critical_batch_size": None
        if critical is None
        else {
            **_values(critical),
            "tokens": critical.tokens,
            "tokens_interval": critical.tokens_interval,
            "is_finite": math.isfinite(critical.sequences),  # infinity is null in the file
            "flags": [flag.name.lower() for flag in critical.flags],
        },
        "noise_scale_by_batch_size": each.sweep.noise_scales(),
    }


def _law_as_json(law: ScalingLaw) -> dict[str, Any]:
    units = {name: VARIABLES[name] for name in law.names if name in VARIABLES}
    return {**_values(law), "units": {**units, "y": "sequences"}}


def _values(value: Any) -> dict[str, Any]:
    """Fields by name; the measurements of fits are in the sweeps."""
    left_out = {"measurements", "not_reached", "x", "y", "covariance"}
    return {name: inner for name, inner in vars(value).items() if name not in left_out}
