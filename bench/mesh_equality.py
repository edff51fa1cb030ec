"""One run, any mesh: the default run's first 40 steps on many meshes, and once more on the first.

    python -m bench.mesh_equality

Whole processes, as a user starts them, on CPU in fp32. The claims: the largest relative difference
to one process is at most 1e-6 in a step's loss and 1e-5 in its gradient norm, the batches are the
same, and the same mesh again gives every figure bit for bit.
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
    "tp=2, compiled, selective checkpointing": [
        *("parallel.tp=2", "parallel.compile=true", "parallel.activation_checkpoint=selective")
    ],
}


def main() -> None:
    """Measures and writes `bench/results/mesh_equality.json`."""
    reference: list[dict[str, Any]] = []
    figures: dict[str, dict[str, float]] = {}
    for name, mesh in MESHES.items():
        steps = run(mesh)
        reference = reference or steps
        assert [s["batch_hash"] for s in steps] == [s["batch_hash"] for s in reference], name
        figures[name] = {
            key: max(abs(s[key] - r[key]) / r[key] for s, r in zip(steps, reference, strict=True))
            for key in ("loss", "grad_norm")
        }
    write(Path(__file__).stem, {"largest_relative_difference": figures, "steps": STEPS})


def run(mesh: list[str]) -> list[dict[str, Any]]:
    """Trains from scratch on `mesh`; returns the lines of `metrics.jsonl`, one a step."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "train.py", f"run.dir={folder}", f"train.max_steps={STEPS}"]
        command += ["log.interval=1", "parallel.accelerator=cpu", "precision.param=fp32", *mesh]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line) for line in lines]
    assert [s["step"] for s in steps] == list(range(1, STEPS + 1))
    return steps


if __name__ == "__main__":
    main()
