"""The critical batch size: measured from whole runs, fitted, extrapolated. Torch-free mathematics.

    fit = fit_steps_to_target(batch_sizes, steps, tokens_per_sequence=512)
    critical_batch_size(fit, overhead=0.2, reference=256)       # Zhang et al.; fit.knee: McCandlish
    law = fit_power_law(tokens, critical_batch_sizes)
    predict(law, 20e9)

Never another name of the noise scale, which is read from gradients.
"""

from .advice import Advice, Opinion, advise
from .branching import BranchedBatchSize, BranchOutcome, branched_batch_size, smoothed_loss
from .critical import CriticalBatchSize, critical_batch_size
from .intervals import Interval
from .published import LAWS, ZHANG_2025, Evidence, Kind, PublishedLaw
from .scaling_law import Prediction, ScalingLaw, fit_power_law, predict
from .schedule import schedule_law
from .sensitivity import Sensitivity, law_sensitivity
from .steps_to_target import (
    FitFlag,
    NotReached,
    StepsMeasurement,
    StepsToTargetFit,
    fit_steps_to_target,
)
from .sweep_result import Sweep, SweepRun, read_sweeps, write_sweeps
from .trade_off import TradeOff


__all__ = [
    "LAWS",
    "ZHANG_2025",
    "Advice",
    "BranchOutcome",
    "BranchedBatchSize",
    "CriticalBatchSize",
    "Evidence",
    "FitFlag",
    "Interval",
    "Kind",
    "NotReached",
    "Opinion",
    "Prediction",
    "PublishedLaw",
    "ScalingLaw",
    "Sensitivity",
    "StepsMeasurement",
    "StepsToTargetFit",
    "Sweep",
    "SweepRun",
    "TradeOff",
    "advise",
    "branched_batch_size",
    "critical_batch_size",
    "fit_power_law",
    "fit_steps_to_target",
    "law_sensitivity",
    "predict",
    "read_sweeps",
    "schedule_law",
    "smoothed_loss",
    "write_sweeps",
]
