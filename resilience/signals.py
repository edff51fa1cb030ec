"""Requests of one process to all ranks: stop, with a reason, or save now.

A signal may reach any rank, and a clock may expire on one rank first, but all ranks must stop after
the same step. Each process therefore only records requests; they are summed in the all-reduce of
the gradient norm (`parallel.step_scalars`), and all ranks read the same sums after the same step.
A new request is a field of `StepRequests`; a reason to stop is named like its exit code.
"""

import math
import os
import signal
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

from parallel.step_scalars import StepRequests
from resilience.exit_codes import ExitCode

SIGNALS = {
    signal.SIGINT: ExitCode.INTERRUPTED,
    signal.SIGTERM: ExitCode.TERMINATED,
    signal.SIGHUP: ExitCode.TERMINATED,  # the terminal was closed
    signal.SIGUSR1: ExitCode.STOPPED,
}
START_TIME = time.monotonic()  # this module is imported when the program starts
REPEAT_SECONDS = 0.3  # an earlier second SIGINT is the same Ctrl-C, forwarded by torchrun
MARGIN_SECONDS = 30.0  # before a time limit, in addition to steps and checkpoints


OnSignal = Callable[[signal.Signals, bool], None]
"""Called with a signal, and whether it is a second Ctrl-C."""


class AgreedRequests(NamedTuple):
    """What all ranks do after a step."""

    stop: ExitCode | None
    save: bool


class Requests:
    """Requests of this process, from its signals and clocks.

    Args:
        time_limit_minutes: Time from program start within which it must exit; None for no limit.
        time_left_seconds: Time from now until the scheduler's limit; None without one.
        save_minutes: Time between two checkpoints; None to save by steps only. Set on one process.
    """

    def __init__(
        self,
        time_limit_minutes: float | None = None,
        time_left_seconds: float | None = None,
        save_minutes: float | None = None,
    ) -> None:
        now = time.monotonic()
        self._stop_reason: ExitCode | None = None
        limits = [] if time_limit_minutes is None else [START_TIME + 60 * time_limit_minutes]
        limits += [] if time_left_seconds is None else [now + time_left_seconds]
        self._deadline = min(limits, default=math.inf)
        # A short limit, as of a test run, should still be spent mostly on training.
        self._margin = min(MARGIN_SECONDS, (self._deadline - now) / 10)
        self._previous_call: float | None = None
        self._longest_step = self._longest_save = 0.0
        self._save_seconds = math.inf if save_minutes is None else 60 * save_minutes
        self._next_save = now + self._save_seconds
        self._on_signal: OnSignal = lambda number, again: None

    def catch_signals(self, on_early_signal: Callable[[ExitCode], None]) -> None:
        """Turn SIGINT, SIGTERM, SIGHUP and SIGUSR1 into requests; call it in the main thread.

        SIGHUP stays ignored under `nohup`.

        Args:
            on_early_signal: Called before `start_training`, when there is no step to finish. It
                runs in a separate thread, because rendezvous may block the main thread forever.
        """
        self._on_signal = lambda number, again: on_early_signal(SIGNALS[number])
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        for number in SIGNALS:
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue
            signal.signal(number, lambda *_: None)
        # Python-level handlers run in the main thread only; this pipe is written immediately.
        signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        threading.Thread(
            target=self._listen, args=(reading,), name="llamesh-signals", daemon=True
        ).start()

    def start_training(self, on_signal: OnSignal = lambda number, again: None) -> None:
        """From now on, a signal takes effect at the end of the step.

        Args:
            on_signal: Called in a separate thread with the first signal of each kind, and with a
                second Ctrl-C.
        """
        self._on_signal = on_signal

    def request_stop(self, reason: ExitCode) -> None:
        """Request that the run stops after this step; the first reason counts."""
        self._stop_reason = self._stop_reason or reason

    def record_save(self, seconds: float) -> None:
        """Record how long a checkpoint took to write and commit, to plan for the next one."""
        self._longest_save = max(self._longest_save, seconds)

    def current(self) -> StepRequests:
        """Return the requests of this process for the step about to run.

        Called once per step, and therefore also measures the longest time between steps.
        """
        now = time.monotonic()
        if self._previous_call is not None:
            self._longest_step = max(self._longest_step, now - self._previous_call)
        self._previous_call = now
        # Two steps: this one, and the next before the sums are read. Two checkpoints: one possibly
        # running, and the last.
        needed = self._margin + 2 * self._longest_step + 2 * self._longest_save
        if self._deadline - now < needed:
            self.request_stop(ExitCode.STOPPED)
        save = now >= self._next_save
        if save:
            self._next_save = now + self._save_seconds
        reason = {} if self._stop_reason is None else {self._stop_reason.name.lower(): 1}
        return StepRequests(**reason, save=int(save))

    def _listen(self, reading: int) -> None:
        """Read signal numbers from the pipe."""
        first: dict[signal.Signals, float] = {}
        while byte := os.read(reading, 1):
            number, now = signal.Signals(byte[0]), time.monotonic()
            if number not in SIGNALS:
                continue
            self.request_stop(SIGNALS[number])
            is_first = number not in first
            again = now - first.setdefault(number, now) > REPEAT_SECONDS
            if is_first or (again and number == signal.SIGINT):
                self._on_signal(number, again)


def agree(requests: StepRequests) -> AgreedRequests:
    """Return the action for the requests summed over all ranks; the first reason to stop counts."""
    reasons = [name for name, count in vars(requests).items() if count and name != "save"]
    return AgreedRequests(ExitCode[reasons[0].upper()] if reasons else None, bool(requests.save))
