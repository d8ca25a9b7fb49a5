"""Runs notebooks from a clean kernel and writes their outputs in place, by `make notebooks`.

    python notebooks/run.py                  # all
    python notebooks/run.py 1_tour.ipynb     # one

Each saves the picture that it opens with.
"""

import os
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient


# Small models gain nothing by threads, and lose much beside other work.
os.environ.setdefault("OMP_NUM_THREADS", "1")
FOLDER = Path(__file__).resolve().parent


def run(path: Path, timeout: int = 180) -> nbformat.NotebookNode:
    """Run a notebook's cells in a kernel of its own, in the notebook's folder.

    Args:
        path: The notebook.
        timeout: Seconds that a cell may take.

    Returns:
        The notebook, with new outputs.
    """
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(
        notebook,
        timeout=timeout,
        kernel_name="python3",
        resources={"metadata": {"path": str(path.parent)}},
        record_timing=False,
    ).execute()
    for cell in notebook.cells:
        cell["outputs"] = [each for each in cell.get("outputs", []) if not _of_machine(each)]
        if cell.cell_type != "code":
            del cell["outputs"]
    return notebook


def _of_machine(output: nbformat.NotebookNode) -> bool:
    """Whether it is what bitsandbytes says of the machine; any other message is to be seen."""
    return output.get("name") == "stderr" and output.text.startswith("Failed to load CPU gemm")


def main(names: list[str]) -> None:
    """Run and write the named notebooks, or all.

    Args:
        names: File names.
    """
    for path in sorted(FOLDER / name for name in names) or sorted(FOLDER.glob("*.ipynb")):
        nbformat.write(run(path), path)
        print(path.name)


if __name__ == "__main__":
    main(sys.argv[1:])
