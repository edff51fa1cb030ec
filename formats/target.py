"""The folder that is written: under a hidden name first, whole and synced before it has its own.

A conversion that fails, or is killed, leaves nothing under the name that was asked for. What a
killed one left under a hidden name goes with the next conversion to the same place.
"""

import fcntl
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from formats.errors import FormatError
from formats.recognition import recognise


def check_target(target: Path, overwrite: bool) -> None:
    """Whether a folder may be written under this name.

    Raises:
        FormatError: something is there, and is not to be replaced.
    """
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise FormatError(f"target ({target}) is a file or a link: name another folder")
    if not target.exists() or not any(target.iterdir()):
        return
    if not overwrite:
        raise FormatError(
            f"target ({target}) exists, and nothing is written over it: name another folder, or "
            "set overwrite=true"
        )
    if recognise(target) is None:
        raise FormatError(
            f"target ({target}) holds no weights, and overwrite=true replaces weights alone: name "
            "another folder"
        )


def check_room(target: Path, needed: int) -> None:
    """Whether the disk has room for so many bytes.

    Raises:
        FormatError: it has not.
    """
    place = next(path for path in target.absolute().parents if path.exists())
    free = shutil.disk_usage(place).free
    if free < needed:
        raise FormatError(
            f"target ({target}) needs {needed / 1e9:,.2f} GB, and {place} has {free / 1e9:,.2f} GB "
            "left: make room, name another folder, or use dtype=bf16"
        )


@contextmanager
def fresh_folder(target: Path, overwrite: bool) -> Iterator[Path]:
    """A hidden folder to write in, which becomes `target` at the end, or is gone after an error.

    Raises:
        FormatError: it cannot be written.
    """
    check_target(target, overwrite)
    fresh = target.with_name(f".{target.name}-{uuid.uuid4().hex[:8]}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(target)
        fresh.mkdir()
        descriptor = os.open(fresh, os.O_RDONLY)
    except OSError as error:
        raise _unwritable(target, error) from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)  # as long as this process lives
        yield fresh
        _sync(fresh)
        _give_name(fresh, target)
    except OSError as error:
        raise _unwritable(target, error) from error
    finally:
        with suppress(OSError):
            shutil.rmtree(fresh)
        os.close(descriptor)


def _unwritable(target: Path, error: OSError) -> FormatError:
    return FormatError(
        f"target ({target}) cannot be written ({error.strerror or error}): make room there or set "
        "the permissions, or name another folder. Nothing of it is left"
    )


def _remove_leftovers(target: Path) -> None:
    """Removes what conversions to the same target left that are no longer at work."""
    for leftover in target.parent.glob(f".{target.name}-????????"):
        descriptor = os.open(leftover, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(leftover)
        except BlockingIOError:
            pass  # another one is writing it
        finally:
            os.close(descriptor)


def _sync(folder: Path) -> None:
    """Waits until everything in the folder is on the disk."""
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _give_name(fresh: Path, target: Path) -> None:
    """Renames the folder; an old one under the name is put aside first, and removed last."""
    aside = None
    if target.exists():
        aside = fresh.with_name(f".{target.name}-{uuid.uuid4().hex[:8]}")
        target.rename(aside)
    fresh.rename(target)
    descriptor = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    if aside is not None:
        shutil.rmtree(aside, ignore_errors=True)
