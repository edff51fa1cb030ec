"""Real processes of the real programs, forked from one that has imported all of it.

Importing torch and lightning takes ten times as long as a start of the smoke model, so a test of
fifty starts needs them imported once: `python zygote.py` imports, forks what it is asked for, and
tells how it ended. That is a program as a person types it, or the ranks of one in torchrun's
environment; like torchrun it ends the others when one has failed. A fault is brought about inside
the fork, by a `Plan`.
"""

import atexit
import importlib
import json
import os
import runpy
import signal
import socket
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

from plans import Plan, bring_about

HERE = Path(__file__).parent
ROOT = HERE.parent
OFFLINE = HERE / "faults" / "offline"  # a W&B that reaches nobody
DEADLINE = 600  # seconds for a start to end: only a hanging one gets there
# What the programs import when they start, some of it inside functions.
IMPORTED = (
    *("train", "evaluate", "prepare", "convert", "generate"),
    *("torch", "lightning.fabric", "torch.distributed.checkpoint"),
    *("model.llama", "parallel.parallelize", "parallel.launch", "data.stream"),
    *("pydantic.main", "pydantic.dataclasses", "torch.utils.tensorboard"),
    *("checkpoint.restore", "checkpoint.saver", "training.console"),
    *("training.metrics", "resilience.loss_monitor", "training.optimizer", "resilience.watchdog"),
    *("evaluation.perplexity", "evaluation.sampling", "training.inspection", "data.prepare"),
    *("formats.conversion", "formats.native", "evaluation.generation", "evaluation.inference"),
)


@dataclass
class Start:
    """One start of a program: its processes, and how they ended."""

    pids: list[int]
    outputs: list[Path]
    errors: list[Path]
    codes: dict[int, int] = field(default_factory=dict)

    def told(self, rank: int = 0) -> str:
        """What a rank printed: on standard output, then on standard error."""
        return read(self.outputs[rank]) + read(self.errors[rank])


class Zygote:
    """The process that forks, and the starts that it is asked for, one at a time."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="zygote-")
        self._count = 0
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            cwd=ROOT,
            env={
                **os.environ,
                "OMP_NUM_THREADS": "1",
                "OPENBLAS_NUM_THREADS": "1",
                "PYTHONPATH": str(OFFLINE),
            },
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def start(
        self,
        arguments: Sequence[str],
        ranks: int,
        *plans: Plan,
        alone: bool = False,
        typed: bool = False,
        program: str = "train.py",
    ) -> Start:
        """Begins a program with these arguments on so many ranks; returns when they are forked.

        Args:
            alone: Nobody ends the ranks that are left when one has failed: they must see to it.
            typed: The one rank is started as a person does it.
        """
        order = {"plans": [asdict(plan) for plan in plans], "alone": alone, "launched": not typed}
        return self._begin([program, *arguments], ranks, apart=typed, **order)

    def wait(self, start: Start) -> list[int]:
        """How each rank ended, as `subprocess` has it: an exit code, or minus a signal."""
        codes = {int(rank): code for rank, code in self._answer()["codes"].items()}
        start.codes = codes
        return [codes[rank] for rank in sorted(codes)]

    def run(
        self,
        arguments: Sequence[str],
        ranks: int,
        *plans: Plan,
        alone: bool = False,
        program: str = "train.py",
    ) -> Start:
        """A start from its beginning to its end."""
        start = self.start(arguments, ranks, *plans, alone=alone, program=program)
        self.wait(start)
        return start

    def run_program(
        self, words: Sequence[str], cwd: Path, environment: Mapping[str, str], ranks: int = 1
    ) -> subprocess.CompletedProcess[str]:
        """`python WORDS` from its beginning to its end; `ranks` of it as torchrun starts them."""
        order = {"cwd": str(cwd), "environment": dict(environment), "launched": ranks > 1}
        start = self._begin(words, ranks, **order)
        codes = self.wait(start)
        out, errors = "".join(map(read, start.outputs)), "".join(map(read, start.errors))
        code = next((code for code in codes if code), 0)
        return subprocess.CompletedProcess(list(words), code, out, errors)

    def children(self) -> list[int]:
        """What it has forked and what lives on."""
        pid = self._process.pid
        listed = Path(f"/proc/{pid}/task/{pid}/children").read_text()
        return [int(child) for child in listed.split()]

    def close(self) -> None:
        """Ends it; what it has forked ends with it."""
        self._process.kill()
        self._process.communicate()
        self._folder.cleanup()

    def _begin(self, words: Sequence[str], ranks: int, **order: Any) -> Start:
        """Asks for the processes of a start."""
        self._count += 1
        stem = f"{self._folder.name}/start-{self._count}-rank"
        outputs = [Path(f"{stem}-{rank}.txt") for rank in range(ranks)]
        errors = [path.with_suffix(".error.txt") for path in outputs]
        for path in (*outputs, *errors):
            path.touch()
        for path in (*outputs, *errors):
            path.touch()  # who reads at once finds it
        files = list(zip(map(str, outputs), map(str, errors), strict=True))
        assert self._process.stdin is not None
        order = {"words": list(words), "files": files, **order}
        print(json.dumps(order), file=self._process.stdin, flush=True)
        return Start(self._answer()["pids"], outputs, errors)

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the zygote has died"
        return json.loads(line)


def read(path: Path) -> str:
    """What a process has printed into a file, whatever it was."""
    return path.read_text(encoding="utf-8", errors="replace")


@cache
def shared() -> Zygote:
    """The one of this test process."""
    return Zygote()


# ---------------------------------------------------------------- inside the zygote


def main() -> None:
    """Imports, then forks what it is asked for until its input ends."""
    libraries = [path for path in sys.path if path not in (str(OFFLINE), str(HERE))]
    sys.path.insert(0, str(ROOT))
    for module in IMPORTED:
        importlib.import_module(module)
    assert threading.active_count() == 1, "a fork takes none but this thread along"
    for line in sys.stdin:
        order: dict[str, Any] = {"cwd": str(ROOT), "environment": {}, "plans": [], "alone": False}
        order |= json.loads(line)
        pids = fork_ranks(order, libraries)
        print(json.dumps({"pids": pids}), flush=True)
        print(json.dumps({"codes": ends_of(pids, order["alone"])}), flush=True)


def fork_ranks(order: dict[str, Any], libraries: list[str]) -> list[int]:
    """The processes of a start."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    pids = []
    for rank in range(len(order["files"])):
        pid = os.fork()
        if pid == 0:
            run_rank(rank, port, order, libraries)
        pids.append(pid)
    return pids


