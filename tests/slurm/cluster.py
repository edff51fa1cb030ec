"""A SLURM cluster of two nodes on this machine.

Runs munged, slurmctld and one slurmd per node on free ports, in a temporary folder, with a separate
key and configuration (`SLURM_CONF`). A cluster that the machine belongs to is not affected. Both
nodes are this machine under different names.
"""

import contextlib
import getpass
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from ports import free_port

COMMANDS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel")
NODES = ("n1", "n2")
TASKS_PER_NODE = 2
DEADLINE = 300  # seconds for something that takes a few; reached only by a hang

CONFIGURATION = """
ClusterName=llamesh
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=1
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdSpoolDir={folder}/spool-%n
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdLogFile={folder}/slurmd-%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SwitchType=switch/none
JobRequeue=1
ReturnToService=2
KillWait=30
SlurmdTimeout=10
MessageTimeout=10
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=2,batch_sched_delay=0,sched_min_interval=0
{nodes}
PartitionName=batch Nodes=n1,n2 Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=20
PartitionName=urgent Nodes=n1,n2 PriorityTier=2 PreemptMode=OFF
"""


def missing_commands() -> list[str]:
    """Return the SLURM programs that are not installed."""
    return [name for name in COMMANDS if shutil.which(name, path=_path()) is None]


def wait_for(condition: Callable[[], Any], description: str) -> Any:
    """Poll until the condition holds and return its value."""
    end = time.monotonic() + DEADLINE
    while not (value := condition()):
        assert time.monotonic() < end, f"timed out after {DEADLINE} s waiting for {description}"
        time.sleep(0.2)
    return value


