"""Streamed text: what is read of it, how it is divided, and that its place is exact."""

import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest

from hf_adaptive_batch import packed_stream, text_stream
from hf_adaptive_batch.corpus import load_text
from hf_adaptive_batch.packed_stream import PackedStream
from hf_adaptive_batch.text_stream import stream_text
from tests.test_packed_stream import ByteTokenizer, blocks_of, walk


ALL = 1 << 30
Rows = list[dict[str, Any]]


def write_rows(path: Path, rows: Rows) -> None:
    if path.suffix == ".parquet":
        datasets.Dataset.from_list(rows).to_pandas().to_parquet(path)
        return
    lines = "\n".join(map(json.dumps, rows))
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(lines.encode()))
    else:
        path.write_text(lines, "utf-8")


def write_shards(folder: Path, suffix: str = ".jsonl", shards: int = 3, count: int = 60) -> Path:
    for shard in range(shards):
        rows: Rows = [{"text": f"document {shard}.{number}"} for number in range(count)]
        rows[7]["text"], rows[9]["text"] = " \n", None
        write_rows(folder / f"{shard}{suffix}", rows)
    return folder


def texts_of(documents: Any) -> list[str]:
    return [row["text"] for row in documents]


@pytest.mark.parametrize("suffix", [".jsonl", ".ndjson", ".parquet", ".json.gz", ".jsonl.gz"])
def test_the_stream_is_divided_as_the_loaded_text_is(tmp_path: Path, suffix: str) -> None:
    write_shards(tmp_path, suffix)
    train, validation = stream_text(tmp_path, validation_bytes=ALL, validation_fraction=0.2)
    assert isinstance(train, datasets.IterableDataset)
    assert train.num_shards == 3
    assert train.column_names == validation.column_names == ["text"]
    if suffix.endswith(".gz"):
        assert len(texts_of(train)) + len(validation) == 3 * 58
        return
    loaded = load_text(tmp_path, validation_fraction=0.2)
    assert texts_of(validation) == texts_of(loaded[1])
    assert sorted(texts_of(train)) == sorted(texts_of(loaded[0]))
    assert texts_of(train) != texts_of(loaded[0])  # shards are shuffled


def test_shards_are_shuffled_by_seed_and_epoch_and_stay_whole(tmp_path: Path) -> None:
    write_shards(tmp_path, shards=6, count=20)
    orders = set()
    for seed in (0, 1):
        train, _ = stream_text(tmp_path, validation_bytes=ALL, seed=seed)
        for epoch in (0, 1, 2):
            train.set_epoch(epoch)
            shards = [text.split(".")[0] for text in texts_of(train)]
            order = tuple(dict.fromkeys(shards))
            assert shards == sorted(shards, key=order.index)
            orders.add(order)
    assert len(orders) == 6


def test_validation_is_read_no_further_than_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_stream, "_DOCUMENTS_PER_READ", 10)
    write_shards(tmp_path, count=400)
    train, whole = stream_text(tmp_path, validation_bytes=ALL, validation_fraction=0.2)
    some_train, some = stream_text(tmp_path, validation_bytes=100, validation_fraction=0.2)
    assert 100 <= len("".join(texts_of(some))) < 130
    assert texts_of(some) == texts_of(whole)[: len(some)]
    assert texts_of(some_train) == texts_of(train)  # none of the others goes to training


def test_validation_that_is_nowhere_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = []
    whole = text_stream._side

    def counted(batch: Any, **options: Any) -> Any:
        read.extend(batch["text"] if options["validation"] else [])
        return whole(batch, **options)

    monkeypatch.setattr(text_stream, "_side", counted)
    monkeypatch.setattr(text_stream, "_DOCUMENTS_PER_READ", 10)
    monkeypatch.setattr(text_stream, "content_hash", lambda text: 0.6)
    write_shards(tmp_path, count=400)
    message = r"source \(.*\) must give documents to both .* some to train on and 0 to validate"
    with pytest.raises(ValueError, match=message):
        stream_text(tmp_path, validation_bytes=1, validation_fraction=0.5)
    assert len(read) == 50  # 20 documents for each expected one, and up to the end of a read
    read.clear()
    with pytest.raises(ValueError, match=message):
        stream_text(tmp_path, validation_bytes=500, validation_fraction=0.5)
    assert 4000 < len("".join(text or "" for text in read)) + len(read) < 4300


def test_a_stream_of_validation_alone_is_refused(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", [{"text": "one"}])
    with pytest.raises(ValueError, match=r"gave none to train on and 1 to validate"):
        stream_text(tmp_path, validation_bytes=ALL, validation_fraction=1 - 1e-12)


@pytest.mark.parametrize("shuffle_blocks", [0, 8])
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ".json.gz"])
def test_its_place_is_exact_at_every_block_of_two_epochs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, shuffle_blocks: int
) -> None:
    monkeypatch.setattr(text_stream, "_DOCUMENTS_PER_READ", 7)
    monkeypatch.setattr(packed_stream, "_DOCUMENTS_PER_READ", 4)
    write_shards(tmp_path, suffix, count=20)

    def stream() -> PackedStream:
        documents, _ = stream_text(tmp_path, validation_bytes=ALL, validation_fraction=0.2)
        return PackedStream(documents, ByteTokenizer(), 16, shuffle_blocks=shuffle_blocks)

    whole, again = stream(), stream()
    for epoch in (0, 1):
        whole.set_epoch(epoch)
        walked = list(walk(whole))
        assert len({state["window"] for _, state in walked}) > 3
        for position, (_, state) in enumerate(walked):
            again.load_state_dict(state)
            assert blocks_of(again) == [block for block, _ in walked[position + 1 :]]


