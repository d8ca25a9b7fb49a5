"""What the panels of a report show: curves as numbers, nothing of how they are drawn."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .history import RunHistory
from .lines import (
    Line,
    binned,
    evaluated,
    loss_limits,
    mean_line,
    recorded,
    sizes,
    thinned,
)


@dataclass(frozen=True, kw_only=True)
class Group:
    """Runs that share a name and a style: a contender's seeds, or a single run.

    Attributes:
        name: User's text.
        runs: Its runs.
    """

    name: str
    runs: Sequence[RunHistory]


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One curve of a panel.

    Attributes:
        group: Whose it is, counted from 0; the style follows from it.
        x: Abscissas.
        y: Ordinates, as many.
        bold: Whether it is the group's one curve, or the mean of its seeds.
        marked: Indices of points that are drawn as chosen.
        beyond: Abscissas whose value is above the panel or not finite.
    """

    group: int
    x: Any
    y: Any
    bold: bool
    marked: Sequence[int] = ()
    beyond: Sequence[float] = ()


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One picture of a report.

    Attributes:
        key: Names files and ids.
        title: A line above it.
        caption: Sentences below it.
        x_label: Of the horizontal axis.
        y_label: Of the vertical axis.
        curves: None of them if there is nothing to show; the caption then says why.
        scales: Of x and y: linear, log2 or log10.
        steps: Whether a value holds until the next.
        limits: Of the vertical axis; None leaves them to the data.
        level: A horizontal line, if any.
    """

    key: str
    title: str
    caption: str
    x_label: str
    y_label: str
    curves: Sequence[Curve] = field(default_factory=list)
    scales: tuple[str, str] = ("linear", "linear")
    steps: bool = False
    limits: tuple[float, float] | None = None
    level: float | None = None


_UNITS = ((1.0, "seconds", 900.0), (60.0, "minutes", 10_800.0), (3600.0, "hours", math.inf))


def progress_name(groups: Sequence[Group]) -> str:
    """The clock of a report's panels.

    Args:
        groups: All that is shown.

    Returns:
        `tokens`, or `samples` where no run counts tokens, as with images.
    """
    return "tokens" if any(run.tokens for group in groups for run in group.runs) else "samples"


def panels_of(groups: Sequence[Group], target_loss: float | None = None) -> list[Panel]:
    """The panels that every report has.

    Args:
        groups: What is compared.
        target_loss: A level of validation loss to draw.

    Returns:
        Validation loss over three clocks, or one panel that says there is none; batch size, noise
        scale, learning rate.
    """
    clock = progress_name(groups)
    seconds = [run.seconds or 0.0 for group in groups for run in group.runs]
    unit, unit_name = next((u, n) for u, n, most in _UNITS if max(seconds, default=0.0) <= most)
    axes = [
        (clock, clock, 1.0, f"{clock} trained on"),
        ("steps", "optimizer steps", 1.0, "optimizer steps"),
        ("seconds", "time", unit, f"training time ({unit_name})"),
    ]
    without = "There is no evaluation with a finite loss and a known time."
    if not any(run.evaluations for group in groups for run in group.runs):
        axes, without = axes[:1], "No run has evaluated its validation loss."
    panels = []
    for name, title, scale, label in axes:
        curves = _curves(groups, lambda run, n=name, s=scale: evaluated(run, clock, n, s))  # type: ignore[misc]
        limits, caption = loss_limits([curve.y for curve in curves], target_loss)
        if target_loss is not None and math.isfinite(target_loss):
            caption += f" Dotted: the target loss, {target_loss:.4f}."
        if name == "seconds":
            caption += " Without the time of evaluating and saving."
        if not curves:
            caption = without
        panels.append(
            Panel(
                key=f"loss-{name}",
                title=f"Validation loss against {title}",
                caption=caption.strip(),
                x_label=label,
                y_label="validation loss",
                curves=curves,
                limits=limits,
                level=target_loss,
            )
        )
    return [*panels, _batch(groups, clock), _noise(groups, clock), _learning_rate(groups, clock)]


def training_panel(groups: Sequence[Group]) -> Panel:
    """The training loss of every run, smoothed.

    Args:
        groups: What is shown.

    Returns:
        The panel.
    """
    clock = progress_name(groups)

    def line(run: RunHistory) -> Line:
        losses = recorded(run, clock, "loss")
        return binned(losses, min(40, max(10, len(losses.x) // 8)))

    curves = _curves(groups, line)
    # What is left of the noise after averaging should not be cut off with the beginning.
    limits, cut = loss_limits([curve.y for curve in curves], None, share=0.95)
    caption = f"Means over equal stretches of {clock}. {cut}".strip()
    return Panel(
        key="training-loss",
        title=f"Training loss against {clock}",
        caption=caption if curves else "No run has recorded its training loss.",
        x_label=f"{clock} trained on",
        y_label="training loss",
        curves=curves,
        limits=limits,
    )


def _batch(groups: Sequence[Group], clock: str) -> Panel:
    curves = _curves(groups, lambda run: sizes(run, clock), "steps")
    caption = ""
    if any(not run.records.get("step") for group in groups for run in group.runs):
        caption = "Runs without recorded decisions: averages between two evaluations."
    return Panel(
        key="batch-size",
        title=f"Global batch size against {clock}",
        caption=caption if curves else "No run has recorded its batch size.",
        x_label=f"{clock} trained on",
        y_label="global batch size (samples)",
        curves=curves,
        scales=("linear", "log2"),
        steps=True,
    )


def _noise(groups: Sequence[Group], clock: str) -> Panel:
    def line(run: RunHistory) -> Line:
        return binned(recorded(run, clock, "noise_scale", positive=True), 50, "log")

    curves = _curves(groups, line, "log")
    limits = None
    if curves:
        values = np.log(np.concatenate([curve.y for curve in curves]))
        # A ratio whose denominator is hardly known jumps by powers of ten in the first steps.
        low, high = np.quantile(values, 0.01), np.quantile(values, 0.99)
        limits = float(np.exp(low) / 1.5), float(np.exp(high) * 1.5)
    return Panel(
        key="noise-scale",
        title=f"Noise scale against {clock}",
        caption="Shown where it was measurable."
        if curves
        else "The noise scale was never measurable, or never measured, in these runs.",
        x_label=f"{clock} trained on",
        y_label="noise scale (samples)",
        curves=curves,
        scales=("linear", "log10"),
        limits=limits,
    )


def _learning_rate(groups: Sequence[Group], clock: str) -> Panel:
    curves = _curves(groups, lambda run: thinned(recorded(run, clock, "learning_rate"), 150))
    return Panel(
        key="learning-rate",
        title=f"Learning rate against {clock}",
        caption="" if curves else "No run has recorded its learning rate.",
        x_label=f"{clock} trained on",
        y_label="learning rate",
        curves=curves,
    )


def _curves(
    groups: Sequence[Group], line: Callable[[RunHistory], Line], kind: str = "linear"
) -> list[Curve]:
    """Of each group the curves of its runs, and their mean if they are several."""
    curves: list[Curve] = []
    for index, group in enumerate(groups):
        lines = [line(run) for run in group.runs]
        single = len(group.runs) == 1
        curves += [
            Curve(group=index, x=each.x, y=each.y, bold=single) for each in lines if len(each.x)
        ]
        mean = None if single else mean_line(lines, kind)
        if mean is not None:
            curves.append(Curve(group=index, x=mean.x, y=mean.y, bold=True))
    return curves
