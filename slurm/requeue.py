"""Requeue the SLURM job of this process if a restart can help: `slurm/requeue.sh` runs it.

    python slurm/requeue.py EXIT_CODE [key=value …]

EXIT_CODE is srun's; the other arguments are those of train.py, whose run folder shows the progress.
`RULES` has the decision for each code. A job that was cancelled is left alone. A job that restarts
without a newer checkpoint is requeued a limited number of times, which are counted by job in
`RUN/slurm/requeue.json`. Hosts that the event log names in repeated faults, or in a fault of their
hardware, are excluded. A missing or damaged file of the run changes nothing else.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # a script in a subfolder cannot import the packages otherwise

from cli.arguments import parse_options  # noqa: E402
from cli.composition import compose_words  # noqa: E402
from data.files import write_atomically  # noqa: E402
from resilience.errors import is_hardware_fault  # noqa: E402
from resilience.event_log import EventLog  # noqa: E402
from resilience.exit_codes import ExitCode  # noqa: E402
from resilience.run_folder import RunFolder, RunFolderError  # noqa: E402
from resilience.standard_streams import protect_streams  # noqa: E402

COMMAND_SECONDS = 60.0  # a busy controller may take this long
PAUSES = (10.0, 30.0, 60.0)  # between attempts, while the controller does not answer
NO_ANSWER = ("unable to contact", "timed out", "communication", "connection")  # errors of SLURM
RECENT_LAUNCHES = 10  # with faults
FAULTS = 2  # launches with a fault of the same host, before it is excluded
FAULT_CODES = (ExitCode.RANK_FAILED, ExitCode.RANK_FAILED_BEFORE_SAVE, ExitCode.CORRUPTION)
UNUSABLE = (
    "down",
    "drain",
    "drng",
    "fail",
    "unk",
    "maint",
)  # states of nodes, as sinfo prints them


class Rule(NamedTuple):
    """Consequence of an exit code.

    Attributes:
        restarts: Restarts of a job without progress before it ends; 0 never requeues.
        reason: Why the tasks exited, for the log of the job.
    """

    restarts: int
    reason: str


RESTARTS = 3  # one may meet the same bad node again
SRUN_FAILED = 79  # SLURM_EXIT_ERROR in environment.sh
OUT_OF_MEMORY_KILL = 253  # SIG_OOM in SLURM's slurm_protocol_defs.h

RULES: dict[int, Rule] = {
    ExitCode.FINISHED: Rule(0, "finished"),
    ExitCode.USER_ERROR: Rule(0, "invalid configuration, data or run folder, or a program error"),
    ExitCode.DATA: Rule(0, "training data became unreadable"),
    ExitCode.NO_CHECKPOINT: Rule(0, "no checkpoint is valid"),
    ExitCode.REWINDS: Rule(0, "rewinds.json is damaged"),
    ExitCode.DIVERGED: Rule(0, "losses or gradients stay bad"),
    ExitCode.RANK_FAILED: Rule(RESTARTS, "a rank died or hung"),
    ExitCode.RANK_FAILED_BEFORE_SAVE: Rule(RESTARTS, "a rank died or hung before the first save"),
    ExitCode.LOCKED: Rule(0, "another run holds the run folder"),
    ExitCode.SAVE_FAILED: Rule(1, "a checkpoint could not be saved"),
    ExitCode.STOPPED: Rule(RESTARTS, "SIGUSR1 or the time limit: saved"),
    ExitCode.OUT_OF_MEMORY: Rule(0, "a rank is out of memory"),
    ExitCode.CORRUPTION: Rule(RESTARTS, "silent data corruption"),
    SRUN_FAILED: Rule(RESTARTS, "srun could not start the tasks"),
    ExitCode.INTERRUPTED: Rule(0, "SIGINT"),
    ExitCode.TERMINATED: Rule(0, "SIGTERM"),  # unless SLURM preempts the job
    OUT_OF_MEMORY_KILL: Rule(0, "SLURM killed a task that exceeded the memory of the job"),
}
CRASHES = ("SIGILL", "SIGABRT", "SIGBUS", "SIGFPE", "SIGKILL", "SIGSEGV")
RULES |= {
    128 + signal.Signals[name]: Rule(RESTARTS, f"a task was killed by {name}") for name in CRASHES
}
# If srun loses its connection to a node, its code is the lowest byte of an error of SLURM.
SRUN_ERROR = Rule(RESTARTS, "srun could not start or reach the tasks")
OTHER = Rule(0, "unknown exit code")


def rule_of(code: int) -> Rule:
    """Return the rule for an exit code."""
    return RULES.get(code, SRUN_ERROR if code > 128 else OTHER)


class Progress(NamedTuple):
    """Newest checkpoint of a run, and how often its job was restarted without a newer one."""

    step: int
    restarts: int


def main(arguments: Sequence[str]) -> None:
    """Decide, requeue and print the reason."""
    code, overrides = int(arguments[0]), arguments[1:]
    rule, job_id = rule_of(code), job_of(os.environ)
    if code == ExitCode.FINISHED:
        return
    title = f"Exit code {code} ({rule.reason})"
    job = show_job(job_id) if job_id and (rule.restarts or code == ExitCode.TERMINATED) else {}
    preempted = code == ExitCode.TERMINATED and job.get("PreemptTime", "None")[:1].isdecimal()
    if not rule.restarts and not preempted:
        print(f"{title}: not requeued.", flush=True)
        return
    if count(job.get("Restarts")) > restart_count(os.environ):
        print(f"{title}: SLURM has requeued the job already.", flush=True)
        return
    if job.get("JobState") != "RUNNING":
        state = job.get("JobState", "unknown to SLURM: submit it again")
        print(f"{title}: not requeued; the job is {state}.", flush=True)
        return
    more, hosts = "SLURM preempts the job", []
    if not preempted:
        folder = run_folder(overrides)
        hosts = list(hosts_to_exclude(folder, job)) if folder is not None else []
        progress = count_restart(folder, job_id, rule, restart_count(os.environ))
        steps = f"since step {progress.step}" if progress.step else "before the first checkpoint"
        if progress.restarts >= rule.restarts:
            times = f"{progress.restarts} restart{'s' if progress.restarts > 1 else ''}"
            print(
                f"{title}: not requeued, because {times} made no progress {steps}. Find the cause "
                "above, then submit the same command again: it resumes from the newest checkpoint.",
                flush=True,
            )
            return
        more = f"restart {progress.restarts + 1} of at most {rule.restarts} {steps}"
    print(f"{title}: requeuing the job ({more}).", flush=True)
    requeued = run("scontrol", "requeue", job_id)
    if requeued is None:
        print("Error: SLURM did not requeue the job; submit it again", file=sys.stderr, flush=True)
    elif hosts:  # SLURM admits this for pending jobs only
        names = ",".join([*filter(None, [node_list(job, "ExcNodeList")]), *hosts])
        if run("scontrol", "update", f"jobid={job_id}", f"excnodelist={names}") is not None:
            print(f"Excluded from this job: {', '.join(hosts)}", flush=True)


# ---------------------------------------------------------------- SLURM


def job_of(environment: Mapping[str, str]) -> str:
    """Return the ID of this job; the last task of an array has the array's ID as SLURM_JOB_ID."""
    array = environment.get("SLURM_ARRAY_JOB_ID")
    task = environment.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else environment.get("SLURM_JOB_ID", "")


