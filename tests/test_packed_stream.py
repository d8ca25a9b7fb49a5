"""A stream of blocks: the blocks of map-style packing, each once, from any place again."""

import copy
import json
import pickle
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets.distributed import split_dataset_by_node
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import default_data_collator

from hf_adaptive_batch import packed_stream, packing
from hf_adaptive_batch.packed_stream import PackedStream
from hf_adaptive_batch.packing import count_tokens, pack


END = 256
Block = tuple[int, ...]


class ByteTokenizer:
    """One token per UTF-8 byte."""

    eos_token_id: int | None = END

    def __call__(self, text: list[str], /, **options: Any) -> dict[str, list[list[int]]]:
        return {"input_ids": [list(document.encode()) for document in text]}


def blocks_of(stream: Any) -> list[Block]:
    return [tuple(sample["input_ids"].tolist()) for sample in stream]


def walk(stream: PackedStream) -> Iterator[tuple[Block, dict[str, Any]]]:
    """Each block, and the state behind it as it comes back from a file."""
    for sample in stream:
        yield tuple(sample["input_ids"].tolist()), json.loads(json.dumps(stream.state_dict()))


def in_memory(texts: list[str], shards: int = 1) -> datasets.IterableDataset:
    return datasets.Dataset.from_dict({"text": texts}).to_iterable_dataset(num_shards=shards)


def write_shards(folder: Path, kind: str, shards: int) -> list[str]:
    """Shards of different lengths, with blanks among the documents and a column to drop."""
    files = []
    for shard in range(shards):
        rows = [
            {"body": " " if row % 5 == 4 else f"{shard}:{row} " + "x" * (row * 7 % 11), "row": row}
            for row in range(8 + shard)
        ]
        files.append(str(folder / f"{shard}.{kind}"))
        if kind == "jsonl":
            Path(files[-1]).write_text("\n".join(map(json.dumps, rows)), "utf-8")
        else:
            pq.write_table(pa.Table.from_pylist(rows), files[-1], row_group_size=4)
    return files


def open_shards(files: list[str]) -> datasets.IterableDataset:
    """As a user would: shards shuffled, blanks dropped, the column renamed."""
    kind = {"jsonl": "json", "parquet": "parquet"}[files[0].rpartition(".")[2]]
    raw = datasets.load_dataset(kind, data_files=files, split="train", streaming=True)
    kept = raw.filter(lambda row: row["body"].strip() != "")
    named = kept.rename_column("body", "text").select_columns("text")
    return named.shuffle(seed=3, buffer_size=1)


@pytest.fixture(autouse=True)
def _many_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_stream, "_DOCUMENTS_PER_READ", 3)


# ------------------------------------------------------------------------------------ the blocks


@settings(max_examples=60)
@given(
    texts=st.lists(st.text("abé漢", max_size=12), min_size=1, max_size=14),
    shards=st.integers(1, 4),
    block_size=st.integers(2, 9),
    batch_characters=st.integers(1, 20),
    per_read=st.integers(1, 5),
)
def test_blocks_and_tokens_are_those_of_map_style_packing(
    texts: list[str], shards: int, block_size: int, batch_characters: int, per_read: int
) -> None:
    documents = datasets.Dataset.from_dict({"text": texts})
    tokens = count_tokens(documents, ByteTokenizer())
    expected: list[Block] = []
    if tokens >= block_size:
        rows = pack(documents, ByteTokenizer(), block_size)["input_ids"]
        expected = [tuple(row) for row in rows]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "_BATCH_CHARACTERS", batch_characters)
        patch.setattr(packed_stream, "_DOCUMENTS_PER_READ", per_read)
        stream = PackedStream(
            in_memory(texts, min(shards, len(texts))), ByteTokenizer(), block_size
        )
        assert blocks_of(stream) == expected
    assert tokens == sum(len(text.encode()) + 1 for text in texts)
    assert len(expected) * block_size == tokens - tokens % block_size


def test_a_window_that_lost_its_leftover_tokens_would_be_noticed() -> None:
    stream = PackedStream(in_memory(["abcdefghij"] * 9), ByteTokenizer(), 7)
    states = [state for _, state in walk(stream)]
    later = next(state for state in states if state["leftover"])
    stream.load_state_dict(later)
    rest = blocks_of(stream)
    stream.load_state_dict(later | {"leftover": []})
    assert blocks_of(stream) != rest


