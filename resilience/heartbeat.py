"""A sign of life: how far a process is, and where its main thread stands.

Stacks are told in the house's own lines, and the innermost place: what matters is which of our
lines led there. Who stands inside of torch waits for another, as a rule.
"""

import os
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Phase = Literal["set-up", "step", "checkpoint"]

FRAMES = 12  # of a stack, the innermost
HOUSE = str(Path(__file__).parent.parent) + os.sep


@dataclass(frozen=True)
class Beat:
    """A sign of life: which process, what it is at, for how long, and where.

    One that `suspects` has lost its connection to another.
    """

    rank: int
    host: str
    pid: int
    phase: Phase
    step: int
    seconds: float
    count: int
    suspects: bool
    stack: list[str]

    def __str__(self) -> str:
        return f"rank {self.rank} (process {self.pid} on {self.host})"

    @property
    def work(self) -> str:
        """What it is at, in words."""
        return "set-up" if self.phase == "set-up" else f"{self.phase} {self.step}"

    @property
    def waits(self) -> bool:
        """Whether it stands inside of torch, as those do that wait for another."""
        return bool(self.stack) and "torch" in self.stack[-1].split(":")[0].split(os.sep)


def told_silent(beat: Beat, seconds: float) -> str:
    """What is told of a process that is not heard of."""
    return (
        f"{beat} gives no sign of life for {seconds:.0f} s: dead, frozen or cut off; last seen in "
        f"{beat.work}, here:\n{indented(beat.stack)}"
    )


def told_late(beat: Beat, others: Sequence[Beat] = ()) -> str:
    """What is told of processes that have been at the same place for too long."""
    also = f" and ranks {', '.join(str(other.rank) for other in others)}" if others else ""
    stands = "waits" if beat.waits else "is stuck"
    return f"{beat}{also} {stands} in {beat.work} for {beat.seconds:.0f} s, here:\n" + indented(
        beat.stack
    )


def stack_of(thread: int | None) -> list[str]:
    """Where a thread stands, the innermost place last: `file:line function`.

    Of the libraries only that place is told: what matters is which of our lines led there.
    """
    frame = sys._current_frames().get(thread or 0)
    if frame is None:
        return []
    *outer, inner = traceback.extract_stack(frame)
    ours = [each for each in outer if _is_ours(each.filename)][-FRAMES:]
    return [f"{_short(each.filename)}:{each.lineno} {each.name}" for each in [*ours, inner]]


def _is_ours(path: str) -> bool:
    """Whether a file is the house's, in which an environment may lie too."""
    return path.startswith(HOUSE) and "site-packages" not in path


def _short(path: str) -> str:
    """A path from the house, or from its package, on."""
    _, found, rest = path.rpartition(f"site-packages{os.sep}")
    return rest if found else path.removeprefix(HOUSE)


def indented(lines: Sequence[str]) -> str:
    """Lines under a sentence."""
    return "\n".join(f"    {line}" for line in lines)
