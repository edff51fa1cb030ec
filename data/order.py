"""The order of samples: a closed form of (seed, sources, position), the same on every mesh.

Global sample n → (mixture block, place in the block) → source and its k-th draw → (epoch, place)
→ window, each by a keyed permutation: nothing is stored, nothing is drawn one after another, any
position is reached at once. Knows numbers of windows, not what is in them.
The order of a run is frozen by `ALGORITHM_VERSION` and the golden vectors of its test.
"""

import hashlib
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from data.errors import DataError

ALGORITHM_VERSION = 1
BLOCK = 65_536  # samples over which the mixture's weights hold exactly
MAX_WINDOWS = 2**40
N_ROUNDS = 8  # of the Feistel network; 3 a half would do for large n, small n needs more


def round_keys(*parts: str | int) -> np.ndarray:
    """The keys of one permutation, hashed from the algorithm's version and `parts`.

    Hashed and never summed, so that (seed 1, epoch 2) and (seed 2, epoch 1) share nothing.

    Returns:
        uint64 (N_ROUNDS,)
    """
    name = "\0".join(str(part) for part in (ALGORITHM_VERSION, *parts))
    digest = hashlib.blake2b(name.encode(), digest_size=8 * N_ROUNDS, person=b"llamesh-order")
    return np.frombuffer(digest.digest(), dtype="<u8").astype(np.uint64)


def permute(places: np.ndarray, n: int, keys: np.ndarray) -> np.ndarray:
    """The image of each place under the keyed permutation of 0 … n-1.

    An alternating unbalanced Feistel network over ceil(log2 n) bits (Black and Rogaway, "Ciphers
    with arbitrary finite domains", 2002): what lands at or above n walks on along its cycle until
    it is below, fewer than two steps on average.

    Args:
        places: integers (any shape), each in [0, n)
        n: size of the domain, 1 to 2**40
        keys: `round_keys(…)`

    Returns:
        uint64, the shape of `places`
    """
    if not 1 <= n <= MAX_WINDOWS:
        raise ValueError(f"the domain of a permutation ({n}) is not in 1 … {MAX_WINDOWS}")
    image = np.array(places, dtype=np.uint64)  # a copy: the walk below writes into it
    if n == 1:
        return image
    bits = (n - 1).bit_length()
    flat = image.reshape(-1)
    flat[:] = _feistel(flat, bits, keys)
    walking = np.flatnonzero(flat >= n)
    while walking.size:
        flat[walking] = _feistel(flat[walking], bits, keys)
        walking = walking[flat[walking] >= n]
    return image


