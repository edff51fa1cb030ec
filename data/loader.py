"""Batches for training and validation from a prepared folder.

Which windows form a step is `data.order`'s; here they are read, cut into documents, dealt to data
ranks and micro-batches, and prefetched by one thread. Every batch is a function of the step, never
of what was read before: a loader has no state to save.
"""

import queue
import threading
import zlib
from collections.abc import Generator, Mapping
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from data.errors import DataError
from data.order import Order, OrderStage, quotas
from data.shards import ANEW, Manifest, TokenStream
from data.tokenizer import MODEL_FILE, Tokenizer, read_tokenizer

IGNORE = -100  # the label that no loss is computed for


class Batch(NamedTuple):
    """One micro-batch; each int64 (micro_batch, seq).

    `positions` count from 0 at the window's start and at each document's beginning; `labels` are
    the next tokens, -100 where the next token begins another document.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    labels: torch.Tensor


class StepBatches(NamedTuple):
    """What one data rank computes in one step.

    `n_targets` counts this rank's labels that are not -100. `digest` is a sum over its samples:
    added up over the data ranks it is the same on every mesh, and another one when a sample is
    lost, doubled or changed. `lanes` tells where this rank's lanes are after the step, when the
    samples come straight from a dataset (`data.stream`).
    """

    micro_batches: list[Batch]
    n_targets: int
    digest: int
    lanes: dict[str, list[int]] | None = None

    @property
    def counts(self) -> torch.Tensor:
        """`n_targets` and `digest` as int64 (2,), ready to be summed over the data ranks."""
        return torch.tensor([self.n_targets, self.digest])


class Dataset:
    """A prepared folder, open for reading; `train` and `validation` are streams by source name.

    `weights` are the sources' shares of the training samples; without them all sources weigh 1.
    """

    def __init__(
        self, folder: Path, manifest: Manifest, weights: Mapping[str, float], document_mask: bool
    ) -> None:
        self.folder = folder
        self.manifest = manifest
        self.weights = dict(weights)
        self.document_mask = document_mask
        self.train, self.validation = (
            {name: TokenStream(folder, splits[split]) for name, splits in manifest.shards.items()}
            for split in ("train", "validation")
        )

    @classmethod
    def open(
        cls,
        folder: Path | str,
        weights: Mapping[str, float] | None = None,
        document_mask: bool = True,
    ) -> "Dataset":
        """Opens and verifies a folder that `data.prepare` made.

        Raises:
            DataError: not prepared, damaged, or without one of the sources in `weights`.
        """
        folder = Path(folder)
        manifest = Manifest.read(folder)
        if weights is None:
            weights = dict.fromkeys(manifest.shards, 1.0)
        if set(weights) != set(manifest.shards):
            raise DataError(
                f"data.sources ({', '.join(weights)}) are not those of {folder} "
                f"({', '.join(manifest.shards)}): {ANEW}"
            )
        return cls(folder, manifest, weights, document_mask)

    @property
    def hash(self) -> str:
        """SHA-256 over tokenizer and shards: the same tokens at the same places, or another one."""
        return self.manifest.hash

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that made the tokens.

        Raises:
            DataError: its file is missing, damaged or another one.
        """
        tokenizer = read_tokenizer(self.folder / MODEL_FILE, self.manifest.tokenizer.name)
        if tokenizer.hash != self.manifest.tokenizer.hash:
            raise DataError(
                f"{self.folder / MODEL_FILE} is not the tokenizer that made the tokens: {ANEW}"
            )
        return tokenizer

    def n_held_out(self, seq_len: int) -> int:
        """Validation windows of `seq_len` tokens, over all sources."""
        return sum(stream.n_windows(seq_len) for stream in self.validation.values())

    def order(self, seq_len: int, seed: int) -> Order:
        """The order of training samples, windows of `seq_len` tokens and their labels."""
        n_windows = {name: stream.n_windows(seq_len) for name, stream in self.train.items()}
        return Order([OrderStage(0, seq_len, self.weights, n_windows)], seed)

    def check(self, seq_len: int, vocab_size: int, global_batch_size: int) -> None:
        """Whether a model of `vocab_size` can train on this data.

        Raises:
            DataError: every rule that is broken, one a line.
        """
        found = []
        for name, stream in self.train.items():
            if stream.n_windows(seq_len) == 0:
                found.append(
                    f"data.sources.{name} has {stream.n_tokens:,} tokens to train on, a window "
                    f"of train.seq_len ({seq_len}) needs {seq_len + 1:,}: add text, or use a "
                    "shorter train.seq_len"
                )
        n_windows = sum(stream.n_windows(seq_len) for stream in self.train.values())
        if not found and n_windows < global_batch_size:
            found.append(
                f"train.global_batch_size ({global_batch_size}) is more than the {n_windows} "
                f"windows of {seq_len} tokens in {self.folder}: use a smaller one, or add text"
            )
        if self.manifest.tokenizer.vocab_size > vocab_size:
            found.append(
                f"model.vocab_size ({vocab_size}) is less than the "
                f"{self.manifest.tokenizer.vocab_size} tokens of {self.folder}'s tokenizer: use "
                f"model.vocab_size={self.manifest.tokenizer.vocab_size}, or prepare other data"
            )
        try:
            quotas(list(self.weights.items()))
        except DataError as error:
            found.append(str(error))
        if found:
            raise DataError("\n".join(found))


