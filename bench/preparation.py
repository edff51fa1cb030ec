"""Speed of data preparation compared with raw tiktoken and `datasets.map`, same text and cores.

    python -m bench.preparation

The text is 100 MB of installed Python source as JSON lines; the tokenizer is Llama 3's. Raw
tiktoken encodes text in memory and keeps the result. `datasets.map` encodes a loaded dataset and
writes the ids. Ours is the complete `prepare()` in a separate process: start workers, read, split,
write shards with checksums. They alternate. Claim: at least 90% of raw tiktoken, with memory
independent of the size of the corpus.
"""

import json
import os
import resource
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from functools import cache
from pathlib import Path
from typing import Any

from bench.measurement import spread, write
from data.config import DataConfig, SourceConfig, TokenizerConfig
from data.preparation.pipeline import prepare
from data.tokenizer import Tokenizer, ready_tokenizer

LLAMA3 = TokenizerConfig("llama3", 128_256)
N_CHARACTERS = 100_000_000
ROUNDS = 5
N_CORES = len(os.sched_getaffinity(0))


def main() -> None:
    """Run the benchmark and write `bench/results/preparation.json`.

    With arguments, run one preparation.
    """
    if len(sys.argv) > 1:
        print(json.dumps(ours(Path(sys.argv[1]), Path(sys.argv[2]))))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        texts = write_corpus(folder / "corpus.jsonl")
        n_tokens = sum(map(len, tokenizer().encoding.encode_ordinary_batch(texts)))
        seconds: dict[str, list[float]] = {"ours": [], "raw_tiktoken": [], "datasets_map": []}
        memory: list[dict[str, float]] = []
        for _ in range(ROUNDS):
            seconds["raw_tiktoken"].append(raw_tiktoken(texts))
            command = [sys.executable, "-m", "bench.preparation", str(folder / "corpus.jsonl")]
            command.append(str(folder / "shards"))
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            measured = json.loads(done.stdout)
            seconds["ours"].append(measured.pop("seconds"))
            memory.append(measured)
            seconds["datasets_map"].append(datasets_map(folder / "corpus.jsonl", folder / "cache"))
    ratios = {
        baseline: [
            theirs / own for theirs, own in zip(seconds[baseline], seconds["ours"], strict=True)
        ]
        for baseline in ("raw_tiktoken", "datasets_map")
    }
    results: dict[str, Any] = {
        "characters": sum(map(len, texts)),
        "documents": len(texts),
        "tokens": n_tokens,
        "cores": N_CORES,
    }
    for baseline, each in seconds.items():
        results[f"{baseline}_tokens_per_second"] = spread([n_tokens / second for second in each])
    for baseline, each in ratios.items():
        results[f"ours_over_{baseline}"] = spread(each)
    for key in memory[0]:
        results[f"ours_{key}"] = spread([measured[key] for measured in memory])
    write(Path(__file__).stem, results)


@cache
def tokenizer() -> Tokenizer:
    """Return the Llama 3 tokenizer, loaded once and inherited by forked processes."""
    ready = ready_tokenizer(LLAMA3)
    assert ready is not None
    return ready


def write_corpus(path: Path) -> list[str]:
    """Write installed Python files, one JSON object per line, and return their texts."""
    texts: list[str] = []
    n_characters = 0
    roots = [Path(sysconfig.get_paths()[key]) for key in ("purelib", "stdlib")]
    for file in (file for root in roots for file in sorted(root.rglob("*.py"))):
        text = file.read_text(encoding="utf-8", errors="replace").replace("\0", "")
        if text and n_characters < N_CHARACTERS:
            texts.append(text)
            n_characters += len(text)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return texts


def raw_tiktoken(texts: list[str]) -> float:
    """Return the seconds of tiktoken on all cores."""
    start = time.perf_counter()
    tokenizer().encoding.encode_ordinary_batch(texts, num_threads=N_CORES)
    return time.perf_counter() - start


def datasets_map(corpus: Path, cache_folder: Path) -> float:
    """Return the seconds of `datasets.map` on all cores, without loading the dataset."""
    import datasets

    datasets.disable_progress_bars()
    loaded = datasets.load_dataset(
        "json", data_files=str(corpus), split="train", cache_dir=str(cache_folder)
    )
    start = time.perf_counter()
    mapped = loaded.map(
        _encoded,
        batched=True,
        num_proc=N_CORES,
        remove_columns=["text"],
        load_from_cache_file=False,
    )
    seconds = time.perf_counter() - start
    assert len(mapped) == len(loaded)
    shutil.rmtree(cache_folder)
    return seconds


def _encoded(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
    return {"ids": tokenizer().encoding.encode_ordinary_batch(batch["text"], num_threads=1)}


def ours(corpus: Path, folder: Path) -> dict[str, float]:
    """Return the seconds of a preparation, and the peak memory of this process and of a worker."""
    source = SourceConfig("jsonl", str(corpus))
    data = DataConfig("bench", str(folder), {"python": source}, workers=N_CORES)
    start = time.perf_counter()
    prepare(data, LLAMA3, progress=False)
    seconds = time.perf_counter() - start
    shutil.rmtree(folder)
    status = Path("/proc/self/status").read_text().splitlines()
    (own,) = (line.split()[1] for line in status if line.startswith("VmHWM"))
    return {
        "seconds": seconds,
        "main_process_mib": int(own) / 1024,
        "largest_worker_mib": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024,
    }


if __name__ == "__main__":
    main()
