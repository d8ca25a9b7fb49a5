"""Templates to pages: all user's text in them is escaped."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined


def render(template: str, **values: Any) -> str:
    """Fill a template.

    Args:
        template: Its path in this package, such as report/page.html.jinja.
        **values: By the names that it uses.

    Returns:
        The page.
    """
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=FunctionLoader(_source),
    )
    environment.tests["mapping"] = lambda value: isinstance(value, Mapping)
    return environment.get_template(template).render(**values)


def write_whole(path: Path, text: str) -> None:
    """Write a file that is whole at any moment: somebody may look at a running run's page.

    Args:
        path: Of the file.
        text: Its content.
    """
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def _source(template: str) -> str:
    return files("hf_adaptive_batch").joinpath(template).read_text(encoding="utf-8")