def restart_count(environment: Mapping[str, str]) -> int:
    """Return how often SLURM has restarted this job."""
    return count(environment.get("SLURM_RESTART_COUNT"))


def count(text: str | None) -> int:
    """Return a number that SLURM has set; 0 if it has not."""
    return int(text) if text and text.isdecimal() else 0


def run(*command: str) -> str | None:
    """Return the output of a command of SLURM, None if it fails.

    It is repeated while the controller does not answer, as during its restart.
    """
    for pause in (*PAUSES, None):
        try:
            done = subprocess.run(
                command,
                capture_output=True,
                text=True,
                errors="replace",  # of the name of a job
                timeout=COMMAND_SECONDS,
                check=True,
            )
        except subprocess.CalledProcessError as error:
            problem = str(error.stderr or error).strip()
        except (OSError, subprocess.SubprocessError) as error:
            problem = str(error)
        else:
            return done.stdout
        if pause is None or not any(text in problem.lower() for text in NO_ANSWER):
            break
        time.sleep(pause)
    print(f"Warning: {' '.join(command)}: {problem}", file=sys.stderr, flush=True)
    return None


def show_job(job_id: str) -> dict[str, str]:
    """Return the fields of a job; {} if the controller does not answer."""
    text = run("scontrol", "show", "job", "-o", job_id) or ""
    return dict(field.split("=", 1) for field in text.split() if "=" in field)


def node_list(job: Mapping[str, str], field: str) -> str:
    """Return a list of nodes in SLURM's notation `n[1-3],m7`; empty if there is none."""
    return job.get(field, "").replace("(null)", "")


def names_in(nodes: str) -> set[str]:
    """Return the names in a list of nodes in SLURM's notation."""
    return set((run("scontrol", "show", "hostnames", nodes) or "").split()) if nodes else set()


# ---------------------------------------------------------------- bad hosts


