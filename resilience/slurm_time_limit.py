"""Remaining time of a SLURM job, so that a run saves and stops before the limit."""

import re
import subprocess
from collections.abc import Mapping
from functools import partial

QUERY_TIMEOUT_SECONDS = 30  # a busy SLURM controller may take this long


def slurm_time_left(environment: Mapping[str, str], now: float) -> float | None:
    """Return the seconds until SLURM's time limit; None outside a job and without a limit.

    Args:
        environment: Environment variables of the process.
        now: Current time in seconds since the epoch.
    """
    job = environment.get("SLURM_JOB_ID")
    if job is None:
        return None
    if "SLURM_ARRAY_JOB_ID" in environment:  # its job id may denote the entire array
        job = f"{environment['SLURM_ARRAY_JOB_ID']}_{environment['SLURM_ARRAY_TASK_ID']}"
    # Set by newer versions of SLURM (not 22.05). The limit may have changed since: query it first.
    end_time = environment.get("SLURM_JOB_END_TIME")
    fallback = float(end_time) - now if end_time is not None else None
    query = ["squeue", "--noheader", f"--jobs={job}", "--format=%L"]
    run = partial(subprocess.run, capture_output=True, text=True, check=True)
    try:
        time_left = run(query, timeout=QUERY_TIMEOUT_SECONDS).stdout.strip()
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
