"""The package is laid out as a sentence, measure - decide - apply, and its imports follow that.

Two checks hold this. One reads the syntax tree of every module and compares its imports with the
tables below, which are the rules. The other imports one part of the package in a fresh interpreter
and looks at what was loaded with it. Both are shown to fail where they should.
"""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest


ROOT = Path(__file__).resolve().parents[1]
NAME = "hf_adaptive_batch"
PACKAGE = ROOT / NAME
FILES = sorted(PACKAGE.rglob("*.py"))

# Who may import which framework. A name stands for a module, or for all modules of a room.
TRAINER_LEVEL = {
    "trainer",
    "callback",
    "arguments",
    "hf_compat",
    "progress",
    "notebook_progress",
    "flow",
    "hosting",
    "run",
    "checkpoint",
    "assemble",
    "support",
    "tokens",
    "pretrain",
    "byte_tokenizer",
    "hf_streams",
    "hf_parallel",
    "parallel_support",
    "hf_sharded",
    "pretrain_arguments",
    "pretrain_model",
    "learning_rate",
    "assemble_schedule",
    "schedule_arguments",
    "co_scaled",
    "journal",
    "averaged",
    "averaging_callback",
    "saving",
    "stopping",
}
# A loop without a Trainer needs these, and does without transformers.
LOOP_LEVEL = {"accelerate_loop", "accelerate_step", "accelerate_support", "build_run", "hf_loader"}
FRAMEWORKS = {
    "torch": {
        "measure",
        "apply",
        "ranks",
        "packed_stream",
        "averaging",
        "averaging_files",
        "language_modeling",
    }
    | TRAINER_LEVEL
    | LOOP_LEVEL,
    "transformers": TRAINER_LEVEL,
    "accelerate": TRAINER_LEVEL | LOOP_LEVEL,
}

# What a room, or a single module, may import of this package; the longest name that fits counts.
# Rooms that are not listed may import everything but what ABOVE closes to them.
ARROWS = {
    "measure": {"measure"},
    "decide": {"decide", "measure.moments"},
    "apply": {"apply", "decide", "measure.moments", "ranks"},
    "ranks": set(),
    "measure.moments": set(),
    "apply.plan": {"apply.clock", "measure.moments"},
    "apply.clock": {"apply.plan", "measure.moments"},
    "report.records": {"measure.moments", "apply.plan", "apply.clock"},
}

# Rooms that need nothing but Python: they run where torch is not installed, not even for its types.
STANDARD_LIBRARY_ONLY = {
    "decide",
    "measure.moments",
    "apply.plan",
    "apply.clock",
    "report.records",
}

# Who may import what stands at the top.
ABOVE = {
    "cli": {"cli", "__main__"},
    "pretrain": {"cli", "pretrain", "compare.check"},
    "compare": {"cli", "compare", "cbs.training"},
    "report_command": {"cli"},
    "cbs.command": {"cli"},
    "pretrain_model": {"pretrain"},
}

DRAWERS = {"utils", "util", "helpers", "common", "misc"}
MAX_LINES = 300


class Import(NamedTuple):
    """One imported name: `target` is dotted and absolute, such as `torch.nn` or `json.dumps`."""

    target: str
    line: int
    for_types: bool  # under `if TYPE_CHECKING:`, so it never runs


