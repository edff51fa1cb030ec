"""A signal on any process, or a clock that runs out, becomes a request that all agree on."""

import signal
import subprocess
import sys
from collections.abc import Sequence

import pytest

from resilience import signals as requests
from resilience.exit_codes import ExitCode
from resilience.signals import SIGNALS, Requests, agreed

DEADLINE = 60  # seconds for what takes a fraction of one

PROGRAM = """
import os, sys
from resilience.signals import Requests, agreed
asked = Requests()
asked.catch_signals(early=lambda code: os._exit(code))
{then}
"""
TRAINS = """
asked.begin()
print("ready", flush=True)
for line in sys.stdin:
    print(agreed(asked.values()).stop, flush=True)
"""
# The second lock of the same mutex: the C library waits for ever, whatever signal comes.
STANDS_STILL = """
import ctypes
mutex, library = ctypes.create_string_buffer(64), ctypes.CDLL(None)
print("ready", flush=True)
library.pthread_mutex_lock(mutex)
library.pthread_mutex_lock(mutex)
"""


def start(then: str) -> "subprocess.Popen[str]":
    """A process that catches signals, ready for them."""
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM.format(then=then)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_signal_while_training_is_a_request_and_a_second_one_changes_nothing(
    number: signal.Signals,
) -> None:
    process = start(TRAINS)
    assert process.stdin is not None and process.stdout is not None
    told = ""
    for _ in range(2):
        process.send_signal(number)
        told = ""
        while told != str(int(SIGNALS[number])):  # the test's time limit ends a vain wait
            print(file=process.stdin, flush=True)
            told = process.stdout.readline().strip()
            assert told in ("None", str(int(SIGNALS[number])))
    process.stdin.close()
    assert process.wait(DEADLINE) == 0


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_signal_before_training_is_answered_even_by_a_process_that_stands_still(
    number: signal.Signals,
) -> None:
    process = start(STANDS_STILL)
    process.send_signal(number)
    assert process.wait(DEADLINE) == SIGNALS[number]


class Clock:
    """Time that the test makes."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(requests, "time", clock)
    return clock


def summed(*values: Sequence[float]) -> list[float]:
    """What one reduction over the processes makes of their values."""
    return [sum(column) for column in zip(*values, strict=True)]


def test_request_of_one_rank_is_the_request_of_all_and_the_gravest_is_told() -> None:
    quiet, user, terminal = Requests(), Requests(), Requests()
    assert agreed(summed(quiet.values(), quiet.values())) == (None, False)
    user.ask(ExitCode.STOPPED)
    assert agreed(summed(quiet.values(), user.values(), quiet.values())).stop == ExitCode.STOPPED
    terminal.ask(ExitCode.INTERRUPTED)
    everybody = summed(user.values(), terminal.values(), terminal.values())
    assert agreed(everybody).stop == ExitCode.INTERRUPTED


def test_run_stops_while_two_steps_and_two_checkpoints_still_fit_before_the_limit(
    clock: Clock,
) -> None:
    asked = Requests(time_left=3600)
    for seconds in (0, 4, 10, 3):
        clock.now += seconds
        assert agreed(asked.values()).stop is None
    asked.note_save(100)
    needed = requests.MARGIN_SECONDS + 2 * 10 + 2 * 100
    while (left := 1000 + 3600 - clock.now) >= needed:
        assert agreed(asked.values()).stop is None
        clock.now += 10
    assert left < needed and agreed(asked.values()).stop == ExitCode.STOPPED


def test_the_earlier_of_two_limits_counts(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requests, "STARTED", clock.now - 600)
    own, scheduler = Requests(time_limit=15, time_left=3600), Requests(time_limit=90, time_left=300)
    clock.now += 299
    assert agreed(own.values()).stop == agreed(scheduler.values()).stop == ExitCode.STOPPED


def test_short_limit_is_spent_on_training_for_the_most_part(clock: Clock) -> None:
    asked = Requests(time_left=20)
    clock.now += 17
    assert agreed(asked.values()).stop is None
    clock.now += 2
    assert agreed(asked.values()).stop == ExitCode.STOPPED


def test_clock_asks_for_a_checkpoint_once_each_interval(clock: Clock) -> None:
    asked = Requests(save_minutes=1)
    told = []
    for _ in range(20):
        clock.now += 10
        told.append(agreed(asked.values()).save)
    assert [place for place, save in enumerate(told, start=1) if save] == [6, 12, 18]


def test_a_quiet_process_asks_for_nothing() -> None:
    assert tuple(Requests().values()) == requests.QUIET
    assert agreed(requests.QUIET) == (None, False)
