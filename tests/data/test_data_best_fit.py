"""Best-fit-decreasing packing compared with a reference that places one document at a time."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from data.best_fit import Bins, _OpenBins, best_fit, pack_documents, split_documents

LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=80)
CAPACITY = st.integers(2, 30)


def reference_best_fit(lengths: list[int], capacity: int) -> list[list[int]]:
    """Return the segment indices of each bin by best-fit decreasing, as in the paper."""
    bins: list[list[int]] = []
    free: list[int] = []
    last_change: list[int] = []  # when the free space of each bin last changed
    for time, segment in enumerate(sorted(range(len(lengths)), key=lambda i: -lengths[i])):
        candidates = [b for b, space in enumerate(free) if space >= lengths[segment]]
        if not candidates:
            bins.append([])
            free.append(capacity)
            last_change.append(time)
            candidates = [len(bins) - 1]
        best = min(candidates, key=lambda b: (free[b], last_change[b]))
        bins[best].append(segment)
        free[best] -= lengths[segment]
        last_change[best] = time
    return bins


def packed(lengths: list[int], capacity: int) -> Bins:
    ends = np.cumsum(lengths)
    return pack_documents(ends - lengths, int(ends[-1]), capacity)


def segments(bins: Bins) -> list[list[tuple[int, int]]]:
    """Return (start, end) of the segments of each bin."""
    spans = [*zip(bins.starts.tolist(), (bins.starts + bins.lengths).tolist(), strict=True)]
    offsets = bins.offsets.tolist()
    return [spans[a:b] for a, b in pairwise(offsets)]


@given(capacity=CAPACITY, data=st.data())
def test_each_segment_is_in_the_bin_of_the_reference(capacity: int, data: st.DataObject) -> None:
    """This includes the rules for ties, not only the number of bins."""
    lengths = data.draw(st.lists(st.integers(1, capacity), max_size=80))
    bin_of = best_fit(np.array(lengths, dtype=np.int64), capacity).tolist()
    expected = reference_best_fit(lengths, capacity)
    assert [[i for i, b in enumerate(bin_of) if b == n] for n in range(len(expected))] == [
        sorted(each) for each in expected
    ]


def test_documents_of_realistic_lengths_need_as_many_bins_as_the_reference() -> None:
    generator = np.random.default_rng(0)
    lengths = np.clip(generator.lognormal(4.5, 1.2, 2000), 1, 513).astype(np.int64)
    expected = reference_best_fit(lengths.tolist(), 513)
    assert int(best_fit(lengths, 513).max()) + 1 == len(expected)
    lower_bound = -(int(lengths.sum()) // -513)
    assert len(expected) <= 1.02 * lower_bound  # almost no padding, as reported in the paper


@given(lengths=LENGTHS, capacity=CAPACITY)
@example(lengths=[21], capacity=11)  # the remainder is one token, which is only the overlap
def test_every_token_and_target_occurs_exactly_once(lengths: list[int], capacity: int) -> None:
    spans = [span for each in segments(packed(lengths, capacity)) for span in each]
    ends = np.cumsum(lengths).tolist()
    targets = [target for start, end in spans for target in range(start + 1, end)]
    starts = {0, *ends[:-1]}
    assert sorted(targets) == [token for token in range(ends[-1]) if token not in starts]
    overlaps = {start for start, _ in spans} - starts
    tokens = [token for start, end in spans for token in range(start, end)]
    assert sorted(tokens) == sorted([*range(ends[-1]), *overlaps])


@given(lengths=LENGTHS, capacity=CAPACITY)
def test_bins_keep_short_documents_unsplit_and_in_order_within_capacity(
    lengths: list[int], capacity: int
) -> None:
    result = packed(lengths, capacity)
    bins = segments(result)
    ends = np.cumsum(lengths).tolist()
    documents = [(end - n, end) for n, end in zip(lengths, ends, strict=True)]
    spans = {span for each in bins for span in each}
    assert {span for span in documents if span[1] - span[0] <= capacity} <= spans
    assert result.n_split == sum(n > capacity for n in lengths)
    assert all(0 < sum(end - start for start, end in each) <= capacity for each in bins)
    assert all(each == sorted(each) for each in bins)
    assert bins == sorted(bins)


@given(lengths=LENGTHS, capacity=CAPACITY)
def test_segments_of_a_split_document_are_full_except_the_last_and_overlap_by_one_token(
    lengths: list[int], capacity: int
) -> None:
    for n in lengths:
        starts, sizes, n_split = split_documents(np.array([7]), 7 + n, capacity)
        assert sizes[:-1].tolist() == [capacity] * (len(sizes) - 1)
        assert starts[1:].tolist() == (starts + sizes - 1)[:-1].tolist()
        assert starts[0] == 7 and starts[-1] + sizes[-1] == 7 + n
        assert n_split == (n > capacity) == (len(sizes) > 1)


@pytest.mark.parametrize("capacity", [2, 8193, 131_073])
def test_a_million_documents_need_no_loop_over_documents(
    capacity: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The test counts look-ups of free space instead of measuring time."""
    lengths = np.random.default_rng(0).lognormal(6.0, 1.3, 1_000_000).astype(np.int64) + 1
    lengths = np.minimum(lengths, capacity)
    calls = 0
    look_up = _OpenBins.least_space

    def count(self: _OpenBins, length: int) -> int | None:
        nonlocal calls
        calls += 1
        return look_up(self, length)

    monkeypatch.setattr(_OpenBins, "least_space", count)
    bins = best_fit(lengths, capacity)
    assert np.bincount(bins, lengths).max() <= capacity
    # Filling a free space as far as possible at least halves it, so this happens only a few times
    # per free space.
    assert calls < np.log2(capacity) * len(np.unique(lengths)) + 20
