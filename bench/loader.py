"""Tokens per second read by one process on one core from the page cache.

    python -m bench.loader

Reads windows of 8,192 tokens from 256 MiB of documents with log-normal lengths (median about 660
tokens), each window once, in the order of a run, as batches of 16 with document masks, labels,
positions and batch hash, alternately with and without checksum verification. For comparison, tokens
alone: `datasets` (a memory-mapped Arrow table, `with_format("torch")`, shuffled) and NumPy copying
mapped windows into an int64 batch. Claims: 50 million tokens per second with checksums, which cost
less than 5%.
"""

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import torch

from bench.measurement import spread, write
from data.dataset import Dataset
from data.loader import TrainLoader
from data.manifest import Manifest, Shard, SourceEntry, TokenizerEntry
from data.shards import ShardWriter
from data.stages import Stage, Stages

SEQ_LEN, BATCH, N_TOKENS, REPEATS = 8192, 16, 2**26, 21
STAGES = Stages([Stage(0, 0, 0, SEQ_LEN, BATCH, None, {"text": 1.0})])
STEPS = (N_TOKENS // SEQ_LEN - 1) // BATCH


def main() -> None:
    """Run the benchmark and write `bench/results/loader.json`."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as path:
        folder = Path(path)
        make(folder)
        rates: dict[str, list[float]] = {}
        readers: dict[str, Callable[[], None]] = {
            "verified": lambda: read(folder, verify=True),
            "unverified": lambda: read(folder, verify=False),
            "numpy_copy": lambda: copy(folder),
        }
        table = as_table(folder)
        for repeat in range(REPEATS + 1):
            for name, run in readers.items():
                start = time.perf_counter()
                run()
                rate = STEPS * BATCH * SEQ_LEN / (time.perf_counter() - start)
                if repeat:  # the first round fills the page cache
                    rates.setdefault(name, []).append(rate)
        for _ in range(3):
            start = time.perf_counter()
            steps = min(STEPS, 64)
            read_table(table, steps)
            rate = steps * BATCH * SEQ_LEN / (time.perf_counter() - start)
            rates.setdefault("datasets", []).append(rate)
    costs = [1 - a / b for a, b in zip(rates["verified"], rates["unverified"], strict=True)]
    write(
        Path(__file__).stem,
        {f"{name}_tokens_per_second": spread(values) for name, values in rates.items()}
        | {"share_of_time_for_checksums": spread(costs)},
    )


def make(folder: Path) -> None:
    """Create a dataset of random tokens in documents of log-normal lengths."""
    random = np.random.default_rng(0)
    writer = ShardWriter(folder, "text/train-00000-000")
    while writer.n_tokens < N_TOKENS:
        length = int(random.lognormal(6.5, 1.0)) + 2
        writer.add(random.integers(0, 128_000, length, dtype=np.uint32))
    shard = writer.close()
    assert shard is not None
    shards: dict[str, list[Shard]] = {"train": [shard], "validation": []}
    tokenizer = TokenizerEntry("none", "", 128_256, 128_000, 128_001)
    Manifest(tokenizer, {}, {"text": SourceEntry("", {}, shards)}).write(folder)


def read(folder: Path, verify: bool) -> None:
    """Open the dataset and read every window once through the training loader."""
    loader = TrainLoader(Dataset.open(folder, verify=verify), STAGES, seed=0, rank=0, size=1)
    for step in range(STEPS):
        loader.step(step)


def copy(folder: Path) -> None:
    """Copy the same windows in the same order from a memory map into an int64 batch."""
    dataset = Dataset.open(folder)
    tokens = np.memmap(folder / "text/train-00000-000.tokens", dtype="<u4", mode="r")
    plain = tokens.view(np.ndarray)
    order = dataset.order(STAGES, seed=0)
    batch = np.empty((BATCH, SEQ_LEN + 1), dtype=np.int64)
    for step in range(STEPS):
        _, _, windows = order.locate(np.arange(step * BATCH, (step + 1) * BATCH))
        for row, window in enumerate(windows.tolist()):
            batch[row] = plain[window * SEQ_LEN : (window + 1) * SEQ_LEN + 1]


def as_table(folder: Path) -> datasets.Dataset:
    """Return the same windows as rows of a memory-mapped Arrow file."""
    tokens = np.memmap(folder / "text/train-00000-000.tokens", dtype="<i4", mode="r")
    windows = {"tokens": [tokens[i * SEQ_LEN : (i + 1) * SEQ_LEN] for i in range(64 * BATCH)]}
    datasets.disable_progress_bars()
    table = datasets.Dataset.from_dict(windows)
    table.save_to_disk(str(folder / "arrow"))
    return datasets.load_from_disk(str(folder / "arrow"), keep_in_memory=False)


def read_table(table: datasets.Dataset, steps: int) -> None:
    """Read batches of the table's rows in shuffled order, stacked as int64."""
    order = np.random.default_rng(0).permutation(len(table))
    rows = table.with_format("torch")
    for step in range(steps):
        rows[order[step * BATCH : (step + 1) * BATCH]]["tokens"]


if __name__ == "__main__":
    main()
