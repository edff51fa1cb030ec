"""Looks inside a step: a profiler trace, what memory it took, and where its time went.

For the steps of `log.profile`, on rank 0 alone: the others do the same work, and wait for it. A
step that is looked into takes longer, by what the recording costs; one that is not costs nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from training.step_times import DATA, STEP, StepTimes, read_step_times

TRACE, MEMORY, TABLE = "trace.json.gz", "memory.pickle", "time.txt"
ALLOCATIONS = 1_000_000  # events that the memory's history holds at most


class StepProfile:
    """One step, recorded: enter `record` around it, then `write` what was seen.

    On CUDA the recording waits for the device before and after the step, so that all of its work,
    and none of another's, lies inside.
    """

    def __init__(self, device: torch.device) -> None:
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or it tells of its own start and stop
        self.device = device
        activities = [ProfilerActivity.CPU]
        if device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        # Allocations go into the trace too: CPU memory has no snapshot.
        self._profile = profile(activities=activities, record_shapes=True, profile_memory=True)
        self._snapshot: Any = None

    @contextmanager
    def record(self) -> Iterator[None]:
        """Around the step."""
        with self._memory_history(), self._profile:
            self._wait()
            with record_function(STEP):
                yield
                self._wait()

    @staticmethod
    def data() -> Any:
        """Around the wait for data, inside the step."""
        return record_function(DATA)

    def write(self, folder: Path) -> StepTimes:
        """Writes the trace, on CUDA the memory's snapshot, and the table of times.

        Raises:
            OSError: the folder cannot be written.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self._profile.export_chrome_trace(str(folder / TRACE))
        if self._snapshot is not None:
            import pickle

            with (folder / MEMORY).open("wb") as file:
                pickle.dump(self._snapshot, file)
        times = read_step_times(folder / TRACE)
        (folder / TABLE).write_text(times.table() + "\n", encoding="utf-8")
        return times

    @contextmanager
    def _memory_history(self) -> Iterator[None]:
        """Records every allocation on CUDA, for https://pytorch.org/memory_viz."""
        if self.device.type != "cuda":
            yield
            return
        torch.cuda.memory._record_memory_history(max_entries=ALLOCATIONS)
        try:
            yield
            self._snapshot = torch.cuda.memory._snapshot()
        finally:
            torch.cuda.memory._record_memory_history(enabled=None)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
