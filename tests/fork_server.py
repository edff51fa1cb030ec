"""Run the programs in forks of a process that has already imported everything.

Importing torch and Lightning takes ten times as long as starting the smoke model, so `ForkServer`
starts `python fork_server.py` once, and each launch forks from it: one process as from the command
line, or the ranks of a run in torchrun's environment. Like torchrun, the server terminates the
remaining ranks when one fails. A `Fault` is injected into the fork before the program runs.
"""

import atexit
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from fault_injection import Fault, inject
from ports import free_port

TESTS = Path(__file__).parent
ROOT = TESTS.parent
PAUSE = TESTS / "pause"  # pauses training where it writes a text sample to a named pipe
OFFLINE = TESTS / "faults" / "offline"  # a stub of W&B whose server is unreachable
TIMEOUT_SECONDS = 600  # of one launch; reached only by a hang
# Modules that the programs import at start-up, including those imported inside functions.
PRELOADED = (
    *("train", "evaluate", "prepare", "convert", "generate", "plan"),
    *("torch", "lightning_fabric", "torch.distributed.checkpoint", "torch.utils.tensorboard"),
    *("pydantic.main", "pydantic.dataclasses"),
    *("model.llama", "parallel.parallelize", "resilience.launch", "data.stream"),
    *("checkpoint.restore", "checkpoint.saver", "resilience.loss_monitor", "resilience.watchdog"),
    *("training.console", "training.metrics", "training.throughput", "training.optimizer"),
    *(
        "training.inspection",
        "data.preparation.pipeline",
        "evaluation.held_out",
    ),
    *("evaluation.generation", "evaluation.inference", "formats.conversion", "formats.native"),
)


@dataclass
class Launch:
    """One launch of a program.

    Attributes:
        pids: Process id of each rank.
        stdout, stderr: File that each rank's output is redirected to.
        exit_codes: Exit code of each rank, or minus the signal that killed it; set by
            `ForkServer.wait`.
    """

    pids: list[int]
    stdout: list[Path]
    stderr: list[Path]
    exit_codes: dict[int, int] = field(default_factory=dict)

    def output(self, rank: int = 0) -> str:
        """Return a rank's standard output followed by its standard error."""
        return read(self.stdout[rank]) + read(self.stderr[rank])


