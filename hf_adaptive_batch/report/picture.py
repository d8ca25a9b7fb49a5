"""The picture of one run: loss, batch size and noise scale over samples."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, NullFormatter


_BLUE, _ORANGE, _GREEN, _GREY = "#2b6cb0", "#c05621", "#2f855a", "#4a5568"


def draw_run(
    records: Mapping[str, Sequence[Any]],
    evaluations: Sequence[tuple[int, float]],
    path: str | os.PathLike[str],
    *,
    title: str = "",
) -> None:
    """Draw a run's three curves above one axis of samples.

    Args:
        records: Columns as `read_records` gives them; at least two decisions.
        evaluations: (samples seen, validation loss) of each evaluation.
        path: Where the PNG goes.
        title: A line above the picture.

    Raises:
        ValueError: If there are fewer than two records.
    """
    if len(records["step"]) < 2:
        raise ValueError(
            f"records ({len(records['step'])}) must be at least 2, because a curve needs two "
            "points; train for longer, or with a smaller test_interval."
        )
    samples = np.array(records["samples_seen"], dtype=float)
    figure = Figure(figsize=(9, 7.5), layout="constrained")
    loss, batch, noise = figure.subplots(3, 1, sharex=True, height_ratios=(3, 2, 2))
    _draw_loss(loss, samples, _floats(records["loss"]), evaluations)
    _draw_batch(batch, samples, _floats(records["global_batch_size"]))
    _draw_noise(
        noise, samples, _floats(records["noise_scale"]), _floats(records["noise_scale_error"])
    )
    noise.set_xlabel("samples seen")
    noise.xaxis.set_major_formatter(EngFormatter(sep=""))
    noise.set_xlim(0, samples[-1] * 1.01)
    for axes in (loss, batch, noise):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title or "Training with an adaptive batch size", fontsize=12)
    figure.savefig(path, dpi=120)


def _draw_loss(
    axes: Axes, samples: Any, losses: Any, evaluations: Sequence[tuple[int, float]]
) -> None:
    known = np.isfinite(losses)
    axes.plot(samples[known], losses[known], color=_BLUE, alpha=0.2, linewidth=0.8)
    axes.plot(*_smoothed(samples[known], losses[known]), color=_BLUE, label="training, smoothed")
    if evaluations:
        axes.plot(*zip(*evaluations, strict=True), "o-", color=_ORANGE, ms=4, label="validation")
    axes.set_ylabel("loss (nats / token)")
    axes.legend(frameon=False)


def _draw_batch(axes: Axes, samples: Any, sizes: Any) -> None:
    # A step trains on the samples up to its own count with its own size.
    starts = np.concatenate([[0.0], samples[:-1]])
    starts, sizes = np.append(starts, samples[-1]), np.append(sizes, sizes[-1])
    axes.step(starts, sizes, where="post", color=_GREEN)
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_ylabel("global batch size\n(samples)")


def _draw_noise(axes: Axes, samples: Any, scale: Any, error: Any) -> None:
    known = np.isfinite(scale) & (scale > 0)
    if not known.any():
        axes.text(0.5, 0.5, "never measurable", transform=axes.transAxes, ha="center")
        return
    axes.plot(samples[known], scale[known], color=_GREY, lw=1, label="noise scale")
    low = np.maximum(scale - error, scale / 10)  # a band below zero has no place on a log axis
    band = known & np.isfinite(error)
    label = "± its standard error"
    axes.fill_between(samples, low, scale + error, where=band, color=_GREY, alpha=0.2, label=label)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_ylabel("noise scale\n(samples)")
    axes.legend(frameon=False)


def _smoothed(samples: Any, values: Any) -> tuple[Any, Any]:
    """Means over forty equal stretches of samples; of the points themselves where there are few."""
    if len(values) < 80:
        return samples, values
    stretch = np.floor(samples / samples[-1] * 40 * (1 - 1e-9)).astype(int)
    counts = np.bincount(stretch)
    used = counts > 0
    return tuple(
        np.bincount(stretch, weights=column)[used] / counts[used] for column in (samples, values)
    )  # type: ignore[return-value]


def _floats(column: Sequence[Any]) -> Any:
    return np.array([np.nan if value is None else value for value in column], dtype=float)
