"""The order of samples: a closed form of (seed, sources, position), the same on every mesh.

Global sample n → (mixture block, place in the block) → source and its k-th draw → (epoch, place)
→ window, each by a keyed permutation: nothing is stored, nothing is drawn one after another, any
position is reached at once. Knows numbers of windows, not what is in them.
The order of a run is frozen by `permutation.ALGORITHM_VERSION` and the golden vectors of its test.
"""

from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from data.errors import DataError
from data.permutation import MAX_SIZE, permute, permute_in_blocks, round_keys

BLOCK = 65_536  # samples over which the mixture's weights hold exactly


class OrderStage(NamedTuple):
    """What holds from a sample on: weights and numbers of windows, by source, of the same ones."""

    first_sample: int
    seq_len: int
    weights: Mapping[str, float]
    n_windows: Mapping[str, int]


def quotas(weights: Sequence[tuple[str, float]], key: str = "data.sources.{}.weight") -> list[int]:
    """How many samples of each block come from each (source, weight): largest remainder, exact.

    Ties go to the name that sorts first, so that the listing's order does not matter.

    Raises:
        DataError: a weight rounds to no sample at all, or all are 0; `key` names a weight.
    """
    exact = [Fraction(weight) for _, weight in weights]
    if not sum(exact):
        names = ", ".join(key.format(name) for name, _ in weights)
        raise DataError(f"{names}: every weight is 0: give one source a weight")
    shares = [weight * BLOCK / sum(exact) for weight in exact]
    found = [int(share) for share in shares]
    by_remainder = sorted(
        range(len(shares)), key=lambda i: (found[i] - shares[i], weights[i][0])
    )  # the largest remainder first
    for index in by_remainder[: BLOCK - sum(found)]:
        found[index] += 1
    for (name, weight), quota in zip(weights, found, strict=True):
        if quota == 0 and weight > 0:
            raise DataError(
                f"{key.format(name)} ({weight}) gives the source no sample in {BLOCK}: "
                f"use at least {float(sum(exact)) / BLOCK:.3g}, or 0"
            )
    return found


class _Stage(NamedTuple):
    """A stage with what its sources have drawn before it; arrays are int64 (sources,)."""

    first_sample: int
    quotas: np.ndarray
    n_windows: np.ndarray
    draws_before: np.ndarray  # of windows of this length
    epochs_before: np.ndarray  # begun with windows of other lengths
    layout: np.ndarray  # (BLOCK,) the source of each sample of a block, before it is permuted
    key: tuple[int, ...]  # what tells its mixture from that of other stages
    seq_len: int


