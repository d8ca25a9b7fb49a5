"""The documentation is built without a warning, and its examples run as they are written."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import hf_adaptive_batch


ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
# Blocks that cannot run here are marked so, with the reason, in a comment right before them.
NOT_RUN = re.compile(r"<!-- not run: .+ -->\n$")


def blocks(path: Path, language: str) -> list[str]:
    """The code of a page that is to run, in order."""
    text = path.read_text("utf-8")
    found = re.finditer(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [match[1] for match in found if not NOT_RUN.search(text[: match.start()])]


WITH_PYTHON = [page for page in (ROOT / "README.md", *PAGES) if blocks(page, "python")]


def module(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "--fail-on-warning", "--keep-going", "--quiet"]
    done = subprocess.run(
        [*command, str(ROOT / "docs"), str(folder)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return folder


def test_the_site_is_built_without_a_warning(site):
    for page in PAGES:
        assert (site / f"{page.stem}.html").is_file()
    assert "images/flow.svg" in (site / "how_it_works.html").read_text("utf-8").replace("_", "")


def test_the_reference_has_every_public_name(site):
    text = (site / "api.html").read_text("utf-8")
    missing = [n for n in hf_adaptive_batch.__all__ if f'id="hf_adaptive_batch.{n}"' not in text]
    assert missing == []


def test_every_page_is_in_the_table_of_contents():
    listed = (ROOT / "docs" / "index.md").read_text("utf-8").splitlines()
    assert {page.stem for page in PAGES} - {"index"} <= set(listed)


def test_the_list_of_messages_is_that_of_the_source():
    assert (ROOT / "docs" / "messages.md").read_text("utf-8") == module(
        ROOT / "docs" / "messages.py"
    ).page(), "run: python docs/messages.py"


def test_every_reason_is_explained():
    text = (ROOT / "docs" / "troubleshooting.md").read_text("utf-8")
    for reason in hf_adaptive_batch.Reason:
        if reason != "shrunk":  # the user has allowed it
            assert f"`{reason.value}`" in text


@pytest.mark.parametrize("page", WITH_PYTHON, ids=lambda page: page.stem)
def test_the_python_of_a_page_runs_as_it_is_written(page, tmp_path):
    """All of its blocks, one after another, with the names that tests/docs_setup.py gives."""
    code = "\n".join(blocks(page, "python"))
    setup = "from tests.docs_setup import given\nglobals().update(given())\n"
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "WANDB_MODE": "offline",
        "WANDB_SILENT": "true",
        "TRACKIO_DIR": str(tmp_path / "trackio"),
    }
    done = subprocess.run(
        [sys.executable, "-c", setup + code],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_an_example_that_fails_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("```python\nraise SystemExit(3)\n```\n", "utf-8")
    with pytest.raises(AssertionError):
        test_the_python_of_a_page_runs_as_it_is_written(page, tmp_path)
    page.write_text("<!-- not run: it fails -->\n```python\nraise SystemExit(3)\n```\n", "utf-8")
    assert blocks(page, "python") == []
