"""Background saving: run the commit protocol in a thread while training continues.

Training waits only for a copy of the tensors to host memory. A thread of each process then writes
the copy, using a separate process group so that its messages never interleave with messages of
the training steps.
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
from checkpoint.writer import SaveFailed, one_line, tensors_of, write_checkpoint
from resilience.run_folder import COMMITTED, RunFolder

# The watchdog limits the duration of a save, not the process group.
TIMEOUT = timedelta(days=7)


@dataclass(frozen=True)
class SaveResult:
    """Result of a save.

    Attributes:
        error: Reason in one line if there is no checkpoint; None if it is committed.
        stall_seconds: How long training waited.
        write_seconds: From the first file to the commit.
        bytes: Size of all files of all ranks.
    """

    step: int
    path: Path
    error: str | None
    stall_seconds: float
    write_seconds: float
    bytes: int


class Saver:
    """Save the checkpoints of a run, one at a time; all ranks make the same calls.

    Args:
        folder: Run folder, on a file system that every rank sees.
        config: Whether to save in the background, the action when busy, and retention.
        run_id: UUID of the run, used on rank 0.
        run_config: Resolved configuration, saved in the manifest.
        report: Called in `poll` with a message for each old checkpoint that cannot be deleted.
        extra_files: Small files saved with every checkpoint, by name.
    """

    def __init__(
        self,
        folder: RunFolder,
        run_id: str,
        config: CheckpointConfig,
        run_config: dict[str, Any],
        report: Callable[[str], None],
        extra_files: Mapping[str, bytes] | None = None,
    ) -> None:
        self._folder, self._run_id = folder, run_id
        self._config, self._run_config = config, run_config
        self._report, self._extra_files = report, extra_files
        self._main_group = dist.new_group(backend="gloo", timeout=TIMEOUT)
        self._write_group = dist.new_group(backend="gloo", timeout=TIMEOUT)
        self._thread: threading.Thread | None = None
        self._thread_step, self._thread_started = 0, 0.0
        self._buffers: State | None = None
        self._results: queue.SimpleQueue[SaveResult] = queue.SimpleQueue()
        self._errors: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._reported: set[str] = set()

    def save(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        position: Position,
        wait: bool = False,
    ) -> bool:
        """Start a save and return as soon as training may continue; `poll` returns its result.

        Args:
            wait: Return only after the checkpoint is committed or has failed.

        Returns:
            False if the save was skipped because another one is running. A committed checkpoint of
            the same step is kept and counts as saved.
        """
        started_at = time.perf_counter()
        if wait or self._config.when_busy == "wait":
            self.finish()
        decision = self._decide(position.step)
        if decision == "busy":
            return False
        self.finish()  # rank 0 has finished; wait for the remaining work of this rank
        if decision == "committed":
            return True
        values, waits = dataclasses.asdict(position), wait or not self._config.async_save
        state = tensors_of(model, optimizer, deferred=not waits)
        if waits:
            self._write(state, values, started_at, stall_seconds=None)
            return True
        self._buffers = copy_to_host(state, self._buffers)
        now = time.perf_counter()
        self._thread = threading.Thread(
            target=_run_on_device,
            args=(_current_device(), self._write, self._buffers, values, now, now - started_at),
            name="checkpoint",
            daemon=True,  # an aborting process does not wait for it
        )
        self._thread_step, self._thread_started = position.step, time.monotonic()
        self._thread.start()
        return True

    def running(self) -> tuple[int, float, int | None] | None:
        """Return step, start (`time.monotonic`) and thread of a save in the background."""
        thread = self._thread
        if thread is None or not thread.is_alive():
            return None
        return self._thread_step, self._thread_started, thread.ident

    def poll(self) -> list[SaveResult]:
        """Return the results of saves that ended since the last call, without waiting.

        Ranks may see the result of one save at different steps.
        """
        for _ in range(self._errors.qsize()):
            error = self._errors.get()
            if error not in self._reported:
                self._reported.add(error)
                self._report(error)
        return [self._results.get() for _ in range(self._results.qsize())]

    def finish(self, timeout_seconds: float | None = None) -> None:
        """Wait until no save is running, or until the timeout."""
        if self._thread is not None:
            self._thread.join(timeout_seconds)
            if not self._thread.is_alive():
                self._thread = None

    def _decide(self, step: int) -> str:
        """Return the decision of rank 0 about a request to save: save, busy or committed."""
        decision = ["save"]
        if self._thread is not None and self._thread.is_alive():
            decision = ["busy"]
        elif dist.get_rank() == 0 and (self._folder.step_folder(step) / COMMITTED).exists():
            decision = ["committed"]
        dist.broadcast_object_list(decision, group=self._main_group)
        return decision[0]

    def _write(
        self, state: State, position: dict[str, Any], started_at: float, stall_seconds: float | None
    ) -> None:
        """Write a checkpoint and queue its result.

        Args:
            stall_seconds: How long training waited for the copy; None if it waits for the write.
        """
        error, n_bytes = None, 0
        try:
            n_bytes = write_checkpoint(
                self._folder,
                self._run_id,
                state,
                position,
                self._run_config,
                self._write_group,
                self._errors.put,
                self._extra_files,
            )
        except SaveFailed as failure:
            error = str(failure)
        except Exception as failure:  # mostly the death of a peer
            error = f"rank {dist.get_rank()}: {one_line(failure)}"
        seconds = time.perf_counter() - started_at
        path = self._folder.step_folder(position["step"])
        if error is None and dist.get_rank() == 0:
            keep = self._config.keep_last, self._config.keep_every
            try:
                for problem in retention.remove_old(self._folder, self._run_id, *keep):
                    self._errors.put(problem)
            except OSError as failure:
                self._errors.put(f"Could not list old checkpoints ({failure}). Continuing.")
        stall = seconds if stall_seconds is None else stall_seconds
        self._results.put(SaveResult(position["step"], path, error, stall, seconds, n_bytes))


def _current_device() -> int | None:
    """Return the index of this thread's GPU, None in a process that has not initialized CUDA."""
    return torch.cuda.current_device() if torch.cuda.is_initialized() else None


def _run_on_device(device: int | None, function: Callable[..., None], *arguments: Any) -> None:
    """Call a function in a new thread, whose GPU is otherwise 0: CUDA would create a context."""
    if device is not None:
        torch.cuda.set_device(device)
    function(*arguments)