@settings(max_examples=40)
@given(
    lengths=st.lists(st.integers(0, 12), min_size=6, max_size=20),
    shuffle_blocks=st.integers(1, 9),
    seed=st.integers(0, 5),
)
def test_shuffled_blocks_come_once_and_from_their_window(
    lengths: list[int], shuffle_blocks: int, seed: int
) -> None:
    texts = [chr(ord("a") + i) * length for i, length in enumerate(lengths)]
    ordered = blocks_of(PackedStream(in_memory(texts), ByteTokenizer(), 2))
    stream = PackedStream(
        in_memory(texts), ByteTokenizer(), 2, shuffle_blocks=shuffle_blocks, seed=seed
    )
    walked = list(walk(stream))
    assert sorted(block for block, _ in walked) == sorted(ordered)
    windows: dict[int, list[Block]] = {}
    for block, state in walked:
        windows.setdefault(state["window"], []).append(block)
    assert list(windows) == list(range(len(windows)))
    begin = 0
    for index, window in windows.items():
        assert sorted(window) == sorted(ordered[begin : begin + len(window)])
        assert len(window) >= shuffle_blocks or index == len(windows) - 1
        begin += len(window)


def test_every_epoch_and_seed_has_an_order_of_its_own_and_keeps_it() -> None:
    texts = [f"document {number}" for number in range(60)]

    def epoch_of(seed: int, epoch: int) -> list[Block]:
        stream = PackedStream(in_memory(texts), ByteTokenizer(), 5, shuffle_blocks=40, seed=seed)
        stream.set_epoch(epoch)
        first = blocks_of(stream)
        assert blocks_of(stream) == first
        return first

    orders = [epoch_of(seed, epoch) for seed in (0, 1) for epoch in (0, 1, 2)]
    assert len({tuple(order) for order in orders}) == 6
    assert len({tuple(sorted(order)) for order in orders}) == 1
    assert epoch_of(1, 2) == orders[-1]


def test_shards_come_in_another_order_in_every_epoch(tmp_path: Path) -> None:
    stream = PackedStream(open_shards(write_shards(tmp_path, "jsonl", 5)), ByteTokenizer(), 4)
    orders = []
    for epoch in range(3):
        stream.set_epoch(epoch)
        assert stream.epoch == epoch
        orders.append(tuple(blocks_of(stream)))
    assert len(set(orders)) == 3
    tokens = [sum(len(block) for block in order) for order in orders]
    assert len(set(tokens)) == 1


def test_blocks_collate_to_what_map_style_rows_collate_to() -> None:
    texts = ["some text", "and more of it"]
    rows = pack(datasets.Dataset.from_dict({"text": texts}), ByteTokenizer(), 5)
    stream = PackedStream(in_memory(texts), ByteTokenizer(), 5)
    expected = default_data_collator([rows[i] for i in range(len(rows))])["input_ids"]
    found = default_data_collator(list(stream))["input_ids"]
    assert found.dtype == expected.dtype == torch.int64
    assert torch.equal(found, expected)


def test_text_is_read_as_text_whatever_the_format() -> None:
    documents = in_memory(["abc", "def"])
    expected = blocks_of(PackedStream(documents, ByteTokenizer(), 2))
    for kind in ("numpy", "arrow", "torch"):
        found = blocks_of(PackedStream(documents.with_format(kind), ByteTokenizer(), 2))
        assert found == expected


# ------------------------------------------------------------------------------------- its place


@pytest.mark.parametrize("epoch", [0, 1])
@pytest.mark.parametrize("shuffle_blocks", [0, 7])
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_from_every_place_the_rest_is_what_it_was(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    shards: int,
    shuffle_blocks: int,
    epoch: int,
) -> None:
    # `datasets` waits seconds behind every end of interleaved Parquet files.
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0, raising=False)
    files = write_shards(tmp_path, kind, shards)

    def stream() -> PackedStream:
        return PackedStream(
            open_shards(files), ByteTokenizer(), 6, shuffle_blocks=shuffle_blocks, seed=1
        )

    whole = stream()
    whole.set_epoch(epoch)
    walked = list(walk(whole))
    blocks = [block for block, _ in walked]
    assert len(blocks) > 10 * shards
    assert len({state["window"] for _, state in walked}) > 1
    again = stream()
    for position, (_, state) in enumerate(walked):
        again.load_state_dict(state)
        assert blocks_of(again) == blocks[position + 1 :]
    assert blocks_of(again) == blocks  # only the next iteration goes on, this one begins anew
    # And so on from the places of a run that itself went on: `datasets` writes them in other words.
    state = walked[0][1]
    for block in blocks[1:]:
        again.load_state_dict(state)
        found, state = next(walk(again))
        assert found == block


