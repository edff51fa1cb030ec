"""The order of training samples: a closed form of seed, sources and sample index.

Global sample index → (mixture block, index in the block) → source and its k-th draw →
(epoch, index) → window. Each step is a keyed permutation, so no list is stored, any position is
reached in constant time and every mesh gets the same order. Depends only on the number of windows
per source, not on their content. The order is frozen by `permutation.ALGORITHM_VERSION` and golden
vectors in the tests.
"""

from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from data.errors import DataError
from data.permutation import MAX_SIZE, permute, permute_in_blocks, round_keys

BLOCK = 65_536  # samples in a mixture block; each block has exactly the `quotas` of the weights


class OrderStage(NamedTuple):
    """Weights and window counts from `first_sample` on; both dicts have the same source names."""

    first_sample: int
    seq_len: int
    weights: Mapping[str, float]
    n_windows: Mapping[str, int]


def quotas(weights: Mapping[str, float], key: str = "data.sources.{}.weight") -> list[int]:
    """Return the number of samples per block for each source.

    Weights are rounded to whole samples by the largest-remainder method in exact arithmetic. Ties
    go to the alphabetically first name, so the order of the sources does not matter.

    Args:
        key: Format string for the configuration key of a source's weight, used in messages.

    Raises:
        DataError: A positive weight rounds to zero samples, or all weights are 0.
    """
    names, total = list(weights), sum(map(Fraction, weights.values()))
    if not total:
        keys = ", ".join(map(key.format, names))
        raise DataError(f"{keys}: every weight is 0; give one source a positive weight")
    exact = {name: Fraction(weight) * BLOCK / total for name, weight in weights.items()}
    found = {name: int(share) for name, share in exact.items()}
    by_remainder = sorted(names, key=lambda name: (found[name] - exact[name], name))
    for name in by_remainder[: BLOCK - sum(found.values())]:  # the largest remainders
        found[name] += 1
    for name, weight in weights.items():
        if found[name] == 0 and weight > 0:
            raise DataError(
                f"{key.format(name)}={weight} gives the source no sample in {BLOCK}; "
                f"use at least {float(total) / BLOCK:.3g}, or 0"
            )
    return list(found.values())


class _Stage(NamedTuple):
    """A stage and the draws before it; arrays are (n_sources,) int64 unless noted."""

    first_sample: int
    seq_len: int
    quotas: np.ndarray
    n_windows: np.ndarray
    draws_before: np.ndarray  # of windows of this length
    epochs_before: np.ndarray  # started with windows of other lengths
    layout: np.ndarray  # (BLOCK,) source of each sample in a block before permutation
    key: tuple[int, ...]  # distinguishes the mixture permutations of stages


