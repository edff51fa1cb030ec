"""An exit at a set time that needs no Python thread, no lock and no file system.

A call that hangs may hold the GIL (a page fault in a mapped file, the driver of a GPU), a log file
may be on a disk that hangs, and Python's finalization joins threads. The C library calls `_exit`
from a thread of its own.
"""

import ctypes
import math
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from resilience.blocked_threads import blocked_threads, describe

REPORT_SECONDS = 5.0  # for a message before an exit, whose file may be on the disk that hangs
_SIGEV_THREAD = 2  # bits/sigevent-consts.h of glibc
_CLOCK_MONOTONIC = 1


class _SigEvent(ctypes.Structure):  # struct sigevent: 64 bytes
    _fields_ = (
        ("value", ctypes.c_long),  # union sigval: the argument of `function`, an int or a pointer
        ("signal", ctypes.c_int),
        ("notify", ctypes.c_int),
        ("function", ctypes.c_void_p),
        ("rest", ctypes.c_byte * 40),
    )


class _TimerSpec(ctypes.Structure):  # struct itimerspec
    _fields_ = (
        ("interval_seconds", ctypes.c_long),
        ("interval_nanoseconds", ctypes.c_long),
        ("seconds", ctypes.c_long),
        ("nanoseconds", ctypes.c_long),
    )


class ExitTimer:
    """Exits this process with one of several codes; on Linux only, elsewhere it does nothing."""

    def __init__(self) -> None:
        self._timers: dict[int, ctypes.c_void_p] = {}
        self._libc = ctypes.CDLL(None, use_errno=True)

    def start(self, seconds: float, code: int) -> None:
        """Exit after `seconds` with `code`, replacing an earlier call."""
        self.cancel()
        if sys.platform == "linux":
            seconds = max(seconds, 1e-3)  # 0 would stop the timer
            self._set(self._timer(code), seconds)

    def cancel(self) -> None:
        """Do not exit."""
        for timer in self._timers.values():
            self._set(timer, 0.0)

    def _timer(self, code: int) -> ctypes.c_void_p:
        """Return the timer of an exit code, created once."""
        if code not in self._timers:
            timer, function = ctypes.c_void_p(), ctypes.cast(self._libc._exit, ctypes.c_void_p)
            event = _SigEvent(value=code, notify=_SIGEV_THREAD, function=function)
            if self._libc.timer_create(_CLOCK_MONOTONIC, ctypes.byref(event), ctypes.byref(timer)):
                raise OSError(ctypes.get_errno(), "timer_create")
            self._timers[code] = timer
        return self._timers[code]

    def _set(self, timer: ctypes.c_void_p, seconds: float) -> None:
        whole = int(seconds)
        spec = _TimerSpec(seconds=whole, nanoseconds=int((seconds - whole) * 1e9))
        self._libc.timer_settime(timer, 0, ctypes.byref(spec), None)


def run_limited(function: Callable[[], None], seconds: float) -> None:
    """Run a function that may hang in another thread, and wait for it at most `seconds`."""
    thread = threading.Thread(target=function, daemon=True)
    thread.start()
    thread.join(seconds)


@contextmanager
def exit_if_late(activity: str, seconds: float, code: int) -> Iterator[None]:
    """Exit if a block that reads or writes files takes too long; report where it is blocked.

    Args:
        activity: What the block does, for the message.
        seconds: Its limit; infinite without one.
    """
    done = threading.Event()

    def watch() -> None:
        if done.wait(min(seconds, threading.TIMEOUT_MAX)):
            return
        waits = describe(f"the process (pid {os.getpid()})", blocked_threads())
        message = f"Aborting: {activity} takes more than {seconds:,g} s. {waits}".rstrip()
        run_limited(lambda: print(message, file=sys.stderr, flush=True), REPORT_SECONDS)
        os._exit(code)

    thread = threading.Thread(target=watch, daemon=True)
    if seconds < math.inf:
        thread.start()
    try:
        yield
    finally:
        done.set()
        if seconds < math.inf:
            thread.join()  # a process with one thread can be forked safely
