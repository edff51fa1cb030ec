"""Training straight from a Hugging Face dataset, without shards: the documented weaker mode.

The dataset's files are dealt to a fixed number of lanes, each an endless sequence of documents in
stored order, tokenised while training and cut into windows like a stream of shards. Where a lane
is, is told by a document and how many of its tokens are used: four numbers, which travel with each
step's batches into the checkpoint. Rows are counted by us: the library's own state restarted a
stream on its second resume in 5.0.0, and reads a file from its beginning all the same.
"""

import hashlib
import json
import time
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import count
from typing import NamedTuple

import numpy as np
from isal import isal_zlib

from data.config import DataConfig, SourceConfig, TokenizerConfig
from data.errors import DataError
from data.loader import StepBatches, deal
from data.sources.corpora import Corpus, Part, find, first_line
from data.sources.reading import RowPosition
from data.sources.rows import Policy, Row, rows
from data.stages import Stage, batches_from
from data.tokenizer import Tokenizer, ready_tokenizer

# The library itself tries 20 times to connect again; this is for whatever else goes by.
RETRY_SECONDS = (1.0, 5.0, 30.0)


class Place(NamedTuple):
    """Where a lane is: `used` tokens into the document behind `row` rows of its file `piece`."""

    epoch: int = 0
    piece: int = 0
    row: int = 0
    used: int = 0


