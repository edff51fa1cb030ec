"""Permutations: bijective for any size, equal to the reference, statistically a random shuffle."""

from collections import Counter
from itertools import pairwise
from math import factorial, sqrt

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_order import reference_keys, reference_permute, reference_permute_in_blocks

from data.permutation import CHUNK, permute, permute_in_blocks, round_keys

# A random shuffle exceeds six standard deviations in one of 500 million draws. The keys are fixed,
# so the results are deterministic.
SIGMAS = 6
SIZES = [1000, 2**16 - 1, 2**16 + 1, 10**6]


def shuffled(n: int, *parts: str | int) -> np.ndarray:
    return permute(np.arange(n), n, round_keys(*parts)).astype(np.int64)


def in_blocks(positions: np.ndarray, n: int, block: int, *parts: str | int) -> np.ndarray:
    keys = round_keys("b", *parts), round_keys("i", *parts)
    return permute_in_blocks(positions, n, block, *keys).astype(np.int64)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 7, 8, 9, 64, 65, 1000, 4097, 3 * CHUNK + 5])
def test_permutation_is_a_bijection(n: int) -> None:
    for seed in range(3):
        assert sorted(shuffled(n, seed).tolist()) == list(range(n))


@settings(deadline=None, max_examples=50)
@given(n=st.integers(1, 2**40), seed=st.integers(), data=st.data())
def test_permutation_equals_the_reference_for_any_size(
    n: int, seed: int, data: st.DataObject
) -> None:
    positions = data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=5))
    image = permute(np.array(positions), n, round_keys(seed)).tolist()
    assert image == [reference_permute(p, n, reference_keys(seed)) for p in positions]
    assert len(set(image)) == len(set(positions))


def test_positions_permuted_individually_and_as_a_batch_are_equal() -> None:
    """Checked at chunk boundaries; chunks need different numbers of cycle-walking iterations."""
    n = 2**20 + 1
    positions = np.arange(2 * CHUNK + 7) * 29 % n
    batched = permute(positions, n, round_keys(1))
    for i in (0, CHUNK - 1, CHUNK, 2 * CHUNK, 2 * CHUNK + 6):
        assert permute(positions[i : i + 1], n, round_keys(1)) == batched[i]


def test_permutation_rejects_a_size_beyond_its_range() -> None:
    with pytest.raises(ValueError, match="domain"):
        permute(np.array([0]), 2**40 + 1, round_keys(0))


@settings(deadline=None, max_examples=100)
@given(n=st.integers(1, 200), block=st.integers(1, 220), seed=st.integers(0, 99))
def test_block_permutation_is_a_bijection_and_equals_the_reference(
    n: int, block: int, seed: int
) -> None:
    image = in_blocks(np.arange(n), n, block, seed).tolist()
    assert sorted(image) == list(range(n))
    keys = reference_keys("b", seed), reference_keys("i", seed)
    assert image == [reference_permute_in_blocks(p, n, block, *keys) for p in range(n)]


@settings(deadline=None, max_examples=50)
@given(n=st.integers(1, 2**40), block=st.integers(1, 2**30), data=st.data())
def test_block_permutation_of_individual_positions_equals_a_batch_for_any_size(
    n: int, block: int, data: st.DataObject
) -> None:
    positions = data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=5, unique=True))
    image = in_blocks(np.array(positions), n, block, 3)
    assert len(set(image.tolist())) == len(positions) and (image < n).all()
    for position, expected in zip(positions, image.tolist(), strict=True):
        assert in_blocks(np.array([position]), n, block, 3).tolist() == [expected]


def test_block_permutation_completes_a_block_before_the_next() -> None:
    n, block = 10_050, 100
    number = in_blocks(np.arange(n), n, block, 5) // block
    visits = 1 + np.count_nonzero(np.diff(number))
    assert visits == 101  # 100 full blocks and a shorter one, each visited once


# ---------------------------------------------------------------- statistics


def chi_squared(observed: np.ndarray, expected: float) -> float:
    return float(((observed - expected) ** 2 / expected).sum())


def assert_chi_squared(statistic: float, freedom: int) -> None:
    """Check both tails: χ² has mean `freedom` and variance 2 · `freedom`."""
    assert abs(statistic - freedom) < SIGMAS * sqrt(2 * freedom)


