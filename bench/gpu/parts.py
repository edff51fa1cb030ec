"""The parts of `make gpu` in order of value, and the process that runs one of them."""

import importlib
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Rows = Iterator[tuple[str, dict[str, Any]]]
"""Name and values of each row; `passed` is whether its claim holds, `skipped` why it has none."""


@dataclass(frozen=True)
class Part:
    """A function `module:name` from `reduced` to `Rows`, and its limit in seconds."""

    function: str
    limit_seconds: float


ENVIRONMENT = Part("bench.gpu.environment:describe", 90)
PARTS = {
    "kernels": Part("bench.gpu.kernels:compare", 75),
    "losses": Part("bench.gpu.runs:losses", 180),
    "8b": Part("bench.gpu.throughput:case_8b", 110),
    "deterministic": Part("bench.gpu.runs:deterministic", 75),
    "8b_fp8": Part("bench.gpu.throughput:case_8b_fp8", 110),
    "save": Part("bench.gpu.runs:save_stall", 90),
    "1b": Part("bench.gpu.throughput:case_1b", 80),
    "3b": Part("bench.gpu.throughput:case_3b", 80),
    "pytest": Part("bench.gpu.runs:pytest_on_gpu", 150),
    "two_ranks": Part("bench.gpu.runs:two_ranks", 120),
}


def run_function(function: str, rows: Path, reduced: bool) -> None:
    """Run a part and append each of its rows to a file of JSON lines."""
    module, _, name = function.partition(":")
    part: Callable[[bool], Rows] = getattr(importlib.import_module(module), name)
    with rows.open("a") as file:
        for row, values in part(reduced):
            file.write(json.dumps({"name": row, **values}) + "\n")
            file.flush()


if __name__ == "__main__":
    run_function(sys.argv[1], Path(sys.argv[2]), sys.argv[3] == "1")
