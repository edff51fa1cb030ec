"""Fingerprints of a source's files: name, size, modification time and a hash of a content sample.

A prepared folder keeps the fingerprints of its input in `sources.json`, so that files that were
added, removed or replaced later are found without reading all of them, and so that a corpus is
recognized at another path.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import NamedTuple

from data.config import SourceConfig
from data.files import parse_json, read_file, write_atomically
from data.sources.corpora import source_files

SOURCES_FILE = "sources.json"
FORMAT, FORMAT_VERSION = "llamesh-sources", 1
# Bytes hashed of each source; large files are sampled in blocks once it has more.
SOURCE_BYTES, BLOCK_BYTES = 2**30, 2**16
MIN_FILE_BYTES = 2**21  # hashed of each file
DOCUMENTATION = ("README.md", "dataset_infos.json")  # next to the files of a dataset


class Fingerprint(NamedTuple):
    """One file; `sample` is the hash of `n_blocks` evenly spread blocks, or of everything (0)."""

    n_bytes: int
    mtime_ns: int
    sample: str
    n_blocks: int


Fingerprints = dict[str, Fingerprint]
"""By name, relative to the folder that contains all files of the source."""


def take_fingerprints(paths: Iterable[str | Path]) -> Fingerprints:
    """Return the fingerprints of files, and of the data files in folders.

    The names of datasets on the Hub, which are no local path, are left out.
    """
    files = _by_name(paths)
    share = max(SOURCE_BYTES // max(len(files), 1), MIN_FILE_BYTES)
    found = {}
    for name, file in files.items():
        status = file.stat()
        n_blocks = share // BLOCK_BYTES if status.st_size > share else 0
        found[name] = Fingerprint(
            status.st_size, status.st_mtime_ns, sample(file, n_blocks), n_blocks
        )
    return found


def input_paths(source: SourceConfig, recorded: Fingerprints) -> list[Path]:
    """Return the paths that `find_corpus` would read now, without opening them.

    Raises:
        DataError: There is no file at `source.path`.
    """
    if source.format == "huggingface":
        return [Path(str(source.path))]
    if source.format == "stdlib":  # walking through its folders takes half a second
        import sysconfig

        root = Path(sysconfig.get_paths()["stdlib"])
        return [root / name for name in recorded]
    return source_files(source)


def changed_files(recorded: Fingerprints, paths: Iterable[Path], taken_ns: int) -> list[str]:
    """Return a line for each file that was added, removed or replaced.

    A file with the content of a removed one was only renamed and is not listed.

    Args:
        taken_ns: When the fingerprints were recorded. A file of the same size and modification time
            is read only if its inode changed since then.

    Raises:
        OSError: A file cannot be read.
    """
    files = _by_name(paths)
    changes = {(name, "added") for name in files if name not in recorded}
    sample_once = cache(sample)
    moved: dict[int, list[str]] = {}  # names that are gone, by size
    for name, fingerprint in recorded.items():
        if name not in files:
            changes.add((name, "removed"))
            moved.setdefault(fingerprint.n_bytes, []).append(name)
        elif _differs(files[name], fingerprint, taken_ns):
            changes.add((name, "replaced"))
    for name, file in files.items():
        candidates = moved.get(file.stat().st_size, []) if name not in recorded else []
        for old in candidates:
            if sample_once(file, recorded[old].n_blocks) == recorded[old].sample:
                changes -= {(name, "added"), (old, "removed")}
                candidates.remove(old)
                break
    return [f"{change}: {name}" for name, change in sorted(changes)]


def sample(path: Path, n_blocks: int = 0) -> str:
    """Return a hash of evenly spread blocks of a file with both of its ends; 0: of everything."""
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        n_bytes = os.fstat(file.fileno()).st_size
        if n_blocks < 2:
            while chunk := file.read(2**20):
                digest.update(chunk)
            return digest.hexdigest()
        for block in range(n_blocks):
            file.seek(max(n_bytes - BLOCK_BYTES, 0) * block // (n_blocks - 1))
            digest.update(file.read(BLOCK_BYTES))
    return digest.hexdigest()


def write_sources(folder: Path, sources: Mapping[str, Fingerprints]) -> None:
    """Write the fingerprints of all sources by name."""
    values = {"format": FORMAT, "version": FORMAT_VERSION, "sources": sources}
    write_atomically(folder / SOURCES_FILE, json.dumps(values, indent=0).encode())


def read_sources(folder: Path) -> tuple[dict[str, Fingerprints], int]:
    """Return the fingerprints of a prepared folder and when they were written.

    Folders of version 0.2 have none; they are compared by the names and sizes of their files.
    """
    path = folder / SOURCES_FILE
    try:
        values = parse_json(read_file(path))
        if (values["format"], values["version"]) != (FORMAT, FORMAT_VERSION):
            return {}, 0
        sources = {
            name: {file: Fingerprint(*fields) for file, fields in files.items()}
            for name, files in values["sources"].items()
        }
        return sources, path.stat().st_mtime_ns
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}, 0


def _differs(file: Path, recorded: Fingerprint, taken_ns: int) -> bool:
    now = file.stat()
    if now.st_size != recorded.n_bytes:
        return True
    untouched = now.st_mtime_ns == recorded.mtime_ns and now.st_ctime_ns < taken_ns
    return not untouched and sample(file, recorded.n_blocks) != recorded.sample


def _by_name(paths: Iterable[str | Path]) -> dict[str, Path]:
    """Return files by name relative to their common parent; folders stand for their data files."""
    files: list[Path] = []
    for path in dict.fromkeys(Path(path).absolute() for path in paths):
        if path.is_dir():
            inside = [file for file in sorted(path.rglob("*")) if file.is_file()]
            files += [file for file in inside if _is_data(file.relative_to(path))]
        elif path.exists():
            files.append(path)
    if not files:
        return {}
    base = os.path.commonpath([file.parent for file in files])
    return {file.relative_to(base).as_posix(): file for file in files}


def _is_data(file: Path) -> bool:
    return file.name not in DOCUMENTATION and not any(part[0] == "." for part in file.parts)
