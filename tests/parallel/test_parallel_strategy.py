"""Process groups of a mesh."""

from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from distributed import on_ranks
from lightning_fabric import Fabric
from small_run import Case, model_config

from model.llama import Llama
from parallel.config import PrecisionConfig
from parallel.parallelize import parallelize
from parallel.strategy import MeshStrategy
from resilience.config import TimeLimits

CASE = Case(cp=2)


def group_timeouts(timeout: timedelta) -> dict[str, Any]:
    """Return the timeouts of all groups and of the store after the set-up of a run."""
    dist.destroy_process_group()  # of the test
    plan = partial(parallelize, parallel=CASE.parallel, precision=PrecisionConfig())
    strategy = MeshStrategy(CASE.mesh, plan, timeout=timeout)
    fabric = Fabric(accelerator="cpu", devices=2, strategy=strategy)
    fabric.launch()
    with torch.device("meta"):
        llama = Llama(model_config(tied=False, n_layers=1))
    fabric.setup_module(llama)
    c10d: Any = dist.distributed_c10d
    groups = {
        group.group_desc: group._get_backend(torch.device("cpu")).options._timeout
        for group in c10d._world.pg_map
    }
    return groups | {"store": c10d._get_default_store().timeout}


def test_all_groups_of_a_run_have_the_timeout_that_follows_from_the_watchdog() -> None:
    """Otherwise a collective that takes longer than 10 minutes (NCCL) ends the process."""
    timeout = TimeLimits(setup=1800, step=7200, checkpoint=3600).group_timeout
    assert timeout > timedelta(hours=2)
    for found in on_ranks(2, group_timeouts, timeout):
        assert len(found) > 3 and set(found.values()) == {timeout}, found


def test_timeout_without_limits_can_be_represented() -> None:
    assert TimeLimits().group_timeout == timedelta(days=7)
