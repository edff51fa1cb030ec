"""The output folder of a conversion: written under a hidden name, synced, then renamed.

A conversion that fails or is killed leaves nothing under the target name. Hidden folders of killed
conversions are deleted by the next conversion to the same target.
"""

import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from data.files import FULL_BYTES, format_bytes, free_bytes, sync_folder, write_problem
from formats.detection import detect_format
from formats.errors import FormatError


def check_target(target: Path, overwrite: bool, source: Path) -> None:
    """Check that a folder may be written at `target`.

    Raises:
        FormatError: Something exists there and must not be replaced, or it is the folder `source`
            or contains it.
    """
    written, read = target.resolve(), source.resolve()
    if written == read or written in read.parents:
        relation = "is" if written == read else "contains"
        raise FormatError(
            f"target={target} {relation} the folder of the weights to convert, {source}; use "
            "another folder"
        )
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise FormatError(f"target={target} is a file or a symbolic link; use another folder")
    if not target.exists() or not any(target.iterdir()):
        return
    if not overwrite:
        raise FormatError(f"target={target} exists; use another folder, or overwrite=true")
    if detect_format(target) is None:
        raise FormatError(
            f"target={target} contains no weights, and overwrite=true only replaces weights; use "
            "another folder"
        )


def check_free_space(target: Path, n_bytes: int) -> None:
    """Check that the file system of `target` has `n_bytes` free.

    Raises:
        FormatError: It has less.
    """
    parent = next(path for path in target.absolute().parents if path.exists())
    free = shutil.disk_usage(parent).free
    if free < n_bytes:
        raise FormatError(
            f"target={target} needs {format_bytes(n_bytes)}, but {parent} has "
            f"{format_bytes(free)} free; free space, use another folder, or dtype=bf16"
        )


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """Yield a hidden folder that is renamed to `target` on success and deleted on error.

    Raises:
        FormatError: It cannot be written.
    """
    hidden = target.with_name(f".{target.name}-{uuid.uuid4().hex[:8]}")
    lock = FileLock(f"{hidden}.lock")  # held while writing; released when the process dies
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _delete_leftovers(target)
        with lock:
            hidden.mkdir()
            yield hidden
            for path in [*hidden.rglob("*"), hidden]:
                sync_folder(path)
            _publish(hidden, target)
    except Exception as error:
        full = (free_bytes(target.parent) or 0) < FULL_BYTES  # torch.save reports other errors
        if isinstance(error, FormatError) or not (isinstance(error, OSError) or full):
            raise
        problem = write_problem(error, target.parent)
        raise FormatError(
            f"target={target} cannot be written ({problem}); free space, fix the "
            "permissions, or use another folder. The incomplete output was deleted"
        ) from error
    finally:
        shutil.rmtree(hidden, ignore_errors=True)
        with suppress(OSError):
            Path(lock.lock_file).unlink(missing_ok=True)


def _delete_leftovers(target: Path) -> None:
    """Delete hidden folders of conversions to the same target that are no longer running.

    A folder is one of a conversion only if its lock file exists.
    """
    own_lock = re.compile(rf"(\.{re.escape(target.name)}-[0-9a-f]{{8}})\.lock")
    for match in filter(None, map(own_lock.fullmatch, os.listdir(target.parent))):
        hidden = target.with_name(match[1])
        with suppress(Timeout), FileLock(f"{hidden}.lock", blocking=False) as lock:
            for leftover in (hidden, _replaced(hidden)):
                if leftover.exists():
                    shutil.rmtree(leftover)
            Path(lock.lock_file).unlink(missing_ok=True)


def _replaced(hidden: Path) -> Path:
    """Return the name for an existing target while it is replaced."""
    return hidden.with_name(f"{hidden.name}.replaced")


def _publish(hidden: Path, target: Path) -> None:
    """Rename the folder to `target`; an existing target is moved away first and deleted last."""
    replaced = _replaced(hidden)
    if target.exists():
        target.rename(replaced)
    hidden.rename(target)
    sync_folder(target.parent)
    shutil.rmtree(replaced, ignore_errors=True)