@settings(max_examples=40)
@given(
    lengths=st.lists(st.integers(0, 12), min_size=1, max_size=16),
    shards=st.integers(1, 3),
    block_size=st.integers(2, 6),
    shuffle_blocks=st.integers(0, 6),
    epoch=st.integers(0, 2),
    cuts=st.lists(st.integers(1, 9), max_size=8),
)
def test_a_run_of_many_restarts_sees_what_one_without_sees(
    lengths: list[int],
    shards: int,
    block_size: int,
    shuffle_blocks: int,
    epoch: int,
    cuts: list[int],
) -> None:
    texts = [chr(ord("a") + i) * length for i, length in enumerate(lengths)]

    def stream() -> PackedStream:
        documents = in_memory(texts, min(shards, len(texts))).shuffle(seed=1, buffer_size=1)
        return PackedStream(documents, ByteTokenizer(), block_size, shuffle_blocks=shuffle_blocks)

    whole = stream()
    whole.set_epoch(epoch)
    expected = blocks_of(whole)
    found: list[Block] = []
    part = stream()
    part.set_epoch(epoch)
    for cut in cuts:
        found += blocks_of(islice(part, cut))
        state = part.state_dict()
        part = stream()
        part.load_state_dict(state)
    assert found + blocks_of(part) == expected


@pytest.mark.parametrize("field", ["window", "yielded", "documents", "leftover"])
def test_no_field_of_the_state_can_be_left_out(field: str) -> None:
    texts = [f"document {number}" for number in range(40)]
    stream = PackedStream(in_memory(texts), ByteTokenizer(), 7, shuffle_blocks=9)
    states = [state for _, state in walk(stream)]
    state = next(state for state in states if state["leftover"] and state["yielded"] > 2)
    stream.load_state_dict(state)
    rest = blocks_of(stream)
    begin = PackedStream(in_memory(texts), ByteTokenizer(), 7, shuffle_blocks=9).state_dict()
    stream.load_state_dict(state | {field: begin[field]})
    assert blocks_of(stream) != rest


def test_the_state_tells_the_place_wherever_it_is_asked_for() -> None:
    stream = PackedStream(in_memory(["abcdef"] * 20), ByteTokenizer(), 5, shuffle_blocks=4)
    begin = stream.state_dict()
    walked = list(walk(stream))
    assert stream.state_dict() == walked[-1][1]  # the end, until another epoch is begun or set
    stream.load_state_dict(begin)
    assert list(walk(stream)) == walked
    middle = walked[7][1]
    stream.load_state_dict(middle)
    assert stream.state_dict() == middle
    iterator = iter(stream)
    assert stream.state_dict() == middle
    assert blocks_of([next(iterator)]) == [walked[8][0]]
    assert stream.state_dict() == walked[8][1]
    iter(stream)
    assert stream.state_dict() == begin
    stream.load_state_dict(walked[-1][1])
    assert blocks_of(stream) == []  # nothing is left of that epoch …
    assert list(walk(stream)) == walked  # … and it is over


def test_another_epoch_gives_the_place_up_and_the_same_epoch_does_not() -> None:
    stream = PackedStream(in_memory(["abcdef"] * 20), ByteTokenizer(), 5, shuffle_blocks=4)
    stream.set_epoch(1)
    walked = list(walk(stream))
    state = walked[5][1]
    stream.set_epoch(0)
    stream.load_state_dict(state)
    assert stream.epoch == 1
    stream.set_epoch(1)
    assert list(walk(stream)) == walked[6:]
    stream.load_state_dict(state)
    stream.set_epoch(2)
    assert stream.state_dict()["epoch"] == 2
    assert len(blocks_of(stream)) == len(walked)


def test_a_state_is_small_plain_json_and_nobody_elses() -> None:
    texts = [f"document {number}" for number in range(500)]
    stream = PackedStream(in_memory(texts, 4), ByteTokenizer(), 64, shuffle_blocks=32)
    for _ in islice(stream, 60):
        state = stream.state_dict()
        assert json.loads(json.dumps(state)) == state
        assert len(json.dumps(state)) < 2000
    assert state["leftover"]
    kept = copy.deepcopy(state)
    state["leftover"].clear()
    state["documents"].clear()
    assert stream.state_dict() == kept
    stream.load_state_dict(kept)
    kept["documents"].clear()
    assert len(blocks_of(stream)) == len(blocks_of(stream)) - 60


# --------------------------------------------------------------------------- others that read too


def test_iterations_do_not_move_each_others_place() -> None:
    texts = [f"document {number}" for number in range(40)]
    documents = in_memory(texts, 4)
    held_out, rest = documents.take(8), documents.skip(8)
    stream = PackedStream(rest, ByteTokenizer(), 7)
    walked = list(walk(stream))
    found, mine = [], iter(documents)
    for number, (block, state) in enumerate(walk(stream)):
        found.append((block, state))
        if number % 5 == 0:  # an evaluation, another iteration, and one of the user's
            assert [row["text"] for row in held_out] == texts[:8]
            list(islice(PackedStream(rest, ByteTokenizer(), 7), 3))
            list(islice(copy.copy(stream), 3))
        if number < 20:
            assert next(mine)["text"] == texts[number]
    assert found == walked


