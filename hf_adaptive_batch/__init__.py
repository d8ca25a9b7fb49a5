"""Adaptive batch sizes for the Hugging Face Trainer: measure the gradient noise, decide, apply.

Public names are grouped by the sentence. Names that need torch or transformers are imported when
they are first used, so that `import hf_adaptive_batch` stays cheap.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any


__version__ = "0.1.0"

_HOME = {
    # measure
    "GradientMoments": ".measure.moments",
    "GradientProbe": ".measure.probe",
    # decide
    "BatchController": ".decide.controllers",
    "BatchDecision": ".decide.controllers",
    "BatchSchedule": ".decide.schedule",
    "CoScaling": ".decide.co_scaling",
    "FixedController": ".decide.controllers",
    "LinearRamp": ".decide.schedule",
    "NoiseScale": ".decide.noise_scale",
    "NoiseScaleEstimator": ".decide.noise_scale",
    "NoiseScaleTarget": ".decide.criteria",
    "NormTest": ".decide.criteria",
    "NormTestController": ".decide.controllers",
    "Observation": ".decide.controllers",
    "PowerLaw": ".decide.schedule",
    "Reason": ".decide.controllers",
    "ScheduledController": ".decide.controllers",
    "Seesaw": ".decide.seesaw",
    "Stages": ".decide.stages",
    "TestResult": ".decide.criteria",
    "parse_stages": ".decide.stages",
    # apply
    "BatchPlan": ".apply.plan",
    "StepBatch": ".apply.step",
    "StepLoader": ".apply.loader",
    "TrainingClock": ".apply.clock",
    # train
    "AdaptiveBatch": ".accelerate_loop",
    "AdaptiveBatchArguments": ".arguments",
    "AdaptiveBatchMixin": ".trainer",
    "AdaptiveBatchOptions": ".arguments",
    "AdaptiveBatchTrainer": ".trainer",
    "GradientNoiseCallback": ".callback",
    "WeightAveragingCallback": ".averaging_callback",
    "target_tokens": ".tokens",
    # look
    "LanguageModeling": ".language_modeling",
    "language_modeling_metrics": ".language_modeling",
    "read_evaluations": ".report.records",
    "read_records": ".report.records",
    "sample_losses": ".language_modeling",
}

__all__ = sorted(_HOME)

if TYPE_CHECKING:
    from .accelerate_loop import AdaptiveBatch
    from .apply.clock import TrainingClock
    from .apply.loader import StepLoader
    from .apply.plan import BatchPlan
    from .apply.step import StepBatch
    from .arguments import AdaptiveBatchArguments, AdaptiveBatchOptions
    from .averaging_callback import WeightAveragingCallback
    from .callback import GradientNoiseCallback
    from .decide.co_scaling import CoScaling
    from .decide.controllers import (
        BatchController,
        BatchDecision,
        FixedController,
        NormTestController,
        Observation,
        Reason,
        ScheduledController,
    )
    from .decide.criteria import NoiseScaleTarget, NormTest, TestResult
    from .decide.noise_scale import NoiseScale, NoiseScaleEstimator
    from .decide.schedule import BatchSchedule, LinearRamp, PowerLaw
    from .decide.seesaw import Seesaw
    from .decide.stages import Stages, parse_stages
    from .language_modeling import (
        LanguageModeling,
        language_modeling_metrics,
        sample_losses,
    )
    from .measure.moments import GradientMoments
    from .measure.probe import GradientProbe
    from .report.records import read_evaluations, read_records
    from .tokens import target_tokens
    from .trainer import AdaptiveBatchMixin, AdaptiveBatchTrainer


def __getattr__(name: str) -> Any:
    """Import a public name from its module at its first use."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOME[name], __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """The table of contents."""
    return [*__all__, "__version__"]
