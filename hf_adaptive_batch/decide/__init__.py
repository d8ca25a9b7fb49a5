"""Decide: `GradientMoments` become a `BatchDecision`. Standard library only, no torch."""

from .controllers import (
    BatchController,
    BatchDecision,
    FixedController,
    NormTestController,
    Observation,
    Reason,
)
from .criteria import NormTest, TestResult
from .noise_scale import NoiseScale, NoiseScaleEstimator


__all__ = [
    "BatchController",
    "BatchDecision",
    "FixedController",
    "NoiseScale",
    "NoiseScaleEstimator",
    "NormTest",
    "NormTestController",
    "Observation",
    "Reason",
    "TestResult",
]
