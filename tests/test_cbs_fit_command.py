"""`cbs fit` and `cbs advise`: what is printed and written, against formulas written out here."""

import contextlib
import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from hf_adaptive_batch.cbs import (
    ZHANG_2025,
    Sweep,
    SweepRun,
    fit_steps_to_target,
    write_sweeps,
)
from hf_adaptive_batch.cbs.report.fit_laws import FittedSweep
from hf_adaptive_batch.cbs.report.fit_report import report_of
from hf_adaptive_batch.cbs.report.fit_sentences import limits
from hf_adaptive_batch.cbs.report.fit_table import show
from hf_adaptive_batch.cbs.report.quantities import compact, quantity
from hf_adaptive_batch.cli import main


# Zhang et al. 2025: parameters and sequences in millions, and their notebook's b and a.
ZHANG_N = [85, 151, 302, 604, 1200]
ZHANG_SEQUENCES = [3.4, 6, 12, 24, 48]
ZHANG_B = [2.834e6, 5.677e6, 1.138e7, 1.945e7, 4.338e7]
SIZES = [4, 8, 16, 32, 64, 128]
ZHANG_A = [1293.8, 1752.4, 2095.3, 2459.9, 3897.3]


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict]:
    """The command on the published table, once: its pictures take seconds."""
    folder, out = tmp_path_factory.mktemp("published"), io.StringIO()
    words = ["--predict_parameters", "2B", "--predict_tokens", "1T"]
    with contextlib.redirect_stdout(out):
        assert main(["cbs", "fit", "published", "--output", str(folder), *words]) == 0
    text = " ".join(out.getvalue().split())
    return text, json.loads((folder / "report.json").read_text())


