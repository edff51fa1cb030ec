"""Ranking of all meshes of four processes on this CPU: predicted and measured step times.

    python -m bench.planned_speed [rounds]

Calibrates this machine, then runs `train.py` on each mesh in turn, repeatedly, so that variations
of the machine's speed affect all meshes alike. Claim: the measured step of the mesh that the
planner ranks first is within 5% of the fastest one.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir

from bench.measurement import spread, write
from cli.arguments import CONF
from cli.config import load_train_config
from parallel.mesh import AXES, MeshShape, resolve_mesh
from planning.calibration import calibrate
from planning.request import PlanRequest, configured_choice
from planning.search import meshes
from planning.speed import step_time
from planning.step_spec import StepSpec
from resilience.accelerator import resolve_processes
from training.config_rules import INSTALLATION_RULES
from training.preflight import prepare_data

ROOT = Path(__file__).parent.parent
PROCESSES, ROUNDS, STEPS, WARM_UP = 4, 3, 9, 3
TOLERANCE = 0.05
MODEL = (
    *("tokenizer=byte", "model.dim=256", "model.n_layers=6", "model.n_heads=8"),
    *("model.n_kv_heads=4", "model.ffn_dim=704", "model.vocab_size=4096"),
    *("train.seq_len=256", "train.global_batch_size=16", f"train.max_steps={STEPS}"),
    *("parallel.accelerator=cpu", "log.tensorboard=false", "log.interval=1"),
    *("validation.samples=0", "validation.sample_tokens=0", "checkpoint.interval=null"),
)


def main() -> None:
    """Run the benchmark and write `bench/results/planned_speed.json`."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else ROUNDS
    with initialize_config_dir(str(CONF), version_base="1.3"):
        prepare_data(load_train_config(compose("train", [*MODEL, "validation.samples=0"])))
    hardware = calibrate()
    grid = [mesh for mesh in meshes(PROCESSES) if not mesh_errors(mesh)]
    seconds: dict[MeshShape, list[float]] = {mesh: [] for mesh in grid}
    for turn in range(rounds):
        for mesh in grid if turn % 2 == 0 else grid[::-1]:
            seconds[mesh] += measure(mesh)
    planned = {mesh: step_time(spec_of(mesh), hardware) for mesh in grid}
    rows: dict[str, Any] = {}
    for mesh in sorted(grid, key=lambda mesh: statistics.median(seconds[mesh])):
        time, result = planned[mesh], spread(seconds[mesh])
        rows[str(mesh)] = {
            "measured": result,
            "planned": time.total,
            "error": time.total / result["median"] - 1,
        }
        print(f"{mesh!s:<30}{result['median']:>8.3f} s measured{time.total:>8.3f} s planned")
    first = min(grid, key=lambda mesh: planned[mesh].total)
    best = min(statistics.median(each) for each in seconds.values())
    over_best = statistics.median(seconds[first]) / best - 1
    write(
        Path(__file__).stem,
        {"first": str(first), "over_best": over_best, "rows": rows},
    )
    assert over_best <= TOLERANCE, over_best


def mesh_overrides(mesh: MeshShape) -> list[str]:
    """Return the overrides for a mesh."""
    return [f"parallel.{axis}={size}" for axis, size in zip(AXES, mesh.sizes, strict=True)]


def mesh_errors(mesh: MeshShape) -> list[str]:
    """Return the validation errors of a mesh."""
    return plan_request(mesh)[0].mesh_errors(mesh)


def plan_request(mesh: MeshShape) -> tuple[PlanRequest, Any]:
    """Return the configuration on a mesh as a plan request, and the configuration."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = load_train_config(
            compose("train", [*MODEL, *mesh_overrides(mesh)]), *INSTALLATION_RULES
        )
    tokens = config.stages().first_token(config.train.max_steps)
    return PlanRequest(config, "cpu", tokens), config


def spec_of(mesh: MeshShape) -> StepSpec:
    """Return the step on a mesh."""
    request, config = plan_request(mesh)
    processes, _ = resolve_processes(config.parallel, {})
    resolved, _ = resolve_mesh(config.parallel, processes.world_size)
    return request.stages(configured_choice(config, resolved))[0][0]


def measure(mesh: MeshShape) -> list[float]:
    """Return the seconds of each step of a run after the warm-up."""
    with tempfile.TemporaryDirectory() as folder:
        overrides = [*MODEL, *mesh_overrides(mesh), f"run.dir={folder}/run"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run(
            [sys.executable, "train.py", *overrides],
            cwd=ROOT,
            env=environment,
            check=True,
            stdout=subprocess.DEVNULL,
        )
        lines = (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["step_seconds"] for line in lines][WARM_UP:]


if __name__ == "__main__":
    main()
