"""Programs started from the command line in their own session and observed through /proc."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import ROOT
from fork_server import PAUSE

linux = pytest.mark.skipif(sys.platform != "linux", reason="inspects processes through /proc")
mounts = pytest.mark.skipif(
    sys.platform != "linux" or os.geteuid() != 0, reason="mounts a FUSE file system as root"
)  # as root, nothing is skipped
DEADLINE = 300  # seconds for something that takes a few; reached only by a hang


def is_running(pid: int) -> bool:
    """Return whether a process exists and is not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_for(condition: Callable[[], bool], description: str) -> None:
    """Poll until the condition holds.

    Raises:
        AssertionError: after `DEADLINE` seconds.
    """
    end = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < end, f"timed out waiting for {description}"
        time.sleep(0.02)


class Program:
    """A program in its own session and the one child process that it starts."""

    def __init__(self, arguments: list[str]) -> None:
        self.main = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": str(PAUSE)},
        )
        listed = Path(f"/proc/{self.main.pid}/task/{self.main.pid}/children")
        wait_for(lambda: listed.read_text() != "", "a child process")
        (self.child,) = map(int, listed.read_text().split())

    def wait_for_child(self) -> None:
        wait_for(lambda: not is_running(self.child), "the child to exit")

    def kill(self) -> None:
        """Kill both processes."""
        self.main.kill()
        if is_running(self.child):
            os.kill(self.child, signal.SIGKILL)
        self.main.communicate()


@contextmanager
def paused_training(arguments: list[str], folder: Path) -> Iterator[Program]:
    """Start a short run of two processes that blocks at step 9.

    The text sample of step 9 is written to a named pipe without a reader, so with `PAUSE` the run
    blocks at the same point on a machine of any speed.
    """
    folder.mkdir(exist_ok=True)
    os.mkfifo(folder / "samples.txt")
    program = Program(arguments)
    try:
        metrics = folder / "metrics.jsonl"
        wait_for(
            lambda: metrics.exists() and metrics.read_bytes().count(b"\n") == 9,
            "the metrics of step 9",
        )
        yield program
    finally:
        program.kill()


def wait_until_blocked(pid: int) -> None:
    """Wait until the main thread of a process waits for the reader of a named pipe."""
    channel = Path(f"/proc/{pid}/wchan")  # where in the kernel
    wait_for(lambda: channel.read_text() == "wait_for_partner", "the named pipe to block rank 0")
