"""Training directly from a Hugging Face dataset, without preparing shards.

The dataset's files are divided over a fixed number of stream shards, each an endless sequence of
documents in stored order that is tokenized during training and cut into windows. The position of a
stream shard (four integers) is saved in every checkpoint. Rows are counted here rather than with
the `datasets` library's own state, which in version 5.0.0 restarted the stream on the second resume
and rereads the file from its start anyway. There is no shuffling and no validation split.
"""

import hashlib
import json
import time
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import KW_ONLY, dataclass, replace
from functools import cached_property, partial
from itertools import count
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.config import DataConfig, TokenizerConfig
from data.errors import DataError
from data.loader import Loader, StepBatches, Window
from data.mappings import raise_file_limit
from data.sources.corpora import Part, find_corpus, first_line
from data.sources.reading import RowPosition
from data.sources.rows import Row, rows
from data.stages import Stage
from data.tokenizer import Tokenizer, ready_tokenizer

# The library itself retries connections 20 times; these delays cover all other failures.
RETRY_SECONDS = (1.0, 5.0, 30.0)


class StreamPosition(NamedTuple):
    """Position of a stream shard, in a document.

    Attributes:
        epoch: Number of complete passes over the stream shard.
        file: Index of the file within the stream shard.
        row: Rows of the file before the document.
        n_used: Tokens of the document already used.
    """

    epoch: int = 0
    file: int = 0
    row: int = 0
    n_used: int = 0


class StreamShard:
    """One endless token sequence: begin-of-text, text and end-of-text of each document."""

    def __init__(self, dataset: "StreamDataset", part: Part, position: StreamPosition) -> None:
        source = dataset.source
        self._rows = partial(rows, part, source, dataset.policy, dataset.corpus.dataset)
        self._name = f"data.sources.{part.source}.path={source.path}, stream shard {part.number}"
        self._tokenizer = dataset.tokenizer()
        self._n_used = position.n_used
        self._documents = self._read_documents(position)
        # Documents from the start of the next window on, with their positions.
        self._buffer: deque[tuple[StreamPosition, np.ndarray]] = deque()

    @property
    def position(self) -> StreamPosition:
        """Start of the next window; defined after the first window was read."""
        return self._buffer[0][0]._replace(n_used=self._n_used)

    def window(self, seq_len: int) -> Window:
        """Read the next window; its last token is the first of the following window.

        Raises:
            DataError: The dataset cannot be read, or this stream shard has no text.
        """
        parts: list[np.ndarray] = []
        starts: list[int] = []
        n_missing = seq_len + 1
        index = 0  # in the buffer
        start = self._n_used
        while True:
            if index == len(self._buffer):
                self._buffer.append(next(self._documents))
            tokens = self._buffer[index][1]
            if start == 0:
                starts.append(seq_len + 1 - n_missing)
            parts.append(tokens[start : start + n_missing])
            n_missing -= len(parts[-1])
            if n_missing == 0:
                break
            index, start = index + 1, 0
        self._n_used = start + len(parts[-1]) - 1
        for _ in range(index):
            self._buffer.popleft()
        return np.concatenate(parts), np.array(starts, dtype=np.int64)

    def _read_documents(
        self, position: StreamPosition
    ) -> Iterator[tuple[StreamPosition, np.ndarray]]:
        """Yield documents and their positions without end, starting at `position`."""
        start = RowPosition(position.file, position.row)
        for epoch in count(position.epoch):
            complete, empty = start == RowPosition(), True
            for before, row in self._rows_with_retries(start):
                if row.text:
                    empty = False
                    start_of_document = StreamPosition(epoch, before.file_range, before.row)
                    yield start_of_document, self._tokenizer.encode_document(row.text)
            if complete and empty:
                raise DataError(
                    f"{self._name} has no text; check its filter and text_column, or use fewer "
                    "data.stream_shards"
                )
            start = RowPosition()

    def _rows_with_retries(self, start: RowPosition) -> Iterator[tuple[RowPosition, Row]]:
        """Yield the rows of one epoch and their positions, retrying after read errors."""
        n_failures = 0
        while True:
            try:
                for row in self._rows(start):
                    yield start, row
                    start, n_failures = row.after, 0
                return
            except DataError as error:
                cause = error.__cause__
                if not isinstance(cause, OSError) or isinstance(cause, FileNotFoundError):
                    raise
                if n_failures == len(RETRY_SECONDS):
                    raise DataError(
                        f"{self._name}: cannot read after {n_failures + 1} attempts "
                        f"({first_line(cause)}); check the network and that the dataset exists"
                    ) from cause
                time.sleep(RETRY_SECONDS[n_failures])
                n_failures += 1


