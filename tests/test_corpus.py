"""Text to pretrain on: what is read, how it is divided, and that packing loses nothing."""

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub.constants
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_adaptive_batch import corpus, packing
from hf_adaptive_batch.corpus import PYTHON_STDLIB, load_text
from hf_adaptive_batch.packing import pack, utf8_bytes


Split = tuple[datasets.Dataset, datasets.Dataset]
END = 256


class ByteTokenizer:
    """One token per UTF-8 byte; keeps what it was called with."""

    eos_token_id: int | None = END

    def __init__(self) -> None:
        self.calls: list[tuple[list[str], dict[str, Any]]] = []

    def __call__(self, text: list[str], /, **options: Any) -> dict[str, list[list[int]]]:
        self.calls.append((text, options))
        return {"input_ids": [list(document.encode()) for document in text]}


def as_documents(texts: list[str]) -> datasets.Dataset:
    return datasets.Dataset.from_dict({"text": texts})


def texts_of(part: datasets.Dataset) -> list[str]:
    return list(part["text"])


def everything(split: Split) -> list[str]:
    return sorted(texts_of(split[0]) + texts_of(split[1]))


def write_files(folder: Path, texts: dict[str, str]) -> Path:
    for name, text in texts.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8", newline="")
    return folder


def many(count: int) -> dict[str, str]:
    return {f"{number:03}.txt": f"document {number:03}" for number in range(count)}


# ------------------------------------------------------------------ the Python standard library


@pytest.fixture(scope="module")
def stdlib() -> Split:
    return load_text(PYTHON_STDLIB)


def test_the_standard_library_gives_megabytes_of_text_in_one_column(stdlib: Split) -> None:
    train, validation = stdlib
    assert train.column_names == validation.column_names == ["text"]
    assert len(train) + len(validation) > 400
    assert 5e6 < utf8_bytes(train) + utf8_bytes(validation) < 50e6
    assert 0.01 < len(validation) / len(train) < 0.1
    assert any("class JSONDecoder" in text for text in everything(stdlib))


def test_the_standard_library_comes_without_tests_packages_and_build_output(stdlib: Split) -> None:
    texts = everything(stdlib)
    for other in (pytest.__file__, corpus.__file__, json.__file__):
        found = Path(other).read_text("utf-8") in texts
        assert found == (other == json.__file__)
    assert not any("test.support import" in text and "unittest.main()" in text for text in texts)
    assert not any("build_time_vars = {" in text for text in texts)


def test_loading_the_standard_library_again_gives_the_same_rows(stdlib: Split) -> None:
    again = load_text(PYTHON_STDLIB)
    assert [texts_of(part) for part in again] == [texts_of(part) for part in stdlib]


def test_the_standard_library_packs_into_blocks_that_hold_nearly_all_of_it(stdlib: Split) -> None:
    from hf_adaptive_batch.byte_tokenizer import byte_tokenizer

    _, validation = stdlib
    blocks = pack(validation, byte_tokenizer(), 512)
    tokens = utf8_bytes(validation) + len(validation)
    assert len(blocks) == tokens // 512
    start = [token for text in validation[:9]["text"] for token in [*text.encode(), END]]
    assert packed(blocks.select(range(2)))[: len(start)] == start[:1024]


def test_a_python_without_source_files_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(ValueError, match=r"source \('python-stdlib'\) must give documents to both"):
        load_text(PYTHON_STDLIB)


