"""Best-fit packing beside concatenate-and-cut: padding, cut documents, speed.

    python -m bench.packing

Documents of log-normal lengths (median about 490 tokens, mean 1,000), shard by shard of 2^26 tokens
as in a preparation, on one core. A document is cut by concatenation where a window ends inside it,
by packing where it is longer than a window. Packing is timed over 16 shards, from offsets to
bins; reading in whole batches of 16 windows of 8,192, drawn in the order of a run from one shard in
the page cache, packed and concatenated in turn. The claim: tens of millions of documents a minute.
"""

import os
import tempfile
import time
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from bench.measurement import spread, write
from data.best_fit import pack_documents
from data.dataset import Dataset
from data.loader import TrainLoader
from data.manifest import Manifest, SourceEntry, TokenizerEntry
from data.packing import pack
from data.shards import ShardWriter
from data.stages import Stage, Stages

SHARD_TOKENS, N_SHARDS, REPEATS = 2**26, 16, 7
SEQ_LENS = (2048, 8192, 131_072)
READ_TOKENS, READ_SEQ_LEN, BATCH = 2**25, 8192, 16


def main() -> None:
    """Measures and writes `bench/results/packing.json`."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    random = np.random.default_rng(0)
    shards = [lengths(random, SHARD_TOKENS) for _ in range(N_SHARDS)]
    figures: dict[str, Any] = {f"seq_len_{n}": packed(shards, n) for n in SEQ_LENS}
    write(Path(__file__).stem, figures | read_rates())


def lengths(random: np.random.Generator, n_tokens: int) -> np.ndarray:
    """Lengths of documents, int64 (documents,), of about `n_tokens` together."""
    found = random.lognormal(6.2, 1.2, n_tokens // 500).astype(np.int64) + 2
    return found[: np.searchsorted(np.cumsum(found), n_tokens)]


def packed(shards: list[np.ndarray], seq_len: int) -> dict[str, Any]:
    """Shares of padding and of cut documents both ways, and documents packed a second."""
    capacity = seq_len + 1
    n_documents = sum(map(len, shards))
    rates = []
    for _ in range(REPEATS):
        begin = time.perf_counter()
        bins = [pack_documents(np.cumsum(n) - n, int(n.sum()), capacity) for n in shards]
        rates.append(n_documents / (time.perf_counter() - begin))
    n_slots = sum(len(each.offsets) - 1 for each in bins) * capacity
    all_lengths = np.concatenate(shards)
    ends = np.cumsum(all_lengths)
    # The window of a document's first target, and of its last.
    first, last = (ends - all_lengths) // seq_len, (ends - 2) // seq_len
    return {
        "documents": n_documents,
        "documents_per_second": spread(rates),
        "padding_share": 1 - sum(int(each.lengths.sum()) for each in bins) / n_slots,
        "cut_share": sum(each.n_cut for each in bins) / n_documents,
        "concatenated_padding_share": 0.0,
        "concatenated_cut_share": float((first != last).mean()),
    }


def read_rates() -> dict[str, Any]:
    """Tokens a second through the loader of a run, packed and concatenated in turn."""
    rates: dict[str, list[float]] = {"packed": [], "concatenated": []}
    ways: dict[str, Literal["best_fit"] | None] = {"packed": "best_fit", "concatenated": None}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make(folder)
        pack(folder, READ_SEQ_LEN, progress=False)
        for repeat in range(REPEATS + 1):
            for what, packing in ways.items():
                rate = read(folder, packing)
                if repeat:  # the first fills the page cache
                    rates[what].append(rate)
    return {f"read_{what}_tokens_per_second": spread(found) for what, found in rates.items()}


def make(folder: Path) -> None:
    """A dataset of random tokens."""
    random = np.random.default_rng(0)
    writer = ShardWriter(folder, "text/train-00000-000")
    for length in lengths(random, READ_TOKENS).tolist():
        writer.add(random.integers(0, 128_000, length, dtype=np.uint32))
    shard = writer.close()
    assert shard is not None
    source = SourceEntry("", {}, {"train": [shard], "validation": []})
    tokenizer = TokenizerEntry("none", "", 128_256, 128_000, 128_001)
    Manifest(tokenizer, {}, {"text": source}).write(folder)


def read(folder: Path, packing: Literal["best_fit"] | None) -> float:
    """Tokens a second over as many steps as the windows fill, opened anew."""
    stages = Stages([Stage(0, 0, 0, READ_SEQ_LEN, BATCH, None, {"text": 1.0})])
    dataset = Dataset.open(folder, packing=packing)
    loader = TrainLoader(dataset, stages, seed=0, rank=0, size=1)
    n_steps = dataset.train["text"].n_windows(READ_SEQ_LEN) // BATCH
    begin = time.perf_counter()
    for step in range(n_steps):
        loader.step(step)
    return n_steps * BATCH * READ_SEQ_LEN / (time.perf_counter() - begin)


if __name__ == "__main__":
    main()
