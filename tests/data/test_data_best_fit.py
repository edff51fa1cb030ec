"""Best-fit packing of lengths: against the algorithm as it is told, one document after another."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from data.best_fit import Bins, _OpenBins, best_fit, cut, pack_documents

LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=80)
CAPACITY = st.integers(2, 30)


def slow_best_fit(lengths: list[int], capacity: int) -> list[list[int]]:
    """Each bin's pieces, by number: best-fit decreasing as the paper tells it."""
    bins: list[list[int]] = []
    rooms: list[int] = []
    since: list[int] = []  # when each bin came to have its room
    for time, piece in enumerate(sorted(range(len(lengths)), key=lambda i: -lengths[i])):
        fitting = [b for b, room in enumerate(rooms) if room >= lengths[piece]]
        if not fitting:
            bins.append([])
            rooms.append(capacity)
            since.append(time)
            fitting = [len(bins) - 1]
        best = min(fitting, key=lambda b: (rooms[b], since[b]))
        bins[best].append(piece)
        rooms[best] -= lengths[piece]
        since[best] = time
    return bins


def packed(lengths: list[int], capacity: int) -> Bins:
    ends = np.cumsum(lengths)
    return pack_documents(ends - lengths, int(ends[-1]), capacity)


def pieces(bins: Bins) -> list[list[tuple[int, int]]]:
    """(begin, end) of each piece of each bin."""
    spans = [*zip(bins.begins.tolist(), (bins.begins + bins.lengths).tolist(), strict=True)]
    offsets = bins.offsets.tolist()
    return [spans[a:b] for a, b in pairwise(offsets)]


@given(capacity=CAPACITY, data=st.data())
def test_pieces_lie_where_one_after_another_they_would(capacity: int, data: st.DataObject) -> None:
    """Not only as many bins: the tie rules are those of the reference, piece by piece."""
    lengths = data.draw(st.lists(st.integers(1, capacity), max_size=80))
    found = best_fit(np.array(lengths, dtype=np.int64), capacity).tolist()
    expected = slow_best_fit(lengths, capacity)
    assert [[i for i, b in enumerate(found) if b == n] for n in range(len(expected))] == [
        sorted(each) for each in expected
    ]


def test_many_documents_of_realistic_lengths_need_as_many_bins_as_the_reference() -> None:
    generator = np.random.default_rng(0)
    lengths = np.clip(generator.lognormal(4.5, 1.2, 2000), 1, 513).astype(np.int64)
    expected = slow_best_fit(lengths.tolist(), 513)
    assert int(best_fit(lengths, 513).max()) + 1 == len(expected)
    least = -(int(lengths.sum()) // -513)
    assert len(expected) <= 1.02 * least  # the paper: next to no padding


@given(lengths=LENGTHS, capacity=CAPACITY)
@example(lengths=[21], capacity=11)  # one token is left over, the overlap alone
def test_no_token_and_no_target_is_lost_or_doubled(lengths: list[int], capacity: int) -> None:
    spans = [span for each in pieces(packed(lengths, capacity)) for span in each]
    ends = np.cumsum(lengths).tolist()
    targets = [target for begin, end in spans for target in range(begin + 1, end)]
    begins = {0, *ends[:-1]}
    assert sorted(targets) == [token for token in range(ends[-1]) if token not in begins]
    overlaps = {begin for begin, _ in spans} - begins
    tokens = [token for begin, end in spans for token in range(begin, end)]
    assert sorted(tokens) == sorted([*range(ends[-1]), *overlaps])


@given(lengths=LENGTHS, capacity=CAPACITY)
def test_bins_hold_whole_documents_in_their_order_and_none_too_many(
    lengths: list[int], capacity: int
) -> None:
    found = packed(lengths, capacity)
    bins = pieces(found)
    ends = np.cumsum(lengths).tolist()
    documents = [(end - n, end) for n, end in zip(lengths, ends, strict=True)]
    spans = {span for each in bins for span in each}
    assert {span for span in documents if span[1] - span[0] <= capacity} <= spans
    assert found.n_cut == sum(n > capacity for n in lengths)
    assert all(0 < sum(end - begin for begin, end in each) <= capacity for each in bins)
    assert all(each == sorted(each) for each in bins)
    assert bins == sorted(bins)


@given(lengths=LENGTHS, capacity=CAPACITY)
def test_cut_pieces_are_full_but_the_last_and_share_one_token(
    lengths: list[int], capacity: int
) -> None:
    for n in lengths:
        begins, sizes, n_cut = cut(np.array([7]), 7 + n, capacity)
        assert sizes[:-1].tolist() == [capacity] * (len(sizes) - 1)
        assert begins[1:].tolist() == (begins + sizes - 1)[:-1].tolist()
        assert begins[0] == 7 and begins[-1] + sizes[-1] == 7 + n
        assert n_cut == (n > capacity) == (len(sizes) > 1)


@pytest.mark.parametrize("capacity", [2, 8193, 131_073])
def test_a_million_documents_take_no_loop_over_documents(
    capacity: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps of the algorithm, counted by its look-ups of rooms, not timed."""
    lengths = np.random.default_rng(0).lognormal(6.0, 1.3, 1_000_000).astype(np.int64) + 1
    lengths = np.minimum(lengths, capacity)
    calls = 0
    look_up = _OpenBins.least_room

    def count(self: _OpenBins, length: int) -> int | None:
        nonlocal calls
        calls += 1
        return look_up(self, length)

    monkeypatch.setattr(_OpenBins, "least_room", count)
    bins = best_fit(lengths, capacity)
    assert np.bincount(bins, lengths).max() <= capacity
    # Each use of a room up to its end at least halves it, so a room is used up a few times.
    assert calls < np.log2(capacity) * len(np.unique(lengths)) + 20
