"""Keyed pseudorandom permutations of 0 … n-1 for any n, elementwise and without storage.

An alternating unbalanced Feistel network over ⌈log₂ n⌉ bits with splitmix64 as the round function;
results outside the domain are permuted again (cycle walking). Integer arithmetic only, so every
machine computes the same values.
"""

import hashlib

import numpy as np

ALGORITHM_VERSION = 1
MAX_SIZE = 2**40
N_ROUNDS = 8  # Feistel rounds, four per half
MIN_BITS = 6  # with fewer bits the permutations are not equally likely
CHUNK = 1 << 14  # elements per chunk, so that the four scratch arrays fit in the cache


def round_keys(*parts: str | int) -> np.ndarray:
    """Return the keys of one permutation, a hash of the algorithm version and `parts`.

    Hashing instead of adding makes (seed 1, epoch 2) independent of (seed 2, epoch 1).

    Returns:
        (N_ROUNDS,) uint64
    """
    name = "\0".join(str(part) for part in (ALGORITHM_VERSION, *parts))
    digest = hashlib.blake2b(name.encode(), digest_size=8 * N_ROUNDS, person=b"llamesh-order")
    return np.frombuffer(digest.digest(), dtype="<u8").astype(np.uint64)


def permute(
    indices: np.ndarray, n: int, keys: np.ndarray, tweak: np.ndarray | None = None
) -> np.ndarray:
    """Apply the keyed permutation of 0 … n-1 to each index.

    Black and Rogaway, "Ciphers with arbitrary finite domains", 2002. For n >= 33, cycle walking
    takes fewer than two passes on average.

    Args:
        indices: integers of any shape, each in [0, n)
        n: domain size, 1 to 2**40
        keys: `round_keys(…)`
        tweak: uint64, same shape as `indices`: elements with different tweaks use different
            permutations; must be hash-like, because it is XORed into every key

    Returns:
        uint64, same shape as `indices`
    """
    if not 1 <= n <= MAX_SIZE:
        raise ValueError(f"n={n} is not a valid permutation domain; use 1 … {MAX_SIZE}")
    image = np.array(indices, dtype=np.uint64)  # a copy, modified in place below
    if n == 1:
        return image
    bits = max((n - 1).bit_length(), MIN_BITS)
    flat = image.reshape(-1)
    tweaks = None if tweak is None else tweak.reshape(-1)
    _feistel(flat, bits, keys, tweaks)
    walking = np.flatnonzero(flat >= n)
    while walking.size:
        values = flat[walking]
        _feistel(values, bits, keys, None if tweaks is None else tweaks[walking])
        flat[walking] = values
        walking = walking[values >= n]
    return image


def permute_in_blocks(
    indices: np.ndarray, n: int, block: int, block_keys: np.ndarray, inside_keys: np.ndarray
) -> np.ndarray:
    """Apply a two-level permutation of 0 … n-1 that preserves locality.

    The domain is divided into blocks of `block` consecutive values. Blocks are visited in a keyed
    order, one after another, and each block is permuted internally under its own keys. The shorter
    last block is visited at a keyed position. So `block` consecutive images are neighbours: blocks
    are shuffled as well as by `permute`, but samples mix only within a block.

    Args:
        indices: integers of any shape, each in [0, n)
        n: domain size
        block: block size; if at least n, this is the plain permutation under `inside_keys`
        block_keys: `round_keys(…)` for the order of the blocks
        inside_keys: `round_keys(…)` for the order inside blocks

    Returns:
        uint64, same shape as `indices`
    """
    if block >= n:
        return permute(indices, n, inside_keys)
    n_full, remainder = divmod(n, block)
    index = np.asarray(indices, dtype=np.int64)
    last_start = int(block_keys[0]) % (n_full + 1) * block if remainder else n
    in_last = (index >= last_start) & (index < last_start + remainder)
    other = np.where(index < last_start, index, index - remainder)
    turn, inside = np.divmod(np.where(in_last, 0, other), block)
    inside = np.where(in_last, index - last_start, inside)
    number = np.where(in_last, np.uint64(n_full), permute(turn, n_full, block_keys))
    tweak = number ^ inside_keys[0]
    _splitmix64(tweak, np.empty_like(tweak))
    image = permute(np.where(in_last, 0, inside), block, inside_keys, tweak)
    if in_last.any():
        image[in_last] = permute(inside[in_last], remainder, inside_keys, tweak[in_last])
    return number * np.uint64(block) + image


def _feistel(values: np.ndarray, bits: int, keys: np.ndarray, tweaks: np.ndarray | None) -> None:
    """Run one pass of the network in place; rounds replace the two halves alternately."""
    low_bits, high_bits = np.uint64(bits // 2), np.uint64(bits - bits // 2)
    low_mask = (np.uint64(1) << low_bits) - np.uint64(1)
    buffers = np.empty((4, min(CHUNK, values.size)), dtype=np.uint64)
    for start in range(0, values.size, CHUNK):
        chunk = values[start : start + CHUNK]
        low, high, mixed, scratch = buffers[:, : chunk.size]
        tweak = None if tweaks is None else tweaks[start : start + CHUNK]
        np.bitwise_and(chunk, low_mask, out=low)
        np.right_shift(chunk, low_bits, out=high)
        for index in range(0, N_ROUNDS, 2):
            # Use the top bits: the low bits of a multiplicative hash are the weakest.
            _mix(high, keys[index], tweak, mixed, scratch)
            np.right_shift(mixed, np.uint64(32), out=mixed)
            np.bitwise_and(mixed, low_mask, out=mixed)
            np.bitwise_xor(low, mixed, out=low)
            _mix(low, keys[index + 1], tweak, mixed, scratch)
            np.right_shift(mixed, np.uint64(64) - high_bits, out=mixed)
            np.bitwise_xor(high, mixed, out=high)
        np.left_shift(high, low_bits, out=high)
        np.bitwise_or(high, low, out=chunk)


def _mix(
    half: np.ndarray, key: np.uint64, tweak: np.ndarray | None, out: np.ndarray, scratch: np.ndarray
) -> None:
    """Write splitmix64(half ^ key ^ tweak) to `out`; all arrays are (n,) uint64."""
    np.bitwise_xor(half, key, out=out)
    if tweak is not None:
        np.bitwise_xor(out, tweak, out=out)
    _splitmix64(out, scratch)


def _splitmix64(values: np.ndarray, scratch: np.ndarray) -> None:
    """Apply the splitmix64 output function (Steele, Lea and Flood, OOPSLA 2014) in place."""
    np.add(values, np.uint64(0x9E3779B97F4A7C15), out=values)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        np.right_shift(values, np.uint64(shift), out=scratch)
        np.bitwise_xor(values, scratch, out=values)
        np.multiply(values, np.uint64(factor), out=values)
    np.right_shift(values, np.uint64(31), out=scratch)
    np.bitwise_xor(values, scratch, out=values)
