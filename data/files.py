"""Files that are whole or not there: atomic writing, hashes of content, checksums of its pieces."""

import hashlib
import os
from pathlib import Path

from isal import isal_zlib

CRC_BLOCK = 2**20  # bytes that one checksum stands for


class Checksums:
    """CRC-32 of each MiB and SHA-256 of all, of content that comes piece by piece."""

    def __init__(self) -> None:
        self.n_bytes = 0
        self._sha256 = hashlib.sha256()
        self._whole: list[int] = []  # of the blocks that are complete
        self._open = 0  # of the block that is not

    def update(self, content: bytes | memoryview) -> None:
        """Takes the next piece."""
        self._sha256.update(content)
        view = memoryview(content).cast("B")
        while view:
            room = CRC_BLOCK - self.n_bytes % CRC_BLOCK
            piece = view[:room]
            self._open = isal_zlib.crc32(piece, self._open)
            self.n_bytes += len(piece)
            if len(piece) == room:
                self._whole.append(self._open)
                self._open = 0
            view = view[room:]

    @property
    def sha256(self) -> str:
        """SHA-256 of what came so far, in hexadecimal."""
        return self._sha256.hexdigest()

    @property
    def crc32(self) -> str:
        """CRC-32 of each MiB, the last one perhaps shorter: 8 hexadecimal digits each."""
        last = [self._open] if self.n_bytes % CRC_BLOCK else []
        return "".join(f"{crc:08x}" for crc in (*self._whole, *last))


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a file so that after a crash at any instant it is the old one or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Puts a folder's names on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
