"""Cost of Python's garbage collector inside steps (default) and between steps (ours).

    python -m bench.garbage [key=value …]

One process trains a deep and narrow model, whose step creates many objects and computes little,
first with automatic collection, then with `training.garbage`. Claims: no collection inside steps,
and less than 1% of the time spent in collections between them.
"""

import gc
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir

from bench.measurement import write
from cli.arguments import CONF, hydra_arguments
from cli.config import check_config
from train import set_up, train_step
from training import garbage
from training.preflight import prepare_data
from training.resume_policy import Changes
from training.run import Run

OVERRIDES = ("experiment=smoke", "model.n_layers=16", "parallel.accelerator=cpu")
STEPS = 100  # per mode


def main() -> None:
    """Run the benchmark and write `bench/results/garbage.json`."""
    with (
        initialize_config_dir(str(CONF), version_base="1.3"),
        tempfile.TemporaryDirectory() as folder,
    ):
        overrides = [*OVERRIDES, f"run.dir={folder}", "log.tensorboard=false", *sys.argv[1:]]
        config, processes, mesh = check_config(
            compose("train", hydra_arguments(overrides, "train"))
        )
        run = set_up(config, processes, mesh, prepare_data(config), Changes())
        steps = take_steps(run)
        automatic = measure(steps)
        start = time.perf_counter()
        gc.collect()
        full = time.perf_counter() - start
        run.garbage.disable()
        run.garbage.run(1)
        between_steps = measure(steps, run.garbage)
        run.garbage.enable()
    write(
        Path(__file__).stem,
        {
            "steps": STEPS,
            "left_to_itself": automatic,
            "between_steps": between_steps | {"every": garbage.INTERVAL},
            "full_collection_seconds": full,
        },
    )


def take_steps(run: Run) -> Iterator[None]:
    """Run one training step per iteration."""
    for batches in run.batches():
        train_step(run, batches, run.config.optim.lr)
        yield


def measure(steps: Iterator[None], collector: garbage.GarbageCollector | None = None) -> Any:
    """Return number and seconds of collections inside and between `STEPS` steps."""
    seconds_of: dict[str, list[float]] = {"inside": [], "between": []}
    start = time.perf_counter()
    for step in range(1, STEPS + 1):
        with timed_collections(seconds_of["inside"]):
            next(steps)
        if collector is not None:
            with timed_collections(seconds_of["between"]):
                collector.run(step)
    seconds = time.perf_counter() - start
    return {
        kind: {
            "collections": len(times),
            "seconds": sum(times),
            "longest": max(times, default=0.0),
            "share_of_the_time": sum(times) / seconds,
        }
        for kind, times in seconds_of.items()
    }


@contextmanager
def timed_collections(seconds: list[float]) -> Iterator[None]:
    """Append the duration of each collection to a list."""
    start = 0.0

    def on_collection(phase: str, _: dict[str, int]) -> None:
        nonlocal start
        if phase == "start":
            start = time.perf_counter()
        else:
            seconds.append(time.perf_counter() - start)

    gc.callbacks.append(on_collection)
    try:
        yield
    finally:
        gc.callbacks.remove(on_collection)


if __name__ == "__main__":
    main()
