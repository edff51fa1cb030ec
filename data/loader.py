"""Training and validation batches from data that is read by window.

`data.order` decides which windows form a step; this module reads them, finds document boundaries,
distributes them over data ranks and micro-batches, and prefetches with threads. A batch depends
only on its index in the order, not on earlier reads, so loaders have no state to save.
"""

from collections import Counter, deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import KW_ONLY, dataclass
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from isal import isal_zlib

from data.dataset import WindowDataset
from data.stages import Stage, Stages, batch_indices

IGNORE_INDEX = -100  # label excluded from the loss

Window = tuple[np.ndarray, np.ndarray]
"""Tokens, (seq_len + 1,) uint32, and document starts, (n_documents,) int64."""


class Batch(NamedTuple):
    """One micro-batch.

    Attributes:
        tokens: (micro_batch, seq) int64
        positions: (micro_batch, seq) int64, restarting at 0 at each document; None if each row is
            one document.
        labels: (micro_batch, seq) int64, the next tokens; -100 where the next token starts another
            document.
    """

    tokens: torch.Tensor
    positions: torch.Tensor | None
    labels: torch.Tensor


class StepBatches(NamedTuple):
    """The part of one step that one data rank computes.

    Attributes:
        n_documents: Upper bound of documents per micro-batch; a row's first document always counts.
        n_targets: Labels of this rank that are not -100.
        digest: Sum over this rank's samples of a checksum of sample index and tokens. Its sum over
            the data ranks is the same on every mesh, and differs if a sample is lost, repeated or
            changed.
        number: Index of the batch in the order, from 0.
        stream_positions: Position of each of this rank's stream shards after the step, for samples
            streamed from a dataset (`data.stream`).
    """

    micro_batches: list[Batch]
    n_documents: list[int]
    n_targets: int
    digest: int
    number: int = 0
    stream_positions: dict[str, list[int]] | None = None

    @property
    def counts(self) -> torch.Tensor:
        """`n_targets` and `digest`, (2,) int64, for summing over the data ranks."""
        return torch.tensor([self.n_targets, self.digest])


@dataclass(kw_only=True)
class Loader:
    """Divides steps over data ranks and micro-batches, and reads ahead.

    Rank r of `size` computes the r-th contiguous part of each global batch, divided into
    micro-batches in order.

    Args:
        threads: Reader threads; they do not affect the batches.
        prefetch: Steps read ahead.
    """

    rank: int
    size: int
    pin_memory: bool = False
    threads: int = 1
    prefetch: int = 2

    def rows_per_rank(self, stage: Stage) -> int:
        """Return this rank's rows of each global batch of a stage."""
        n_rows, remainder = divmod(stage.global_batch_size, self.size)
        if remainder or n_rows % (stage.micro_batch_size or n_rows):
            raise ValueError(
                f"train.global_batch_size={stage.global_batch_size} is not a multiple of "
                f"{self.size} data ranks times train.micro_batch_size={stage.micro_batch_size}"
            )
        return n_rows

    def make_step(
        self, windows: list[Window], number: int, first_sample: int, stage: Stage, mask: bool
    ) -> StepBatches:
        """Divide this rank's windows of a step into micro-batches.

        Args:
            windows: Consecutive samples starting with the global sample `first_sample`.
            mask: Restrict attention and labels to a document.
        """
        digest = sum(
            isal_zlib.crc32(tokens, isal_zlib.crc32(sample.to_bytes(8, "little")))
            for sample, (tokens, _) in enumerate(windows, first_sample)
        )
        size = stage.micro_batch_size or len(windows)
        groups = [windows[i : i + size] for i in range(0, len(windows), size)]
        batches = [make_batch(group, mask, pin_memory=self.pin_memory) for group in groups]
        # Documents that start inside a window, for each micro-batch.
        n_starts = [
            sum(int((starts > 0).sum()) for _, starts in group) if mask else 0 for group in groups
        ]
        n_documents = [size + n for n in n_starts]
        n_targets = sum(len(tokens) - 1 for tokens, _ in windows) - sum(n_starts)
        return StepBatches(batches, n_documents, n_targets, digest, number)

    def read_ahead(
        self,
        read_step: Callable[[int], StepBatches],
        threads: int,
        first_batch: int,
        skips: Sequence[tuple[int, int]],
    ) -> Generator[StepBatches, None, None]:
        """Yield `read_step(index)` for the batches from `first_batch`, except those in `skips`.

        The iterator is endless. Closing it stops its threads; an exception in a thread is raised
        when its step is due.
        """
        options: dict[str, Any] = {"thread_name_prefix": "llamesh-loader"}
        if self.pin_memory:  # a thread starts on GPU 0, where CUDA would create a context
            device = torch.cuda.current_device()
            options |= {"initializer": torch.cuda.set_device, "initargs": (device,)}
        pool = ThreadPoolExecutor(threads, **options)
        pending: deque[Future[StepBatches]] = deque()
        try:
            for index in batch_indices(first_batch, skips):
                pending.append(pool.submit(read_step, index))
                if len(pending) > self.prefetch:
                    yield pending.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