def test_of_a_library_folder_only_its_own_utf8_modules_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = {"a.py": "a = 1", "pkg/b.py": "b = 2", "unittest/case.py": "c = 3"}
    skipped = ["test/t.py", "idlelib/idle_test/t.py", "lib2to3/tests/t.py", "ctypes/test/t.py"]
    skipped += ["site-packages/p.py", "dist-packages/p.py", "__pycache__/p.py", "notes.txt"]
    skipped += ["config-3.11-x86_64/python-config.py", "_sysconfigdata__linux_.py"]
    write_files(tmp_path, kept | {name: f"# {name}" for name in skipped} | {"pkg/blank.py": "\n"})
    (tmp_path / "latin.py").write_bytes("# coding: latin-1\n'\xe9'".encode("latin-1"))
    monkeypatch.setattr(corpus.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    assert everything(load_text(PYTHON_STDLIB, validation_fraction=0.5)) == sorted(kept.values())


# ---------------------------------------------------------------------------- files and folders


def test_a_folder_is_read_recursively_one_document_per_text_file(tmp_path: Path) -> None:
    texts = many(40) | {"deep/er/x.txt": "nested", "UPPER.TXT": "capitals"}
    write_files(tmp_path, texts | {"README.md": "not a corpus", "data.bin": "\0"})
    assert everything(load_text(tmp_path, validation_fraction=0.5)) == sorted(texts.values())


def test_a_folder_may_mix_kinds_of_files(tmp_path: Path) -> None:
    write_files(tmp_path, many(20) | {"rows.jsonl": '{"text": "row 1"}\n\n{"text": "row 2"}\n'})
    write_files(tmp_path, {"rows.ndjson": '{"text": "row 3"}'})
    as_documents(["row 4", "row 5"]).to_pandas().to_parquet(tmp_path / "rows.parquet")
    rows = {f"row {number}" for number in range(1, 6)}
    assert set(everything(load_text(tmp_path, validation_fraction=0.5))) == rows | set(
        many(20).values()
    )


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_single_file_may_keep_its_text_in_another_column(tmp_path: Path, kind: str) -> None:
    texts = [f"body {number}" for number in range(50)]
    table = datasets.Dataset.from_dict({"id": list(range(50)), "body": texts}).to_pandas()
    path = tmp_path / f"rows.{kind}"
    if kind == "jsonl":
        table.to_json(path, orient="records", lines=True)
    else:
        table.to_parquet(path)
    assert everything(load_text(path, text_column="body")) == sorted(texts)
    assert everything(load_text(str(path), text_column="body")) == sorted(texts)
    message = r"text_column \('text'\) must name .* has the columns \['id', 'body'\]; pass"
    with pytest.raises(ValueError, match=message):
        load_text(path)


def test_text_is_kept_to_the_byte(tmp_path: Path) -> None:
    texts = ["a\r\nb\n", "  spaces\t", "漢字 \U0001f600", "line\u2028separator\x85next"]
    lines = "\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in texts)
    for folder, files in (
        (tmp_path / "txt", {f"{i}.txt": text for i, text in enumerate(texts)}),
        (tmp_path / "jsonl", {"rows.jsonl": lines}),
    ):
        split = load_text(write_files(folder, files), validation_fraction=0.5)
        assert everything(split) == sorted(texts)


def test_a_byte_order_mark_is_not_part_of_the_text(tmp_path: Path) -> None:
    write_files(tmp_path, {"a.txt": "\ufefftext", "b.jsonl": '\ufeff{"text": "row"}'})
    write_files(tmp_path, many(20))
    found = everything(load_text(tmp_path, validation_fraction=0.5))
    assert {"text", "row"} < set(found)


def test_blank_documents_and_missing_values_are_dropped(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"text": f"row {number}"} for number in range(50)]
    rows += [{"text": ""}, {"text": " \n"}, {"text": None}, {"other": 1}]
    write_files(tmp_path, {"rows.jsonl": "\n".join(map(json.dumps, rows))})
    assert len(everything(load_text(tmp_path, validation_fraction=0.5))) == 50


def test_copies_in_local_files_are_dropped(tmp_path: Path) -> None:
    texts = many(40) | {f"copy/{name}": text for name, text in many(40).items()}
    assert everything(load_text(write_files(tmp_path, texts), validation_fraction=0.5)) == sorted(
        many(40).values()
    )


# ------------------------------------------------------------------------------------- division


def test_the_division_depends_on_the_content_and_not_on_names_or_order(tmp_path: Path) -> None:
    texts = list(many(200).values())
    random.Random(0).shuffle(texts)
    shuffled = {f"other/{number}.txt": text for number, text in enumerate(texts)}
    one = load_text(write_files(tmp_path / "one", many(200)))
    two = load_text(write_files(tmp_path / "two", shuffled))
    assert texts_of(one[0]) != texts_of(two[0])
    assert [sorted(texts_of(part)) for part in one] == [sorted(texts_of(part)) for part in two]


