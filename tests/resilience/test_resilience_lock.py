"""Two runs never work in one folder, and a lock that was left stops nobody: with real processes."""

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

import pytest

from resilience import lock
from resilience.exit_codes import ExitCode
from resilience.lock import Holder, LockedError, RunLock, hold
from resilience.run_folder import RunFolder, RunFolderError

ROOT = Path(__file__).parents[2]
DEADLINE = 30  # seconds for what takes one: only a hanging program gets there
BEAT = 0.05  # seconds, instead of 10: the tests have no minutes
# In place of 60: twenty beats, so that a busy machine does not make a living holder look dead.
STALE = 20 * BEAT

HOLDER = f"""
import sys
from pathlib import Path
from resilience import lock
from resilience.run_folder import RunFolder
lock.BEAT_SECONDS = lock.FIRST_BEAT_SECONDS = {BEAT}
lock.PATIENCE_SECONDS = 0
print("ready", flush=True)
sys.stdin.readline()
try:
    held = lock.hold(RunFolder(Path(sys.argv[1])), print)
except lock.LockedError:
    sys.exit("refused")
exec(sys.argv[2])
print("held", flush=True)
sys.stdin.readline()
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    """The folder of a run that has none yet; this process is as impatient as the others."""
    for name, value in (
        ("PATIENCE_SECONDS", 0),
        ("STALE_SECONDS", STALE),
        ("BEAT_SECONDS", BEAT),
        ("FIRST_BEAT_SECONDS", BEAT),
        ("POLL_SECONDS", BEAT / 5),
    ):
        monkeypatch.setattr(lock, name, value)
    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    return RunFolder(tmp_path / "runs" / "run")


Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start(folder: RunFolder) -> Iterator[Start]:
    """`start()`: a process that is ready to take the folder, and does so on a line of input."""
    started: list[subprocess.Popen[str]] = []

    def begin(then: str = "") -> "subprocess.Popen[str]":
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

    yield begin
    for process in started:
        process.kill()
        process.communicate()


def say(process: "subprocess.Popen[str]") -> None:
    """Gives a process the line that it waits for."""
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def take(process: "subprocess.Popen[str]") -> list[str]:
    """Lets a process take the folder; what it told before it held it."""
    say(process)
    assert process.stdout is not None
    told = []
    while (line := process.stdout.readline()) != "held\n":
        assert line, process.stderr and process.stderr.read()
        told.append(line.strip())
    return told


@pytest.fixture
def held(start: Start) -> "subprocess.Popen[str]":
    """A process that holds the folder."""
    process = start()
    assert take(process) == []
    return process


def taken(folder: RunFolder) -> tuple[RunLock, list[str]]:
    """The lock, taken by this process, and what was told."""
    told: list[str] = []
    return hold(folder, told.append), told


def beats(folder: RunFolder) -> int:
    """When the lock's file was touched last."""
    return (folder.path / "lock").stat().st_mtime_ns


def wait_for(condition: Callable[[], bool], what: str) -> None:
    """Returns as soon as the condition holds."""
    end = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < end, f"waited in vain for {what}"
        time.sleep(0.01)


# ---------------------------------------------------------------- two runs


def test_second_run_is_refused_and_told_host_process_and_age(
    folder: RunFolder, held: "subprocess.Popen[str]"
) -> None:
    before = sorted(folder.path.iterdir())
    with pytest.raises(LockedError) as refused:
        taken(folder)
    told = rf"process {held.pid} on {re.escape(socket.gethostname())}, started 0:00:\d\d ago"
    assert re.search(told, str(refused.value))
    assert str(folder.path) in str(refused.value) and "run.name=" in str(refused.value)
    assert sorted(folder.path.iterdir()) == before
    assert held.poll() is None


