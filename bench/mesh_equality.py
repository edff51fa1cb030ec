"""Equality of losses on any mesh: the first 40 steps of the default run on several meshes.

    python -m bench.mesh_equality

Runs complete processes on CPU in fp32. Claims: the largest relative difference from one process is
at most 1e-6 in loss and 1e-5 in gradient norm, batches are identical, and a repeated run on the
same mesh is bit-identical.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench.measurement import write

ROOT = Path(__file__).parent.parent
STEPS = 40
MESHES = {
    "one process": [],
    "one process again": [],
    "tp=2": ["parallel.tp=2"],
    "dp_shard=2": ["parallel.dp_shard=2"],
    "cp=2": ["parallel.cp=2"],
    "dp_replicate=2": ["parallel.dp_replicate=2"],
    "dp_shard=2 tp=2": ["parallel.dp_shard=2", "parallel.tp=2"],
    "dp_replicate=2 cp=2 tp=2": ["parallel.dp_replicate=2", "parallel.cp=2", "parallel.tp=2"],
    "pp=2": ["parallel.pp=2", "train.micro_batch_size=2"],
    "pp=2 with two parts": ["parallel.pp=2", "parallel.pp_parts=2", "train.micro_batch_size=2"],
    "pp=2 dp_shard=2 tp=2": ["parallel.pp=2", "parallel.dp_shard=2", "parallel.tp=2"],
    "tp=2, compiled, selective checkpointing": [
        *("parallel.tp=2", "parallel.compile=true", "parallel.activation_checkpoint=selective")
    ],
}


def main() -> None:
    """Run the benchmark and write `bench/results/mesh_equality.json`."""
    reference: list[dict[str, Any]] = []
    results: dict[str, dict[str, float]] = {}
    for name, mesh in MESHES.items():
        steps = run(mesh)
        reference = reference or steps
        assert [s["batch_hash"] for s in steps] == [s["batch_hash"] for s in reference], name
        results[name] = {
            key: max(abs(s[key] - r[key]) / r[key] for s, r in zip(steps, reference, strict=True))
            for key in ("loss", "grad_norm")
        }
    write(Path(__file__).stem, {"largest_relative_difference": results, "steps": STEPS})


def run(mesh: list[str]) -> list[dict[str, Any]]:
    """Train from scratch on `mesh`; return the lines of `metrics.jsonl`, one per step."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "train.py", "model=llama3_tiny", f"run.dir={folder}"]
        command += [
            f"train.max_steps={STEPS}",
            "log.interval=1",
            "parallel.accelerator=cpu",
            "precision.param=fp32",
            *mesh,
        ]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line) for line in lines]
    assert [s["step"] for s in steps] == list(range(1, STEPS + 1))
    return steps


if __name__ == "__main__":
    main()
