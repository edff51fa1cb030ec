"""Two runs never use one folder, and a stale lock blocks no run; tested with real processes."""

import errno
import fcntl
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from resilience import lock
from resilience.exit_codes import ExitCode
from resilience.lock import Holder, LockedError, RunLock, acquire_lock, check_not_locked
from resilience.run_folder import RunFolder, RunFolderError

ROOT = Path(__file__).parents[2]
TIMEOUT_SECONDS = 30  # only a hanging program takes this long
INTERVAL = 0.05  # seconds between heartbeats, instead of 10
# Instead of 60: twenty heartbeats, so that on a busy machine a live holder does not look dead.
STALE = 20 * INTERVAL

HOLDER = f"""
import sys
from pathlib import Path
from resilience import lock
from resilience.run_folder import RunFolder
lock.HEARTBEAT_SECONDS = lock.FIRST_HEARTBEAT_SECONDS = {INTERVAL}
lock.RETRY_SECONDS = 0
print("ready", flush=True)
sys.stdin.readline()
try:
    held = lock.acquire_lock(RunFolder(Path(sys.argv[1])), print)
except lock.LockedError:
    sys.exit("locked")
exec(sys.argv[2])
print("held", flush=True)
sys.stdin.readline()
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    """A run folder that does not exist yet; this process uses the same short intervals."""
    for name, value in (
        ("RETRY_SECONDS", 0),
        ("STALE_SECONDS", STALE),
        ("HEARTBEAT_SECONDS", INTERVAL),
        ("FIRST_HEARTBEAT_SECONDS", INTERVAL),
        ("POLL_SECONDS", INTERVAL / 5),
    ):
        monkeypatch.setattr(lock, name, value)
    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    return RunFolder(tmp_path / "runs" / "run")


Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start(folder: RunFolder) -> Iterator[Start]:
    """`start()`: start a process that locks the folder when it receives a line of input."""
    started: list[subprocess.Popen[str]] = []

    def start_process(then: str = "") -> "subprocess.Popen[str]":
        process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, str(folder.path), then],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        return process

    yield start_process
    for process in started:
        process.kill()
        process.communicate()


def send_line(process: "subprocess.Popen[str]") -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def let_lock(process: "subprocess.Popen[str]") -> list[str]:
    """Let a process lock the folder; return the messages it printed before."""
    send_line(process)
    assert process.stdout is not None
    messages = []
    while (line := process.stdout.readline()) != "held\n":
        assert line, process.stderr and process.stderr.read()
        messages.append(line.strip())
    return messages


@pytest.fixture
def held(start: Start) -> "subprocess.Popen[str]":
    """A process that holds the lock."""
    process = start()
    assert let_lock(process) == []
    return process


def acquire(folder: RunFolder) -> tuple[RunLock, list[str]]:
    """Lock the folder in this process; return the lock and the messages."""
    messages: list[str] = []
    return acquire_lock(folder, messages.append), messages


def last_heartbeat(folder: RunFolder) -> int:
    """Return the time of the last heartbeat in nanoseconds."""
    return (folder.path / "lock").stat().st_mtime_ns


def wait_for(condition: Callable[[], bool], name: str) -> None:
    end = time.monotonic() + TIMEOUT_SECONDS
    while not condition():
        assert time.monotonic() < end, f"timed out waiting for {name}"
        time.sleep(0.01)


# ---------------------------------------------------------------- two runs


def test_second_run_is_rejected_with_host_process_and_age(
    folder: RunFolder, held: "subprocess.Popen[str]"
) -> None:
    before = sorted(folder.path.iterdir())
    with pytest.raises(LockedError) as error:
        acquire(folder)
    pattern = rf"process {held.pid} on {re.escape(socket.gethostname())}, started 0:00:\d\d ago"
    assert re.search(pattern, str(error.value))
    assert str(folder.path) in str(error.value) and "run.dir=" in str(error.value)
    assert sorted(folder.path.iterdir()) == before
    assert held.poll() is None


def test_exactly_one_of_many_concurrent_processes_gets_the_lock(start: Start) -> None:
    contenders = [start() for _ in range(6)]
    for process in contenders:
        send_line(process)
    answers = [process.stdout.readline() for process in contenders if process.stdout]
    assert sorted(answers) == ["", "", "", "", "", "held\n"]
    for process, answer in zip(contenders, answers, strict=True):
        if not answer:
            assert process.wait(TIMEOUT_SECONDS) == 1 and process.stderr
            assert process.stderr.read() == "locked\n"


def test_suspended_process_keeps_its_lock(folder: RunFolder, held: "subprocess.Popen[str]") -> None:
    os.kill(held.pid, signal.SIGSTOP)
    with pytest.raises(LockedError, match=f"process {held.pid} "):
        acquire(folder)
    with pytest.raises(LockedError, match=f"process {held.pid} "):
        check_not_locked(folder)


def test_check_of_a_free_folder_leaves_no_trace(folder: RunFolder) -> None:
    check_not_locked(folder)
    assert not (folder.path / "lock").exists()
    acquire(folder)[0].release()
    (folder.path / "lock").touch()  # of a process that was killed
    check_not_locked(folder)
    acquire(folder)[0].release()


# ---------------------------------------------------------------- stale locks


def test_lock_of_a_killed_process_is_taken_over_at_once_and_reported(
    folder: RunFolder, held: "subprocess.Popen[str]"
) -> None:
    first = last_heartbeat(folder)
    wait_for(lambda: last_heartbeat(folder) > first, "a heartbeat")
    last = last_heartbeat(folder)
    held.kill()
    held.wait()
    started_at = time.monotonic()
    mine, messages = acquire(folder)
    assert time.monotonic() - started_at < STALE, "the lock was watched first"
    assert len(messages) == 1
    assert f"stale lock of process {held.pid} on" in messages[0]
    assert mine.last_heartbeat is not None
    assert mine.last_heartbeat * 1e9 >= last - 1e3  # rounding of a float
    mine.release()


def test_lock_of_a_process_that_is_exiting_is_waited_for(
    folder: RunFolder, held: "subprocess.Popen[str]", monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "RETRY_SECONDS", TIMEOUT_SECONDS)
    killer = threading.Timer(2 * INTERVAL, held.kill)
    killer.start()
    acquire(folder)[0].release()
    killer.join()


def test_clean_exit_removes_the_lock_file(folder: RunFolder, held: "subprocess.Popen[str]") -> None:
    send_line(held)
    assert held.wait(TIMEOUT_SECONDS) == 0
    assert list(folder.path.iterdir()) == []
    mine, messages = acquire(folder)
    assert (mine.last_heartbeat, messages) == (None, [])
    mine.release()
    mine.release()
    assert list(folder.path.iterdir()) == []


def test_folder_that_its_holder_abandons_is_locked_by_the_next_run(
    folder: RunFolder, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    holder = start("import threading; threading.Timer(0.4, held.abandon).start()")
    let_lock(holder)
    monkeypatch.setattr(lock, "RETRY_SECONDS", TIMEOUT_SECONDS)
    mine, _ = acquire(folder)
    assert Holder.read(folder.path / "lock") == mine.holder
    mine.abandon()
    assert not folder.path.exists()


def test_file_removed_between_open_and_flock_is_not_a_lock(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A holder that exits at that moment removes it, and the next run would open a new file."""
    monkeypatch.setattr(lock, "RETRY_SECONDS", TIMEOUT_SECONDS)
    real, path = fcntl.flock, folder.path / "lock"

    def flock(descriptor: int, operation: int) -> None:
        monkeypatch.setattr(fcntl, "flock", real)
        path.unlink()
        real(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    mine, _ = acquire(folder)
    assert Holder.read(path) == mine.holder
    monkeypatch.setattr(lock, "RETRY_SECONDS", 0)
    with pytest.raises(LockedError):
        acquire(folder)
    mine.release()


@pytest.mark.parametrize(
    "child",
    [
        "import os\nif os.fork() == 0:\n    os.execv('/bin/sleep', ['sleep', '60'])",
        "import os, time\nif os.fork() == 0:\n    time.sleep(60)",
        "import subprocess\nsubprocess.Popen(['sleep', '60'], close_fds=False)",
    ],
    ids=["fork and exec", "fork", "subprocess"],
)
def test_child_that_outlives_the_holder_does_not_keep_the_lock(
    folder: RunFolder, start: Start, child: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        lock, "RETRY_SECONDS", TIMEOUT_SECONDS
    )  # until the child has closed its copy
    process = start(child)
    let_lock(process)
    listed = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    if not listed.exists():
        pytest.skip("needs /proc to find the child")
    (orphan,) = map(int, listed.read_text().split())
    try:
        process.kill()
        process.wait()
        acquire(folder)[0].release()
        os.kill(orphan, 0)  # still running
    finally:
        os.kill(orphan, signal.SIGKILL)


# ---------------------------------------------------------------- other machines


def write_remote_lock(folder: RunFolder, **changes: object) -> Holder:
    """Write the lock file of a run on another machine, without a kernel lock visible here."""
    other = replace(Holder.this_process(), host="n2", machine="another boot", pid=12, **changes)  # type: ignore[arg-type]
    folder.path.mkdir(parents=True, exist_ok=True)
    (folder.path / "lock").write_text(json.dumps(asdict(other)))
    return other


def test_lock_of_another_machine_with_heartbeats_is_respected(folder: RunFolder) -> None:
    other = write_remote_lock(folder)
    ended = threading.Event()

    def send_heartbeats() -> None:
        while not ended.wait(INTERVAL):
            os.utime(folder.path / "lock")

    thread = threading.Thread(target=send_heartbeats)
    thread.start()
    messages: list[str] = []
    try:
        with pytest.raises(LockedError, match=r"process 12 on n2, started 0:00:0\d ago"):
            acquire_lock(folder, messages.append)
    finally:
        ended.set()
        thread.join()
    assert len(messages) == 1
    assert "process 12 on n2" in messages[0] and "watching" in messages[0]
    assert Holder.read(folder.path / "lock") == other


def test_lock_of_another_machine_without_heartbeats_is_taken_over(folder: RunFolder) -> None:
    write_remote_lock(folder)
    started_at = time.monotonic()
    mine, messages = acquire(folder)
    assert time.monotonic() - started_at >= STALE
    assert len(messages) == 2 and "watching" in messages[0] and "stale lock" in messages[1]
    mine.release()


def test_time_in_which_the_disk_hangs_does_not_count_as_silence(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The holder cannot send heartbeats either, and continues when the disk answers again."""
    write_remote_lock(folder)
    monkeypatch.setattr(lock, "LONGEST_POLL_SECONDS", INTERVAL)
    n_reads = 0

    def hang_once(*arguments: Any, **keywords: Any) -> Any:
        nonlocal n_reads
        n_reads += 1
        if n_reads == 2:
            time.sleep(1.5 * STALE)
        if n_reads == 4:
            os.utime(folder.path / "lock")
        return open(*arguments, **keywords)

    monkeypatch.setattr(lock, "open", hang_once, raising=False)
    with pytest.raises(LockedError, match="process 12 on n2"):
        acquire_lock(folder, lambda message: None)


def test_clock_of_another_machine_is_ignored(folder: RunFolder) -> None:
    write_remote_lock(folder, started="2035-01-01T00:00:00+00:00")
    ahead = time.time() + 1e8
    os.utime(folder.path / "lock", (ahead, ahead))
    acquire(folder)[0].release()


def test_run_on_another_machine_that_exits_while_watched_frees_the_folder(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_remote_lock(folder)
    monkeypatch.setattr(lock, "STALE_SECONDS", TIMEOUT_SECONDS)
    end = threading.Timer(2 * INTERVAL, (folder.path / "lock").unlink)
    end.start()
    mine, messages = acquire(folder)
    assert len(messages) == 1 and "watching" in messages[0]
    mine.release()


def test_requeued_job_takes_over_the_lock_of_its_lost_node_at_once(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "STALE_SECONDS", TIMEOUT_SECONDS)
    write_remote_lock(folder, job="77", restarts=0)
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    mine, messages = acquire(folder)
    assert len(messages) == 1
    assert "stale lock" in messages[0] and "SLURM job 77" in messages[0]
    mine.release()


@pytest.mark.parametrize(("job", "restarts"), [("77", 1), ("78", 0)])
def test_another_job_or_another_step_of_the_same_job_is_watched(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch, job: str, restarts: int
) -> None:
    write_remote_lock(folder, job=job, restarts=restarts)
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    mine, messages = acquire(folder)
    assert "watching" in messages[0]
    mine.release()


def test_holder_whose_lock_was_taken_over_exits(
    folder: RunFolder, held: "subprocess.Popen[str]"
) -> None:
    write_remote_lock(folder)
    assert held.wait(TIMEOUT_SECONDS) == ExitCode.LOCKED
    assert held.stderr is not None and "taken over by process 12 on n2" in held.stderr.read()


# ---------------------------------------------------------------- file systems


@pytest.fixture
def no_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    """`flock` fails as on a file system without locks."""

    def flock(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", flock)


@pytest.mark.usefixtures("no_locks")
def test_live_run_is_respected_without_kernel_locks(
    folder: RunFolder, held: "subprocess.Popen[str]"
) -> None:
    with pytest.raises(LockedError, match=f"process {held.pid} "):
        acquire(folder)


@pytest.mark.usefixtures("no_locks")
def test_lock_of_a_killed_run_is_taken_over_without_kernel_locks(
    folder: RunFolder, held: "subprocess.Popen[str]"
) -> None:
    held.kill()
    held.wait()
    mine, messages = acquire(folder)
    assert "watching" in messages[0] and "stale lock" in messages[1]
    mine.release()


@pytest.mark.parametrize("create", [Path.mkdir, os.mkfifo])
def test_lock_that_is_no_file_is_an_error(
    folder: RunFolder, create: Callable[[Path], None]
) -> None:
    folder.path.mkdir(parents=True)
    create(folder.path / "lock")
    for check in (check_not_locked, lambda folder: acquire_lock(folder, print)):
        with pytest.raises(RunFolderError, match="lock is not a regular file; move it away"):
            check(folder)


def test_folder_that_cannot_be_created_is_an_error_with_the_reason(folder: RunFolder) -> None:
    folder.path.parent.write_text("a file instead of the folder")
    with pytest.raises(RunFolderError, match=r"run\.dir=.*cannot be written .*directory") as error:
        acquire(folder)
    assert not isinstance(error.value, LockedError)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"pid": 1}', "\0" * 512, "é\udc80"])
def test_file_without_a_holder_is_free(folder: RunFolder, content: str) -> None:
    folder.path.mkdir(parents=True)
    (folder.path / "lock").write_bytes(content.encode(errors="surrogateescape"))
    mine, messages = acquire(folder)
    assert messages == [] and mine.last_heartbeat is None
    mine.release()


def test_lock_file_of_0_1_is_read(folder: RunFolder) -> None:
    folder.path.mkdir(parents=True)
    (folder.path / "lock").write_text(
        '{"token": "0f", "host": "n2", "machine": "another boot", "pid": 12, '
        '"started": "2026-11-29T06:00:00+00:00", "job": "77", "restarts": 1}'.ljust(1024)
    )
    holder = Holder.read(folder.path / "lock")
    assert holder is not None and (holder.host, holder.pid, holder.job) == ("n2", 12, "77")
