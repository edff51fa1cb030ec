"""A signal on any process, or an expired clock, becomes a request that all ranks agree on."""

import signal
import subprocess
import sys
from dataclasses import astuple, fields

import pytest

from parallel.step_scalars import NO_REQUESTS, StepRequests
from resilience import signals
from resilience.exit_codes import ExitCode
from resilience.signals import SIGNALS, Requests, agree

TIMEOUT_SECONDS = 60  # only a hanging process takes this long

PROGRAM = """
import os, sys
from resilience.signals import Requests, agree
requests = Requests()
requests.catch_signals(on_early_signal=lambda code: os._exit(code))
{body}
"""
TRAINING = """
requests.start_training()
print("ready", flush=True)
for line in sys.stdin:
    print(agree(requests.current()).stop, flush=True)
"""
# Locking the same mutex twice blocks forever in C, regardless of signals.
BLOCKED = """
import ctypes
mutex, library = ctypes.create_string_buffer(64), ctypes.CDLL(None)
print("ready", flush=True)
library.pthread_mutex_lock(mutex)
library.pthread_mutex_lock(mutex)
"""


def start(body: str) -> "subprocess.Popen[str]":
    """Start a process that catches signals, and wait until it is ready."""
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM.format(body=body)],
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
    process = start(TRAINING)
    assert process.stdin is not None and process.stdout is not None
    for _ in range(2):
        process.send_signal(number)
        line = ""
        while line != str(int(SIGNALS[number])):  # ended by the test's timeout if it never comes
            print(file=process.stdin, flush=True)
            line = process.stdout.readline().strip()
            assert line in ("None", str(int(SIGNALS[number])))
    process.stdin.close()
    assert process.wait(TIMEOUT_SECONDS) == 0


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_signal_before_training_is_handled_while_the_main_thread_is_blocked(
    number: signal.Signals,
) -> None:
    process = start(BLOCKED)
    process.send_signal(number)
    assert process.wait(TIMEOUT_SECONDS) == SIGNALS[number]


def test_hangup_stays_ignored_under_nohup() -> None:
    program = PROGRAM.format(body="print(signal.getsignal(signal.SIGHUP) is signal.SIG_IGN)")
    ignored = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
    done = subprocess.run(
        [sys.executable, "-c", ignored + program], capture_output=True, text=True, check=True
    )
    assert done.stdout == "True\n"


class Clock:
    """Time controlled by the test."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(signals, "time", clock)
    return clock


def all_reduce(*requests: StepRequests) -> StepRequests:
    """Sum the requests of several ranks."""
    return StepRequests(*(sum(values) for values in zip(*map(astuple, requests), strict=True)))


def test_request_of_one_rank_applies_to_all_and_the_first_reason_counts() -> None:
    idle, with_user, with_terminal = Requests(), Requests(), Requests()
    assert agree(all_reduce(idle.current(), idle.current())) == (None, False)
    with_user.request_stop(ExitCode.STOPPED)
    summed = all_reduce(idle.current(), with_user.current(), idle.current())
    assert agree(summed).stop == ExitCode.STOPPED
    with_terminal.request_stop(ExitCode.INTERRUPTED)
    summed = all_reduce(with_user.current(), with_terminal.current(), with_terminal.current())
    assert agree(summed).stop == ExitCode.INTERRUPTED


def test_every_reason_to_stop_has_an_exit_code() -> None:
    for field in fields(StepRequests):
        stop, save = agree(StepRequests(**{field.name: 2}))
        if field.name == "save":
            assert (stop, save) == (None, True)
        else:
            assert (stop, save) == (ExitCode[field.name.upper()], False)
    assert {code.name.lower() for code in SIGNALS.values()} < {f.name for f in fields(StepRequests)}


def test_run_stops_while_two_steps_and_two_checkpoints_fit_before_the_limit(clock: Clock) -> None:
    requests = Requests(time_left_seconds=3600)
    for seconds in (0, 4, 10, 3):
        clock.now += seconds
        assert agree(requests.current()).stop is None
    requests.record_save(100)
    needed = signals.MARGIN_SECONDS + 2 * 10 + 2 * 100
    while (left := 1000 + 3600 - clock.now) >= needed:
        assert agree(requests.current()).stop is None
        clock.now += 10
    assert left < needed and agree(requests.current()).stop == ExitCode.STOPPED


@pytest.mark.parametrize("first", SIGNALS, ids=lambda number: number.name)
def test_first_of_two_reasons_to_stop_counts(first: signal.Signals) -> None:
    requests = Requests()
    for number in (first, *SIGNALS):
        requests.request_stop(SIGNALS[number])
    assert agree(requests.current()).stop == SIGNALS[first]


def test_earlier_of_two_limits_counts(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "START_TIME", clock.now - 600)
    own = Requests(time_limit_minutes=15, time_left_seconds=3600)
    scheduler = Requests(time_limit_minutes=90, time_left_seconds=300)
    clock.now += 299
    assert agree(own.current()).stop == agree(scheduler.current()).stop == ExitCode.STOPPED


def test_short_limit_is_spent_mostly_on_training(clock: Clock) -> None:
    requests = Requests(time_left_seconds=20)
    clock.now += 17
    assert agree(requests.current()).stop is None
    clock.now += 2
    assert agree(requests.current()).stop == ExitCode.STOPPED


def test_save_is_requested_once_per_interval(clock: Clock) -> None:
    requests = Requests(save_minutes=1)
    saves = []
    for _ in range(20):
        clock.now += 10
        saves.append(agree(requests.current()).save)
    assert [call for call, save in enumerate(saves, start=1) if save] == [6, 12, 18]


def test_idle_process_requests_nothing() -> None:
    assert Requests().current() == NO_REQUESTS
    assert agree(NO_REQUESTS) == (None, False)
