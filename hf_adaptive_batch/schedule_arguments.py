"""The fields that say how the batch follows training, and what follows the batch."""

from dataclasses import dataclass, field
from typing import Any

from .decide.co_scaling import CoScaling


CLOSED_LOOP = ("norm_test", "noise_scale")
SCHEDULES = (*CLOSED_LOOP, "constant", "stage_wise", "linear_ramp", "seesaw", "cbs_law")


def option(default: Any, text: str) -> Any:
    """A field with its help."""
    return field(default=default, metadata={"help": text})


@dataclass
class ScheduleOptions:
    """How the batch follows training, and what follows the batch."""

    batch_schedule: str = option(
        "norm_test",
        "How the global batch size is chosen. 'norm_test' grows it while the gradient is too noisy "
        "for it; 'noise_scale' follows noise_scale_factor times the noise scale; 'constant' keeps "
        "it and equals the plain Trainer; 'stage_wise' is a quarter of max_global_batch_size for "
        "2.5%% of the budget, a half for 2.5%%, then all of it; 'linear_ramp' goes up to "
        "max_global_batch_size over ramp_length; 'seesaw' grows it where the learning-rate "
        "schedule would fall; 'cbs_law' follows a power law of the tokens seen. Or stages, "
        "START:SIZE in samples, as '0:768 250M:1536 500M:3072': starts in tokens, or with a word "
        "as 4Ksamples, 100steps, 2.5%%.",
    )
    noise_scale_factor: float = option(
        1.0, "noise_scale: the batch in noise scales. 1/eta^2 gives what norm_test does at eta."
    )
    ramp_length: str = option(
        "100%", "linear_ramp: how long it takes, such as 250M (tokens), 4Ksamples, 100steps, 50%%."
    )
    seesaw_alpha: float | None = option(
        None,
        "seesaw: grow by this factor whenever the learning rate would have been cut by it, such as "
        "2. Default: follow continuously.",
    )
    cbs_coefficient: float = option(
        18.1,
        "cbs_law: tokens per step after one token. Default: fitted to the critical batch sizes of "
        "Zhang et al. (arXiv 2410.21676) for text of 512 tokens.",
    )
    cbs_exponent: float = option(0.468, "cbs_law: exponent of the tokens seen.")
    scale_learning_rate: str = option(
        "none",
        "What the learning rate is multiplied by when the batch differs from the initial one, per "
        "factor k: 'none', 'sqrt' (Adam), 'linear' (SGD), or 'adascale', the measured gain between "
        "1 and k (its root for Adam).",
    )
    scale_beta2: bool = option(
        False, "Keep the half-life of Adam's beta2 constant in tokens: beta2^k."
    )
    min_beta2: float = option(0.9, "The least that scale_beta2 leads to for a larger batch.")
    scale_weight_decay: bool = option(
        False,
        "Keep the timescale of AdamW's weight decay constant in samples: learning rate x weight "
        "decay grows by k.",
    )

    @property
    def co_scaling(self) -> CoScaling:
        """The rules for what follows the batch."""
        return CoScaling(
            learning_rate=self.scale_learning_rate,  # type: ignore[arg-type]  # it checks it
            beta2=self.scale_beta2,
            min_beta2=self.min_beta2,
            weight_decay=self.scale_weight_decay,
        )
