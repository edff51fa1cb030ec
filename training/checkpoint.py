"""Committed checkpoints: DCP for the sharded tensors, and around it a protocol of our own.

Saving writes into a fresh hidden folder, hashes and syncs on every rank, then `manifest.json` with
the hashes, then `COMMITTED` with the manifest's own, then renames to `step-XXXXXXXX`; removing
takes `COMMITTED` first. So a folder of that name is whole, or was damaged later, which the hashes
tell. Loading takes the highest step that is whole, on all ranks together, on any mesh.
"""

import dataclasses
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load

from training.position import Position
from training.run_folder import COMMITTED, RunFolder, RunFolderError

FORMAT_VERSION = 1


def save(
    folder: RunFolder,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    position: Position,
    config: dict[str, Any],
) -> Path:
    """Saves and commits a checkpoint; every rank calls it, all return when it is committed.

    Args:
        folder: The run's, on a file system that every rank sees.
        model: Parameters as DTensors.
        optimizer: Over the parameters of `model`.
        position: What has been done.
        config: The resolved configuration, for those who read the checkpoint later.

    Returns:
        The committed folder. A committed checkpoint of the same step is left as it is.
    """
    checkpoints, target = folder.checkpoints, folder.step_folder(position.step)
    names: list[Any] = [None]
    if dist.get_rank() == 0 and not (target / COMMITTED).exists():
        checkpoints.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(checkpoints)
        names[0] = f".{target.name}-{uuid.uuid4().hex[:8]}"
        (checkpoints / names[0]).mkdir()
    dist.broadcast_object_list(names)
    if names[0] is None:
        return target
    fresh = checkpoints / names[0]
    writer = dcp.FileSystemWriter(fresh, sync_files=True, overwrite=False)
    dcp.save(_tensors(model, optimizer), storage_writer=writer)
    own = {path.name: _fingerprint(path) for path in sorted(fresh.glob(f"__{dist.get_rank()}_*"))}
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.gather_object((own, position.lanes), gathered if dist.get_rank() == 0 else None)
    if dist.get_rank() == 0:
        files = {name: entry for part, _ in gathered for name, entry in part.items()}
        lanes = {lane: place for _, part in gathered for lane, place in (part or {}).items()}
        files[".metadata"] = _fingerprint(fresh / ".metadata")
        _write_synced(
            fresh / "manifest.json",
            json.dumps(
                {
                    "format_version": FORMAT_VERSION,
                    "position": dataclasses.asdict(position) | {"lanes": lanes or None},
                    "files": files,
                    "config": config,
                },
                indent=1,
            ),
        )
        _write_synced(fresh / COMMITTED, _sha256(fresh / "manifest.json"))
        _sync_folder(fresh)
        if target.exists():  # lost its COMMITTED while being removed
            shutil.rmtree(target)
        fresh.rename(target)
        _sync_folder(checkpoints)
    dist.barrier()
    return target


def find_newest(folder: RunFolder, resume: str, report: Callable[[str], None]) -> Path | None:
    """The checkpoint to go on from, whole and agreed by all ranks; None for a run's first start.

    Args:
        folder: The run's.
        resume: `auto` or `never` for the run's own newest whole checkpoint, or a checkpoint's path.
        report: Called on rank 0 with a sentence for each damaged checkpoint passed over.

    Raises:
        RunFolderError: checkpoints exist, and none is whole; or the one asked for is not.
    """
    answer: list[Any] = [None]
    if dist.get_rank() == 0:
        own = [folder.step_folder(step) for step in reversed(folder.committed_steps())]
        candidates = own if resume in ("auto", "never") else [Path(resume)]
        damaged: list[tuple[Path, str]] = []
        for candidate in candidates:
            damage = find_damage(candidate)
            if damage is None:
                answer[0] = candidate
                break
            damaged.append((candidate, damage))
        if damaged and answer[0] is None:
            answer[0] = RunFolderError(
                "no checkpoint to go on from is whole:\n"
                + "".join(f"  {path}: {damage}\n" for path, damage in damaged)
                + "Restore one from a copy, or start again under another run.name."
            )
        elif damaged:
            for path, damage in damaged:
                # Out of the way of the same step, which will be saved again.
                aside = path.rename(path.with_name(f"{path.name}.damaged-{uuid.uuid4().hex[:8]}"))
                report(f"{path.name} is damaged, passed over and kept as {aside.name}: {damage}")
    dist.broadcast_object_list(answer)
    if isinstance(answer[0], RunFolderError):
        raise answer[0]
    return answer[0]


def load(
    folder: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer | None = None
) -> None:
    """Fills model and optimizer from a checkpoint that was saved on this or any other mesh."""
    state = _tensors(model, optimizer)
    dcp_load(state, storage_reader=dcp.FileSystemReader(folder))
    set_state_dict(
        model,
        optimizer if optimizer is not None else (),
        model_state_dict=state["model"],
        optim_state_dict=state.get("optimizer", {}),
    )


def read_position(folder: Path) -> Position:
    """The position that a checkpoint was saved at."""
    return Position.read(json.loads((folder / "manifest.json").read_text())["position"])


def find_damage(folder: Path) -> str | None:
    """What is wrong with a committed checkpoint, by file; None when it is whole.

    COMMITTED holds the hash of the manifest, and the manifest those of the other files.
    """
    try:
        if (folder / COMMITTED).read_text(encoding="utf-8") != _sha256(folder / "manifest.json"):
            return f"manifest.json has another SHA-256 than {COMMITTED} tells"
    except (OSError, ValueError) as error:
        return f"manifest.json and {COMMITTED} cannot be compared ({error})"
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        version, files = manifest["format_version"], manifest["files"]
        Position.read(manifest["position"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"manifest.json cannot be read ({error})"
    if version != FORMAT_VERSION:
        return f"manifest.json has format version {version}, this program reads {FORMAT_VERSION}"
    for name, expected in files.items():
        try:
            found = _fingerprint(folder / name)
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
        if found["bytes"] != expected["bytes"]:
            return f"{name} has {found['bytes']} bytes, not {expected['bytes']}"
        if found != expected:
            return f"{name} has another SHA-256 than when it was saved"
    return None


def remove_old(folder: RunFolder, keep_last: int | None) -> None:
    """Removes all but the newest `keep_last` checkpoints; rank 0 alone calls it."""
    for step in folder.committed_steps()[:-keep_last] if keep_last else []:
        old = folder.step_folder(step)
        (old / COMMITTED).unlink()
        shutil.rmtree(old)


def _tensors(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer | None
) -> dict[str, dict[str, Any]]:
    """Sharded tensors by name, ready for DCP; optimizer states are created where missing."""
    if optimizer is None:
        return {"model": dict(get_state_dict(model, ())[0])}
    model_state, optimizer_state = get_state_dict(model, optimizer)
    return {"model": dict(model_state), "optimizer": dict(optimizer_state)}


def _fingerprint(path: Path) -> dict[str, int | str]:
    """Size and SHA-256 of a file, read back from the file system."""
    return {"bytes": path.stat().st_size, "sha256": _sha256(path)}


def _sha256(path: Path) -> str:
    """Hash of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _remove_leftovers(checkpoints: Path) -> None:
    """Removes what killed saves and removals left: hidden folders, and folders not committed."""
    for folder in [*checkpoints.glob(".step-*"), *checkpoints.glob("step-*")]:
        if folder.name.startswith(".") or not (folder / COMMITTED).exists():
            shutil.rmtree(folder)


def _write_synced(path: Path, text: str) -> None:
    """Writes a small file and waits until it is on the disk."""
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """Waits until the names in a folder are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
