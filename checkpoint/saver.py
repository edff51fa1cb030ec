"""The `Saver`, which runs the commit protocol beside the training.

The training waits only for a copy of the tensors to host memory. A thread of each process then
writes the copy, over a process group of its own, so that its messages never mix with those of the
steps.
"""

import dataclasses
import queue
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from checkpoint import retention
from checkpoint.config import CheckpointConfig
from checkpoint.host_copy import State, copy_to_host
from checkpoint.position import Position
from checkpoint.saving import SaveFailed, one_line, tensors_of, write_checkpoint
from resilience.run_folder import COMMITTED, RunFolder

# How long a save may take is the watchdog's to say, not the process group's.
TIMEOUT = timedelta(days=7)


@dataclass(frozen=True)
class Outcome:
    """What became of a save.

    Args:
        error: Why there is no checkpoint, in one line; None where it is committed.
        stall_seconds: How long the training stood still for it.
        write_seconds: From the first file to the commit.
        bytes: Of all files of all ranks.
    """

    step: int
    path: Path
    error: str | None
    stall_seconds: float
    write_seconds: float
    bytes: int


class Saver:
    """Saves the checkpoints of a run, one at a time; every rank holds one and makes the same calls.

    Args:
        folder: The run's, on a file system that every rank sees.
        config: Whether to save beside the training, what to do when busy, what to keep.
        run_config: The resolved configuration, for those who read a checkpoint later.
        report: Told, in `poll`, of old checkpoints that could not be removed.
        beside: Small files that travel with every checkpoint, by name.
    """

    def __init__(
        self,
        folder: RunFolder,
        config: CheckpointConfig,
        run_config: dict[str, Any],
        report: Callable[[str], None],
        beside: Mapping[str, bytes] | None = None,
    ) -> None:
        self._folder, self._config, self._run_config = folder, config, run_config
        self._report, self._beside = report, beside
        self._control = dist.new_group(backend="gloo", timeout=TIMEOUT)  # of the main thread
        self._group = dist.new_group(backend="gloo", timeout=TIMEOUT)  # of the one that writes
        self._thread: threading.Thread | None = None
        self._buffers: State | None = None
        self._outcomes: queue.SimpleQueue[Outcome] = queue.SimpleQueue()
        self._problems: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._reported: set[str] = set()

    def save(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        position: Position,
        wait: bool = False,
    ) -> bool:
        """Begins a save; returns when training may go on, and `poll` tells what became of it.

        Args:
            model: On any mesh.
            optimizer: Over the parameters of `model`.
            position: What has been done.
            wait: Whether to return only when it is committed or has failed.

        Returns:
            False where it was left out, as the one before is still being written. A committed
            checkpoint of the same step is left as it is, which counts as saved.
        """
        begin = time.perf_counter()
        if wait or self._config.when_busy == "wait":
            self.finish()
        answer = self._decide(position.step)
        if answer == "busy":
            return False
        self.finish()  # at most what is left to do when rank 0 is done
        if answer == "committed":
            return True
        state, values = tensors_of(model, optimizer), dataclasses.asdict(position)
        if wait or not self._config.async_save:
            self._write(state, values, begin, stall=None)
            return True
        self._buffers = copy_to_host(state, self._buffers)
        self._thread = threading.Thread(
            target=self._write,
            args=(self._buffers, values, time.perf_counter(), time.perf_counter() - begin),
            name="checkpoint",
            daemon=True,  # a process that gives up does not wait for it
        )
        self._thread.start()
        return True

    def poll(self) -> list[Outcome]:
        """What became of the saves that ended since the last call; costs next to nothing.

        The ranks may learn of the same save at different steps.
        """
        while not self._problems.empty():
            problem = self._problems.get()
            if problem not in self._reported:
                self._reported.add(problem)
                self._report(problem)
        found = []
        while not self._outcomes.empty():
            found.append(self._outcomes.get())
        return found

    def finish(self, seconds: float | None = None) -> None:
        """Waits until no save is being written, or so long."""
        if self._thread is not None:
            self._thread.join(seconds)
            if not self._thread.is_alive():
                self._thread = None

    def close(self) -> None:
        """Waits for the save that is being written, and gives the memory of the copies back."""
        self.finish()
        self._buffers = None

    def _decide(self, step: int) -> str:
        """What rank 0 makes of a request to save: `busy`, `committed` or `save`."""
        answer = ["save"]
        if dist.get_rank() == 0:
            if self._thread is not None and self._thread.is_alive():
                answer = ["busy"]
            elif (self._folder.step_folder(step) / COMMITTED).exists():
                answer = ["committed"]
        dist.broadcast_object_list(answer, group=self._control)
        return answer[0]

    def _write(
        self, state: State, position: dict[str, Any], begin: float, stall: float | None
    ) -> None:
        """Writes a checkpoint and notes the outcome; in the thread, or, without `stall`, here."""
        error, n_bytes = None, 0
        try:
            n_bytes = write_checkpoint(
                self._folder,
                state,
                position,
                self._run_config,
                self._group,
                self._problems.put,
                self._beside,
            )
        except SaveFailed as failure:
            error = str(failure)
        except Exception as failure:  # a peer that died, mostly
            error = f"rank {dist.get_rank()}: {one_line(failure)}"
        seconds = time.perf_counter() - begin
        path = self._folder.step_folder(position["step"])
        stalled = seconds if stall is None else stall
        if error is None and dist.get_rank() == 0:
            try:
                keep = self._config.keep_last, self._config.keep_every
                for problem in retention.remove_old(self._folder, *keep):
                    self._problems.put(problem)
            except OSError as failure:
                self._problems.put(f"old checkpoints cannot be looked through ({failure})")
        self._outcomes.put(Outcome(position["step"], path, error, stalled, seconds, n_bytes))
