"""What a run takes from SLURM: its tasks, where they meet, how much time is left.

Reads the variables that `srun` gives to the tasks it starts. Fabric reads them too, but takes a
part of them on trust: it starts to wait, without a word, where a batch script lacks its `srun`,
and counts the tasks of a node from an option that `srun` may have been unable to follow. Imports
nothing heavy: all of this is looked at before anything is launched.
"""

import re
import subprocess
from collections.abc import Mapping

# Below the ports that Linux hands out by itself (from 32768), above those of known services.
FIRST_PORT, N_PORTS = 20_000, 12_000
ANSWER_SECONDS = 30  # a busy SLURM controller may take that long


def in_slurm(environment: Mapping[str, str]) -> bool:
    """Whether a process runs as part of a SLURM job whose tasks `srun` starts.

    As in Fabric: not where the job does not say how many tasks it has, and not in an interactive
    shell (a job named bash or interactive).
    """
    interactive = environment.get("SLURM_JOB_NAME") in ("bash", "interactive")
    return {"SLURM_PROCID", "SLURM_NTASKS"} <= environment.keys() and not interactive


def started_by_srun(environment: Mapping[str, str]) -> bool:
    """Whether `srun` started this process; the script of a job is not one of its tasks."""
    if not {"SLURM_PROCID", "SLURM_STEP_TASKS_PER_NODE"} <= environment.keys():
        return False
    # A shell that srun has started is one task; several are a run, whatever the job's name.
    return in_slurm(environment) or sum(tasks_per_node(environment)) > 1


def tasks_per_node(environment: Mapping[str, str]) -> list[int]:
    """The number of tasks that `srun` started on each node, from SLURM's `2(x3),1`."""
    counts = []
    for part in environment["SLURM_STEP_TASKS_PER_NODE"].split(","):
        count, _, times = part.rstrip(")").partition("(x")
        counts += [int(count)] * int(times or 1)
    return counts


def rendezvous(environment: Mapping[str, str]) -> dict[str, str]:
    """`MASTER_ADDR` and `MASTER_PORT`: where the tasks of this step meet. What is set is kept.

    Better than Fabric's own choice in three places. The host is the first of the step's nodes, not
    of the job's, which may have more. Names with two ranges (`rack[1-2]n[05-08]`) are read rightly.
    And the port differs for two steps of one job and for the same job requeued, not for jobs alone.
    """
    nodes = environment["SLURM_STEP_NODELIST"]
    first = re.sub(r"\[([^],-]+)[^]]*\]", r"\1", nodes).split(",")[0]
    job, step = int(environment["SLURM_JOB_ID"]), int(environment["SLURM_STEP_ID"])
    restarts = int(environment.get("SLURM_RESTART_COUNT", "0"))
    # Three steps of a job and its first seven starts get ports over 500 apart, and so neither these
    # nor those of its 500 neighbours, a sweep's on one node for instance, meet at the same.
    port = FIRST_PORT + (job + 4000 * step + 1144 * restarts) % N_PORTS
    return {
        "MASTER_ADDR": environment.get("MASTER_ADDR", first),
        "MASTER_PORT": environment.get("MASTER_PORT", str(port)),
    }


def slurm_time_left(environment: Mapping[str, str], now: float) -> float | None:
    """Seconds until SLURM's time limit ends the job; None outside a job and without a limit.

    Args:
        environment: The process's environment variables.
        now: The clock's time, in seconds since the epoch.
    """
    job = environment.get("SLURM_JOB_ID")
    if job is None:
        return None
    if "SLURM_ARRAY_JOB_ID" in environment:  # whose number, the last task's too, means all tasks
        job = f"{environment['SLURM_ARRAY_JOB_ID']}_{environment['SLURM_ARRAY_TASK_ID']}"
    # Newer SLURMs set it (22.05 does not); the end may have been moved since, so ask first.
    known = environment.get("SLURM_JOB_END_TIME")
    told = float(known) - now if known is not None else None
    try:
        answer = subprocess.run(
            ["squeue", "--noheader", f"--jobs={job}", "--format=%L"],
            capture_output=True,
            text=True,
            timeout=ANSWER_SECONDS,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return told  # the run goes on without: SIGUSR1 comes before the limit anyway
    return _seconds(answer) if re.fullmatch(r"[\d:-]+", answer) else None


def _seconds(time_left: str) -> float:
    """SLURM's `days-hours:minutes:seconds`, of which the first parts may be missing."""
    days, _, rest = time_left.rpartition("-")
    seconds = 0
    for part in rest.split(":"):
        seconds = 60 * seconds + int(part)
    return float(86_400 * int(days or 0) + seconds)
