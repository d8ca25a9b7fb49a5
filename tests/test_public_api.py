"""The public names: what `__all__` says can be imported, is documented, and is all there is."""

from __future__ import annotations

import ast
import importlib
import inspect
from pathlib import Path

import pytest

import hf_adaptive_batch


NAMES = hf_adaptive_batch.__all__


@pytest.mark.parametrize("name", NAMES)
def test_every_public_name_can_be_imported_and_says_what_it_is(name):
    value = getattr(hf_adaptive_batch, name)
    assert (inspect.getdoc(value) or "").strip()
    assert value.__name__ == name
    assert value.__module__.startswith("hf_adaptive_batch.")


def test_a_star_import_gives_the_public_names_and_no_others():
    found: dict[str, object] = {}
    exec("from hf_adaptive_batch import *", found)
    assert set(found) - {"__builtins__"} == set(NAMES)


def test_the_names_are_listed_once_and_in_order():
    assert sorted(set(NAMES)) == list(NAMES)
    assert set(dir(hf_adaptive_batch)) == {*NAMES, "__version__"}


def test_the_type_checker_is_told_the_same_names():
    source = Path(inspect.getfile(hf_adaptive_batch)).read_text(encoding="utf-8")
    (block,) = [
        node
        for node in ast.parse(source).body
        if isinstance(node, ast.If) and getattr(node.test, "id", None) == "TYPE_CHECKING"
    ]
    told = {
        alias.name: node.module
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert told.keys() == set(NAMES)
    for name, module in told.items():
        assert hf_adaptive_batch._HOME[name] == f".{module}"
        home = importlib.import_module(f".{module}", "hf_adaptive_batch")
        assert getattr(home, name) is getattr(hf_adaptive_batch, name)


@pytest.mark.parametrize("name", ["Trainer", "arguments_", "_nothing"])
def test_another_name_is_an_attribute_error(name):
    with pytest.raises(AttributeError, match=f"no attribute '{name}'"):
        getattr(hf_adaptive_batch, name)


@pytest.mark.parametrize("name", NAMES)
def test_every_public_method_says_what_it_does(name):
    value = getattr(hf_adaptive_batch, name)
    if not inspect.isclass(value):
        return
    for attribute, member in vars(value).items():
        if attribute.startswith("_") or not (
            inspect.isfunction(member) or isinstance(member, property | classmethod | staticmethod)
        ):
            continue
        assert inspect.getdoc(getattr(value, attribute)), f"{name}.{attribute}"


def test_the_version_is_that_of_the_package():
    assert hf_adaptive_batch.__version__.count(".") == 2
