"""From single steps' noisy moments to an estimate with its error: B_simple = tr(Sigma)/||G||^2.

Both unknowns are averaged over the measured steps *separately* and divided last: tr(Sigma) does not
depend on the batch size, and the mean of a ratio is not the ratio of the means (McCandlish et al.
2018, arXiv 1812.06162, appendix A.1).
"""

import math
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

from ..measure.moments import GradientMoments


class Measurability(StrEnum):
    """Whether the measurements so far determine the noise scale."""

    NOT_YET = "not_yet"
    """Fewer than two measured steps: no error can be given."""
    NOISE_DOMINATES = "noise_dominates"
    """||G||^2 is not above zero by one standard error: the batch drowns the gradient in noise."""
    NO_GRADIENT = "no_gradient"
    """Neither noise nor gradient was found: nothing is being learned, and no batch would help."""
    MEASURED = "measured"
    """Both estimates are usable."""


@dataclass(frozen=True, kw_only=True)
class NoiseScale:
    """The estimate after some measured steps; every number is in units of gradient or samples.

    Attributes:
        updates: Measured steps that went in.
        noise_trace: Averaged tr(Sigma); NaN before the first measured step.
        grad_sq_norm: Averaged ||G||^2, unbiased, possibly <= 0; NaN before the first measured step.
        noise_trace_error: Standard error of `noise_trace`; NaN before the second measured step.
        grad_sq_norm_error: Standard error of `grad_sq_norm`; NaN before the second measured step.
        noise_scale_error: Standard error of `noise_scale` in samples, by the delta method; NaN
            where the noise scale is not measurable.
    """

    updates: int
    noise_trace: float
    grad_sq_norm: float
    noise_trace_error: float
    grad_sq_norm_error: float
    noise_scale_error: float

    @property
    def measurability(self) -> Measurability:
        """Whether `noise_scale` is a number, and if not, why."""
        if self.updates < 2:
            return Measurability.NOT_YET
        if self.grad_sq_norm <= self.grad_sq_norm_error:
            return (
                Measurability.NOISE_DOMINATES if self.noise_trace > 0 else Measurability.NO_GRADIENT
            )
        return Measurability.MEASURED

    @property
    def noise_scale(self) -> float | None:
        """B_simple in samples, or None where it is not measurable: never a clamped number."""
        if self.measurability is not Measurability.MEASURED:
            return None
        return self.noise_trace / self.grad_sq_norm


_STATE_VERSION = 1
_MEANS = ("noise", "signal")
_SPREADS = ("noise_var", "signal_var", "covariance")  # from differences, so from the second update


