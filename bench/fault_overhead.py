"""Overhead of fault tolerance: the default run with and without checkpoints and watchdog.

    python -m bench.fault_overhead [key=value …]

Both runs train at the same time, one core each, and swap cores after each pair, so that variations
of the machine's speed cancel out. The measured time is from the first to the last console line,
which includes two checkpoints in one of the runs, four times as often as by default. Target: a
median ratio of at most 1.02.
"""

import os
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bench.measurement import spread, write
from cli.arguments import CONF

PAIRS, STEPS, INTERVAL = 7, 24, 10
COMMON = [
    "model=llama3_tiny",
    f"train.max_steps={STEPS}",
    "validation.interval=null",
    "parallel.accelerator=cpu",
    "log.tensorboard=false",
]
ON = [f"checkpoint.interval={INTERVAL}"]
OFF = [
    "checkpoint.interval=null",
    "watchdog.setup_seconds=off",
    "watchdog.step_seconds=off",
    "watchdog.checkpoint_seconds=off",
]


def main() -> None:
    """Run the benchmark and write `bench/results/fault_overhead.json`."""
    cores = sorted(os.sched_getaffinity(0))[:2]
    assert len(cores) == 2, "the two runs need one core each"
    seconds: dict[str, list[float]] = {"on": [], "off": []}
    subprocess.run([sys.executable, "prepare.py"], cwd=CONF.parent, check=True)
    with ThreadPoolExecutor(2) as pool:
        for pair in range(PAIRS):
            swapped = cores if pair % 2 else cores[::-1]
            runs = {
                name: pool.submit(train, keys, core)
                for (name, keys), core in zip((("on", ON), ("off", OFF)), swapped, strict=True)
            }
            for name, run in runs.items():
                seconds[name].append(run.result())
            print({name: round(values[-1], 2) for name, values in seconds.items()}, flush=True)
    ratios = [on / off for on, off in zip(seconds["on"], seconds["off"], strict=True)]
    write(
        Path(__file__).stem,
        {
            "on_seconds": spread(seconds["on"]),
            "off_seconds": spread(seconds["off"]),
            "ratio": spread(ratios),
            "ratios": ratios,
        },
    )


def train(keys: list[str], core: int) -> float:
    """Train on one core; return the seconds from the first to the last console line."""
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen(
            [sys.executable, "train.py", f"run.dir={folder}/run", *COMMON, *keys, *sys.argv[1:]],
            cwd=CONF.parent,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: os.sched_setaffinity(0, [core]),
        )
        times = []
        assert process.stdout is not None
        for line in process.stdout:
            if re.match(rf" *\d+/{STEPS} ", line):
                times.append(time.monotonic())
        assert process.wait() == 0
        return times[-1] - times[0]


if __name__ == "__main__":
    main()
