"""State of a preparation on disk: folder lock, identity of its input, and resuming.

`preparing.json` exists while a folder is being prepared and after an interruption. The preparing
process holds its lock; its content identifies configuration and input. A later preparation keeps
the records of parts for which these are equal. A changed `data.invalid_text` keeps the parts whose
text was all valid, so a `strict` preparation that failed can resume with `replace` or `skip`.
"""

import hashlib
import json
import os
import re
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from filelock import lock_descriptor

from data.config import DataConfig
from data.errors import DataError
from data.files import check_regular, parse_json
from data.manifest import MANIFEST_FILE
from data.preparation.part import PartRecord, record_path
from data.progress import ProgressReporter
from data.sources.corpora import Corpus, Part
from data.sources.fingerprints import SOURCES_FILE, Fingerprints
from data.tokenizer import MODEL_FILE, Tokenizer

MARKER_FILE = "preparing.json"
FORMAT_VERSION = 4  # of the marker; an unfinished preparation of an older version restarts
LOCK_TIMEOUT_SECONDS = 2.0  # for the workers of a preparation killed just before to exit
_OWN_FILES = re.compile(
    r"((train|validation)-\d{5,}(-\d{3,})?\.(tokens|offsets)|part-\d{5,}\.json)(\.tmp)?"
)


@contextmanager
def lock_folder(folder: Path) -> Iterator[TextIO]:
    """Lock the folder for this process and yield the open marker file that holds the lock.

    Raises:
        DataError: Another process holds the lock.
    """
    path = folder / MARKER_FILE
    deadline = time.monotonic() + LOCK_TIMEOUT_SECONDS
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        with open(path, "a+", encoding="utf-8") as marker:
            if _try_lock(marker, path):
                yield marker
                return
        if time.monotonic() > deadline:
            raise DataError(
                f"data.folder={folder} is being prepared by another process; wait for it, or "
                "choose another data.folder"
            )
        time.sleep(0.05)


def _try_lock(marker: TextIO, path: Path) -> bool:
    """Lock the marker file; return whether that succeeded and the file still exists."""
    try:
        locked = lock_descriptor(marker.fileno(), blocking=False)
        return locked and os.path.samestat(os.fstat(marker.fileno()), os.stat(path))
    except FileNotFoundError:  # removed by its holder between open and lock
        return False


def read_marker(marker: TextIO) -> dict[str, Any]:
    """Return the marker of an earlier preparation, or an empty dict."""
    marker.seek(0)
    try:
        values = parse_json(marker.read())
    except ValueError:  # empty, or truncated by a crash
        return {}
    is_valid = isinstance(values, dict) and isinstance(values.get("configuration"), dict)
    return values if is_valid else {}


def reject_foreign_files(folder: Path) -> None:
    """Raise DataError if the folder contains files that are not from a preparation."""
    if folder.exists() and not folder.is_dir():
        raise DataError(f"data.folder={folder} is a file; choose a folder")
    if folder.is_dir() and not (folder / MARKER_FILE).exists():
        file = next(folder.iterdir(), None)
        if file is not None and not (folder / MANIFEST_FILE).exists():
            raise DataError(
                f"data.folder={folder} contains files not written by a preparation ({file.name}, "
                "…); choose a new or empty folder"
            )


def make_marker(
    data: DataConfig,
    wanted: dict[str, Any],
    corpora: dict[str, Corpus],
    fingerprints: dict[str, Fingerprints],
    tokenizer: Tokenizer | None,
) -> dict[str, Any]:
    """Return the marker of a preparation: everything that determines its shards.

    Of local files, the contents count and not the paths.

    Args:
        wanted: Configuration of this preparation.
        tokenizer: The tokenizer, or None if it is trained on the data.
    """
    configuration = json.loads(json.dumps(wanted))
    configuration["tokenizer"]["path"] = None
    for name in data.sources:
        if fingerprints[name]:
            configuration["data.sources"][name]["path"] = None
    return {
        "format": FORMAT_VERSION,
        "configuration": configuration,
        "input": {name: _input_hash(corpora[name], fingerprints[name]) for name in corpora},
        "tokenizer": tokenizer.hash if tokenizer is not None else None,
    }


