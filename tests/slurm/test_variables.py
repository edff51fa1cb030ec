"""What `parallel.slurm` reads in the tasks of a real SLURM is what was asked of that SLURM."""

import json
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from cluster import NODES, TASKS_PER_NODE, Cluster, missing_commands

pytestmark = pytest.mark.skipif(
    bool(missing_commands()), reason=f"SLURM is not installed: {', '.join(missing_commands())}"
)
MINUTES = 10
# What a task reads; MASTER_ADDR is the tests' own and would be kept.
TELL = """
import json, os, time
from parallel.slurm import rendezvous, slurm_time_left, started_by_srun, tasks_per_node
environment = {name: value for name, value in os.environ.items() if name != "MASTER_ADDR"}
print(json.dumps([
    started_by_srun(environment),
    tasks_per_node(environment),
    rendezvous(environment),
    slurm_time_left(environment, time.time()),
]))
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    cluster = Cluster()
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


def read_in_tasks(cluster: Cluster, *options: str) -> list[Any]:
    """What each task of a step of its own job reads."""
    told = cluster.run("srun", *options, sys.executable, "-c", TELL).stdout
    return [json.loads(line) for line in told.splitlines()]


def test_tasks_know_their_number_their_meeting_place_and_the_time_left(cluster: Cluster) -> None:
    options = ("-N2", f"--ntasks-per-node={TASKS_PER_NODE}", f"--time={MINUTES}")
    first, *others = read_in_tasks(cluster, *options)
    by_srun, tasks, meeting, left = first
    assert by_srun and tasks == [TASKS_PER_NODE] * len(NODES)
    assert meeting["MASTER_ADDR"] == NODES[0]
    assert 0 < left <= MINUTES * 60
    assert len(others) == TASKS_PER_NODE * len(NODES) - 1
    assert all(other[:3] == first[:3] for other in others)


def test_uneven_tasks_and_no_time_limit_are_known(cluster: Cluster) -> None:
    for _, tasks, _, left in read_in_tasks(cluster, "-N2", "-n3", "--time=UNLIMITED"):
        assert tasks == [2, 1] and left is None
