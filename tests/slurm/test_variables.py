"""`resilience.slurm` reads the requested task counts and time limits in the tasks of a cluster."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cluster import NODES, TASKS_PER_NODE, Cluster, missing_commands, wait_for

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        bool(missing_commands()),
        reason=f"SLURM is not installed: {', '.join(missing_commands())}",
    ),
]
MINUTES = 10
# Run by each task. MASTER_ADDR is set by the test cluster and would be kept.
TASK_SCRIPT = """
import json, os, time
from resilience.slurm import rendezvous, started_by_srun, tasks_per_node
from resilience.slurm_time_limit import slurm_time_left
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
    """Return the values read by each task of a new job."""
    output = cluster.run("srun", *options, sys.executable, "-c", TASK_SCRIPT).stdout
    return [json.loads(line) for line in output.splitlines()]


def test_tasks_read_task_counts_rendezvous_and_time_left(cluster: Cluster) -> None:
    options = ("-N2", f"--ntasks-per-node={TASKS_PER_NODE}", f"--time={MINUTES}")
    first, *others = read_in_tasks(cluster, *options)
    by_srun, tasks, address, left = first
    assert by_srun and tasks == [TASKS_PER_NODE] * len(NODES)
    assert address["MASTER_ADDR"] == NODES[0]
    assert 0 < left <= MINUTES * 60
    assert len(others) == TASKS_PER_NODE * len(NODES) - 1
    assert all(other[:3] == first[:3] for other in others)


def test_uneven_tasks_and_unlimited_time_are_read(cluster: Cluster) -> None:
    for _, tasks, _, left in read_in_tasks(cluster, "-N2", "-n3", "--time=UNLIMITED"):
        assert tasks == [2, 1] and left is None


def test_array_task_reads_its_own_limit_and_is_requeued_elsewhere_without_the_others(
    cluster: Cluster, tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    fault = '{"event": "fault", "time": "2026-01-01T00:00:00+00:00", "launch": "1.0", '
    fault += '"code": 71, "reason": "Xid 79", "hosts": ["%s"]}\\n'
    script = tmp_path / "array.sh"
    script.write_text(
        "#!/bin/bash\n"
        f"srun {sys.executable} -c '{TASK_SCRIPT}'\n"
        # The last task has the job ID of the array.
        "if [[ $SLURM_JOB_ID == $SLURM_ARRAY_JOB_ID ]]; then\n"
        f"    printf '{fault}' $SLURMD_NODENAME >{tmp_path}/run/ledger.jsonl\n"
        f"    source slurm/requeue.sh 71 run.dir={tmp_path}/run\n"
        "fi\n"
        "sleep 60\n"
    )
    array = cluster.submit(
        *("--array=0-1", "--ntasks-per-node=1", f"--time={MINUTES}", "--requeue"),
        *(f"--output={tmp_path}/%a.txt", str(script)),
    )
    wait_for(lambda: cluster.job(f"{array}_1")["Restarts"] == "1", "the last task to be requeued")
    wait_for(lambda: cluster.job(f"{array}_1")["ExcNodeList"] in NODES, "its node to be excluded")
    first = cluster.job(f"{array}_0")
    assert (first["JobState"], first["Restarts"]) == ("RUNNING", "0")
    for task in (0, 1):
        *_, left = json.loads((tmp_path / f"{task}.txt").read_text().splitlines()[0])
        assert left is not None and 0 < left <= MINUTES * 60
    cluster.run("scancel", array)
