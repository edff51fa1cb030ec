"""Real processes of the real programs, forked from one that has imported all of them.

Importing torch and lightning takes ten times as long as a start of the smoke model, so a fault test
of fifty starts needs them imported once: `python zygote.py` imports, forks the ranks of a start
with torchrun's environment, and tells how each ended. Like torchrun it ends the others when one has
failed. A fault is brought about inside the fork, by a `Plan`; the program knows nothing of it.
"""

import atexit
import errno
import importlib
import itertools
import json
import os
import re
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
OFFLINE = Path(__file__).parent / "faults" / "offline"  # a W&B that reaches nobody
DEADLINE = 600  # seconds for a start to end: only a hanging one gets there
WRITES = os.O_WRONLY | os.O_RDWR
# What changes a file system, as audit events tell before it happens: where they have the
# descriptor of the folder that a name lies in.
CHANGES = {"os.rename": 2, "os.remove": 1, "os.mkdir": 2, "os.rmdir": 1}
CHANGES |= {"os.truncate": 0, "os.fsync": 0}  # 0: the file itself may be a descriptor
A_CHANGE = r"(?!read ).*"  # whatever `use_of` tells, but for reading


@dataclass(frozen=True)
class Plan:
    """A fault: on `rank`, when a function is called or a file is used below `folder`, …

    Args:
        call: Which such call or use it is, counted from 1.
        do: `SIGKILL` or another signal to itself, `nan` for a result that is not finite,
            `ENOSPC` or another error of the system, `Name: text` for another exception, before
            the call; `tell` for a line of output alone.
        at: `package.module.function` or `package.module.Class.method`; empty for uses of files.
        folder: Below which uses of files are counted.
        use: Which ones as `use_of` tells them, a regular expression; any change by default.
        until: The last such call, `call` alone by default.
    """

    rank: int
    call: int
    do: str
    at: str = ""
    folder: str = ""
    use: str = A_CHANGE
    until: int | None = None


@dataclass
class Start:
    """One start of a run: its ranks' processes, and how they ended."""

    pids: list[int]
    outputs: list[Path]
    codes: dict[int, int] = field(default_factory=dict)

    def told(self, rank: int = 0) -> str:
        """What a rank printed."""
        return self.outputs[rank].read_text(encoding="utf-8", errors="replace")


class Zygote:
    """The process that forks, and the starts that it is asked for, one at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
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
        program: str = "train.py",
    ) -> Start:
        """Begins a program with these arguments on so many ranks; returns when they are forked.

        Args:
            alone: Nobody ends the ranks that are left when one has failed: they must see to it.
        """
        self._count += 1
        outputs = [self.folder / f"start-{self._count}-rank-{rank}.txt" for rank in range(ranks)]
        for path in outputs:
            path.touch()
        order = {
            "program": program,
            "arguments": list(arguments),
            "outputs": [str(path) for path in outputs],
            "plans": [asdict(plan) for plan in plans],
            "alone": alone,
        }
        assert self._process.stdin is not None
        print(json.dumps(order), file=self._process.stdin, flush=True)
        return Start(self._answer()["pids"], outputs)

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

    def children(self) -> list[int]:
        """What it has forked and what lives on."""
        pid = self._process.pid
        listed = Path(f"/proc/{pid}/task/{pid}/children").read_text()
        return [int(child) for child in listed.split()]

    def close(self) -> None:
        """Ends it; what it has forked ends with it."""
        self._process.kill()
        self._process.communicate()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the zygote has died"
        return json.loads(line)


# ---------------------------------------------------------------- inside the zygote


def main() -> None:
    """Imports, then forks what it is asked for until its input ends."""
    for module in ("train", "torch", "lightning.fabric", "torch.distributed.checkpoint"):
        importlib.import_module(module)
    for module in ("model.llama", "parallel.parallelize", "program.launch", "data.stream"):
        importlib.import_module(module)
    for module in ("training.checkpoint.restoring", "training.console", "training.numerics"):
        importlib.import_module(module)
    for module in ("training.metrics", "training.optimizer", "evaluation.sampling", "pydantic"):
        importlib.import_module(module)
    assert threading.active_count() == 1, "a fork takes none but this thread along"
    for line in sys.stdin:
        order = json.loads(line)
        pids = fork_ranks(order)
        print(json.dumps({"pids": pids}), flush=True)
        print(json.dumps({"codes": ends_of(pids, order["alone"])}), flush=True)


def fork_ranks(order: dict[str, Any]) -> list[int]:
    """The processes of a start."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    size, pids = len(order["outputs"]), []
    for rank, output in enumerate(order["outputs"]):
        pid = os.fork()
        if pid == 0:
            run_rank(rank, size, port, output, order)
        pids.append(pid)
    return pids