@dataclass
class TrainLoader(Loader):
    """Training batches of one data rank, in the order of `data.order`.

    Args:
        shuffle_block_tokens: See `data.order.Order`.
    """

    dataset: WindowDataset
    stages: Stages
    _: KW_ONLY
    seed: int
    shuffle_block_tokens: int | None = None

    def __post_init__(self) -> None:
        for stage in self.stages.all:
            self.rows_per_rank(stage)
        self.order = self.dataset.order(self.stages, self.seed, self.shuffle_block_tokens)

    def step(self, step: int) -> StepBatches:
        """Read the batch with this index in the order, without prefetching.

        Raises:
            DataError: A shard is missing or damaged.
        """
        stage = self.stages.at(step)
        n_rows = self.rows_per_rank(stage)
        first = self.stages.first_sample(step) + self.rank * n_rows
        source, _, index = self.order.locate(np.arange(first, first + n_rows))
        streams = [self.dataset.train[name] for name in self.order.names]
        drawn = zip(source.tolist(), index.tolist(), strict=True)
        windows = [streams[s].window(i, stage.seq_len) for s, i in drawn]
        return self.make_step(windows, step, first, stage, self.dataset.document_mask)

    def steps(
        self, first_batch: int, skips: Sequence[tuple[int, int]] = ()
    ) -> Generator[StepBatches, None, None]:
        """Iterate over the batches from `first_batch`, except those in `skips`, prefetched."""
        return self.read_ahead(self.step, self.threads, first_batch, skips)


def validation_batches(
    dataset: WindowDataset,
    *,
    samples: int,
    seq_len: int,
    micro_batch_size: int,
    rank: int,
    size: int,
) -> dict[str, list[Batch]]:
    """Return one data rank's batches of validation windows, by source.

    The sources have equal numbers of windows, evenly spaced over each split, so that they do not
    come from its first documents only; fewer than `samples` if the split is smaller. Every rank
    gets the same number of batches of the same shape, so that all take part in each collective;
    surplus rows have only labels of -100.
    """
    counts = {name: stream.n_windows(seq_len) for name, stream in dataset.validation.items()}
    alternating = (
        name
        for index in range(max(counts.values(), default=0))
        for name, count in counts.items()
        if index < count
    )
    batches: dict[str, list[Batch]] = {}
    for name, n_selected in Counter(islice(alternating, samples)).items():
        stream, count, batches[name] = dataset.validation[name], counts[name], []
        for first in range(0, n_selected, micro_batch_size * size):
            start = first + micro_batch_size * rank
            rows = range(start, min(start + micro_batch_size, n_selected))
            windows = [stream.window(row * count // n_selected, seq_len) for row in rows]
            batch = make_batch(windows, dataset.document_mask, seq_len, micro_batch_size)
            batches[name].append(batch)
    return batches


def make_batch(
    windows: list[Window],
    document_mask: bool,
    seq_len: int | None = None,
    n_rows: int | None = None,
    pin_memory: bool = False,
) -> Batch:
    """Stack windows as the rows of one batch, followed by rows without labels up to `n_rows`."""
    seq_len = seq_len or len(windows[0][0]) - 1
    shape = (n_rows or len(windows), seq_len)
    tensors = [torch.empty(shape, dtype=torch.int64, pin_memory=pin_memory) for _ in Batch._fields]
    tokens, positions, labels = (tensor.numpy() for tensor in tensors)
    for row, (window, _) in enumerate(windows):
        tokens[row] = window[:-1]
        labels[row] = window[1:]
    tokens[len(windows) :], labels[len(windows) :] = 0, IGNORE_INDEX
    if not document_mask:
        return Batch(*tensors)._replace(positions=None)
    positions[:] = np.arange(seq_len)
    for row, (_, starts) in enumerate(windows):
        inside = starts[starts > 0]
        labels[row, inside - 1] = IGNORE_INDEX
        starts = inside[inside < seq_len]
        # Subtract each document's start from its positions.
        lengths = np.diff(starts, append=seq_len)
        positions[row, seq_len - lengths.sum() :] -= np.repeat(starts, lengths)
    return Batch(*tensors)
