"""Duration of a plan search and of the memory check before a run.

    python -m bench.plan_search

Claims: a search of 405B on 16,384 devices takes less than 10 s; the memory check of `train.py`
takes less than 50 ms without imports. Also measures the memory of a process with its libraries and
no tensors, `planning.hardware.PROCESS_GIB`.
"""

import subprocess
import sys
import time
from pathlib import Path

from hydra import compose, initialize_config_dir

from bench.measurement import spread, write
from cli.arguments import CONF, plan_arguments
from cli.config import load_plan_config
from parallel.mesh import resolve_mesh
from planning.fit_check import check_plan
from planning.search import search
from resilience.accelerator import resolve_processes

ROOT = Path(__file__).parent.parent
REPEATS = 7
CASES = {
    "8b_on_8": ("model=llama3_8b", "train.global_batch_size=64", "devices=8"),
    "70b_on_256": ("model=llama3_70b", "train.global_batch_size=256", "devices=256"),
    "405b_on_512": ("model=llama3_1_405b", "train.global_batch_size=512", "devices=512"),
    "405b_on_16384": ("experiment=llama3_405b_paper", "devices=16384"),
}
# Imports of a rank when its model is built.
LIBRARIES = """
import lightning_fabric, torch, torch.utils.tensorboard, train
import data.loader, model.llama, resilience.launch, checkpoint.saver, training.console
import resilience.loss_monitor, training.optimizer, resilience.watchdog
print(int(open("/proc/self/statm").read().split()[1]) * 4096 / 2**30)
"""


def main() -> None:
    """Run the benchmark and write `bench/results/plan_search.json`."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        results = {name: measure_search(overrides) for name, overrides in CASES.items()}
        fit_check = spread([fit_check_seconds() for _ in range(REPEATS)])
    done = subprocess.run(
        [sys.executable, "-c", LIBRARIES], cwd=ROOT, capture_output=True, text=True, check=True
    )
    process = {"verdict_seconds": fit_check, "process_gib": float(done.stdout)}
    write(Path(__file__).stem, results | process)


def measure_search(overrides: tuple[str, ...]) -> dict[str, object]:
    """Return the number of candidates and the seconds of a search."""
    is_recipe = overrides[0].startswith("experiment=")
    data = () if is_recipe else ("data=fineweb_edu", "tokenizer=llama3", "train.seq_len=8192")
    config = load_plan_config(compose("plan", plan_arguments([*overrides, *data, "search=true"])))
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        result = search(config.request, config.n_devices, config.hardware)
        seconds.append(time.perf_counter() - start)
    return {
        "candidates": result.candidates,
        "seconds": spread(seconds),
    }


def fit_check_seconds() -> float:
    """Return the seconds of the memory check of the default run on this machine's CPU."""
    config = load_plan_config(compose("plan", plan_arguments(["hardware=cpu"])))
    processes, _ = resolve_processes(config.parallel)
    mesh, _ = resolve_mesh(config.parallel, processes.world_size)
    start = time.perf_counter()
    check_plan(config, processes, mesh)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
