"""Who owns a folder while it is prepared, and what may be removed from it.

`preparing.json` is there while a folder is being prepared and after a kill; who holds its lock
prepares. It tells from what: only what the same configuration made of the same input goes on.
"""

import fcntl
import json
import os
import re
import time
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from data.errors import DataError
from data.manifest import MANIFEST_FILE, Manifest
from data.tokenizer import MODEL_FILE

MARKER_FILE = "preparing.json"
PATIENCE_SECONDS = 2.0  # for the workers of a preparation that was killed just now to end
_OURS = re.compile(
    r"((train|validation)-\d{5,}(-\d{3,})?\.(tokens|offsets)|part-\d{5,}\.json)(\.tmp)?"
)


@contextmanager
def claimed(folder: Path) -> Iterator[TextIO]:
    """Holds the folder for this process, by the lock of its marker file, which it gives.

    Raises:
        DataError: another process holds it.
    """
    path = folder / MARKER_FILE
    give_up = time.monotonic() + PATIENCE_SECONDS
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        with open(path, "a+", encoding="utf-8") as marker:
            if _locked(marker, path):
                yield marker
                return
        if time.monotonic() > give_up:
            raise DataError(
                f"data.folder ({folder}) is being prepared by another process: wait for it, "
                "or name another data.folder"
            )
        time.sleep(0.05)


def is_claimed(folder: Path) -> bool:
    """Whether a living process holds the folder."""
    try:
        with open(folder / MARKER_FILE, encoding="utf-8") as marker:
            fcntl.flock(marker, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # no marker, no preparation
        return False
    return False


def read_marker(marker: TextIO) -> dict[str, Any]:
    """What the preparation before was made from; nothing where there was none."""
    marker.seek(0)
    try:
        values = json.load(marker)
    except ValueError:
        return {}
    return values if isinstance(values, dict) else {}


def write_marker(marker: TextIO, values: dict[str, Any]) -> None:
    """Puts on the disk what this preparation is made from. Torn by a crash, it counts as none."""
    marker.truncate(0)
    json.dump(values, marker, indent=1)
    marker.flush()
    os.fsync(marker.fileno())


def prepared_before(folder: Path, wanted: dict[str, Any]) -> Manifest:
    """The manifest of a folder that is prepared, refused when from another configuration."""
    manifest = Manifest.read(folder)
    was, now = _flat(manifest.configuration), _flat(wanted)
    differences = [
        f"  {key}: {was.get(key, 'absent')} there, {now.get(key, 'absent')} now"
        for key in sorted(was.keys() | now.keys())
        if was.get(key, "absent") != now.get(key, "absent")
    ]
    if differences:
        raise DataError(
            f"data.folder ({folder}) was prepared from another configuration:\n"
            + "\n".join(differences)
            + "\nName another data.folder (or data.name), or delete this one."
        )
    return manifest


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values by their dotted keys."""
    flat = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


def refuse_foreign(folder: Path) -> None:
    """A folder with files of someone else is left alone."""
    if folder.exists() and not folder.is_dir():
        raise DataError(f"data.folder ({folder}) is a file: name a folder")
    if folder.is_dir() and not (folder / MARKER_FILE).exists():
        found = next(folder.iterdir(), None)
        if found is not None and not (folder / MANIFEST_FILE).exists():
            raise DataError(
                f"data.folder ({folder}) holds files that no preparation made ({found.name}, …): "
                "name a new or empty folder"
            )


def sweep(folder: Path, keep: Collection[str] = ()) -> None:
    """Removes shards and records but for `keep`, and what was half-written, but no other file.

    Args:
        keep: paths from the folder
    """
    for path in folder.glob("*/*"):
        if _OURS.fullmatch(path.name) and path.relative_to(folder).as_posix() not in keep:
            path.unlink()
    for name in (MODEL_FILE, MANIFEST_FILE):
        (folder / f"{name}.tmp").unlink(missing_ok=True)
    _remove_empty(path for path in folder.iterdir() if path.is_dir())


def remove_all(folder: Path, made: Iterable[Path]) -> None:
    """Removes all that a preparation made, the folders `made` for it too, deepest first."""
    sweep(folder)
    for file in (MODEL_FILE, MARKER_FILE):
        (folder / file).unlink(missing_ok=True)
    _remove_empty(made)


def end_claim(folder: Path) -> None:
    """Removes the records and the marker of a preparation whose manifest is written."""
    for path in folder.glob("*/part-*.json*"):
        if _OURS.fullmatch(path.name):
            path.unlink()
    (folder / MARKER_FILE).unlink()


def end_killed_claim(folder: Path) -> None:
    """Does that for a preparation that was killed after its manifest was written."""
    path = folder / MARKER_FILE
    with suppress(OSError), open(path, encoding="utf-8") as marker:  # or the folder is read-only
        if _locked(marker, path):
            end_claim(folder)


def _locked(marker: TextIO, path: Path) -> bool:
    """Whether this process now holds the lock of the file, and the file is still there."""
    try:
        fcntl.flock(marker, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(marker.fileno()), os.stat(path))
    except (BlockingIOError, FileNotFoundError):
        return False


def _remove_empty(folders: Iterable[Path]) -> None:
    for folder in folders:
        with suppress(OSError):  # not empty, or not there
            folder.rmdir()