class StreamDataset:
    """A streamed dataset divided over `n_stream_shards`, without validation data.

    Raises:
        DataError: The dataset does not exist, or the tokenizer needs training.
    """

    def __init__(self, data: DataConfig, config: TokenizerConfig) -> None:
        assert data.stream_shards is not None
        raise_file_limit()  # each stream shard keeps a file open
        tokenizer = ready_tokenizer(config)
        if tokenizer is None:
            raise DataError(
                f"tokenizer.path=null: tokenizer.name={config.name} needs training, which "
                f"data.stream_shards={data.stream_shards} does not do; set tokenizer.path to a "
                "tokenizer.model"
            )
        ((self.name, source),) = data.sources.items()
        self.source = replace(source, streaming=True)
        self.n_stream_shards = data.stream_shards
        self.document_mask, self.policy = data.document_mask, data.invalid_text
        self.corpus = find_corpus(self.name, self.source)  # reads no row
        self._tokenizer = tokenizer

    @property
    def n_files(self) -> int:
        """Number of files of the dataset, the smallest unit of a stream shard."""
        return len(self.corpus.parts)

    @cached_property
    def hash(self) -> str:
        """SHA-256 over everything that determines the tokens of each stream shard.

        A local folder is identified by the names and sizes of its files and not by its path.
        """
        is_local = Path(str(self.source.path)).is_dir()
        return self._hash(None if is_local else self.source.path)

    def recognize(self, data_hash: str | None) -> None:
        """Keep the hash of a run of an earlier version, which included the path of a folder."""
        if data_hash == self._hash(self.source.path):
            self.hash = data_hash

    def _hash(self, path: str | None) -> str:
        source = self.source
        content = (
            *(self.corpus.revision, path, source.name, source.split, source.revision),
            *(source.text_column, source.filter, self.policy, self.n_stream_shards),
            self._tokenizer.hash,
        )
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def tokenizer(self) -> Tokenizer:
        return self._tokenizer

    def check(self, global_batch_size: int, size: int) -> None:
        """Check that every stream shard of `size` data ranks has at least one file.

        Raises:
            DataError: There are more stream shards than files.
        """
        if self.n_stream_shards <= self.n_files:
            return
        remedy = f"use fewer than {size} data ranks, or prepare the data (data.stream_shards=null)"
        for number in range(1, self.n_files + 1):
            if global_batch_size % number == 0 and number % size == 0:
                remedy = f"use {number}, the largest possible number"
        raise DataError(
            f"data.stream_shards={self.n_stream_shards} is more than the {self.n_files} files of "
            f"data.sources.{self.name}.path={self.source.path}; {remedy}"
        )

    def stream_shard(
        self,
        index: int,
        position: StreamPosition = StreamPosition(),  # noqa: B008 (immutable)
    ) -> StreamShard:
        """Return a stream shard, a run of consecutive files, starting at `position`."""
        n_files, remainder = divmod(self.n_files, self.n_stream_shards)
        first = n_files * index + min(index, remainder)
        parts = self.corpus.parts[first : first + n_files + (index < remainder)]
        part = Part(self.name, index, tuple(each for part in parts for each in part.ranges))
        return StreamShard(self, part, position)


@dataclass
class StreamLoader(Loader):
    """Training batches of one data rank, read from its stream shards.

    Row i of a global batch belongs to stream shard i // (global_batch_size / n_stream_shards), so
    each rank owns a contiguous range of stream shards.

    Args:
        stage: The only stage of the run.
        positions: Position of each stream shard, by its index as a string; others start at their
            first document.
        threads: Stream shards read concurrently.
    """

    dataset: StreamDataset
    stage: Stage
    _: KW_ONLY
    positions: Mapping[str, Sequence[int]] | None = None

    def __post_init__(self) -> None:
        self.n_rows = self.rows_per_rank(self.stage)
        n_shards = self.dataset.n_stream_shards
        self.rows_per_shard, remainder = divmod(self.stage.global_batch_size, n_shards)
        if remainder or n_shards % self.size:
            raise ValueError(
                f"train.global_batch_size={self.stage.global_batch_size} cannot be divided evenly "
                f"over data.stream_shards={n_shards} and {self.size} data ranks"
            )

    def steps(
        self, first_batch: int, skips: Sequence[tuple[int, int]] = ()
    ) -> Generator[StepBatches, None, None]:
        """Yield the batches from `first_batch` (at `positions`) without end, prefetched.

        Batches in `skips` are read, because the stream shards must advance, but not returned.
        """
        given = self.positions or {}
        positions = {int(index): StreamPosition(*fields) for index, fields in given.items()}
        n_shards = self.dataset.n_stream_shards // self.size
        shards = {
            index: self.dataset.stream_shard(index, positions.get(index, StreamPosition()))
            for index in range(self.rank * n_shards, (self.rank + 1) * n_shards)
        }
        next_batch = first_batch

        def read_rows(shard: StreamShard) -> list[Window]:
            return [shard.window(self.stage.seq_len) for _ in range(self.rows_per_shard)]

        def read_step(number: int) -> StepBatches:
            nonlocal next_batch
            while next_batch <= number:
                parts = list(readers.map(read_rows, shards.values()))
                next_batch += 1
            windows = [window for part in parts for window in part]
            first_sample = number * self.stage.global_batch_size + self.rank * self.n_rows
            mask = self.dataset.document_mask
            batches = self.make_step(windows, number, first_sample, self.stage, mask)
            ends = {str(index): list(shard.position) for index, shard in shards.items()}
            return batches._replace(stream_positions=ends)

        with ThreadPoolExecutor(self.threads, thread_name_prefix="llamesh-stream") as readers:
            # One loader thread, because stream shards are read sequentially.
            yield from self.read_ahead(read_step, 1, first_batch, skips)
