"""Training on a SLURM cluster of two nodes: signals, requeuing, node failure, invalid requests."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cluster import TASKS_PER_NODE, Cluster, missing_commands, wait_for
from conftest import FAULT_STEPS, read_events, reproducible_metrics
from fork_server import ForkServer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        bool(missing_commands()),
        reason=f"SLURM is not installed: {', '.join(missing_commands())}",
    ),
]
MESH = ("parallel.tp=2", "parallel.dp_shard=2")
PAUSE_INTERVAL = 9  # text samples of these steps are written to a pipe without a reader


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    cluster = Cluster()
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


def steps_of(folder: Path) -> int:
    """Return the number of steps in metrics.jsonl."""
    metrics = folder / "metrics.jsonl"
    return metrics.read_bytes().count(b"\n") if metrics.exists() else 0


def starts(folder: Path) -> list[int]:
    """Return the step at which each launch started."""
    return [event["step"] for event in read_events(folder) if event["event"] == "start"]


def test_job_resumes_bit_for_bit_after_usr1_a_node_failure_and_a_killed_task(
    cluster: Cluster,
    fork_server: ForkServer,
    train_arguments: Any,
    uninterrupted: Any,
    tmp_path: Path,
) -> None:
    sampled = (f"validation.interval={PAUSE_INTERVAL}", "validation.sample_tokens=1")
    expected = uninterrupted(4, *MESH, *sampled)  # launched without SLURM
    folder, output = tmp_path / "run", tmp_path / "output.txt"
    folder.mkdir()
    os.mkfifo(folder / "samples.txt")
    job = cluster.submit(
        *("--nodes=2", f"--ntasks-per-node={TASKS_PER_NODE}", f"--output={output}"),
        # No other variable reaches the job, nor by default those of its script the tasks.
        "--export=MASTER_ADDR,OMP_NUM_THREADS,LLAMESH_PYTHON,PYTHONPATH",
        *("slurm/train.sbatch", *train_arguments(folder, *MESH, *sampled)),
    )
    wait_for(lambda: steps_of(folder) == PAUSE_INTERVAL, f"step {PAUSE_INTERVAL}")

    cluster.run("scancel", "--signal=USR1", job)
    assert "step 9" in (folder / "samples.txt").read_text()  # lets the run continue
    cluster.start_requeued(job, restarts=1)
    wait_for(lambda: steps_of(folder) == 2 * PAUSE_INTERVAL, f"step {2 * PAUSE_INTERVAL}")
    stop = next(event for event in read_events(folder) if event["event"] == "stop")
    assert (stop["reason"], stop["step"], stop["code"]) == ("stopped", PAUSE_INTERVAL + 1, 75)

    cluster.kill_node("n2")
    # SLURM detects the failure itself after SlurmdTimeout; do not wait for that.
    cluster.run("scontrol", "update", "nodename=n2", "state=down", "reason=gone")
    cluster.start_node("n2")
    cluster.start_requeued(job, restarts=2)
    wait_for(lambda: starts(folder) == [0, PAUSE_INTERVAL + 1, 16], "the third launch")
    wait_for(lambda: steps_of(folder) == 2 * PAUSE_INTERVAL, f"step {2 * PAUSE_INTERVAL} again")

    cluster.kill_task(rank=3)
    wait_for(lambda: cluster.job(job).get("Restarts") == "3", "the job to be requeued")
    (folder / "samples.txt").unlink()
    cluster.start_requeued(job, restarts=3)
    cluster.wait_for_state(job, "COMPLETED")
    assert "Exit code 137 (a task was killed by SIGKILL): requeuing the job (restart 1 of" in (
        output.read_text()
    )
    assert "launched by srun" in output.read_text()
    assert reproducible_metrics(folder) == expected
    assert starts(folder) == [0, PAUSE_INTERVAL + 1, 16, 16]
    assert [len(expected), steps_of(folder)] == [FAULT_STEPS] * 2


def test_task_counts_that_do_not_match_the_mesh_are_rejected_before_launch(
    cluster: Cluster, train_arguments: Any, tmp_path: Path
) -> None:
    def srun(*arguments: str) -> str:
        command = [
            *arguments,
            sys.executable,
            "train.py",
            *train_arguments(tmp_path / "run", *MESH),
        ]
        done = cluster.run(*command, check=False)
        assert done.returncode == 1
        assert done.stderr.count("Invalid configuration:") == 1 and "Traceback" not in done.stderr
        return done.stderr

    assert "3 tasks unevenly on 2 nodes (2, 1)" in srun("srun", "-N2", "-n3")
    stderr = srun("srun", "-N2", "-n2", "--ntasks-per-node=1")
    assert "the mesh (" in stderr and "needs 4 processes, not 2" in stderr
    assert "add --ntasks-per-node=2" in srun("srun", "-N2", "-n4")
    assert not (tmp_path / "run").exists()


def test_job_script_without_srun_is_rejected(
    cluster: Cluster, train_arguments: Any, tmp_path: Path
) -> None:
    output = tmp_path / "output.txt"
    command = " ".join([sys.executable, "train.py", *train_arguments(tmp_path / "run")])
    job = cluster.submit(
        *("--nodes=1", "--ntasks-per-node=1", f"--output={output}", "--no-requeue"),
        f"--wrap={command}",
    )
    cluster.wait_for_state(job, "FAILED")
    assert "put srun before the command" in output.read_text()
