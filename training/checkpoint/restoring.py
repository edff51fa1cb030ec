"""Restoring: the newest checkpoint that is whole and that every rank can load, on all of them.

Rank 0 proposes one after the other, all ranks check a share of its files each, and it is loaded
where nobody found damage. What one rank cannot read all leave alone, and say so.
"""

import uuid
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load

from training.checkpoint.files import damage_of, read_manifest, read_position
from training.checkpoint.saving import one_line, tensors_of
from training.exit_codes import ExitCode
from training.position import Position
from training.run_folder import RunFolder, RunFolderError


class NoCheckpoint(RunFolderError):
    """Checkpoints exist, and none that may be gone on from is whole."""

    code = ExitCode.NO_CHECKPOINT


def restore(
    folder: RunFolder,
    resume: str,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    report: Callable[[str], None],
    before: int | None = None,
) -> Position | None:
    """Fills model and optimizer from the newest whole checkpoint; None for a run's first start.

    Args:
        folder: The run's.
        resume: `auto` or `never` for the run's own checkpoints, or the path of one.
        report: Called on rank 0 with a sentence for each checkpoint passed over.
        before: Only those of this step at most.

    Raises:
        NoCheckpoint: on every rank, where checkpoints exist and none of them can be used.
    """
    candidates = _from_first(lambda: _candidates(folder, resume, before))
    passed_over: list[tuple[Path, str]] = []
    for candidate in candidates:
        damage = find_damage(candidate) or _failure_of_loading(candidate, model, optimizer)
        if damage is None:
            if dist.get_rank() == 0 and candidate.parent == folder.checkpoints:
                _put_aside(passed_over, report)
            dist.barrier()
            return _from_first(partial(read_position, candidate))
        passed_over.append((candidate, damage))
    if passed_over:
        raise NoCheckpoint(
            "no checkpoint to go on from is whole:\n"
            + "".join(f"  {path}: {damage}\n" for path, damage in passed_over)
            + "Restore one from a copy, or start again under another run.name."
        )
    return None


def load(
    folder: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer | None = None
) -> None:
    """Fills model and optimizer from a checkpoint that was saved on this or any other mesh."""
    state = tensors_of(model, optimizer)
    dcp_load(state, storage_reader=dcp.FileSystemReader(folder))
    set_state_dict(
        model,
        optimizer if optimizer is not None else (),
        model_state_dict=state["model"],
        optim_state_dict=state.get("optimizer", {}),
    )


def find_damage(folder: Path) -> str | None:
    """What is wrong with a committed checkpoint, by file; None when it is whole.

    Every rank calls it, reads its share of the files, and learns what any of them found.
    """
    manifest = _from_first(lambda: _manifest_or_damage(folder))
    if isinstance(manifest, str):
        return manifest
    sizes = {name: int(entry["bytes"]) for name, entry in manifest["files"].items()}
    shares = _shares(sizes, dist.get_world_size())
    found = [
        damage
        for name in shares[dist.get_rank()]
        if (damage := damage_of(folder / name, manifest["files"][name], manifest["algorithm"]))
    ]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, found)
    return "; ".join(damage for share in gathered for damage in share) or None


def _manifest_or_damage(folder: Path) -> dict[str, Any] | str:
    try:
        return read_manifest(folder)
    except ValueError as error:
        return str(error)


def _shares(sizes: dict[str, int], n_ranks: int) -> list[list[str]]:
    """The files for each rank, the largest first, each to who has the fewest bytes."""
    shares: list[list[str]] = [[] for _ in range(n_ranks)]
    loads = [0] * n_ranks
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        rank = loads.index(min(loads))
        shares[rank].append(name)
        loads[rank] += sizes[name]
    return shares


def _failure_of_loading(
    folder: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer
) -> str | None:
    """Loads on all ranks; what went wrong, and on which, or None. What it left is overwritten."""
    failure = None
    try:
        load(folder, model, optimizer)
    except (Exception, CheckpointException) as error:  # the latter is no Exception
        failure = one_line(error)
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, failure)
    return next((failure for failure in gathered if failure), None)


def _candidates(folder: RunFolder, resume: str, before: int | None) -> list[Path]:
    if resume not in ("auto", "never"):
        return [Path(resume)]
    steps = [step for step in folder.committed_steps() if before is None or step <= before]
    return [folder.step_folder(step) for step in reversed(steps)]


def _put_aside(passed_over: list[tuple[Path, str]], report: Callable[[str], None]) -> None:
    """Out of the way of the same steps, which will be saved again."""
    for path, damage in passed_over:
        aside = path.rename(path.with_name(f"{path.name}.damaged-{uuid.uuid4().hex[:8]}"))
        report(f"{path.name} is damaged, passed over and kept as {aside.name}: {damage}")


def _from_first(read: Callable[[], Any]) -> Any:
    """What rank 0 reads, on every rank."""
    answer: list[Any] = [read() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(answer)
    return answer[0]
