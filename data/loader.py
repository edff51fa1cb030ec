"""Batches for training and validation from a prepared folder.

Which windows form a step is `data.order`'s; here they are read, cut into documents, dealt to data
ranks and micro-batches, and read ahead by threads. Every batch is a function of its number in the
order, never of what was read before: a loader has no state to save.
"""

from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from isal import isal_zlib

from data.dataset import Dataset
from data.stages import Stages, batches_from

IGNORE = -100  # the label that no loss is computed for


class Batch(NamedTuple):
    """One micro-batch; each int64 (micro_batch, seq).

    `positions` count from 0 at the window's start and at each document's beginning; None: each row
    is one document. `labels` are the next tokens, -100 where the next one begins another document.
    """

    tokens: torch.Tensor
    positions: torch.Tensor | None
    labels: torch.Tensor


class StepBatches(NamedTuple):
    """What one data rank computes in one step.

    `n_documents` tells for each micro-batch how many documents it has at most, a row's first one
    counted in any case. `n_targets` counts this rank's labels that are not -100. `digest` is a sum
    over its samples: added up over the data ranks it is the same on every mesh, and another one
    when a sample is lost, doubled or changed. `number` is the batch's place in the order, from 0.
    `lanes` tells where this rank's lanes are after the step, when the samples come straight from a
    dataset (`data.stream`).
    """

    micro_batches: list[Batch]
    n_documents: list[int]
    n_targets: int
    digest: int
    number: int = 0
    lanes: dict[str, list[int]] | None = None

    @property
    def counts(self) -> torch.Tensor:
        """`n_targets` and `digest` as int64 (2,), ready to be summed over the data ranks."""
        return torch.tensor([self.n_targets, self.digest])


class TrainLoader:
    """The training batches of one data rank.

    A step takes the samples that `stages` tell; of these, data rank r of `size` computes the r-th
    contiguous part, cut into micro-batches in order. `threads` read up to `prefetch` steps ahead;
    neither they nor the cuts change what a step consists of.
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
            share, rest = divmod(stage.global_batch_size, size)
            if rest or share % (stage.micro_batch_size or share):
                raise ValueError(
                    f"train.global_batch_size ({stage.global_batch_size}) is not a multiple of "
                    f"{size} data ranks times train.micro_batch_size ({stage.micro_batch_size})"
                )
        self.dataset = dataset
        self.stages = stages
        self.order = dataset.order(stages, seed, shuffle_block_tokens)
        self.rank, self.size = rank, size
        self.pin_memory = pin_memory
        self.threads, self.prefetch = threads, prefetch
        self._streams = [dataset.train[name] for name in self.order.names]

    def step(self, step: int) -> StepBatches:
        """The batch of this number in the order, read here and now.

        Raises:
            DataError: a shard is gone, or not what was prepared.
        """
        stage = self.stages.at(step)
        share = stage.global_batch_size // self.size
        first = self.stages.first_sample(step) + self.rank * share
        samples = np.arange(first, first + share)
        windows, digest = [], 0
        located = [column.tolist() for column in self.order.locate(samples)]
        for sample, source, _, index in zip(samples.tolist(), *located, strict=True):
            tokens, starts = self._streams[source].window(index, stage.seq_len)
            digest += isal_zlib.crc32(tokens, isal_zlib.crc32(sample.to_bytes(8, "little")))
            windows.append((tokens, starts))
        return deal(
            windows,
            digest,
            stage.micro_batch_size or share,
            self.dataset.document_mask,
            self.pin_memory,
        )._replace(number=step)

    def steps(
        self, first_batch: int, skips: Sequence[tuple[int, int]] = ()
    ) -> Generator[StepBatches, None, None]:
        """The batches from `first_batch` on but for those in `skips`, without end, read ahead.

        Close the iterator (or let it go) to end its threads; what fails in a thread is raised
        here, in the place of its step.
        """
        pool = ThreadPoolExecutor(self.threads, thread_name_prefix="llamesh-loader")
        ahead: deque[Future[StepBatches]] = deque()
        try:
            for number in batches_from(first_batch, skips):
                ahead.append(pool.submit(self.step, number))
                if len(ahead) > self.prefetch:
                    yield ahead.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def deal(
    windows: list[tuple[np.ndarray, np.ndarray]],
    digest: int,
    micro_batch_size: int,
    document_mask: bool,
    pin_memory: bool = False,
) -> StepBatches:
    """A rank's windows of a step, (tokens (seq + 1,), document starts), as micro-batches."""
    pieces = [windows[i : i + micro_batch_size] for i in range(0, len(windows), micro_batch_size)]
    micro_batches = [make_batch(piece, document_mask, pin_memory=pin_memory) for piece in pieces]
    n_documents = [len(piece) for piece in pieces]
    if document_mask:
        n_documents = [
            len(piece) + sum(int((starts > 0).sum()) for _, starts in piece) for piece in pieces
        ]
    n_targets = sum(len(tokens) - 1 for tokens, _ in windows)
    if document_mask:
        n_targets -= sum(int((starts > 0).sum()) for _, starts in windows)
    return StepBatches(micro_batches, n_documents, n_targets, digest)


