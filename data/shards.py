"""Writing and reading token shards.

`ShardWriter` writes the two files of a shard; `TokenStream` reads the shards of a source and split
as one token sequence through memory maps. The file format is specified in `data.manifest`.
"""

import mmap
import os
from bisect import bisect_right
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from isal import isal_zlib

from data.errors import DataError
from data.files import CRC_BLOCK, Checksums, FileEntry, sync_folder, write_atomically
from data.manifest import OFFSET, TOKEN, Shard
from data.mappings import Mappings

TOKENS_PER_BLOCK = CRC_BLOCK // TOKEN.itemsize
REPAIR = "list all damage with `prepare.py verify=true`, then restore the file or prepare again"


class ShardWriter:
    """Write one shard of one split; documents never span shards.

    Final file names appear only after the files are complete and synced. A shard without documents
    creates no files.

    Args:
        stem: Path of the files relative to `folder`, without suffix.
    """

    def __init__(self, folder: Path, stem: str) -> None:
        self.folder, self.stem = folder, stem
        self.largest_id = 0
        self._offsets = [0]
        self._file: BinaryIO | None = None
        self._checksums = Checksums()

    @property
    def n_tokens(self) -> int:
        """Number of tokens written so far."""
        return self._offsets[-1]

    def add(self, tokens: np.ndarray) -> None:
        """Append one document.

        Args:
            tokens: (n_tokens,) uint32
        """
        if self._file is None:
            path = self._path("tokens.tmp")
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("wb")
        content = np.ascontiguousarray(tokens, dtype=TOKEN).data.cast("B")
        self._file.write(content)
        self._checksums.update(content)
        self._offsets.append(self._offsets[-1] + len(tokens))
        self.largest_id = max(self.largest_id, int(tokens.max(initial=0)))

    def close(self) -> Shard | None:
        """Finish the shard and return its manifest entry, or None if it has no documents."""
        if self._file is None:
            return None
        self._file.flush()
        os.fsync(self._file.fileno())
        self.abort()
        offsets = np.array(self._offsets, dtype=OFFSET).tobytes()
        write_atomically(self._path("offsets"), offsets)
        os.replace(self._path("tokens.tmp"), self._path("tokens"))
        sync_folder(self._path("tokens").parent)
        return Shard(
            tokens=self._checksums.entry(f"{self.stem}.tokens"),
            offsets=Checksums(offsets).entry(f"{self.stem}.offsets"),
            n_tokens=self.n_tokens,
            n_documents=len(self._offsets) - 1,
            largest_id=self.largest_id,
        )

    def abort(self) -> None:
        """Close the open file and leave its content under the temporary name."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _path(self, suffix: str) -> Path:
        return self.folder / f"{self.stem}.{suffix}"


class TokenStream:
    """The concatenated, memory-mapped shards of one source and split.

    Windows have `seq_len` + 1 tokens at a stride of `seq_len`: the last token of a window is only a
    label there and the first input of the next window.

    Args:
        verify: Compare each MiB of tokens with its checksum on first access, and offsets when
            their shard is first opened.
        mappings: Shared by the streams of a process.
    """

    def __init__(
        self,
        folder: Path,
        shards: Sequence[Shard],
        verify: bool = True,
        mappings: Mappings | None = None,
    ) -> None:
        self._folder = folder
        self._shards = list(shards)
        self._verify = verify
        self._ends = np.cumsum([shard.n_tokens for shard in shards], dtype=np.int64).tolist()
        self._mappings = mappings or Mappings()
        self._verified: dict[int, bytearray] = {}  # by shard: 1 for each compared MiB of tokens
        self.n_tokens: int = self._ends[-1] if self._ends else 0

    def n_windows(self, seq_len: int) -> int:
        """Return the number of full windows; tokens after the last one are unused."""
        return max(self.n_tokens - 1, 0) // seq_len

    def window(self, index: int, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
        """Read one window.

        Args:
            index: 0 <= index < n_windows(seq_len)

        Returns:
            tokens: (seq_len + 1,) uint32
            starts: (n_documents,) int64, indices in the window at which a document starts

        Raises:
            DataError: A file is missing or damaged.
        """
        if not 0 <= index < self.n_windows(seq_len):
            raise IndexError(f"window {index} is out of range ({self.n_windows(seq_len)} windows)")
        start = index * seq_len
        shard_index = bisect_right(self._ends, start)
        start -= self._ends[shard_index] - self._shards[shard_index].n_tokens
        parts, n_read = [], 0
        while n_read <= seq_len:
            end = min(start + seq_len + 1 - n_read, self._shards[shard_index].n_tokens)
            tokens, starts = self.read(shard_index, start, end)
            parts.append((tokens, starts + n_read))
            n_read += end - start
            shard_index, start = shard_index + 1, 0
        if len(parts) == 1:
            return parts[0]
        all_tokens, all_starts = zip(*parts, strict=True)
        return np.concatenate(all_tokens), np.concatenate(all_starts)

    def read(self, shard_index: int, start: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """Return tokens [start, end) of a shard and the document starts relative to `start`."""
        shard = self._open(shard_index)
        check_not_truncated(shard.tokens, self._folder / shard.entry.file)
        check_not_truncated(shard.starts, self._folder / self._shards[shard_index].offsets.file)
        if self._verify:
            verified = self._verified[shard_index]
            first, last = start // TOKENS_PER_BLOCK, (end - 1) // TOKENS_PER_BLOCK
            for block in range(first, last + 1):
                if not verified[block]:  # two threads may both verify it, which is harmless
                    _verify_block(self._folder, shard.entry, shard.tokens, block)
                    verified[block] = 1
        low, high = np.searchsorted(shard.starts, (start, end))
        # A copy, because a view would keep its shard mapped as long as the batch exists.
        return shard.tokens[start:end].copy(), shard.starts[low:high] - start

    def starts(self, shard_index: int) -> np.ndarray:
        """Return the document starts of a shard, (n_documents,) int64."""
        return self._open(shard_index).starts

    def _open(self, shard_index: int) -> "_OpenShard":
        return self._mappings.get((id(self), shard_index), partial(self._open_shard, shard_index))

    def _open_shard(self, shard_index: int) -> "_OpenShard":
        shard = self._shards[shard_index]
        tokens = map_file(self._folder, shard.tokens, TOKEN, verify=False)
        is_new = shard_index not in self._verified
        offsets = map_file(self._folder, shard.offsets, OFFSET, self._verify and is_new)
        self._verified.setdefault(shard_index, bytearray(shard.tokens.n_blocks))
        return _OpenShard(shard.tokens, tokens, offsets[:-1])


class _OpenShard(NamedTuple):
    entry: FileEntry
    tokens: np.ndarray  # (n_tokens,) uint32
    starts: np.ndarray  # (n_documents,) int64


def map_file(
    folder: Path, entry: FileEntry, dtype: np.dtype, verify: bool, remedy: str = REPAIR
) -> np.ndarray:
    """Memory-map a file as an array.

    Args:
        verify: Compare the content with its checksums.
        remedy: End of the error message.

    Raises:
        DataError: The file is missing, has another size or is damaged.
        OSError: It cannot be mapped, such as with too many open files.
    """
    if error := entry.size_error(folder):
        raise DataError(f"{error}; {remedy}")
    # A plain view: slicing a np.memmap runs Python code on every slice.
    content = np.memmap(folder / entry.file, dtype=dtype, mode="r").view(np.ndarray)
    for block in range(entry.n_blocks if verify else 0):
        _verify_block(folder, entry, content, block, remedy)
    return content


def check_not_truncated(content: np.ndarray, path: Path, remedy: str = REPAIR) -> None:
    """Check that a mapped file still has its pages: reading a lost one ends the process (SIGBUS).

    Args:
        content: Array of `map_file`, or a part of it.

    Raises:
        DataError: The file was truncated.
    """
    mapping: Any = content
    while not isinstance(mapping, mmap.mmap):
        mapping = mapping.base
    if mapping.size() < len(mapping):
        raise DataError(f"{path} was truncated while it was in use; {remedy}")


def _verify_block(
    folder: Path, entry: FileEntry, content: np.ndarray, block: int, remedy: str = REPAIR
) -> None:
    size = CRC_BLOCK // content.itemsize
    crc32 = isal_zlib.crc32(content[block * size : (block + 1) * size])
    if crc32 != entry.block_crc32(block):
        raise DataError(
            f"{folder / entry.file} is damaged: the checksum of MiB {block} (counted from 0) "
            f"differs from the manifest; {remedy}"
        )
