"""The picture and the summary of a run, from its records alone."""

import io
import math
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from hf_adaptive_batch.report.picture import draw_run
from hf_adaptive_batch.report.records import FIELDS
from hf_adaptive_batch.report.summary import RunSummary, trajectory


def records(sizes: list[int], noise: list[float | None]) -> dict[str, list]:
    columns: dict[str, list] = {name: [None] * len(sizes) for name in FIELDS}
    seen = 0
    for index, size in enumerate(sizes):
        seen += size
        columns["step"][index] = index + 1
        columns["samples_seen"][index] = seen
        columns["loss"][index] = 5 / (index + 1)
        columns["global_batch_size"][index] = size
        columns["next_global_batch_size"][index] = (sizes + sizes[-1:])[index + 1]
        columns["noise_scale"][index] = noise[index]
        columns["noise_scale_error"][index] = None if noise[index] is None else 1.0
    return columns


def summary(**values) -> RunSummary:
    given = {
        "validation_loss": 2.0,
        "tokens_per_byte": 0.25,
        "samples": 1000,
        "tokens": 16000,
        "steps": 60,
        "constant_steps": 250,
        "skipped_steps": 0,
        "seconds": 12.3,
        "trajectory": [(0, 4)],
    }
    return RunSummary(**{**given, **values})


def shown(result: RunSummary) -> str:
    console = Console(width=100, file=io.StringIO())
    result.show(console)
    return console.file.getvalue()


@pytest.mark.parametrize(
    "noise",
    [[None, 3.0, 4.0, 5.0], [None] * 4, [0.5, -1.0, 2.0, None]],
    ids=["measured", "never measurable", "with gaps and a negative one"],
)
def test_a_picture_is_drawn_whatever_could_be_measured(tmp_path: Path, noise: list) -> None:
    path = tmp_path / "run.png"
    draw_run(records([4, 8, 8, 16], noise), [(12, 2.5), (36, 2.0)], path)
    with Image.open(path) as picture:
        assert picture.size[0] > 800
        assert len(picture.convert("RGB").getcolors(2**20) or []) > 10


def test_one_record_is_no_curve(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"records \(1\) must be at least 2"):
        draw_run(records([4], [None]), [], tmp_path / "run.png")


def test_the_trajectory_names_each_change_where_it_was_decided() -> None:
    assert trajectory(records([4, 4, 8, 16], [None] * 4)) == [(0, 4), (8, 8), (16, 16)]
    assert trajectory(records([], [])) == []


def test_perplexity_and_bits_per_byte_follow_from_the_loss() -> None:
    result = summary()
    assert result.perplexity == pytest.approx(math.e**2)
    assert result.bits_per_byte == pytest.approx(2.0 / math.log(2) / 4)
    assert math.isfinite(summary(validation_loss=1e6).perplexity)


def test_the_summary_compares_steps_only_where_they_were_saved() -> None:
    assert "250 steps for the same samples (76% fewer)" in shown(summary())
    assert "fewer" not in shown(summary(steps=250))
    assert "4 samples throughout" in shown(summary())


def test_many_changes_are_told_by_their_doublings() -> None:
    path = [(0, 4), *((100 * k, 4 + 4 * k) for k in range(1, 32))]
    text = shown(summary(trajectory=path)).replace("\n", " ")
    assert "4 -> 8 at 100 -> 16 at 300 -> 32 at 700" in " ".join(text.split())
    assert "in 31 changes" in " ".join(text.split())
    few = [(0, 4), (8, 8), (16, 12)]
    assert "4 -> 8 at 8 -> 12 at 16 samples" in shown(summary(trajectory=few))


def test_skipped_steps_are_told() -> None:
    assert "3 steps with a loss that was not finite" in shown(summary(skipped_steps=3))
    assert "skipped" not in shown(summary())