def hosts_to_exclude(folder: RunFolder, job: Mapping[str, str]) -> Iterator[str]:
    """Yield the bad hosts without which the job can still run, and print all with the reason.

    Other nodes are eligible if they are in the same partition, are up, and have the features and
    GPUs of a node that the job has now.
    """
    bad = bad_hosts(folder.event_log)
    if not bad:
        return
    text = run("sinfo", "-h", "-N", "-p", job.get("Partition", ""), "-o", "%N %t %f %G") or ""
    nodes = {name: (state, kind) for name, state, *kind in map(str.split, text.splitlines())}
    current = names_in(node_list(job, "NodeList"))
    excluded, requested = (names_in(node_list(job, f"{name}NodeList")) for name in ("Exc", "Req"))
    kinds = [kind for name, (_, kind) in nodes.items() if name in current]
    eligible = {
        name
        for name, (state, kind) in nodes.items()
        if kind in kinds and not state.startswith(UNUSABLE) and not state.endswith("*")
    } - excluded
    for host, reason in bad.items():
        if host not in nodes or host in excluded:
            continue
        if host in requested or len(eligible - {host}) < len(current):
            why = "--nodelist requests it" if host in requested else "too few other nodes are up"
            print(f"Bad host {host} ({reason}) is not excluded: {why}.", flush=True)
            continue
        print(f"Bad host {host}: {reason}.", flush=True)
        eligible.discard(host)
        yield host


def bad_hosts(event_log: Path) -> dict[str, str]:
    """Return the hosts at fault in recent launches and the reason, faults of hardware first."""
    launches: dict[str, dict[str, str]] = {}  # by launch, reason of the fault of each host
    hardware: dict[str, str] = {}
    for event in EventLog(event_log).read():
        hosts, reason = event.get("hosts"), str(event.get("reason")).split("\n")[0]
        is_fault = event.get("event") == "fault" and event.get("code") in FAULT_CODES
        if is_fault and isinstance(hosts, list) and event.get("launch") is not None:
            faults = launches.setdefault(str(event["launch"]), {})
            faults |= {str(host): reason for host in hosts}
    recent = [*launches.values()][-RECENT_LAUNCHES:]
    for reasons in recent:
        hardware |= {host: text for host, text in reasons.items() if is_hardware_fault(text)}
    counts = Counter(host for reasons in recent for host in reasons)
    repeated = {
        host: f"faults in {count} of the last {len(recent)} launches with faults"
        for host, count in counts.most_common()
        if count >= FAULTS
    }
    return hardware | {host: text for host, text in repeated.items() if host not in hardware}


# ---------------------------------------------------------------- progress


def run_folder(overrides: Sequence[str]) -> RunFolder | None:
    """Return the run folder of a command line of train.py, None if it is invalid."""
    try:
        return RunFolder(Path(compose_words(parse_options(overrides, "train")).run.dir))
    except Exception as error:
        print(f"Warning: the run folder is unknown ({error})", file=sys.stderr, flush=True)
        return None


def count_restart(folder: RunFolder | None, job_id: str, rule: Rule, restarts: int) -> Progress:
    """Return the progress of the run, and record a restart unless the limit is reached.

    Args:
        restarts: All restarts of the job, which count if those without progress are unknown.
    """
    if folder is None:
        return Progress(0, restarts)
    path = folder.path / "slurm" / "requeue.json"
    try:
        step = max(folder.committed_steps(), default=0)
        previous = read_state(path)
        same = previous.get("job") == job_id and step <= previous["step"]
        progress = Progress(step, previous["restarts"] if same else 0)
        if progress.restarts < rule.restarts:
            path.parent.mkdir(parents=True, exist_ok=True)
            state = {"job": job_id, "step": step, "restarts": progress.restarts + 1}
            write_atomically(path, json.dumps(state).encode())
    except (OSError, RunFolderError) as error:
        print(f"Warning: restarts cannot be counted ({error})", file=sys.stderr, flush=True)
        return Progress(0, restarts)
    return progress


def read_state(path: Path) -> dict[str, Any]:
    """Return the last recorded restart; {} if there is none, or the file is damaged."""
    if not path.is_file():
        return {}
    try:
        state = json.loads(path.read_bytes())
        if not all(type(state[key]) is int for key in ("step", "restarts")):
            raise TypeError
    except (ValueError, KeyError, TypeError, RecursionError):
        print(f"Warning: {path} is damaged; restarts are counted anew", file=sys.stderr, flush=True)
        return {}
    return dict(state)


if __name__ == "__main__":
    for number in (signal.SIGTERM, signal.SIGUSR1):  # SLURM sends SIGTERM to a job that it requeues
        signal.signal(number, signal.SIG_IGN)
    protect_streams(is_run=True)  # a full disk with the log of the job does not stop the job
    main(sys.argv[1:])