class Lane:
    """One endless sequence of tokens: bos, text, eos of each document, again and again."""

    def __init__(
        self,
        part: Part,
        source: SourceConfig,
        policy: Policy,
        corpus: Corpus,
        tokenizer: Tokenizer,
        place: Place,
    ) -> None:
        self._rows = partial(rows, part, source, policy, corpus.dataset)
        self._name = f"data.sources.{part.source}.path ({source.path}), lane {part.number},"
        self._tokenizer = tokenizer
        self._used = place.used
        self._unread = self._documents(place)
        # What the next window begins with, and each document's place.
        self._read: deque[tuple[Place, np.ndarray]] = deque()

    @property
    def place(self) -> Place:
        """Where the next window begins; known once a window has been read."""
        return self._read[0][0]._replace(used=self._used)

    def window(self, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
        """The next window; its last token is the first of the one after it.

        Returns:
            tokens: uint32 (seq_len + 1,)
            starts: int64 (documents,), the places of the window where a document begins

        Raises:
            DataError: the dataset cannot be read on, or has no text for this lane.
        """
        parts, starts, missing, begin, number = [], [], seq_len + 1, self._used, 0
        while True:
            if number == len(self._read):
                self._read.append(next(self._unread))
            tokens = self._read[number][1]
            if begin == 0:
                starts.append(seq_len + 1 - missing)
            parts.append(tokens[begin : begin + missing])
            missing -= len(parts[-1])
            if missing == 0:
                break
            number, begin = number + 1, 0
        self._used = begin + len(parts[-1]) - 1
        for _ in range(number):
            self._read.popleft()
        return np.concatenate(parts), np.array(starts, dtype=np.int64)

    def _documents(self, place: Place) -> Iterator[tuple[Place, np.ndarray]]:
        """Every document from a place on, with its own place; after the last comes the first."""
        begin = RowPosition(place.piece, place.row)
        for epoch in count(place.epoch):
            whole, empty = begin == RowPosition(), True
            for before, row in self._with_retries(begin):
                if row.text:
                    empty = False
                    own = Place(epoch, before.piece, before.row)
                    yield own, self._tokenizer.encode_document(row.text)
            if whole and empty:
                raise DataError(
                    f"{self._name} has no text: see its filter and text_column, or use fewer "
                    "data.stream_shards"
                )
            begin = RowPosition()

    def _with_retries(self, begin: RowPosition) -> Iterator[tuple[RowPosition, Row]]:
        """The rows of one epoch from a position on, each with its own position."""
        failures = 0
        while True:
            try:
                for row in self._rows(begin):
                    yield begin, row
                    begin, failures = row.after, 0
                return
            except DataError as error:
                cause = error.__cause__
                if not isinstance(cause, OSError) or isinstance(cause, FileNotFoundError):
                    raise
                if failures == len(RETRY_SECONDS):
                    raise DataError(
                        f"{self._name} cannot be read on after {failures + 1} attempts "
                        f"({first_line(cause)}): check the network and that the dataset is there"
                    ) from cause
                time.sleep(RETRY_SECONDS[failures])
                failures += 1


class StreamDataset:
    """A dataset that is read while it arrives, dealt to `lanes`; it holds nothing out."""

    def __init__(self, data: DataConfig, corpus: Corpus, tokenizer: Tokenizer) -> None:
        assert data.stream_shards is not None
        ((self.name, source),) = data.sources.items()
        self.source = replace(source, streaming=True)
        self.lanes = data.stream_shards
        self.document_mask = data.document_mask
        self._policy = data.invalid_text
        self._corpus = corpus
        self._tokenizer = tokenizer

    @classmethod
    def open(cls, data: DataConfig, config: TokenizerConfig) -> "StreamDataset":
        """Finds the dataset, reading no row of it.

        Raises:
            DataError: there is no such dataset, or no ready tokenizer.
        """
        tokenizer = ready_tokenizer(config)
        if tokenizer is None:
            raise DataError(
                f"tokenizer.path (null) of {config.name} asks for training, and data.stream_shards "
                f"({data.stream_shards}) prepares nothing: set tokenizer.path to a tokenizer.model"
            )
        ((name, source),) = data.sources.items()
        return cls(data, find(name, replace(source, streaming=True)), tokenizer)

    @property
    def n_files(self) -> int:
        """Files of the dataset: the smallest unit that a lane can have."""
        return len(self._corpus.parts)

    @property
    def hash(self) -> str:
        """SHA-256 over all that decides the tokens of each lane."""
        source = self.source
        decides = (
            *(self._corpus.revision, source.path, source.name, source.split, source.revision),
            *(source.text_column, source.filter, self._policy, self.lanes, self._tokenizer.hash),
        )
        return hashlib.sha256(json.dumps(decides).encode()).hexdigest()

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that makes the tokens."""
        return self._tokenizer

    def check(self, global_batch_size: int, size: int) -> None:
        """Whether there are files for every lane of `size` data ranks.

        Raises:
            DataError: there are more lanes than files.
        """
        if self.lanes <= self.n_files:
            return
        fitting = [
            lanes
            for lanes in range(1, self.n_files + 1)
            if global_batch_size % lanes == 0 and lanes % size == 0
        ]
        remedy = (
            f"use {fitting[-1]}, the largest number that fits"
            if fitting
            else (
                f"use fewer data ranks than {size}, or prepare the data (data.stream_shards=null)"
            )
        )
        raise DataError(
            f"data.stream_shards ({self.lanes}) is more than the {self.n_files} files of "
            f"data.sources.{self.name}.path ({self.source.path}): {remedy}"
        )

    def lane(self, number: int, place: Place = Place()) -> Lane:  # noqa: B008 (a tuple)
        """The lane of this number, of neighbouring files, from a place on."""
        share, rest = divmod(self.n_files, self.lanes)
        first = share * number + min(number, rest)
        parts = self._corpus.parts[first : first + share + (number < rest)]
        pieces = tuple(piece for part in parts for piece in part.pieces)
        part = Part(self.name, number, pieces)
        return Lane(part, self.source, self._policy, self._corpus, self._tokenizer, place)


class StreamLoader:
    """The training batches of one data rank, read from its lanes.

    Of each global batch row i belongs to lane i // (global_batch_size / lanes), and rank r of
    `size` computes the r-th contiguous part of the rows: so it owns a contiguous part of the lanes.

    Args:
        stage: the one stage of the run
        places: where each lane is, by its number as text; a lane that is not there begins anew
        threads: how many lanes are read at a time
        prefetch: steps that are read ahead
    """

    def __init__(
        self,
        dataset: StreamDataset,
        stage: Stage,
        *,
        rank: int,
        size: int,
        places: Mapping[str, Sequence[int]] | None = None,
        pin_memory: bool = False,
        threads: int = 1,
        prefetch: int = 2,
    ) -> None:
        share, rest = divmod(stage.global_batch_size, size)
        self.micro_batch_size = stage.micro_batch_size or share
        if (
            rest
            or share % self.micro_batch_size
            or dataset.lanes % size
            or stage.global_batch_size % dataset.lanes
        ):
            raise ValueError(
                f"{dataset.lanes} lanes and {size} data ranks of micro-batches of "
                f"{self.micro_batch_size} do not share {stage.global_batch_size} rows evenly"
            )
        self.dataset = dataset
        self.seq_len, self.global_batch_size = stage.seq_len, stage.global_batch_size
        self.rows = range(rank * share, (rank + 1) * share)  # of each global batch
        own = dataset.lanes // size
        self.lanes = range(rank * own, (rank + 1) * own)
        self.places = {int(lane): Place(*place) for lane, place in (places or {}).items()}
        self.pin_memory = pin_memory
        self.threads, self.prefetch = threads, prefetch

    def steps(
        self, first_batch: int, skips: Sequence[tuple[int, int]] = ()
    ) -> Generator[StepBatches, None, None]:
        """The batches from `first_batch` on, at which `places` are, but for those in `skips`.

        Without end, and read ahead. What is left out is read as well: the lanes have to pass it.
        Close the iterator (or let it go) to end its threads; what fails in a thread is raised
        here, in the place of its step.
        """
        lanes = [
            self.dataset.lane(number, self.places.get(number, Place())) for number in self.lanes
        ]
        each = len(self.rows) // len(lanes)
        readers = ThreadPoolExecutor(self.threads, thread_name_prefix="llamesh-lanes")
        # One thread makes the steps, one after the other: a lane has but one sequence.
        maker = ThreadPoolExecutor(1, thread_name_prefix="llamesh-loader")
        ahead: deque[Future[StepBatches]] = deque()

        def read(lane: Lane) -> list[tuple[np.ndarray, np.ndarray]]:
            return [lane.window(self.seq_len) for _ in range(each)]

        reached = first_batch  # by the lanes

        def make(number: int) -> StepBatches:
            nonlocal reached
            while reached <= number:
                windows = [window for part in readers.map(read, lanes) for window in part]
                reached += 1
            places = {
                str(own): list(lane.place) for own, lane in zip(self.lanes, lanes, strict=True)
            }
            batches = deal(
                windows,
                self._digest(number, windows),
                self.micro_batch_size,
                self.dataset.document_mask,
                self.pin_memory,
            )
            return batches._replace(number=number, lanes=places)

        try:
            for number in batches_from(first_batch, skips):
                ahead.append(maker.submit(make, number))
                if len(ahead) > self.prefetch:
                    yield ahead.popleft().result()
        finally:
            maker.shutdown(cancel_futures=True)
            readers.shutdown()

    def _digest(self, number: int, windows: list[tuple[np.ndarray, np.ndarray]]) -> int:
        """The sum over this rank's rows of a batch, as for shards."""
        first = number * self.global_batch_size
        return sum(
            isal_zlib.crc32(tokens, isal_zlib.crc32((first + row).to_bytes(8, "little")))
            for row, (tokens, _) in zip(self.rows, windows, strict=True)
        )
