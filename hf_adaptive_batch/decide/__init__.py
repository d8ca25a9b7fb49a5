"""Decide: `GradientMoments` become a `BatchDecision`. Standard library only, no torch."""

from .co_scaling import CoScaling, OptimizerKind
from .controllers import (
    BatchController,
    BatchDecision,
    FixedController,
    NormTestController,
    Observation,
    Reason,
    ScheduledController,
)
from .criteria import Criterion, NoiseScaleTarget, NormTest, TestResult
from .noise_scale import NoiseScale, NoiseScaleEstimator
from .schedule import BatchSchedule, LinearRamp, PowerLaw, Unit
from .seesaw import Seesaw
from .stages import Duration, Stage, Stages, paper_stages, parse_stages


__all__ = [
    "BatchController",
    "BatchDecision",
    "BatchSchedule",
    "CoScaling",
    "Criterion",
    "Duration",
    "FixedController",
    "LinearRamp",
    "NoiseScale",
    "NoiseScaleEstimator",
    "NoiseScaleTarget",
    "NormTest",
    "NormTestController",
    "Observation",
    "OptimizerKind",
    "PowerLaw",
    "Reason",
    "ScheduledController",
    "Seesaw",
    "Stage",
    "Stages",
    "TestResult",
    "Unit",
    "paper_stages",
    "parse_stages",
]
