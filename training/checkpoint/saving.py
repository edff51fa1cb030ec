"""Saving: the commit protocol, and the `Saver` that runs it beside the training.

The training waits only for a copy of the tensors to host memory. A thread of each process then
writes the copy, over a process group of its own, so that its messages never mix with those of the
steps. Each phase is a function here. A save that fails on any rank fails on all, is never
committed, and takes nothing with it but its own hidden folder.
"""

import dataclasses
import json
import queue
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.tensor import DTensor

from training.checkpoint import retention
from training.checkpoint.files import (
    ALGORITHM,
    FORMAT_VERSION,
    MANIFEST,
    Fingerprint,
    HashedFiles,
    digest,
    sync_folder,
    write_synced,
)
from training.config import CheckpointConfig
from training.position import Position
from training.run_folder import COMMITTED, RunFolder

# How long a save may take is the watchdog's to say, not the process group's.
TIMEOUT = timedelta(days=7)

State = dict[str, Any]


class SaveFailed(RuntimeError):
    """A checkpoint could not be saved, on any rank; the message says on which and why."""


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
    """

    def __init__(
        self,
        folder: RunFolder,
        config: CheckpointConfig,
        run_config: dict[str, Any],
        report: Callable[[str], None],
    ) -> None:
        self._folder, self._config, self._run_config = folder, config, run_config
        self._report = report
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
            model: Parameters as DTensors.
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

    def finish(self) -> None:
        """Waits until no save is being written."""
        if self._thread is not None:
            self._thread.join()
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
                self._folder, state, position, self._run_config, self._group, self._problems.put
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


def save(
    folder: RunFolder,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    position: Position,
    config: dict[str, Any],
) -> Path:
    """Saves one checkpoint without a `Saver`, and returns its folder when it is committed.

    Raises:
        SaveFailed: on every rank, and there is no new checkpoint.
    """
    values, problems = dataclasses.asdict(position), list[str]()
    write_checkpoint(
        folder, tensors_of(model, optimizer), values, config, dist.group.WORLD, problems.append
    )
    return folder.step_folder(position.step)


def write_checkpoint(
    folder: RunFolder,
    state: State,
    position: dict[str, Any],
    config: dict[str, Any],
    group: dist.ProcessGroup | None,
    report: Callable[[str], None],
) -> int:
    """The whole protocol, every rank together; returns the bytes written, 0 if it was committed.

    Raises:
        SaveFailed: on every rank, and there is no new checkpoint.
    """
    fresh = _on_first(lambda: make_folder(folder, position["step"], report), group)
    if fresh is None:
        return 0
    try:
        own = write_shards(state, fresh, group)
        gathered: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(gathered, (own, position["lanes"]), group=group)
        files = {name: entry for part, _ in gathered for name, entry in part.items()}
        lanes = {lane: place for _, part in gathered for lane, place in (part or {}).items()}

        def seal() -> None:
            write_manifest(fresh, files, position | {"lanes": lanes or None}, config)
            commit(fresh)
            publish(fresh, folder.step_folder(position["step"]))

        _on_first(seal, group)
    except (Exception, CheckpointException) as error:  # the latter is no Exception
        if dist.get_rank() == 0:
            retention.delete(fresh)  # or what is left then goes with the next save
        if isinstance(error, SaveFailed):
            raise
        raise SaveFailed(one_line(error)) from error
    return sum(int(entry["bytes"]) for entry in files.values())


# ---------------------------------------------------------------- the phases, in their order


def tensors_of(model: torch.nn.Module, optimizer: torch.optim.Optimizer | None) -> State:
    """Sharded tensors by name, ready for DCP; optimizer states are created where missing."""
    if optimizer is None:
        return {"model": dict(get_state_dict(model, ())[0])}
    model_state, optimizer_state = get_state_dict(model, optimizer)
    return {"model": dict(model_state), "optimizer": dict(optimizer_state)}


@torch.no_grad()
def copy_to_host(state: State, buffers: State | None) -> State:
    """Copies the tensors into host memory, that of the last time where they still fit.

    Copies on CPUs too, as training changes the tensors in place while the copy is being written.
    """
    found: State = _copied(state, buffers)
    if torch.cuda.is_available():
        torch.cuda.current_stream().synchronize()  # the copies do not wait for each other
    return found


def make_folder(folder: RunFolder, step: int, report: Callable[[str], None]) -> Path | None:
    """A fresh hidden folder to write in; None where the step is committed. On rank 0."""
    checkpoints, target = folder.checkpoints, folder.step_folder(step)
    if (target / COMMITTED).exists():
        return None
    checkpoints.mkdir(parents=True, exist_ok=True)
    for problem in retention.remove_leftovers(checkpoints):
        report(problem)
    fresh = checkpoints / f".{target.name}-{uuid.uuid4().hex[:8]}"
    fresh.mkdir()
    return fresh


def write_shards(
    state: State, fresh: Path, group: dist.ProcessGroup | None
) -> dict[str, Fingerprint]:
    """Writes and syncs every rank's tensors; returns the fingerprints of this rank's files."""
    writer = dcp.FileSystemWriter(fresh, sync_files=True, overwrite=False)
    writer.fs = files = HashedFiles()
    dcp.save(state, storage_writer=writer, process_group=group)
    return files.written


def write_manifest(
    fresh: Path,
    files: dict[str, Fingerprint],
    position: dict[str, Any],
    config: dict[str, Any],
) -> None:
    """Writes what the checkpoint is made of, and where the run stands. On rank 0."""
    values = {
        "format_version": FORMAT_VERSION,
        "position": position,
        "algorithm": ALGORITHM,
        "files": files,
        "config": config,
    }
    write_synced(fresh / MANIFEST, json.dumps(values, indent=1).encode())


def commit(fresh: Path) -> None:
    """Writes the file that makes the folder a checkpoint. On rank 0."""
    write_synced(fresh / COMMITTED, digest((fresh / MANIFEST).read_bytes()).encode())
    sync_folder(fresh)


def publish(fresh: Path, target: Path) -> None:
    """Gives the folder the name under which it is looked for. On rank 0."""
    if target.exists():  # lost its COMMITTED while being removed
        target.rename(fresh.with_name(f"{fresh.name}.old"))  # a leftover of the next save
    fresh.rename(target)
    try:
        sync_folder(target.parent)
    except OSError:
        retention.uncommit(target)
        raise


# ---------------------------------------------------------------- between ranks and tensors


def _on_first(action: Callable[[], Any], group: dist.ProcessGroup | None) -> Any:
    """Calls it on rank 0; every rank returns what came out, or raises `SaveFailed`."""
    answer: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            answer[0] = action()
        except Exception as error:
            answer[1] = f"rank 0: {one_line(error)}"
    dist.broadcast_object_list(answer, group=group)
    if answer[1] is not None:
        raise SaveFailed(answer[1])
    return answer[0]


def one_line(error: BaseException) -> str:
    """What went wrong, on every rank where it did, without tracebacks."""
    if isinstance(error, CheckpointException):
        failures = sorted(error.failures.items())
        return "; ".join(f"rank {rank}: {one_line(cause)}" for rank, (cause, _) in failures)
    text = " ".join(str(error).split())
    return text if isinstance(error, OSError) else f"{type(error).__name__}: {text}"


def _copied(value: Any, buffer: Any) -> Any:
    """A tensor, or whatever holds tensors, in the memory of `buffer` where that fits."""
    if isinstance(value, dict):
        of = buffer if isinstance(buffer, dict) else {}
        return {key: _copied(each, of.get(key)) for key, each in value.items()}
    if isinstance(value, list | tuple):
        of_list = buffer if isinstance(buffer, list | tuple) else []
        rest = [None] * (len(value) - len(of_list))
        return [_copied(*pair) for pair in zip(value, [*of_list, *rest], strict=False)]
    if not isinstance(value, Tensor):
        return value
    if not _fits(value, buffer):
        buffer = _host_like(value)
    _local(buffer).copy_(_local(value), non_blocking=True)
    return buffer


def _fits(tensor: Tensor, buffer: Any) -> bool:
    """Whether a buffer can hold a tensor as it lies on this mesh."""
    if type(tensor) is not type(buffer) or tensor.dtype != buffer.dtype:
        return False
    if isinstance(tensor, DTensor) and tensor.placements != buffer.placements:
        return False
    return tensor.shape == buffer.shape and _local(tensor).shape == _local(buffer).shape


def _host_like(tensor: Tensor) -> Tensor:
    """Host memory for a copy, pinned where it comes from a GPU, placed like the tensor."""
    local = _local(tensor)
    memory = torch.empty_like(local, device="cpu", pin_memory=local.is_cuda)
    if not isinstance(tensor, DTensor):
        return memory
    host = tensor.detach().cpu() if local.is_cuda else tensor.detach().clone()
    host._local_tensor = memory  # `from_local` would move it to the mesh's device
    return host


def _local(tensor: Tensor) -> Tensor:
    """This rank's shard."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