def test_going_on_leaves_the_documents_as_they_were() -> None:
    texts = [f"document {number}" for number in range(40)]
    documents = in_memory(texts)
    stream = PackedStream(documents, ByteTokenizer(), 7)
    before = documents.state_dict()
    next(islice(stream, 30, None))
    stream.load_state_dict(stream.state_dict())
    next(iter(stream))
    assert documents.state_dict() == before
    assert [row["text"] for row in documents] == texts


@pytest.mark.parametrize("workers", [0, 1])
def test_a_loader_worker_reads_what_the_main_process_reads(tmp_path: Path, workers: int) -> None:
    files = write_shards(tmp_path, "jsonl", 3)
    stream = PackedStream(open_shards(files), ByteTokenizer(), 6, shuffle_blocks=5)
    for epoch in (0, 1):
        stream.set_epoch(epoch)
        walked = list(walk(stream))
        loader = torch.utils.data.DataLoader(stream, batch_size=None, num_workers=workers)
        assert blocks_of(loader) == [block for block, _ in walked]
        stream.load_state_dict(walked[12][1])
        assert blocks_of(loader) == [block for block, _ in walked[13:]]


def test_a_worker_that_stays_is_told_the_epoch(tmp_path: Path) -> None:
    files = write_shards(tmp_path, "jsonl", 3)
    stream = PackedStream(open_shards(files), ByteTokenizer(), 6, shuffle_blocks=5)
    loader = torch.utils.data.DataLoader(
        stream, batch_size=None, num_workers=1, persistent_workers=True
    )
    for epoch in (0, 1, 2):
        stream.set_epoch(epoch)
        assert blocks_of(loader) == blocks_of(stream)


def test_a_stream_goes_to_another_process_with_its_place() -> None:
    stream = PackedStream(in_memory(["abcdef"] * 20), ByteTokenizer(), 5, shuffle_blocks=4)
    walked = list(walk(stream))
    stream.load_state_dict(walked[6][1])
    assert list(walk(pickle.loads(pickle.dumps(stream)))) == walked[7:]


# ------------------------------------------------------------------------------------- refusals


def test_a_shuffle_buffer_is_refused_wherever_it_is() -> None:
    documents = in_memory(["abc"] * 9, 3)
    message = r"documents \(shuffled with buffer_size=5\) must have no .*because.*buffer_size=1"
    for shuffled in (
        documents.shuffle(seed=0, buffer_size=5),
        documents.shuffle(seed=0, buffer_size=5).filter(bool).take(3),
        datasets.concatenate_datasets([documents, documents.shuffle(seed=0, buffer_size=5)]),
    ):
        with pytest.raises(ValueError, match=message):
            PackedStream(shuffled, ByteTokenizer(), 2)
    PackedStream(documents.shuffle(seed=0, buffer_size=1).take(3), ByteTokenizer(), 2)


def test_documents_that_were_split_between_ranks_are_refused() -> None:
    documents = in_memory(["abc"] * 9, 3)
    PackedStream(split_dataset_by_node(documents, rank=0, world_size=1), ByteTokenizer(), 2)
    with pytest.raises(ValueError, match=r"documents \(part 1 of 3\) must not be split between"):
        PackedStream(split_dataset_by_node(documents, rank=1, world_size=3), ByteTokenizer(), 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"block_size": 1}, r"block_size \(1\) must be at least 2"),
        ({"shuffle_blocks": -1}, r"shuffle_blocks \(-1\) must not be negative"),
        ({"seed": -1}, r"seed \(-1\) must not be negative"),
    ],
)
def test_what_does_not_fit_is_refused_at_once(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PackedStream(in_memory(["abc"]), ByteTokenizer(), **({"block_size": 2} | arguments))


def test_a_tokenizer_without_end_and_documents_without_text_are_refused() -> None:
    tokenizer = ByteTokenizer()
    tokenizer.eos_token_id = None
    with pytest.raises(ValueError, match="must have an eos_token_id"):
        PackedStream(in_memory(["abc"]), tokenizer, 2)
    documents = in_memory(["abc"]).rename_column("text", "body")
    with pytest.raises(ValueError, match=r"documents \(columns \['body'\]\) must have a column"):
        PackedStream(documents, ByteTokenizer(), 2)


@pytest.mark.parametrize("name", ["version", "block_size", "shuffle_blocks", "seed"])
def test_the_state_of_other_settings_is_refused(name: str) -> None:
    stream = PackedStream(in_memory(["abc"] * 9), ByteTokenizer(), 2, shuffle_blocks=3, seed=4)
    state = stream.state_dict()
    with pytest.raises(ValueError, match=rf"{name} \({state[name]}\) must be that of the state"):
        stream.load_state_dict(state | {name: 99})
