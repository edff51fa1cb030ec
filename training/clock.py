"""Where the time of a run's steps goes, without what lies between them (validation, saving)."""

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Clock:
    """Adds up the seconds of steps, and of the waits for data inside them, until it is read."""

    def __init__(self) -> None:
        self.steps, self.seconds, self.data_seconds = 0, 0.0, 0.0

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around one step."""
        begin = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - begin
        self.steps += 1

    @contextmanager
    def data(self) -> Iterator[None]:
        """Around the wait for data, inside a step."""
        begin = time.perf_counter()
        yield
        self.data_seconds += time.perf_counter() - begin

    def read(self) -> tuple[int, float, float]:
        """Steps, their seconds and their data seconds since the last reading; starts afresh."""
        reading = self.steps, self.seconds, self.data_seconds
        self.steps, self.seconds, self.data_seconds = 0, 0.0, 0.0
        return reading
