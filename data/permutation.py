"""Keyed permutations of 0 … n-1 in closed form, for any n, elementwise and in no memory.

An alternating unbalanced Feistel network over ⌈log₂ n⌉ bits with splitmix64 as the round function;
what lands at or above n walks on along its cycle. Integers alone, so every machine agrees.
"""

import hashlib

import numpy as np

ALGORITHM_VERSION = 1
MAX_SIZE = 2**40
N_ROUNDS = 8  # of the Feistel network, four a half
MIN_BITS = 6  # of the network: over fewer its orders are not equally likely
CHUNK = 1 << 14  # elements worked on at a time: the scratch of four arrays stays in the cache


def round_keys(*parts: str | int) -> np.ndarray:
    """The keys of one permutation, hashed from the algorithm's version and `parts`.

    Hashed and never summed, so that (seed 1, epoch 2) and (seed 2, epoch 1) share nothing.

    Returns:
        uint64 (N_ROUNDS,)
    """
    name = "\0".join(str(part) for part in (ALGORITHM_VERSION, *parts))
    digest = hashlib.blake2b(name.encode(), digest_size=8 * N_ROUNDS, person=b"llamesh-order")
    return np.frombuffer(digest.digest(), dtype="<u8").astype(np.uint64)


def permute(
    places: np.ndarray, n: int, keys: np.ndarray, tweak: np.ndarray | None = None
) -> np.ndarray:
    """The image of each place under the keyed permutation of 0 … n-1.

    Black and Rogaway, "Ciphers with arbitrary finite domains", 2002. From n = 33 on the walk
    along a cycle takes fewer than two steps on average.

    Args:
        places: integers (any shape), each in [0, n)
        n: size of the domain, 1 to 2**40
        keys: `round_keys(…)`
        tweak: uint64, the shape of `places`: elements of another tweak take another permutation;
            must be spread like a hash, for it is mixed into every key as it is

    Returns:
        uint64, the shape of `places`
    """
    if not 1 <= n <= MAX_SIZE:
        raise ValueError(f"the domain of a permutation ({n}) is not in 1 … {MAX_SIZE}")
    image = np.array(places, dtype=np.uint64)  # a copy: what follows writes into it
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
    places: np.ndarray, n: int, block: int, block_keys: np.ndarray, inside_keys: np.ndarray
) -> np.ndarray:
    """The image of each place under a two-level permutation of 0 … n-1, for reads near each other.

    The domain is cut into blocks of `block` neighbours. Blocks come in a keyed order, one after
    another, and inside each its places are permuted under keys of its own. The shorter last block
    comes at a keyed place among the others. So `block` images in a row are neighbours: as a
    shuffle this is as good as a plain one between blocks, and says nothing within one.

    Args:
        places: integers (any shape), each in [0, n)
        n: size of the domain
        block: places in a block; from n on it is the plain permutation under `inside_keys`
        block_keys: `round_keys(…)` for the order of the blocks
        inside_keys: `round_keys(…)` for the order inside of them

    Returns:
        uint64, the shape of `places`
    """
    if block >= n:
        return permute(places, n, inside_keys)
    whole, rest = divmod(n, block)
    place = np.asarray(places, dtype=np.int64)
    last_begins = int(block_keys[0]) % (whole + 1) * block if rest else n
    in_last = (place >= last_begins) & (place < last_begins + rest)
    other = np.where(place < last_begins, place, place - rest)
    turn, inside = np.divmod(np.where(in_last, 0, other), block)
    inside = np.where(in_last, place - last_begins, inside)
    number = np.where(in_last, np.uint64(whole), permute(turn, whole, block_keys))
    tweak = _splitmix64(number ^ inside_keys[0])
    image = permute(np.where(in_last, 0, inside), block, inside_keys, tweak)
    if in_last.any():
        image[in_last] = permute(inside[in_last], rest, inside_keys, tweak[in_last])
    return number * np.uint64(block) + image


def _feistel(values: np.ndarray, bits: int, keys: np.ndarray, tweaks: np.ndarray | None) -> None:
    """One pass of the network over `bits` bits, in place; rounds replace the two halves in turn."""
    low_bits, high_bits = np.uint64(bits // 2), np.uint64(bits - bits // 2)
    low_mask = (np.uint64(1) << low_bits) - np.uint64(1)
    buffers = np.empty((4, min(CHUNK, values.size)), dtype=np.uint64)
    for begin in range(0, values.size, CHUNK):
        chunk = values[begin : begin + CHUNK]
        low, high, mixed, scratch = buffers[:, : chunk.size]
        tweak = None if tweaks is None else tweaks[begin : begin + CHUNK]
        np.bitwise_and(chunk, low_mask, out=low)
        np.right_shift(chunk, low_bits, out=high)
        for index in range(0, N_ROUNDS, 2):
            # Top bits: the low ones of a multiplicative hash are its weakest.
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
    half: np.ndarray,
    key: np.uint64,
    tweak: np.ndarray | None,
    out: np.ndarray,
    scratch: np.ndarray,
) -> None:
    """splitmix64 of a half under a key, into `out`; all (elements,) uint64."""
    np.bitwise_xor(half, key, out=out)
    if tweak is not None:
        np.bitwise_xor(out, tweak, out=out)
    _splitmix64_into(out, scratch)


def _splitmix64(values: np.ndarray) -> np.ndarray:
    """The output function of splitmix64 (Steele, Lea and Flood, OOPSLA 2014), elementwise."""
    mixed = values.astype(np.uint64)
    _splitmix64_into(mixed, np.empty_like(mixed))
    return mixed


def _splitmix64_into(values: np.ndarray, scratch: np.ndarray) -> None:
    """`_splitmix64` in place, without a temporary array."""
    np.add(values, np.uint64(0x9E3779B97F4A7C15), out=values)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        np.right_shift(values, np.uint64(shift), out=scratch)
        np.bitwise_xor(values, scratch, out=values)
        np.multiply(values, np.uint64(factor), out=values)
    np.right_shift(values, np.uint64(31), out=scratch)
    np.bitwise_xor(values, scratch, out=values)
