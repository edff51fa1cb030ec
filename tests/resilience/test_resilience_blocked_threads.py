"""Threads that wait for a file system that does not answer are named with call, file and mount."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from frozen_mount import FrozenMount, frozen_mount
from processes import mounts, wait_for

from resilience.blocked_threads import blocked_threads, describe

pytestmark = mounts


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[FrozenMount]:
    with frozen_mount(tmp_path) as mounted:
        yield mounted


def test_threads_are_named_with_call_file_and_mount(disk: FrozenMount) -> None:
    file = disk.path / "file"
    file.touch()
    descriptor = os.open(file, os.O_RDWR)
    calls = {
        "open": lambda: open(disk.path / "new", "w").close(),
        "stat": lambda: os.stat(file),
        "fstat": lambda: os.fstat(descriptor),
        "write": lambda: os.write(descriptor, b"x"),
        "fsync": lambda: os.fsync(descriptor),
        "mkdir": lambda: os.mkdir(disk.path / "folder"),
    }
    disk.freeze()
    threads = [threading.Thread(target=_ignore_error, args=(c,), name=n) for n, c in calls.items()]
    for thread in threads:
        thread.start()
    waiting = threading.Thread(target=os.read, args=(os.pipe()[0], 1), daemon=True)
    waiting.start()  # not for a disk
    wait_for(lambda: len(blocked_threads()) == len(calls), "the threads to block")
    found = {each.name: each for each in blocked_threads()}
    mounted = f"(fuse mounted on {disk.path})"
    assert found["open"].file == f"open {disk.path / 'new'} {mounted}"
    assert found["write"].file == f"write {file} {mounted}"
    assert found["fsync"].file == f"fsync {file} {mounted}"
    assert found["mkdir"].file == f"mkdir {disk.path / 'folder'} {mounted}"
    for name in ("stat", "fstat"):
        assert found[name].file.endswith(f"stat {file} {mounted}")
    disk.close()
    for thread in threads:
        thread.join()


def test_killed_process_that_waits_for_a_disk_is_in_d_state(disk: FrozenMount) -> None:
    program = f"import os; print(flush=True); input(); os.mkdir({str(disk.path / 'new')!r})"
    arguments = [sys.executable, "-c", program]
    child = subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdin is not None and child.stdout is not None
    child.stdout.readline()
    disk.freeze()
    child.stdin.write(b"\n")
    child.stdin.flush()
    wait_for(lambda: any("mkdir" in each.file for each in blocked_threads(child.pid)), "mkdir")
    child.kill()
    wait_for(lambda: any(e.uninterruptible for e in blocked_threads(child.pid)), "D state")
    line = describe("rank 3 (pid 5 on node7)", blocked_threads(child.pid))
    assert line.startswith("rank 3 (pid 5 on node7) is in uninterruptible sleep (D state): ")
    assert f"mkdir {disk.path / 'new'} (fuse mounted on {disk.path})" in line
    disk.close()
    child.communicate()


def _ignore_error(call: object) -> None:
    with suppress(OSError):  # when the connection is aborted
        call()  # type: ignore[operator]