class TrainLoader:
    """The training batches of one data rank.

    Step s, counted from 0, takes the samples [s·G, (s+1)·G) for G = `global_batch_size`; of these,
    data rank r of `size` computes the r-th contiguous part, cut into micro-batches in order.
    `prefetch` steps are read ahead; neither it nor the cuts change what a step consists of.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        seq_len: int,
        global_batch_size: int,
        micro_batch_size: int,
        seed: int,
        rank: int,
        size: int,
        pin_memory: bool = False,
        prefetch: int = 2,
    ) -> None:
        share, rest = divmod(global_batch_size, size)
        if rest or share % micro_batch_size:
            raise ValueError(
                f"train.global_batch_size ({global_batch_size}) is not a multiple of "
                f"{size} data ranks times train.micro_batch_size ({micro_batch_size})"
            )
        self.dataset = dataset
        self.seq_len = seq_len
        self.global_batch_size = global_batch_size
        self.micro_batch_size = micro_batch_size
        self.order = dataset.order(seq_len, seed)
        self.rows = range(rank * share, (rank + 1) * share)  # of each global batch
        self.pin_memory = pin_memory
        self.prefetch = prefetch
        self._streams = list(dataset.train.values())

    def step(self, step: int) -> StepBatches:
        """The batches of one step, read here and now."""
        first = step * self.global_batch_size
        samples = np.arange(first + self.rows.start, first + self.rows.stop)  # (rows,)
        windows = []
        digest = 0
        located = self.order.locate(samples)
        for sample, source, _, index in zip(samples, *located, strict=True):
            tokens, starts = self._streams[source].window(int(index), self.seq_len)
            digest += zlib.crc32(tokens, zlib.crc32(int(sample).to_bytes(8, "little")))
            windows.append((tokens, starts))
        micro_batches = [
            make_batch(windows[i : i + self.micro_batch_size], self.dataset.document_mask)
            for i in range(0, len(windows), self.micro_batch_size)
        ]
        n_targets = sum(int((batch.labels != IGNORE).sum()) for batch in micro_batches)
        if self.pin_memory:
            micro_batches = [Batch(*(t.pin_memory() for t in batch)) for batch in micro_batches]
        return StepBatches(micro_batches, n_targets, digest)

    def steps(self, first_step: int) -> Generator[StepBatches, None, None]:
        """The batches of step `first_step` and all later ones, without end, read ahead.

        Close the iterator (or let it go) to end its thread; what fails in the thread is raised
        here.
        """
        ready: queue.Queue[StepBatches | BaseException] = queue.Queue(max(self.prefetch, 1))
        stop = threading.Event()

        def read() -> None:
            step = first_step
            while not stop.is_set():
                item: StepBatches | BaseException
                try:
                    item = self.step(step)
                except BaseException as error:
                    item = error
                _put(ready, item, stop)
                if isinstance(item, BaseException):
                    return
                step += 1

        thread = threading.Thread(target=read, name="llamesh-loader", daemon=True)
        thread.start()
        try:
            while True:
                item = ready.get()
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            stop.set()
            thread.join()


def _put(ready: queue.Queue, item: object, stop: threading.Event) -> None:
    """Puts an item into a queue, or gives up when the reader is gone."""
    while not stop.is_set():
        try:
            ready.put(item, timeout=0.1)
            return
        except queue.Full:
            continue


def validation_batches(
    dataset: Dataset, *, samples: int, seq_len: int, micro_batch_size: int, rank: int, size: int
) -> list[Batch]:
    """The first validation windows, dealt to the data ranks.

    Windows come in their stored order, one source after the other in turn; fewer than `samples`
    when the split holds fewer. Every rank gets as many batches of the same shape, so that all join
    each collective call; rows that are left over have labels of -100 alone.
    """
    streams = list(dataset.validation.values())
    counts = [stream.n_windows(seq_len) for stream in streams]
    in_turn = (
        (stream, index)
        for index in range(max(counts, default=0))
        for stream, count in zip(streams, counts, strict=True)
        if index < count
    )
    chosen = list(islice(in_turn, samples))
    batches = []
    for first in range(0, len(chosen), micro_batch_size * size):
        begin = first + micro_batch_size * rank
        rows = chosen[begin : begin + micro_batch_size]
        windows = [stream.window(index, seq_len) for stream, index in rows]
        batch = make_batch(windows, dataset.document_mask, seq_len)
        batches.append(_pad_rows(batch, micro_batch_size))
    return batches


def make_batch(
    windows: list[tuple[np.ndarray, np.ndarray]], document_mask: bool, seq_len: int | None = None
) -> Batch:
    """Windows of (tokens (seq + 1,), document starts) as one batch, a row each."""
    if seq_len is None:
        seq_len = len(windows[0][0]) - 1
    tokens = np.zeros((len(windows), seq_len + 1), dtype=np.int64)
    begins = np.zeros((len(windows), seq_len + 1), dtype=np.int64)  # where its document begins
    for row, (window, starts) in enumerate(windows):
        tokens[row] = window
        if document_mask:
            begins[row, starts] = starts
    labels = np.where(begins[:, 1:] > 0, IGNORE, tokens[:, 1:])  # (micro_batch, seq)
    positions = np.arange(seq_len) - np.maximum.accumulate(begins[:, :-1], axis=1)
    inputs = np.ascontiguousarray(tokens[:, :-1])
    return Batch(*(torch.from_numpy(part) for part in (inputs, positions, labels)))


def _pad_rows(batch: Batch, n_rows: int) -> Batch:
    """The batch with rows added that have no label, up to `n_rows`."""
    missing, seq_len = n_rows - len(batch.tokens), batch.tokens.shape[1]
    tokens = torch.zeros(missing, seq_len, dtype=torch.int64)
    positions = torch.arange(seq_len).expand(missing, seq_len)
    labels = torch.full((missing, seq_len), IGNORE)
    padding = Batch(tokens, positions, labels)
    return Batch(*(torch.cat(parts) for parts in zip(batch, padding, strict=True)))