def resume(
    folder: Path,
    parts: Sequence[Part],
    new: dict[str, Any],
    marker: TextIO,
    reporter: ProgressReporter,
) -> None:
    """Keep the files of an earlier preparation that this one would write too; delete the others.

    Args:
        new: `make_marker(…)` of this preparation.
        marker: The open marker file.
    """
    old = read_marker(marker)
    policies = [values.get("configuration", {}).get("data.invalid_text") for values in (old, new)]
    configuration = {**old.get("configuration", {}), "data.invalid_text": policies[1]}
    comparable = {**old, "configuration": configuration}
    changed = [key for key in new if comparable.get(key) != new[key]]
    if new["tokenizer"] is None and policies[0] not in ("strict", policies[1]):
        changed.append("data.invalid_text")  # the tokenizer was trained on text repaired that way
    if changed:
        if old:
            reporter.log(f"{folder}: restarting the preparation; changed: {', '.join(changed)}")
        remove_files(folder)
        (folder / MODEL_FILE).unlink(missing_ok=True)
    elif policies[0] != policies[1]:
        for path in (record_path(folder, part) for part in parts):
            documents = PartRecord.read(path).documents
            if documents["skipped"] or documents["replaced"]:  # the policy had an effect
                path.unlink()
    kept = keep_complete(folder, parts)
    if kept:
        n_done = sum(record.done for record in kept)
        reporter.log(f"{folder}: resuming; {n_done} of {len(parts)} parts are done")
    if old != new:
        marker.truncate(0)
        json.dump(new, marker, indent=1)
        marker.flush()
        os.fsync(marker.fileno())


def _input_hash(corpus: Corpus, fingerprints: Fingerprints) -> str:
    """Return a hash of the content and division of a source."""
    content: tuple[Any, ...] = (corpus.revision, corpus.parts)
    if fingerprints:
        paths = dict.fromkeys(one.path for part in corpus.parts for one in part.ranges)
        number = {path: index for index, path in enumerate(paths)}
        division = [
            [(number[one.path], one.start, one.end, one.n_bytes) for one in part.ranges]
            for part in corpus.parts
        ]
        files = [(each.n_bytes, each.sample) for each in fingerprints.values()]
        content = (files, division)
    return hashlib.sha256(repr(content).encode()).hexdigest()


def keep_complete(folder: Path, parts: Sequence[Part]) -> list[PartRecord]:
    """Return the records whose shard files are complete; delete all other own files."""
    kept, files = [], set()
    for part in parts:
        path = record_path(folder, part)
        record = PartRecord.read(path)
        entries = [entry for shard in record.all_shards for entry in shard.files]
        if record.n_closed and not any(entry.size_error(folder) for entry in entries):
            kept.append(record)
            files |= {path.relative_to(folder).as_posix(), *(entry.file for entry in entries)}
    remove_files(folder, files)
    return kept


def remove_files(folder: Path, keep: Collection[str] = ()) -> None:
    """Delete shards, records and temporary files, but no files of other origin.

    Args:
        keep: Paths relative to the folder.
    """
    for path in folder.glob("*/*"):
        if _OWN_FILES.fullmatch(path.name) and path.relative_to(folder).as_posix() not in keep:
            path.unlink()
    for name in (MODEL_FILE, MANIFEST_FILE, SOURCES_FILE):
        (folder / f"{name}.tmp").unlink(missing_ok=True)
    _remove_empty(path for path in folder.iterdir() if path.is_dir())


def remove_all(folder: Path, created: Iterable[Path]) -> None:
    """Delete everything that a preparation wrote, including the folders it created.

    Args:
        created: Deepest first.
    """
    remove_files(folder)
    for file in (MODEL_FILE, SOURCES_FILE, MARKER_FILE):
        (folder / file).unlink(missing_ok=True)
    _remove_empty(created)


def finish(folder: Path) -> None:
    """Delete records and marker after the manifest was written."""
    for path in folder.glob("*/part-*.json*"):
        if _OWN_FILES.fullmatch(path.name):
            path.unlink()
    (folder / MARKER_FILE).unlink()


def finish_interrupted(folder: Path) -> None:
    """Do the work of `finish` for a preparation killed after it wrote the manifest."""
    path = folder / MARKER_FILE
    with suppress(OSError):  # absent, or read-only folder
        check_regular(path)
        with open(path, encoding="utf-8") as marker:
            if _try_lock(marker, path):
                finish(folder)


def _remove_empty(folders: Iterable[Path]) -> None:
    for folder in folders:
        with suppress(OSError):  # not empty, or absent
            folder.rmdir()
