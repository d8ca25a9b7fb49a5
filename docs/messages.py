"""Writes messages.md, the list of every error message, by `python docs/messages.py`."""

import ast
from collections.abc import Iterator
from pathlib import Path


PACKAGE = Path(__file__).resolve().parents[1] / "hf_adaptive_batch"
PAGE = Path(__file__).with_suffix(".md")
HEAD = """# Every error message

Made from the source by `docs/messages.py`. `{…}` stands for a value. What to do is in the message
itself, after its reason; what is met most often is explained in
[troubleshooting](troubleshooting.md).
"""


def messages(source: str) -> Iterator[tuple[str, str]]:
    """The class and the text of every error that is raised with a text, in order."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Raise(exc=ast.Call(func=ast.Name(kind), args=[given, *_])):
                text = as_text(given)
                if kind in ("ValueError", "TypeError", "RuntimeError") and " " in text:
                    yield kind, text


def as_text(node: ast.expr) -> str:
    """A string's text, with what is put in as the name that it has in the source."""
    match node:
        case ast.Constant(str(text)):
            return text
        case ast.JoinedStr(values):
            return "".join(as_text(value) for value in values)
        case ast.FormattedValue(value):
            return f"{{{ast.unparse(value) if isinstance(value, ast.Name) else '…'}}}"
        case ast.BinOp(left, ast.Add(), right):
            return as_text(left) + as_text(right)
    return ""


def page() -> str:
    """The page, in Markdown."""
    parts = [HEAD]
    for path in sorted(PACKAGE.rglob("*.py")):
        found = list(messages(path.read_text("utf-8")))
        if found:
            name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
            parts.append(f"## `{name}`\n")
            parts.append("\n".join(f"- {kind}: `` {text} ``" for kind, text in found) + "\n")
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
