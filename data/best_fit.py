"""Best-fit-decreasing bin packing of documents into windows, given only their lengths.

Ding et al., "Fewer Truncations Improve Language Modeling" (2024). Documents of equal length are
packed together, so the run time depends on the number of distinct lengths, not of documents. The
result is deterministic: equal lengths produce equal bins on every machine.
"""

from collections import deque
from typing import NamedTuple

import numpy as np


class Bins(NamedTuple):
    """The packed windows of one shard.

    Bin b contains segments offsets[b] … offsets[b + 1] - 1. Segments within a bin are in stored
    order; bins are ordered by their first segment.

    Attributes:
        offsets: (n_bins + 1,) int64
        starts: (n_segments,) int64, token index in the shard
        lengths: (n_segments,) int64, in tokens
        n_split: Number of documents split into several segments.
    """

    offsets: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    n_split: int


def pack_documents(starts: np.ndarray, n_tokens: int, capacity: int) -> Bins:
    """Pack the documents of a shard into bins of at most `capacity` tokens.

    Args:
        starts: (n_documents,) int64, start of each document; a document ends at the start of the
            next one, the last one at `n_tokens`
        capacity: at least 2
    """
    starts, lengths, n_split = split_documents(starts, n_tokens, capacity)
    bins = best_fit(lengths, capacity)  # numbered in opening order: longest segments first
    # Renumber by first segment, so that neighbouring bins are neighbours in the shard and bin
    # indices do not correlate with document length.
    _, first, bins = np.unique(bins, return_index=True, return_inverse=True)
    rank = np.empty_like(first)
    rank[np.argsort(first)] = np.arange(len(first))
    bins = rank[bins]
    order = np.argsort(bins, kind="stable")
    offsets = np.concatenate([[0], np.cumsum(np.bincount(bins))])
    return Bins(offsets, starts[order], lengths[order], n_split)


def split_documents(
    starts: np.ndarray, n_tokens: int, capacity: int
) -> tuple[np.ndarray, np.ndarray, int]:
    """Split documents into segments of at most `capacity` tokens, in stored order.

    Segments of a longer document overlap by one token, which is a label in the first and an input
    in the second. The remainder is a segment too, unless it is only the overlap.

    Returns:
        Starts and lengths, each (n_segments,) int64, and the number of split documents.
    """
    sizes = np.diff(starts, append=n_tokens)
    stride = capacity - 1
    n_full = np.where(sizes > capacity, (sizes - 1) // stride, 0)  # segments of `capacity` tokens
    remainder = sizes - n_full * stride
    n_segments = n_full + ((n_full == 0) | (remainder > 1))
    index = np.arange(n_segments.sum()) - np.repeat(np.cumsum(n_segments) - n_segments, n_segments)
    segment_starts = np.repeat(starts, n_segments) + index * stride
    lengths = np.minimum(np.repeat(starts + sizes, n_segments) - segment_starts, capacity)
    return segment_starts, lengths, int((n_full > 0).sum())


def best_fit(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """Assign each segment to a bin.

    Segments are processed longest first, equal lengths in input order. Each goes into the bin with
    the least sufficient free space (among equals, the bin that has had this space longest), or into
    a new bin.

    Args:
        lengths: (n_segments,) int64, each 1 … capacity

    Returns:
        (n_segments,) int64 bin indices, in opening order.
    """
    bins = np.empty(len(lengths), dtype=np.int64)
    by_length = np.argsort(capacity - lengths, kind="stable")
    counts = np.bincount(lengths)
    open_bins = _OpenBins()
    n_bins = done = 0
    for length in np.flatnonzero(counts)[::-1].tolist():
        end = done + int(counts[length])
        while done < end:
            space = open_bins.least_space(length)
            # Fill each bin completely: after one segment it is still the tightest fit.
            per_bin = (space or capacity) // length
            n_wanted = -((done - end) // per_bin)
            if space is None:
                space, taken = capacity, np.arange(n_bins, n_bins + n_wanted)
                n_bins += n_wanted
            else:
                taken = open_bins.take(space, n_wanted)
            n_placed = min(end - done, len(taken) * per_bin)
            bins[by_length[done : done + n_placed]] = np.repeat(taken, per_bin)[:n_placed]
            n_full, n_last = divmod(n_placed, per_bin)
            open_bins.put(space - per_bin * length, taken[:n_full])
            open_bins.put(space - n_last * length, taken[n_full:])
            done += n_placed
    return bins


class _OpenBins:
    """Bins grouped by free space, first in first out."""

    def __init__(self) -> None:
        self._by_space: dict[int, deque[np.ndarray]] = {}
        self._mask = 0  # bit s is set if any bin has free space s

    def least_space(self, length: int) -> int | None:
        """Return the smallest free space that fits `length`, or None."""
        mask = self._mask >> length
        return length + (mask & -mask).bit_length() - 1 if mask else None

    def put(self, space: int, bins: np.ndarray) -> None:
        """Add bins with this free space; full bins are dropped."""
        if space and len(bins):
            self._by_space.setdefault(space, deque()).append(bins)
            self._mask |= 1 << space

    def take(self, space: int, n: int) -> np.ndarray:
        """Remove and return up to `n` bins with this free space."""
        parts, queue = [], self._by_space[space]
        while n and queue:
            part = queue.popleft()
            if len(part) > n:
                queue.appendleft(part[n:])
            parts.append(part[:n])
            n -= len(parts[-1])
        if not queue:
            del self._by_space[space]
            self._mask ^= 1 << space
        return np.concatenate(parts)