class ForkServer:
    """Client of the server process. Runs one launch at a time."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="fork-server-")
        self._n_launches = 0
        self.launches: list[Launch] = []  # of the current test
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            cwd=ROOT,
            env={
                **os.environ,
                "OMP_NUM_THREADS": "1",
                "OPENBLAS_NUM_THREADS": "1",
                "PYTHONPATH": f"{OFFLINE}{os.pathsep}{PAUSE}",
            },
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def start(
        self,
        arguments: Sequence[str],
        world_size: int,
        *faults: Fault,
        terminate_on_failure: bool = True,
        torchrun: bool = True,
        program: str = "train.py",
    ) -> Launch:
        """Fork the ranks of a program and return without waiting for them.

        Args:
            terminate_on_failure: Terminate the remaining ranks when one fails, as torchrun does.
            torchrun: Set torchrun's environment variables. Without them, `world_size` must be 1.
        """
        return self._fork(
            [program, *arguments],
            world_size,
            faults=[asdict(fault) for fault in faults],
            terminate_on_failure=terminate_on_failure,
            torchrun=torchrun,
        )

    def wait(self, launch: Launch) -> list[int]:
        """Wait for all ranks and return their exit codes by rank (minus the signal if killed)."""
        codes = {int(rank): code for rank, code in self._response()["exit_codes"].items()}
        launch.exit_codes = codes
        return [codes[rank] for rank in sorted(codes)]

    def run(
        self,
        arguments: Sequence[str],
        world_size: int,
        *faults: Fault,
        terminate_on_failure: bool = True,
        program: str = "train.py",
    ) -> Launch:
        """Launch a program and wait for it."""
        launch = self.start(
            arguments,
            world_size,
            *faults,
            terminate_on_failure=terminate_on_failure,
            program=program,
        )
        self.wait(launch)
        return launch

    def run_program(
        self,
        arguments: Sequence[str],
        cwd: Path,
        environment: Mapping[str, str],
        world_size: int = 1,
    ) -> subprocess.CompletedProcess[str]:
        """Run `python ARGUMENTS`, under torchrun's environment if `world_size` is above 1."""
        launch = self._fork(
            arguments,
            world_size,
            cwd=str(cwd),
            environment=dict(environment),
            torchrun=world_size > 1,
        )
        codes = self.wait(launch)
        stdout, stderr = "".join(map(read, launch.stdout)), "".join(map(read, launch.stderr))
        code = next((code for code in codes if code), 0)
        return subprocess.CompletedProcess(list(arguments), code, stdout, stderr)

    def children(self) -> list[int]:
        """Return the ids of forked processes that still exist."""
        pid = self._process.pid
        listed = Path(f"/proc/{pid}/task/{pid}/children").read_text()
        return [int(child) for child in listed.split()]

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()
        self._folder.cleanup()

    def _fork(self, arguments: Sequence[str], world_size: int, **request: Any) -> Launch:
        self._n_launches += 1
        stem = f"{self._folder.name}/launch-{self._n_launches}-rank"
        stdout = [Path(f"{stem}-{rank}.out") for rank in range(world_size)]
        stderr = [path.with_suffix(".err") for path in stdout]
        for path in (*stdout, *stderr):
            path.touch()  # a test may read it before the rank has opened it
        files = list(zip(map(str, stdout), map(str, stderr), strict=True))
        assert self._process.stdin is not None
        request = {
            "arguments": list(arguments),
            "files": files,
            "port": free_port(),
            **request,
        }
        print(json.dumps(request), file=self._process.stdin, flush=True)
        launch = Launch(self._response()["pids"], stdout, stderr)
        self.launches.append(launch)
        return launch

    def _response(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the fork server has died"
        return json.loads(line)


def read(path: Path) -> str:
    """Read a file of process output, replacing invalid UTF-8."""
    return path.read_text(encoding="utf-8", errors="replace")


@cache
def shared() -> ForkServer:
    """Return the fork server of this test process."""
    return ForkServer()


# ---------------------------------------------------------------- in the server process


def main() -> None:
    """Import the programs, then serve launch requests from standard input until it closes."""
    libraries = [path for path in sys.path if path not in (str(OFFLINE), str(PAUSE), str(TESTS))]
    sys.path.insert(0, str(ROOT))
    for module in PRELOADED:
        importlib.import_module(module)
    assert threading.active_count() == 1, "a fork copies the calling thread only"
    defaults: dict[str, Any] = {
        "cwd": str(ROOT),
        "environment": {},
        "faults": [],
        "terminate_on_failure": True,
    }
    for line in sys.stdin:
        request = defaults | json.loads(line)
        pids = fork_ranks(request, libraries)
        print(json.dumps({"pids": pids}), flush=True)
        exit_codes = wait_for_ranks(pids, request["terminate_on_failure"])
        print(json.dumps({"exit_codes": exit_codes}), flush=True)


def fork_ranks(request: dict[str, Any], libraries: list[str]) -> list[int]:
    """Fork one process per rank and return their ids."""
    pids = []
    for rank in range(len(request["files"])):
        pid = os.fork()
        if pid == 0:
            run_rank(rank, request, libraries)
        pids.append(pid)
    return pids


def run_rank(rank: int, request: dict[str, Any], libraries: list[str]) -> None:
    """Run the program in this fork and exit."""
    for descriptor, path in enumerate(request["files"][rank], start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    if request["environment"]:
        os.environ.clear()
        os.environ.update(request["environment"])
    if request["torchrun"]:
        world_size = len(request["files"])
        variables = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "GROUP_RANK": 0,
            "WORLD_SIZE": world_size,
            "LOCAL_WORLD_SIZE": world_size,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": request["port"],
            "TORCHELASTIC_RUN_ID": "test",
            "TORCHELASTIC_MAX_RESTARTS": 0,
        }
        os.environ.update({key: str(value) for key, value in variables.items()})
    os.chdir(request["cwd"])
    for fault in (Fault(**values) for values in request["faults"]):
        if fault.rank == rank:
            inject(fault)
    program, *arguments = request["arguments"]
    paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path[:] = [str(Path(program).resolve().parent), *paths, *libraries]
    sys.argv = [program, *arguments]
    os._exit(run_as_main(program))  # skips the interpreter shutdown inherited from the server


def run_as_main(program: str) -> int:
    """Run a file as `__main__`, shut down as the interpreter would, and return the exit code."""
    code = 0
    try:
        runpy.run_path(program, run_name="__main__")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]  # joins non-daemon threads
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def wait_for_ranks(pids: list[int], terminate_on_failure: bool) -> dict[int, int]:
    """Wait for all ranks and return their exit codes by rank."""
    exit_codes: dict[int, int] = {}
    start, terminated = time.monotonic(), False
    while len(exit_codes) < len(pids):
        for rank, pid in enumerate(pids):
            if rank in exit_codes:
                continue
            exited, status = os.waitpid(pid, os.WNOHANG)
            if exited:
                exit_codes[rank] = os.waitstatus_to_exitcode(status)
            elif time.monotonic() - start > TIMEOUT_SECONDS:
                os.kill(pid, signal.SIGKILL)
        if terminate_on_failure and not terminated and any(exit_codes.values()):
            terminated = True
            for pid in (pid for rank, pid in enumerate(pids) if rank not in exit_codes):
                os.kill(pid, signal.SIGTERM)
        time.sleep(0.01)
    return exit_codes


if __name__ == "__main__":
    main()
