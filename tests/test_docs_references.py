"""What the documentation refers to is there: commands and their flags, links, messages."""

import ast
import re
import shlex
from pathlib import Path

import pytest

from hf_adaptive_batch.cbs.report import advise_command, fit_command
from hf_adaptive_batch.cbs.training import branch_plan, sweep_flags
from hf_adaptive_batch.compare.file import read_plan
from hf_adaptive_batch.pretrain import parse_flags
from hf_adaptive_batch.report_command import _parser as report_parser
from tests.test_docs import PAGES, ROOT, blocks, module


READ = [ROOT / "README.md", ROOT / "benchmarks" / "README.md", *PAGES]
LINK = re.compile(r"(?<!\!)\[[^\]]*\]\(([^)\s]+)\)|!\[[^\]]*\]\(([^)\s]+)\)")
PLACEHOLDERS = "FLAGS OF THAT RUN"  # of docs/critical_batch_size.md


def prose(path: Path) -> str:
    """A page without its code."""
    text = re.sub(r"^```.*?^```$", "", path.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"`[^`\n]*`", "", text)


def anchors(path: Path) -> set[str]:
    """Of the headings, as the web view of a repository and myst make them."""
    heads = re.findall(r"^#+ (.+)$", path.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).strip().replace(" ", "-") for head in heads}


def broken_links(path: Path) -> list[str]:
    """Relative links of a page to a file or a heading that is not there."""
    broken = []
    for match in LINK.finditer(prose(path)):
        link = match[1] or match[2]
        if re.match(r"[a-z]+:", link):
            continue  # of the web
        name, _, anchor = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    return broken


def commands(path: Path) -> list[list[str]]:
    """The words of every command line of a page that is ours, in one process or launched."""
    found = []
    for block in blocks(path, "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line.replace(PLACEHOLDERS, ""), comments=True)
            if words and Path(words[0]).name == "hf-adaptive-batch":
                found.append(words[1:])
            elif "examples/pretrain_llama.py" in words:
                config = ROOT / words[words.index("--config_file") + 1]
                assert config.is_file()
                found.append(["pretrain", *words[words.index("examples/pretrain_llama.py") + 1 :]])
    return found


def parse(words: list[str]) -> None:
    """Read a command line as its command does, with the flags of the runs; nothing is trained."""
    command, *rest = words
    if command == "cbs":
        command, *rest = rest
        command = f"cbs {command}"
    match command:
        case "pretrain":
            parse_flags(rest)
        case "compare":
            for run in read_plan(rest).possible_runs():
                parse_flags(run.words())
        case "report":
            report_parser().parse_args(rest)
        case "cbs measure":
            for run in sweep_flags.read_sweep_plan(rest).plan(1.0).possible_runs():
                parse_flags(run.words())
        case "cbs fit":
            fit_command._parser().parse_args(rest)
        case "cbs advise":
            advise_command._parser().parse_args(rest)
        case "cbs branch":
            # Whose checkpoint is not there: that is found behind the command's own flags.
            with pytest.raises(ValueError, match=r"checkpoint \(.+\) must be a folder"):
                branch_plan.read_branch_plan(rest)
            of_the_run, own = [], True
            for word in rest[1:]:
                if word.startswith("--"):
                    own = word[2:].partition("=")[0] in branch_plan._OWN
                of_the_run += [] if own else [word]
            parse_flags(of_the_run)
        case _:
            raise ValueError(f"no such command: {command}")


LINES = [(page.stem, words) for page in READ for words in commands(page)]


@pytest.mark.parametrize("words", [w for _, w in LINES], ids=[" ".join(w) for _, w in LINES])
def test_a_command_line_is_taken_by_its_command(words, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    code = None
    try:
        parse(words)
    except SystemExit as ended:
        code = ended.code
    assert not code, capsys.readouterr().err  # --help ends with 0


def test_every_command_is_in_the_documentation():
    shown = {tuple(w[:2] if w[0] == "cbs" else w[:1]) for _, w in LINES}
    cbs = {("cbs", name) for name in ("measure", "branch", "fit", "advise")}
    assert shown >= cbs | {("pretrain",), ("compare",), ("report",)}


@pytest.mark.parametrize(
    "line",
    [
        "pretrain --no_such_flag 1",
        "pretrain --eta 2",
        "compare constant norm_test --no_such_flag 1",
        "cbs measure --batch_sizes 8 16 32 --target_samples 400 --no_such_flag 1",
        "cbs branch runs/x/checkpoint-5 --branch_tokens 500 --no_such_flag 1",
        "cbs advise --no_such_flag 1",
        "no_such_command",
    ],
)
def test_a_command_line_that_does_not_fit_is_found(line, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises((ValueError, AssertionError, SystemExit)) as found:
        parse(line.split())
    assert getattr(found.value, "code", 2) == 2


@pytest.mark.parametrize("page", READ, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_links_of_a_page_lead_somewhere(page):
    assert broken_links(page) == []


def test_a_broken_link_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# Here it is\n[a](page.md#here-it-is) [b](none.md) [c](page.md#nowhere) ![d](none.png)\n"
        "[e](https://arxiv.org/abs/2412.21124) `[f](code.md)`\n",
        "utf-8",
    )
    assert broken_links(page) == ["none.md", "page.md#nowhere", "none.png"]


def test_every_error_that_is_raised_is_in_the_list_of_messages():
    made = module(ROOT / "docs" / "messages.py")
    missing = []
    for path in sorted(made.PACKAGE.rglob("*.py")):
        tree = ast.parse(path.read_text("utf-8"))
        listed = {text for _, text in made.messages(path.read_text("utf-8"))}
        named = made.names_of_texts(tree)
        for node in ast.walk(tree):
            match node:
                case ast.Raise(exc=ast.Call(func=ast.Name(kind), args=[given, *_])) if (
                    kind in made.ERRORS
                ):
                    found = made.texts(given, named)
                    if not listed.issuperset(found) or not all(found):
                        missing.append(ast.unparse(node))
    # The message of another error, passed on; and one that stands where the name is given its text.
    assert sorted(set(missing)) == [
        "raise ValueError(BEST_IS_ANOTHER)",
        "raise ValueError(str(error)) from error",
    ]