@pytest.fixture(autouse=True)
def narrow(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(tmp_path)


def runs(a: float, b: float, sizes=(4, 8, 16, 32, 64, 128), reached=math.inf, **values):
    return tuple(
        SweepRun(
            batch_size=size,
            steps=a + b / size if size <= reached else None,
            trained_steps=2 * (a + b / size) if size <= reached else 77 + size,
            **values,
        )
        for size in sizes
    )


def sweep(name: str, a: float, b: float, *, reached=math.inf, noise=None, **values) -> Sweep:
    given = {"tokens_per_sequence": 128, "reference": 8, "target_loss": 2.5}
    return Sweep(name=name, runs=runs(a, b, reached=reached, noise_scale=noise), **given | values)


def fitted(capsys, *words: str, status: int = 0) -> tuple[str, dict]:
    """The text in one line, so that no wrapping matters, and the numbers."""
    assert main(["cbs", "fit", *words]) == status
    text = capsys.readouterr().out
    page = Path(text.split("report  ")[1].strip())
    return " ".join(text.split()), json.loads(page.with_name("report.json").read_text())


def told(sweeps, **options) -> tuple[str, dict]:
    """The same without a page."""
    report, out = report_of(sweeps, **options), io.StringIO()
    show(report, Console(file=out, width=80, highlight=False))
    lines = out.getvalue().splitlines()
    assert max(len(line) for line in lines if not line.startswith("--")) <= 80
    return " ".join(out.getvalue().split()), report.as_json()


def critical(a, b, overhead=0.2, reference=256):
    """Where a + b / B = (1 + overhead) (a + b / reference) reference / B, by bisection."""

    def excess(size):
        return (a + b / size) / ((a + b / reference) * reference / size) - 1 - overhead

    low, high = reference, 1e12
    for _ in range(200):
        middle = math.sqrt(low * high)
        low, high = (low, middle) if excess(middle) > 0 else (middle, high)
    return low


def slope(x, y) -> float:
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def test_the_published_table_gives_the_published_laws_and_a_schedule(published) -> None:
    text, values = published
    assert "93.20 N^0.468 sequences, N in millions of parameters" in text
    assert "22.72 D^0.468 sequences, D in millions of tokens" in text
    found = [each["critical_batch_size"]["sequences"] for each in values["sweeps"]]
    assert found == pytest.approx([745.3, 955.2, 1393.7, 1888.5, 2533.4], abs=0.05)
    assert found == pytest.approx(list(map(critical, ZHANG_A, ZHANG_B)), rel=1e-3)
    assert "At 2B parameters the law says 3,275 sequences" in text
    assert "At 1T tokens" in text
    assert [each["at"] for each in values["predictions"]] == [2e9, 1e12]
    # In tokens 22.72 (D / 1e6)^0.4682 x 512.
    coefficient = 22.72 / 1e6**0.4682 * 512
    flags = text.split("--batch_schedule cbs_law --cbs_coefficient ")[1].split()
    assert float(flags[0]) == pytest.approx(coefficient, rel=2e-3)
    assert flags[1] == "--cbs_exponent"
    assert float(flags[2]) == pytest.approx(0.468, abs=1e-3)
    assert "Its exponent was measured, by 5 sweeps" in text
    assert "assumption" not in text


def test_the_flags_of_the_schedule_are_those_of_the_trainer() -> None:
    from hf_adaptive_batch.schedule_arguments import ScheduleOptions

    report = report_of([sweep("one", 50, 3000, tokens=3e6)])
    names = [flag.split()[0] for flag in report.schedule_flags]
    assert names == ["--batch_schedule", "--cbs_coefficient", "--cbs_exponent"]
    assert {name[2:] for name in names[1:]} <= {*ScheduleOptions.__dataclass_fields__}


def test_the_terminal_is_readable_at_80_columns(capsys) -> None:
    write_sweeps([sweep("a" * 30, 50, 9e8, noise=1e6), sweep("[b]", 5, 3, noise=1e-3)], "s.json")
    assert main(["cbs", "fit", "s.json"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(len(line) for line in lines if not line.startswith("report")) <= 80
    assert not [line for line in lines if "…" in line]
    assert any(line.startswith("- [b]: critical") for line in lines)


def test_plain_space_is_another_law() -> None:
    text, _ = told(ZHANG_2025, space="plain")
    law = text.split("Critical batch size = ")[1].split(" sequences")[0].split(" N^")
    assert float(law[0]) == pytest.approx(99.5, abs=0.1)
    assert float(law[1]) == pytest.approx(0.458, abs=0.001)


def test_the_exponent_is_shown_for_other_constants_of_the_definition(published) -> None:
    text, values = published
    tokens = [512 * each for each in ZHANG_SEQUENCES]
    table = text.split("steps above linear from 64 from 256 from 1,024 ")[1].split(" A schedule")[0]
    cells = table.replace(" %", "").split()
    for row, overhead in enumerate((0.1, 0.2, 0.5, 1.0)):
        head, *exponents = cells[4 * row : 4 * row + 4]
        assert float(head) == pytest.approx(100 * overhead)
        for exponent, reference in zip(exponents, (64, 256, 1024), strict=True):
            sizes = [
                critical(a, b, overhead, reference) for a, b in zip(ZHANG_A, ZHANG_B, strict=True)
            ]
            assert float(exponent) == pytest.approx(slope(tokens, sizes), abs=2e-3)
    assert len(values["sensitivity"]["rows"]) == 12
    knee = slope(tokens, [b / a for a, b in zip(ZHANG_A, ZHANG_B, strict=True)])
    assert f"The knee of the same fits grows as D^{knee:.3f}." in text
    assert "0.195 (10 % from 1,024 sequences) to 0.602 (100 % from 64 sequences)" in text


def test_other_constants_are_one_flag_away(capsys) -> None:
    text, values = told(ZHANG_2025, overhead=0.5, reference=1024)
    sizes = [critical(a, b, 0.5, 1024) for a, b in zip(ZHANG_A, ZHANG_B, strict=True)]
    found = [each["critical_batch_size"]["sequences"] for each in values["sweeps"]]
    assert found == pytest.approx(sizes, rel=1e-3)
    assert f"N^{slope(ZHANG_N, sizes):.2f}" in text
    assert "from 1,024 sequences by 50 %" in text
    write_sweeps([ZHANG_2025[0]], "one.json")
    words = ("--overhead", "0.5", "--reference", "1024", "--confidence", "0.5")
    text, values = fitted(capsys, "one.json", *words)
    assert values["sweeps"][0]["critical_batch_size"]["sequences"] == pytest.approx(found[0])
    assert "50 % interval" in text
    assert values["sweeps"][0]["fit"]["a_interval"] == list(ZHANG_2025[0].fit(0.5).a_interval)


def test_n_and_d_are_told_apart_where_they_vary_by_themselves(published) -> None:
    sweeps = [
        # The knee grows as N^0.1 D^0.6, and with a reference of nearly 0 so does the critical size.
        sweep(
            f"{n}M, {d}M",
            100,
            100 * 50 * n**0.1 * d**0.6,
            parameters=n * 1e6,
            tokens=d * 1e6,
            reference=1e-6,
        )
        for n, d in ((1, 20), (2, 20), (4, 20), (1, 80), (4, 80))
    ]
    text, values = told(sweeps)
    assert values["laws"]["ND"]["exponents"] == pytest.approx([0.1, 0.6], abs=1e-3)
    assert "N^0.100 D^0.600 sequences" in text
    assert "along their line only" not in text
    text, values = published
    assert "ND" not in values["laws"]
    assert "No law of N and D: x (N, D) must vary independently" in text
    assert "does not say what N does at a fixed D" in text


def test_at_a_fixed_d_there_is_a_law_of_n_only() -> None:
    sweeps = [sweep(f"{n}", 50, 900 * n, parameters=n * 1e6, tokens=5e6) for n in (1, 2, 4)]
    text, values = told(sweeps, predict_tokens=[9e6])
    assert list(values["laws"]) == ["N"]
    assert "No law of D:" in text
    assert "No prediction from D: there is no law of it." in text
    assert values["sensitivity"]["variable"] == "N"
    assert "along their line only" not in text
    assert "the exponent is the published one (0.468, Zhang et al. 2025), an assumption" in text


def test_a_sweep_that_cannot_be_fitted_is_named_with_its_bounds_and_hides_no_other(capsys) -> None:
    lost = sweep("lost", 50, 3000, reached=8, parameters=1e6)
    write_sweeps([lost], "lost.json")
    text, values = fitted(capsys, "lost.json", status=1)
    assert "lost is not fitted: batch sizes that reached the target (2) must be three" in text
    assert "a batch of 16 takes more than 93 steps (1 of 1 runs)" in text
    assert values["sweeps"][0]["fit"] is None
    assert values["schedule"] is None
    good = sweep("good", 60, 6000, reached=64, parameters=2e6, tokens=4e6)
    write_sweeps([lost, good], "both.json")
    text, values = fitted(capsys, "both.json")
    assert "lost is not fitted" in text
    assert "good: critical batch size 29.6 sequences, 3,789 tokens" in text
    assert "good: some batch sizes did not reach the target" in text
    assert "good, not reached: a batch of 128 takes more than 205 steps" in text
    assert values["sweeps"][1]["critical_batch_size"]["sequences"] == pytest.approx(9.6 + 20)


def test_bounds_are_what_all_seeds_passed() -> None:
    measured = [
        *runs(50, 3000, sizes=(4, 8), seed=0),
        SweepRun(batch_size=16, steps=None, trained_steps=90, seed=0),
        SweepRun(batch_size=16, steps=None, trained_steps=80, seed=1),
        SweepRun(batch_size=16, steps=200, trained_steps=200, seed=2),
        SweepRun(batch_size=16, steps=None, trained_steps=10, chosen=False),
        SweepRun(batch_size=32, steps=None),
    ]
    text = " ".join(limits(report_of([Sweep(name="few", runs=measured)])))
    assert "a batch of 16 takes more than 80 steps (2 of 3 runs)" in text
    measured[4] = SweepRun(batch_size=16, steps=None, trained_steps=10)
    given = Sweep(name="few", runs=measured)
    assert FittedSweep(sweep=given, overhead=0.2, reference=8).bounds[0] == (16, 10)
    text = " ".join(limits(report_of([Sweep(name="few", runs=measured[5:])])))
    assert "a batch of 32 takes more steps than trained (1 of 1 runs)" in text


def test_without_curvature_there_is_no_size_and_no_schedule(capsys) -> None:
    # Steps fall even faster than the batch grows.
    values = [SweepRun(batch_size=b, steps=9000 / b**1.1) for b in (4, 8, 16, 32)]
    write_sweeps([Sweep(name="flat", runs=values, tokens_per_sequence=2, tokens=1e4)], "s.json")
    text, found = fitted(capsys, "s.json")
    assert "flat: steps fall in proportion to the batch" in text
    assert "No schedule:" in text
    assert found["sweeps"][0]["critical_batch_size"]["sequences"] is None
    assert not found["sweeps"][0]["critical_batch_size"]["is_finite"]


def test_a_sweep_without_a_size_does_not_take_the_others_schedule() -> None:
    good = sweep("good", 60, 6000, tokens=4e6)
    flat = [SweepRun(batch_size=b, steps=9000 / b**1.1) for b in (4, 8, 16, 32)]
    both = [Sweep(name="flat", runs=flat, tokens_per_sequence=128, tokens=1e4), good]
    assert told(both)[1]["schedule"] == told([good])[1]["schedule"] is not None


def test_a_schedule_that_rests_on_an_extrapolation_says_so() -> None:
    text, _ = told([sweep("far", 1, 30_000, tokens=4e6)])
    assert "It rests on critical batch sizes that were not bracketed: far." in text


def test_csv_is_fitted_with_what_flags_say_of_it(capsys) -> None:
    lines = ["batch_size,steps,trained_steps", *(f"{b},{60 + 6000 / b}," for b in (8, 16, 32, 64))]
    Path("mine.csv").write_text("\n".join([*lines, "128,,55"]))
    constants = ("--reference", "8", "--overhead", "0.2")
    text, values = fitted(capsys, "mine.csv", *constants)
    assert "mine: critical batch size 29.6 sequences;" in text
    assert "No schedule:" in text
    words = ("--tokens_per_sequence", "128", "--parameters", "1.4M", "--tokens", "6.6M")
    text, values = fitted(capsys, "mine.csv", *constants, *words)
    assert "mine: critical batch size 29.6 sequences, 3,789 tokens" in text
    assert values["sweeps"][0]["parameters"] == 1.4e6
    coefficient = 29.6 * 128 / 6.6e6**0.468
    assert values["schedule"]["cbs_coefficient"] == pytest.approx(coefficient, rel=1e-4)
    assert values["schedule"]["cbs_exponent"] == 0.468
    assert "an assumption" in text
    assert Path("report.html").exists()  # beside its file


def test_the_noise_scale_is_another_quantity_under_its_own_name(published) -> None:
    text, values = told([sweep("one", 60, 6000, noise=14.8)])
    assert "one: the noise scale of the same runs was 14.8 to 14.8 sequences" in text
    assert "the critical batch size is 2 times its geometric mean" in text
    assert "another quantity than the critical batch size" in text
    assert values["sweeps"][0]["noise_scale_by_batch_size"][4] == pytest.approx(14.8)
    assert "noise" not in published[0]


def test_sweeps_of_different_definitions_are_not_compared_silently() -> None:
    two = [sweep("a", 60, 6000), sweep("b", 60, 6000, reference=4)]
    text, _ = told(two)
    assert "different definitions" in text
    assert "from 8 sequences by 20 %; or from 4 sequences by 20 %" in text
    assert "different definitions" not in told(two, reference=8)[0]
    two[1] = sweep("b", 60, 6000, tokens_per_sequence=64)
    assert "sequences of different or unknown length" in told(two)[0]


def test_runs_of_a_batch_size_are_one_point_of_the_curve() -> None:
    """What a learning rate is off by is in all of them, and no number of seeds takes it away."""
    off = np.random.default_rng(0).normal(0, 0.05, 6)  # at each batch size
    steps = [(60 + 600 / size) * math.exp(each) for size, each in zip(SIZES, off, strict=True)]
    alone = Sweep(
        name="one seed",
        runs=[SweepRun(batch_size=b, steps=s) for b, s in zip(SIZES, steps, strict=True)],
    )
    seeds = [(b, s * f) for b, s in zip(SIZES, steps, strict=True) for f in (0.99, 1, 1 / 0.99)]
    thrice = Sweep(name="three", runs=[SweepRun(batch_size=b, steps=s) for b, s in seeds])
    for found, wanted in zip(thrice.fit().measurements, alone.fit().measurements, strict=True):
        assert found == pytest.approx(wanted)
    assert thrice.fit().knee_interval == pytest.approx(alone.fit().knee_interval, rel=1e-6)
    low, high = fit_steps_to_target(*zip(*seeds, strict=True)).knee_interval
    wide = thrice.fit().knee_interval
    assert high / low < (wide.high / wide.low) ** 0.7  # as if they were independent


def test_a_place_that_is_no_folder_is_refused_before_anything_is_printed(tmp_path, capsys) -> None:
    (tmp_path / "file").write_text("mine")
    for place in ("file", "file/below"):
        assert main(["cbs", "fit", "published", "--output", place]) == 2
        said = capsys.readouterr()
        assert said.out == ""
        assert f"output ({place}) must be a folder that can be written to" in said.err
    assert (tmp_path / "file").read_text() == "mine"


def test_no_law_goes_through_numbers_of_different_definitions() -> None:
    sweeps = [
        sweep(str(size), 60, 6000 * size, tokens=1e6 * size**2, reference=reference)
        for size, reference in ((1, 8), (2, 8), (4, 16))
    ]
    text, values = told(sweeps)
    assert "No law: critical batch sizes of different definitions" in text
    assert (values["laws"], values["schedule"]) == ({}, None)
    assert "No schedule: critical batch sizes of different definitions" in values["schedule_note"]
    assert told(sweeps[1:])[1]["schedule"] is None
    values = told(sweeps, reference=8)[1]
    assert set(values["laws"]) == {"D"}
    assert values["schedule"]["batch_schedule"] == "cbs_law"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", "{", "FILE (a.json) must be the JSON of `cbs measure`"),
        ("a.json", '{"version": 9, "sweeps": []}', "version 9 is not 1"),
        ("a.json", '{"version": 1, "sweeps": []}', "FILE (a.json) must hold a sweep"),
        ("a.json", '{"version": 1, "sweeps": [{"nmae": "x", "runs": []}]}', "unknown names"),
        ("a.csv", "size,steps\n1,2\n", "no such columns"),
        ("a.csv", "batch_size,steps\n1,many\n", "could not convert"),
    ],
)
def test_a_malformed_file_is_a_message(capsys, name: str, content: str, message: str) -> None:
    Path(name).write_text(content)
    assert main(["cbs", "fit", name]) == 2
    assert message in capsys.readouterr().err
    assert not Path("report.html").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere.json"], "FILE (nowhere.json) must be one that can be read"),
        (["published", "--tokens", "3B"], "tokens (3B) must be given for one sweep without it"),
        (["two.json", "--parameters", "3B"], "but 2 are without"),
        (["two.json", "--tokens_per_sequence", "many"], "must be a number above 0"),
        (["published", "--overhead", "-0.2"], "overhead (-0.2) must be above 0"),
        (["published", "--reference", "0"], "reference (0) must be above 0"),
        (["published", "--confidence", "95"], "confidence (95.0) must be between 0 and 1"),
        (["published", "--predict_tokens", "-1"], "predict_tokens (-1) must be a number"),
        (["published", "--output", "compared"], "output (compared) must be another folder"),
    ],
)
def test_a_flag_that_does_not_fit_is_a_message(capsys, words: list[str], message: str) -> None:
    Path("compared").mkdir()
    Path("compared", "compare.lock").touch()
    write_sweeps([Sweep(name=name, runs=runs(50, 3000)) for name in "ab"], "two.json")
    assert main(["cbs", "fit", *words]) == 2
    assert message in capsys.readouterr().err


