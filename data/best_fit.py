"""Which documents share a window: best-fit decreasing, over lengths alone.

Ding et al., "Fewer Truncations Improve Language Modeling" (2024). Documents of equal length are
placed together, so the time goes by the number of different lengths, not of documents. A closed
rule without chance: the same lengths make the same bins, everywhere.
"""

from collections import deque
from typing import NamedTuple

import numpy as np


class Bins(NamedTuple):
    """The windows of one shard: bin b holds the pieces offsets[b] … offsets[b + 1] - 1.

    `offsets` is int64 (bins + 1,); `begins`, places in the shard, and `lengths`, in tokens, are
    int64 (pieces,). Pieces stand as stored, and bins by their first piece. `n_cut` counts documents
    in several pieces.
    """

    offsets: np.ndarray
    begins: np.ndarray
    lengths: np.ndarray
    n_cut: int


def pack_documents(starts: np.ndarray, n_tokens: int, capacity: int) -> Bins:
    """Bins of at most `capacity` (2 or more) tokens for the documents of a shard.

    Args:
        starts: int64 (documents,), where each document begins; it ends where the next one begins,
            the last one after `n_tokens`
    """
    begins, lengths, n_cut = cut(starts, n_tokens, capacity)
    bins = best_fit(lengths, capacity)  # numbered as they were opened, the longest pieces first
    # Numbered anew by their first piece: neighbours in the index are neighbours in the shard, and
    # of no special length.
    _, first, bins = np.unique(bins, return_index=True, return_inverse=True)
    rank = np.empty_like(first)
    rank[np.argsort(first)] = np.arange(len(first))
    bins = rank[bins]
    order = np.argsort(bins, kind="stable")
    offsets = np.concatenate([[0], np.cumsum(np.bincount(bins))])
    return Bins(offsets, begins[order], lengths[order], n_cut)


def cut(starts: np.ndarray, n_tokens: int, capacity: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Documents as pieces of at most `capacity` tokens, in their order.

    A longer document is cut into pieces of `capacity` tokens that overlap by one, which is a label
    in the one and an input in the other. What is left is a piece too, unless it is the overlap
    alone.

    Returns:
        begins and lengths, each int64 (pieces,), and how many documents are cut
    """
    sizes = np.diff(starts, append=n_tokens)
    stride = capacity - 1
    whole = np.where(sizes > capacity, (sizes - 1) // stride, 0)  # pieces of `capacity` tokens
    rest = sizes - whole * stride
    n_pieces = whole + ((whole == 0) | (rest > 1))
    number = np.arange(n_pieces.sum()) - np.repeat(np.cumsum(n_pieces) - n_pieces, n_pieces)
    begins = np.repeat(starts, n_pieces) + number * stride
    lengths = np.minimum(np.repeat(starts + sizes, n_pieces) - begins, capacity)
    return begins, lengths, int((whole > 0).sum())


def best_fit(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """The bin of each piece, int64 (pieces,): numbered as they are opened.

    Pieces go by length, the longest first, of equal ones the first first; each into the bin with
    the least room that holds it, of equal ones into the one that has had this room for longest; a
    new bin where none holds it.

    Args:
        lengths: int64 (pieces,), each 1 … capacity
    """
    bins = np.empty(len(lengths), dtype=np.int64)
    by_length = np.argsort(capacity - lengths, kind="stable")
    counts = np.bincount(lengths)
    open_bins = _OpenBins()
    n_bins = done = 0
    for length in np.flatnonzero(counts)[::-1].tolist():
        end = done + int(counts[length])
        while done < end:
            room = open_bins.least_room(length)
            # A bin takes as many as it holds: after each it is the fullest that holds another.
            each = (room or capacity) // length
            n_wanted = -((done - end) // each)
            if room is None:
                room, taken = capacity, np.arange(n_bins, n_bins + n_wanted)
                n_bins += n_wanted
            else:
                taken = open_bins.take(room, n_wanted)
            n_placed = min(end - done, len(taken) * each)
            bins[by_length[done : done + n_placed]] = np.repeat(taken, each)[:n_placed]
            n_full, n_last = divmod(n_placed, each)
            open_bins.put(room - each * length, taken[:n_full])
            open_bins.put(room - n_last * length, taken[n_full:])
            done += n_placed
    return bins


class _OpenBins:
    """Bins by the room that is left in them, in the order in which they came to have it."""

    def __init__(self) -> None:
        self._by_room: dict[int, deque[np.ndarray]] = {}
        self._rooms = 0  # bit r is set where there are bins with room r

    def least_room(self, length: int) -> int | None:
        """The least room that holds `length`, or None."""
        rooms = self._rooms >> length
        return length + (rooms & -rooms).bit_length() - 1 if rooms else None

    def put(self, room: int, bins: np.ndarray) -> None:
        """Adds bins with this room; full ones are forgotten."""
        if room and len(bins):
            self._by_room.setdefault(room, deque()).append(bins)
            self._rooms |= 1 << room

    def take(self, room: int, n: int) -> np.ndarray:
        """Removes the first `n` bins with this room, or all where there are fewer."""
        parts, queue = [], self._by_room[room]
        while n and queue:
            part = queue.popleft()
            if len(part) > n:
                queue.appendleft(part[n:])
                part = part[:n]
            parts.append(part)
            n -= len(part)
        if not queue:
            del self._by_room[room]
            self._rooms ^= 1 << room
        return np.concatenate(parts)
