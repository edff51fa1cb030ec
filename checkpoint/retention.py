"""Which checkpoints stay, and how the others go: `COMMITTED` first, so none is ever half there.

Rank 0 alone calls these. A failure to delete costs space and no more, so it is returned to be told
and not raised; but for a rewind, which must not be undone by a checkpoint that comes back.
"""

import shutil
from pathlib import Path

from checkpoint.files import sync_folder
from resilience.run_folder import COMMITTED, RunFolder


def remove_old(folder: RunFolder, keep_last: int | None, keep_every: int | None) -> list[str]:
    """Removes all but the newest `keep_last` checkpoints and those of every `keep_every`-th step.

    Returns:
        What could not be removed, and why.
    """
    older = folder.committed_steps()[:-keep_last] if keep_last else []
    problems = []
    for step in older:
        if keep_every and step % keep_every == 0:
            continue
        path = folder.step_folder(step)
        try:
            uncommit(path)
        except OSError as error:
            problems.append(_told(path, error))
        else:
            problems += delete(path)
    return problems


def remove_beyond(folder: RunFolder, step: int) -> list[str]:
    """Removes the checkpoints beyond a step, the newest first: a rewind leaves their steps out.

    Returns:
        What could not be removed, and why; it is no checkpoint any more.

    Raises:
        OSError: a checkpoint stays one.
    """
    beyond = [folder.step_folder(each) for each in folder.committed_steps() if each > step]
    for path in reversed(beyond):
        uncommit(path)
    return [problem for path in beyond for problem in delete(path)]


def remove_leftovers(checkpoints: Path) -> list[str]:
    """Removes what killed saves and removals left: hidden folders, and folders not committed."""
    left = [
        path
        for path in [*checkpoints.glob(".step-*"), *checkpoints.glob("step-*")]
        if path.name.startswith(".") or not (path / COMMITTED).exists()
    ]
    return [problem for path in left for problem in delete(path)]


def uncommit(path: Path) -> None:
    """Makes a checkpoint a folder like any other."""
    (path / COMMITTED).unlink(missing_ok=True)
    sync_folder(path)


def delete(path: Path) -> list[str]:
    """Removes a folder that is no checkpoint; returns the problem, if any."""
    try:
        shutil.rmtree(path)
    except OSError as error:
        return [_told(path, error)]
    return []


def _told(path: Path, error: OSError) -> str:
    """One line about a folder that stays."""
    return (
        f"{path} cannot be removed ({error.strerror}) and takes up space: "
        "training goes on; remove it by hand"
    )