def test_a_number_that_no_run_can_have_is_told_of_its_sweep(capsys) -> None:
    Path("bad.csv").write_text("batch_size,steps\n8,5\n16,-4\n32,2\n")
    text, _ = fitted(capsys, "bad.csv", status=1)
    assert "bad is not fitted: steps (-4) must be above 0" in text


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1.2B", 1.2e9),
        ("300M", 3e8),
        ("24e9", 2.4e10),
        ("1_000", 1000),
        ("5k", 5000),
        (" 7 T ", 7e12),
    ],
)
def test_quantities_are_read_as_people_write_them(text: str, value: float) -> None:
    assert quantity("tokens", text) == pytest.approx(value)


@pytest.mark.parametrize("text", ["", "0", "-3", "x", "1.2X", "inf", "nan", "1e999", "B"])
def test_what_is_no_quantity_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"tokens .* must be a number above 0, because"):
        quantity("tokens", text)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.1234, "0.123"),
        (29.61, "29.6"),
        (99.96, "100"),
        (745.3, "745"),
        (9999.4, "9,999"),
        (9999.9, "10k"),
        (999_960, "1M"),
        (2_834_258, "2.83M"),
        (24e9, "24B"),
        (math.inf, "∞"),
    ],
)
def test_numbers_are_shown_in_few_digits(value: float, text: str) -> None:
    assert compact(value) == text