def test_rows_come_in_the_order_of_the_relative_paths(tmp_path: Path) -> None:
    paths = [f"{folder}/{number}.txt" for folder in ("a", "a/b", "c") for number in range(90)]
    random.Random(0).shuffle(paths)
    train, validation = load_text(write_files(tmp_path, {path: path for path in paths}))
    assert texts_of(train) == sorted(texts_of(train))
    assert texts_of(validation) == sorted(texts_of(validation))


def test_a_larger_fraction_only_adds_to_validation(tmp_path: Path) -> None:
    write_files(tmp_path, many(300))
    sizes = []
    previous: set[str] = set()
    for fraction in (0.02, 0.1, 0.5, 0.9):
        validation = set(texts_of(load_text(tmp_path, validation_fraction=fraction)[1]))
        assert previous < validation
        previous = validation
        sizes.append(len(validation) / 300)
    # Four standard deviations of a binomial share at 0.5, with 300 documents.
    assert sizes == pytest.approx([0.02, 0.1, 0.5, 0.9], abs=0.12)


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, 5, float("nan")])
def test_a_fraction_that_empties_one_side_is_refused(tmp_path: Path, fraction: float) -> None:
    message = rf"validation_fraction \({fraction}\) must lie between 0 and 1, because"
    with pytest.raises(ValueError, match=message):
        load_text(tmp_path, validation_fraction=fraction)


@pytest.mark.parametrize("texts", [{}, {"a.txt": "one"}, {"a.txt": "one", "b.txt": "one"}])
def test_too_few_documents_are_refused_with_the_two_counts(
    tmp_path: Path, texts: dict[str, str]
) -> None:
    write_files(tmp_path, {"blank.txt": " \n"} | texts)
    with pytest.raises(ValueError, match=r"must give documents to both .* gave 0 and \d "):
        load_text(tmp_path, validation_fraction=1e-9)


@pytest.mark.parametrize("fraction", [1e-9, 0.05, 1 - 1e-9])
def test_of_few_documents_each_side_gets_one(tmp_path: Path, fraction: float) -> None:
    write_files(tmp_path, many(3))
    train, validation = load_text(tmp_path, validation_fraction=fraction)
    assert len(train) >= 1
    assert len(validation) >= 1
    assert everything((train, validation)) == sorted(many(3).values())


@pytest.mark.parametrize("fraction", [0.001, 0.1, 0.5])
def test_a_single_text_file_is_cut_at_a_line_end(tmp_path: Path, fraction: float) -> None:
    lines = [f"line {number}\n" for number in range(100)]
    path = write_files(tmp_path, {"a.txt": "".join(lines)}) / "a.txt"
    (train,), (validation,) = map(texts_of, load_text(path, validation_fraction=fraction))
    assert train + validation == "".join(lines)
    assert train.endswith("\n")
    assert len(validation.splitlines()) == pytest.approx(100 * fraction, abs=1)


# --------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "source",
    ["./corpus", "/no/where", "~/no-such-corpus", "../x", "a/b/c", "corpus/", "x.txt", "a\\b", ""],
)
def test_a_missing_path_is_not_taken_for_a_hub_dataset(
    source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("asked the Hub"))
    with pytest.raises(FileNotFoundError, match=r"source \(.*\) must exist, because it reads like"):
        load_text(source)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("nul.txt", b"some\0thing", "holds NUL bytes"),
        ("latin.txt", "caf\xe9".encode("latin-1"), "codec can't decode"),
        ("utf16.txt", "hello".encode("utf-16"), "holds NUL bytes"),
        ("broken.jsonl", b'{"text": "a"}\n{"text": \n', "line 2 is no JSON object: Expecting"),
        ("number.jsonl", b"5\n", "line 1 is no JSON object"),
        ("surrogate.jsonl", b'{"text": "\\ud800"}', "line 1 .* surrogates not allowed"),
        ("fake.parquet", b"this is not parquet", "[Pp]arquet"),
    ],
)
def test_a_file_that_is_not_what_its_suffix_says_is_an_error(
    tmp_path: Path, name: str, content: bytes, reason: str
) -> None:
    write_files(tmp_path, many(40))
    load_text(tmp_path, validation_fraction=0.5)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"source file \(.*{name}\) must be UTF-8 .*{reason}"):
        load_text(tmp_path)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_column_that_holds_no_strings_is_an_error(tmp_path: Path, kind: str) -> None:
    if kind == "jsonl":
        write_files(tmp_path, {"rows.jsonl": '{"text": 3}'})
    else:
        datasets.Dataset.from_dict({"text": [1, 2]}).to_pandas().to_parquet(tmp_path / "r.parquet")
    with pytest.raises(ValueError, match=r"text_column \('text'\) must name a column of strings"):
        load_text(tmp_path)