def module_name(path: Path) -> str:
    """The dotted name inside the package: `decide.criteria`, or `decide` for its `__init__`."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(source: str, package: str) -> Iterator[Import]:
    """Every import of a module that lies in `package`, at its top or inside a function."""

    def walk(node: ast.AST, for_types: bool) -> Iterator[Import]:
        match node:
            case ast.If(test=ast.Name("TYPE_CHECKING") | ast.Attribute(attr="TYPE_CHECKING")):
                for child in node.body:
                    yield from walk(child, True)
                for child in node.orelse:
                    yield from walk(child, for_types)
                return
            case ast.Import():
                for alias in node.names:
                    yield Import(alias.name, node.lineno, for_types)
            case ast.ImportFrom():
                start = node.module or ""
                if node.level:
                    parents = package.split(".")
                    above = parents[: len(parents) - node.level + 1]
                    start = ".".join([*above, start] if start else above)
                for alias in node.names:
                    yield Import(f"{start}.{alias.name}", node.lineno, for_types)
            case ast.Call(
                func=ast.Name("import_module" | "__import__")
                | ast.Attribute(attr="import_module" | "__import__"),
                args=[ast.Constant(str(target)), *_],
            ):
                yield Import(target, node.lineno, for_types)
        for child in ast.iter_child_nodes(node):
            yield from walk(child, for_types)

    yield from walk(ast.parse(source), False)


def within(module: str, rooms: set[str] | dict[str, set[str]]) -> str | None:
    """The longest of `rooms` that `module` is, or lies in."""
    fitting = [room for room in rooms if f"{module}.".startswith(f"{room}.")]
    return max(fitting, key=len, default=None)


def violations(module: str, source: str, is_package: bool = False) -> list[str]:
    """What `source`, as the module of that name inside the package, imports against the rules."""
    package = ".".join([NAME, *module.split(".")[: None if is_package else -1]]).rstrip(".")
    found = []
    for target, line, for_types in imports(source, package):
        top, _, inside = target.partition(".")
        if top == NAME:
            if inside != "__version__" and (rule := broken_arrow(module, inside)):
                found.append(f"{module}:{line} imports {target}: {rule}")
        elif within(module, STANDARD_LIBRARY_ONLY) and top not in sys.stdlib_module_names:
            found.append(f"{module}:{line} imports {target}: it needs only the standard library")
        elif top in FRAMEWORKS and not for_types and not within(module, FRAMEWORKS[top]):
            found.append(f"{module}:{line} imports {target}: {top} is imported elsewhere only")
    return found


def broken_arrow(module: str, target: str) -> str | None:
    """The rule that stands against `module` importing `target`, both named inside the package."""
    room = within(module, ARROWS)
    if room is not None and not within(target, ARROWS[room]):
        return f"{room} may import only {sorted(ARROWS[room])} of this package"
    top = within(target, ABOVE)
    if top is not None and not within(module, ABOVE[top]):
        return f"{top} is imported only by {sorted(ABOVE[top])}"
    return None


def test_there_are_modules_to_check():
    assert {"measure", "decide", "apply"} <= {module_name(path) for path in FILES}


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_imports_follow_the_layers(path):
    is_package = path.name == "__init__.py"
    assert violations(module_name(path), path.read_text(encoding="utf-8"), is_package) == []


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_a_module_is_one_room(path):
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_LINES, f"{path.name} has {lines} lines: two rooms in one?"


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_a_module_is_named_after_what_it_does(path):
    assert not DRAWERS & set(module_name(path).split("."))


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("decide.criteria", "import torch"),
        ("decide.criteria", "from numpy import mean"),
        ("decide.criteria", "def f():\n    import transformers"),
        (
            "decide.criteria",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch",
        ),
        ("decide.criteria", "import importlib\nimportlib.import_module('torch')"),
        ("decide.criteria", "from ..measure.probe import GradientProbe"),
        ("decide.criteria", "from ..measure import GradientMoments"),
        ("decide.criteria", "from ..apply.plan import BatchPlan"),
        ("decide.criteria", "from .. import AdaptiveBatchTrainer"),
        ("measure.moments", "from .probe import GradientProbe"),
        ("measure.probe", "import accelerate"),
        ("measure.probe", "from hf_adaptive_batch.decide import BatchDecision"),
        ("measure.probe", "from .. import trainer"),
        ("apply.plan", "from torch import Tensor"),
        ("apply.plan", "from . import sampler"),
        ("apply.clock", "from ..decide.schedule import Duration"),
        ("apply.loader", "from transformers import Trainer"),
        ("apply.loader", "from ..measure.probe import GradientProbe"),
        ("apply.loader", "from ..report.records import Record"),
        ("apply.loader", "import hf_adaptive_batch.callback"),
        ("report.records", "import matplotlib"),
        ("report.plots", "import torch"),
        ("corpus", "try:\n    import transformers\nexcept ImportError:\n    pass"),
        ("trainer", "from .cli import main"),
        ("trainer", "from . import pretrain"),
        ("cli", "import torch.distributed as dist"),
        ("cli", "if TYPE_CHECKING:\n    pass\nelse:\n    import transformers"),
    ],
)
def test_an_import_against_the_rules_is_found(module, source):
    assert len(violations(module, source)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("decide.criteria", "import math\nfrom ..measure.moments import GradientMoments"),
        ("decide.criteria", "from ..measure import moments\nfrom .noise_scale import NoiseScale"),
        ("measure.probe", "import torch\nfrom .moments import GradientMoments"),
        (
            "apply.loader",
            "from torch.utils.data import DataLoader\nfrom ..decide import BatchDecision",
        ),
        (
            "report.records",
            "import json\nfrom .. import __version__\nfrom ..apply.plan import BatchPlan",
        ),
        ("report.plots", "from matplotlib import pyplot\nfrom .records import read"),
        (
            "cbs.branch",
            "import typing\nif typing.TYPE_CHECKING:\n    from transformers import Trainer",
        ),
        ("trainer", "import torch, transformers\nfrom .apply.loader import StepBatch"),
        ("pretrain", "from .trainer import AdaptiveBatchTrainer"),
        ("cli", "def main():\n    from .pretrain import pretrain"),
    ],
)
def test_an_import_within_the_rules_is_accepted(module, source):
    assert violations(module, source) == []


def test_relative_imports_of_a_package_start_at_the_package_itself():
    assert violations("decide", "from .criteria import NormTest", is_package=True) == []
    assert violations("decide", "from ..trainer import Trainer", is_package=True) != []


HEAVY = {"torch", "transformers", "accelerate", "datasets", "matplotlib", "numpy", "scipy"}


def heavy_after(statement: str) -> set[str]:
    """The heavy libraries that a fresh interpreter has loaded after running `statement`."""
    report = "import json, sys; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", f"{statement}\n{report}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return HEAVY & set(json.loads(done.stdout))


@pytest.mark.parametrize(
    "module",
    [
        "",
        ".measure",
        ".measure.moments",
        ".decide",
        ".apply",
        ".apply.plan",
        ".apply.clock",
        ".report",
        ".report.records",
    ],
)
def test_the_light_part_of_the_package_loads_no_framework(module):
    assert heavy_after(f"import {NAME}{module}") == set()


def test_the_mathematics_of_critical_batch_sizes_loads_arrays_and_no_framework():
    assert heavy_after(f"import {NAME}.cbs") == {"numpy", "scipy"}


def test_a_loop_without_a_trainer_loads_no_transformers():
    found = heavy_after(f"import {NAME}; {NAME}.AdaptiveBatch")
    assert "accelerate" in found
    assert "transformers" not in found


def test_a_loaded_framework_is_found():
    assert "numpy" in heavy_after(f"import {NAME}.decide, numpy")
