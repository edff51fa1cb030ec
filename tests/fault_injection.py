"""Faults injected into a process that runs an unmodified program.

A fault triggers on the n-th call of a function, or on the n-th file-system operation in a folder as
reported by Python's audit events.
"""

import errno
import importlib
import itertools
import os
import re
import signal
import sys
from dataclasses import dataclass
from typing import Any

WRITE_FLAGS = os.O_WRONLY | os.O_RDWR
# Audit events that change the file system, with the index of the argument that holds the descriptor
# of the containing folder; 0: the first argument may itself be a descriptor.
CHANGE_EVENTS = {"os.rename": 2, "os.remove": 1, "os.mkdir": 2, "os.rmdir": 1}
CHANGE_EVENTS |= {"os.truncate": 0, "os.fsync": 0}
ANY_CHANGE = r"(?!read ).*"  # every operation that `describe` returns except reads


@dataclass(frozen=True)
class Fault:
    """A fault on one rank.

    Attributes:
        call: Matching call or operation that triggers the fault, counted from 1.
        action: What happens: `SIGKILL` or another signal to the process itself; `nan` multiplies
            the function's result by NaN; `flip`, for the step of an optimizer, then flips a bit of
            a weight; `ENOSPC` or another errno raises OSError, `Name: text`
            another exception, before the call; `print` only prints the operation.
        function: `package.module.function` or `package.module.Class.method`; empty for operations
            on files.
        folder: Folder whose operations are counted.
        event: Regular expression that an operation must match in full, as returned by `describe`.
        last_call: Last call that triggers the fault. Default: `call`.
    """

    rank: int
    call: int
    action: str
    function: str = ""
    folder: str = ""
    event: str = ANY_CHANGE
    last_call: int | None = None


def inject(fault: Fault) -> None:
    """Install a fault in this process."""
    counter = itertools.count(1)
    last_call = fault.last_call or fault.call

    def is_due() -> bool:
        return fault.call <= next(counter) <= last_call

    if fault.function:
        owner, name = resolve(fault.function)
        original = getattr(owner, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            due = is_due()
            if due and fault.action not in ("nan", "flip"):
                trigger(fault.action)
            result = original(*args, **kwargs)
            if due and fault.action == "flip":
                flip_bit(args[0])
            return result * float("nan") if due and fault.action == "nan" else result

        setattr(owner, name, wrapped)
        return

    def on_event(event: str, args: tuple[Any, ...]) -> None:
        operation = describe(event, args, fault.folder)
        if operation is not None and re.fullmatch(fault.event, operation) and is_due():
            os.write(1, f"fault: {operation}\n".encode())
            trigger(fault.action)

    fsync = os.fsync

    def audited_fsync(file: Any) -> None:
        on_event("os.fsync", (file,))
        fsync(file)

    setattr(os, "fsync", audited_fsync)  # noqa: B010  # Python does not audit fsync
    sys.addaudithook(on_event)


def describe(event: str, args: tuple[Any, ...], folder: str) -> str | None:
    """Return a file operation in `folder` as `write .step/manifest.json`, or None for others.

    Step and attempt numbers are removed, so the same operation has the same text in every launch.
    """
    if event == "open":
        path, _, flags = args
        name, descriptor = ("write" if flags & WRITE_FLAGS else "read"), -1
    elif event in CHANGE_EVENTS:
        path, name = args[0], event.removeprefix("os.")
        # `shutil.rmtree` passes names relative to the descriptor of an open folder.
        index = CHANGE_EVENTS[event]
        descriptor = args[index] if index else -1
    else:
        return None
    if isinstance(path, int):
        descriptor, path = path, ""
    if descriptor >= 0:
        path = os.path.join(os.readlink(f"/proc/self/fd/{descriptor}"), os.fsdecode(path))
    path = os.path.normpath(os.fsdecode(path))
    if path != folder and not path.startswith(folder + os.sep):
        return None
    relative = re.sub(
        r"-[0-9a-f]{8}|\.[0-9a-f]{32}\.[0-9a-f]{8}", "", os.path.relpath(path, folder)
    )
    return f"{name} {relative}"


def resolve(dotted_name: str) -> tuple[Any, str]:
    """Import the module or class that owns a dotted name; return it and the attribute's name."""
    *path, last = dotted_name.split(".")
    for depth in range(len(path), 0, -1):
        try:
            owner = importlib.import_module(".".join(path[:depth]))
        except ModuleNotFoundError:
            continue
        for part in path[depth:]:
            owner = getattr(owner, part)
        return owner, last
    raise ModuleNotFoundError(dotted_name)


def flip_bit(optimizer: Any) -> None:
    """Change one bit of the first weight of an optimizer on this rank."""
    torch = importlib.import_module("torch")
    weight = optimizer.param_groups[0]["params"][0].to_local().detach()
    weight.view(torch.int32).view(-1)[0] ^= 1 << 20


def trigger(action: str) -> None:
    """Perform an action other than `nan` and `flip`."""
    if action.startswith("SIG"):
        os.kill(os.getpid(), signal.Signals[action])
        return
    if action == "print":
        return
    if hasattr(errno, action):
        raise OSError(getattr(errno, action), os.strerror(getattr(errno, action)))
    kind, _, text = action.partition(": ")
    if kind == "OutOfMemoryError":
        raise importlib.import_module("torch").OutOfMemoryError(text)
    raise {"OSError": OSError, "RuntimeError": RuntimeError}[kind](text)