@pytest.mark.parametrize("as_folder", [True, False])
def test_a_source_of_another_suffix_is_an_error(tmp_path: Path, as_folder: bool) -> None:
    write_files(tmp_path, {"table.csv": "a,b"})
    source = tmp_path if as_folder else tmp_path / "table.csv"
    with pytest.raises(ValueError, match=r"source \(.*\) must be or hold files in \.jsonl, .*txt"):
        load_text(source)


@pytest.mark.parametrize("argument", ["config", "split", "validation_split"])
@pytest.mark.parametrize("source", [PYTHON_STDLIB, "."])
def test_arguments_of_the_hub_are_refused_for_a_local_source(source: str, argument: str) -> None:
    with pytest.raises(ValueError, match=rf"{argument} \('other'\) must be left out, because"):
        load_text(source, **{argument: "other"})  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------- the Hub


def test_a_hub_dataset_out_of_reach_says_what_was_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    message = (
        r"source \('no-such-owner/no-such-text'\) must be .*"
        r"load_dataset\('no-such-owner/no-such-text', 'en', split='train'\) gave .*"
        r"check the name, the network and HF_HUB_OFFLINE, or use 'python-stdlib'"
    )
    with pytest.raises(FileNotFoundError, match=message):
        load_text("no-such-owner/no-such-text", config="en")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Stand in for the Hub; give the list of what was asked of it."""
    asked: list[tuple[Any, ...]] = []

    def load_dataset(name: str, config: str | None, *, split: str) -> datasets.Dataset:
        asked.append((name, config, split))
        texts = [f"{split} {number // 2}" for number in range(200)]  # every document twice
        return datasets.Dataset.from_dict({"content": [*texts, ""], "n": list(range(201))})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


def test_a_hub_dataset_is_divided_by_content(hub: list[tuple[Any, ...]]) -> None:
    train, validation = load_text("owner/name", config="en", text_column="content")
    assert hub == [("owner/name", "en", "train")]
    assert train.column_names == validation.column_names == ["text"]
    assert len(train) + len(validation) == 200
    assert not set(texts_of(train)) & set(texts_of(validation))


def test_a_validation_split_of_the_hub_is_taken_whole(hub: list[tuple[Any, ...]]) -> None:
    split = load_text("name", text_column="content", validation_split="dev")
    assert hub == [("name", None, "train"), ("name", None, "dev")]
    assert [len(part) for part in split] == [200, 200]
    assert all(text.startswith("dev ") for text in texts_of(split[1]))


@pytest.mark.parametrize("column", ["text", "n"])
def test_a_hub_column_without_text_is_an_error(hub: list[tuple[Any, ...]], column: str) -> None:
    message = rf"text_column \('{column}'\) must name .* \['content', 'n'\]"
    with pytest.raises(ValueError, match=message):
        load_text("owner/name", text_column=column)
    assert hub


# -------------------------------------------------------------------------------------- packing


def packed(blocks: datasets.Dataset) -> list[int]:
    return [token for block in blocks["input_ids"] for token in block]


@settings(max_examples=50, deadline=None)
@given(
    texts=st.lists(st.text("abé漢", max_size=12), min_size=1, max_size=12),
    block_size=st.integers(2, 9),
    batch_characters=st.integers(1, 20),
)
def test_packing_loses_only_the_end_of_the_stream(
    texts: list[str], block_size: int, batch_characters: int
) -> None:
    stream = [token for text in texts for token in [*text.encode(), END]]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "_BATCH_CHARACTERS", batch_characters)
        if len(stream) < block_size:
            with pytest.raises(ValueError, match="must not exceed"):
                pack(as_documents(texts), ByteTokenizer(), block_size)
            return
        blocks = pack(as_documents(texts), ByteTokenizer(), block_size)
    assert {len(block) for block in blocks["input_ids"]} == {block_size}
    assert packed(blocks) == stream[: len(stream) - len(stream) % block_size]


def test_dropping_leftovers_per_batch_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["abcde"] * 10
    monkeypatch.setattr(packing, "_BATCH_CHARACTERS", 5)
    tokenizer = ByteTokenizer()
    blocks = pack(as_documents(texts), tokenizer, 4)
    assert len(tokenizer.calls) == 10  # so there were nine borders between batches
    assert len(blocks) == 60 // 4
    assert len(blocks) != 10 * (6 // 4)


def test_blocks_are_lists_of_int_and_become_tensors() -> None:
    import torch

    blocks = pack(as_documents(["abcdefg", "hi"]), ByteTokenizer(), 5)
    assert blocks.column_names == ["input_ids"]
    assert blocks[1]["input_ids"] == [*b"fg", END, *b"hi"]
    assert all(type(token) is int for token in blocks[0]["input_ids"])
    rows = blocks.with_format("torch")[[0, 1]]["input_ids"]
    assert rows.shape == (2, 5)
    assert rows.dtype == torch.int64
    assert len(blocks.select([1])) == 1


def test_selected_rows_are_packed_in_their_order_and_as_text_whatever_the_format() -> None:
    documents = as_documents(["a", "b", "c", "d"]).select([3, 1])
    assert packed(pack(documents, ByteTokenizer(), 4)) == [ord("d"), END, ord("b"), END]
    assert utf8_bytes(documents) == 2
    tokenizer = ByteTokenizer()
    pack(documents.with_format("numpy"), tokenizer, 4)
    assert [type(text) for text in tokenizer.calls[0][0]] == [str, str]


def test_the_tokenizer_is_asked_for_no_special_tokens() -> None:
    tokenizer = ByteTokenizer()
    pack(as_documents(["ab"]), tokenizer, 2)
    ((texts, options),) = tokenizer.calls
    assert texts == ["ab"]
    assert options["add_special_tokens"] is False


@pytest.mark.parametrize("block_size", [1, 0, -1])
def test_a_block_that_predicts_nothing_is_refused(block_size: int) -> None:
    with pytest.raises(ValueError, match=rf"block_size \({block_size}\) must be at least 2, bec"):
        pack(as_documents(["abc"]), ByteTokenizer(), block_size)


def test_less_than_one_block_is_refused_with_the_number_of_tokens() -> None:
    assert len(pack(as_documents(["abc"]), ByteTokenizer(), 4)) == 1
    with pytest.raises(ValueError, match=r"block_size \(5\) must not exceed the 4 tokens of doc"):
        pack(as_documents(["abc"]), ByteTokenizer(), 5)


def test_a_tokenizer_without_end_token_is_refused() -> None:
    tokenizer = ByteTokenizer()
    tokenizer.eos_token_id = None
    with pytest.raises(ValueError, match=r"tokenizer \(ByteTokenizer\) must have an eos_token_id"):
        pack(as_documents(["abc"]), tokenizer, 2)


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1, max_size=5))
@settings(max_examples=25, deadline=None)
def test_bytes_are_counted_and_not_characters(texts: list[str]) -> None:
    assert utf8_bytes(as_documents(texts)) == len("".join(texts).encode())


# --------------------------------------------------------------------------------------- layers


@pytest.mark.parametrize(("module", "loaded"), [("corpus", False), ("byte_tokenizer", True)])
def test_reading_text_loads_neither_torch_nor_transformers(module: str, loaded: bool) -> None:
    code = (
        f"import sys, hf_adaptive_batch.{module}\n"
        "print('transformers' in sys.modules, 'torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.split()[0] == str(loaded), result.stderr
    assert loaded or result.stdout.split()[1] == "False"
