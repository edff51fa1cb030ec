"""One run at a time in a folder: the lock that its first process holds until it ends.

The kernel's lock on `<run>/lock` goes with the process however that dies. It may not reach beyond
one machine, though (local locks on NFS and Lustre), and some file systems have none. So the file
also tells who holds it, and a thread touches it every few seconds: who gets the lock and finds the
name of another machine watches whether the file is still touched. No clock of two machines is
compared. A holder whose name was replaced meanwhile, having slept, ends at once.
"""

import atexit
import errno
import fcntl
import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from resilience.exit_codes import ExitCode
from resilience.run_folder import RunFolder, RunFolderError

FIRST_BEAT_SECONDS = 1.0  # early: of two that took a lock at the same time, the first one ends
BEAT_SECONDS = 10.0  # between two touches of the file
STALE_SECONDS = 60.0  # a file that nobody touched for so long, by the watcher's own clock, is free
PATIENCE_SECONDS = 5.0  # for the memory of a process that was killed just now to be given back
POLL_SECONDS = 0.2
_FILE_BYTES = 1024  # more than a holder's name takes
# What file systems without locks answer: NFS without its lock daemon, Lustre without -o flock, …
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


class LockedError(RunFolderError):
    """Another run is at work in the folder."""

    code = ExitCode.LOCKED


@dataclass(frozen=True)
class Holder:
    """Who holds a lock, as its file tells.

    `machine` is one start of one kernel, within which the kernel's lock is all that counts. `job`
    and `restarts` are SLURM's, where it started the run.
    """

    token: str
    host: str
    machine: str
    pid: int
    started: str  # ISO 8601, UTC
    job: str | None = None
    restarts: int = 0

    @classmethod
    def this(cls) -> "Holder":
        """This process."""
        return cls(
            token=uuid.uuid4().hex,
            host=socket.gethostname(),
            machine=_machine(),
            pid=os.getpid(),
            started=datetime.now(UTC).isoformat(timespec="seconds"),
            job=os.environ.get("SLURM_JOB_ID"),
            restarts=int(os.environ.get("SLURM_RESTART_COUNT") or 0),
        )

    @classmethod
    def read(cls, content: str) -> "Holder | None":
        """The holder that a lock's file tells of; None for an empty file, or one not yet whole."""
        try:
            holder = cls(**json.loads(content))
            datetime.fromisoformat(holder.started)
        except (ValueError, TypeError):
            return None
        return holder

    def __str__(self) -> str:
        started = datetime.fromisoformat(self.started)
        age = max(datetime.now(UTC) - started, timedelta(0))
        told = f"process {self.pid} on {self.host}, started {_words(age)} ago"
        return f"{told}, SLURM job {self.job}" if self.job else told

    def was_requeued_as(self, other: "Holder") -> bool:
        """Whether SLURM started `other` in place of this one, which it has ended before."""
        return self.job is not None and self.job == other.job and self.restarts < other.restarts


class RunLock:
    """A lock that is held; `last_beat` is when the holder before was last alive (Unix seconds).

    It needs no closing: the kernel does that. An orderly end of the process also removes the file.
    """

    def __init__(self, path: Path, descriptor: int, own: Holder, last_beat: float | None) -> None:
        self.path, self.own, self.last_beat = path, own, last_beat
        self._descriptor = descriptor
        self._released = threading.Event()
        threading.Thread(target=self._beat, name="run lock", daemon=True).start()
        atexit.register(self.release)
        os.register_at_fork(after_in_child=self._forget)

    def release(self) -> None:
        """Gives the folder back."""
        if self._released.is_set():
            return
        self._released.set()
        with suppress(OSError):
            if _read_holder(self.path) == self.own:
                self.path.unlink()  # still locked: whoever opened it sees that it is gone
        os.close(self._descriptor)

    def _beat(self) -> None:
        """Touches the file for as long as it tells of this process."""
        pause = FIRST_BEAT_SECONDS
        while not self._released.wait(pause):
            pause = BEAT_SECONDS
            with suppress(OSError):  # a disk that is away: for others we stand still, rightly
                holder = _read_holder(self.path)
                if holder not in (None, self.own) and not self._released.is_set():
                    print(
                        f"Stopped: {self.path} was taken over by {holder}. This run had given no "
                        "sign of life, or somebody removed the lock.",
                        file=sys.stderr,
                        flush=True,
                    )
                    os._exit(ExitCode.LOCKED)
                os.utime(self._descriptor)

    def _forget(self) -> None:
        """In a forked child, which may outlive this process and must not keep its lock."""
        if not self._released.is_set():
            self._released.set()
            os.close(self._descriptor)


