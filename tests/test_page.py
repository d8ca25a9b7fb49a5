"""The report's page: whole without anything else, true to any name, and readable in every case."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest

from hf_adaptive_batch.report.comparison import Comparison, Contender
from hf_adaptive_batch.report.drawing import style_of
from hf_adaptive_batch.report.history import Evaluation, RunHistory
from hf_adaptive_batch.report.lines import Line, binned, loss_limits, mean_line, sizes, thinned
from hf_adaptive_batch.report.page import write_comparison, write_report
from hf_adaptive_batch.report.panels import Group, panels_of
from hf_adaptive_batch.report.records import FIELDS
from hf_adaptive_batch.report.sweep import sweep_panel
from tests.pages import HOSTILE, Reader, checked


def history(
    name: str = "run",
    losses: tuple[float, ...] = (9.0, 4.0, 3.0, 2.5, 2.2, 2.0),
    *,
    decisions: int = 40,
    timed: bool = True,
    noise: float | None = 30.0,
    tokens: int = 16,
) -> RunHistory:
    records: dict[str, list] = {field: [None] * decisions for field in FIELDS}
    seen = 0
    for index in range(decisions):
        size, following = (
            8 * 2 ** (10 * at // max(decisions, 10) // 3) for at in (index, index + 1)
        )
        seen += size
        values = {"step": index + 1, "samples_seen": seen, "tokens_seen": tokens * seen}
        values |= {"global_batch_size": size, "next_global_batch_size": following}
        values |= {"loss": 9 / (index + 1) + 2, "learning_rate": 1e-3 * (1 - index / 50)}
        if noise is not None and index > 5:
            values["noise_scale"] = noise * (1 + index)
        for field, value in values.items():
            records[field][index] = value
    total = seen or 100
    evaluations = [
        Evaluation(
            step=max(decisions, 10) * number // len(losses),
            samples_seen=total * number // len(losses),
            tokens_seen=tokens * (total * number // len(losses)),
            seconds=2.0 * number if timed else None,
            loss=loss,
        )
        for number, loss in enumerate(losses, start=1)
    ]
    return RunHistory(name=name, records=records, evaluations=evaluations)


def contender(name: str, *runs: RunHistory, **values) -> Contender:
    given = {
        "settings": {"batch_schedule": name},
        "learning_rate": 1e-3,
        "tried": {5e-4: 2.3, 1e-3: 2.1, 2e-3: math.nan},
        "seeds": list(range(len(runs))),
    }
    return Contender(name=name, runs=runs, **{**given, **values})


def comparison(*contenders: Contender, **values) -> Comparison:
    given = {
        "title": "Title",
        "target_loss": 2.3,
        "failed": [],
        "note": "",
        "setup": {"flags": {"seed": 1}, "machine": "2 cores"},
    }
    return Comparison(contenders=contenders, **{**given, **values})


def hostile_comparison() -> Comparison:
    return comparison(
        *(contender(name, history(), history()) for name in HOSTILE),
        title=HOSTILE[0],
        note=HOSTILE[1],
        failed=HOSTILE,
        setup={HOSTILE[0]: HOSTILE[1], "flags": {HOSTILE[1]: HOSTILE[0]}},
    )


@pytest.fixture(scope="module")
def hostile_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_comparison(hostile_comparison(), tmp_path_factory.mktemp("hostile"))


def test_a_comparison_has_its_parts_in_their_order(tmp_path: Path) -> None:
    given = comparison(
        contender("alpha", history(), history()),
        contender("beta", history(losses=(9.0, 3.0, 1.5)), history(losses=(9.0, 3.0, 1.7))),
        failed=["beta, seed 7: out of memory"],
        note="a remark",
    )
    path = write_comparison(given, tmp_path / "new" / "folder")
    reader = checked(path)
    text = " ".join(" ".join(reader.texts).split())
    parts = [
        given.findings()[0],
        "against the first",
        "lowest 1.6000 ± 0.1414",
        "Thin lines: each seed.",
        "Validation loss against tokens",
        "Validation loss against optimizer steps",
        "Validation loss against time",
        "Global batch size against tokens",
        "Noise scale against tokens",
        "Learning rate against tokens",
        "Final loss against learning rate",
        "Set-up",
        "2 cores",
        "beta, seed 7: out of memory",
        "a remark",
    ]
    places = [text.rfind(part) for part in parts]
    assert -1 not in places
    assert places[1:] == sorted(places[1:])
    assert text.index(parts[0]) < places[1]
    assert text.count("lowest") == 1
    assert json.loads(path.with_suffix(".json").read_text())["title"] == "Title"
    assert len(list(path.parent.glob("report-*.png"))) == 7


def test_a_page_asks_for_nothing_from_anywhere(hostile_page: Path) -> None:
    page = hostile_page.read_text()
    identifiers = {"http://www.w3.org/2000/svg", "http://example.com/x.png"}  # the latter in names
    assert set(re.findall(r"https?://[^\s\"'<>]*", page)) <= identifiers
    assert "@import" not in page
    assert "src=" not in page.replace("&lt;img src=", "")
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    assert f'http-equiv="Content-Security-Policy" content="{policy}"' in page


def test_names_are_shown_as_they_are_and_never_run(hostile_page: Path) -> None:
    path = hostile_page
    reader = checked(path)  # no script, no img, although names hold both
    for name in HOSTILE:
        assert any(name in text for text in reader.texts)
    assert "<script" not in path.read_text()
    values = json.loads(path.with_suffix(".json").read_text())
    assert [row["name"] for row in values["rows"]] == HOSTILE
    svgs = re.findall(r"<svg viewBox.*?</svg>|<svg xmlns.*?</svg>", path.read_text(), re.DOTALL)
    assert not any("alert" in svg for svg in svgs)


def test_the_check_of_a_page_finds_an_element_that_is_left_open() -> None:
    with pytest.raises(AssertionError):
        Reader("<div><b></div>")
    with pytest.raises(AssertionError):
        Reader("<div><b></b>")


def test_the_same_numbers_give_the_same_bytes(hostile_page: Path, tmp_path: Path) -> None:
    write_comparison(hostile_comparison(), tmp_path)
    first = {path.name: path.read_bytes() for path in hostile_page.parent.iterdir()}
    assert first == {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert len(first) == 9


def test_a_page_follows_the_colours_of_its_reader(hostile_page: Path) -> None:
    page = hostile_page.read_text()
    assert "prefers-color-scheme: dark" in page
    assert page.count("currentColor") > 50
    assert "#010203" not in page
    assert not re.search(r"(fill|stroke): ?(#000000|#ffffff)", page)


def test_a_page_of_many_long_runs_stays_small(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    losses = tuple(4 + rng.normal(size=400))
    runs = [history(losses=losses, decisions=3000) for _ in range(3)]
    contenders = [contender(f"c{index}", *runs) for index in range(6)]
    path = write_comparison(comparison(*contenders), tmp_path)
    checked(path)
    assert path.stat().st_size < 400_000


NOTHING = RunHistory(name="nothing", records={name: [] for name in FIELDS}, evaluations=[])


@pytest.mark.parametrize(
    ("runs", "said"),
    [
        ([NOTHING], "No run has evaluated its validation loss."),
        ([history(losses=())], "No run has evaluated its validation loss."),
        ([history(decisions=0)], "averages between two evaluations"),
        ([history(losses=(math.nan, math.nan))], "no evaluation with a finite loss"),
        ([history(losses=(1e9, 1e12, 1e15)), history(), history()], "1 curve lies wholly above"),
        ([history(losses=(3.0, 1e30, 1e308)), history()], "Cut off above"),
        ([history(timed=False)], "and a known time"),
        ([history(noise=None)], "The noise scale was never measurable"),
        ([history(noise=-1.0)], "The noise scale was never measurable"),
        ([history(tokens=0)], "Validation loss against samples"),
        ([history()], "Validation loss against tokens"),
    ],
)
def test_a_panel_says_what_it_cannot_show(runs: list[RunHistory], said: str) -> None:
    panels = panels_of([Group(name="g", runs=[run]) for run in runs], 2.0)
    assert any(said in f"{panel.title} {panel.caption}" for panel in panels)
    assert all(panel.curves or panel.caption for panel in panels)


@pytest.mark.parametrize(
    ("runs", "said"),
    [
        ([NOTHING], "No run has evaluated its validation loss."),
        ([history(losses=())], "No run has evaluated its validation loss."),
        ([history(timed=False, noise=None, tokens=0)], "Validation loss against samples"),
        ([history(decisions=1, losses=(2.0,))], "8 throughout"),
        (
            [
                NOTHING,
                history(losses=(3.0, 2.0, math.nan)),
                history(losses=(3.0, 1e30, 1e308)),
                history(decisions=0),
                history(losses=(math.nan,)),
                history(noise=1e-300),
            ],
            "1.000e+308",
        ),
        ([history(name) for name in HOSTILE * 2], "$x_1$"),
    ],
    ids=["nothing", "no evaluations", "bare", "one step", "all sorts", "twelve"],
)
def test_single_runs_are_reported_whatever_they_lack(
    tmp_path: Path, runs: list[RunHistory], said: str
) -> None:
    path = write_report(runs, tmp_path, title="t")
    reader = checked(path)
    assert said in " ".join(" ".join(reader.texts).split())
    values = json.loads((tmp_path / "report.json").read_text())
    assert [len(run["evaluations"]) for run in values["runs"]] == [len(r.evaluations) for r in runs]


@pytest.mark.parametrize(
    "contenders",
    [
        [contender("one", history())],
        [contender("a", history(losses=(), decisions=1), tried={1e-3: math.nan, 1e-2: math.inf})],
        [
            contender("a", history(), history(losses=(2.0,))),
            contender("b", history(losses=(9.0, 1e40)), tried={}, learning_rate=None),
            contender("c", history(decisions=0), history(losses=(math.nan,))),
            contender("d", NOTHING, tried={1e-3: math.nan}),
        ],
    ],
    ids=["one", "sweep failed", "all sorts"],
)
def test_comparisons_are_reported_whatever_they_lack(
    tmp_path: Path, contenders: list[Contender]
) -> None:
    target = 2.3 if contenders[0].runs[0].evaluations else math.nan
    path = write_comparison(comparison(*contenders, target_loss=target), tmp_path)
    reader = checked(path)
    assert any("Global batch size" in text for text in reader.texts)
    assert "Final loss against learning rate" in reader.texts


def test_a_report_of_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"histories \(0 runs\) must not be empty"):
        write_report([], tmp_path, title="t")


def test_a_picture_of_an_earlier_report_does_not_outlive_its_curves(tmp_path: Path) -> None:
    earlier = tmp_path / "report-noise-scale.png"
    earlier.write_bytes(b"of an earlier report")
    write_report([NOTHING], tmp_path, title="t")
    assert not earlier.exists()


def luminance(color: str) -> float:
    parts = [int(color[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    red, green, blue = (x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_every_style_is_its_own_and_readable_on_white_and_near_black() -> None:
    styles = [style_of(group) for group in range(24)]
    assert len(set(styles)) == 24
    assert len({(style.dashes, style.marker) for style in styles}) == 24  # without any colour, too
    for style in styles:
        light = luminance(style.color)
        assert 1.05 / (light + 0.05) >= 3
        assert (light + 0.05) / (luminance("#131417") + 0.05) >= 3


def test_the_range_of_losses_shows_the_end_and_what_ends_badly() -> None:
    curve = np.array([100.0, 50.0, *np.linspace(3.0, 2.0, 18)])
    limits, sentence = loss_limits([curve], None)
    assert limits is not None
    assert limits[0] < 2.0 < 2.7 < limits[1] < 4
    assert sentence.startswith("Cut off above")
    worse, _ = loss_limits([curve, curve + 0.5], None)
    assert worse is not None
    assert worse[1] > 2.5
    diverged, sentence = loss_limits([curve, curve, curve * 1e9], None)
    assert diverged is not None
    assert diverged[1] < 4
    assert "1 curve lies wholly above" in sentence
    assert loss_limits([np.array([2.0, 2.0])], None)[1] == ""
    assert loss_limits([], 2.0) == (None, "")


def line(progress: list[float], y: list[float], x: list[float] | None = None) -> Line:
    return Line(progress=np.array(progress), x=np.array(x or progress), y=np.array(y))


def test_the_mean_of_seeds_is_taken_at_equal_progress_and_no_further_than_all_got() -> None:
    mean = mean_line(
        [line([0, 10, 20], [4, 2, 1], [0, 1, 2]), line([0, 5, 10], [6, 5, 4], [0, 2, 4])]
    )
    assert mean is not None
    assert list(mean.progress) == [0, 5, 10]
    assert list(mean.y) == [5, 4, 3]
    assert list(mean.x) == [0, 1.25, 2.5]
    steps = mean_line([line([0, 10], [8, 16]), line([0, 5, 10], [8, 32, 32])], "steps")
    assert steps is not None
    assert list(steps.y) == [8, 20, 24]
    logs = mean_line([line([0, 10], [1, 1]), line([0, 10], [100, 10_000])], "log")
    assert logs is not None
    assert list(logs.y) == pytest.approx([10, 100])
    assert mean_line([line([0, 1], [1, 1]), line([5, 6], [1, 1])]) is None
    assert mean_line([line([0, 1], [1, 1]), line([], [])]) is None


def test_sizes_begin_at_zero_and_hold_until_the_end() -> None:
    def columns(seen: list[int], now: list[int], following: list[int]) -> RunHistory:
        values = {"step": seen, "samples_seen": seen, "global_batch_size": now}
        return RunHistory(
            name="run", records=values | {"next_global_batch_size": following}, evaluations=[]
        )

    dense = sizes(columns([4, 8, 16], [4, 4, 8], [4, 8, 16]), "samples")
    assert list(zip(dense.x, dense.y, strict=True)) == [(0, 4), (8, 8), (16, 8)]
    last = Evaluation(step=9, samples_seen=64, tokens_seen=0, seconds=None, loss=2.0)
    sparse = columns([16], [4], [8])
    sparse = RunHistory(name="run", records=sparse.records, evaluations=[last])
    found = sizes(sparse, "samples")
    assert list(zip(found.x, found.y, strict=True)) == [(0, 4), (16, 8), (64, 8)]
    earlier = Evaluation(step=5, samples_seen=20, tokens_seen=0, seconds=None, loss=2.0)
    only = RunHistory(name="run", records={"step": []}, evaluations=[earlier, last])
    found = sizes(only, "samples")
    assert list(zip(found.x, found.y, strict=True)) == [(0, 4), (20, 11), (64, 11)]


def test_thinned_and_binned_lines_keep_what_they_stand_for() -> None:
    every = line(list(range(1000)), list(range(1000)))
    few = thinned(every, 10)
    assert len(few.x) == 10
    assert (few.x[0], few.x[-1]) == (0, 999)
    means = binned(every, 10)
    assert list(means.y) == pytest.approx([49.5 + 100 * index for index in range(10)], abs=1)
    assert binned(few, 10) is few


def test_a_sweep_shows_what_diverged_apart_from_what_it_reached() -> None:
    tried = {1e-4: 2.5, 1e-3: 2.0, 1e-2: 90.0, 1e-1: math.nan}
    panel = sweep_panel([tried, {}], [1e-3, None])
    assert panel is not None
    assert list(panel.curves[0].x) == [1e-4, 1e-3]
    assert list(panel.curves[0].marked) == [1]
    assert list(panel.curves[0].beyond) == [1e-2, 1e-1]
    assert sweep_panel([{}, {}], [None, None]) is None


def test_long_runs_are_shown_in_hours() -> None:
    labels = []
    for seconds in (60.0, 3_000.0, 90_000.0):
        last = Evaluation(step=1, samples_seen=1, tokens_seen=1, seconds=seconds, loss=2.0)
        run = RunHistory(name="run", records={}, evaluations=[last])
        (panel,) = (p for p in panels_of([Group(name="g", runs=[run])]) if p.key == "loss-seconds")
        labels.append((panel.x_label, float(panel.curves[0].x[0])))
    assert labels == [
        ("training time (seconds)", 60.0),
        ("training time (minutes)", 50.0),
        ("training time (hours)", 25.0),
    ]
