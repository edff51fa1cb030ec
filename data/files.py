"""Crash-safe file writing, content checksums, and waiting for another process's files."""

import errno
import fcntl
import hashlib
import json
import math
import os
import re
import shutil
import stat
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Predicate  # not pydantic, which `--help` does not need
from isal import isal_zlib

from data.errors import DataError

CRC_BLOCK = 2**20  # bytes per CRC-32
FULL_BYTES = 2**20  # with less free space, a library's failed write is put down to a full disk
_NO_FOLDER_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EBADF, errno.ENOSYS)
MAX_DEPTH = 64  # nested objects and lists in a file; ours have at most 8
TOO_DEEP = f"nested deeper than {MAX_DEPTH} levels"
POLL_SECONDS, IDLE_SECONDS = 0.5, 60.0  # of waiting for another process


@dataclass(frozen=True)
class FileEntry:
    """One file of a dataset.

    Attributes:
        file: Path relative to the dataset folder.
        crc32: CRC-32 of each MiB of the file, 8 hexadecimal digits each.
    """

    file: str
    n_bytes: int
    sha256: Annotated[str, Predicate(re.compile("[0-9a-f]{64}").fullmatch)]
    crc32: Annotated[str, Predicate(re.compile("([0-9a-f]{8})*").fullmatch)]

    @property
    def n_blocks(self) -> int:
        """Number of checksummed MiB."""
        return len(self.crc32) // 8

    def block_crc32(self, block: int) -> int:
        """Return the CRC-32 of one MiB."""
        return int(self.crc32[8 * block : 8 * block + 8], 16)

    def size_error(self, folder: Path) -> str | None:
        """Return why the file cannot be opened, or how its size differs from this entry."""
        path = folder / self.file
        try:
            n_bytes = path.stat().st_size
            if not os.access(path, os.R_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        except OSError as error:
            return f"{path}: cannot read ({error.strerror})"
        differs = f"{path} has {n_bytes:,} bytes, but the manifest records {self.n_bytes:,}"
        return differs if n_bytes != self.n_bytes else None


class Checksums:
    """CRC-32 of each MiB and SHA-256 of a byte stream, updated incrementally."""

    def __init__(self, content: bytes = b"") -> None:
        self.n_bytes = 0
        self._sha256 = hashlib.sha256()
        self._crc32: list[int] = []
        self.update(content)

    def update(self, content: bytes | memoryview) -> None:
        self._sha256.update(content)
        view = memoryview(content).cast("B")
        while view:
            n_used = self.n_bytes % CRC_BLOCK
            if n_used == 0:
                self._crc32.append(0)
            chunk, view = view[: CRC_BLOCK - n_used], view[CRC_BLOCK - n_used :]
            self._crc32[-1] = isal_zlib.crc32(chunk, self._crc32[-1])
            self.n_bytes += len(chunk)

    def entry(self, file: str) -> FileEntry:
        """Return the entry of a file that contains the bytes so far."""
        crc32 = "".join(f"{crc:08x}" for crc in self._crc32)
        return FileEntry(file, self.n_bytes, self._sha256.hexdigest(), crc32)


def strict_json(value: Any, *, default: Callable[[Any], Any] | None = None, **options: Any) -> str:
    """Return JSON in which NaN and infinity, which JSON lacks, are `null`.

    Args:
        default: Converts values that JSON lacks, as in `json.dumps`.
        options: Arguments of `json.dumps`, such as `indent`.
    """
    text = json.dumps(value, default=default)
    finite = json.loads(text, parse_constant=lambda _: None)
    return json.dumps(finite, allow_nan=False, **options)


def parse_json(content: bytes | str, *, parse_constant: Callable[[str], Any] | None = None) -> Any:
    """Return the value of JSON from a file: `json.loads` whose only error is `ValueError`.

    Raises:
        ValueError: It is not JSON, is not UTF-8, or is nested deeper than `MAX_DEPTH`.
    """
    try:
        value = json.loads(content, parse_constant=parse_constant)
    except RecursionError:
        raise ValueError(TOO_DEEP) from None
    brackets = (b"[", b"{") if isinstance(content, bytes) else ("[", "{")
    if sum(map(content.count, brackets)) > MAX_DEPTH:  # type: ignore[arg-type]
        check_depth(value)
    return value


def check_depth(value: Any, max_values: float = math.inf) -> None:
    """Check that a value from a file is not nested so deeply that recursive functions fail.

    Args:
        max_values: Values at one depth; an alias in YAML counts as its copies.

    Raises:
        ValueError: It is nested deeper than `MAX_DEPTH`, contains itself, or has more values.
    """
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        containers = [each for each in level if isinstance(each, (dict, list))]
        if not containers:
            return
        values = (each.values() if isinstance(each, dict) else each for each in containers)
        level = list(chain.from_iterable(values))
        if len(level) > max_values:
            raise ValueError(f"more than {max_values} values")
    raise ValueError(TOO_DEEP)


def json_line(value: Any, *, default: Callable[[Any], Any] | None = None) -> str:
    """Return strict JSON in one line, with characters at which `str.splitlines` splits escaped."""
    text = strict_json(value, default=default, ensure_ascii=False)
    return text.translate({ord(each): f"\\u{ord(each):04x}" for each in "\x85\u2028\u2029"})


def read_file(path: Path) -> bytes:
    """Return the content of a regular file.

    Raises:
        OSError: It cannot be read, or is of another kind: a named pipe would block, a device may
            never end.
    """
    check_regular(path)
    return path.read_bytes()


def check_regular(path: Path) -> None:
    """Check that a path is a regular file, before it is opened.

    Raises:
        OSError: It is not, or does not exist.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(errno.EINVAL, "not a regular file", str(path))


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file such that a crash at any time leaves either the old or the new content."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except OSError:
        with suppress(OSError):
            temporary.unlink()
        raise
    sync_folder(path.parent)


def set_aside(path: Path) -> Path | None:
    """Rename a damaged file or folder to `NAME.damaged`, or with a number if that exists.

    Returns:
        The new path; None if there is nothing at `path`.

    Raises:
        OSError: It cannot be renamed.
    """
    if not os.path.lexists(path):
        return None
    target, number = path.with_name(f"{path.name}.damaged"), 1
    while os.path.lexists(target):
        number += 1
        target = path.with_name(f"{path.name}.damaged-{number}")
    os.rename(path, target)
    return target


def set_aside_other_kind(path: Path, is_folder: bool = False) -> Path | None:
    """Rename what is not a regular file (or not a folder, if that is needed) as `set_aside` does.

    Returns:
        The new path; None if the path is of the right kind, or does not exist.

    Raises:
        OSError: It cannot be renamed.
    """
    is_right = path.is_dir() if is_folder else path.is_file()
    return None if is_right else set_aside(path)


def sync_folder(folder: Path) -> None:
    """Flush a folder's directory entries to disk.

    Some network and FUSE file systems cannot do so; a warning is printed once.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:
            raise
        _warn_once(
            f"Warning: the file system of {folder} cannot sync folders ({error.strerror}). "
            "Continuing; after a power failure or a crash of the file server, files written last "
            "may be missing."
        )
    finally:
        os.close(descriptor)


def write_error(folder: Path, error: OSError, n_needed: int, key: str = "data.folder") -> str:
    """Return why files cannot be written to a folder, and what to do.

    Args:
        n_needed: Bytes still to be written, estimated.
    """
    remedy = ""
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        remedy = "make it writable or "
    elif error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        needed = f", about {format_bytes(n_needed)} needed" if n_needed else ""
        free = format_bytes(shutil.disk_usage(existing).free)
        remedy = f"free disk space ({free} free{needed}) or "
    reason = error.strerror or error
    return f"{key}={folder} cannot be written ({reason}); {remedy}choose another {key}"


def format_bytes(n_bytes: int) -> str:
    """Return a size with a unit, such as `1.5 GiB`."""
    for power, unit in ((40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")):
        if n_bytes >= 2**power:
            return f"{n_bytes / 2**power:.1f} {unit}"
    return f"{n_bytes} bytes"


@cache
def _warn_once(message: str) -> None:
    if _warn_once.cache_info().misses == 1:  # of any folder
        print(message, file=sys.stderr, flush=True)


def write_problem(error: BaseException, folder: Path, needed: int | None = None) -> str:
    """Return in one line why writing into a folder failed; a full disk is named as such.

    Args:
        error: Error of the system or of a library, which may not mention the disk.
        needed: Bytes to write in all, if known.
    """
    text = " ".join(str(error).split())
    if isinstance(error, OSError) and error.strerror:
        text = error.strerror
    number = write_errno(error, folder)
    if number == errno.EFBIG:
        return f"{text}; the limit is of the file system or of the shell (ulimit -f)"
    if number not in (errno.ENOSPC, errno.EDQUOT) or text.endswith(" free"):
        return text
    if not isinstance(error, OSError):
        text = os.strerror(errno.ENOSPC)
    if free_inodes(folder) == 0:
        return f"{text}: in {folder} no inodes are free; delete files or raise their limit"
    more = "" if needed is None else f"{format_bytes(needed)} needed, "
    return f"{text}: in {folder} {more}{format_bytes(free_bytes(folder) or 0)} free"


def write_errno(error: BaseException, folder: Path) -> int | None:
    """Return the number of an error of the system; an error of a library may hide a full disk."""
    if isinstance(error, OSError):
        return error.errno
    free = free_bytes(folder)
    return errno.ENOSPC if free is not None and free < FULL_BYTES else None


def free_bytes(folder: Path) -> int | None:
    """Return the free bytes of a folder's disk, or of the first parent that exists."""
    disk = _disk(folder)
    return disk.f_bavail * disk.f_frsize if disk else None


def free_inodes(folder: Path) -> int | None:
    """Return how many files may be added to a folder's disk; None if it has no limit."""
    disk = _disk(folder)
    return disk.f_favail if disk and disk.f_files else None


def _disk(folder: Path) -> os.statvfs_result | None:
    for path in (folder, *folder.absolute().parents):
        with suppress(OSError):
            return os.statvfs(path)
    return None


def is_locked(path: Path) -> bool:
    """Return whether a live process holds the `filelock` lock of a file.

    The probe is a shared lock, which `filelock` does not offer: with an exclusive one, many
    waiting processes would mistake each other's probes for the holder.
    """
    try:
        with open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # no file, hence no holder
        pass
    return False


def wait_for_writer(is_ready: Callable[[], bool], lock: Path, unfinished: str, remedy: str) -> None:
    """Wait, without time limit, until another process has made `is_ready` true.

    Raises:
        DataError: No process held the lock for `IDLE_SECONDS`.
    """
    last_active = time.monotonic()
    while not is_ready():
        if is_locked(lock):
            last_active = time.monotonic()
        elif time.monotonic() - last_active > IDLE_SECONDS:
            raise DataError(
                f"{unfinished}, and no process has worked on it for {IDLE_SECONDS:.0f} s; see the "
                f"first process's output, or run {remedy} first"
            )
        time.sleep(POLL_SECONDS)