def hold(folder: RunFolder, report: Callable[[str], None]) -> RunLock:
    """Takes the folder for this process; the first process of a run alone calls it.

    Args:
        folder: The run's; made where it is not there.
        report: Called with a sentence where a lock that was left is watched, and recovered.

    Raises:
        LockedError: another run is at work in the folder.
        RunFolderError: nothing can be written there.
    """
    path, lock = folder.path / "lock", None
    try:
        folder.path.mkdir(parents=True, exist_ok=True)
        while lock is None:
            descriptor, by_kernel = _open(path)
            try:
                lock = _take_over(path, descriptor, by_kernel, report)
            finally:
                if lock is None:
                    os.close(descriptor)
    except OSError as error:
        raise RunFolderError(
            f"run.dir ({folder.path}) cannot be written ({error.strerror}): make room there or "
            "set its permissions, or name another folder with run.dir=…"
        ) from None
    return lock


def _open(path: Path) -> tuple[int, bool]:
    """A descriptor of the lock's file, and whether the kernel has locked it: some cannot."""
    give_up = time.monotonic() + PATIENCE_SECONDS
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor, True
        except (BlockingIOError, FileNotFoundError):
            pass
        except OSError as error:
            if error.errno in _NO_LOCKS:
                return descriptor, False
            os.close(descriptor)
            raise
        os.close(descriptor)
        if time.monotonic() > give_up:
            raise _refusal(path, _read_holder(path))
        time.sleep(POLL_SECONDS)


def _take_over(
    path: Path, descriptor: int, by_kernel: bool, report: Callable[[str], None]
) -> RunLock | None:
    """Writes our name into a file that we opened; None where its holder removes it meanwhile.

    Raises:
        LockedError: its holder is alive.
    """
    last_beat = os.fstat(descriptor).st_mtime
    own, before = Holder.this(), _read_holder(path)
    if before is not None:
        on_this_machine = by_kernel and before.machine == own.machine
        if not on_this_machine and not before.was_requeued_as(own):
            report(
                f"{path} tells of {before}: watching for {STALE_SECONDS:.0f} seconds whether "
                "that run is alive."
            )
            if not _stands_still(path, before):
                return None
        report(f"The run before, {before}, ended without a word: its lock is recovered.")
    # One write of a fixed length: readers see the name before or this one, and nothing between.
    os.pwrite(descriptor, json.dumps(asdict(own)).ljust(_FILE_BYTES).encode(), 0)
    os.fsync(descriptor)  # NFS shows it to other machines only then
    return RunLock(path, descriptor, own, last_beat if before is not None else None)


def _stands_still(path: Path, holder: Holder) -> bool:
    """Whether nobody touches the lock's file for a while; False where its holder removes it.

    Raises:
        LockedError: somebody touches it.
    """
    begin = time.monotonic()
    first = None
    while time.monotonic() - begin < STALE_SECONDS:
        try:
            # Opened anew each time: NFS asks its server only then, else it may answer from memory.
            with open(path, encoding="utf-8") as file:
                seen = (os.fstat(file.fileno()).st_mtime_ns, file.read())
        except FileNotFoundError:
            return False
        first = first or seen
        if seen != first:
            raise _refusal(path, _read_holder(path) or holder)
        time.sleep(POLL_SECONDS)
    return True


def _refusal(path: Path, holder: Holder | None) -> LockedError:
    """What is told to the second of two runs."""
    return LockedError(
        f"run.dir ({path.parent}) is in use by {holder or 'a process that is just starting'}: "
        "wait for that run or stop it, or give this one a folder of its own with run.name=…"
    )


def _read_holder(path: Path) -> Holder | None:
    """Who holds the lock, as its file tells; None where it is empty or not there."""
    try:
        return Holder.read(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, UnicodeDecodeError):
        return None


def _machine() -> str:
    """What the kernel that runs us is known by, until its machine starts again."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:  # no Linux
        return socket.gethostname()


def _words(age: timedelta) -> str:
    """An age in full seconds: 0:12:05, or 3 days, 1:02:03."""
    return str(timedelta(seconds=round(age.total_seconds())))