def validation_batches(
    dataset: Dataset, *, samples: int, seq_len: int, micro_batch_size: int, rank: int, size: int
) -> dict[str, list[Batch]]:
    """The first validation windows, by source, dealt to the data ranks.

    Windows count in their stored order, one source after the other in turn; fewer than `samples`
    when the split holds fewer. Every rank gets as many batches of the same shape, so that all join
    each collective call; rows that are left over have labels of -100 alone.
    """
    counts = {name: stream.n_windows(seq_len) for name, stream in dataset.validation.items()}
    in_turn = (
        (name, index)
        for index in range(max(counts.values(), default=0))
        for name, count in counts.items()
        if index < count
    )
    chosen: dict[str, list[int]] = {name: [] for name, count in counts.items() if count}
    for name, index in islice(in_turn, samples):
        chosen[name].append(index)
    batches: dict[str, list[Batch]] = {name: [] for name, indices in chosen.items() if indices}
    for name, of_source in batches.items():
        stream, indices = dataset.validation[name], chosen[name]
        for first in range(0, len(indices), micro_batch_size * size):
            begin = first + micro_batch_size * rank
            rows = indices[begin : begin + micro_batch_size]
            windows = [stream.window(index, seq_len) for index in rows]
            batch = make_batch(windows, dataset.document_mask, seq_len)
            of_source.append(_pad_rows(batch, micro_batch_size))
    return batches


def make_batch(
    windows: list[tuple[np.ndarray, np.ndarray]],
    document_mask: bool,
    seq_len: int | None = None,
    pin_memory: bool = False,
) -> Batch:
    """Windows of (tokens (seq + 1,), document starts) as one batch, a row each."""
    if seq_len is None:
        seq_len = len(windows[0][0]) - 1
    shape = (len(windows), seq_len)
    parts = [torch.empty(shape, dtype=torch.int64, pin_memory=pin_memory) for _ in Batch._fields]
    tokens, positions, labels = (part.numpy() for part in parts)
    for row, (window, _) in enumerate(windows):
        tokens[row] = window[:-1]
        labels[row] = window[1:]
    if not document_mask:
        return Batch(*parts)._replace(positions=None)
    counting = np.arange(seq_len)
    for row, (_, starts) in enumerate(windows):
        positions[row] = counting
        inside = starts[starts > 0]
        labels[row, inside - 1] = IGNORE
        begins = inside[inside < seq_len]
        # From each document's beginning on its place is taken off.
        lengths = np.diff(begins, append=seq_len)
        positions[row, seq_len - lengths.sum() :] -= np.repeat(begins, lengths)
    return Batch(*parts)


def _pad_rows(batch: Batch, n_rows: int) -> Batch:
    """The batch with rows added that have no label, up to `n_rows`."""
    missing, seq_len = n_rows - len(batch.tokens), batch.tokens.shape[1]
    tokens = torch.zeros(missing, seq_len, dtype=torch.int64)
    labels = torch.full((missing, seq_len), IGNORE)
    positions = batch.positions
    if positions is not None:
        counting = torch.arange(seq_len).expand(missing, seq_len)
        positions = torch.cat([positions, counting])
    return Batch(torch.cat([batch.tokens, tokens]), positions, torch.cat([batch.labels, labels]))
