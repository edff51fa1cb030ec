"""What Python's garbage collector costs inside steps, left to itself, and between them.

    python -m bench.garbage [key=value …]

A deep and narrow model, whose step makes many objects and computes little, one process. First the
collector runs when Python wants it to, then as `training.garbage` wants. The claims: none of its
time is inside a step any more, and what is between them is less than 1% of the time.
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

WORDS = ("experiment=smoke", "model.n_layers=16", "parallel.accelerator=cpu")
STEPS = 100  # of each kind


def main() -> None:
    """Measures and writes `bench/results/garbage.json`."""
    with initialize_config_dir(str(CONF), version_base="1.3"), tempfile.TemporaryDirectory() as at:
        words = [*WORDS, f"run.dir={at}", "log.tensorboard=false", *sys.argv[1:]]
        config, processes, mesh = check_config(compose("train", hydra_arguments(words, "train")))
        run = set_up(config, processes, mesh, prepare_data(config), Changes())
        steps = take_steps(run)
        by_itself = measure(steps)
        begin = time.perf_counter()
        gc.collect()
        full = time.perf_counter() - begin
        run.garbage.disable()
        run.garbage.run(1)
        between_steps = measure(steps, run.garbage)
        run.garbage.enable()
    write(
        Path(__file__).stem,
        {
            "steps": STEPS,
            "left_to_itself": by_itself,
            "between_steps": between_steps | {"every": garbage.INTERVAL},
            "full_collection_seconds": full,
        },
    )


def take_steps(run: Run) -> Iterator[None]:
    """One step of `train.py` after the other."""
    for batches in run.batches():
        train_step(run, batches, run.config.optim.lr)
        yield


def measure(steps: Iterator[None], collector: garbage.GarbageCollector | None = None) -> Any:
    """Collections within `STEPS` steps and between them: how many, and their seconds."""
    found: dict[str, list[float]] = {"inside": [], "between": []}
    begin = time.perf_counter()
    for step in range(1, STEPS + 1):
        with timed_collections(found["inside"]):
            next(steps)
        if collector is not None:
            with timed_collections(found["between"]):
                collector.run(step)
    seconds = time.perf_counter() - begin
    return {
        kind: {
            "collections": len(times),
            "seconds": sum(times),
            "longest": max(times, default=0.0),
            "share_of_the_time": sum(times) / seconds,
        }
        for kind, times in found.items()
    }


@contextmanager
def timed_collections(seconds: list[float]) -> Iterator[None]:
    """Adds how long each collection takes to a list."""
    begin = 0.0

    def on_collection(phase: str, _: dict[str, int]) -> None:
        nonlocal begin
        if phase == "start":
            begin = time.perf_counter()
        else:
            seconds.append(time.perf_counter() - begin)

    gc.callbacks.append(on_collection)
    try:
        yield
    finally:
        gc.callbacks.remove(on_collection)


if __name__ == "__main__":
    main()
