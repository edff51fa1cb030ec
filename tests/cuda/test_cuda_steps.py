"""Training steps of the real program on fake CUDA tensors, eager and compiled."""

from dataclasses import replace

import pytest
from fake_device import on_fake_device
from step import Case, check_steps

from parallel.config import ParallelConfig, PrecisionConfig

CASES = {
    "one process": Case(),
    "tp, uneven shards, rank 5": Case(mesh=(1, 3, 1, 2), rank=5),
    "all axes, rank 5": Case(mesh=(2, 2, 2, 2), rank=5, micro_batches=1),
    "int8 moments": Case(precision=PrecisionConfig(optimizer_state="int8"), documents=None),
    "compiled": Case(mesh=(1, 2, 1, 2), rank=3, parallel=ParallelConfig(compile=True)),
}


@pytest.mark.parametrize("name", CASES)
def test_step_runs_on_the_device_without_waiting_for_it(name: str) -> None:
    on_fake_device(check_steps, replace(CASES[name]))
