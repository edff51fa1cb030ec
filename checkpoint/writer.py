"""The commit protocol of a checkpoint, one function per phase.

A save that fails on any rank fails on all ranks, is never committed, and deletes only its own
hidden folder. `checkpoint.saver` runs the protocol in the background.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict

from checkpoint import retention
from checkpoint.files import ALGORITHM, FORMAT_VERSION, Fingerprint, HashedFiles, write_synced
from checkpoint.host_copy import DefersMoments, State, is_on_device, local_bytes
from data.files import sync_folder, write_problem
from resilience.rank_groups import group_causes, name_ranks
from resilience.run_folder import COMMITTED, MANIFEST, RunFolder

COPY_AHEAD = 10_000_000  # bytes copied from a GPU while others are written; DCP's default


class SaveFailed(RuntimeError):
    """A checkpoint could not be saved; the message names the ranks and reasons."""


def write_checkpoint(
    folder: RunFolder,
    run_id: str,
    state: State,
    position: dict[str, Any],
    config: dict[str, Any],
    group: dist.ProcessGroup | None,
    report: Callable[[str], None],
    extra_files: Mapping[str, bytes] | None = None,
) -> int:
    """Write and commit a checkpoint; all ranks call it.

    Args:
        run_id: UUID of the run, used on rank 0.
        state: Tensors by name, from `tensors_of` or `copy_to_host`.
        position: `Position` as a dictionary, with the stream shards of this rank.
        config: Resolved configuration of the run.
        report: Called on rank 0 with a message for each leftover that cannot be deleted.
        extra_files: Small files saved with the checkpoint, by name.

    Returns:
        Bytes written by all ranks; 0 if the step was committed already.

    Raises:
        SaveFailed: On every rank; there is no new checkpoint.
    """
    step = position["step"]
    fresh = on_rank_0(lambda: make_folder(folder, run_id, step, report), _save_failed, group)
    if fresh is None:
        return 0
    try:
        written = write_shards(state, fresh, group)
        gathered: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(gathered, (written, position["stream_shards"]), group=group)
        files = {name: entry for part, _ in gathered for name, entry in part.items()}
        stream_shards = {key: value for _, part in gathered for key, value in (part or {}).items()}

        def complete() -> None:
            files.update(write_extra_files(fresh, extra_files or {}))
            complete_position = position | {"stream_shards": stream_shards or None}
            write_manifest(fresh, files, complete_position, config, run_id)
            commit(fresh)
            publish(fresh, folder.step_folder(step), report)

        on_rank_0(complete, _save_failed, group)
    except (Exception, CheckpointException) as error:  # CheckpointException is a BaseException
        if dist.get_rank() == 0:
            retention.delete([fresh])  # if that fails, the next save deletes it
        if isinstance(error, SaveFailed):
            raise
        rank = "" if isinstance(error, CheckpointException) else f"rank {dist.get_rank()}: "
        raise SaveFailed(f"{rank}{one_line(error)}") from error
    return sum(int(entry["bytes"]) for entry in files.values())


# ---------------------------------------------------------------- phases, in order


def tensors_of(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, deferred: bool = False
) -> State:
    """Return sharded tensors by name for DCP; missing optimizer state is initialized.

    Args:
        deferred: Leave low-bit moments to be converted by `copy_to_host`, one at a time.
    """
    context: AbstractContextManager[None] = nullcontext()
    if deferred and isinstance(optimizer, DefersMoments):
        context = optimizer.deferred_moments()
    with context:
        model_state, optimizer_state = get_state_dict(model, optimizer)
    if (pipeline := vars(model).get("pipeline")) is not None:
        _gather_names(optimizer_state["param_groups"], pipeline.group)
    return {"model": dict(model_state), "optimizer": dict(optimizer_state)}


def _gather_names(groups: Any, stages: Any) -> None:
    """Add the other pipeline stages' parameters to the groups of an optimizer, in place."""
    names: list[Any] = [None] * dist.get_world_size(stages)
    dist.all_gather_object(names, [group["params"] for group in groups], group=stages)
    for group, of_ranks in zip(groups, zip(*names, strict=True), strict=True):
        group["params"] = list(dict.fromkeys(name for each in of_ranks for name in each))


def make_folder(
    folder: RunFolder, run_id: str, step: int, report: Callable[[str], None]
) -> Path | None:
    """Create a hidden folder to write in, on rank 0; None if the step is committed already."""
    checkpoints, target = folder.checkpoints, folder.step_folder(step)
    if (target / COMMITTED).exists():
        return None
    if not folder.path.is_dir():
        raise FileNotFoundError(
            f"{folder.path} no longer exists: it was moved or removed during the run; the run can "
            "be resumed in the moved folder"
        )
    checkpoints.mkdir(exist_ok=True)
    for error in retention.remove_leftovers(folder, run_id):
        report(error)
    fresh = retention.hidden_name(target, run_id)
    fresh.mkdir()
    return fresh