def _feistel(values: np.ndarray, bits: int, keys: np.ndarray) -> np.ndarray:
    """One pass of the network over `bits` bits; rounds replace the two halves in turn."""
    low_bits = np.uint64(bits // 2)
    high_bits = np.uint64(bits - bits // 2)
    low_mask = (np.uint64(1) << low_bits) - np.uint64(1)
    low = values & low_mask
    high = values >> low_bits
    for index in range(0, N_ROUNDS, 2):
        # Top bits: the low ones of a multiplicative hash are its weakest. `>> 64` is undefined in
        # C, so a half of no bits (n = 2) is masked instead of shifted away.
        low ^= (_splitmix64(high ^ keys[index]) >> np.uint64(32)) & low_mask
        high ^= _splitmix64(low ^ keys[index + 1]) >> (np.uint64(64) - high_bits)
    return (high << low_bits) | low


def _splitmix64(values: np.ndarray) -> np.ndarray:
    """The output function of splitmix64 (Steele, Lea and Flood, OOPSLA 2014), elementwise."""
    mixed = values + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def quotas(weights: Sequence[tuple[str, float]]) -> list[int]:
    """How many samples of each block come from each (source, weight): largest remainder, exact.

    Ties go to the name that sorts first, so that the listing's order does not matter.

    Raises:
        DataError: a weight rounds to no sample at all.
    """
    exact = [Fraction(weight) for _, weight in weights]
    shares = [weight * BLOCK / sum(exact) for weight in exact]
    found = [int(share) for share in shares]
    by_remainder = sorted(
        range(len(shares)), key=lambda i: (found[i] - shares[i], weights[i][0])
    )  # the largest remainder first
    for index in by_remainder[: BLOCK - sum(found)]:
        found[index] += 1
    for (name, weight), quota in zip(weights, found, strict=True):
        if quota == 0:
            raise DataError(
                f"data.sources.{name}.weight ({weight}) gives the source no sample in {BLOCK}: "
                f"use at least {float(sum(exact)) / BLOCK:.3g}, or remove the source"
            )
    return found


class Order:
    """Which window is the n-th sample, for sources of (name, weight, number of windows).

    Each block of 65,536 samples holds exactly the quota of each source, at keyed places. A source's
    draws are counted in the order of the samples, so each of its epochs takes every window once
    before the next one begins. Neither the listing's order nor other sources change which windows
    a source draws first, second, …

    Raises:
        DataError: a weight rounds to nothing, or a source has no window.
    """

    def __init__(self, sources: Sequence[tuple[str, float, int]], seed: int) -> None:
        self.seed = seed
        self.names = [name for name, _, _ in sources]
        self.n_windows = np.array([n_windows for _, _, n_windows in sources], dtype=np.int64)
        for name, n_windows in zip(self.names, self.n_windows, strict=True):
            if not 1 <= n_windows <= MAX_WINDOWS:
                raise DataError(
                    f"data.sources.{name} has {n_windows} windows, a source needs 1 to "
                    f"{MAX_WINDOWS}: add text, or use a shorter train.seq_len"
                )
        self.quotas = np.array(
            quotas([(name, weight) for name, weight, _ in sources])
        )  # (sources,)
        self._by_name = sorted(range(len(self.names)), key=self.names.__getitem__)
        self._layout = np.repeat(self._by_name, self.quotas[self._by_name])  # (BLOCK,) source
        self._block: tuple[int, np.ndarray, np.ndarray] | None = None  # the last one asked for

    def locate(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Where each global sample lies.

        Args:
            samples: int64 (n,), each 0 or more

        Returns:
            source index, epoch and window, each int64 (n,)
        """
        source, draw = self._draws(np.asarray(samples, dtype=np.int64))
        epoch, place = np.divmod(draw, self.n_windows[source])
        window = np.empty_like(place)
        epoch_of_source = epoch * len(self.names) + source
        by_key = np.argsort(epoch_of_source, kind="stable")
        pairs, first = np.unique(epoch_of_source[by_key], return_index=True)
        for pair, chosen in zip(pairs.tolist(), np.split(by_key, first[1:]), strict=False):
            e, i = divmod(pair, len(self.names))
            keys = round_keys("window", self.seed, self.names[i], e)
            window[chosen] = permute(place[chosen], int(self.n_windows[i]), keys)
        return source, epoch, window

    def epochs(self, n_samples: int) -> dict[str, float]:
        """How often the first `n_samples` samples go through each source."""
        blocks, rest = divmod(n_samples, BLOCK)
        drawn = self.quotas * blocks
        if rest:
            source, _ = self._mixture(blocks)
            drawn = drawn + np.bincount(source[:rest], minlength=len(self.names))
        return dict(zip(self.names, (drawn / self.n_windows).tolist(), strict=True))

    def _draws(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The source of each sample and how many earlier samples came from it, int64 (n,) each."""
        if len(self.names) == 1:
            return np.zeros_like(samples), samples.copy()
        block, place = np.divmod(samples, BLOCK)
        source, draw = np.empty_like(samples), np.empty_like(samples)
        for number in np.unique(block).tolist():
            chosen = block == number
            sources_there, ranks = self._mixture(number)
            source[chosen] = sources_there[place[chosen]]
            draw[chosen] = self.quotas[source[chosen]] * number + ranks[place[chosen]]
        return source, draw

    def _mixture(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """The source at each place of a block and its rank among that source's places, (BLOCK,).

        The rank follows the places, so that a source's epochs do not overlap inside a block; this
        takes the whole block, a constant few milliseconds, and is kept until another one is asked.
        """
        if self._block is not None and self._block[0] == block:
            return self._block[1], self._block[2]
        keys = round_keys("mixture", self.seed, block)
        source = self._layout[permute(np.arange(BLOCK), BLOCK, keys).astype(np.int64)]
        rank = np.empty(BLOCK, dtype=np.int64)
        for index, quota in enumerate(self.quotas.tolist()):
            rank[source == index] = np.arange(quota)
        self._block = (block, source, rank)
        return source, rank