@dataclass
class NoiseScaleEstimator:
    """Exponential moving averages of tr(Sigma) and ||G||^2 over the measured steps, with errors.

    Update t has weight (1 - decay) decay^(n - t); sums are divided by the total weight, so that a
    constant input is reproduced from the first update on. The standard errors take the updates as
    independent and their spread from successive differences, (x_t - x_{t-1})^2 / 2 (von Neumann et
    al. 1941), because both quantities drift as training goes on: at its beginning ||G||^2 falls by
    orders of magnitude, which is no error of the measurement. The average itself lags behind such a
    drift by about 1/(1 - decay) updates.

    Args:
        decay: Weight kept from one measured step to the next, in [0, 1). The default averages about
            ten measured steps, as Naganuma et al. 2026 (arXiv 2602.03001) do.

    Raises:
        ValueError: If `decay` is outside [0, 1).
    """

    decay: float = 0.9
    _updates: int = field(default=0, init=False)
    _weight: float = field(default=0.0, init=False)
    _weight_sq: float = field(default=0.0, init=False)  # sum of squared weights
    _spread_weight: float = field(default=0.0, init=False)  # lacks the first update's
    _last: tuple[float, float] = field(default=(0.0, 0.0), init=False)
    _sums: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(_MEANS + _SPREADS, 0.0), init=False
    )

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise ValueError(
                f"decay ({self.decay}) must be in [0, 1), because it is the share of the old "
                "average that is kept; use 0 for no averaging, 0.9 for about ten measured steps."
            )

    def update(self, moments: GradientMoments) -> NoiseScale:
        """Take in one measured step and return the new estimate.

        Args:
            moments: The step's moments, all-reduced and finite.

        Returns:
            The estimate over all updates so far.

        Raises:
            ValueError: If the moments are not finite; drop such a step instead.
        """
        if not moments.is_finite:
            raise ValueError(
                f"moments ({moments}) must be finite, because one NaN would stay in the average "
                "for ever; drop the step."
            )
        noise, signal = moments.noise_trace, moments.grad_sq_norm
        d_noise, d_signal = noise - self._last[0], signal - self._last[1]
        inputs = {"noise": noise, "signal": signal}
        if self._updates > 0:
            inputs["noise_var"] = d_noise * d_noise / 2
            inputs["signal_var"] = d_signal * d_signal / 2
            inputs["covariance"] = d_noise * d_signal / 2
            self._spread_weight = self.decay * self._spread_weight + 1 - self.decay
        keep, new = self.decay, 1 - self.decay
        for name, value in inputs.items():
            self._sums[name] = keep * self._sums[name] + new * value
        self._weight = keep * self._weight + new
        self._weight_sq = keep * keep * self._weight_sq + new * new
        self._last = noise, signal
        self._updates += 1
        return self.estimate()

    def estimate(self) -> NoiseScale:
        """The current estimate, without taking anything in."""
        if self._updates == 0:
            nan = math.nan
            return NoiseScale(
                updates=0,
                noise_trace=nan,
                grad_sq_norm=nan,
                noise_trace_error=nan,
                grad_sq_norm_error=nan,
                noise_scale_error=nan,
            )
        noise, signal = (self._sums[name] / self._weight for name in _MEANS)
        if self._updates > 1:
            # The variance of a weighted mean is that of one update times sum w^2 / (sum w)^2.
            shrink = self._weight_sq / self._weight**2 / self._spread_weight
            noise_var, signal_var, covariance = (shrink * self._sums[name] for name in _SPREADS)
        else:
            noise_var = signal_var = covariance = math.nan
        estimate = NoiseScale(
            updates=self._updates,
            noise_trace=noise,
            grad_sq_norm=signal,
            noise_trace_error=math.sqrt(noise_var),
            grad_sq_norm_error=math.sqrt(signal_var),
            noise_scale_error=math.nan,
        )
        ratio = estimate.noise_scale
        if ratio is None:
            return estimate
        ratio_var = noise_var - 2 * ratio * covariance + ratio * ratio * signal_var
        return replace(estimate, noise_scale_error=math.sqrt(max(ratio_var, 0.0)) / signal)

    def state_dict(self) -> dict[str, Any]:
        """What the averages hold, as plain JSON; the configuration is not part of it."""
        return {
            "version": _STATE_VERSION,
            "updates": self._updates,
            "weight": self._weight,
            "weight_sq": self._weight_sq,
            "spread_weight": self._spread_weight,
            "last": list(self._last),
            "sums": dict(self._sums),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave; `decay` stays as configured.

        Args:
            state: A dictionary from `state_dict`.

        Raises:
            ValueError: If the state has another version.
        """
        if state.get("version") != _STATE_VERSION:
            raise ValueError(
                f"version ({state.get('version')}) of the noise-scale state must be "
                f"{_STATE_VERSION}, because its fields are read by name; resume with the release "
                "that wrote it."
            )
        self._updates = int(state["updates"])
        self._weight = float(state["weight"])
        self._weight_sq = float(state["weight_sq"])
        self._spread_weight = float(state["spread_weight"])
        self._last = (float(state["last"][0]), float(state["last"][1]))
        self._sums = {name: float(state["sums"][name]) for name in _MEANS + _SPREADS}
