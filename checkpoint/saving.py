"""Saving: the commit protocol, one function a phase.

A save that fails on any rank fails on all, is never committed, and takes nothing with it but its
own hidden folder. How it runs beside the training is in `saver`.
"""

import dataclasses
import json
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict

from checkpoint import retention
from checkpoint.files import (
    ALGORITHM,
    FORMAT_VERSION,
    MANIFEST,
    Fingerprint,
    HashedFiles,
    digest,
    fingerprint_of,
    sync_folder,
    write_synced,
)
from checkpoint.host_copy import State
from checkpoint.position import Position
from resilience.run_folder import COMMITTED, RunFolder


class SaveFailed(RuntimeError):
    """A checkpoint could not be saved, on any rank; the message says on which and why."""


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
    beside: Mapping[str, bytes] | None = None,
) -> int:
    """The whole protocol, every rank together; returns the bytes written, 0 if it was committed.

    Args:
        beside: Small files that travel with the weights, by name.

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
            files.update(write_beside(fresh, beside or {}))
            write_manifest(fresh, files, position | {"lanes": lanes or None}, config)
            commit(fresh)
            publish(fresh, folder.step_folder(position["step"]))

        _on_first(seal, group)
    except (Exception, CheckpointException) as error:  # the latter is no Exception
        if dist.get_rank() == 0:
            retention.delete(fresh)  # or what is left then goes with the next save
        if isinstance(error, SaveFailed):
            raise
        told = one_line(error)
        if not isinstance(error, CheckpointException):
            told = f"rank {dist.get_rank()}: {told}"
        raise SaveFailed(told) from error
    return sum(int(entry["bytes"]) for entry in files.values())


# ---------------------------------------------------------------- the phases, in their order


def tensors_of(model: torch.nn.Module, optimizer: torch.optim.Optimizer | None) -> State:
    """Sharded tensors by name, ready for DCP; optimizer states are created where missing."""
    if optimizer is None:
        return {"model": dict(get_state_dict(model, ())[0])}
    model_state, optimizer_state = get_state_dict(model, optimizer)
    return {"model": dict(model_state), "optimizer": dict(optimizer_state)}


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
    """Writes and syncs every rank's tensors; returns the fingerprints of this rank's files.

    One process sends nothing, not even to itself: gloo's thread copies more than 32,768 elements
    with an OpenMP team of its own, which stays, and libgomp lets no team spin where there are more
    threads than cores. Each later step of the default run took 1.3 times as long.
    """
    writer = dcp.FileSystemWriter(fresh, sync_files=True, overwrite=False)
    writer.fs = files = HashedFiles()
    dcp.save(state, storage_writer=writer, process_group=group, no_dist=is_alone(group))
    return files.written


def is_alone(group: dist.ProcessGroup | None = None) -> bool:
    """Whether the group, by default all processes, is this process."""
    return dist.get_world_size(group) == 1


def write_beside(fresh: Path, beside: Mapping[str, bytes]) -> dict[str, Fingerprint]:
    """Writes small files next to the shards, and returns their fingerprints. On rank 0."""
    for name, content in beside.items():
        write_synced(fresh / name, content)
    return {name: fingerprint_of(content) for name, content in beside.items()}


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


# ---------------------------------------------------------------- between ranks


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
