"""Streaming: windows equal a simple reference and resume at any step on any number of ranks.

A local folder replaces the Hugging Face Hub; both are read by the same code.
"""

import dataclasses
import json
import random
import shutil
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
from data.stream import StreamDataset, StreamLoader, StreamPosition, StreamShard

BYTE = TokenizerConfig("byte", 272)
BOS, EOS = 256, 257
N_FILES, N_SHARDS, SEQ_LEN = 7, 4, 16
# Three steps in epoch 0; the shorter stream shards continue into a second and a third epoch.
STEPS, BATCH = 30, 8

Rows = list[list[dict[str, Any]]]  # by file


def some_rows(seed: int = 5) -> Rows:
    """Return the rows of each file: texts of many lengths, some empty or null, and a score."""
    draw = random.Random(seed)
    texts = [None, "", "a", "äöü", "x" * 100]

    def row() -> dict[str, Any]:
        text = draw.choice([*texts, "".join(draw.choices("ab \n", k=draw.randrange(60)))])
        return {"text": text, "score": draw.randrange(4)}

    # One file has more than 128 rows, the size of the tables read by the library.
    return [
        [row() for _ in range(draw.choice([6, 9, 12]) + 130 * (i == 1))] for i in range(N_FILES)
    ]


def write(folder: Path, files: Rows, format_: str) -> Path:
    """Write a dataset folder of JSON Lines or Parquet files."""
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


def config(folder: Path, n_shards: int = N_SHARDS, **source: Any) -> DataConfig:
    """Return the configuration of a stream of the folder."""
    sources = {"web": SourceConfig("huggingface", str(folder), **source)}
    return DataConfig("web", "unused", sources, stream_shards=n_shards)


@pytest.fixture(scope="module", params=["jsonl", "parquet"])
def folder(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("dataset") / "web", some_rows(), request.param)


@pytest.fixture(scope="module")
def dataset(folder: Path) -> StreamDataset:
    return StreamDataset(config(folder), BYTE)


def loader(dataset: StreamDataset, rank: int = 0, size: int = 1, **options: Any) -> StreamLoader:
    """Return the loader of one data rank."""
    stage = Stage(0, 0, 0, SEQ_LEN, BATCH, options.pop("micro_batch_size", None), {"web": 1.0})
    return StreamLoader(dataset, stage, rank=rank, size=size, **options)


def take(
    loader: StreamLoader, first_batch: int, n_steps: int, skips: Sequence[tuple[int, int]] = ()
) -> list[StepBatches]:
    """Return some steps and discard prefetched ones."""
    steps = loader.steps(first_batch, skips)
    batches = list(islice(steps, n_steps))
    steps.close()
    return batches


# ---------------------------------------------------------------- reference