def contingency_table(windows: np.ndarray, n: int, cells: int) -> np.ndarray:
    """Count the positions of each region by the region of their window, (cells, cells)."""
    position_cell = np.arange(n) * cells // n
    counts = np.bincount(position_cell * cells + windows * cells // n, minlength=cells * cells)
    return counts.reshape(cells, cells)


@pytest.mark.parametrize("n", SIZES)
def test_regions_of_positions_and_windows_are_independent(n: int) -> None:
    """A table with fixed margins has (cells - 1)² degrees of freedom; summed over ten keys."""
    cells = 10 if n < 10**6 else 100
    statistic = sum(
        chi_squared(contingency_table(shuffled(n, "regions", seed), n, cells), n / cells**2)
        for seed in range(10)
    )
    assert_chi_squared(statistic, 10 * (cells - 1) ** 2)


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("lag", [1, 2, 16, 128])
def test_differences_at_a_lag_are_uniform(n: int, lag: int) -> None:
    """Differences modulo n are uniform over 1 … n-1; summed over ten keys."""
    cells, statistic = 50, 0.0
    for seed in range(10):
        windows = shuffled(n, "lags", seed)
        differences = (windows[lag:] - windows[:-lag]) % n
        counts = np.bincount((differences - 1) * cells // (n - 1), minlength=cells)
        sizes = np.bincount(np.arange(n - 1) * cells // (n - 1), minlength=cells)
        expected = sizes / (n - 1) * len(differences)
        statistic += float(((counts - expected) ** 2 / expected).sum())
    assert_chi_squared(statistic, 10 * (cells - 1))


def test_bounds_reject_an_order_that_is_not_random() -> None:
    """Multiplication modulo n spreads evenly but is not random; both statistics detect it."""
    n = 10**6
    windows = np.arange(n) * 618_033 % n
    assert chi_squared(contingency_table(windows, n, 100), 100) < 99**2 - SIGMAS * sqrt(2 * 99**2)
    differences = np.diff(windows) % n
    assert len(set(differences.tolist())) == 1


def many_permutations(n: int, count: int) -> np.ndarray:
    """Return permutations of 0 … n-1 with random tweaks of the round keys, (count, n)."""
    tweaks = np.random.default_rng(n).integers(0, 2**64, count, dtype=np.uint64)
    positions = np.tile(np.arange(n), (count, 1))
    keys = round_keys("many")
    return permute(positions, n, keys, np.repeat(tweaks, n).reshape(count, n)).astype(np.int64)


@pytest.mark.parametrize("n", [3, 4, 5])
def test_all_permutations_of_few_elements_are_equally_likely(n: int) -> None:
    images = Counter(map(tuple, many_permutations(n, 100 * factorial(n)).tolist()))
    assert len(images) == factorial(n)
    assert_chi_squared(chi_squared(np.array(list(images.values())), 100), factorial(n) - 1)


@pytest.mark.parametrize("n", [6, 7, 8, 9, 16, 33])
def test_images_of_two_positions_are_uniform_over_all_pairs(n: int) -> None:
    """There are n (n - 1) pairs of images, with 20 draws each on average."""
    images = many_permutations(n, 20 * n * (n - 1))
    for one, other in ((0, 1), (n // 2, n - 1), (0, n - 1)):
        counts = np.bincount(images[:, one] * n + images[:, other], minlength=n * n)
        off_diagonal = counts.reshape(n, n)[~np.eye(n, dtype=bool)]
        assert_chi_squared(chi_squared(off_diagonal, 20), len(off_diagonal) - 1)


def test_numbers_of_fixed_points_and_repeated_neighbors_match_chance() -> None:
    """On average there is one fixed point, and one pair of neighbors recurs in the next epoch.

    Both counts are Poisson-distributed with mean 1, so the sum over 400 keys has variance 400.
    """
    n, keys = 1000, 400
    fixed = repeated = 0
    previous = shuffled(n, "epoch", 0)
    for epoch in range(1, keys + 1):
        current = shuffled(n, "epoch", epoch)
        fixed += int((current == np.arange(n)).sum())
        pairs = set(pairwise(previous.tolist()))
        repeated += sum(pair in pairs for pair in pairwise(current.tolist()))
        previous = current
    assert abs(fixed - keys) < SIGMAS * sqrt(keys)
    assert abs(repeated - keys) < SIGMAS * sqrt(keys)


def test_blocks_are_shuffled_and_each_has_an_independent_inner_order() -> None:
    n, block, cells = 10**6, 1000, 10
    windows = in_blocks(np.arange(n), n, block, "two").reshape(-1, block)
    order, inside = windows[:, 0] // block, windows % block
    assert_chi_squared(chi_squared(contingency_table(order, 1000, cells), 10), (cells - 1) ** 2)
    table = sum(contingency_table(row, block, cells) for row in inside)
    # A sum of 1,000 independent tables: the mean count per cell is 1,000 × 10.
    assert_chi_squared(chi_squared(np.asarray(table), 10_000) * 999 / 1000, (cells - 1) ** 2)
    same = sum(int((one == other).sum()) for one, other in pairwise(inside))
    assert abs(same - 999) < SIGMAS * sqrt(999)  # two independent orders agree at one position
