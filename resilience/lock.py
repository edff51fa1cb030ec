"""The lock of a run folder: one run at a time, held by its first process until it exits.

The kernel releases the `flock` on `<run>/lock` however the process dies. On some file systems it is
local to a machine (NFS and Lustre with local locks) or missing. The file therefore also names its
holder, and a thread updates its modification time every few seconds: a process that gets the lock
but finds the name of another machine first watches for such heartbeats. Clocks of two machines are
never compared. A holder that finds another name in the file (after a suspension) exits at once.
"""

import atexit
import errno
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

from data.files import parse_json, read_file
from resilience.exit_codes import ExitCode
from resilience.run_folder import RunFolder, RunFolderError, not_writable

FIRST_HEARTBEAT_SECONDS = 1.0  # short: if two processes take the lock at once, the first one exits
HEARTBEAT_SECONDS = 10.0
STALE_SECONDS = 60.0  # a lock without heartbeats for this long, by the watcher's clock, is stale
RETRY_SECONDS = 5.0  # a process killed a moment ago holds its lock until its memory is freed
POLL_SECONDS = 0.2
LONGEST_POLL_SECONDS = 1.0  # of which all counts as watched
_FILE_BYTES = 1024  # fixed file size, more than a holder needs
# Errors of file systems without locks: NFS without its lock daemon, Lustre without -o flock, …
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


class LockedError(RunFolderError):
    """Another run holds the folder."""

    code = ExitCode.LOCKED


@dataclass(frozen=True)
class Holder:
    """Holder of a lock, as written to its file.

    Attributes:
        token: Unique for each holder.
        machine: Boot ID of the kernel; within one, the kernel's lock alone decides.
        started: ISO 8601, UTC.
        job, restarts: SLURM job ID and restart count, if SLURM started the run.
    """

    token: str
    host: str
    machine: str
    pid: int
    started: str
    job: str | None = None
    restarts: int = 0

    @classmethod
    def this_process(cls) -> "Holder":
        return cls(
            token=uuid.uuid4().hex,
            host=socket.gethostname(),
            machine=_boot_id(),
            pid=os.getpid(),
            started=datetime.now(UTC).isoformat(timespec="seconds"),
            job=os.environ.get("SLURM_JOB_ID"),
            restarts=int(os.environ.get("SLURM_RESTART_COUNT") or 0),
        )

    @classmethod
    def read(cls, path: Path) -> "Holder | None":
        """Read the holder from a lock file; None if the file is missing, empty or incomplete."""
        try:
            holder = cls(**parse_json(read_file(path)))
            datetime.fromisoformat(holder.started)
        except (FileNotFoundError, ValueError, TypeError):
            return None
        return holder

    def __str__(self) -> str:
        age = max(datetime.now(UTC) - datetime.fromisoformat(self.started), timedelta(0))
        age = timedelta(seconds=round(age.total_seconds()))
        text = f"process {self.pid} on {self.host}, started {age} ago"
        return f"{text}, SLURM job {self.job}" if self.job else text

    def was_requeued_as(self, other: "Holder") -> bool:
        """Return whether `other` is a later restart of the same SLURM job, which ended this one."""
        return self.job is not None and self.job == other.job and self.restarts < other.restarts


class RunLock:
    """A held lock. The kernel releases it at exit; a clean exit also removes the file.

    Attributes:
        holder: This process.
        last_heartbeat: When the previous holder was last alive, in Unix seconds; None without one.
    """

    def __init__(self, path: Path, fd: int, holder: Holder, last_heartbeat: float | None) -> None:
        self.path, self.holder, self.last_heartbeat = path, holder, last_heartbeat
        self._descriptor = fd
        self._released = threading.Event()
        threading.Thread(target=self._send_heartbeats, name="run lock", daemon=True).start()
        atexit.register(self.release)
        os.register_at_fork(after_in_child=self._close_in_child)

    def release(self) -> None:
        """Release the folder and remove the lock file."""
        if self._released.is_set():
            return
        self._released.set()
        with suppress(OSError):
            if Holder.read(self.path) == self.holder:
                self.path.unlink()  # still locked: a process that opened it notices the removal
        os.close(self._descriptor)

    def abandon(self) -> None:
        """Release the folder, and delete it if it contains nothing: a launch that did not start."""
        self.release()
        with suppress(OSError):
            self.path.parent.rmdir()

    def _send_heartbeats(self) -> None:
        """Touch the file for as long as it names this process."""
        interval = FIRST_HEARTBEAT_SECONDS
        while not self._released.wait(interval):
            interval = HEARTBEAT_SECONDS
            with suppress(OSError):  # disk unreachable: a missing heartbeat is correct
                holder = Holder.read(self.path)
                if holder not in (None, self.holder) and not self._released.is_set():
                    message = (
                        f"Stopped: {self.path} was taken over by {holder}. This run had sent no "
                        "heartbeat for too long, or the lock file was removed."
                    )
                    print(message, file=sys.stderr, flush=True)
                    os._exit(ExitCode.LOCKED)
                os.utime(self._descriptor)

    def _close_in_child(self) -> None:
        """Close the lock in a forked child, which may outlive this process."""
        if not self._released.is_set():
            self._released.set()
            os.close(self._descriptor)


