"""The page of `cbs fit`: whole without anything else, true to any name, readable in every case."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from hf_adaptive_batch.cbs import Sweep, SweepRun
from hf_adaptive_batch.cbs.report.comparison_pictures import noise_picture, trade_off_picture
from hf_adaptive_batch.cbs.report.fit_report import FitReport, report_of
from hf_adaptive_batch.cbs.report.law_picture import law_picture
from hf_adaptive_batch.cbs.report.page import write_page
from hf_adaptive_batch.cbs.report.steps_picture import steps_picture
from hf_adaptive_batch.cli import main
from tests.pages import HOSTILE, Reader, checked


A, B, REFERENCE = 60, 6000, 8


def sweep(name: str = "one", *, a=A, b=B, reached=math.inf, noise=True, **values) -> Sweep:
    """Two seeds and a learning rate that was not chosen, at six batch sizes."""
    runs = []
    for size in (4, 8, 16, 32, 64, 128):
        steps = a + b / size
        for seed, factor in enumerate((1.02, 1 / 1.02, 1.5)):
            runs.append(
                SweepRun(
                    batch_size=size,
                    steps=factor * steps if size <= reached else None,
                    trained_steps=2 * factor * steps,
                    seed=seed % 2,
                    noise_scale=10.0 + size if noise else None,
                    chosen=seed < 2,
                )
            )
    given = {"tokens_per_sequence": 128, "reference": REFERENCE, "target_loss": 2.5}
    return Sweep(name=name, runs=runs, **given | values)


def several() -> list[Sweep]:
    return [
        sweep(f"{n}M", b=B * n, parameters=n * 1e6, tokens=n * 2e7, noise=n < 4) for n in (1, 2, 4)
    ]


def drawn(picture) -> Figure:
    figure = Figure()
    picture.draw(figure, "#010203")
    figure.draw_without_rendering()
    return figure


def curves(axes) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Lines of an axes by their names in its legend."""
    return {str(line.get_label()): line.get_data() for line in axes.lines}


def marks(axes, marker: str) -> list[tuple[float, float]]:
    found = [line for line in axes.lines if line.get_marker() == marker]
    return [(float(line.get_xdata()[0]), float(line.get_ydata()[0])) for line in found]


def page_of(sweeps: list[Sweep], folder: Path, **options) -> Reader:
    return checked(write_page(report_of(sweeps, **options), folder))


def test_the_page_has_its_parts_and_needs_nothing_else(tmp_path: Path) -> None:
    reader = page_of(several(), tmp_path, predict_parameters=[8e6])
    text = " ".join(" ".join(reader.texts).split())
    parts = [
        "Critical batch size: the batch whose steps",
        "The noise scale tr(Sigma)/|G|^2 is read from gradients",
        "What this shows",
        "sequences, N in millions of parameters",
        "At 8M parameters the law says",
        "What to know",
        "Numbers",
        "critical batch size (tokens)",
        "noise scale (sequences)",
        "Critical batch size against model size",
        "Critical batch size against tokens trained on",
        "The trade-off: steps against sequences",
        "Noise scale of the same runs, and the critical batch size beside it",
        "How the exponent of D depends on the definition",
        "Steps against batch size",
        "1M: steps to the target loss",
        "A schedule that follows the critical batch size",
        "--batch_schedule cbs_law --cbs_coefficient",
    ]
    places = [text.find(part) for part in parts]
    assert -1 not in places
    assert places == sorted(places)
    page = (tmp_path / "report.html").read_text()
    assert "default-src 'none'" in page
    assert not re.search(r"(?:https?:)?//(?!www\.w3\.org)", re.sub(r"arXiv|\*/|/\*", "", page))
    assert "prefers-color-scheme: dark" in page
    assert "#010203" not in page  # became the colour of the text
    assert page.count("<svg viewBox") + page.count("<svg xmlns") >= 7
    names = {path.name for path in tmp_path.glob("*.png")}
    assert names == {
        "cbs-law-N.png",
        "cbs-law-D.png",
        "cbs-trade-off.png",
        "cbs-noise-scale.png",
        *(f"cbs-steps-{number}.png" for number in (1, 2, 3)),
    }