def run_rank(rank: int, size: int, port: int, output: str, order: dict[str, Any]) -> None:
    """The program in this fork, which ends with it."""
    out = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test"}
    others = {"GROUP_RANK": 0, "TORCHELASTIC_MAX_RESTARTS": 0}
    os.environ.update({key: str(value) for key, value in (ranks | meeting | others).items()})
    for plan in (Plan(**values) for values in order["plans"]):
        if plan.rank == rank:
            bring_about(plan)
    sys.argv = [order["program"], *order["arguments"]]
    try:
        runpy.run_path(order["program"], run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # what Python's own end would do besides is the zygote's


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


# ---------------------------------------------------------------- inside a rank


def bring_about(plan: Plan) -> None:
    """Lets the fault happen when its time comes."""
    counter = itertools.count(1)
    last = plan.until or plan.call

    def now() -> bool:
        return plan.call <= next(counter) <= last

    if plan.at:
        owner, name = find(plan.at)
        original = getattr(owner, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            due = now()
            if due and plan.do != "nan":
                do(plan.do)
            result = original(*args, **kwargs)
            return result * float("nan") if due and plan.do == "nan" else result

        setattr(owner, name, wrapped)
        return

    def on_event(event: str, args: tuple[Any, ...]) -> None:
        told = use_of(event, args, plan.folder)
        if told is not None and re.fullmatch(plan.use, told) and now():
            os.write(1, f"fault: {told}\n".encode())
            do(plan.do)

    fsync = os.fsync

    def audited_fsync(file: Any) -> None:
        on_event("os.fsync", (file,))
        fsync(file)

    setattr(os, "fsync", audited_fsync)  # noqa: B010  # the one change that Python does not audit
    sys.addaudithook(on_event)


def use_of(event: str, args: tuple[Any, ...], folder: str) -> str | None:
    """What an audit event tells of a file below a folder, as `write .step/manifest.json`; or None.

    Numbers of steps and attempts are left out: the same use is told alike in every start.
    """
    if event == "open":
        path, _, flags = args
        name, descriptor = ("write" if flags & WRITES else "read"), -1
    elif event in CHANGES:
        path, name = args[0], event.removeprefix("os.")
        # `shutil.rmtree` names what is in an open folder.
        place = CHANGES[event]
        descriptor = args[place] if place else -1
    else:
        return None
    if isinstance(path, int):
        descriptor, path = path, ""
    if descriptor >= 0:
        path = os.path.join(os.readlink(f"/proc/self/fd/{descriptor}"), os.fsdecode(path))
    path = os.path.normpath(os.fsdecode(path))
    if path != folder and not path.startswith(folder + os.sep):
        return None
    return f"{name} {re.sub('-[0-9a-f]{8}', '', os.path.relpath(path, folder))}"


def find(name: str) -> tuple[Any, str]:
    """Where a dotted name lies: a module or class, and the last part."""
    *path, last = name.split(".")
    for depth in range(len(path), 0, -1):
        try:
            owner = importlib.import_module(".".join(path[:depth]))
        except ModuleNotFoundError:
            continue
        for part in path[depth:]:
            owner = getattr(owner, part)
        return owner, last
    raise ModuleNotFoundError(name)


def do(what: str) -> None:
    """The fault itself."""
    if what.startswith("SIG"):
        os.kill(os.getpid(), signal.Signals[what])
        return
    if what == "tell":
        return
    if hasattr(errno, what):
        raise OSError(getattr(errno, what), os.strerror(getattr(errno, what)))
    kind, _, text = what.partition(": ")
    raise {"OSError": OSError, "RuntimeError": RuntimeError}[kind](text)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
