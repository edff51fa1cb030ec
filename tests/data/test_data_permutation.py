"""Permutations: bijections of any size, equal to plain integers, as good as a true shuffle."""

from collections import Counter
from itertools import pairwise
from math import factorial, sqrt

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from slow_order import slow_keys, slow_permute, slow_permute_in_blocks

from data.permutation import CHUNK, permute, permute_in_blocks, round_keys

# A true shuffle stays within six standard deviations but for one draw in 500 million; the keys are
# fixed, so a test that passes once passes always.
SIGMAS = 6
SIZES = [1000, 2**16 - 1, 2**16 + 1, 10**6]


def shuffled(n: int, *parts: str | int) -> np.ndarray:
    return permute(np.arange(n), n, round_keys(*parts)).astype(np.int64)


def in_blocks(places: np.ndarray, n: int, block: int, *parts: str | int) -> np.ndarray:
    keys = round_keys("b", *parts), round_keys("i", *parts)
    return permute_in_blocks(places, n, block, *keys).astype(np.int64)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 7, 8, 9, 64, 65, 1000, 4097, 3 * CHUNK + 5])
def test_permutation_is_a_bijection(n: int) -> None:
    for seed in range(3):
        assert sorted(shuffled(n, seed).tolist()) == list(range(n))


@settings(deadline=None, max_examples=50)
@given(n=st.integers(1, 2**40), seed=st.integers(), data=st.data())
def test_permutation_equals_plain_integers_for_any_size(
    n: int, seed: int, data: st.DataObject
) -> None:
    places = data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=5))
    image = permute(np.array(places), n, round_keys(seed)).tolist()
    assert image == [slow_permute(place, n, slow_keys(seed)) for place in places]
    assert len(set(image)) == len(set(places))


def test_many_places_at_once_are_those_looked_up_alone() -> None:
    """Over the edges of the chunks, and with a walk that the last chunks do not share."""
    n = 2**20 + 1
    places = np.arange(2 * CHUNK + 7) * 29 % n
    together = permute(places, n, round_keys(1))
    for at in (0, CHUNK - 1, CHUNK, 2 * CHUNK, 2 * CHUNK + 6):
        assert permute(places[at : at + 1], n, round_keys(1)) == together[at]


def test_permutation_refuses_a_size_beyond_its_range() -> None:
    with pytest.raises(ValueError, match="domain"):
        permute(np.array([0]), 2**40 + 1, round_keys(0))


@settings(deadline=None, max_examples=100)
@given(n=st.integers(1, 200), block=st.integers(1, 220), seed=st.integers(0, 99))
def test_two_levels_are_a_bijection_and_equal_plain_integers(n: int, block: int, seed: int) -> None:
    image = in_blocks(np.arange(n), n, block, seed).tolist()
    assert sorted(image) == list(range(n))
    keys = slow_keys("b", seed), slow_keys("i", seed)
    assert image == [slow_permute_in_blocks(place, n, block, *keys) for place in range(n)]


@settings(deadline=None, max_examples=50)
@given(n=st.integers(1, 2**40), block=st.integers(1, 2**30), data=st.data())
def test_two_levels_reach_any_position_of_any_size(n: int, block: int, data: st.DataObject) -> None:
    places = data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=5, unique=True))
    image = in_blocks(np.array(places), n, block, 3)
    assert len(set(image.tolist())) == len(places) and (image < n).all()
    for place, found in zip(places, image.tolist(), strict=True):
        assert in_blocks(np.array([place]), n, block, 3).tolist() == [found]


def test_two_levels_finish_a_block_before_they_begin_another() -> None:
    n, block = 10_050, 100
    number = in_blocks(np.arange(n), n, block, 5) // block
    visits = 1 + np.count_nonzero(np.diff(number))
    assert visits == 101  # each of the whole ones, and the shorter one, once


# ---------------------------------------------------------------- as good as a true shuffle


def chi_squared(observed: np.ndarray, expected: float) -> float:
    return float(((observed - expected) ** 2 / expected).sum())


def assert_chi_squared(found: float, freedom: int) -> None:
    """Neither too rough nor too even: χ² has the mean `freedom` and twice that for variance."""
    assert abs(found - freedom) < SIGMAS * sqrt(2 * freedom)


