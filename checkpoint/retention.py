"""Deletion of checkpoints, limited to what the run itself created.

A checkpoint is first renamed to a hidden name with the UUID of its run. From then on it is not a
checkpoint, whatever happens to its files. Saves delete such folders and old checkpoints whose
manifest has the UUID of the run; everything else, such as a user's copy, an export, a conversion in
progress or a checkpoint of another run, is kept and reported.

Only rank 0 calls these functions. A folder that cannot be deleted only wastes space, so it is
returned as a message; except for a rewind, which a remaining checkpoint would undo.
"""

import os
import re
import shutil
import uuid
from collections.abc import Iterable
from pathlib import Path

from data.files import sync_folder
from resilience.run_folder import COMMITTED, RunFolder, RunFolderError, read_manifest


def hidden_name(target: Path, run_id: str) -> Path:
    """Return a new name for a checkpoint that is being written or deleted."""
    return target.with_name(f".{target.name}.{run_id}.{uuid.uuid4().hex[:8]}")


def remove_old(
    folder: RunFolder, run_id: str, keep_last: int | None, keep_every: int | None
) -> list[str]:
    """Keep the newest `keep_last` and every `keep_every`-th step; delete other checkpoints.

    Returns:
        A message for each checkpoint that could not be deleted or belongs to another run.
    """
    if not keep_last:
        return []
    steps = folder.committed_steps()
    n_own = 0
    while steps and n_own < keep_last:  # a copy or a checkpoint of another run does not count
        n_own += _is_own(folder.step_folder(steps.pop()), run_id)
    hidden, messages = [], []
    for step in steps:
        path = folder.step_folder(step)
        if keep_every and step % keep_every == 0:
            continue
        if not _is_own(path, run_id):
            messages.append(f"Kept {path}, which is not known to be a checkpoint of this run.")
            continue
        try:
            hidden.append(hide(path, run_id))
        except OSError as error:
            messages.append(_not_deleted(path, error))
    return [*messages, *delete(hidden)]


def remove_beyond(folder: RunFolder, run_id: str, step: int) -> list[str]:
    """Delete the checkpoints after a step, for a rewind; the newest first.

    Those of other runs are renamed, so that the run does not resume from them.

    Returns:
        A message for each folder that could not be deleted or was renamed.

    Raises:
        OSError: A checkpoint could not be renamed.
    """
    hidden, messages = [], []
    for each in reversed([each for each in folder.committed_steps() if each > step]):
        path = folder.step_folder(each)
        if _is_own(path, run_id):
            hidden.append(hide(path, run_id))
        else:
            moved = move_away(path)
            messages.append(f"{path} is not known to be of this run; it is kept as {moved.name}.")
    return [*messages, *delete(hidden)]


def remove_leftovers(folder: RunFolder, run_id: str) -> list[str]:
    """Delete what interrupted saves and deletions of this run left behind.

    Returns:
        A message for each folder that could not be deleted, and one that names the folders that
        are not checkpoints and were not created by this run.
    """
    own = re.compile(rf"\.step-\d{{8,}}\.{run_id}\.[0-9a-f]{{8}}")
    committed = {folder.step_folder(step).name for step in folder.committed_steps()}
    leftovers, others = [], []
    with os.scandir(folder.checkpoints) as entries:
        for entry in entries:
            if not _is_folder(entry) or entry.name in committed:
                continue
            if own.fullmatch(entry.name) and not entry.is_symlink():
                leftovers.append(Path(entry.path))
            else:
                others.append(entry.name)
    messages = delete(leftovers)
    if others:
        messages.append(
            f"{folder.checkpoints} has folders that are not valid checkpoints of this run and are "
            f"neither used nor deleted: {', '.join(sorted(others))}."
        )
    return messages


def hide(path: Path, run_id: str) -> Path:
    """Durably rename a checkpoint to a hidden name, and return its new path."""
    hidden = hidden_name(path, run_id)
    path.rename(hidden)
    sync_folder(path.parent)
    return hidden


def move_away(path: Path) -> Path:
    """Rename a folder named like a checkpoint that is none of this run, and return its new path."""
    state = "other-run" if (path / COMMITTED).exists() else "uncommitted"
    moved = path.with_name(f"{path.name}.{state}-{uuid.uuid4().hex[:8]}")
    path.rename(moved)
    return moved


def delete(paths: Iterable[Path]) -> list[str]:
    """Delete folders and return a message for each that could not be deleted."""
    errors = []
    for path in paths:
        try:
            shutil.rmtree(path)
        except OSError as error:
            errors.append(_not_deleted(path, error))
    return errors


def _not_deleted(path: Path, error: OSError) -> str:
    reason = f"Could not delete {path} ({error.strerror or error})"
    return f"{reason}. Continuing; delete it manually to free space."


def _is_own(checkpoint: Path, run_id: str) -> bool:
    """Return whether this run saved a checkpoint; earlier versions did not record the run."""
    try:
        manifest = read_manifest(checkpoint)
    except RunFolderError:
        return False
    return manifest is not None and manifest.get("run_id") in (None, run_id)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link into a file system that cannot be reached
        return True
