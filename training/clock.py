"""Where the time of a run's steps goes, and that of what lies between them."""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext


class Clock:
    """Adds up the seconds of steps, of the waits for data inside them, and of stalls between them.

    Steps are read for the figures and begin afresh with each reading (`read`); the sums over all
    that this start of a run has spent (`spent`) are for the ledger. `around_data` is entered with
    each wait for data, which a profile marks.
    """

    def __init__(self) -> None:
        self.steps, self.seconds, self.data_wait_seconds = 0, 0.0, 0.0
        self._began = time.perf_counter()
        self._productive = self._stalled = 0.0
        self.around_data: Callable[[], AbstractContextManager[None]] = nullcontext

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around one step."""
        begin = time.perf_counter()
        yield
        seconds = time.perf_counter() - begin
        self.seconds += seconds
        self._productive += seconds
        self.steps += 1

    @contextmanager
    def data(self) -> Iterator[None]:
        """Around the wait for data, inside a step."""
        begin = time.perf_counter()
        with self.around_data():
            yield
        self.data_wait_seconds += time.perf_counter() - begin

    @contextmanager
    def stall(self) -> Iterator[None]:
        """Around what keeps the steps waiting: a save, a validation, a text sample."""
        begin = time.perf_counter()
        yield
        self._stalled += time.perf_counter() - begin

    def read(self) -> tuple[int, float, float]:
        """Steps, their seconds and their data seconds since the last reading; starts afresh."""
        reading = self.steps, self.seconds, self.data_wait_seconds
        self.steps, self.seconds, self.data_wait_seconds = 0, 0.0, 0.0
        return reading

    def spent(self) -> dict[str, float]:
        """Seconds since this clock was made, those in steps, and those in stalls."""
        return {
            "elapsed_seconds": round(time.perf_counter() - self._began, 3),
            "productive_seconds": round(self._productive, 3),
            "stalled_seconds": round(self._stalled, 3),
        }
