"""Wall-clock accounting of a run: steps, waits for data, and stalls between steps.

CUDA executes a step after the host has queued it. The host's time of a step therefore ends when
statistics arrive from the device: those of the step before, since they are read one step late, or
its own where the loop logs or saves. Between two such points at which the device is idle, the steps
add up to the time that they took on the device, without a synchronization for the measurement.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

from parallel.timestamps import seconds_between, timestamp
from training.plan_comparison import MEASURED_STEPS


class Clock:
    """Accumulate the seconds spent in steps, waiting for data within them, and in stalls.

    `read` returns and resets the counters since the last logged step; `spent` returns totals since
    launch. A profile sets `around_data` to a context that marks each wait for data in its trace.

    Args:
        device_type: On `cuda`, a wait for data counts only while the device has no work.

    Attributes:
        newest_steps: Seconds of each of the newest steps, on a GPU with the delay above.
    """

    def __init__(self, device_type: str = "cpu") -> None:
        self.newest_steps: deque[float] = deque(maxlen=MEASURED_STEPS)
        self._steps, self._seconds, self._data_wait_seconds = 0, 0.0, 0.0
        self._data_waits: deque[tuple[Any, Any]] = deque()  # start and end, not yet added up
        self._timestamp = partial(timestamp, device_type)
        self._launched = time.perf_counter()
        self._productive = self._stalled = 0.0
        self.around_data: Callable[[], AbstractContextManager[None]] = nullcontext

    @contextmanager
    def step(self) -> Iterator[None]:
        """Time one step, up to the arrival of the statistics that are due."""
        before = self._seconds
        with self.drain():
            yield
        self.newest_steps.append(self._seconds - before)
        self._steps += 1
        # The newest wait may still be in the device's queue.
        self._add_data_waits(len(self._data_waits) - 1)

    @contextmanager
    def drain(self) -> Iterator[None]:
        """Time a wait for steps that the device has in its queue."""
        start = time.perf_counter()
        yield
        seconds = time.perf_counter() - start
        self._seconds += seconds
        self._productive += seconds

    @contextmanager
    def data(self) -> Iterator[None]:
        """Time the wait for data within a step."""
        start = self._timestamp()
        with self.around_data():
            yield
        self._data_waits.append((start, self._timestamp()))

    @contextmanager
    def stall(self) -> Iterator[None]:
        """Time work that delays the next step: a save, validation or a text sample."""
        start = time.perf_counter()
        yield
        self._stalled += time.perf_counter() - start

    def read(self) -> tuple[int, float, float]:
        """Return the number of steps, their seconds and their data wait, and reset all three.

        Called when the device has completed these steps.
        """
        self._add_data_waits(len(self._data_waits))
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

    def _add_data_waits(self, count: int) -> None:
        for _ in range(count):
            self._data_wait_seconds += seconds_between(*self._data_waits.popleft())
