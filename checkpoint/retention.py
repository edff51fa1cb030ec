"""Deletion of old checkpoints: `COMMITTED` first, so a partial deletion is never a checkpoint.

Only rank 0 calls these functions. A folder that cannot be deleted only wastes space, so it is
returned as a message; except for a rewind, which a remaining checkpoint would undo.
"""

import shutil
from collections.abc import Iterable
from pathlib import Path

from data.files import sync_folder
from resilience.run_folder import COMMITTED, RunFolder


def remove_old(folder: RunFolder, keep_last: int | None, keep_every: int | None) -> list[str]:
    """Keep the newest `keep_last` and every `keep_every`-th step; delete other checkpoints.

    Returns:
        A message for each folder that could not be deleted.
    """
    older = folder.committed_steps()[:-keep_last] if keep_last else []
    removed = [step for step in older if not keep_every or step % keep_every]
    return delete(map(folder.step_folder, removed), committed=True)


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
    return delete(beyond)


def remove_leftovers(checkpoints: Path) -> list[str]:
    """Delete remains of interrupted saves and deletions: hidden and uncommitted folders."""
    uncommitted = [p for p in checkpoints.glob("step-*") if not (p / COMMITTED).exists()]
    return delete([*checkpoints.glob(".step-*"), *uncommitted])


def uncommit(path: Path) -> None:
    """Durably remove the `COMMITTED` file of a checkpoint."""
    (path / COMMITTED).unlink(missing_ok=True)
    sync_folder(path)


def delete(paths: Iterable[Path], committed: bool = False) -> list[str]:
    """Delete folders and return a message for each that could not be deleted.

    Args:
        committed: The folders are checkpoints, so remove `COMMITTED` durably first. The remains of
            a failed save are deleted without syncing, which fails on some full disks.
    """
    errors = []
    for path in paths:
        try:
            if committed:
                uncommit(path)
            shutil.rmtree(path)
        except OSError as error:
            reason = f"Could not delete {path} ({error.strerror})"
            errors.append(f"{reason}. Continuing; delete it manually to free space.")
    return errors
