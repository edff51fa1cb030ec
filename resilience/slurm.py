"""SLURM: tasks of a job and rendezvous address.

Reads the environment variables that `srun` sets for its tasks. Fabric also reads them, but waits
silently if a batch script lacks `srun`, and takes the number of tasks per node from an option that
`srun` may not have been able to follow. Standard library only: it runs before anything is launched.
"""

import os
import re
import socket
from collections.abc import Mapping

# Below Linux's ephemeral ports (from 32768), above the ports of known services.
FIRST_PORT, N_PORTS = 20_000, 12_000
# Numbers that srun sets in each task, with SLURM_STEP_TASKS_PER_NODE and SLURM_STEP_NODELIST.
TASK_VARIABLES = (
    *("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS"),
    *("SLURM_NODEID", "SLURM_JOB_ID", "SLURM_STEP_ID"),
)


def in_slurm(environment: Mapping[str, str]) -> bool:
    """Return whether this process belongs to a SLURM job whose tasks `srun` starts.

    As in Fabric, not if the job has no number of tasks, and not in an interactive shell (a job
    named bash or interactive).
    """
    interactive = environment.get("SLURM_JOB_NAME") in ("bash", "interactive")
    return {"SLURM_PROCID", "SLURM_NTASKS"} <= environment.keys() and not interactive


def started_by_srun(environment: Mapping[str, str]) -> bool:
    """Return whether `srun` started this process; a job's script is not one of its tasks.

    All variables of a task must be set and consistent: some of them may be left in a shell.
    """
    try:
        tasks = tasks_per_node(environment)
        rank, local_rank, size, *_ = (int(environment[name]) for name in TASK_VARIABLES)
    except (KeyError, ValueError):
        return False
    consistent = 0 <= local_rank <= rank < size == sum(tasks) and local_rank < max(tasks)
    if not consistent or "SLURM_STEP_NODELIST" not in environment:
        return False
    # A shell started by srun is one task; several tasks are a run, regardless of the job's name.
    return in_slurm(environment) or sum(tasks) > 1


def tasks_per_node(environment: Mapping[str, str]) -> list[int]:
    """Return the number of tasks per node, from SLURM's notation `2(x3),1`."""
    counts = []
    for part in environment["SLURM_STEP_TASKS_PER_NODE"].split(","):
        count, _, times = part.rstrip(")").partition("(x")
        counts += [int(count)] * int(times or 1)
    return counts


def host_name() -> str:
    """Return the name of this machine, as SLURM calls it if it does."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def launch_id(environment: Mapping[str, str] = os.environ) -> str | None:
    """Return an identifier of this launch of a job, None outside of SLURM."""
    job = environment.get("SLURM_JOB_ID")
    return f"{job}.{environment.get('SLURM_RESTART_COUNT', '0')}" if job else None


def rendezvous(environment: Mapping[str, str]) -> dict[str, str]:
    """Return `MASTER_ADDR` and `MASTER_PORT` of this job step; values already set are kept.

    Differs from Fabric's choice in three points. The host is the first node of the step, not of the
    job, which may have more nodes. Names with two ranges (`rack[1-2]n[05-08]`) are supported. The
    port also differs between the steps of a job and between its requeues, not only between jobs.
    """
    nodes = environment["SLURM_STEP_NODELIST"]
    first = re.sub(r"\[([^],-]+)[^]]*\]", r"\1", nodes).split(",")[0]
    job, step = int(environment["SLURM_JOB_ID"]), int(environment["SLURM_STEP_ID"])
    restarts = int(environment.get("SLURM_RESTART_COUNT", "0"))
    # Three steps of a job and its first seven launches get ports over 500 apart, so they collide
    # neither with each other nor with 500 neighboring jobs (a sweep on one node).
    port = FIRST_PORT + (job + 4000 * step + 1144 * restarts) % N_PORTS
    return {
        "MASTER_ADDR": environment.get("MASTER_ADDR", first),
        "MASTER_PORT": environment.get("MASTER_PORT", str(port)),
    }
