"""The order of samples: a bijection, exact quotas, whole epochs, never another one unknowingly."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.errors import DataError
from data.order import BLOCK, Order, permute, quotas, round_keys

MASK = 2**64 - 1
Sources = Sequence[tuple[str, float, int]]
MIXTURE = [("web", 0.6, 1000), ("code", 0.3, 77), ("books", 0.1, 50)]


# The reference: the same definitions once more, in plain integers, one sample at a time.


def slow_keys(*parts: str | int) -> list[int]:
    name = "\0".join(["1", *map(str, parts)]).encode()
    digest = hashlib.blake2b(name, digest_size=64, person=b"llamesh-order").digest()
    return [int.from_bytes(digest[i : i + 8], "little") for i in range(0, 64, 8)]


def slow_splitmix64(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) & MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def slow_permute(place: int, n: int, keys: list[int]) -> int:
    if n == 1:
        return 0
    bits = (n - 1).bit_length()
    low_bits, high_bits = bits // 2, bits - bits // 2
    while True:
        low, high = place % 2**low_bits, place >> low_bits
        for i in range(0, 8, 2):
            low ^= (slow_splitmix64(high ^ keys[i]) >> 32) % 2**low_bits
            high ^= slow_splitmix64(low ^ keys[i + 1]) >> (64 - high_bits)
        place = (high << low_bits) | low
        if place < n:
            return place


def slow_quotas(weights: Sequence[tuple[str, float]]) -> dict[str, int]:
    total = sum((Fraction(w) for _, w in weights), Fraction(0))
    exact = {name: Fraction(w) * BLOCK / total for name, w in weights}
    found = {name: int(share) for name, share in exact.items()}
    for name in sorted(exact, key=lambda name: (found[name] - exact[name], name)):
        if sum(found.values()) < BLOCK:
            found[name] += 1
    return found


def slow_locate(sample: int, sources: Sources, seed: int) -> tuple[int, int, int]:
    quota = slow_quotas([(name, weight) for name, weight, _ in sources])
    layout = [name for name in sorted(quota) for _ in range(quota[name])]
    block, place = divmod(sample, BLOCK)
    keys = slow_keys("mixture", seed, block)
    name = layout[slow_permute(place, BLOCK, keys)]
    before = range(place if len(sources) > 1 else 0)
    rank = sum(layout[slow_permute(p, BLOCK, keys)] == name for p in before)
    if len(sources) == 1:
        rank = place
    windows = {name: n for name, _, n in sources}[name]
    epoch, spot = divmod(quota[name] * block + rank, windows)
    window = slow_permute(spot, windows, slow_keys("window", seed, name, epoch))
    return [name for name, _, _ in sources].index(name), epoch, window


def located(sources: Sources, seed: int, samples: Sequence[int]) -> list[list[int]]:
    return np.stack(Order(sources, seed).locate(np.array(samples)), axis=1).tolist()


def test_order_equals_the_slow_reference_and_its_frozen_values() -> None:
    samples = [0, 1, 2, 3, 499, BLOCK - 1, BLOCK, BLOCK + 1, 7 * BLOCK + 123, 10**9]
    reference = [list(slow_locate(sample, MIXTURE, 42)) for sample in samples]
    assert located(MIXTURE, 42, samples) == reference
    # Frozen: a change of these is a change of every run's order. Then raise ALGORITHM_VERSION.
    assert reference == FROZEN_MIXTURE
    single = [list(slow_locate(sample, [("stdlib", 1.0, 13_345)], 0)) for sample in samples]
    assert located([("stdlib", 1.0, 13_345)], 0, samples) == single == FROZEN_SINGLE


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 7, 8, 9, 64, 65, 1000, 4097])
def test_permutation_is_a_bijection(n: int) -> None:
    for seed in range(5):
        image = permute(np.arange(n), n, round_keys(seed))
        assert sorted(image.tolist()) == list(range(n))


@settings(deadline=None, max_examples=50)
@given(n=st.integers(1, 2**40), seed=st.integers(), data=st.data())
def test_permutation_equals_plain_integers_for_any_size(
    n: int, seed: int, data: st.DataObject
) -> None:
    places = data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=5))
    image = permute(np.array(places), n, round_keys(seed)).tolist()
    assert image == [slow_permute(place, n, slow_keys(seed)) for place in places]
    assert len(set(image)) == len(set(places))


def test_permutation_refuses_a_size_beyond_its_range() -> None:
    with pytest.raises(ValueError, match="domain"):
        permute(np.array([0]), 2**40 + 1, round_keys(0))


def test_small_permutations_are_all_about_equally_likely() -> None:
    images = [tuple(permute(np.arange(4), 4, round_keys("fair", i)).tolist()) for i in range(2400)]
    counts = Counter(images)
    assert len(counts) == 24
    # Expected 100 each, standard deviation 10: six of them leave a true shuffle in peace.
    assert all(abs(count - 100) < 60 for count in counts.values())


@settings(deadline=None, max_examples=20)
@given(
    weights=st.lists(st.floats(0.01, 10), min_size=1, max_size=6),
    block=st.integers(0, 1000),
    seed=st.integers(0, 2**32),
)
def test_each_block_holds_exactly_the_quotas(weights: list[float], block: int, seed: int) -> None:
    sources = [(f"s{i}", weight, 5000 + i) for i, weight in enumerate(weights)]
    order = Order(sources, seed)
    source, _, _ = order.locate(np.arange(block * BLOCK, (block + 1) * BLOCK))
    assert np.bincount(source, minlength=len(weights)).tolist() == order.quotas.tolist()
    reference = slow_quotas([(name, weight) for name, weight, _ in sources])
    assert order.quotas.tolist() == [reference[name] for name, _, _ in sources]
    assert order.quotas.sum() == BLOCK


def test_each_source_gives_each_window_once_before_any_twice_across_blocks() -> None:
    source, epoch, window = Order(MIXTURE, 3).locate(np.arange(BLOCK + 9999))
    for index, (_, _, n_windows) in enumerate(MIXTURE):
        drawn, of_epoch = window[source == index], epoch[source == index]
        assert (np.diff(of_epoch) >= 0).all()
        whole = len(drawn) // n_windows
        rows = np.sort(drawn[: whole * n_windows].reshape(whole, n_windows), axis=1)
        assert (rows == np.arange(n_windows)).all()


def test_epochs_blocks_seeds_and_source_names_each_change_the_order() -> None:
    def first_epoch(name: str, seed: int, begin: int = 0) -> list[int]:
        return Order([(name, 1.0, 1000)], seed).locate(np.arange(begin, begin + 1000))[2].tolist()

    runs = [first_epoch("a", 0), first_epoch("a", 1), first_epoch("b", 0)]
    runs += [first_epoch("a", 0, 1000), first_epoch("a", 0, 2000), list(range(1000))]
    for i, one in enumerate(runs):
        for other in runs[:i]:
            # Two independent orders agree at about one place of all.
            assert sum(x == y for x, y in zip(one, other, strict=True)) < 10
    source = Order(MIXTURE, 0).locate(np.r_[0:999, BLOCK : BLOCK + 999])[0]
    assert (source[:999] != source[999:]).sum() > 99  # of independent ones, about half differ


@settings(deadline=None, max_examples=25)
@given(samples=st.lists(st.integers(0, 4 * BLOCK), min_size=1, max_size=8), seed=st.integers(0, 9))
def test_a_sample_is_the_same_looked_up_alone_or_with_others(samples: list[int], seed: int) -> None:
    together = located(MIXTURE, seed, samples)
    assert together == [located(MIXTURE, seed, [sample])[0] for sample in samples]


def test_listing_order_of_the_sources_does_not_matter() -> None:
    samples = np.arange(5000)
    names = np.array([name for name, _, _ in MIXTURE])
    source, epoch, window = Order(MIXTURE, 5).locate(samples)
    source_, epoch_, window_ = Order(MIXTURE[::-1], 5).locate(samples)
    assert (names[source] == names[::-1][source_]).all()
    assert (epoch == epoch_).all()
    assert (window == window_).all()


def test_epochs_counts_what_locate_draws() -> None:
    order, n_samples = Order(MIXTURE, 1), BLOCK + 4321
    source, _, _ = order.locate(np.arange(n_samples))
    expected = {
        name: (source == i).sum() / n_windows for i, (name, _, n_windows) in enumerate(MIXTURE)
    }
    assert order.epochs(n_samples) == expected


def test_a_weight_that_rounds_to_nothing_and_a_source_without_window_are_refused() -> None:
    with pytest.raises(DataError, match=r"data\.sources\.b\.weight \(1e-06\).*use at least"):
        quotas([("a", 1.0), ("b", 1e-6)])
    with pytest.raises(DataError, match="has 0 windows"):
        Order([("a", 1.0, 0)], 0)


FROZEN_MIXTURE = [
    [0, 0, 570],
    [0, 0, 2],
    [2, 0, 44],
    [0, 0, 407],
    [0, 0, 318],
    [1, 255, 10],
    [0, 39, 923],
    [0, 39, 571],
    [1, 1787, 75],
    [1, 3896142, 62],
]
FROZEN_SINGLE = [
    [0, 0, 1092],
    [0, 0, 2683],
    [0, 0, 9931],
    [0, 0, 2347],
    [0, 0, 7981],
    [0, 4, 119],
    [0, 4, 326],
    [0, 4, 11522],
    [0, 34, 1254],
    [0, 74934, 1508],
]
