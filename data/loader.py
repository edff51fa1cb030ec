"""Training and validation batches from a prepared folder.

`data.order` decides which windows form a step; this module reads them, finds document boundaries,
distributes them over data ranks and micro-batches, and prefetches with threads. A batch depends
only on its index in the order, not on earlier reads, so loaders have no state to save.
"""

from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from isal import isal_zlib

from data.dataset import Dataset
from data.stages import Stages, batch_indices

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


class TrainLoader:
    """Training batches of one data rank.

    Rank r of `size` computes the r-th contiguous part of each global batch, divided into
    micro-batches in order.

    Args:
        shuffle_block_tokens: See `data.order.Order`.
        threads: Reader threads; they do not affect the batches.
        prefetch: Steps read ahead.
    """

    def __init__(
        self,
        dataset: Dataset,
        stages: Stages,
        *,
        seed: int,
        rank: int,
        size: int,
        shuffle_block_tokens: int | None = None,
        pin_memory: bool = False,
        threads: int = 1,
        prefetch: int = 2,
    ) -> None:
        for stage in stages.all:
            rows_per_rank, remainder = divmod(stage.global_batch_size, size)
            if remainder or rows_per_rank % (stage.micro_batch_size or rows_per_rank):
                raise ValueError(
                    f"train.global_batch_size={stage.global_batch_size} is not a multiple of "
                    f"{size} data ranks times train.micro_batch_size={stage.micro_batch_size}"
                )
        self.dataset = dataset
        self.stages = stages
        self.order = dataset.order(stages, seed, shuffle_block_tokens)
        self.rank, self.size = rank, size
        self.pin_memory = pin_memory
        self.threads, self.prefetch = threads, prefetch
        self._streams = [dataset.train[name] for name in self.order.names]

    def step(self, step: int) -> StepBatches:
        """Read the batch with this index in the order, without prefetching.

        Raises:
            DataError: A shard is missing or damaged.
        """
        stage = self.stages.at(step)
        rows_per_rank = stage.global_batch_size // self.size
        first = self.stages.first_sample(step) + self.rank * rows_per_rank
        samples = np.arange(first, first + rows_per_rank)
        source, _, index = (column.tolist() for column in self.order.locate(samples))
        windows = [
            self._streams[s].window(i, stage.seq_len) for s, i in zip(source, index, strict=True)
        ]
        return make_step_batches(
            windows,
            step,
            first,
            stage.micro_batch_size or rows_per_rank,
            self.dataset.document_mask,
            self.pin_memory,
        )

    def steps(
        self, first_batch: int, skips: Sequence[tuple[int, int]] = ()
    ) -> Generator[StepBatches, None, None]:
        """Iterate over the batches from `first_batch`, except those in `skips`, prefetched.

        The iterator is endless. Closing it stops its threads; an exception in a thread is raised
        when its step is due.
        """
        return prefetch_steps(self.step, self.threads, self.prefetch, first_batch, skips)


def prefetch_steps(
    read_step: Callable[[int], StepBatches],
    threads: int,
    prefetch: int,
    first_batch: int,
    skips: Sequence[tuple[int, int]],
) -> Generator[StepBatches, None, None]:
    """Yield `read_step(index)` in order, with up to `prefetch` calls ahead in `threads` threads."""
    pool = ThreadPoolExecutor(threads, thread_name_prefix="llamesh-loader")
    pending: deque[Future[StepBatches]] = deque()
    try:
        for index in batch_indices(first_batch, skips):
            pending.append(pool.submit(read_step, index))
            if len(pending) > prefetch:
                yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def make_step_batches(
    windows: list[Window],
    number: int,
    first_sample: int,
    micro_batch_size: int,
    document_mask: bool,
    pin_memory: bool = False,
) -> StepBatches:
    """Divide one rank's windows of a step into micro-batches.

    Args:
        windows: Consecutive samples starting with the global sample `first_sample`.
    """
    digest = sum(
        isal_zlib.crc32(tokens, isal_zlib.crc32(sample.to_bytes(8, "little")))
        for sample, (tokens, _) in enumerate(windows, first_sample)
    )
    groups = [windows[i : i + micro_batch_size] for i in range(0, len(windows), micro_batch_size)]
    micro_batches = [make_batch(group, document_mask, pin_memory=pin_memory) for group in groups]
    # Documents that start inside a window, for each micro-batch.
    n_starts = [
        sum(int((starts > 0).sum()) for _, starts in group) if document_mask else 0
        for group in groups
    ]
    n_documents = [len(group) + n for group, n in zip(groups, n_starts, strict=True)]
    n_targets = sum(len(tokens) - 1 for tokens, _ in windows) - sum(n_starts)
    return StepBatches(micro_batches, n_documents, n_targets, digest, number)


