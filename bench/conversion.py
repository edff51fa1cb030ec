"""Conversion streams: its memory does not grow with the model, and it is about as fast as a copy.

    python -m bench.conversion

Weights of 2 GB, larger than the memory that is allowed, go through every format, each conversion in
a process of its own, interleaved with a synced copy of the same bytes. The claim: no process ever
holds more than the two largest tensors and 1 GiB, of which torch itself is a half.
"""

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench.measurement import write
from formats.conversion import convert
from formats.stored_tensor import n_bytes
from formats.weights import Weights
from model.config import ModelConfig

ROOT = Path(__file__).parent.parent
MODEL = ModelConfig("conversion", 1024, 24, 16, 8, 4096, 65_536)
STEPS = (  # from, to, and what else is asked
    ("native", "hf"),
    ("hf", "native-again"),
    ("native", "meta", "parts=4"),
    ("meta", "one-part", "parts=1"),
    ("one-part", "hf-again"),
)
KINDS = {"native-again": "native", "one-part": "meta", "hf-again": "hf"}
ALLOWED = 2**30  # bytes beyond the two largest tensors
ROUNDS = 3


class DrawnWeights(Weights):
    """Random weights that lie nowhere: each block is drawn when it is read, and never again."""

    format = "native"

    def _stored_name(self, name: str) -> str:
        return name

    def dtype(self, name: str) -> torch.dtype:
        return torch.float32

    def read(self, name: str, offsets: Sequence[int], sizes: Sequence[int]) -> torch.Tensor:
        return torch.rand(tuple(sizes))


def main() -> None:
    """Measures and writes `bench/results/conversion.json`."""
    with tempfile.TemporaryDirectory(dir=ROOT) as place:
        rounds = [measure(MODEL, Path(place)) for _ in range(ROUNDS)]
    sizes = tensor_sizes(MODEL)
    limit = sum(sizes[-2:]) + ALLOWED
    peaks = {key: max(each[key]["peak_bytes"] for each in rounds) for key in rounds[0]}
    ratios = {
        key: sorted(each[key]["seconds"] / each[key]["copy_seconds"] for each in rounds)
        for key in rounds[0]
    }
    write(
        "conversion",
        {
            "checkpoint_bytes": sum(sizes),
            "two_largest_tensors_bytes": sum(sizes[-2:]),
            "limit_bytes": limit,
            "peak_bytes": peaks,
            "time_over_copy": {key: statistics.median(each) for key, each in ratios.items()},
            "time_over_copy_all": ratios,
        },
    )
    assert sum(sizes) > limit, "a checkpoint that fits in what is allowed shows nothing"
    assert max(peaks.values()) < limit, "a conversion holds more than it may"


def tensor_sizes(model: ModelConfig) -> list[int]:
    """Bytes of each parameter, ascending."""
    shapes = DrawnWeights(Path(), model, {}).shapes.values()
    return sorted(n_bytes(shape, torch.float32) for shape in shapes)


def measure(
    model: ModelConfig, place: Path, steps: Sequence[tuple[str, ...]] = STEPS
) -> dict[str, dict[str, float]]:
    """Peak memory and time of each conversion, and the time of a copy of what it wrote."""
    for old in place.iterdir():
        shutil.rmtree(old)
    convert(DrawnWeights(Path("drawn"), model, {}), None, place / "native", "native")
    found = {}
    for source, target, *more in steps:
        kind = KINDS.get(target, target)
        names = [f"source={place / source}", f"target={place / target}", f"format={kind}"]
        peak, seconds = run(["convert.py", *names, "tokenizer_path=null", *more])
        begin = time.perf_counter()
        copy(place / target, place / "copy")
        found[f"{source}-{target}"] = {
            "peak_bytes": peak,
            "seconds": seconds,
            "copy_seconds": time.perf_counter() - begin,
        }
        shutil.rmtree(place / "copy")
    return found


def run(arguments: list[str]) -> tuple[int, float]:
    """Runs a program; its peak resident memory in bytes, and the seconds that it converted."""
    process = subprocess.Popen(
        [sys.executable, *arguments], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    told = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, told
    words: list[Any] = told.split()
    return usage.ru_maxrss * 1024, float(words[words.index("s,") - 1])


def copy(source: Path, target: Path) -> None:
    """Copies the files of a folder and waits until they are on the disk."""
    target.mkdir()
    for path in source.iterdir():
        shutil.copyfile(path, target / path.name)
        descriptor = os.open(target / path.name, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


if __name__ == "__main__":
    main()
