"""The machine and the software that a comparison is made with, in words."""

import os
import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from .. import __version__


class Gpu(NamedTuple):
    """A CUDA device.

    Attributes:
        device: As `CUDA_VISIBLE_DEVICES` names it.
        name: Its model.
    """

    device: str
    name: str


def visible_gpus() -> list[Gpu]:
    """The CUDA devices that a process would see, without loading CUDA into this one."""
    query = ["nvidia-smi", "--query-gpu=index,uuid,name", "--format=csv,noheader"]
    try:
        shown = subprocess.run(query, capture_output=True, text=True, check=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    found = [
        [part.strip() for part in line.split(",", 2)]
        for line in shown.splitlines()
        if line.count(",") >= 2
    ]
    wanted = os.environ.get("CUDA_VISIBLE_DEVICES")
    if wanted is None:
        return [Gpu(index, name) for index, _, name in found]
    gpus = []
    for word in filter(None, (word.strip() for word in wanted.split(","))):
        names = [name for index, uuid, name in found if word == index or uuid.startswith(word)]
        if not names and not word.startswith("MIG"):
            break  # CUDA, too, takes those before the first that is not there
        gpus.append(Gpu(word, names[0] if names else "a part of a GPU"))
    return gpus


def machine() -> str:
    """Cores, processor and GPUs."""
    cores = len(os.sched_getaffinity(0))
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text("utf-8"))
    except OSError:
        found = None
    processor = found[1].strip() if found else platform.machine()
    names = [gpu.name for gpu in visible_gpus()]
    gpus = [f"{names.count(name)} x {name}" for name in dict.fromkeys(names)]
    return ", ".join([f"{cores} CPU core{'s' * (cores > 1)} ({processor})", *(gpus or ["no GPU"])])


def versions() -> str:
    """Python and the packages that decide what a run computes."""
    named = [f"hf_adaptive_batch {__version__}"]
    for package in ("torch", "transformers", "accelerate"):
        try:
            named.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            continue
    return ", ".join([f"Python {platform.python_version()}", *named])
