"""Deletion of old checkpoints: `COMMITTED` first, so a partial deletion is never a checkpoint.

Only rank 0 calls these functions. A folder that cannot be deleted only wastes space, so it is
returned as a message; except for a rewind, which a remaining checkpoint would undo.
"""

import shutil
from pathlib import Path

from data.files import sync_folder
from resilience.run_folder import COMMITTED, RunFolder


def remove_old(folder: RunFolder, keep_last: int | None, keep_every: int | None) -> list[str]:
    """Keep the newest `keep_last` and every `keep_every`-th step; delete other checkpoints.

    Returns:
        A message for each folder that could not be deleted.
    """
    older = folder.committed_steps()[:-keep_last] if keep_last else []
    errors = []
    for step in older:
        if keep_every and step % keep_every == 0:
            continue
        path = folder.step_folder(step)
        try:
            uncommit(path)
        except OSError as error:
            errors.append(_message(path, error))
        else:
            errors += delete(path)
    return errors


def remove_beyond(folder: RunFolder, step: int) -> list[str]:
    """Delete the checkpoints after a step, for a rewind; uncommit the newest first.

    Returns:
        A message for each uncommitted folder that could not be deleted.

    Raises:
        OSError: A checkpoint could not be uncommitted.
    """
    beyond = [folder.step_folder(each) for each in folder.committed_steps() if each > step]
    for path in reversed(beyond):
        uncommit(path)
    return [error for path in beyond for error in delete(path)]


def remove_leftovers(checkpoints: Path) -> list[str]:
    """Delete remains of interrupted saves and deletions: hidden and uncommitted folders."""
    leftovers = [
        path
        for path in [*checkpoints.glob(".step-*"), *checkpoints.glob("step-*")]
        if path.name.startswith(".") or not (path / COMMITTED).exists()
    ]
    return [error for path in leftovers for error in delete(path)]


def uncommit(path: Path) -> None:
    """Durably remove the `COMMITTED` file of a checkpoint."""
    (path / COMMITTED).unlink(missing_ok=True)
    sync_folder(path)


def delete(path: Path) -> list[str]:
    """Delete an uncommitted folder; return the error message, if any."""
    try:
        shutil.rmtree(path)
    except OSError as error:
        return [_message(path, error)]
    return []


def _message(path: Path, error: OSError) -> str:
    return (
        f"Could not delete {path} ({error.strerror}). Continuing; delete it manually to free space."
    )
