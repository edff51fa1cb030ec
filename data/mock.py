"""Mock data for throughput runs: token ids and document boundaries by formula.

Both are closed forms of the position: nothing is prepared or read, and the data are unlimited.
Document lengths are the quantiles of a log-normal distribution like that of web pages (FineWeb-Edu:
median 0.6k tokens, mean about 1k), so that document masks have a realistic effect on speed; ids are
skewed towards small ones, as those of text are. There is no text, so there is no tokenizer either.
"""

import hashlib
from functools import lru_cache
from statistics import NormalDist

import numpy as np

from data.dataset import WindowDataset
from data.permutation import MAX_SIZE, permute, round_keys

VERSION = 1  # of the formulas
BLOCK = 2**18  # tokens with the same document lengths, in another order
DOCUMENTS = 256  # of a block
MEDIAN, SIGMA = 600, 1.0  # tokens; standard deviation of the logarithm of the length


class MockDataset(WindowDataset):
    """Unlimited mock data for a vocabulary; used through the sample order like prepared data."""

    def __init__(self, name: str, vocab_size: int, document_mask: bool) -> None:
        self.document_mask = document_mask
        self.train = {name: MockStream("train", vocab_size)}
        self.validation = {name: MockStream("validation", vocab_size)}
        self._vocab_size = vocab_size

    @property
    def hash(self) -> str:
        """SHA-256 over version and vocabulary, which determine the tokens."""
        return hashlib.sha256(f"mock {VERSION} {self._vocab_size}".encode()).hexdigest()

    def tokenizer(self) -> None:
        """Return None: the ids have no text."""


class MockStream:
    """A token sequence of `MAX_SIZE` tokens, read like `data.shards.TokenStream`."""

    n_tokens = MAX_SIZE

    def __init__(self, split: str, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        (self._key,) = round_keys("mock", split)[:1]
        self._keys = round_keys("mock documents", split)

    def n_windows(self, seq_len: int) -> int:
        """Return the number of windows of `seq_len` + 1 tokens at a stride of `seq_len`."""
        return (self.n_tokens - 1) // seq_len

    def window(self, index: int, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
        """Compute a window.

        Returns:
            tokens: (seq_len + 1,) uint32
            starts: (n_documents,) int64, indices in the window at which a document starts
        """
        first, end = index * seq_len, (index + 1) * seq_len + 1
        blocks = range(first // BLOCK, (end - 1) // BLOCK + 1)
        starts = np.concatenate([block * BLOCK + self._starts(block) for block in blocks])
        starts = starts[(starts >= first) & (starts < end)]
        return self._ids(np.arange(first, end, dtype=np.uint64)), starts - first

    def _ids(self, positions: np.ndarray) -> np.ndarray:
        """Return the token at each position, (n,) uint32: splitmix64, raised to the fourth power.

        A uniform u in [0, 1) becomes u⁴ · vocab_size, so the frequency of an id falls with its
        rank to the power of 3/4. Fixed-point arithmetic, equal on every machine.
        """
        mixed = (positions ^ self._key) * np.uint64(0x9E3779B97F4A7C15)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
        half = np.uint64(32)
        fraction = mixed >> half
        for _ in range(2):
            fraction = (fraction * fraction) >> half
        return ((fraction * np.uint64(self._vocab_size)) >> half).astype(np.uint32)

    def _starts(self, block: int) -> np.ndarray:
        """Return the starts of the documents in a block, (DOCUMENTS,) int64 from 0."""
        tweak = np.full(DOCUMENTS, (block * 0x9E3779B97F4A7C15) % 2**64, dtype=np.uint64)
        order = permute(np.arange(DOCUMENTS), DOCUMENTS, self._keys, tweak).astype(np.int64)
        return np.concatenate([[0], np.cumsum(document_lengths()[order])[:-1]])


@lru_cache(1)
def document_lengths() -> np.ndarray:
    """Return the lengths of the documents of a block, ascending, (DOCUMENTS,) int64."""
    normal = NormalDist()
    quantiles = [normal.inv_cdf((i + 0.5) / DOCUMENTS) for i in range(DOCUMENTS)]
    lengths = np.rint(MEDIAN * np.exp(SIGMA * np.array(quantiles))).astype(np.int64)
    lengths[-1] += BLOCK - lengths.sum()  # the longest document takes what is left
    return lengths
