"""Equality of all pipelines with one process, in float32 on CPU.

    python -m bench.pipeline_grid [SEED]

Trains every valid combination of `tests.parallel.pipeline_grid`: pp of 2, 3 and 4 with one or two
parts, alone and with the other axes, up to eight processes, tied and untied, with drawn options.
Claims: initial weights are equal bit for bit, and in 20 steps with packed documents the largest
relative difference is at most 1e-6 in loss and 3e-6 in gradient norm.
"""

import sys
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from typing import Any

from bench.measurement import write

TESTS = Path(__file__).parent.parent / "tests"
sys.path += [str(TESTS), str(TESTS / "parallel")]


def main(seed: int = 0) -> None:
    """Run the benchmark and write `bench/results/pipeline_grid.json`."""
    grid = import_module("pipeline_grid")  # of tests/parallel
    results: dict[str, Any] = {}
    combinations = grid.combinations(seed)
    for case in combinations:
        values = {field.name: getattr(case, field.name) for field in fields(case)}
        defaults = {field.name: field.default for field in fields(case)}
        name = " ".join(f"{key}={value}" for key, value in values.items() if value != defaults[key])
        if errors := grid.errors_of(case):
            results[name] = {"rejected": errors}
            continue
        results[name] = found = grid.differences(case)
        print(name, found, flush=True)
    trained = [found for found in results.values() if "loss" in found]
    largest = {key: max(found[key] for found in trained) for key in ("loss", "grad_norm")}
    summary = {"trained": len(trained), "rejected": len(results) - len(trained)}
    write(
        Path(__file__).stem,
        {**summary, "largest_relative_difference": largest, "seed": seed, "combinations": results},
    )
    if largest["loss"] > 1e-6 or largest["grad_norm"] > 3e-6:
        sys.exit("a pipeline differs from one process")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
