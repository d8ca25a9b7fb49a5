"""Settings files: flags of a command, written down as YAML or JSON."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped, unused-ignore]  # what transformers requires, too


SUFFIXES = (".yaml", ".yml", ".json")
_NAME = re.compile(r"[A-Za-z]\w*")
# Numbers to everybody but YAML 1.1, which wants a dot in them and a sign behind the e.
_SCIENTIFIC = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)[eE][+-]?\d+")


def expand_settings(arguments: Sequence[str]) -> list[str]:
    """Put the flags of a settings file in its place, where the first word names one.

    Args:
        arguments: The words of a command line.

    Returns:
        The file's flags and then the other words, so that these win, as the last of equal flags
        does; without a file the words as they are.
    """
    words = list(arguments)
    if not words or words[0].startswith("-") or not words[0].lower().endswith(SUFFIXES):
        return words
    return [*flags_of(read_settings(words[0])), *words[1:]]


def flags_of(values: Mapping[str, Any]) -> list[str]:
    """Write settings as the words of a command line.

    Args:
        values: Values by the names of their flags. A list gives a word for each entry, a mapping
            gives JSON text, as `lr_scheduler_kwargs` wants it, and None leaves the flag out.

    Returns:
        The words: `{"eta": 0.3, "streaming": True}` is `--eta 0.3 --streaming true`.

    Raises:
        ValueError: If a name cannot be that of a flag, or a value cannot be written as words.
    """
    words: list[str] = []
    for name, value in values.items():
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise ValueError(
                f"name of a setting ({name!r}) must be that of a flag without its dashes, because "
                "settings are passed on as flags; write such as eta: 0.2."
            )
        if value is None:
            continue
        if isinstance(value, Mapping):
            entries = [_json_text(name, value)]
        elif isinstance(value, list | tuple):
            entries = [_word(name, entry) for entry in value]
        else:
            entries = [_word(name, value)]
        if not entries:
            raise ValueError(
                f"{name} ([]) must have an entry, because a flag has a value; write null, or leave "
                "it out, for the default."
            )
        if entries[0].startswith("-"):  # argparse would take some, even -1e-3, for a flag
            words += [f"--{name}={entries[0]}", *entries[1:]]
        else:
            words += [f"--{name}", *entries]
    return words


def read_settings(path: str | Path) -> dict[str, Any]:
    """Read a settings file.

    Numbers such as `1e-3` are text to YAML 1.1. They stay it, and become the same flag.

    Args:
        path: A file whose name ends in .yaml, .yml or .json, with a mapping from names to values.

    Returns:
        The mapping.

    Raises:
        ValueError: If there is no such file, or it holds something else, or a name twice.
    """
    file = Path(path)
    suffix = file.suffix.lower()
    if suffix not in SUFFIXES:
        raise ValueError(
            f"settings file ({path}) must end in {', '.join(SUFFIXES)}, because the suffix says "
            "how it is read; rename it."
        )
    try:
        text = file.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise ValueError(
            f"settings file ({path}) must be a text file that can be read, because it stands for "
            f"flags, but: {reason}; check the path."
        ) from error
    try:
        if suffix == ".json":
            values = json.loads(text, object_pairs_hook=_unique)
        else:
            values = yaml.load(text, Loader=_UniqueNamesLoader)
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise ValueError(
            f"settings file ({path}) must be {'JSON' if suffix == '.json' else 'YAML'} with every "
            f"name once, because it stands for flags, but: {_one_line(error)}; correct it."
        ) from error
    if not isinstance(values, dict):
        found = "nothing" if values is None else f"a {type(values).__name__}"
        raise ValueError(
            f"settings file ({path}) must hold a mapping from names to values, because each stands "
            f"for a flag, but holds {found}; write lines such as eta: 0.2."
        )
    return values


class _UniqueNamesLoader(yaml.SafeLoader):
    """Refuses a name that is given twice, where YAML's own loader takes the last."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen: set[str] = set()
        # As they are written: before `<<` merges others, which are to be overwritten.
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise ValueError(f"{key.value} is given twice, in line {key.start_mark.line + 1}")
            seen.add(key.value)
        return super().construct_mapping(node, deep=deep)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, value in pairs:
        if name in values:
            raise ValueError(f"{name} is given twice")
        values[name] = value
    return values


def _word(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str | int | float):
        return str(value)
    raise ValueError(
        f"{name} ({value!r}) must be text, a number, true or false, or a list of these, because a "
        f"flag's value is a word, and this is a {type(value).__name__}; put text into quotes."
    )


def _json_text(name: str, value: Mapping[str, Any]) -> str:
    try:
        return json.dumps(_with_numbers(value))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{name} ({value!r}) must hold what JSON can say, because a mapping is passed on as "
            f"JSON, but: {error}; put text into quotes."
        ) from error


def _with_numbers(value: Any) -> Any:
    """In JSON a number in quotes is another value: here `1e-3` has to become one."""
    if isinstance(value, Mapping):
        return {key: _with_numbers(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_with_numbers(entry) for entry in value]
    if isinstance(value, str) and _SCIENTIFIC.fullmatch(value):
        return float(value)
    return value


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
