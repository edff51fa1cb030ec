"""The clock counts what lies inside steps, and nothing between them."""

import pytest

from training.clock import Clock


class Hands:
    """A clock that stands still until it is moved."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr("training.clock.time.perf_counter", lambda: self.now)


def test_steps_and_waits_for_data_add_up_and_what_lies_between_does_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hands, clock = Hands(monkeypatch), Clock()
    for data, compute, between in ((1.0, 4.0, 16.0), (2.0, 8.0, 32.0)):
        with clock.step():
            with clock.data():
                hands.now += data
            hands.now += compute
        hands.now += between  # validation, saving
    assert clock.read() == (2, 15.0, 3.0)


def test_reading_starts_afresh(monkeypatch: pytest.MonkeyPatch) -> None:
    hands, clock = Hands(monkeypatch), Clock()
    with clock.step():
        hands.now += 1
    clock.read()
    assert clock.read() == (0, 0.0, 0.0)
    with clock.step():
        hands.now += 2
    assert clock.read() == (1, 2.0, 0.0)
