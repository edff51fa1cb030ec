"""A program as a person starts it, in a session of its own, watched through /proc."""

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

linux = pytest.mark.skipif(sys.platform != "linux", reason="looks at processes through /proc")
DEADLINE = 120  # seconds for something that takes a few: only a hanging program gets there


def is_running(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_for(condition: Callable[[], bool], what: str) -> None:
    """Returns as soon as the condition holds."""
    end = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < end, f"waited in vain for {what}"
        time.sleep(0.02)


class Program:
    """A program in a session of its own, and the one child that it started."""

    def __init__(self, arguments: list[str]) -> None:
        self.main = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        listed = Path(f"/proc/{self.main.pid}/task/{self.main.pid}/children")
        wait_for(lambda: listed.read_text() != "", "a child process")
        (self.child,) = map(int, listed.read_text().split())

    def wait_for_child(self) -> None:
        """Returns when the child has ended."""
        wait_for(lambda: not is_running(self.child), "the child's end")

    def end(self) -> None:
        """Leaves nothing running."""
        self.main.kill()
        if is_running(self.child):
            os.kill(self.child, signal.SIGKILL)
        self.main.communicate()


@contextmanager
def standing_still(arguments: list[str], folder: Path) -> Iterator[Program]:
    """A short run that stands still at step 9, in a program that starts one child.

    The text sample of step 9 goes into a pipe that nobody reads, so that the run waits at a place
    which no speed of the machine changes.
    """
    folder.mkdir(exist_ok=True)
    os.mkfifo(folder / "samples.txt")
    program = Program(arguments)
    try:
        metrics = folder / "metrics.jsonl"
        wait_for(
            lambda: metrics.exists() and metrics.read_bytes().count(b"\n") == 9,
            "the ninth step's figures",
        )
        yield program
    finally:
        program.end()
