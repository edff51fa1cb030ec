"""Identity of a run, which detects a checkpoint that was copied from another run.

`run.json` has a UUID made at the first launch, and so has the manifest of each checkpoint; a run
folder may be moved or renamed. Checkpoints of another run are rejected, since the steps before them
are not in this run's metrics and event log; `run.adopt=true` accepts them from then on. Manifests
of earlier versions have no UUID and are accepted.
"""

import json
import uuid
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from data.files import parse_json, read_file, write_atomically
from resilience.run_folder import (
    RunFolder,
    RunFolderError,
    not_writable,
    read_manifest,
    unreadable,
)


@dataclass(frozen=True)
class RunIdentity:
    """Identity of a run.

    Attributes:
        id: UUID in 32 hexadecimal digits.
        adopted: UUIDs of other runs whose checkpoints in the folder belong to this run.
    """

    id: str
    adopted: tuple[str, ...] = ()

    def owns(self, run_id: str | None) -> bool:
        """Return whether a checkpoint with this UUID belongs to the run."""
        return run_id in (None, self.id, *self.adopted)


def establish_identity(folder: RunFolder, adopt: bool) -> RunIdentity:
    """Return the identity of a run and write `run.json` if it is new; the caller holds the lock.

    Args:
        adopt: Adopt the checkpoints of other runs in the folder.

    Raises:
        RunFolderError: The file cannot be written.
    """
    saved = read_identity(folder)
    identity = saved or _recovered_identity(folder)
    if adopt:
        others = {run_id for _, run_id in foreign_checkpoints(folder, identity)}
        identity = RunIdentity(identity.id, (*identity.adopted, *sorted(others)))
    if identity != saved:
        try:
            folder.path.mkdir(parents=True, exist_ok=True)
            write_atomically(folder.identity, json.dumps(asdict(identity)).encode())
        except OSError as error:
            raise RunFolderError(f"{folder.identity} {not_writable(error, folder.path)}") from None
    return identity


def check_identity(folder: RunFolder, adopt: bool) -> None:
    """Check that the committed checkpoints of a folder belong to its run.

    Raises:
        RunFolderError: A checkpoint belongs to another run, and `adopt` is false.
    """
    identity = read_identity(folder) or _recovered_identity(folder)
    foreign = foreign_checkpoints(folder, identity)
    if foreign and not adopt:
        names = ", ".join(path.name for path, _ in foreign)
        raise RunFolderError(
            f"{folder.checkpoints} has checkpoints of another run: {names} (run {foreign[-1][1]}; "
            f"this is run {identity.id}). Use run.adopt=true to treat them as checkpoints of this "
            "run, or move them away"
        )


def read_identity(folder: RunFolder) -> RunIdentity | None:
    """Return the content of `run.json`; None if it is missing or damaged.

    Raises:
        RunFolderError: The file cannot be read.
    """
    try:
        values = parse_json(read_file(folder.identity))
        identity = RunIdentity(uuid.UUID(values["id"]).hex, tuple(values["adopted"]))
        valid = all(isinstance(each, str) for each in identity.adopted)
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        return None
    except OSError as error:
        if not folder.identity.is_file():
            raise RunFolderError(
                f"{folder.identity} is not a regular file; restore it, or move it away to recover "
                "the UUID from the checkpoints"
            ) from None
        raise unreadable(folder.identity, error) from None
    return identity if valid else None


def foreign_checkpoints(folder: RunFolder, identity: RunIdentity) -> list[tuple[Path, str]]:
    """Return the committed checkpoints of other runs with the UUIDs of these, oldest first."""
    return [(path, run_id) for path, run_id in _saved_ids(folder) if not identity.owns(run_id)]


def _recovered_identity(folder: RunFolder) -> RunIdentity:
    """Return the identity in the oldest checkpoint that has one, or a new one."""
    found = [run_id for _, run_id in _saved_ids(folder)]
    return RunIdentity(found[0] if found else uuid.uuid4().hex)


def _saved_ids(folder: RunFolder) -> list[tuple[Path, str]]:
    """Return path and UUID of each committed checkpoint with a UUID, oldest first."""
    found = []
    for path in map(folder.step_folder, folder.committed_steps()):
        with suppress(RunFolderError):  # reported when it is restored
            run_id = (read_manifest(path) or {}).get("run_id")
            if isinstance(run_id, str):
                found.append((path, run_id))
    return found