def run_rank(rank: int, port: int, order: dict[str, Any], libraries: list[str]) -> None:
    """The program in this fork, which ends with it."""
    for number, path in enumerate(order["files"][rank], start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    if order["environment"]:
        os.environ.clear()
        os.environ.update(order["environment"])
    if order["launched"]:
        size = len(order["files"])
        ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test"}
        others = {"GROUP_RANK": 0, "TORCHELASTIC_MAX_RESTARTS": 0}
        os.environ.update({key: str(value) for key, value in (ranks | meeting | others).items()})
    os.chdir(order["cwd"])
    for plan in (Plan(**values) for values in order["plans"]):
        if plan.rank == rank:
            bring_about(plan)
    program, *arguments = order["words"]
    paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path[:] = [str(Path(program).resolve().parent), *paths, *libraries]
    sys.argv = [program, *arguments]
    os._exit(code_of(program))  # what Python's own end would do besides is the zygote's


def code_of(program: str) -> int:
    """What the program in a file ends with; it is told as Python tells it."""
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
    threading._shutdown()  # type: ignore[attr-defined]  # waits for threads as Python's end does
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def ends_of(pids: list[int], alone: bool) -> dict[int, int]:
    """Waits for all ranks; those that are left when one fails are ended as torchrun ends them."""
    codes: dict[int, int] = {}
    begin, failed = time.monotonic(), 0.0
    while len(codes) < len(pids):
        for rank, pid in enumerate(pids):
            if rank in codes:
                continue
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                codes[rank] = os.waitstatus_to_exitcode(status)
            elif time.monotonic() - begin > DEADLINE:
                os.kill(pid, signal.SIGKILL)
        if not alone and not failed and any(codes.values()):
            failed = time.monotonic()
            for pid in (pid for rank, pid in enumerate(pids) if rank not in codes):
                os.kill(pid, signal.SIGTERM)
        time.sleep(0.01)
    return codes


if __name__ == "__main__":
    main()
