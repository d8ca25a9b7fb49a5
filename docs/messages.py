"""Writes messages.md, the list of every message, by `python docs/messages.py`."""

import ast
from collections.abc import Iterator
from pathlib import Path


PACKAGE = Path(__file__).resolve().parents[1] / "hf_adaptive_batch"
PAGE = Path(__file__).with_suffix(".md")
ERRORS = ("ValueError", "TypeError", "RuntimeError", "FileNotFoundError")
HEAD = """# Every error message and warning

Made from the source by `docs/messages.py`. `{…}`, `{name}` and `%s` stand for values. What to do is
in the message itself, after its reason; what is met most often is explained in
[troubleshooting](troubleshooting.md).
"""


def messages(source: str) -> Iterator[tuple[str, str]]:
    """The kind and the text of every error and warning that has a text, in order."""
    tree = ast.parse(source)
    named = names_of_texts(tree)
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and node.args]
    for call in sorted(calls, key=lambda node: (node.lineno, node.col_offset)):
        match call.func:
            # Also those that a function returns, for others to raise.
            case ast.Name(kind) if kind in ERRORS:
                pass
            case ast.Attribute(ast.Name("logger"), "warning"):
                kind = "warning"
            case _:
                continue
        for text in texts(call.args[0], named):
            if " " in text:
                yield kind, text


def names_of_texts(tree: ast.AST) -> dict[str, ast.expr]:
    """What stands for a name that is given a value, so that a message may have a name."""
    return {
        node.targets[0].id: node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }


def texts(node: ast.expr, named: dict[str, ast.expr]) -> list[str]:
    """A message, or its two where a condition chooses."""
    match node:
        case ast.IfExp(body=first, orelse=second):
            return [*texts(first, named), *texts(second, named)]
        case ast.Name(name) if name in named:
            return [as_text(named[name])]
        case ast.Call(ast.Attribute(ast.Name(name), "format")) if name in named:
            return [as_text(named[name]).replace("{}", "{…}")]
    return [as_text(node)]


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