N, D, T = 1.2e9, 24e9, 2048
ADVISE = [
    "cbs",
    "advise",
    "--parameters",
    "1.2B",
    "--tokens",
    "24B",
    "--tokens_per_sequence",
    "2048",
]


def test_advice_lists_every_source_and_where_they_disagree(capsys) -> None:
    words = ["--data_parallel_size", "8", "--micro_batch_size", "4", "--max_micro_batch_size", "32"]
    assert main([*ADVISE, *words]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    text = " ".join(out.split())
    optima = [0.58 * D**0.571, 0.0306 * D**0.383 * 2048, 0.292 * (6 * N * D) ** 0.327]
    sizes = [22.72 * (D / 1e6) ** 0.4682 * 512, 0.0471 * D**0.462 * 2048]
    for kind, values in (("optimum", optima), ("critical", sizes)):
        for value in values:
            assert f"{kind} {compact(value)} {compact(value / T)}" in text
    low, high = min(optima), min(sizes)
    assert f"{compact(low)} to {compact(high)} tokens" in text
    assert "from the smallest optimum to the smallest critical size" in text
    # 239 sequences are rounded up to 32 x 1 x 8, and 638 down to 32 x 2 x 8.
    assert (math.ceil(low / T / 256), math.floor(high / T / 256)) == (1, 2)
    assert "32 x 1 x 8 = 256 sequences" in text
    assert "32 x 2 x 8 = 512 sequences" in text
    assert "--per_device_train_batch_size 32 --gradient_accumulation_steps 2" in text
    assert f"The optima differ by a factor of {max(optima) / low:.3g}" in text
    assert f"The critical sizes differ by a factor of {max(sizes) / high:.3g}" in text
    assert "coefficient from memory, not confirmed" in text
    assert "What this does not know" in text


def test_your_own_measurement_replaces_the_critical_sizes_of_papers(capsys) -> None:
    a, b = 60, 6000
    write_sweeps([sweep("mine", a, b, tokens=2e6, parameters=1e6)], "mine/sweep.json")
    assert main([*ADVISE, "--measured", "mine"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    own = critical(a, b, reference=8) * 128 * (D / 2e6) ** 0.468
    assert f"your own measurement critical {compact(own)} {compact(own / T)}" in text
    assert "an assumption" in text
    assert "Your own is extrapolated: D is 12k times outside its range" in text
    optimum = 0.58 * D**0.571
    assert own < optimum
    expected = f"{compact(own)} to {compact(optimum)} tokens"
    assert expected in text
    assert "from your own critical size to the smallest optimum" in text
    assert "contradict" in text
    assert main([*ADVISE, "--measured", "published"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "Its exponent was measured, by 5 sweeps" in text
    assert "extrapolated" not in text


def test_more_ranks_than_the_batch_can_use_are_told(capsys) -> None:
    assert main([*ADVISE, "--data_parallel_size", "1024", "--micro_batch_size", "4"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "more ranks than the batch can use" in text
    assert text.count(" sequences, 8.39M tokens: --per_device") == 1  # one plan, once


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--parameters", "0"], "parameters (0) must be a number above 0"),
        (["--parameters", "-7"], "parameters (-7) must be a number above 0"),
        (["--tokens", "lots"], "tokens (lots) must be a number above 0"),
        (["--tokens_per_sequence", "0"], "tokens_per_sequence (0) must be"),
        (["--data_parallel_size", "0"], "data_parallel_size (0) must be at least 1"),
        (["--micro_batch_size", "0"], "micro_batch_size (0) must be at least 1"),
        (["--micro_batch_size", "8", "--max_micro_batch_size", "4"], "max_micro_batch_size (4)"),
        (["--measured", "nowhere"], "FILE (nowhere) must be one that can be read"),
        (["--measured", "lost.json"], "measured (lost.json) must give a critical batch size"),
    ],
)
def test_advice_that_cannot_be_given_is_a_message(capsys, words, message: str) -> None:
    write_sweeps([sweep("lost", 50, 3000, reached=8)], "lost.json")
    assert main([*ADVISE, *words]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("command", ["fit", "advise"])
def test_help_names_the_command(capsys, command: str) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["cbs", command, "--help"])
    assert stop.value.code == 0
    assert f"hf-adaptive-batch cbs {command}" in capsys.readouterr().out