def acquire_lock(folder: RunFolder, report: Callable[[str], None]) -> RunLock:
    """Lock a run folder for this process; only the first process of a run calls it.

    Args:
        folder: Run folder; created if missing.
        report: Called with a message when a possibly stale lock is watched or removed.

    Raises:
        LockedError: Another run holds the folder.
        RunFolderError: The folder cannot be written.
    """
    path = folder.path / "lock"
    lock = None
    try:
        while lock is None:
            descriptor, has_kernel_lock = _open_locked(path)
            try:
                lock = _take_over(path, descriptor, has_kernel_lock, report)
            finally:
                if lock is None:
                    os.close(descriptor)
    except OSError as error:
        raise RunFolderError(f"run.dir={folder.path} {not_writable(error, folder.path)}") from None
    return lock


def check_not_locked(folder: RunFolder) -> None:
    """Check that no process of this machine holds a run folder, before slow work.

    Raises:
        LockedError: Another run holds the folder.
    """
    path = folder.path / "lock"
    with suppress(OSError):  # reported by `acquire_lock`
        if path.exists():
            os.close(_open_locked(path)[0])


def _open_locked(path: Path) -> tuple[int, bool]:
    """Open and lock the file; return its descriptor and whether the file system supports locks."""
    from filelock import lock_descriptor  # `--help` does not need it

    deadline = time.monotonic() + RETRY_SECONDS
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)  # its holder may have abandoned it
        # Checked twice: its holder may remove the file in between.
        if os.path.lexists(path) and not path.is_file() and os.path.lexists(path):
            raise RunFolderError(f"{path} is not a regular file; move it away")
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            if lock_descriptor(descriptor, blocking=False):
                # Its holder may have removed the file since it was opened.
                with suppress(FileNotFoundError):
                    if os.path.samestat(os.fstat(descriptor), path.stat()):
                        return descriptor, True
        except OSError as error:
            if error.errno in _NO_LOCKS:
                return descriptor, False
            os.close(descriptor)
            raise
        os.close(descriptor)
        if time.monotonic() > deadline:
            raise _locked_error(path, Holder.read(path))
        time.sleep(POLL_SECONDS)


def _take_over(
    path: Path, descriptor: int, has_kernel_lock: bool, report: Callable[[str], None]
) -> RunLock | None:
    """Write this process into an opened lock file; None if its holder removes it meanwhile.

    Raises:
        LockedError: The holder is alive.
    """
    last_heartbeat = os.fstat(descriptor).st_mtime
    holder, previous = Holder.this_process(), Holder.read(path)
    if previous is not None:
        same_machine = has_kernel_lock and previous.machine == holder.machine
        if not same_machine and not previous.was_requeued_as(holder):
            report(
                f"{path} names {previous}: watching it for {STALE_SECONDS:.0f} seconds to see "
                "whether that run is alive."
            )
            if not _is_stale(path, previous):
                return None
        report(f"Removed the stale lock of {previous}, which did not exit cleanly.")
    # One write of a fixed length: readers see the previous content or this one, never a mix.
    os.pwrite(descriptor, json.dumps(asdict(holder)).ljust(_FILE_BYTES).encode(), 0)
    os.fsync(descriptor)  # makes it visible to other NFS clients
    return RunLock(path, descriptor, holder, last_heartbeat if previous is not None else None)


def _is_stale(path: Path, holder: Holder) -> bool:
    """Watch the lock file; return True if it does not change, False if its holder removes it.

    Raises:
        LockedError: The file changes: its holder is alive.
    """
    first, watched, last = None, 0.0, time.monotonic()
    while watched < STALE_SECONDS:
        try:
            # Reopen each time: NFS revalidates its cache only on open.
            with open(path, encoding="utf-8") as file:
                seen = (os.fstat(file.fileno()).st_mtime_ns, file.read())
        except FileNotFoundError:
            return False
        first = first or seen
        if seen != first:
            raise _locked_error(path, Holder.read(path) or holder)
        time.sleep(POLL_SECONDS)
        # While a read hangs, the holder's heartbeats may hang too: that time does not count.
        now = time.monotonic()
        watched, last = watched + min(now - last, LONGEST_POLL_SECONDS), now
    return True


def _locked_error(path: Path, holder: Holder | None) -> LockedError:
    return LockedError(
        f"run.dir={path.parent} is in use by {holder or 'a process that is just starting'}; wait "
        "for that run or stop it, or choose another folder with run.dir=…"
    )


def _boot_id() -> str:
    """Return an ID of the running kernel that changes with each boot."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:  # not Linux
        return socket.gethostname()
