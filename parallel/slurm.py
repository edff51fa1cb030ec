"""SLURM: tasks of a job, rendezvous address, and remaining time.

Reads the environment variables that `srun` sets for its tasks. Fabric also reads them, but waits
silently if a batch script lacks `srun`, and takes the number of tasks per node from an option that
`srun` may not have been able to follow. Standard library only: it runs before anything is launched.
"""

import re
import subprocess
from collections.abc import Mapping

# Below Linux's ephemeral ports (from 32768), above the ports of known services.
FIRST_PORT, N_PORTS = 20_000, 12_000
QUERY_TIMEOUT_SECONDS = 30  # a busy SLURM controller may take that long


def in_slurm(environment: Mapping[str, str]) -> bool:
    """Return whether this process belongs to a SLURM job whose tasks `srun` starts.

    As in Fabric, not if the job has no number of tasks, and not in an interactive shell (a job
    named bash or interactive).
    """
    interactive = environment.get("SLURM_JOB_NAME") in ("bash", "interactive")
    return {"SLURM_PROCID", "SLURM_NTASKS"} <= environment.keys() and not interactive


def started_by_srun(environment: Mapping[str, str]) -> bool:
    """Return whether `srun` started this process; a job's script is not one of its tasks."""
    if not {"SLURM_PROCID", "SLURM_STEP_TASKS_PER_NODE"} <= environment.keys():
        return False
    # A shell started by srun is one task; several tasks are a run, whatever the job's name.
    return in_slurm(environment) or sum(tasks_per_node(environment)) > 1


def tasks_per_node(environment: Mapping[str, str]) -> list[int]:
    """Return the number of tasks per node, from SLURM's notation `2(x3),1`."""
    counts = []
    for part in environment["SLURM_STEP_TASKS_PER_NODE"].split(","):
        count, _, times = part.rstrip(")").partition("(x")
        counts += [int(count)] * int(times or 1)
    return counts


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
    # Three steps of a job and its first seven starts get ports over 500 apart, so they collide
    # neither with each other nor with those of 500 neighboring jobs (a sweep on one node).
    port = FIRST_PORT + (job + 4000 * step + 1144 * restarts) % N_PORTS
    return {
        "MASTER_ADDR": environment.get("MASTER_ADDR", first),
        "MASTER_PORT": environment.get("MASTER_PORT", str(port)),
    }


def slurm_time_left(environment: Mapping[str, str], now: float) -> float | None:
    """Return the seconds until SLURM's time limit; None outside a job and without a limit.

    Args:
        environment: Environment variables of the process.
        now: Current time in seconds since the epoch.
    """
    job = environment.get("SLURM_JOB_ID")
    if job is None:
        return None
    if "SLURM_ARRAY_JOB_ID" in environment:  # its job id may denote the whole array
        job = f"{environment['SLURM_ARRAY_JOB_ID']}_{environment['SLURM_ARRAY_TASK_ID']}"
    # Set by newer versions of SLURM (not 22.05). The limit may have changed since: query it first.
    end_time = environment.get("SLURM_JOB_END_TIME")
    fallback = float(end_time) - now if end_time is not None else None
    try:
        time_left = subprocess.run(
            ["squeue", "--noheader", f"--jobs={job}", "--format=%L"],
            capture_output=True,
            text=True,
            timeout=QUERY_TIMEOUT_SECONDS,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return fallback  # without it, SIGUSR1 still announces the limit
    return _seconds(time_left) if re.fullmatch(r"[\d:-]+", time_left) else None


def _seconds(time_left: str) -> float:
    """Parse SLURM's `days-hours:minutes:seconds`, whose leading parts may be missing."""
    days, _, rest = time_left.rpartition("-")
    seconds = 0
    for part in rest.split(":"):
        seconds = 60 * seconds + int(part)
    return float(86_400 * int(days or 0) + seconds)
