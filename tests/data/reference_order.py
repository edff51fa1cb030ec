"""Reference implementation of the sample order with Python integers and loops."""

import hashlib
from collections.abc import Mapping, Sequence
from fractions import Fraction

from data.order import BLOCK, OrderStage

MASK = 2**64 - 1


def reference_keys(*parts: str | int) -> list[int]:
    name = "\0".join(["1", *map(str, parts)]).encode()
    digest = hashlib.blake2b(name, digest_size=64, person=b"llamesh-order").digest()
    return [int.from_bytes(digest[i : i + 8], "little") for i in range(0, 64, 8)]


def reference_splitmix64(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) & MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def reference_permute(position: int, n: int, keys: Sequence[int]) -> int:
    if n == 1:
        return 0
    bits = max((n - 1).bit_length(), 6)
    low_bits, high_bits = bits // 2, bits - bits // 2
    while True:
        low, high = position % 2**low_bits, position >> low_bits
        for i in range(0, 8, 2):
            low ^= (reference_splitmix64(high ^ keys[i]) >> 32) % 2**low_bits
            high ^= reference_splitmix64(low ^ keys[i + 1]) >> (64 - high_bits)
        position = (high << low_bits) | low
        if position < n:
            return position


def reference_permute_in_blocks(
    position: int, n: int, block: int, block_keys: Sequence[int], inside_keys: Sequence[int]
) -> int:
    """Iterate over the shuffled blocks up to the block that contains the position."""
    if block >= n:
        return reference_permute(position, n, inside_keys)
    n_full, rest = divmod(n, block)
    order = [reference_permute(i, n_full, block_keys) for i in range(n_full)]
    if rest:
        order.insert(block_keys[0] % (n_full + 1), n_full)
    for number in order:
        size = block if number < n_full else rest
        if position < size:
            tweak = reference_splitmix64(number ^ inside_keys[0])
            keys = [key ^ tweak for key in inside_keys]
            return number * block + reference_permute(position, size, keys)
        position -= size
    raise AssertionError("position outside the domain")


def reference_quotas(weights: Mapping[str, float]) -> dict[str, int]:
    total = sum((Fraction(w) for w in weights.values()), Fraction(0))
    exact = {name: Fraction(w) * BLOCK / total for name, w in weights.items()}
    quotas = {name: int(quota) for name, quota in exact.items()}
    for name in sorted(exact, key=lambda name: (quotas[name] - exact[name], name)):
        if sum(quotas.values()) < BLOCK:
            quotas[name] += 1
    return quotas


def reference_walk(
    stages: Sequence[OrderStage], seed: int, n_samples: int, block_tokens: int | None = None
) -> list[tuple[str, int, int]]:
    """Return (source, epoch, window) of each sample by counting draws from the first sample."""
    samples = []
    drawn = dict.fromkeys(stages[0].weights, 0)  # draws at the current sequence length
    epochs_before = dict.fromkeys(stages[0].weights, 0)
    ends = [stage.first_sample for stage in stages[1:]] + [n_samples]
    for index, (stage, end) in enumerate(zip(stages, ends, strict=True)):
        if index and stage.seq_len != stages[index - 1].seq_len:
            for name, n in stages[index - 1].n_windows.items():
                n_epochs, rest = divmod(drawn[name], max(n, 1))
                epochs_before[name] += n_epochs + (rest > 0)
                drawn[name] = 0
        quota = reference_quotas(stage.weights)
        layout = [name for name in sorted(quota) for _ in range(quota[name])]
        key_suffix = (stage.first_sample,) if index else ()
        for sample in range(stage.first_sample, min(end, n_samples)):
            block, position = divmod(sample - stage.first_sample, BLOCK)
            keys = reference_keys("mixture", seed, block, *key_suffix)
            name = layout[reference_permute(position, BLOCK, keys)]
            block_windows = max(block_tokens // stage.seq_len, 1) if block_tokens else None
            n = stage.n_windows[name]
            epoch, window = reference_window(
                n, seed, name, epochs_before[name], drawn[name], block_windows
            )
            samples.append((name, epoch, window))
            drawn[name] += 1
    return samples


def reference_window(
    n: int, seed: int, name: str, epochs_before: int, draw: int, block_windows: int | None
) -> tuple[int, int]:
    """Return epoch and window of one draw from a source of n windows."""
    epoch, position = divmod(draw, n)
    epoch += epochs_before
    inside, block = (reference_keys(kind, seed, name, epoch) for kind in ("window", "block"))
    return epoch, reference_permute_in_blocks(position, n, block_windows or n, block, inside)
