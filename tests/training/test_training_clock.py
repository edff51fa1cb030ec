"""The clock counts time within steps and not between them."""

import pytest

from training.clock import Clock


class FakeTime:
    """Replace `time.perf_counter` by a value that the test sets."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr("training.clock.time.perf_counter", lambda: self.now)


def test_step_and_data_wait_seconds_exclude_time_between_steps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake, clock = FakeTime(monkeypatch), Clock()
    for data, compute, between in ((1.0, 4.0, 16.0), (2.0, 8.0, 32.0)):
        with clock.step():
            with clock.data():
                fake.now += data
            fake.now += compute
        fake.now += between  # validation, saving
    assert clock.read() == (2, 15.0, 3.0)


def test_read_resets_counters(monkeypatch: pytest.MonkeyPatch) -> None:
    fake, clock = FakeTime(monkeypatch), Clock()
    with clock.step():
        fake.now += 1
    clock.read()
    assert clock.read() == (0, 0.0, 0.0)
    with clock.step():
        fake.now += 2
    assert clock.read() == (1, 2.0, 0.0)


def test_steps_and_stalls_are_summed_separately(monkeypatch: pytest.MonkeyPatch) -> None:
    fake, clock = FakeTime(monkeypatch), Clock()
    for _ in range(2):
        with clock.step():
            fake.now += 1.0
        with clock.stall():
            fake.now += 2.0
        fake.now += 4.0
        clock.read()
    assert clock.spent() == {
        "elapsed_seconds": 14.0,
        "productive_seconds": 2.0,
        "stalled_seconds": 4.0,
    }