class Order:
    """Which window is the n-th sample, over one or several stages that follow each other.

    Each block of 65,536 samples, counted from its stage's first, holds exactly the quota of each
    source, at keyed places. A source's draws are counted in the order of the samples, so each of
    its epochs takes every window once before the next one begins: also through a stage that
    changes weights alone. Another length makes other windows, so each source that was drawn from
    begins its next epoch there. Neither the listing's order nor other sources, nor stages to come,
    change which windows a source draws first, second, … `block_tokens` keeps reads near each other:
    windows are shuffled by blocks of so many tokens and inside of these
    (`permutation.permute_in_blocks`).

    Raises:
        DataError: a weight rounds to nothing, or a source that is drawn from has no window.
    """

    def __init__(
        self, stages: Sequence[OrderStage], seed: int, block_tokens: int | None = None
    ) -> None:
        self.seed = seed
        self.block_tokens = block_tokens
        self.names = list(stages[0].weights)
        self._by_name = sorted(range(len(self.names)), key=self.names.__getitem__)
        self._block: tuple[tuple[int, ...], np.ndarray, np.ndarray] | None = None  # the last one
        self._stages: list[_Stage] = []
        draws = np.zeros(len(self.names), dtype=np.int64)
        epochs = np.zeros_like(draws)
        for place, stage in enumerate(stages):
            if place:
                before = self._stages[-1]
                n_samples = stage.first_sample - before.first_sample
                draws = before.draws_before + self._drawn(before, n_samples)
                if stage.seq_len != stages[place - 1].seq_len:
                    epochs = before.epochs_before - draws // -np.maximum(before.n_windows, 1)
                    draws = np.zeros_like(draws)
            self._stages.append(self._prepared(place, stage, draws, epochs))
        self._firsts = np.array([stage.first_sample for stage in stages], dtype=np.int64)

    def locate(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Where each global sample lies.

        Args:
            samples: int64 (n,), each 0 or more

        Returns:
            source index (into `names`), epoch and window, each int64 (n,)
        """
        samples = np.asarray(samples, dtype=np.int64)
        source, epoch, window = (np.empty_like(samples) for _ in range(3))
        number = np.searchsorted(self._firsts, samples, side="right") - 1
        for index, chosen in _groups(number):
            stage = self._stages[index]
            source[chosen], draw = self._draws(stage, samples[chosen] - stage.first_sample)
            there = source[chosen]
            epoch[chosen], place = np.divmod(draw, stage.n_windows[there])
            epoch[chosen] += stage.epochs_before[there]
            window[chosen] = self._windows(stage, there, epoch[chosen], place)
        return source, epoch, window

    def epochs(self, n_samples: int) -> dict[str, float]:
        """How often the first `n_samples` samples go through each source."""
        through = np.zeros(len(self.names))
        ends = [*self._firsts[1:].tolist(), n_samples]
        for stage, end in zip(self._stages, ends, strict=True):
            drawn = self._drawn(stage, max(min(end, n_samples) - stage.first_sample, 0))
            through += drawn / np.maximum(stage.n_windows, 1)
        return dict(zip(self.names, through.tolist(), strict=True))

    def _prepared(
        self, place: int, stage: OrderStage, draws: np.ndarray, epochs: np.ndarray
    ) -> _Stage:
        """A stage with its quotas, checked."""
        key = f"data.stages[{place - 1}].weights.{{}}" if place else "data.sources.{}.weight"
        quota = np.array(quotas([(name, stage.weights[name]) for name in self.names], key))
        n_windows = np.array([stage.n_windows[name] for name in self.names], dtype=np.int64)
        for name, n, share in zip(self.names, n_windows.tolist(), quota, strict=True):
            if share and not 1 <= n <= MAX_SIZE:
                raise DataError(
                    f"data.sources.{name} has {n} windows of {stage.seq_len} tokens, a source "
                    f"needs 1 to {MAX_SIZE}: add text, or use a shorter train.seq_len"
                )
        layout = np.repeat(self._by_name, quota[self._by_name])
        mixture = (stage.first_sample,) if place else ()
        return _Stage(
            *(stage.first_sample, quota, n_windows, draws, epochs, layout, mixture),
            stage.seq_len,
        )

    def _windows(
        self, stage: _Stage, source: np.ndarray, epoch: np.ndarray, place: np.ndarray
    ) -> np.ndarray:
        """The window at each place of each epoch of each source, int64 (n,)."""
        window = np.empty_like(place)
        for number, chosen in _groups(epoch * len(self.names) + source):
            e, i = divmod(number, len(self.names))
            n, name = int(stage.n_windows[i]), self.names[i]
            keys = round_keys("window", self.seed, name, e)
            if self.block_tokens is None:
                window[chosen] = permute(place[chosen], n, keys)
            else:
                block = max(self.block_tokens // stage.seq_len, 1)
                block_keys = round_keys("block", self.seed, name, e)
                window[chosen] = permute_in_blocks(place[chosen], n, block, block_keys, keys)
        return window

    def _drawn(self, stage: _Stage, n_samples: int) -> np.ndarray:
        """How many of a stage's first samples come from each source, int64 (sources,)."""
        blocks, rest = divmod(n_samples, BLOCK)
        drawn = stage.quotas * blocks
        if rest:
            source, _ = self._mixture(stage, blocks)
            drawn = drawn + np.bincount(source[:rest], minlength=len(self.names))
        return drawn

    def _draws(self, stage: _Stage, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The source of each of a stage's samples, and how many draws of it come before."""
        (drawn_from,) = np.nonzero(stage.quotas)
        if len(drawn_from) == 1:
            only = int(drawn_from[0])
            return np.full_like(samples, only), samples + stage.draws_before[only]
        block, place = np.divmod(samples, BLOCK)
        source, draw = np.empty_like(samples), np.empty_like(samples)
        for number, chosen in _groups(block):
            sources_there, ranks = self._mixture(stage, number)
            source[chosen] = sources_there[place[chosen]]
            before = stage.quotas * number + stage.draws_before  # (sources,)
            draw[chosen] = before[source[chosen]] + ranks[place[chosen]]
        return source, draw

    def _mixture(self, stage: _Stage, block: int) -> tuple[np.ndarray, np.ndarray]:
        """The source at each place of a block and its rank among that source's places, (BLOCK,).

        The rank follows the places, so that a source's epochs do not overlap inside a block; this
        takes the whole block, a constant few milliseconds, and is kept until another one is asked.
        """
        asked = (block, *stage.key)
        kept = self._block  # one look: other threads may put another block there
        if kept is None or kept[0] != asked:
            keys = round_keys("mixture", self.seed, *asked)
            source = stage.layout[permute(np.arange(BLOCK), BLOCK, keys).astype(np.int64)]
            rank = np.empty(BLOCK, dtype=np.int64)
            for _, chosen in _groups(source):
                rank[chosen] = np.arange(BLOCK)[: rank[chosen].size]
            kept = self._block = (asked, source, rank)
        return kept[1], kept[2]


def _groups(numbers: np.ndarray) -> Iterator[tuple[int, slice | np.ndarray]]:
    """Each number that occurs in an int64 (n,), and what selects its places, in their order."""
    if numbers.size == 0:
        return
    low, high = int(numbers.min()), int(numbers.max())
    if low == high:
        yield low, slice(None)
        return
    # Sixteen bits are sorted by counting, ten times as fast as by comparing.
    narrow = (numbers - low).astype(np.uint16) if high - low < 2**16 else numbers
    if (narrow[1:] >= narrow[:-1]).all():
        cuts = [0, *(np.flatnonzero(narrow[1:] != narrow[:-1]) + 1).tolist(), numbers.size]
        for begin, end in pairwise(cuts):
            yield int(numbers[begin]), slice(begin, end)
        return
    by_number = np.argsort(narrow, kind="stable")
    ordered = narrow[by_number]
    for chosen in np.split(by_number, np.flatnonzero(ordered[1:] != ordered[:-1]) + 1):
        yield int(numbers[chosen[0]]), chosen