class Cluster:
    """A running cluster; its commands need the variables in `environment`."""

    def __init__(self) -> None:
        # Not pytest's folder: a socket path is limited to 107 characters, and munged requires that
        # every user can reach it.
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-"))
        self.folder.chmod(0o755)
        self.environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_"))},
            "PATH": _path(),
            "SLURM_CONF": str(self.folder / "slurm.conf"),
            "MASTER_ADDR": "127.0.0.1",  # the node names cannot be resolved outside SLURM
            "OMP_NUM_THREADS": "1",
            "LLAMESH_PYTHON": sys.executable,  # there need not be a .venv
            "PYTHONPATH": str(Path(__file__).parents[1] / "pause"),  # a sample to a pipe waits
        }
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        """Start every daemon and wait until both nodes are idle."""
        ports = [free_port() for _ in range(1 + len(NODES))]
        nodes = "\n".join(
            f"NodeName={name} NodeHostname={socket.gethostname()} NodeAddr=127.0.0.1 "
            f"Port={port} CPUs={TASKS_PER_NODE} RealMemory=1000 State=UNKNOWN"
            for name, port in zip(NODES, ports[1:], strict=True)
        )
        (self.folder / "slurm.conf").write_text(
            CONFIGURATION.format(
                host=socket.gethostname(),
                controller=ports[0],
                user=getpass.getuser(),
                folder=self.folder,
                nodes=nodes,
            )
        )
        (self.folder / "state").mkdir()
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        files = {"key-file": key.name, "socket": "munge.socket", "pid-file": "munge.pid"}
        files |= {"log-file": "munge.log", "seed-file": "munge.seed"}
        paths = [f"--{name}={self.folder / file}" for name, file in files.items()]
        self._daemon("munged", "--foreground", "--force", *paths)
        wait_for((self.folder / "munge.socket").exists, "munged")
        self._daemon("slurmctld", "-D", "-c")
        for name in NODES:
            self.start_node(name)
        wait_for(lambda: self.states() == dict.fromkeys(NODES, "idle"), "two idle nodes")

    def start_node(self, name: str) -> None:
        """Start the slurmd of a node."""
        # Inherited by all processes of the node, so that `kill_node` finds them.
        self._daemon(f"slurmd-{name}", "-D", "-N", name, SLURMD_NODENAME=name)

    def kill_node(self, name: str) -> None:
        """Kill a node's daemon and all its processes, as a power failure would."""
        daemon = self.daemons.pop(f"slurmd-{name}")
        for pid in _processes(f"SLURMD_NODENAME={name}", self.folder):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        daemon.kill()
        daemon.wait()

    def kill_task(self, rank: int) -> None:
        """Kill the process of a task, as the kernel does when the host is out of memory."""
        for pid in _processes(f"SLURM_PROCID={rank}", self.folder):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def states(self) -> dict[str, str]:
        """Return the state of every node."""
        done = self.run("sinfo", "-h", "-N", "-p", "batch", "-o", "%N %t", check=False)
        return dict(line.split() for line in done.stdout.splitlines())

    def run(
        self, *command: str, check: bool = True, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """Run a SLURM command from the checkout and wait for it."""
        done = subprocess.run(
            command,
            cwd=Path(__file__).parents[2],
            env={**self.environment, **environment},
            capture_output=True,
            text=True,
            timeout=DEADLINE,
            check=False,
        )
        if check:
            assert done.returncode == 0, done.stdout + done.stderr
        return done

    def submit(self, *arguments: str) -> str:
        """Run `sbatch` and return the job ID."""
        return self.run("sbatch", "--parsable", *arguments).stdout.strip()

    def job(self, number: str) -> dict[str, str]:
        """Return the fields of `scontrol show job`."""
        text = self.run("scontrol", "show", "job", "-o", number).stdout
        return dict(field.split("=", 1) for field in text.split() if "=" in field)

    def wait_for_state(self, number: str, *states: str) -> dict[str, str]:
        """Poll until a job is in one of the states; fail if it ends in another one."""
        ends = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED"}

        def reached() -> dict[str, str] | None:
            job = self.job(number)
            # A requeued job passes through such states while its processes are terminated.
            done = job["JobState"] in ends - {*states} and job["Requeue"] == "0"
            assert not done, f"job {number} is {job['JobState']}"
            return job if job["JobState"] in states else None

        return wait_for(reached, f"job {number} to be {' or '.join(states)}")

    def start_requeued(self, number: str, restarts: int) -> None:
        """Shorten the delay before SLURM restarts a requeued job, and wait until it runs."""

        def runs() -> bool:
            for node, state in self.states().items():
                # SLURM drains a node that is slow to terminate the job, and a node that was down
                # may not return by itself. Both need an administrator.
                if "dr" in state or "down" in state:
                    self.run("scontrol", "update", f"nodename={node}", "state=resume", check=False)
            job = self.job(number)
            if job["JobState"] == "PENDING" and job.get("Restarts") == str(restarts):
                # SLURM sets the delay once the job's processes are gone. It revokes their
                # credential and any created in the same second, so keep a few seconds.
                eligible = job.get("EligibleTime", "Unknown")
                later = datetime.now() + timedelta(seconds=10)
                if eligible != "Unknown" and datetime.fromisoformat(eligible) > later:
                    command = ("scontrol", "update", f"jobid={number}", "starttime=now+4")
                    self.run(*command, check=False)
            assert job["JobState"] != "FAILED", job
            return job["JobState"] == "RUNNING" and job.get("Restarts") == str(restarts)

        wait_for(runs, f"job {number} to run again")

    def stop(self) -> None:
        """Kill every daemon and every process of every job."""
        for daemon in self.daemons.values():
            daemon.kill()
            daemon.wait()
        for pid in _processes(f"SLURM_CONF={self.folder}/slurm.conf", self.folder):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _daemon(self, name: str, *arguments: str, **environment: str) -> None:
        log = (self.folder / f"{name}.out").open("ab")
        self.daemons[name] = subprocess.Popen(
            # The kernel kills the daemon when this process dies for any reason.
            ["setpriv", "--pdeathsig", "KILL", name.partition("-")[0], *arguments],
            env={**self.environment, **environment},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        log.close()


def _path() -> str:
    """Return PATH with sbin, which contains the daemons and may be missing from it."""
    return f"{os.environ['PATH']}:/usr/sbin:/sbin"


def _processes(variable: str, folder: Path) -> list[int]:
    """Return the processes of this cluster that have a variable in their environment."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            environment = (process / "environ").read_bytes().split(b"\0")
            ours = f"SLURM_CONF={folder}/slurm.conf".encode() in environment
            if ours and variable.encode() in environment and int(process.name) != os.getpid():
                found.append(int(process.name))
    return found
