"""The notebooks run from a clean kernel, and open with the picture that they make."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient.exceptions import CellExecutionError

from notebooks.run import run


ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PICTURE = re.compile(r"!\[.+\]\((\.\./docs/images/notebook_\w+\.png)\)")


def opening_picture(path: Path) -> str:
    first = nbformat.read(path, as_version=4).cells[0]
    assert first.cell_type == "markdown"
    found = PICTURE.search(first.source)
    assert found, f"{path.name} must open with its picture"
    return found[1]


def test_there_are_five():
    assert [path.name[0] for path in NOTEBOOKS] == ["1", "2", "3", "4", "5"]


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs_from_a_clean_kernel_and_makes_its_picture(path, tmp_path, monkeypatch):
    """In a copy of the folders that it reads, so that nothing of the checkout is written."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "docs" / "images").mkdir(parents=True)
    shutil.copytree(
        ROOT / "benchmarks" / "results" / "cbs-cpu", tmp_path / "benchmarks" / "results" / "cbs-cpu"
    )
    copy = Path(shutil.copy(path, tmp_path / "notebooks"))
    notebook = run(copy)
    assert (copy.parent / opening_picture(path)).stat().st_size > 10_000
    shown = [
        output
        for cell in notebook.cells
        for output in cell.get("outputs", ())
        if "image/png" in output.get("data", {})
    ]
    assert shown


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_is_kept_was_run_in_order_and_is_clean(path):
    cells = [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    for cell in cells:
        for output in cell.outputs:
            assert output.output_type != "error"
            assert output.get("name") != "stderr"
            text = str(output.get("text", ""))
            assert not re.search(r"/(home|root|tmp|work)/|Warning|Traceback", text)
    assert (path.parent / opening_picture(path)).stat().st_size < 150_000
    assert path.stat().st_size < 400_000


def test_a_cell_that_fails_is_found(tmp_path):
    path = tmp_path / "failing.ipynb"
    cell = nbformat.v4.new_code_cell("raise RuntimeError('as it should')")
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), path)
    with pytest.raises(CellExecutionError, match="as it should"):
        run(path)


@pytest.mark.slow
def test_bars_are_text_where_there_are_no_widgets(tmp_path):
    """The Trainer's bar in a terminal or a plain kernel: no widget, no error."""
    code = """
import sys
sys.modules["ipywidgets"] = None  # as where it is not installed
from tests.cases import arguments, llama, sequences
from hf_adaptive_batch import AdaptiveBatchTrainer
args = arguments("out", disable_tqdm=False, max_training_samples=32)
AdaptiveBatchTrainer(model=llama(), args=args, train_dataset=sequences(32)).train()
"""
    path = tmp_path / "bars.ipynb"
    cell = nbformat.v4.new_code_cell(code)
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), path)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    script = (
        "import sys; from pathlib import Path; from notebooks.run import run\n"
        "print(run(Path(sys.argv[1])).cells[0].outputs)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(path)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "train_loss" in done.stdout or "loss" in done.stdout
    assert "widget" not in done.stdout