def test_of_many_at_the_same_time_exactly_one_holds_the_folder(start: Start) -> None:
    contenders = [start() for _ in range(6)]
    for process in contenders:
        say(process)
    answers = [process.stdout.readline() for process in contenders if process.stdout]
    assert sorted(answers) == ["", "", "", "", "", "held\n"]
    for process, answer in zip(contenders, answers, strict=True):
        if not answer:
            assert process.wait(DEADLINE) == 1 and process.stderr
            assert process.stderr.read() == "refused\n"


def test_process_that_stands_still_keeps_its_folder(
    folder: RunFolder, held: "subprocess.Popen[str]"
) -> None:
    os.kill(held.pid, signal.SIGSTOP)
    with pytest.raises(LockedError, match=f"process {held.pid} "):
        taken(folder)


# ---------------------------------------------------------------- a lock that was left


def test_lock_of_a_killed_process_is_recovered_at_once_and_told(
    folder: RunFolder, held: "subprocess.Popen[str]"
) -> None:
    first = beats(folder)
    wait_for(lambda: beats(folder) > first, "a beat")
    last = beats(folder)
    held.kill()
    held.wait()
    begin = time.monotonic()
    mine, told = taken(folder)
    assert time.monotonic() - begin < STALE, "it was watched"
    assert len(told) == 1 and f"process {held.pid} on" in told[0] and "recovered" in told[0]
    assert mine.last_beat is not None and mine.last_beat * 1e9 >= last - 1e3  # a float's rounding
    mine.release()


def test_killed_process_that_is_just_ending_is_waited_for(
    folder: RunFolder, held: "subprocess.Popen[str]", monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "PATIENCE_SECONDS", DEADLINE)
    killer = threading.Timer(2 * BEAT, held.kill)
    killer.start()
    taken(folder)[0].release()
    killer.join()


def test_orderly_end_leaves_no_file(folder: RunFolder, held: "subprocess.Popen[str]") -> None:
    say(held)
    assert held.wait(DEADLINE) == 0
    assert list(folder.path.iterdir()) == []
    mine, told = taken(folder)
    assert (mine.last_beat, told) == (None, [])
    mine.release()
    mine.release()
    assert list(folder.path.iterdir()) == []