def test_a_single_file_may_keep_its_text_in_another_column(tmp_path: Path) -> None:
    path = tmp_path / "rows[1]*.jsonl"  # what would be a pattern
    write_rows(path, [{"id": number, "body": f"body {number}"} for number in range(50)])
    train, validation = stream_text(path, validation_bytes=ALL, text_column="body")
    assert len(texts_of(train)) + len(validation) == 50
    message = r"text_column \('text'\) must name .* has the columns \['id', 'body'\]; pass"
    with pytest.raises(ValueError, match=message):
        stream_text(path, validation_bytes=ALL)
    with pytest.raises(ValueError, match=r"text_column \('id'\) must name a column of strings"):
        stream_text(path, validation_bytes=ALL, text_column="id")


# --------------------------------------------------------------------------------------- errors


def test_the_standard_library_is_not_streamed() -> None:
    message = r"source \('python-stdlib'\) must be files or a Hub dataset to be streamed, because"
    with pytest.raises(ValueError, match=message):
        stream_text("python-stdlib", validation_bytes=ALL)


@pytest.mark.parametrize("names", [["a.txt"], ["a.jsonl", "b.parquet"], [], ["empty.jsonl"]])
def test_files_of_no_or_several_kinds_are_refused(tmp_path: Path, names: list[str]) -> None:
    for name in names:
        rows = [] if name.startswith("empty") else [{"text": "some text"}]
        write_rows(tmp_path / name, rows)
    message = r"source \(.*\) must be or hold files of one kind, .* in \.jsonl, .*to be streamed"
    with pytest.raises(ValueError, match=message):
        stream_text(tmp_path, validation_bytes=ALL)


def test_an_empty_shard_is_no_shard(tmp_path: Path) -> None:
    write_shards(tmp_path)
    (tmp_path / "0.jsonl").write_text("")
    train, _ = stream_text(tmp_path, validation_bytes=ALL)
    assert train.num_shards == 2


@pytest.mark.parametrize("name", ["broken.jsonl", "broken.parquet", "broken.jsonl.gz"])
def test_a_file_that_is_not_what_its_suffix_says_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b'{"text": "a"}\n{"text": \n')
    with pytest.raises(ValueError, match=r"source \(.*\) must hold UTF-8 text or Parquet as"):
        stream_text(tmp_path, validation_bytes=ALL)


def test_a_missing_path_and_arguments_of_the_hub_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"source .* must exist, because it reads like a"):
        stream_text("./nowhere", validation_bytes=ALL)
    write_shards(tmp_path)
    with pytest.raises(ValueError, match=r"config \('en'\) must be left out, because"):
        stream_text(tmp_path, validation_bytes=ALL, config="en")
    with pytest.raises(ValueError, match=r"validation_fraction \(1\.5\) must lie between 0 and 1"):
        stream_text(tmp_path, validation_bytes=ALL, validation_fraction=1.5)


# -------------------------------------------------------------------------------------- the Hub


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Stand in for the Hub, with and without known features; give the list of what was asked."""
    asked: list[tuple[Any, ...]] = []

    def load_dataset(
        name: str, config: str | None, *, split: str, streaming: bool
    ) -> datasets.IterableDataset:
        asked.append((name, config, split, streaming))
        texts = [f"{split} {number}" for number in range(200)]
        rows = datasets.Dataset.from_dict({"content": [*texts, ""], "n": list(range(201))})
        documents = rows.to_iterable_dataset(num_shards=4)
        return documents.map(dict) if config == "untyped" else documents

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


@pytest.mark.parametrize("config", ["en", "untyped"])
def test_a_hub_stream_is_divided_by_content(hub: list[tuple[Any, ...]], config: str) -> None:
    train, validation = stream_text(
        "owner/name", validation_bytes=ALL, config=config, text_column="content"
    )
    assert hub == [("owner/name", config, "train", True)]
    assert len(texts_of(train)) + len(validation) == 200
    assert not set(texts_of(train)) & set(texts_of(validation))


def test_of_a_validation_split_the_first_documents_are_read(hub: list[tuple[Any, ...]]) -> None:
    train, validation = stream_text(
        "name", validation_bytes=40, text_column="content", validation_split="dev"
    )
    assert hub == [("name", None, "train", True), ("name", None, "dev", True)]
    assert len(texts_of(train)) == 200
    assert texts_of(validation) == [f"dev {number}" for number in range(8)]


@pytest.mark.parametrize("config", ["en", "untyped"])
@pytest.mark.parametrize("column", ["text", "n"])
def test_a_hub_column_without_text_is_an_error(
    hub: list[tuple[Any, ...]], column: str, config: str
) -> None:
    with pytest.raises(ValueError, match=rf"text_column \('{column}'\) must name a column of str"):
        stream_text("owner/name", validation_bytes=ALL, text_column=column, config=config)
    assert hub


def test_opening_a_stream_of_text_loads_no_framework() -> None:
    code = "import sys, hf_adaptive_batch.text_stream\n"
    code += "print(*{'torch', 'transformers'} & {*sys.modules})"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == ""
