"""Draws flow.svg, by `python docs/images/flow.py`."""

from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch


BOXES = (
    ("gradients", "of every micro-batch,\non every rank", "#d7e8f7"),
    ("GradientMoments", "two squared norms,\none all-reduce", "#d7e8f7"),
    ("NoiseScale", "averages over steps,\nwith errors", "#fbe7c6"),
    ("BatchDecision", "the next size,\nand the reason", "#fbe7c6"),
    ("BatchPlan", "micro-batch x\naccumulation x ranks", "#d9efd8"),
    ("next step", "its samples, cut from\nthe epoch's order", "#d9efd8"),
)
STAGES = ((0, 1, "measure"), (2, 3, "decide"), (4, 5, "apply"))
WIDTH, GAP = 2.2, 0.55


def draw() -> Figure:
    """The flow of one optimizer step."""
    figure = Figure(figsize=(11.5, 2.5))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.set_xlim(-0.2, len(BOXES) * (WIDTH + GAP) - GAP + 0.2)
    axes.set_ylim(-0.65, 2.35)
    for place, (name, detail, colour) in enumerate(BOXES):
        left = place * (WIDTH + GAP)
        axes.add_patch(
            FancyBboxPatch(
                (left + 0.05, 0.25),
                WIDTH - 0.1,
                1.3,
                boxstyle="round,pad=0.05",
                facecolor=colour,
                edgecolor="#555555",
            )
        )
        middle = left + WIDTH / 2
        axes.text(middle, 1.25, name, ha="center", va="center", weight="bold", size=10.5)
        axes.text(middle, 0.66, detail, ha="center", va="center", size=9, color="#333333")
        if place + 1 < len(BOXES):
            axes.annotate(
                "",
                xy=(left + WIDTH + GAP, 0.9),
                xytext=(left + WIDTH, 0.9),
                arrowprops={"arrowstyle": "-|>", "color": "#555555"},
            )
    for first, last, name in STAGES:
        middle = (first + last) / 2 * (WIDTH + GAP) + WIDTH / 2
        axes.text(middle, 1.98, name, ha="center", va="center", size=13, style="italic")
    end, start = (len(BOXES) - 1) * (WIDTH + GAP) + WIDTH / 2, WIDTH / 2
    axes.plot((end, end, start), (0.2, -0.3, -0.3), color="#555555", linewidth=1)
    axes.annotate(
        "",
        xy=(start, 0.2),
        xytext=(start, -0.32),
        arrowprops={"arrowstyle": "-|>", "color": "#555555"},
    )
    axes.text(
        (start + end) / 2, -0.48, "once every optimizer step", ha="center", va="center", size=9
    )
    return figure


if __name__ == "__main__":
    # Text as text, and no date: the same file each time.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "flow", "font.family": "sans-serif"}):
        draw().savefig(Path(__file__).with_suffix(".svg"), metadata={"Date": None})
