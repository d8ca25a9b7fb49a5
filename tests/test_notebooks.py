"""The notebooks run from a clean kernel, and open with the picture that they make."""

import re
import shutil
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
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert not [output.text for output in outputs if output.get("name") == "stderr"]
    assert (copy.parent / opening_picture(path)).stat().st_size > 10_000
    assert any("image/png" in output.get("data", {}) for output in outputs)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_is_kept_was_run_in_order_and_is_clean(path):
    cells = [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    for cell in cells:
        for output in cell.outputs:
            assert output.output_type != "error"
            assert output.get("name") != "stderr"
            text = str(output.get("text", ""))
            assert not re.search(r"/(home|root|tmp|work)/|Warning|Traceback|\x1b", text)
    assert (path.parent / opening_picture(path)).stat().st_size < 150_000
    assert path.stat().st_size < 400_000


def test_a_cell_that_fails_is_found(tmp_path):
    path = tmp_path / "failing.ipynb"
    cell = nbformat.v4.new_code_cell("raise RuntimeError('as it should')")
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), path)
    with pytest.raises(CellExecutionError, match="as it should"):
        run(path)


BARS = """
import sys
sys.modules["ipywidgets"] = None  # as where it is not installed
from tests.cases import arguments, llama, sequences
from hf_adaptive_batch import AdaptiveBatchTrainer
args = arguments({folder!r}, disable_tqdm=False, max_training_samples=64, logging_steps=0.5,
    eta=0.05, max_global_batch_size=16, eval_strategy="steps", eval_steps=0.5)
trainer = AdaptiveBatchTrainer(
    model=llama(), args=args, train_dataset=sequences(64), eval_dataset=sequences(16)
)
trainer.train()
print(trainer.state.global_step, [type(c).__name__ for c in trainer.callback_handler.callbacks])
"""


@pytest.mark.slow
def test_the_bar_of_a_notebook_counts_samples_and_needs_no_widgets(tmp_path, monkeypatch):
    """Fewer steps than the Trainer expected are the whole budget, and the bar is then full."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    path = tmp_path / "bars.ipynb"
    cell = nbformat.v4.new_code_cell(BARS.format(folder=str(tmp_path / "out")))
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), path)
    outputs = run(path).cells[0].outputs
    # tqdm says once that widgets are missing, when transformers imports it; the bar is HTML.
    [bar] = [output.data["text/html"] for output in outputs if "data" in output]
    assert "<progress value='64' max='64'" in bar
    assert "samples, batch 16" in bar
    assert "Validation Loss" in bar
    [end] = [output.text for output in outputs if output.get("name") == "stdout"]
    steps, callbacks = end.split(maxsplit=1)
    assert int(steps) < 16, "the batch has grown"
    assert "'NotebookProgressCallback'" in callbacks, "the user's own is back after training"
