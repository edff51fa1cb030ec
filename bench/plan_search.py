"""What planning costs: a search of a thousand and more choices, and the verdict before a run.

    python -m bench.plan_search

The claims: a thousand candidates take less than 2 s, and `train.py`'s verdict less than 50 ms
beside its imports. Also told is what a process holds with its libraries and no tensor, which
`planning.hardware.PROCESS_GIB` leaves out of a rank's room on CPU.
"""

import subprocess
import sys
import time
from pathlib import Path

from hydra import compose, initialize_config_dir

from bench.measurement import spread, write
from cli.arguments import CONF, plan_arguments
from cli.config import load_plan_config
from parallel.mesh import plan_processes, resolve_mesh
from planning.fit_check import check_plan
from planning.search import search

ROOT = Path(__file__).parent.parent
REPEATS = 7
CASES = {
    "8b_on_8": ("model=llama3_8b", "train.global_batch_size=64", "devices=8"),
    "70b_on_256": ("model=llama3_70b", "train.global_batch_size=256", "devices=256"),
    "405b_on_512": ("model=llama3_1_405b", "train.global_batch_size=512", "devices=512"),
}
# What a rank has imported when its model is built.
LIBRARIES = """
import lightning.fabric, torch, torch.utils.tensorboard, train
import data.loader, model.llama, parallel.launch, checkpoint.saver, training.console
import resilience.loss_monitor, training.optimizer, resilience.watchdog
print(int(open("/proc/self/statm").read().split()[1]) * 4096 / 2**30)
"""


def main() -> None:
    """Measures and writes `bench/results/plan_search.json`."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        figures = {name: searched(words) for name, words in CASES.items()}
        verdict = spread([seconds_of_verdict() for _ in range(REPEATS)])
    held = subprocess.run(
        [sys.executable, "-c", LIBRARIES], cwd=ROOT, capture_output=True, text=True, check=True
    )
    process = {"verdict_seconds": verdict, "process_gib": float(held.stdout)}
    write(Path(__file__).stem, figures | process)


def searched(words: tuple[str, ...]) -> dict[str, object]:
    """How many choices a search plans, and its seconds, as a whole and for a thousand."""
    shared = ("data=fineweb_edu", "tokenizer=llama3", "train.seq_len=8192", "search=true")
    config = load_plan_config(compose("plan", plan_arguments([*words, *shared])))
    asked = config.request
    seconds = []
    for _ in range(REPEATS):
        begin = time.perf_counter()
        found = search(asked, config.n_devices, config.hardware)
        seconds.append(time.perf_counter() - begin)
    return {
        "candidates": found.candidates,
        "fitting": found.fitting,
        "seconds": spread(seconds),
        "seconds_per_1000": spread([1000 * each / found.candidates for each in seconds]),
    }


def seconds_of_verdict() -> float:
    """Of the default run on this machine's CPU."""
    config = load_plan_config(compose("plan", plan_arguments(["hardware=cpu"])))
    processes, _ = plan_processes(config.parallel)
    mesh, _ = resolve_mesh(config.parallel, processes.world_size)
    begin = time.perf_counter()
    check_plan(config, processes, mesh)
    return time.perf_counter() - begin


if __name__ == "__main__":
    main()
