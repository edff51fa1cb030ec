"""Crash-safe file writing, content checksums and lock probing."""

import fcntl
import hashlib
import os
from pathlib import Path

from isal import isal_zlib

CRC_BLOCK = 2**20  # bytes per CRC-32


class Checksums:
    """CRC-32 of each MiB and SHA-256 of a byte stream, updated incrementally."""

    def __init__(self) -> None:
        self.n_bytes = 0
        self._sha256 = hashlib.sha256()
        self._complete: list[int] = []  # CRC-32 of each complete block
        self._partial = 0  # CRC-32 of the incomplete last block

    def update(self, content: bytes | memoryview) -> None:
        self._sha256.update(content)
        view = memoryview(content).cast("B")
        while view:
            n_missing = CRC_BLOCK - self.n_bytes % CRC_BLOCK
            chunk, view = view[:n_missing], view[n_missing:]
            self._partial = isal_zlib.crc32(chunk, self._partial)
            self.n_bytes += len(chunk)
            if len(chunk) == n_missing:
                self._complete.append(self._partial)
                self._partial = 0

    @property
    def sha256(self) -> str:
        """SHA-256 of the bytes so far, in hexadecimal."""
        return self._sha256.hexdigest()

    @property
    def crc32(self) -> str:
        """CRC-32 of each MiB (the last may be shorter), 8 hexadecimal digits each."""
        last = [self._partial] if self.n_bytes % CRC_BLOCK else []
        return "".join(f"{crc:08x}" for crc in (*self._complete, *last))


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file such that a crash at any time leaves either the old or the new content."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Flush a folder's directory entries to disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
