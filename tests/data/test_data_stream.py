"""Lanes of a stream: windows against a slow reference, resumed anywhere, on any data ranks.

A local folder of files stands for the hub: the code that reads it is the same.
"""

import dataclasses
import json
import random
import zlib
from collections.abc import Iterator, Sequence
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch

import data.sources.rows
import data.stream
from data.config import DataConfig, SourceConfig, TokenizerConfig
from data.errors import DataError
from data.loader import StepBatches, make_batch
from data.stages import Stage
from data.stream import Lane, Place, StreamDataset, StreamLoader

BYTE = TokenizerConfig("byte", 272)
BOS, EOS = 256, 257
N_FILES, LANES, SEQ_LEN = 7, 4, 16
# Three steps of epoch 0, and on through a second and a third one in the shorter lanes.
STEPS, BATCH = 30, 8

Rows = list[list[dict[str, Any]]]  # by file


def some_rows(seed: int = 5) -> Rows:
    """Rows of files: texts of many lengths, some empty, some null, with a score."""
    draw = random.Random(seed)
    texts = [None, "", "a", "äöü", "x" * 100]

    def row() -> dict[str, Any]:
        text = draw.choice([*texts, "".join(draw.choices("ab \n", k=draw.randrange(60)))])
        return {"text": text, "score": draw.randrange(4)}

    # Over 128 rows in one file: more than the library's tables that are read at a time.
    return [
        [row() for _ in range(draw.choice([6, 9, 12]) + 130 * (i == 1))] for i in range(N_FILES)
    ]


def write(folder: Path, files: Rows, format_: str) -> Path:
    """A dataset's folder of JSON lines or Parquet files."""
    folder.mkdir(parents=True)
    for number, rows in enumerate(files):
        path = folder / f"part-{number}.{format_}"
        if format_ == "jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        else:
            schema = pyarrow.schema([("text", pyarrow.string()), ("score", pyarrow.int64())])
            table = pyarrow.Table.from_pylist(rows, schema)
            pyarrow.parquet.write_table(table, path, row_group_size=5)
    return folder


def config(folder: Path, lanes: int = LANES, **source: Any) -> DataConfig:
    """A stream of the folder."""
    sources = {"web": SourceConfig("huggingface", str(folder), **source)}
    return DataConfig("web", "unused", sources, stream_shards=lanes)


@pytest.fixture(scope="module", params=["jsonl", "parquet"])
def folder(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("dataset") / "web", some_rows(), request.param)


@pytest.fixture(scope="module")
def dataset(folder: Path) -> StreamDataset:
    return StreamDataset.open(config(folder), BYTE)


def loader(dataset: StreamDataset, rank: int = 0, size: int = 1, **how: Any) -> StreamLoader:
    """The loader of one data rank."""
    stage = Stage(0, 0, 0, SEQ_LEN, BATCH, how.pop("micro_batch_size", None), {"web": 1.0})
    return StreamLoader(dataset, stage, rank=rank, size=size, **how)


def take(
    loader: StreamLoader, first_batch: int, n_steps: int, skips: Sequence[tuple[int, int]] = ()
) -> list[StepBatches]:
    """Some steps; those that were read ahead are thrown away."""
    steps = loader.steps(first_batch, skips)
    found = list(islice(steps, n_steps))
    steps.close()
    return found


# ---------------------------------------------------------------- the slow and obvious reference


