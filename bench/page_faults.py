"""Page faults and step time on CPU with and without `resilience.host_memory`.

    python -m bench.page_faults

Runs a plain training loop of the default model on random tokens in alternating processes, because
the allocator setting applies to a process and cannot be undone.
"""

import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir

from bench.measurement import spread, write
from cli.arguments import CONF
from cli.config import load_train_config
from model.init import initialize
from model.llama import Llama
from resilience.host_memory import keep_freed_memory
from training.optimizer import build_optimizer

PAIRS, WARM_UP, STEPS = 3, 4, 12


def main() -> None:
    """Run the benchmark and write `bench/results/page_faults.json`.

    With an argument, run one process.
    """
    if len(sys.argv) > 1:
        print(json.dumps(steps(keep=sys.argv[1] == "kept")))
        return
    modes: dict[str, list[tuple[float, int]]] = {"returned": [], "kept": []}
    for _ in range(PAIRS):
        for name, measured in modes.items():
            command = [sys.executable, "-m", "bench.page_faults", name]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            measured += json.loads(done.stdout)
    results = {}
    for name, measured in modes.items():
        results[f"{name}_seconds"] = spread([seconds for seconds, _ in measured])
        results[f"{name}_page_faults"] = spread([faults for _, faults in measured])
    write(Path(__file__).stem, results)


def steps(keep: bool) -> list[tuple[float, int]]:
    """Return seconds and page faults of each step after the warm-up."""
    if keep and not keep_freed_memory():
        sys.exit("this C library has no mallopt")
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = load_train_config(compose("train"))
    model = Llama(config.model)
    initialize(model, config.model, config.run.seed)
    optimizer = build_optimizer(model, config.optim)
    shape = (config.train.global_batch_size, config.train.seq_len)
    tokens = torch.randint(0, config.model.vocab_size, shape)
    positions = torch.arange(shape[1]).expand(shape)
    measured = []
    for _ in range(WARM_UP + STEPS):
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        start = time.perf_counter()
        model(tokens, positions, tokens).backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds = time.perf_counter() - start
        measured.append((seconds, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults))
    return measured[WARM_UP:]


if __name__ == "__main__":
    main()
