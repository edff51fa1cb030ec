"""The watchdog's exit waits for no disk and no thread, and its heartbeats read no file."""

import json
import linecache
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from frozen_mount import frozen_mount
from processes import linux, mounts, wait_for
from torch.distributed import HashStore

from resilience import watchdog
from resilience.config import TimeLimits
from resilience.exit_codes import ExitCode
from resilience.heartbeat import Heartbeat, stack_of
from resilience.watchdog import Watchdog

pytestmark = linux


@mounts
def test_abort_exits_in_time_while_stderr_and_run_folder_hang(tmp_path: Path) -> None:
    """The message, the ledger and the flight recorder are on a disk that does not answer."""
    with frozen_mount(tmp_path) as disk:
        log = disk.path / "log"
        program = f"""
import os, sys, threading
from resilience import watchdog
from resilience.config import TimeLimits
from resilience.event_log import EventLog
watchdog.REPORT_SECONDS = 0.3
watchdog.KILL_SECONDS = 0.1
os.dup2(os.open({str(log)!r}, os.O_CREAT | os.O_WRONLY), 2)
subject = watchdog.Watchdog(TimeLimits())
subject.on_abort = lambda reason: EventLog({str(disk.path / "ledger.jsonl")!r}).append("fault")
print("ready", flush=True)
input()
subject._abort("rank 1 exited")
"""
        process = subprocess.Popen(
            [sys.executable, "-c", program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdin is not None and process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        disk.freeze()
        process.stdin.write("\n")
        process.stdin.flush()
        # The exit itself waits for the file system, to close the log.
        stat = Path(f"/proc/{process.pid}/stat")
        wait_for(lambda: stat.read_text().rpartition(")")[2].split()[0] == "Z", "the exit")
        disk.close()
        assert process.wait() == ExitCode.RANK_FAILED_BEFORE_SAVE


def test_stack_is_taken_without_reading_source_files(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*_: Any) -> None:
        raise AssertionError("a source file was read, whose disk may hang")

    for name in ("checkcache", "lazycache", "getline", "getlines", "updatecache"):
        monkeypatch.setattr(linecache, name, read)
    stack = stack_of(threading.get_ident())
    own = "tests/resilience/test_resilience_watchdog.py"
    assert stack[-1].startswith("resilience/heartbeat.py:") and any(own in line for line in stack)


def test_background_save_that_hangs_is_reported_at_the_limit_of_a_checkpoint() -> None:
    subject = Watchdog(TimeLimits(step=1000, checkpoint=30))
    try:
        saving = threading.Thread(target=time.sleep, args=(0.2,), name="checkpoint")
        saving.start()
        for seconds, phase in ((10, "set-up"), (29, "checkpoint"), (31, "checkpoint")):
            started = time.monotonic() - seconds
            subject.background_save = lambda s=started: (6, s, saving.ident)  # type: ignore[misc]
            beat = subject._heartbeat(0)
            assert beat.phase == phase and subject._is_late(beat) == (seconds == 31)
        assert beat.late_message().startswith(f"rank 0 (pid {os.getpid()} on ")
        assert "stuck in checkpoint 6 for 31 s" in beat.late_message()
    finally:
        subject.close()
        saving.join()


def test_rank_that_waits_for_its_loader_is_reported_as_waiting_for_data() -> None:
    stack = ["train.py:171 train", "data/loader.py:145 read_ahead", "/usr/lib/threading.py:1 wait"]
    beat = Heartbeat(3, "node7", 5, "step", 9, 20.0, stack=stack, blocked="rank 3 … D state …")
    message = beat.late_message()
    assert message.startswith("rank 3 (pid 5 on node7) waiting for data in step 9 for 20 s:")
    assert message.endswith("\nrank 3 … D state …")


def test_suspended_process_counts_against_no_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if the thread that sends heartbeats runs first after the suspension."""
    monkeypatch.setattr(Watchdog, "_watch", lambda self: None)
    monkeypatch.setattr(watchdog, "HEARTBEAT_SECONDS", 0.01)
    subject = Watchdog(TimeLimits(step=1000, checkpoint=1000))
    store: Any = HashStore()
    subject._store, subject._size, subject._interval = store, 1, 0.01
    subject.enter("step", 3)
    started = time.monotonic() - 2000
    subject.background_save = lambda: (2, started, None)
    for name in ("_since", "_last_tick", "_last_contact"):
        setattr(subject, name, getattr(subject, name) - 2000)
    monkeypatch.setattr(subject, "_abort", lambda reason: store.set("abort", reason))
    exchange = threading.Thread(target=subject._exchange)
    exchange.start()
    wait_for(lambda: store.check(["beat/0"]), "a heartbeat")
    subject.close()
    exchange.join()
    assert json.loads(store.get("beat/0"))["seconds"] < 500
    assert not store.check(["abort"])


def test_exit_by_itself_has_a_time_limit() -> None:
    """Finalization, which joins the threads of the data loader, may never end."""
    program = """
import threading, time
from resilience import watchdog
from resilience.config import TimeLimits
watchdog.CLOSE_SECONDS = 0.2
threading.Thread(target=time.sleep, args=(60,)).start()
watchdog.Watchdog(TimeLimits()).close(watchdog.ExitCode.STOPPED)
"""
    started = time.monotonic()
    assert subprocess.run([sys.executable, "-c", program]).returncode == ExitCode.STOPPED
    assert time.monotonic() - started < 30


def test_an_abort_ends_within_ten_seconds_of_a_limit() -> None:
    detection = 2 * watchdog.HEARTBEAT_SECONDS  # heartbeats arrive and are read every second
    assert watchdog.REPORT_SECONDS + watchdog.KILL_SECONDS < watchdog.ABORT_SECONDS
    assert detection + watchdog.ABORT_SECONDS <= 10 and watchdog.BACKSTOP_SECONDS + 1 <= 10


def test_cause_on_all_ranks_is_reported_by_the_first_rank_only() -> None:
    """Also if all ranks leave the step with the same code and reason."""
    store: Any = HashStore()
    store.set("abort", "")
    subjects = [Watchdog(TimeLimits()) for _ in range(3)]
    try:
        for rank, subject in enumerate(subjects, start=1):
            subject._state.rank, subject._store, subject._connected = rank, store, True
        reported = [subject.is_first_with("file x is missing") for subject in subjects]
        assert reported == [True, False, False]
        assert subjects[2].is_first_with("file y is missing")
        reported = [each.is_first_with(f"pid {each._state.rank} is lost") for each in subjects]
        assert reported == [True, False, False]
        published = [subject.publish(ExitCode.OUT_OF_MEMORY, "no memory") for subject in subjects]
        assert published == [True, False, False]
    finally:
        for subject in subjects:
            subject.close()
