"""Restore the newest checkpoint that is valid and that every rank can load, on all ranks together.

Each rank verifies a part of the files. A checkpoint that any rank finds damaged is skipped by all,
reported by file and rank, and renamed so that its step can be saved again. If checkpoints exist and
none can be loaded, the run stops; it never restarts from scratch. It also stops if a rank may not
read a file, which says nothing about its content.
"""

import uuid
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load

from checkpoint.files import find_file_damage, verify_manifest
from checkpoint.position import Position
from checkpoint.safe_load import CheckpointLoadPlanner, CheckpointReader
from checkpoint.writer import on_rank_0, one_line, tensors_of
from resilience.exit_codes import ExitCode
from resilience.rank_groups import group_causes, name_ranks
from resilience.run_folder import (
    RunFolder,
    RunFolderError,
    checkpoints_in,
    is_unreadable,
    unreadable,
)

# Return the result of rank 0 on every rank, or raise its error.
_from_rank_0 = partial(
    on_rank_0,
    wrap=lambda error: RunFolderError(str(error)),
    catch=(OSError, RunFolderError),
)


class NoCheckpoint(RunFolderError):
    """Checkpoints exist, but none can be loaded; the message gives the reason for each."""

    code = ExitCode.NO_CHECKPOINT


def restore(
    folder: RunFolder,
    resume: str,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    report: Callable[[str], None],
    before: int | None = None,
) -> Position | None:
    """Load model and optimizer from the newest valid checkpoint; all ranks call it.

    Args:
        folder: Run folder.
        resume: `auto` or `never` for the run's own checkpoints, or the path of a checkpoint or of
            another run folder.
        model: Model on any mesh.
        optimizer: Optimizer of the parameters of `model`.
        report: Called on every rank with a message for each checkpoint skipped.
        before: Highest step to restore, for a rewind; None for the newest.

    Returns:
        The position of the checkpoint; None if no checkpoint exists; then nothing was changed.

    Raises:
        NoCheckpoint: On every rank: checkpoints exist and none can be loaded.
        RunFolderError: On every rank: a damaged checkpoint cannot be renamed, or a rank cannot
            read a file that may be intact.
    """
    skipped: list[tuple[Path, str]] = []
    for candidate in _from_rank_0(lambda: _candidates(folder, resume, before)):
        damage = find_damage(candidate) or _try_to_load(candidate, model, optimizer)
        if damage is None:
            for message in _from_rank_0(lambda: _rename_damaged(folder, skipped)):
                report(message)
            manifest = _from_rank_0(partial(verify_manifest, candidate))
            return Position.from_dict(manifest["position"])
        skipped.append((candidate, damage))
    if skipped:
        rows = "".join(f"  {path}: {damage}\n" for path, damage in skipped)
        raise NoCheckpoint(
            f"no valid checkpoint among those present:\n{rows}"
            "Restore one from a backup, or start over with another run.dir."
        )
    return None


def find_damage(folder: Path) -> str | None:
    """Return the damage of a committed checkpoint by file, or None if it is valid.

    A collective call: each rank reads a part of the files, and all ranks return the same result.

    Raises:
        RunFolderError: On every rank: a rank cannot read a file that may be intact.
    """
    try:
        manifest = on_rank_0(
            lambda: verify_manifest(folder), lambda error: error, catch=(ValueError, RunFolderError)
        )
    except ValueError as error:
        return str(error)
    files, algorithm = manifest["files"], manifest["algorithm"]
    # Round robin from the largest to the smallest; names break ties, so that all ranks agree.
    by_size = sorted(files, key=lambda name: (-files[name]["bytes"], name))
    names = by_size[dist.get_rank() :: dist.get_world_size()]
    damaged: list[str] = []
    unreadable_files: list[str] = []
    for name in names:
        try:
            damage = find_file_damage(folder / name, files[name], algorithm)
        except RunFolderError as error:
            unreadable_files.append(str(error))
            break  # so are the others, most likely
        damaged.extend([damage] if damage else [])
    _raise_if_any(unreadable_files)
    return _gather_errors(damaged)


def load(folder: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Load model and optimizer from a checkpoint saved on this or any other mesh.

    The optimizer keeps its own hyperparameters; changes since the checkpoint were allowed.
    """
    settings = [dict(group) for group in optimizer.param_groups]
    state = tensors_of(model, optimizer)
    # A single process uses no collective, as in saving.
    single = dist.get_world_size() == 1
    dcp_load(
        state,
        storage_reader=CheckpointReader(folder),
        planner=CheckpointLoadPlanner(),
        no_dist=single,
    )
    model_state, optimizer_state = state["model"], state["optimizer"]
    set_state_dict(model, optimizer, model_state_dict=model_state, optim_state_dict=optimizer_state)
    for group, own in zip(optimizer.param_groups, settings, strict=True):
        group.update(own)


def _try_to_load(
    folder: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer
) -> str | None:
    """Load a checkpoint; return on every rank why that failed on any rank, or None.

    Raises:
        RunFolderError: On every rank: a rank cannot read a file that may be intact.
    """
    errors, unreadable_files = [], []
    try:
        load(folder, model, optimizer)
    except (Exception, CheckpointException) as error:  # CheckpointException is a BaseException
        causes: list[BaseException] = [error]
        if isinstance(error, CheckpointException):
            causes = [cause for cause, _ in error.failures.values()]
        for cause in causes:
            if isinstance(cause, OSError) and is_unreadable(cause):
                unreadable_files.append(str(unreadable(Path(cause.filename or folder), cause)))
        errors.append(f"cannot be loaded ({one_line(error)})")
    _raise_if_any(unreadable_files)
    return _gather_errors(errors)


def _candidates(folder: RunFolder, resume: str, before: int | None) -> list[Path]:
    """Return the checkpoints to try, best first."""
    steps = reversed(folder.committed_steps())
    own = [folder.step_folder(step) for step in steps if before is None or step <= before]
    if resume in ("auto", "never"):
        return own
    other = checkpoints_in(Path(resume)) or [Path(resume)]
    return other if before is None else [*own, *other]


def _rename_damaged(folder: RunFolder, skipped: list[tuple[Path, str]]) -> list[str]:
    """Rename damaged checkpoints of this run, on rank 0, and return a message for each."""
    messages = []
    for path, damage in skipped:
        if path.parent != folder.checkpoints:  # of another run, which may be in progress
            messages.append(f"Skipped damaged {path}: {damage}")
            continue
        renamed = path.with_name(f"{path.name}.damaged-{uuid.uuid4().hex[:8]}")
        try:
            path.rename(renamed)
        except OSError as error:
            raise RunFolderError(
                f"{path} is damaged ({damage}) and cannot be renamed ({error.strerror}); move it "
                "away manually, so that its step can be saved again"
            ) from None
        messages.append(f"Skipped damaged {path.name}, kept as {renamed.name}: {damage}")
    return messages


def _raise_if_any(errors: list[str]) -> None:
    """Raise on every rank if any rank has errors; equal errors are stated once."""
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, errors)
    if found := dict.fromkeys(each for part in gathered for each in part):
        raise RunFolderError("\n".join(found))


def _gather_errors(errors: list[str]) -> str | None:
    """Return the errors of all ranks in one line, or None if there are none."""
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, errors)
    if len(gathered) == 1:
        return "; ".join(errors) or None
    causes = [(rank, each) for rank, part in enumerate(gathered) for each in part]
    groups = group_causes(causes).items()
    return "; ".join(f"{cause} ({name_ranks(ranks)})" for cause, ranks in groups) or None
