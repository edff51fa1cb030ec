"""Memory and duration of checkpoint conversions, which stream their weights.

    python -m bench.conversion

Weights of 2 GB, more than the memory allowed, are converted through every format, each conversion
in a separate process, alternating with a synced copy of the same bytes. Claim: no process holds
more than the two largest tensors and 1 GiB, half of it used by torch itself.
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
from formats.stored_tensor import Dims, StoredTensor
from formats.weights import Weights, parameter_shapes
from model.config import ModelConfig

ROOT = Path(__file__).parent.parent
MODEL = ModelConfig("conversion", 1024, 24, 16, 8, 4096, 65_536)
STEPS = (  # source, target, additional arguments
    ("native", "hf"),
    ("hf", "native-again"),
    ("native", "meta", "parts=4"),
    ("meta", "one-part", "parts=1"),
    ("one-part", "hf-again"),
)
KINDS = {"native-again": "native", "one-part": "meta", "hf-again": "hf"}
ALLOWANCE = 2**30  # bytes beyond the two largest tensors
ROUNDS = 3


class RandomTensor(StoredTensor):
    """A random tensor without a file: each block is drawn when it is read."""

    def read(self, offsets: Dims = None, sizes: Dims = None) -> torch.Tensor:
        return torch.rand(self.shape if sizes is None else tuple(sizes))


def random_weights(model: ModelConfig) -> Weights:
    shapes = parameter_shapes(model).items()
    tensors = {name: RandomTensor(torch.float32, shape, ()) for name, shape in shapes}
    return Weights("native", Path("drawn"), model, tensors)


def main() -> None:
    """Run the benchmark and write `bench/results/conversion.json`."""
    with tempfile.TemporaryDirectory(dir=ROOT) as folder:
        rounds = [measure(MODEL, Path(folder)) for _ in range(ROUNDS)]
    sizes = tensor_sizes(MODEL)
    limit = sum(sizes[-2:]) + ALLOWANCE
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
    assert sum(sizes) > limit, "the checkpoint must exceed the limit for a meaningful test"
    assert max(peaks.values()) < limit, "a conversion exceeds the memory limit"


def tensor_sizes(model: ModelConfig) -> list[int]:
    """Return the bytes of each parameter in ascending order."""
    return sorted(tensor.n_bytes for tensor in random_weights(model).tensors.values())


def measure(
    model: ModelConfig, folder: Path, steps: Sequence[tuple[str, ...]] = STEPS
) -> dict[str, dict[str, float]]:
    """Return peak memory and duration of each conversion, and of a copy of its output."""
    for old in folder.iterdir():
        shutil.rmtree(old)
    convert(random_weights(model), None, folder / "native", "native")
    results = {}
    for source, target, *more in steps:
        kind = KINDS.get(target, target)
        names = [f"checkpoint={folder / source}", f"target={folder / target}", f"format={kind}"]
        peak, seconds = run(["convert.py", *names, "tokenizer_path=null", *more])
        start = time.perf_counter()
        copy(folder / target, folder / "copy")
        results[f"{source}-{target}"] = {
            "peak_bytes": peak,
            "seconds": seconds,
            "copy_seconds": time.perf_counter() - start,
        }
        shutil.rmtree(folder / "copy")
    return results


def run(arguments: list[str]) -> tuple[int, float]:
    """Run a program; return its peak resident memory in bytes and the reported conversion time."""
    process = subprocess.Popen(
        [sys.executable, *arguments], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, output
    words: list[Any] = output.split()
    return usage.ru_maxrss * 1024, float(words[words.index("s,") - 1])


def copy(source: Path, target: Path) -> None:
    """Copy the files of a folder and fsync them."""
    target.mkdir()
    for path in source.iterdir():
        shutil.copyfile(path, target / path.name)
        descriptor = os.open(target / path.name, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


if __name__ == "__main__":
    main()
