"""What one process may ask of all: to stop, and why, or to save now.

A signal may reach any rank, and a clock may run out on one of them first; but a step is taken by
all or by none. So each process only notes what it is asked, the notes ride on the step's one
reduction over all ranks, and every rank reads the same sum after the same step.
"""

import math
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from resilience.exit_codes import ExitCode

SIGNALS = {
    signal.SIGINT: ExitCode.INTERRUPTED,
    signal.SIGTERM: ExitCode.TERMINATED,
    signal.SIGUSR1: ExitCode.STOPPED,
}
# Why a run may be asked to stop; where several ask at once, the first of these is told.
REASONS = (
    ExitCode.INTERRUPTED,
    ExitCode.TERMINATED,
    ExitCode.STOPPED,
    ExitCode.SAVE_FAILED,
)
STARTED = time.monotonic()  # this module is imported when the program starts
MARGIN_SECONDS = 30.0  # before a time limit, beyond what steps and checkpoints take
QUIET = (0.0,) * (len(REASONS) + 1)  # the values of a process that is asked for nothing


class Agreed(NamedTuple):
    """What the processes asked for together."""

    stop: ExitCode | None
    save: bool


class Requests:
    """What this process is asked, from its signals and its clocks.

    Args:
        time_limit: Minutes from the program's start within which it must end; None for no limit.
        time_left: Seconds from now that a scheduler leaves it, None where there is none.
        save_minutes: Time between two checkpoints, None for steps alone; one process keeps it.
    """

    def __init__(
        self,
        time_limit: float | None = None,
        time_left: float | None = None,
        save_minutes: float | None = None,
    ) -> None:
        now = time.monotonic()
        self._asked: set[ExitCode] = set()
        limits = [] if time_limit is None else [STARTED + 60 * time_limit]
        limits += [] if time_left is None else [now + time_left]
        self._end = min(limits, default=math.inf)
        # A short limit, as of a trial, leaves most of itself to the training.
        self._margin = min(MARGIN_SECONDS, (self._end - now) / 10)
        self._last_values: float | None = None
        self._longest_step = self._longest_save = 0.0
        save_seconds = None if save_minutes is None else 60 * save_minutes
        self._save_seconds = save_seconds
        self._next_save = None if save_seconds is None else now + save_seconds
        self._trains = False
        self._early: Callable[[ExitCode], None] = lambda code: None

    def catch_signals(self, early: Callable[[ExitCode], None]) -> None:
        """From now on SIGINT, SIGTERM and SIGUSR1 are requests; call it in the main thread.

        Until `begin`, while the processes find each other, there is no step to finish: `early` is
        called, in a thread of its own, since the main one may stand in a call that never returns.
        """
        self._early = early
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        for number in SIGNALS:
            signal.signal(number, lambda *_: None)
        # Python's handlers wait for the main thread; this pipe is written to at once.
        signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        threading.Thread(
            target=self._listen, args=(reading,), name="llamesh-signals", daemon=True
        ).start()

    def begin(self) -> None:
        """Training begins: from now on a signal waits for the end of the step."""
        self._trains = True

    def ask(self, code: ExitCode) -> None:
        """Asks the run to stop after this step; asking twice is asking once."""
        self._asked.add(code)

    def note_save(self, seconds: float) -> None:
        """How long a checkpoint took, from the first byte to its commitment: so may the next."""
        self._longest_save = max(self._longest_save, seconds)

    def values(self) -> list[float]:
        """What is asked now, a number for each reason and one for saving, to be summed.

        Called once a step, so it also learns how long steps take, with all that lies between them.
        """
        now = time.monotonic()
        if self._last_values is not None:
            self._longest_step = max(self._longest_step, now - self._last_values)
        self._last_values = now
        # Two steps: this one, and the next before the sum is read. Two checkpoints: one that is
        # being written, and the last.
        needed = self._margin + 2 * self._longest_step + 2 * self._longest_save
        if self._end - now < needed:
            self.ask(ExitCode.STOPPED)
        asked = self._asked.copy()
        save = self._next_save is not None and now >= self._next_save
        if save:
            assert self._save_seconds is not None
            self._next_save = now + self._save_seconds
        return [float(reason in asked) for reason in REASONS] + [float(save)]

    def _listen(self, reading: int) -> None:
        """Takes the numbers of signals out of the pipe."""
        while number := os.read(reading, 1):
            code = SIGNALS.get(signal.Signals(number[0]))
            if code is None:
                continue
            self.ask(code)
            if not self._trains:
                self._early(code)


def agreed(sums: Sequence[float]) -> Agreed:
    """What the sum of every process's `values` means."""
    *reasons, save = sums
    asked = (reason for reason, value in zip(REASONS, reasons, strict=True) if value)
    return Agreed(next(asked, None), bool(save))