def test_the_page_the_file_and_the_terminal_say_the_same(tmp_path: Path, capsys) -> None:
    csv = "\n".join(["batch_size,steps", *(f"{b},{A + B / b}" for b in (4, 8, 16, 32, 64))])
    (tmp_path / "mine.csv").write_text(csv)
    words = ["--reference", "8", "--tokens", "3M", "--tokens_per_sequence", "128"]
    assert main(["cbs", "fit", str(tmp_path / "mine.csv"), *words]) == 0
    terminal = " ".join(capsys.readouterr().out.split())
    reader = checked(tmp_path / "report.html")
    page = " ".join(" ".join(reader.texts).split())
    values = json.loads((tmp_path / "report.json").read_text())
    for sentence in [*values["findings"], *values["limits"], values["schedule_note"]]:
        assert " ".join(sentence.split()) in terminal
        assert " ".join(sentence.split()) in page
    flags = " ".join(f"--{name} {value}" for name, value in values["schedule"].items())
    assert flags in terminal
    assert flags in page
    # 1.2 reference + 0.2 b / a
    assert values["sweeps"][0]["critical_batch_size"]["sequences"] == pytest.approx(9.6 + 20)
    assert "29.6" in page


def test_texts_of_users_stay_texts(tmp_path: Path) -> None:
    sweeps = [
        sweep(name, parameters=1e6 * (1 + place), setup={name: name})
        for place, name in enumerate(HOSTILE)
    ]
    sweeps.append(sweep("<b>lost</b>", reached=8))
    reader = page_of(sweeps, tmp_path)  # which allows neither script nor img
    assert "b" not in reader.tags
    text = " ".join(" ".join(reader.texts).split())
    for name in (*HOSTILE, "<b>lost</b>"):
        assert " ".join(name.split()) in text
    svgs = re.findall(r"<svg.*?</svg>", (tmp_path / "report.html").read_text(), flags=re.DOTALL)
    assert not [svg for svg in svgs if "alert" in svg or "7 * 7" in svg]


def test_steps_are_shown_with_the_curve_linear_scaling_and_the_critical_point() -> None:
    [each] = report_of([sweep(a=A, b=B)]).sweeps
    figure = drawn(steps_picture(each, 0))
    above, below = figure.axes
    found = curves(above)
    start = (A + B / REFERENCE) * REFERENCE
    sizes, fitted = found["fitted a + b/B"]
    assert fitted == pytest.approx(A + B / sizes, rel=1e-6)
    sizes, linear = found["linear scaling"]
    assert linear == pytest.approx(start / sizes, rel=1e-6)
    sizes, wasteful = found["20 % above it"]
    assert wasteful == pytest.approx(1.2 * start / sizes, rel=1e-6)
    star = 1.2 * REFERENCE + 0.2 * B / A
    [point] = marks(above, "D")
    assert point == pytest.approx((star, 1.2 * start / star), rel=1e-6)
    [point] = marks(below, "D")
    assert point == pytest.approx((star, 1.2), rel=1e-6)
    ends = sorted(x for x, _ in marks(above, "|"))
    assert ends == pytest.approx(list(each.critical.interval))
    runs = [line for line in above.lines if line.get_marker() == "o"]
    filled = [line for line in runs if line.get_markerfacecolor() != "none"]
    assert (len(runs), len(filled)) == (18, 12)
    assert above.get_xscale() == above.get_yscale() == "log"
    labels = [label.get_text() for label in below.get_yticklabels()]
    assert {"1", "1.2", "2"} <= set(labels)


def test_what_did_not_reach_the_target_is_a_bound_with_an_arrow(tmp_path: Path) -> None:
    for reached, bounds in ((64, {128}), (8, {16, 32, 64, 128})):
        [each] = report_of([sweep(reached=reached)]).sweeps
        figure = drawn(steps_picture(each, 0))
        arrows = {float(text.xy[0]): float(text.xy[1]) for text in figure.axes[0].texts}
        assert set(arrows) == bounds
        assert arrows[128] == pytest.approx(2 * (A + B / 128) / 1.02)  # of both seeds
    assert steps_picture(each, 0).caption == "Not fitted."
    page_of([sweep(reached=8)], tmp_path)
    assert (tmp_path / "cbs-steps-1.png").exists()


def test_the_law_is_drawn_through_the_points_with_its_band_and_predictions() -> None:
    report = report_of(several(), predict_parameters=[8e6])
    [axes] = drawn(law_picture(report, "N")).axes
    x, y = next(line for line in axes.lines if len(line.get_xdata()) == 100).get_data()
    law = report.laws["N"]
    assert y == pytest.approx(law.coefficient * x ** law.exponents[0])
    assert x[-1] >= 8
    [band] = axes.collections
    low, high = band.get_paths()[0].get_extents().intervaly
    assert low < y.min() < y.max() < high
    [hollow] = [line for line in axes.lines if line.get_markerfacecolor() == "none"]
    assert hollow.get_data()[1][0] == pytest.approx(law.coefficient * 8 ** law.exponents[0])
    few = law_picture(report_of(several()[:2]), "N")
    assert not drawn(few).axes[0].collections
    assert "Band" not in few.caption
    none = law_picture(report_of([sweep(), sweep()]), "N")
    assert none.draw is None
    assert none.svg() == ""


