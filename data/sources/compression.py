"""Decompression of gzip, Zstandard, xz and bzip2 files, which are recognised by content.

Concatenated members are read as one stream, zeros after the last member are ignored, and a file
that ends inside a member raises an error.
"""

import io
from typing import BinaryIO, cast

MAGIC = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\xfd7zXZ\0": "xz",
    b"BZh": "bzip2",
}
COMMANDS = {".gz": "gzip", ".zst": "zstd", ".xz": "xz", ".bz2": "bzip2"}  # by suffix
SUFFIXES = tuple(COMMANDS)
MAX_ZSTD_WINDOW = 2**31  # bytes, of `zstd --long=31`; the library's default is 2**27
_CHUNK = 2**17  # compressed bytes


def compression_of(head: bytes) -> str | None:
    """Return the compression of a file from its first bytes."""
    found = next((name for magic, name in MAGIC.items() if head.startswith(magic)), None)
    if head[1:4] == b"\x2a\x4d\x18" and 0x50 <= head[0] < 0x60:  # a skippable frame
        return "zstd"
    # "BZh" alone could be text: a block size and the magic of a block or of the end follow.
    if found == "bzip2" and head[4:10] not in (b"1AY&SY", b"\x17rE8P\x90"):
        return None
    return found


def decompressed(file: "io.BufferedReader[io.FileIO]", buffer_size: int = 2**20) -> BinaryIO:
    """Return a stream of the decompressed content of a file, or the file if not compressed.

    Args:
        buffer_size: Bytes that are decompressed ahead.
    """
    compression = compression_of(file.peek(16)[:16])
    if compression == "gzip":
        from isal import igzip

        return cast(BinaryIO, io.BufferedReader(igzip.IGzipFile(fileobj=file), buffer_size))
    if compression == "zstd":
        return cast(BinaryIO, io.BufferedReader(_ZstdFile(file), buffer_size))
    if compression == "xz":
        import lzma

        return cast(BinaryIO, lzma.LZMAFile(file))
    if compression == "bzip2":
        import bz2

        return cast(BinaryIO, bz2.BZ2File(file))
    return file


class _ZstdFile(io.RawIOBase):
    """The decompressed frames of a Zstandard file; unlike the library's reader, detects a cut."""

    def __init__(self, file: BinaryIO) -> None:
        import zstandard

        self._file = file
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=MAX_ZSTD_WINDOW)
        self._frame = self._decompressor.decompressobj()
        self._in_frame = False
        self._output = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray) -> int:  # type: ignore[override]
        while not self._output:
            chunk = self._file.read(_CHUNK)
            if not chunk:
                if self._in_frame:
                    raise EOFError("the file ends inside a Zstandard frame")
                return 0
            self._output = memoryview(self._decompress(chunk))
        n_bytes = min(len(buffer), len(self._output))
        buffer[:n_bytes] = self._output[:n_bytes]
        self._output = self._output[n_bytes:]
        return n_bytes

    def _decompress(self, chunk: bytes) -> bytes:
        """Return the content of the frames, or parts of frames, in a chunk."""
        pieces = []
        while chunk := chunk if self._in_frame else chunk.lstrip(b"\0"):
            self._in_frame = True
            pieces.append(self._frame.decompress(chunk))
            if not self._frame.eof:
                break
            chunk, self._in_frame = self._frame.unused_data, False
            self._frame = self._decompressor.decompressobj()
        return b"".join(pieces)
