"""Faults that a test brings about inside a process of a real program, which knows nothing of it."""

import errno
import importlib
import itertools
import os
import re
import signal
import sys
from dataclasses import dataclass
from typing import Any

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