def shard_tokens(files: Rows, shard: int, n_tokens: int) -> tuple[list[int], set[int]]:
    """Return the first tokens of a stream shard and the indices of document starts."""
    n_files = [N_FILES // N_SHARDS + (i < N_FILES % N_SHARDS) for i in range(N_SHARDS)]
    shard_files = files[sum(n_files[:shard]) : sum(n_files[: shard + 1])]
    texts = [row["text"] for rows in shard_files for row in rows if row["text"]]
    tokens: list[int] = []
    starts = set()
    while len(tokens) < n_tokens:
        for text in texts:
            starts.add(len(tokens))
            tokens += [BOS, *text.encode(), EOS]
    return tokens, starts


def reference_windows(files: Rows, shard: int) -> Iterator[tuple[list[int], list[int]]]:
    """Concatenate the documents and split them into windows."""
    tokens, starts = shard_tokens(files, shard, 10_000)
    for start in range(0, 10_000 - SEQ_LEN, SEQ_LEN):
        document_starts = [i for i in range(SEQ_LEN + 1) if start + i in starts]
        yield tokens[start : start + SEQ_LEN + 1], document_starts


@pytest.mark.parametrize("shard", range(N_SHARDS))
def test_windows_equal_slices_of_the_concatenated_documents(
    dataset: StreamDataset, shard: int
) -> None:
    read = dataset.stream_shard(shard)
    epochs = set()
    for expected in islice(reference_windows(some_rows(), shard), 500):
        tokens, starts = read.window(SEQ_LEN)
        assert (tokens.tolist(), starts.tolist()) == expected
        assert tokens.dtype == np.uint32 and starts.dtype == np.int64
        epochs.add(read.position.epoch)
    assert len(epochs) > 1  # all documents were read at least once


def test_batches_consist_of_the_windows_of_all_stream_shards(dataset: StreamDataset) -> None:
    windows = [reference_windows(some_rows(), shard) for shard in range(N_SHARDS)]
    for step, batches in enumerate(take(loader(dataset), 0, STEPS)):
        rows = [next(windows[row // (BATCH // N_SHARDS)]) for row in range(BATCH)]
        arrays = [(np.array(tokens), np.array(starts, dtype=np.int64)) for tokens, starts in rows]
        (actual,) = batches.micro_batches
        expected = make_batch(arrays, document_mask=True)
        for one, other in zip(actual, expected, strict=True):
            assert one is not None and other is not None and torch.equal(one, other)
        assert batches.n_targets == int((expected.labels != -100).sum())
        assert batches.digest == sum(
            zlib.crc32(
                np.array(tokens, np.uint32).tobytes(), zlib.crc32(sample.to_bytes(8, "little"))
            )
            for sample, (tokens, _) in enumerate(rows, start=step * BATCH)
        )


def test_stream_shards_equal_those_of_the_datasets_library(
    dataset: StreamDataset, folder: Path
) -> None:
    import datasets

    streaming = datasets.load_dataset(str(folder), split="train", streaming=True)
    for shard in range(N_SHARDS):
        rows = streaming.shard(num_shards=N_SHARDS, index=shard)
        tokens = [t for row in rows if row["text"] for t in [BOS, *row["text"].encode(), EOS]]
        read = dataset.stream_shard(shard)
        actual = [t for _ in range(len(tokens) // SEQ_LEN) for t in read.window(SEQ_LEN)[0][:-1]]
        assert actual == tokens[: len(actual)]


# ---------------------------------------------------------------- data ranks and resuming


@pytest.mark.parametrize("size", [2, 4])
def test_data_ranks_together_read_the_batches_of_one_rank(
    dataset: StreamDataset, size: int
) -> None:
    one_rank = take(loader(dataset), 0, STEPS)
    ranks = [
        take(loader(dataset, rank, size, micro_batch_size=1), 0, STEPS) for rank in range(size)
    ]
    for step, expected in enumerate(one_rank):
        local = [rank[step] for rank in ranks]
        assert sum(each.digest for each in local) == expected.digest
        assert sum(each.n_targets for each in local) == expected.n_targets
        rows = torch.cat([batch.tokens for each in local for batch in each.micro_batches])
        assert torch.equal(rows, expected.micro_batches[0].tokens)
        assert {
            k: v for each in local for k, v in (each.stream_positions or {}).items()
        } == expected.stream_positions


def digests(batches: list[StepBatches]) -> list[int]:
    return [each.digest for each in batches]


@pytest.mark.parametrize(
    "stops", [(1,), (13,), (7, 8), (3, 17), (2, 9, 20), (10, 11, 12, 25)], ids=str
)
@pytest.mark.parametrize("prefetch", [0, 5])
def test_steps_are_unchanged_after_repeated_resumes_on_other_numbers_of_ranks(
    dataset: StreamDataset, stops: tuple[int, ...], prefetch: int
) -> None:
    expected = digests(take(loader(dataset), 0, STEPS))
    assert len(set(expected)) == STEPS
    positions: dict[str, list[int]] | None = None
    actual: list[int] = []
    for number, (first, last) in enumerate(pairwise((0, *stops, STEPS))):
        size = (1, 2, 4)[number % 3]
        ranks = [
            take(
                loader(
                    dataset, rank, size, positions=positions, prefetch=prefetch, threads=1 + number
                ),
                first,
                last - first,
            )
            for rank in range(size)
        ]
        actual += [sum(rank[i].digest for rank in ranks) for i in range(last - first)]
        saved = {k: v for rank in ranks for k, v in (rank[-1].stream_positions or {}).items()}
        positions = json.loads(json.dumps(saved))  # as stored in a manifest
    assert actual == expected


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("prefetch", [0, 3])
def test_skipped_batches_are_excluded_and_stream_positions_are_unchanged(
    dataset: StreamDataset, size: int, prefetch: int
) -> None:
    """Reading starts at batch 0 and resumes at batch 5, the first of a skipped range."""
    skips = ((0, 2), (5, 8), (11, 12))
    for rank in range(size):
        unskipped = take(loader(dataset, rank, size), 0, 15)
        kept = [unskipped[number] for number in (2, 3, 4, 8, 9, 10, 12, 13, 14)]
        actual = take(loader(dataset, rank, size, prefetch=prefetch, threads=2), 0, 3, skips)
        positions = actual[-1].stream_positions
        resumed = loader(dataset, rank, size, positions=positions, prefetch=prefetch)
        actual += take(resumed, actual[-1].number + 1, 6, skips)
        for one, other in zip(actual, kept, strict=True):
            assert (one.number, one.digest, one.stream_positions) == (
                other.number,
                other.digest,
                other.stream_positions,
            )
            assert torch.equal(one.micro_batches[0].tokens, other.micro_batches[0].tokens)


def test_stream_shard_resumes_after_any_window(dataset: StreamDataset) -> None:
    """Shard 0 has the file of more than 128 rows; windows cross documents and the epoch end."""
    reads = dataset.stream_shard(0)
    windows, positions = [], [StreamPosition()]
    for _ in range(400):
        windows.append(reads.window(SEQ_LEN)[0].tolist())
        positions.append(reads.position)
    assert positions[-1].epoch >= 1
    for number in range(0, 397, 7):
        resumed = dataset.stream_shard(0, positions[number])
        assert [resumed.window(SEQ_LEN)[0].tolist() for _ in range(3)] == windows[
            number : number + 3
        ]


def test_filter_selects_the_rows_of_a_stream_shard(tmp_path: Path) -> None:
    files = some_rows()
    folder = write(tmp_path / "web", files, "jsonl")
    filtered = config(folder, filter=[("score", ">=", 2)])
    dataset = StreamDataset(filtered, BYTE)
    kept = [[row for row in rows if row["score"] >= 2] for rows in files]
    read = dataset.stream_shard(1)
    for expected, _ in islice(reference_windows(kept, 1), 100):
        assert read.window(SEQ_LEN)[0].tolist() == expected


def test_hash_changes_with_every_setting_that_changes_the_stream(
    folder: Path, tmp_path: Path
) -> None:
    def hash_of(changed: DataConfig, tokenizer: TokenizerConfig = BYTE) -> str:
        return StreamDataset(changed, tokenizer).hash

    same = config(folder)
    assert hash_of(same) == hash_of(same)
    grown = some_rows()
    grown[3].append({"text": "one more", "score": 0})
    others = [
        config(folder, n_shards=2),
        config(folder, text_column="score"),
        config(folder, filter=[("score", ">", 1)]),
        config(write(tmp_path / "web", grown, "jsonl")),
        dataclasses.replace(same, invalid_text="skip"),
    ]
    assert len({hash_of(same), *map(hash_of, others)}) == 1 + len(others)


def test_local_dataset_is_the_same_at_another_path_and_runs_of_earlier_versions_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write(tmp_path / "dataset", some_rows(), "parquet")
    expected = StreamDataset(config(folder), BYTE)
    monkeypatch.chdir(tmp_path)
    moved = shutil.copytree(folder, tmp_path / "moved")
    for path in (Path("dataset"), moved):
        found = StreamDataset(config(path), BYTE)
        assert found.hash == expected.hash
    earlier = found._hash(str(moved))  # as version 0.2 computed it
    found.recognize(expected.hash)
    assert found.hash == expected.hash != earlier
    found.recognize(earlier)
    assert found.hash == earlier


def test_hash_changes_when_the_files_of_a_local_dataset_change(tmp_path: Path) -> None:
    folder = write(tmp_path / "web", some_rows(), "jsonl")
    before = StreamDataset(config(folder), BYTE).hash
    with (folder / "part-2.jsonl").open("a") as file:
        file.write('{"text": "more", "score": 1}\n')
    assert StreamDataset(config(folder), BYTE).hash != before


# ---------------------------------------------------------------- errors


def test_more_stream_shards_than_files_are_rejected_with_the_largest_valid_number(
    folder: Path,
) -> None:
    dataset = StreamDataset(config(folder, n_shards=8), BYTE)
    with pytest.raises(DataError, match=r"data.stream_shards=8 .* 7 files.*use 4, the largest"):
        dataset.check(global_batch_size=8, size=2)
    with pytest.raises(DataError, match="use fewer than 8 data ranks, or prepare"):
        dataset.check(global_batch_size=8, size=8)
    StreamDataset(config(folder, n_shards=7), BYTE).check(global_batch_size=7, size=1)


def test_tokenizer_that_must_be_trained_is_rejected(folder: Path) -> None:
    with pytest.raises(DataError, match=r"tokenizer.path=null.*needs training"):
        StreamDataset(config(folder), TokenizerConfig("bpe", 1000))


def test_error_names_the_key_of_a_missing_dataset(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"data.sources.web.path=.*empty: cannot read"):
        StreamDataset(config(tmp_path / "empty"), BYTE)


def test_stream_shard_without_text_is_rejected_instead_of_read_forever(folder: Path) -> None:
    dataset = StreamDataset(config(folder, filter=[("score", ">", 9)]), BYTE)
    with pytest.raises(DataError, match=r"stream shard 2 has no text; check its filter"):
        dataset.stream_shard(2).window(SEQ_LEN)


def test_invalid_text_is_replaced_skipped_or_rejected_as_configured(tmp_path: Path) -> None:
    rows = [[{"text": "good"}, {"text": "b\0d"}, {"text": "fine"}]]
    folder = write(tmp_path / "web", rows, "jsonl")
    texts = {}
    for policy in ("replace", "skip"):
        data_config = dataclasses.replace(config(folder, n_shards=1), invalid_text=policy)
        dataset = StreamDataset(data_config, BYTE)
        tokens = dataset.stream_shard(0).window(14)[0].tolist()
        texts[policy] = dataset.tokenizer().decode(t for t in tokens if t < BOS)
    assert texts["replace"].startswith("goodb\ufffdd")
    assert texts["skip"].startswith("goodfine")
    strict = StreamDataset(config(folder, n_shards=1), BYTE)
    with pytest.raises(DataError, match=r"row 2 of shard 0 .* NUL"):
        strict.stream_shard(0).window(14)
    steps = StreamLoader(strict, Stage(0, 0, 0, 14, 1, None, {}), rank=0, size=1).steps(0)
    with pytest.raises(DataError, match="NUL"):
        next(steps)


class FlakyRows:
    """`data.sources.rows.rows` with a connection error after every third row, at most `n_errors`.

    Attributes:
        n_errors: Number of errors still to be raised.
    """

    def __init__(self, n_errors: int) -> None:
        self.n_errors, self.real = n_errors, data.sources.rows.rows

    def __call__(self, *arguments: Any) -> Iterator[Any]:
        for number, row in enumerate(self.real(*arguments)):
            if number == 3 and self.n_errors:
                self.n_errors -= 1
                raise DataError("cannot be read") from ConnectionError("Server Disconnected")
            yield row


def windows_of(shard: StreamShard, n: int) -> list[list[int]]:
    return [shard.window(SEQ_LEN)[0].tolist() for _ in range(n)]


def test_lost_connection_loses_no_row(
    dataset: StreamDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = windows_of(dataset.stream_shard(0), 200)
    monkeypatch.setattr(data.stream, "RETRY_SECONDS", (0.0, 0.0))
    flaky = FlakyRows(n_errors=1000)
    monkeypatch.setattr(data.stream, "rows", flaky)
    assert windows_of(dataset.stream_shard(0), 200) == expected
    assert flaky.n_errors < 960  # the connection was lost many times


def test_permanently_lost_connection_is_reported_after_three_attempts(
    dataset: StreamDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempts = []

    def lost(*arguments: Any) -> Iterator[Any]:
        attempts.append(arguments)
        raise DataError("cannot be read") from ConnectionError("Server Disconnected")
        yield

    monkeypatch.setattr(data.stream, "RETRY_SECONDS", (0.0, 0.0))
    monkeypatch.setattr(data.stream, "rows", lost)
    with pytest.raises(
        DataError, match=r"stream shard 3: cannot read after 3 attempts \(Connection"
    ):
        dataset.stream_shard(3).window(SEQ_LEN)
    assert len(attempts) == 3


def test_files_removed_while_a_stream_shard_is_read_are_reported(tmp_path: Path) -> None:
    folder = write(tmp_path / "web", some_rows(), "jsonl")
    dataset = StreamDataset(config(folder), BYTE)
    read = dataset.stream_shard(3)
    read.window(SEQ_LEN)
    for file in folder.iterdir():
        file.unlink()
    with pytest.raises(DataError, match=r"data.sources.web.path.*cannot read"):
        windows_of(read, 500)