def test_file_removed_between_opening_and_locking_it_is_no_lock(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So does a holder that ends just then; the next run would open another file."""
    monkeypatch.setattr(lock, "PATIENCE_SECONDS", DEADLINE)
    real, path = fcntl.flock, folder.path / "lock"

    def flock(descriptor: int, operation: int) -> None:
        monkeypatch.setattr(fcntl, "flock", real)
        path.unlink()
        real(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    mine, _ = taken(folder)
    assert lock._read_holder(path) == mine.own
    monkeypatch.setattr(lock, "PATIENCE_SECONDS", 0)
    with pytest.raises(LockedError):
        taken(folder)
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
def test_child_that_outlives_the_holder_does_not_keep_the_folder(
    folder: RunFolder, start: Start, child: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "PATIENCE_SECONDS", DEADLINE)  # a child has to come to its first line
    process = start(child)
    take(process)
    listed = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    if not listed.exists():
        pytest.skip("looks at processes through /proc")
    (orphan,) = map(int, listed.read_text().split())
    try:
        process.kill()
        process.wait()
        taken(folder)[0].release()
        os.kill(orphan, 0)  # it is there
    finally:
        os.kill(orphan, signal.SIGKILL)


# ---------------------------------------------------------------- other machines


def left_by(folder: RunFolder, **changes: object) -> Holder:
    """Writes the lock of a run on another machine, whose own lock nobody sees from here."""
    other = replace(Holder.this(), host="n2", machine="another boot", pid=12, **changes)  # type: ignore[arg-type]
    folder.path.mkdir(parents=True, exist_ok=True)
    (folder.path / "lock").write_text(json.dumps(asdict(other)))
    return other


def test_run_on_another_machine_that_shows_signs_of_life_is_left_alone(folder: RunFolder) -> None:
    other = left_by(folder)
    ended = threading.Event()

    def live() -> None:
        while not ended.wait(BEAT):
            os.utime(folder.path / "lock")

    thread = threading.Thread(target=live)
    thread.start()
    told: list[str] = []
    try:
        with pytest.raises(LockedError, match=r"process 12 on n2, started 0:00:0\d ago"):
            hold(folder, told.append)
    finally:
        ended.set()
        thread.join()
    assert len(told) == 1 and "process 12 on n2" in told[0] and "watching" in told[0]
    assert lock._read_holder(folder.path / "lock") == other


def test_run_on_another_machine_without_a_sign_of_life_is_recovered(folder: RunFolder) -> None:
    left_by(folder)
    begin = time.monotonic()
    mine, told = taken(folder)
    assert time.monotonic() - begin >= STALE
    assert ["watching" in told[0], "recovered" in told[1], len(told)] == [True, True, 2]
    mine.release()


def test_clock_of_another_machine_decides_nothing(folder: RunFolder) -> None:
    left_by(folder, started="2035-01-01T00:00:00+00:00")
    ahead = time.time() + 1e8
    os.utime(folder.path / "lock", (ahead, ahead))
    taken(folder)[0].release()


def test_run_on_another_machine_that_ends_while_it_is_watched_frees_the_folder(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    left_by(folder)
    monkeypatch.setattr(lock, "STALE_SECONDS", DEADLINE)
    end = threading.Timer(2 * BEAT, (folder.path / "lock").unlink)
    end.start()
    mine, told = taken(folder)
    assert len(told) == 1 and "watching" in told[0]
    mine.release()


def test_requeued_job_takes_the_folder_of_its_lost_node_at_once(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "STALE_SECONDS", DEADLINE)
    left_by(folder, job="77", restarts=0)
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    mine, told = taken(folder)
    assert len(told) == 1 and "recovered" in told[0] and "SLURM job 77" in told[0]
    mine.release()


@pytest.mark.parametrize(("job", "restarts"), [("77", 1), ("78", 0)])
def test_another_job_or_another_step_of_the_same_is_watched(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch, job: str, restarts: int
) -> None:
    left_by(folder, job=job, restarts=restarts)
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    mine, told = taken(folder)
    assert "watching" in told[0]
    mine.release()


def test_run_whose_lock_was_taken_over_while_it_slept_ends_by_itself(
    folder: RunFolder, held: "subprocess.Popen[str]"
) -> None:
    left_by(folder)
    assert held.wait(DEADLINE) == ExitCode.LOCKED
    assert held.stderr is not None and "taken over by process 12 on n2" in held.stderr.read()


# ---------------------------------------------------------------- file systems


@pytest.fixture
def no_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel answers as on a file system that has no locks."""

    def flock(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", flock)


@pytest.mark.usefixtures("no_locks")
def test_without_locks_of_the_kernel_a_living_run_is_left_alone(
    folder: RunFolder, held: "subprocess.Popen[str]"
) -> None:
    with pytest.raises(LockedError, match=f"process {held.pid} "):
        taken(folder)


@pytest.mark.usefixtures("no_locks")
def test_without_locks_of_the_kernel_a_killed_run_is_recovered(
    folder: RunFolder, held: "subprocess.Popen[str]"
) -> None:
    held.kill()
    held.wait()
    mine, told = taken(folder)
    assert "watching" in told[0] and "recovered" in told[1]
    mine.release()


def test_folder_that_cannot_be_made_is_refused_with_the_reason(folder: RunFolder) -> None:
    folder.path.parent.write_text("a file where the folder should be")
    with pytest.raises(RunFolderError, match=r"run\.dir .*cannot be written .*directory") as error:
        taken(folder)
    assert not isinstance(error.value, LockedError)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"pid": 1}', "\0" * 512, "é\udc80"])
def test_file_that_tells_no_holder_is_free(folder: RunFolder, content: str) -> None:
    folder.path.mkdir(parents=True)
    (folder.path / "lock").write_bytes(content.encode(errors="surrogateescape"))
    mine, told = taken(folder)
    assert told == [] and mine.last_beat is None
    mine.release()
