"""Remaining time of a SLURM job, so that a run saves and stops before the limit."""

import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from functools import partial

QUERY_TIMEOUT_SECONDS = 30  # a busy SLURM controller may take this long


def _print_error(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def slurm_time_left(
    environment: Mapping[str, str], now: float, warn: Callable[[str], None] = _print_error
) -> float | None:
    """Return the seconds until SLURM's time limit; None outside a job and without a limit.

    The limit of a job that has ended (in a shell or tmux session that it left) is ignored with a
    warning: otherwise each launch would stop after one step.

    Args:
        environment: Environment variables of the process.
        now: Current time in seconds since the epoch.
        warn: Called with the warning.
    """
    job = environment.get("SLURM_JOB_ID")
    if job is None:
        return None
    array, task = (environment.get(f"SLURM_ARRAY_{name}_ID") for name in ("JOB", "TASK"))
    if array is not None and task is not None:  # the job id may denote the entire array
        job = f"{array}_{task}"
    # Set by newer versions of SLURM (not 22.05). The limit may have changed since: query it first.
    end_time = environment.get("SLURM_JOB_END_TIME", "")
    fallback = float(end_time) - now if end_time.isdecimal() else None
    query = ["squeue", "--noheader", f"--jobs={job}", "--format=%L"]
    run = partial(subprocess.run, capture_output=True, text=True, check=True)
    try:
        answer = run(query, timeout=QUERY_TIMEOUT_SECONDS).stdout.strip()
        time_left = _seconds(answer) if re.fullmatch(r"[\d:-]+", answer) else None
    except (OSError, subprocess.SubprocessError):
        time_left = fallback  # without it, SIGUSR1 still announces the limit
    if time_left is not None and time_left <= 0:
        names = [name for name in ("SLURM_JOB_ID", "SLURM_JOB_END_TIME") if name in environment]
        warn(
            f"Warning: the time of SLURM job {job} is over; this shell has outlived it, and its "
            f"time limit is ignored. To silence this, run: unset {' '.join(names)}"
        )
        return None
    return time_left


def _seconds(time_left: str) -> float:
    """Parse SLURM's `days-hours:minutes:seconds`, whose leading parts may be missing."""
    days, _, rest = time_left.rpartition("-")
    seconds = 0
    for part in rest.split(":"):
        seconds = 60 * seconds + int(part)
    return float(86_400 * int(days or 0) + seconds)
