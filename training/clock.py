"""Wall-clock accounting of a run: steps, waits for data, and stalls between steps."""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext


class Clock:
    """Accumulate the seconds spent in steps, waiting for data within them, and in stalls.

    `read` returns and resets the counters since the last logged step; `spent` returns totals since
    launch. A profile sets `around_data` to a context that marks each wait for data in its trace.
    """

    def __init__(self) -> None:
        self._steps, self._seconds, self._data_wait_seconds = 0, 0.0, 0.0
        self._launched = time.perf_counter()
        self._productive = self._stalled = 0.0
        self.around_data: Callable[[], AbstractContextManager[None]] = nullcontext

    @contextmanager
    def step(self) -> Iterator[None]:
        """Time one step."""
        start = time.perf_counter()
        yield
        seconds = time.perf_counter() - start
        self._seconds += seconds
        self._productive += seconds
        self._steps += 1

    @contextmanager
    def data(self) -> Iterator[None]:
        """Time the wait for data within a step."""
        start = time.perf_counter()
        with self.around_data():
            yield
        self._data_wait_seconds += time.perf_counter() - start

    @contextmanager
    def stall(self) -> Iterator[None]:
        """Time work that delays the next step: a save, validation or a text sample."""
        start = time.perf_counter()
        yield
        self._stalled += time.perf_counter() - start

    def read(self) -> tuple[int, float, float]:
        """Return the number of steps, their seconds and their data wait, and reset all three."""
        reading = self._steps, self._seconds, self._data_wait_seconds
        self._steps, self._seconds, self._data_wait_seconds = 0, 0.0, 0.0
        return reading

    def spent(self) -> dict[str, float]:
        """Return the seconds since launch, in steps, and in stalls."""
        return {
            "elapsed_seconds": round(time.perf_counter() - self._launched, 3),
            "productive_seconds": round(self._productive, 3),
            "stalled_seconds": round(self._stalled, 3),
        }