def validation_batches(
    dataset: Dataset, *, samples: int, seq_len: int, micro_batch_size: int, rank: int, size: int
) -> dict[str, list[Batch]]:
    """Return one data rank's batches of the first validation windows, by source.

    Windows are taken in stored order, alternating between sources, fewer than `samples` if the
    split is smaller. Every rank gets the same number of batches of the same shape, so that all take
    part in each collective; surplus rows have only labels of -100.
    """
    counts = {name: stream.n_windows(seq_len) for name, stream in dataset.validation.items()}
    alternating = (
        (name, index)
        for index in range(max(counts.values(), default=0))
        for name, count in counts.items()
        if index < count
    )
    selected: dict[str, list[int]] = {name: [] for name in counts}
    for name, index in islice(alternating, samples):
        selected[name].append(index)
    batches: dict[str, list[Batch]] = {name: [] for name, indices in selected.items() if indices}
    for name, source_batches in batches.items():
        stream, indices = dataset.validation[name], selected[name]
        for first in range(0, len(indices), micro_batch_size * size):
            start = first + micro_batch_size * rank
            windows = [
                stream.window(index, seq_len) for index in indices[start : start + micro_batch_size]
            ]
            batch = make_batch(windows, dataset.document_mask, seq_len)
            source_batches.append(_pad_rows(batch, micro_batch_size))
    return batches


def make_batch(
    windows: list[Window],
    document_mask: bool,
    seq_len: int | None = None,
    pin_memory: bool = False,
) -> Batch:
    """Stack windows as the rows of one batch."""
    if seq_len is None:
        seq_len = len(windows[0][0]) - 1
    shape = (len(windows), seq_len)
    tensors = [torch.empty(shape, dtype=torch.int64, pin_memory=pin_memory) for _ in Batch._fields]
    tokens, positions, labels = (tensor.numpy() for tensor in tensors)
    for row, (window, _) in enumerate(windows):
        tokens[row] = window[:-1]
        labels[row] = window[1:]
    if not document_mask:
        return Batch(*tensors)._replace(positions=None)
    indices = np.arange(seq_len)
    for row, (_, starts) in enumerate(windows):
        positions[row] = indices
        inside = starts[starts > 0]
        labels[row, inside - 1] = IGNORE_INDEX
        starts = inside[inside < seq_len]
        # Subtract each document's start from its positions.
        lengths = np.diff(starts, append=seq_len)
        positions[row, seq_len - lengths.sum() :] -= np.repeat(starts, lengths)
    return Batch(*tensors)


def _pad_rows(batch: Batch, n_rows: int) -> Batch:
    """Append rows without labels, up to `n_rows`."""
    n_missing, seq_len = n_rows - len(batch.tokens), batch.tokens.shape[1]
    tokens = torch.zeros(n_missing, seq_len, dtype=torch.int64)
    labels = torch.full((n_missing, seq_len), IGNORE_INDEX)
    positions = batch.positions
    if positions is not None:
        positions = torch.cat([positions, torch.arange(seq_len).expand(n_missing, seq_len)])
    return Batch(torch.cat([batch.tokens, tokens]), positions, torch.cat([batch.labels, labels]))