class Order:
    """Map global sample indices to windows, over one or more consecutive stages.

    Each block of 65,536 samples, counted from the start of its stage, contains exactly the quota of
    each source at keyed positions. The draws of a source are counted in sample order, and each
    epoch takes every window once before the next epoch starts, including across stages that change
    only weights. A new sequence length makes new windows, so each source drawn before starts its
    next epoch there. Neither the order of the configuration, other sources nor later stages affect
    which windows a source draws first, second and so on.

    Args:
        block_tokens: Shuffle windows by blocks of this many tokens and inside each block
            (`permutation.permute_in_blocks`), which keeps reads close together.

    Raises:
        DataError: A weight rounds to zero samples, or a source with samples has no window.
    """

    def __init__(
        self, stages: Sequence[OrderStage], seed: int, block_tokens: int | None = None
    ) -> None:
        self.seed, self.block_tokens = seed, block_tokens
        self.names = list(stages[0].weights)
        by_name = sorted(range(len(self.names)), key=self.names.__getitem__)
        self._last_block: tuple[tuple[int, ...], np.ndarray, np.ndarray] | None = None
        self._stages: list[_Stage] = []
        draws = epochs = np.zeros(len(self.names), dtype=np.int64)
        for index, stage in enumerate(stages):
            key = f"data.stages[{index - 1}].weights.{{}}" if index else "data.sources.{}.weight"
            quota = np.array(quotas({name: stage.weights[name] for name in self.names}, key))
            n_windows = np.array([stage.n_windows[name] for name in self.names], dtype=np.int64)
            for name, count, n_samples in zip(self.names, n_windows.tolist(), quota, strict=True):
                if n_samples and not 1 <= count <= MAX_SIZE:
                    raise DataError(
                        f"data.sources.{name} has {count} windows of {stage.seq_len} tokens, but a "
                        f"source needs 1 to {MAX_SIZE}; add text or use a shorter train.seq_len"
                    )
            if index:
                previous = self._stages[-1]
                n_before = stage.first_sample - previous.first_sample
                draws = draws + self._count_draws(previous, n_before)
                if stage.seq_len != previous.seq_len:
                    epochs = epochs - draws // -np.maximum(previous.n_windows, 1)
                    draws = np.zeros_like(draws)
            layout = np.repeat(by_name, quota[by_name])
            first, seq_len = stage.first_sample, stage.seq_len
            stage_key = (first,) if index else ()
            self._stages.append(
                _Stage(first, seq_len, quota, n_windows, draws, epochs, layout, stage_key)
            )
        self._first_samples = np.array([stage.first_sample for stage in stages], dtype=np.int64)

    def locate(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return source, epoch and window of each global sample.

        Args:
            samples: (n,) int64, each at least 0

        Returns:
            source index (into `names`), epoch and window, each (n,) int64
        """
        samples = np.asarray(samples, dtype=np.int64)
        source, epoch, window = (np.empty_like(samples) for _ in range(3))
        stage_index = np.searchsorted(self._first_samples, samples, side="right") - 1
        for index, selected in _groups(stage_index):
            stage = self._stages[index]
            drawn, draw = self._draws(stage, samples[selected] - stage.first_sample)
            epochs, offset = np.divmod(draw, stage.n_windows[drawn])
            epochs += stage.epochs_before[drawn]
            source[selected], epoch[selected] = drawn, epochs
            window[selected] = self._windows(stage, drawn, epochs, offset)
        return source, epoch, window

    def epochs(self, n_samples: int) -> dict[str, float]:
        """Return how many epochs of each source the first `n_samples` samples take."""
        total = np.zeros(len(self.names))
        ends = [*self._first_samples[1:].tolist(), n_samples]
        for stage, end in zip(self._stages, ends, strict=True):
            draws = self._count_draws(stage, max(min(end, n_samples) - stage.first_sample, 0))
            total += draws / np.maximum(stage.n_windows, 1)
        return dict(zip(self.names, total.tolist(), strict=True))

    def _windows(
        self, stage: _Stage, source: np.ndarray, epoch: np.ndarray, offset: np.ndarray
    ) -> np.ndarray:
        """Return the window at each offset of each epoch of each source, (n,) int64."""
        window = np.empty_like(offset)
        for group, selected in _groups(epoch * len(self.names) + source):
            epoch_index, source_index = divmod(group, len(self.names))
            name = self.names[source_index]
            n_windows = int(stage.n_windows[source_index])
            # Blocks of n_windows or more are the plain permutation.
            block = n_windows if self.block_tokens is None else self.block_tokens // stage.seq_len
            block_keys = round_keys("block", self.seed, name, epoch_index)
            inside_keys = round_keys("window", self.seed, name, epoch_index)
            window[selected] = permute_in_blocks(
                offset[selected], n_windows, max(block, 1), block_keys, inside_keys
            )
        return window

    def _count_draws(self, stage: _Stage, n_samples: int) -> np.ndarray:
        """Return the draws per source in the first samples of a stage, (n_sources,) int64."""
        n_blocks, remainder = divmod(n_samples, BLOCK)
        draws = stage.quotas * n_blocks
        if remainder:
            source, _ = self._mixture(stage, n_blocks)
            draws = draws + np.bincount(source[:remainder], minlength=len(self.names))
        return draws

    def _draws(self, stage: _Stage, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the source of each sample of a stage, and the number of its earlier draws."""
        (used,) = np.nonzero(stage.quotas)
        if len(used) == 1:
            only = int(used[0])
            return np.full_like(samples, only), samples + stage.draws_before[only]
        block, offset = np.divmod(samples, BLOCK)
        source, draw = np.empty_like(samples), np.empty_like(samples)
        for number, selected in _groups(block):
            block_sources, ranks = self._mixture(stage, number)
            source[selected] = block_sources[offset[selected]]
            before = stage.quotas * number + stage.draws_before  # (n_sources,)
            draw[selected] = before[source[selected]] + ranks[offset[selected]]
        return source, draw

    def _mixture(self, stage: _Stage, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Return each sample's source in a block and its rank within that source, each (BLOCK,).

        Ranks increase with the sample index, so the epochs of a source do not overlap inside a
        block. Computing a block takes a few milliseconds; the last one is cached.
        """
        block_key = (block, *stage.key)
        cached = self._last_block  # read once: other threads may replace it
        if cached is None or cached[0] != block_key:
            keys = round_keys("mixture", self.seed, *block_key)
            source = stage.layout[permute(np.arange(BLOCK), BLOCK, keys).astype(np.int64)]
            rank = np.empty(BLOCK, dtype=np.int64)
            for _, selected in _groups(source):
                rank[selected] = np.arange(BLOCK)[: rank[selected].size]
            cached = self._last_block = (block_key, source, rank)
        return cached[1], cached[2]


def _groups(numbers: np.ndarray) -> Iterator[tuple[int, slice | np.ndarray]]:
    """Yield each distinct value of an (n,) int64 and the selection of its indices, ascending."""
    if numbers.size == 0:
        return
    low, high = int(numbers.min()), int(numbers.max())
    if low == high:
        yield low, slice(None)
        return
    # numpy sorts 16-bit integers by radix sort, ten times as fast as by comparison.
    narrow = (numbers - low).astype(np.uint16) if high - low < 2**16 else numbers
    if (narrow[1:] >= narrow[:-1]).all():
        cuts = [0, *(np.flatnonzero(narrow[1:] != narrow[:-1]) + 1).tolist(), numbers.size]
        for start, end in pairwise(cuts):
            yield int(numbers[start]), slice(start, end)
        return
    by_number = np.argsort(narrow, kind="stable")
    ordered = narrow[by_number]
    for selected in np.split(by_number, np.flatnonzero(ordered[1:] != ordered[:-1]) + 1):
        yield int(numbers[selected[0]]), selected
