"""Heartbeats: the progress of a process and the stack of its main thread.

A stack lists the innermost frame and otherwise only frames of this repository: they show which
code called the library. A main thread inside torch usually waits for another rank.
"""

import os
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from resilience.rank_groups import name_ranks

Phase = Literal["set-up", "step", "checkpoint"]

MAX_FRAMES = 12  # innermost frames of a stack
LOADER = os.path.join("data", "loader.py:")  # waits for the threads that read
ROOT = str(Path(__file__).parent.parent) + os.sep


@dataclass
class Heartbeat:
    """State of one process, as its watchdog last reported it.

    Attributes:
        phase, step: Current activity.
        seconds: Time since that activity started.
        count: Number of this heartbeat, increasing.
        lost_peer: Whether the process has lost its connection to another rank.
        stack: Stack of the main thread, innermost frame last.
        blocked: The threads that wait for a file system, in one line, if it may exceed a limit.
        waits_for: What a pipeline rank waits for, as `stage 2 waits for … from stage 1`.
    """

    rank: int
    host: str
    pid: int
    phase: Phase = "set-up"
    step: int = 0
    seconds: float = 0.0
    count: int = 0
    lost_peer: bool = False
    stack: Sequence[str] = ()
    blocked: str = ""
    waits_for: str = ""

    def __str__(self) -> str:
        return f"rank {self.rank} (pid {self.pid} on {self.host})"

    @property
    def activity(self) -> str:
        """Phase and step, for messages."""
        return "set-up" if self.phase == "set-up" else f"{self.phase} {self.step}"

    @property
    def is_waiting(self) -> bool:
        """Whether the innermost frame is inside torch, as in a collective."""
        return bool(self.stack) and "torch" in self.stack[-1].split(":")[0].split(os.sep)

    @property
    def indented_stack(self) -> str:
        """The stack, one frame per line."""
        return "\n".join(f"    {line}" for line in self.stack)

    @property
    def last_seen(self) -> str:
        """The last known activity and stack, for messages."""
        return f"Last seen in {self.activity}:\n{self.indented_stack}"

    def silent_message(self, seconds: float, others: "Sequence[Heartbeat]" = ()) -> str:
        """Return the message about processes with the same stack whose heartbeats stopped."""
        state = "dead, suspended or unreachable"
        who = f"{self}{self._and(others)}"
        return f"no heartbeat from {who} for {seconds:.0f} s; {state}. {self.last_seen}"

    def late_message(self, others: "Sequence[Heartbeat]" = ()) -> str:
        """Return the message about processes that have the same stack and exceeded a time limit."""
        state = f"{self._state} in {self.activity} for {self.seconds:.0f} s"
        blocked = "".join(f"\n{beat.blocked}" for beat in (self, *others) if beat.blocked)
        return f"{self}{self._and(others)} {state}:\n{self.indented_stack}{blocked}"

    def _and(self, others: "Sequence[Heartbeat]") -> str:
        return f" and {name_ranks(other.rank for other in others)}" if others else ""

    @property
    def _state(self) -> str:
        if any(frame.startswith(LOADER) for frame in self.stack):
            return "waiting for data"
        return "waiting" if self.is_waiting else "stuck"


def group_by_stack(beats: Sequence[Heartbeat]) -> list[list[Heartbeat]]:
    """Return the heartbeats with equal stacks together, which one message describes."""
    by_stack: dict[tuple[str, ...], list[Heartbeat]] = {}
    for beat in beats:
        by_stack.setdefault(tuple(beat.stack), []).append(beat)
    return [*by_stack.values()]


def stage_waits(beats: Sequence[Heartbeat]) -> str:
    """Return a line for each wait for another pipeline stage: `rank 5 (stage 2) waits for …`.

    Each line starts with a line break; empty without waits.
    """
    ranks: dict[str, list[int]] = {}
    for beat in beats:
        if beat.waits_for:
            ranks.setdefault(beat.waits_for, []).append(beat.rank)
    lines = []
    for wait, waiting in sorted(ranks.items(), key=lambda each: each[1]):
        stage, verb, what = wait.partition(" waits ")
        verb = verb if len(waiting) == 1 else " wait "
        lines.append(f"\n{name_ranks(waiting)} ({stage}){verb}{what}")
    return "".join(lines)


def hosts_at_fault(suspects: Sequence[Heartbeat], beats: Sequence[Heartbeat]) -> list[str]:
    """Return the hosts of the suspected ranks; none if they are all of several hosts of the run."""
    hosts = list(dict.fromkeys(beat.host for beat in suspects))
    n_hosts = len({beat.host for beat in beats})
    return hosts if len(hosts) < n_hosts or n_hosts == 1 else []


def stack_of(thread: int | None) -> list[str]:
    """Return the stack of a thread as `file:line function`, innermost frame last.

    Library frames other than the innermost are omitted.
    """
    frame = sys._current_frames().get(thread or 0)
    if frame is None:
        return []
    # Not `traceback.extract_stack`, which reads the source files: their disk may hang.
    inner, *outer = [(f.f_code, number) for f, number in traceback.walk_stack(frame)]
    # The virtual environment may be a subfolder of the repository.
    own = [
        each
        for each in outer
        if each[0].co_filename.startswith(ROOT) and "site-packages" not in each[0].co_filename
    ]
    frames = [*reversed(own[:MAX_FRAMES]), inner]
    return [f"{_short_path(code.co_filename)}:{number} {code.co_name}" for code, number in frames]


def _short_path(path: str) -> str:
    """Return a path relative to site-packages or to the repository."""
    _, found, rest = path.rpartition(f"site-packages{os.sep}")
    return rest if found else path.removeprefix(ROOT)
