"""Restoring: the newest checkpoint that is whole and that every rank can load, on all together.

Each rank verifies a share of the files. What one of them finds damaged, or cannot read, is passed
over by all, told by file and rank, and put aside, so that its step can be saved again. Where
checkpoints exist and none can be loaded the run stops: it never starts again from scratch.
"""

import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load

from checkpoint.files import damage_of, read_manifest
from checkpoint.position import Position
from checkpoint.saving import is_alone, one_line, tensors_of
from resilience.exit_codes import ExitCode
from resilience.run_folder import RunFolder, RunFolderError


class NoCheckpoint(RunFolderError):
    """Checkpoints exist, and none of them can be gone on from; the message says why, by file."""

    code = ExitCode.NO_CHECKPOINT


def restore(
    folder: RunFolder,
    resume: str,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    report: Callable[[str], None],
    before: int | None = None,
) -> Position | None:
    """Fills model and optimizer from the newest good checkpoint; every rank calls it.

    Args:
        folder: The run's.
        resume: `auto` or `never` for the run's own checkpoints, or a checkpoint's path.
        model: On any mesh.
        optimizer: Over the parameters of `model`.
        report: Called on every rank with a sentence for each checkpoint passed over.
        before: The highest step to go back to, for a rewind; None to go on from the newest.

    Returns:
        Where the run stands; None where there is no checkpoint, and nothing was changed.

    Raises:
        NoCheckpoint: on every rank: there are checkpoints and none can be loaded.
        RunFolderError: on every rank: a damaged checkpoint is in the way and cannot be moved.
    """
    passed_over: list[tuple[Path, str]] = []
    for candidate in _from_first(lambda: _candidates(folder, resume, before)):
        damage = find_damage(candidate) or _try_to_load(candidate, model, optimizer)
        if damage is None:
            for told in _from_first(lambda: _put_aside(passed_over)):
                report(told)
            position: Position = _from_first(
                lambda: Position.read(read_manifest(candidate)["position"])  # noqa: B023
            )
            return position
        passed_over.append((candidate, damage))
    if passed_over:
        rows = "".join(f"  {path}: {damage}\n" for path, damage in passed_over)
        raise NoCheckpoint(
            f"no checkpoint to go on from is whole:\n{rows}"
            "Restore one from a copy, or start again under another run.name."
        )
    return None


def find_damage(folder: Path) -> str | None:
    """What is wrong with a committed checkpoint, by file; None when it is whole.

    Every rank calls it, reads a share of the files, and gets the same answer.
    """
    manifest, damage = _from_first(lambda: _read_or_damage(folder))
    if manifest is None:
        return str(damage)
    files, algorithm = manifest["files"], manifest["algorithm"]
    own = _share(files, dist.get_rank(), dist.get_world_size())
    return _agree(
        [
            found
            for name in own
            if (found := damage_of(folder / name, files[name], algorithm)) is not None
        ]
    )


def load(
    folder: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer | None = None
) -> None:
    """Fills model and optimizer from a checkpoint that was saved on this or any other mesh.

    The optimizer keeps its own settings: what changed in them since the checkpoint was allowed.
    """
    groups = [] if optimizer is None else optimizer.param_groups
    settings = [{key: value for key, value in group.items() if key != "params"} for group in groups]
    state = tensors_of(model, optimizer)
    # Alone without a collective, as in saving.
    dcp_load(state, storage_reader=dcp.FileSystemReader(folder), no_dist=is_alone())
    set_state_dict(
        model,
        optimizer if optimizer is not None else (),
        model_state_dict=state["model"],
        optim_state_dict=state.get("optimizer", {}),
    )
    for group, own in zip(
        [] if optimizer is None else optimizer.param_groups, settings, strict=True
    ):
        group.update(own)


def _try_to_load(
    folder: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer
) -> str | None:
    """Loads; returns on every rank why that failed on any of them."""
    problems = []
    try:
        load(folder, model, optimizer)
    except (Exception, CheckpointException) as error:  # the latter is no Exception
        problems.append(f"it cannot be loaded ({one_line(error)})")
    return _agree(problems)


def _candidates(folder: RunFolder, resume: str, before: int | None) -> list[Path]:
    """What to try, the best first."""
    own = [
        folder.step_folder(step)
        for step in reversed(folder.committed_steps())
        if before is None or step <= before
    ]
    if resume in ("auto", "never"):
        return own
    return [Path(resume)] if before is None else [*own, Path(resume)]


def _read_or_damage(folder: Path) -> tuple[dict[str, Any] | None, str | None]:
    """The manifest of a checkpoint, or what is wrong with it."""
    try:
        return read_manifest(folder), None
    except ValueError as error:
        return None, str(error)


def _share(files: dict[str, dict[str, Any]], rank: int, size: int) -> list[str]:
    """The files that one rank reads: each goes to the rank with the fewest bytes so far.

    Starting with the largest; equal ones in the order of names, as all ranks must agree.
    """
    load_by_rank, own = [0] * size, []
    for name in sorted(files, key=lambda name: (-files[name]["bytes"], name)):
        least = load_by_rank.index(min(load_by_rank))
        load_by_rank[least] += files[name]["bytes"] + 1  # empty files are spread, too
        if least == rank:
            own.append(name)
    return own


def _put_aside(passed_over: list[tuple[Path, str]]) -> list[str]:
    """Moves damaged checkpoints out of the way of the same step, and says so. On rank 0."""
    told = []
    for path, damage in passed_over:
        aside = path.with_name(f"{path.name}.damaged-{uuid.uuid4().hex[:8]}")
        try:
            path.rename(aside)
        except OSError as error:
            raise RunFolderError(
                f"{path} is damaged ({damage}) and cannot be put aside ({error.strerror}): "
                "move it away by hand, so that its step can be saved again"
            ) from None
        told.append(f"{path.name} is damaged, passed over and kept as {aside.name}: {damage}")
    return told


def _from_first(ask: Callable[[], Any]) -> Any:
    """What it returns on rank 0, on every rank; or what it raises there."""
    answer: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            answer[0] = ask()
        except (OSError, RunFolderError) as error:
            answer[1] = RunFolderError(str(error))
    dist.broadcast_object_list(answer)
    if answer[1] is not None:
        raise answer[1]
    return answer[0]


def _agree(problems: list[str]) -> str | None:
    """All problems of all ranks, in one line; None where there are none."""
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, problems)
    if len(gathered) == 1:
        return "; ".join(problems) or None
    found = [f"{each} (rank {rank})" for rank, part in enumerate(gathered) for each in part]
    return "; ".join(found) or None