def regional(windows: np.ndarray, n: int, cells: int) -> np.ndarray:
    """How many places of each region land in each region of windows, (cells, cells)."""
    place_cell = np.arange(n) * cells // n
    counts = np.bincount(place_cell * cells + windows * cells // n, minlength=cells * cells)
    return counts.reshape(cells, cells)


@pytest.mark.parametrize("n", SIZES)
def test_places_and_windows_are_independent_region_by_region(n: int) -> None:
    """χ² of a table with fixed margins: (cells - 1)² degrees of freedom, here over ten keys."""
    cells = 10 if n < 10**6 else 100
    found = sum(
        chi_squared(regional(shuffled(n, "regions", seed), n, cells), n / cells**2)
        for seed in range(10)
    )
    assert_chi_squared(found, 10 * (cells - 1) ** 2)


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("lag", [1, 2, 16, 128])
def test_differences_at_a_lag_are_uniform(n: int, lag: int) -> None:
    """A difference modulo n is any of 1 … n-1 with one likelihood; a sum over ten keys."""
    cells, found = 50, 0.0
    for seed in range(10):
        windows = shuffled(n, "lags", seed)
        differences = (windows[lag:] - windows[:-lag]) % n
        counts = np.bincount((differences - 1) * cells // (n - 1), minlength=cells)
        sizes = np.bincount(np.arange(n - 1) * cells // (n - 1), minlength=cells)
        expected = sizes / (n - 1) * len(differences)
        found += float(((counts - expected) ** 2 / expected).sum())
    assert_chi_squared(found, 10 * (cells - 1))


def test_the_bounds_would_see_an_order_that_is_not_a_shuffle() -> None:
    """A multiplication modulo n spreads well and is no shuffle: both statistics say so."""
    n = 10**6
    windows = np.arange(n) * 618_033 % n
    assert chi_squared(regional(windows, n, 100), 100) < 99**2 - SIGMAS * sqrt(2 * 99**2)
    differences = np.diff(windows) % n
    assert len(set(differences.tolist())) == 1


def many(n: int, count: int) -> np.ndarray:
    """Orders of 0 … n-1 under as many tweaks, which enter the network where keys do, (count, n)."""
    tweaks = np.random.default_rng(n).integers(0, 2**64, count, dtype=np.uint64)
    places = np.tile(np.arange(n), (count, 1))
    keys = round_keys("many")
    return permute(places, n, keys, np.repeat(tweaks, n).reshape(count, n)).astype(np.int64)


@pytest.mark.parametrize("n", [3, 4, 5])
def test_all_orders_of_a_few_are_equally_likely(n: int) -> None:
    images = Counter(map(tuple, many(n, 100 * factorial(n)).tolist()))
    assert len(images) == factorial(n)
    assert_chi_squared(chi_squared(np.array(list(images.values())), 100), factorial(n) - 1)


@pytest.mark.parametrize("n", [6, 7, 8, 9, 16, 33])
def test_two_places_of_a_few_go_to_any_two(n: int) -> None:
    """All n (n - 1) pairs of images of two places, 20 draws each on average."""
    images = many(n, 20 * n * (n - 1))
    for one, other in ((0, 1), (n // 2, n - 1), (0, n - 1)):
        counts = np.bincount(images[:, one] * n + images[:, other], minlength=n * n)
        apart = counts.reshape(n, n)[~np.eye(n, dtype=bool)]
        assert_chi_squared(chi_squared(apart, 20), len(apart) - 1)


def test_fixed_points_and_repeated_neighbours_are_as_many_as_chance_makes() -> None:
    """Of n places one stays where it was, and one pair of neighbours comes again in another epoch.

    Both counts are Poisson distributed with mean 1, so the sum over 400 keys has variance 400.
    """
    n, keys = 1000, 400
    fixed = repeated = 0
    before = shuffled(n, "epoch", 0)
    for epoch in range(1, keys + 1):
        now = shuffled(n, "epoch", epoch)
        fixed += int((now == np.arange(n)).sum())
        pairs = set(pairwise(before.tolist()))
        repeated += sum(pair in pairs for pair in pairwise(now.tolist()))
        before = now
    assert abs(fixed - keys) < SIGMAS * sqrt(keys)
    assert abs(repeated - keys) < SIGMAS * sqrt(keys)


def test_blocks_are_shuffled_and_each_inside_by_an_order_of_its_own() -> None:
    n, block, cells = 10**6, 1000, 10
    windows = in_blocks(np.arange(n), n, block, "two").reshape(-1, block)
    order, inside = windows[:, 0] // block, windows % block
    assert_chi_squared(chi_squared(regional(order, 1000, cells), 10), (cells - 1) ** 2)
    table = sum(regional(row, block, cells) for row in inside)
    # A sum of 1,000 independent tables: their mean count is 1,000 × 10 a cell.
    assert_chi_squared(chi_squared(np.asarray(table), 10_000) * 999 / 1000, (cells - 1) ** 2)
    same = sum(int((one == other).sum()) for one, other in pairwise(inside))
    assert abs(same - 999) < SIGMAS * sqrt(999)  # two independent orders agree at one place