def write_shards(
    state: State, fresh: Path, group: dist.ProcessGroup | None
) -> dict[str, Fingerprint]:
    """Write and fsync the tensors of all ranks; return the fingerprints of this rank's files.

    A single process uses no collective: for more than 32,768 elements, gloo's thread copies with an
    OpenMP team that persists, and libgomp stops spinning in all teams when there are more threads
    than cores. Each later step of the default run took 1.3 times as long.
    """
    # For the tensors of a synchronous save. With host tensors too, DCP's loader would wait for the
    # current stream of device 0 after every few (filesystem.py, _OverlappingCpuLoader._drain).
    ahead = COPY_AHEAD if is_on_device(state) else 0
    writer = dcp.FileSystemWriter(
        fresh, sync_files=True, overwrite=False, per_thread_copy_ahead=ahead
    )
    writer.fs = files = HashedFiles(local_bytes(state))
    single = dist.get_world_size(group) == 1
    dcp.save(state, storage_writer=writer, process_group=group, no_dist=single)
    return files.written


def write_extra_files(fresh: Path, files: Mapping[str, bytes]) -> dict[str, Fingerprint]:
    """Write small files next to the shards and return their fingerprints, on rank 0."""
    return {name: write_synced(fresh / name, content) for name, content in files.items()}


def write_manifest(
    fresh: Path,
    files: dict[str, Fingerprint],
    position: dict[str, Any],
    config: dict[str, Any],
    run_id: str | None = None,
) -> None:
    """Write the manifest, on rank 0: files with hashes, position, configuration and run."""
    header = {"format_version": FORMAT_VERSION, "position": position, "algorithm": ALGORITHM}
    if run_id is not None:
        header["run_id"] = run_id
    content = json.dumps(header | {"files": files, "config": config}, indent=1)
    write_synced(fresh / MANIFEST, content.encode())


def commit(fresh: Path) -> None:
    """Write `COMMITTED` with the SHA-256 of the manifest, on rank 0."""
    digest = hashlib.sha256((fresh / MANIFEST).read_bytes()).hexdigest()
    write_synced(fresh / COMMITTED, digest.encode())
    sync_folder(fresh)


def publish(fresh: Path, target: Path, report: Callable[[str], None]) -> None:
    """Rename the hidden folder to its final name, on rank 0."""
    if os.path.lexists(target):  # without COMMITTED, or a dangling link
        moved = retention.move_away(target)
        report(f"{target} was not a committed checkpoint; it is kept as {moved.name}.")
    fresh.rename(target)
    try:
        sync_folder(target.parent)
    except OSError:
        target.rename(fresh)
        raise


# ---------------------------------------------------------------- across ranks


def on_rank_0(
    action: Callable[[], Any],
    wrap: Callable[[Exception], Exception],
    group: dist.ProcessGroup | None = None,
    catch: tuple[type[Exception], ...] = (Exception,),
) -> Any:
    """Run `action` on rank 0; every rank returns its result or raises its wrapped error.

    Args:
        wrap: Converts an exception of `action` to the exception that all ranks raise.
        catch: Exceptions to propagate to all ranks.
    """
    answer: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            answer[0] = action()
        except catch as error:
            answer[1] = wrap(error)
    dist.broadcast_object_list(answer, group=group)
    if answer[1] is not None:
        raise answer[1]
    return answer[0]


def _save_failed(error: Exception) -> SaveFailed:
    return SaveFailed(f"rank 0: {one_line(error)}")


def one_line(error: BaseException) -> str:
    """Return an error, with the ranks it occurred on, in one line without tracebacks."""
    if isinstance(error, CheckpointException):
        failures = sorted(error.failures.items())
        groups = group_causes([(rank, one_line(cause)) for rank, (cause, _) in failures])
        return "; ".join(f"{name_ranks(ranks)}: {cause}" for cause, ranks in groups.items())
    text = " ".join(str(error).split())
    if isinstance(error, OSError) and error.filename:
        shown = re.sub(
            r"__\d+_\d+(?=\.distcp$)", "*", str(error.filename)
        )  # one cause of all ranks
        text = f"{write_problem(error, Path(error.filename).parent)} ({shown})"
    elif isinstance(error, OSError) and error.strerror:
        text = error.strerror
    return text if isinstance(error, OSError) else f"{type(error).__name__}: {text}"
