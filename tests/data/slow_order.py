"""The order once more, in plain integers and loops, one sample after another: the reference."""

import hashlib
from collections.abc import Mapping, Sequence
from fractions import Fraction

from data.order import BLOCK, OrderStage

MASK = 2**64 - 1


def slow_keys(*parts: str | int) -> list[int]:
    name = "\0".join(["1", *map(str, parts)]).encode()
    digest = hashlib.blake2b(name, digest_size=64, person=b"llamesh-order").digest()
    return [int.from_bytes(digest[i : i + 8], "little") for i in range(0, 64, 8)]


def slow_splitmix64(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) & MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def slow_permute(place: int, n: int, keys: Sequence[int]) -> int:
    if n == 1:
        return 0
    bits = max((n - 1).bit_length(), 6)
    low_bits, high_bits = bits // 2, bits - bits // 2
    while True:
        low, high = place % 2**low_bits, place >> low_bits
        for i in range(0, 8, 2):
            low ^= (slow_splitmix64(high ^ keys[i]) >> 32) % 2**low_bits
            high ^= slow_splitmix64(low ^ keys[i + 1]) >> (64 - high_bits)
        place = (high << low_bits) | low
        if place < n:
            return place


def slow_permute_in_blocks(
    place: int, n: int, block: int, block_keys: Sequence[int], inside_keys: Sequence[int]
) -> int:
    """Walks through the blocks in their order until the one that holds the place."""
    if block >= n:
        return slow_permute(place, n, inside_keys)
    whole, rest = divmod(n, block)
    order = [slow_permute(turn, whole, block_keys) for turn in range(whole)]
    if rest:
        order.insert(block_keys[0] % (whole + 1), whole)
    for number in order:
        size = block if number < whole else rest
        if place < size:
            tweak = slow_splitmix64(number ^ inside_keys[0])
            keys = [key ^ tweak for key in inside_keys]
            return number * block + slow_permute(place, size, keys)
        place -= size
    raise AssertionError("a place beyond the domain")


def slow_quotas(weights: Mapping[str, float]) -> dict[str, int]:
    total = sum((Fraction(w) for w in weights.values()), Fraction(0))
    exact = {name: Fraction(w) * BLOCK / total for name, w in weights.items()}
    found = {name: int(share) for name, share in exact.items()}
    for name in sorted(exact, key=lambda name: (found[name] - exact[name], name)):
        if sum(found.values()) < BLOCK:
            found[name] += 1
    return found


def slow_walk(
    stages: Sequence[OrderStage], seed: int, n_samples: int, block_tokens: int | None = None
) -> list[tuple[str, int, int]]:
    """(source, epoch, window) of every sample from the first on, by counting draws one by one."""
    found = []
    drawn = dict.fromkeys(stages[0].weights, 0)  # of the present length
    epochs_before = dict.fromkeys(stages[0].weights, 0)
    ends = [stage.first_sample for stage in stages[1:]] + [n_samples]
    for place, (stage, end) in enumerate(zip(stages, ends, strict=True)):
        if place and stage.seq_len != stages[place - 1].seq_len:
            for name, n in stages[place - 1].n_windows.items():
                whole, rest = divmod(drawn[name], max(n, 1))
                epochs_before[name] += whole + (rest > 0)
                drawn[name] = 0
        quota = slow_quotas(stage.weights)
        layout = [name for name in sorted(quota) for _ in range(quota[name])]
        marks = (stage.first_sample,) if place else ()
        for sample in range(stage.first_sample, min(end, n_samples)):
            block, spot = divmod(sample - stage.first_sample, BLOCK)
            keys = slow_keys("mixture", seed, block, *marks)
            name = layout[slow_permute(spot, BLOCK, keys)]
            block_windows = max(block_tokens // stage.seq_len, 1) if block_tokens else None
            n = stage.n_windows[name]
            epoch, window = slow_window(
                n, seed, name, epochs_before[name], drawn[name], block_windows
            )
            found.append((name, epoch, window))
            drawn[name] += 1
    return found


def slow_window(
    n: int, seed: int, name: str, epochs_before: int, draw: int, block_windows: int | None
) -> tuple[int, int]:
    """Epoch and window of one draw of a source of n windows."""
    epoch, spot = divmod(draw, n)
    epoch += epochs_before
    inside, block = (slow_keys(kind, seed, name, epoch) for kind in ("window", "block"))
    return epoch, slow_permute_in_blocks(spot, n, block_windows or n, block, inside)