def lane_tokens(files: Rows, lane: int, n_tokens: int) -> tuple[list[int], set[int]]:
    """The tokens of a lane from its beginning, and where its documents begin."""
    shares = [N_FILES // LANES + (i < N_FILES % LANES) for i in range(LANES)]
    mine = files[sum(shares[:lane]) : sum(shares[: lane + 1])]
    texts = [row["text"] for rows in mine for row in rows if row["text"]]
    tokens: list[int] = []
    starts = set()
    while len(tokens) < n_tokens:
        for text in texts:
            starts.add(len(tokens))
            tokens += [BOS, *text.encode(), EOS]
    return tokens, starts


def reference_windows(files: Rows, lane: int) -> Iterator[tuple[list[int], list[int]]]:
    """Concatenate, cut."""
    tokens, starts = lane_tokens(files, lane, 10_000)
    for begin in range(0, 10_000 - SEQ_LEN, SEQ_LEN):
        inside = [i for i in range(SEQ_LEN + 1) if begin + i in starts]
        yield tokens[begin : begin + SEQ_LEN + 1], inside


@pytest.mark.parametrize("lane", range(LANES))
def test_windows_equal_the_lanes_documents_end_to_end_and_cut(
    dataset: StreamDataset, lane: int
) -> None:
    read = dataset.lane(lane)
    epochs = set()
    for expected in islice(reference_windows(some_rows(), lane), 500):
        tokens, starts = read.window(SEQ_LEN)
        assert (tokens.tolist(), starts.tolist()) == expected
        assert tokens.dtype == np.uint32 and starts.dtype == np.int64
        epochs.add(read.place.epoch)
    assert len(epochs) > 1  # the documents came to their end, and began again


def test_batches_are_those_of_the_lanes_windows(dataset: StreamDataset) -> None:
    windows = [reference_windows(some_rows(), lane) for lane in range(LANES)]
    for step, batches in enumerate(take(loader(dataset), 0, STEPS)):
        rows = [next(windows[row // (BATCH // LANES)]) for row in range(BATCH)]
        arrays = [(np.array(tokens), np.array(starts, dtype=np.int64)) for tokens, starts in rows]
        (found,) = batches.micro_batches
        expected = make_batch(arrays, document_mask=True)
        for one, other in zip(found, expected, strict=True):
            assert one is not None and other is not None and torch.equal(one, other)
        assert batches.n_targets == int((expected.labels != -100).sum())
        assert batches.digest == sum(
            zlib.crc32(
                np.array(tokens, np.uint32).tobytes(), zlib.crc32(sample.to_bytes(8, "little"))
            )
            for sample, (tokens, _) in enumerate(rows, start=step * BATCH)
        )


def test_lanes_are_what_the_library_deals(dataset: StreamDataset, folder: Path) -> None:
    import datasets

    whole = datasets.load_dataset(str(folder), split="train", streaming=True)
    for lane in range(LANES):
        part = whole.shard(num_shards=LANES, index=lane)
        tokens = [t for row in part if row["text"] for t in [BOS, *row["text"].encode(), EOS]]
        read = dataset.lane(lane)
        found = [t for _ in range(len(tokens) // SEQ_LEN) for t in read.window(SEQ_LEN)[0][:-1]]
        assert found == tokens[: len(found)]


# ---------------------------------------------------------------- on any mesh, resumed anywhere


@pytest.mark.parametrize("size", [2, 4])
def test_data_ranks_together_take_the_same_batches(dataset: StreamDataset, size: int) -> None:
    alone = take(loader(dataset), 0, STEPS)
    ranks = [
        take(loader(dataset, rank, size, micro_batch_size=1), 0, STEPS) for rank in range(size)
    ]
    for step, whole in enumerate(alone):
        parts = [rank[step] for rank in ranks]
        assert sum(part.digest for part in parts) == whole.digest
        assert sum(part.n_targets for part in parts) == whole.n_targets
        rows = torch.cat([batch.tokens for part in parts for batch in part.micro_batches])
        assert torch.equal(rows, whole.micro_batches[0].tokens)
        assert {k: v for part in parts for k, v in (part.lanes or {}).items()} == whole.lanes


def digests(batches: list[StepBatches]) -> list[int]:
    return [each.digest for each in batches]


@pytest.mark.parametrize(
    "stops", [(1,), (13,), (7, 8), (3, 17), (2, 9, 20), (10, 11, 12, 25)], ids=str
)
@pytest.mark.parametrize("prefetch", [0, 5])
def test_resumed_again_and_again_on_other_ranks_the_steps_are_the_same(
    dataset: StreamDataset, stops: tuple[int, ...], prefetch: int
) -> None:
    expected = digests(take(loader(dataset), 0, STEPS))
    assert len(set(expected)) == STEPS
    places: dict[str, list[int]] | None = None
    found: list[int] = []
    for number, (first, last) in enumerate(pairwise((0, *stops, STEPS))):
        size = (1, 2, 4)[number % 3]
        ranks = [
            take(
                loader(dataset, rank, size, places=places, prefetch=prefetch, threads=1 + number),
                first,
                last - first,
            )
            for rank in range(size)
        ]
        found += [sum(rank[i].digest for rank in ranks) for i in range(last - first)]
        saved = {k: v for rank in ranks for k, v in (rank[-1].lanes or {}).items()}
        places = json.loads(json.dumps(saved))  # as a manifest holds them
    assert found == expected


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("prefetch", [0, 3])
def test_skipped_batches_are_read_past_and_leave_the_lanes_where_they_were(
    dataset: StreamDataset, size: int, prefetch: int
) -> None:
    """From two stops, the second inside a range: as all batches without those of the ranges."""
    skips = ((0, 2), (5, 8), (11, 12))
    for rank in range(size):
        whole = take(loader(dataset, rank, size), 0, 15)
        kept = [whole[number] for number in (2, 3, 4, 8, 9, 10, 12, 13, 14)]
        found = take(loader(dataset, rank, size, prefetch=prefetch, threads=2), 0, 3, skips)
        places = found[-1].lanes
        again = loader(dataset, rank, size, places=places, prefetch=prefetch)
        found += take(again, found[-1].number + 1, 6, skips)
        for one, other in zip(found, kept, strict=True):
            assert (one.number, one.digest, one.lanes) == (other.number, other.digest, other.lanes)
            assert torch.equal(one.micro_batches[0].tokens, other.micro_batches[0].tokens)


def test_a_lane_goes_on_after_any_window(dataset: StreamDataset) -> None:
    """Lane 0 has the file of over 128 rows; its windows go through documents' ends and the wrap."""
    reads = dataset.lane(0)
    windows, places = [], [Place()]
    for _ in range(400):
        windows.append(reads.window(SEQ_LEN)[0].tolist())
        places.append(reads.place)
    assert places[-1].epoch >= 1
    for number in range(0, 397, 7):
        again = dataset.lane(0, places[number])
        assert [again.window(SEQ_LEN)[0].tolist() for _ in range(3)] == windows[number : number + 3]


def test_filter_and_column_choose_what_a_lane_reads(tmp_path: Path) -> None:
    files = some_rows()
    folder = write(tmp_path / "web", files, "jsonl")
    chosen = config(folder, filter=[("score", ">=", 2)])
    dataset = StreamDataset.open(chosen, BYTE)
    kept = [[row for row in rows if row["score"] >= 2] for rows in files]
    read = dataset.lane(1)
    for expected, _ in islice(reference_windows(kept, 1), 100):
        assert read.window(SEQ_LEN)[0].tolist() == expected


def test_the_hash_tells_another_stream(folder: Path, tmp_path: Path) -> None:
    def hash_of(changed: DataConfig, tokenizer: TokenizerConfig = BYTE) -> str:
        return StreamDataset.open(changed, tokenizer).hash

    same = config(folder)
    assert hash_of(same) == hash_of(same)
    grown = some_rows()
    grown[3].append({"text": "one more", "score": 0})
    others = [
        config(folder, lanes=2),
        config(folder, text_column="score"),
        config(folder, filter=[("score", ">", 1)]),
        config(write(tmp_path / "web", grown, "jsonl")),
        dataclasses.replace(same, invalid_text="skip"),
    ]
    assert len({hash_of(same), *map(hash_of, others)}) == 1 + len(others)


def test_a_local_dataset_that_changed_under_its_name_has_another_hash(tmp_path: Path) -> None:
    folder = write(tmp_path / "web", some_rows(), "jsonl")
    before = StreamDataset.open(config(folder), BYTE).hash
    with (folder / "part-2.jsonl").open("a") as file:
        file.write('{"text": "more", "score": 1}\n')
    assert StreamDataset.open(config(folder), BYTE).hash != before


# ---------------------------------------------------------------- what is refused, what goes wrong


def test_more_lanes_than_files_are_refused_with_the_number_that_fits(folder: Path) -> None:
    dataset = StreamDataset.open(config(folder, lanes=8), BYTE)
    with pytest.raises(DataError, match=r"data.stream_shards \(8\).* 7 files.*use 4, the largest"):
        dataset.check(global_batch_size=8, size=2)
    with pytest.raises(DataError, match="use fewer data ranks than 8, or prepare"):
        dataset.check(global_batch_size=8, size=8)
    StreamDataset.open(config(folder, lanes=7), BYTE).check(global_batch_size=7, size=1)


def test_a_tokenizer_to_be_trained_is_refused(folder: Path) -> None:
    with pytest.raises(DataError, match=r"tokenizer.path \(null\).*prepares nothing"):
        StreamDataset.open(config(folder), TokenizerConfig("bpe", 1000))


def test_a_dataset_that_is_not_there_is_told(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"data.sources.web.path \(.*empty\) cannot be read"):
        StreamDataset.open(config(tmp_path / "empty"), BYTE)


def test_a_lane_without_text_is_refused_rather_than_read_forever(folder: Path) -> None:
    dataset = StreamDataset.open(config(folder, filter=[("score", ">", 9)]), BYTE)
    with pytest.raises(DataError, match=r"lane 2, has no text: see its filter"):
        dataset.lane(2).window(SEQ_LEN)


def test_bad_text_meets_the_policy(tmp_path: Path) -> None:
    rows = [[{"text": "good"}, {"text": "b\0d"}, {"text": "fine"}]]
    folder = write(tmp_path / "web", rows, "jsonl")
    read = {}
    for policy in ("replace", "skip"):
        kept = dataclasses.replace(config(folder, lanes=1), invalid_text=policy)
        dataset = StreamDataset.open(kept, BYTE)
        tokens = dataset.lane(0).window(14)[0].tolist()
        read[policy] = dataset.tokenizer().decode(t for t in tokens if t < BOS)
    assert read["replace"].startswith("goodb\ufffdd")
    assert read["skip"].startswith("goodfine")
    strict = StreamDataset.open(config(folder, lanes=1), BYTE)
    with pytest.raises(DataError, match=r"row 2 of shard 0 .* NUL"):
        strict.lane(0).window(14)
    steps = StreamLoader(strict, Stage(0, 0, 0, 14, 1, None, {}), rank=0, size=1).steps(0)
    with pytest.raises(DataError, match="NUL"):
        next(steps)


class Flaky:
    """`data.sources.rows.rows`, cut off after every third row, at most `cuts` times."""

    def __init__(self, cuts: int) -> None:
        self.cuts, self.real = cuts, data.sources.rows.rows

    def __call__(self, *arguments: Any) -> Iterator[Any]:
        for number, row in enumerate(self.real(*arguments)):
            if number == 3 and self.cuts:
                self.cuts -= 1
                raise DataError("cannot be read") from ConnectionError("Server Disconnected")
            yield row


def windows_of(lane: Lane, n: int) -> list[list[int]]:
    return [lane.window(SEQ_LEN)[0].tolist() for _ in range(n)]


def test_a_lost_connection_loses_no_row(
    dataset: StreamDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = windows_of(dataset.lane(0), 200)
    monkeypatch.setattr(data.stream, "RETRY_SECONDS", (0.0, 0.0))
    flaky = Flaky(cuts=1000)
    monkeypatch.setattr(data.stream, "rows", flaky)
    assert windows_of(dataset.lane(0), 200) == expected
    assert flaky.cuts < 960  # it was cut off again and again


def test_a_connection_that_stays_lost_is_told(
    dataset: StreamDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries = []

    def lost(*arguments: Any) -> Iterator[Any]:
        tries.append(arguments)
        raise DataError("cannot be read") from ConnectionError("Server Disconnected")
        yield

    monkeypatch.setattr(data.stream, "RETRY_SECONDS", (0.0, 0.0))
    monkeypatch.setattr(data.stream, "rows", lost)
    with pytest.raises(DataError, match=r"lane 3, cannot be read on after 3 attempts \(Connection"):
        dataset.lane(3).window(SEQ_LEN)
    assert len(tries) == 3


def test_files_that_vanish_while_a_lane_reads_are_told(tmp_path: Path) -> None:
    folder = write(tmp_path / "web", some_rows(), "jsonl")
    dataset = StreamDataset.open(config(folder), BYTE)
    read = dataset.lane(3)
    read.window(SEQ_LEN)
    for file in folder.iterdir():
        file.unlink()
    with pytest.raises(DataError, match=r"data.sources.web.path.*cannot be read"):
        windows_of(read, 500)