def test_the_knee_of_the_trade_off_is_at_twice_the_least_of_both() -> None:
    [axes] = drawn(trade_off_picture(report_of([sweep()]))).axes
    [ring] = [line for line in axes.lines if line.get_markerfacecolor() == "none"]
    assert (ring.get_xdata()[0], ring.get_ydata()[0]) == pytest.approx((2 * B, 2 * A), rel=1e-6)
    examples, steps = next(line for line in axes.lines if len(line.get_xdata()) > 1).get_data()
    assert (steps / A - 1) * (examples / B - 1) == pytest.approx(np.ones(len(steps)), rel=1e-6)


def test_the_noise_scale_has_its_own_axis_and_name() -> None:
    report = report_of(several())
    picture = noise_picture(report)
    left, right = drawn(picture).axes
    assert left.get_ylabel() == "noise scale (sequences)"
    assert right.get_xlabel() == "critical\nbatch size"
    sizes, scales = left.lines[0].get_data()
    assert list(scales) == pytest.approx([10 + size for size in sizes])
    assert len(left.lines) == 2  # of the third it was not measured
    assert "two quantities" in picture.caption
    assert left.get_ylim() == right.get_ylim()
    stars = [
        float(line.get_ydata()[0]) for line in right.lines if line.get_marker() not in ("", "None")
    ]
    assert stars == pytest.approx([9.6 + 0.2 * B * n / A for n in (1, 2)], rel=1e-3)
    unmeasured = noise_picture(report_of([sweep(noise=False)]))
    assert unmeasured.draw is None
    assert "not measured" in unmeasured.caption


@pytest.mark.parametrize("overhead", [0.05, 0.2, 1.0, 9.0])
def test_any_definition_can_be_drawn(overhead: float) -> None:
    [each] = report_of([sweep()], overhead=overhead, reference=1).sweeps
    below = drawn(steps_picture(each, 0)).axes[1]
    ticks = list(below.get_yticks())
    assert ticks == sorted(set(ticks))
    assert 1 + overhead in ticks
    low, high = below.get_ylim()
    assert low < 1 + overhead < high


def extreme(kind: str) -> FitReport:
    sizes = (4, 8, 16, 32)
    steps = {
        "no curvature": [9000 / size**1.1 for size in sizes],
        "no speed-up": [90 * size**0.1 for size in sizes],
        "perfect": [10 + 100 / size for size in sizes],
        "huge": [1e9 + 1e15 / size for size in sizes],
        "nothing": [None] * 4,
    }[kind]
    runs = [SweepRun(batch_size=b, steps=s) for b, s in zip(sizes, steps, strict=True)]
    return report_of([Sweep(name=kind, runs=runs, reference=8)])


@pytest.mark.parametrize("kind", ["no curvature", "no speed-up", "perfect", "huge", "nothing"])
def test_extreme_sweeps_have_a_page(tmp_path: Path, kind: str) -> None:
    reader = checked(write_page(extreme(kind), tmp_path))
    text = " ".join(reader.texts)
    assert "nan" not in text.split()
    assert kind in text
    assert ("No run of it has a step." in text) == (kind == "nothing")


def test_pictures_of_an_earlier_page_are_gone_and_others_stay(tmp_path: Path) -> None:
    (tmp_path / "cbs-mine.png").touch()
    Image.new("RGB", (1, 1), "white").save(tmp_path / "cbs-mine.png")
    for stale in ("cbs-steps-2.png", "cbs-law-D.png", "cbs-noise-scale.png"):
        (tmp_path / stale).touch()
    page_of([sweep(noise=False)], tmp_path)
    names = {path.name for path in tmp_path.glob("*.png")}
    assert names == {"cbs-mine.png", "cbs-steps-1.png", "cbs-trade-off.png"}


def test_a_set_up_that_sweeps_share_is_shown_once(tmp_path: Path) -> None:
    reader = page_of([sweep("x", setup={"k": "v"}), sweep("y", setup={"k": "v"})], tmp_path)
    assert "x, y" in [text.strip() for text in reader.texts]
    assert [text.strip() for text in reader.texts].count("v") == 1
