"""How fast preparation is: ours beside raw tiktoken and `datasets.map`, same text, same cores.

    python -m bench.preparation

The text is Python source of what is installed here, 100 MB as JSON lines; the tokenizer is Llama
3's. Raw tiktoken encodes what lies in memory, once, and keeps it there. `datasets.map` encodes a
dataset that is loaded already and writes the ids. Ours is `prepare()` whole, in a process of its
own: starts its workers, reads, splits, writes shards with checksums. They take turns. The claim: at
least 90% of raw tiktoken, in memory that the corpus' size does not decide.
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
    """Measures and writes `bench/results/preparation.json`; with arguments, is our one process."""
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
        peer: [theirs / own for theirs, own in zip(seconds[peer], seconds["ours"], strict=True)]
        for peer in ("raw_tiktoken", "datasets_map")
    }
    figures: dict[str, Any] = {
        "characters": sum(map(len, texts)),
        "documents": len(texts),
        "tokens": n_tokens,
        "cores": N_CORES,
    }
    for peer, each in seconds.items():
        figures[f"{peer}_tokens_per_second"] = spread([n_tokens / second for second in each])
    for peer, each in ratios.items():
        figures[f"ours_over_{peer}"] = spread(each)
    for key in memory[0]:
        figures[f"ours_{key}"] = spread([measured[key] for measured in memory])
    write(Path(__file__).stem, figures)


@cache
def tokenizer() -> Tokenizer:
    """Llama 3's, loaded once; a process forked from this one has it too."""
    ready = ready_tokenizer(LLAMA3)
    assert ready is not None
    return ready


def write_corpus(path: Path) -> list[str]:
    """Python files of the packages and the library installed here, one JSON object a line."""
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
    """Seconds of tiktoken alone, on all cores."""
    begin = time.perf_counter()
    tokenizer().encoding.encode_ordinary_batch(texts, num_threads=N_CORES)
    return time.perf_counter() - begin


def datasets_map(corpus: Path, cache_folder: Path) -> float:
    """Seconds of `datasets.map` on all cores; loading the dataset before is not counted."""
    import datasets

    datasets.disable_progress_bars()
    loaded = datasets.load_dataset(
        "json", data_files=str(corpus), split="train", cache_dir=str(cache_folder)
    )
    begin = time.perf_counter()
    mapped = loaded.map(
        _encoded,
        batched=True,
        num_proc=N_CORES,
        remove_columns=["text"],
        load_from_cache_file=False,
    )
    seconds = time.perf_counter() - begin
    assert len(mapped) == len(loaded)
    shutil.rmtree(cache_folder)
    return seconds


def _encoded(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
    return {"ids": tokenizer().encoding.encode_ordinary_batch(batch["text"], num_threads=1)}


def ours(corpus: Path, folder: Path) -> dict[str, float]:
    """Seconds of a whole preparation, and the most memory of this process and of a worker."""
    source = SourceConfig("jsonl", str(corpus))
    data = DataConfig("bench", str(folder), {"python": source}, workers=N_CORES)
    begin = time.perf_counter()
    prepare(data, LLAMA3, progress=False)
    seconds = time.perf_counter() - begin
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
