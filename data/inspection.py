"""What lies in a prepared folder, for eyes: lengths of documents, and the sample at a position.

A sample goes the way that training's does: number → order → window → labels. What is told of both
on a screen is `data.inspection_report`'s.
"""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.dataset import Dataset
from data.loader import IGNORE, make_batch
from data.manifest import OFFSET, SPLITS, Manifest
from data.packing import PackedStream
from data.shards import map_file
from data.stages import Stage, Stages

OFFSETS_AT_A_TIME = 2**20


class Lengths(NamedTuple):
    """Documents by their length: bin i holds those of 2**i … 2**(i+1)-1 tokens.

    `documents` and `tokens` are int64 (bins,).
    """

    documents: np.ndarray
    tokens: np.ndarray


class Sample(NamedTuple):
    """One training sample: `tokens` uint32 (seq_len + 1,), the last of them a label alone.

    `labels` are int64 (seq_len,), -100 where no loss is computed. The n_padding last tokens fill a
    packed window. `step` counts from 0.
    """

    number: int
    source: str
    epoch: int
    window: int
    n_windows: int
    step: int
    stage: Stage
    tokens: np.ndarray
    labels: np.ndarray
    starts: np.ndarray  # int64: the places where a document, or a part of one, begins
    n_padding: int

    def pieces(self) -> list[tuple[int, int]]:
        """From which place to which (not included) each document's part goes; no padding."""
        end = len(self.tokens) - self.n_padding
        cuts = sorted({0, *self.starts[self.starts < end].tolist(), end})
        return list(pairwise(cuts))

    def masked(self) -> set[int]:
        """The places whose label is left out."""
        return set(np.flatnonzero(self.labels == IGNORE).tolist())


def document_lengths(
    folder: Path, manifest: Manifest, tell: Callable[[int, int], None] = lambda done, total: None
) -> Lengths:
    """The lengths of all documents, of both splits, from the offsets alone.

    Args:
        tell: is told after each shard how many of how many are read

    Raises:
        DataError: an offsets file is gone or damaged.
    """
    documents, tokens = (np.zeros(64, dtype=np.int64) for _ in range(2))
    shards = [shard for split in SPLITS for shard in manifest.shards(split)]
    for done, shard in enumerate(shards, start=1):
        offsets = map_file(folder, shard.offsets, OFFSET, verify=True)
        for begin in range(0, shard.n_documents, OFFSETS_AT_A_TIME):
            lengths = np.diff(offsets[begin : begin + OFFSETS_AT_A_TIME + 1])
            # frexp is exact for lengths below 2**53: length = fraction × 2**exponent, from ½ on.
            of_each = np.frexp(lengths.astype(np.float64))[1] - 1
            documents += np.bincount(of_each, minlength=64)
            tokens += np.bincount(of_each, weights=lengths, minlength=64).astype(np.int64)
        tell(done, len(shards))
    return Lengths(documents, tokens)


def read_sample(
    dataset: Dataset,
    stages: Stages,
    number: int,
    *,
    seed: int,
    shuffle_block_tokens: int | None = None,
) -> Sample:
    """The sample that training takes as its `number`-th, counted from 0.

    Raises:
        DataError: a source is too small, or a shard damaged.
    """
    order = dataset.order(stages, seed, shuffle_block_tokens)
    found = order.locate(np.array([number]))
    place, epoch, window = (int(column[0]) for column in found)
    source = order.names[place]
    step = stages.step_of(number)
    stage = stages.at(step)
    stream = dataset.train[source]
    tokens, starts = stream.window(window, stage.seq_len)
    labels = make_batch([(tokens, starts)], dataset.document_mask, stage.seq_len).labels
    n_padding = 0
    if isinstance(stream, PackedStream):
        # Each token of the padding is a piece of its own; a document's have two tokens or more.
        lengths = np.diff(starts, append=len(tokens))
        n_padding = int(np.argmax(lengths[::-1] > 1))
    return Sample(
        number,
        source,
        epoch,
        window,
        stream.n_windows(stage.seq_len),
        step,
        stage,
        tokens,
        labels[0].numpy(),
        starts,
        n_padding,
    )
