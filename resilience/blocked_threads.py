"""Threads that wait for a file system that does not answer, from Linux's /proc.

/proc is in memory: reading it never waits for a disk. A thread that waits for NFS, FUSE or another
remote file system is in uninterruptible sleep (D state), at the latest after SIGKILL, and its
process cannot exit before the file system answers.
"""

import os
import platform
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

# System calls on files by number, with the index of the argument that is a descriptor or, where
# the name ends in `*`, a path.
_CALLS = {
    "x86_64": {
        **{0: "read 0", 1: "write 0", 2: "open* 0", 3: "close 0", 4: "stat* 0", 5: "fstat 0"},
        **{6: "lstat* 0", 17: "pread 0", 18: "pwrite 0", 20: "writev 0", 21: "access* 0"},
        **{73: "flock 0", 74: "fsync 0", 75: "fdatasync 0", 77: "ftruncate 0", 82: "rename* 0"},
        **{83: "mkdir* 0", 84: "rmdir* 0", 87: "unlink* 0", 137: "statfs* 0", 217: "getdents 0"},
        **{257: "open* 1", 258: "mkdir* 1", 262: "stat* 1", 263: "unlink* 1", 264: "rename* 1"},
        **{280: "utimens 0", 316: "rename* 1", 332: "statx* 1"},
    },
    "aarch64": {
        **{32: "flock 0", 34: "mkdir* 1", 35: "unlink* 1", 38: "rename* 1", 43: "statfs* 0"},
        **{46: "ftruncate 0", 56: "open* 1", 57: "close 0", 61: "getdents 0", 63: "read 0"},
        **{64: "write 0", 66: "writev 0", 67: "pread 0", 68: "pwrite 0", 79: "stat* 1"},
        **{80: "fstat 0", 82: "fsync 0", 83: "fdatasync 0", 88: "utimens 0", 276: "rename* 1"},
        **{291: "statx* 1"},
    },
}
_NO_DISKS = ("/dev/", "/proc/", "/sys/")
_PATH_BYTES = 4096


@dataclass(frozen=True)
class BlockedThread:
    """A thread that waits in the kernel.

    Attributes:
        uninterruptible: Whether it is in D state now.
        function: Of the kernel; empty if unknown.
        file: System call, path and mount; empty if it waits for something else or this is unknown.
    """

    name: str
    uninterruptible: bool
    function: str
    file: str

    def __str__(self) -> str:
        return ", ".join(
            filter(None, (f"{self.name} in {self.function or 'the kernel'}", self.file))
        )


def blocked_threads(pid: int | None = None) -> list[BlockedThread]:
    """Return the threads that are in D state or wait for a file, main thread first.

    Args:
        pid: A process that was killed, all of whose sleeping threads therefore wait for a file.
            None for this one, whose threads have names; the calling thread is left out.
    """
    names = {each.native_id: each.name for each in threading.enumerate()} if pid is None else {}
    process = Path(f"/proc/{pid or os.getpid()}")
    found = []
    with suppress(OSError):  # not Linux, or the process has exited
        for number in sorted(map(int, os.listdir(process / "task"))):
            if pid is None and number == threading.get_native_id():
                continue
            with suppress(OSError, ValueError):  # the thread has exited
                thread = _blocked_thread(process, number, names.get(number, f"thread {number}"))
                if thread is not None and (pid or thread.uninterruptible or thread.file):
                    found.append(thread)
    return found


def describe(process: str, threads: list[BlockedThread]) -> str:
    """Return one line about the blocked threads of a process; empty without any."""
    if not threads:
        return ""
    stuck = [thread for thread in threads if thread.uninterruptible] or threads
    first, more = stuck[0], len(stuck) - 1
    rest = f", and {more} more thread{'s' * (more > 1)}" if more else ""
    if first.uninterruptible:
        text = f"is in uninterruptible sleep (D state): {first}{rest}"
        return f"{process} {text}; it exits when that call returns, not on SIGKILL"
    text = f"waits for a file system: {first}{rest}"
    return f"{process} {text}; until that call returns, it may stay in D state after its exit"


def _blocked_thread(process: Path, number: int, name: str) -> BlockedThread | None:
    task = process / "task" / str(number)
    state = (task / "stat").read_text().rpartition(")")[2].split()[0]
    if state not in "SD":
        return None
    file = function = ""
    with suppress(OSError):  # not permitted
        file = _file_call(process, (task / "syscall").read_text().split())
        function = (task / "wchan").read_text().strip("0 \n")
    return BlockedThread(name, state == "D", function, file)


def _file_call(process: Path, call: list[str]) -> str:
    """Return system call, file and mount of a line of /proc/PID/task/TID/syscall, or ''."""
    if call[0] == "running":
        return ""
    if call[0] == "-1":  # asleep outside of a system call
        return "page fault in a mapped file"
    name, _, index = _CALLS.get(platform.machine(), {}).get(int(call[0]), "").partition(" ")
    if not name:
        return ""
    path = _string_at(process, int(call[1 + int(index)], 16)) if name.endswith("*") else ""
    if not path:  # also of `fstat`, in newer versions of glibc
        path = _target(process, int(call[1], 16))
        if not path.startswith("/"):  # a pipe or a socket
            return ""
    if path.startswith(_NO_DISKS):
        return ""
    mounts = [each for each in _mounts(process) if _is_below(path, each[0])]
    if not mounts:  # a relative path
        return f"{name.strip('*')} {path}"
    point, kind = max(mounts, key=lambda each: len(each[0]))
    return f"{name.strip('*')} {path} ({kind} mounted on {point})"


def _target(process: Path, descriptor: int) -> str:
    return os.readlink(process / "fd" / str(descriptor))  # does not look the file up


def _string_at(process: Path, address: int) -> str:
    with open(process / "mem", "rb", buffering=0) as memory:  # unlike a pointer, cannot crash
        memory.seek(address)
        return os.fsdecode(memory.read(_PATH_BYTES).split(b"\0")[0])


def _mounts(process: Path) -> Iterator[tuple[str, str]]:
    """Yield mount point and type of each mounted file system."""
    for line in (process / "mounts").read_text(errors="replace").splitlines():
        _, point, kind, *_ = line.split(" ")
        yield point.replace("\\040", " "), kind


def _is_below(path: str, folder: str) -> bool:
    return folder == "/" or path == folder or path.startswith(f"{folder}/")
