"""Best-fit packing compared with concatenation: padding, cut documents and speed.

    python -m bench.packing

Documents have log-normal lengths (median about 490 tokens, mean 1,000), in shards of 2^26 tokens as
in preparation, on one core. Concatenation cuts a document if a window ends inside it, packing if it
is longer than a window. Packing is timed over 16 shards, from offsets to bins; reading is timed in
batches of 16 windows of 8,192 tokens, in the order of a run, from one shard in the page cache,
alternately packed and concatenated. Claim: tens of millions of documents per minute.
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
    """Run the benchmark and write `bench/results/packing.json`."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    random = np.random.default_rng(0)
    shards = [lengths(random, SHARD_TOKENS) for _ in range(N_SHARDS)]
    results: dict[str, Any] = {f"seq_len_{n}": packed(shards, n) for n in SEQ_LENS}
    write(Path(__file__).stem, results | read_rates())


def lengths(random: np.random.Generator, n_tokens: int) -> np.ndarray:
    """Return document lengths, int64 (documents,), with a sum of about `n_tokens`."""
    sampled = random.lognormal(6.2, 1.2, n_tokens // 500).astype(np.int64) + 2
    return sampled[: np.searchsorted(np.cumsum(sampled), n_tokens)]


def packed(shards: list[np.ndarray], seq_len: int) -> dict[str, Any]:
    """Return fractions of padding and of cut documents, and documents packed per second."""
    capacity = seq_len + 1
    n_documents = sum(map(len, shards))
    rates = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        bins = [pack_documents(np.cumsum(n) - n, int(n.sum()), capacity) for n in shards]
        rates.append(n_documents / (time.perf_counter() - start))
    n_slots = sum(len(each.offsets) - 1 for each in bins) * capacity
    all_lengths = np.concatenate(shards)
    ends = np.cumsum(all_lengths)
    # Windows of the first and of the last target of each document.
    first, last = (ends - all_lengths) // seq_len, (ends - 2) // seq_len
    return {
        "documents": n_documents,
        "documents_per_second": spread(rates),
        "padding_share": 1 - sum(int(each.lengths.sum()) for each in bins) / n_slots,
        "cut_share": sum(each.n_split for each in bins) / n_documents,
        "concatenated_padding_share": 0.0,
        "concatenated_cut_share": float((first != last).mean()),
    }


def read_rates() -> dict[str, Any]:
    """Return tokens per second of the training loader, packed and concatenated."""
    rates: dict[str, list[float]] = {"packed": [], "concatenated": []}
    modes: dict[str, Literal["best_fit"] | None] = {"packed": "best_fit", "concatenated": None}
    with tempfile.TemporaryDirectory() as path:
        folder = Path(path)
        make(folder)
        pack(folder, READ_SEQ_LEN, progress=False)
        for repeat in range(REPEATS + 1):
            for mode, packing in modes.items():
                rate = read(folder, packing)
                if repeat:  # the first round fills the page cache
                    rates[mode].append(rate)
    return {f"read_{mode}_tokens_per_second": spread(values) for mode, values in rates.items()}


def make(folder: Path) -> None:
    """Create a dataset of random tokens."""
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
    """Open the dataset and return tokens per second over all its windows."""
    stages = Stages([Stage(0, 0, 0, READ_SEQ_LEN, BATCH, None, {"text": 1.0})])
    dataset = Dataset.open(folder, packing=packing)
    loader = TrainLoader(dataset, stages, seed=0, rank=0, size=1)
    n_steps = dataset.train["text"].n_windows(READ_SEQ_LEN) // BATCH
    start = time.perf_counter()
    for step in range(n_steps):
        loader.step(step)
    return n_steps * BATCH * READ_SEQ_LEN / (time.perf_counter() - start)


if __name__ == "__main__":
    main()
