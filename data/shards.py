"""Token shards: written so that they are whole or not there, read through memory maps.

What lies in which file is `data.manifest`'s.
"""

import os
from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from isal import isal_zlib

from data.errors import DataError
from data.files import CRC_BLOCK, Checksums, sync_folder, write_atomically
from data.manifest import OFFSET, TOKEN, FileEntry, Shard

TOKENS_A_BLOCK = CRC_BLOCK // TOKEN.itemsize
MEND = "`prepare.py verify=true` lists all damage; restore the file, or prepare the folder again"


class ShardWriter:
    """Writes one shard of one split; a document lies in one shard, whole.

    `stem` is the path of its files from `folder`, without the endings. The files appear under
    their names only when they are complete and on the disk; a shard without documents has none.
    """

    def __init__(self, folder: Path, stem: str) -> None:
        self.folder, self.stem = folder, stem
        self.largest_id = 0
        self._starts = [0]  # where each document begins, then the number of tokens
        self._file: BinaryIO | None = None
        self._sums = Checksums()

    @property
    def n_tokens(self) -> int:
        """Tokens so far."""
        return self._starts[-1]

    def add(self, tokens: np.ndarray) -> None:
        """Appends one document, uint32 (tokens,)."""
        if self._file is None:
            path = self._path("tokens.tmp")
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("wb")
        content = np.ascontiguousarray(tokens, dtype=TOKEN).data.cast("B")
        self._file.write(content)
        self._sums.update(content)
        self._starts.append(self._starts[-1] + len(tokens))
        self.largest_id = max(self.largest_id, int(tokens.max(initial=0)))

    def close(self) -> Shard | None:
        """Finishes the shard; None where no document came."""
        if self._file is None:
            return None
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._file = None
        offsets = np.array(self._starts, dtype=OFFSET).tobytes()
        offsets_sums = Checksums()
        offsets_sums.update(offsets)
        write_atomically(self._path("offsets"), offsets)
        os.replace(self._path("tokens.tmp"), self._path("tokens"))
        sync_folder(self._path("tokens").parent)
        return Shard(
            tokens=FileEntry.of(f"{self.stem}.tokens", self._sums),
            offsets=FileEntry.of(f"{self.stem}.offsets", offsets_sums),
            n_tokens=self.n_tokens,
            n_documents=len(self._starts) - 1,
            largest_id=self.largest_id,
        )

    def abandon(self) -> None:
        """Closes a file that is open; its temporary name tells that it is not whole."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _path(self, ending: str) -> Path:
        return self.folder / f"{self.stem}.{ending}"


class TokenStream:
    """The tokens of one source and split: its shards, mapped into memory, end to end.

    Windows are `seq_len` + 1 tokens at a stride of `seq_len`: the last token of one is the first
    of the next, where it is a label and there an input. With `verify` each MiB is compared with its
    checksum when it is first read; offsets are when their shard is first opened.
    """

    def __init__(self, folder: Path, shards: Sequence[Shard], verify: bool = True) -> None:
        self._folder = folder
        self._shards = list(shards)
        self._verify = verify
        self._ends = np.cumsum([shard.n_tokens for shard in shards], dtype=np.int64).tolist()
        self._maps: dict[int, _Map] = {}
        self.n_tokens: int = self._ends[-1] if self._ends else 0

    def n_windows(self, seq_len: int) -> int:
        """How many whole windows there are; the tokens after the last one are not used."""
        return max(self.n_tokens - 1, 0) // seq_len

    def window(self, index: int, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
        """One window.

        Args:
            index: 0 … n_windows(seq_len)-1

        Returns:
            tokens: uint32 (seq_len + 1,), read-only
            starts: int64 (documents,), the places of the window where a document begins

        Raises:
            DataError: a file is gone, or not what was prepared.
        """
        if not 0 <= index < self.n_windows(seq_len):
            raise IndexError(f"window {index} of {self.n_windows(seq_len)}")
        begin = index * seq_len
        number = bisect_right(self._ends, begin)
        first = begin - (self._ends[number] - self._shards[number].n_tokens)
        if first + seq_len + 1 <= self._shards[number].n_tokens:
            return self.read(number, first, first + seq_len + 1)
        return self._across_shards(number, first, seq_len + 1)

    def read(self, number: int, begin: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """The tokens begin … end-1 of shard `number`, and where among them a document begins."""
        shard = self._maps.get(number) or self._map(number)
        if self._verify:
            self._compare(shard, begin, end)
        low, high = np.searchsorted(shard.starts, (begin, end))
        return shard.tokens[begin:end], shard.starts[low:high] - begin

    def starts(self, number: int) -> np.ndarray:
        """Where each document of a shard begins, int64 (documents,)."""
        return (self._maps.get(number) or self._map(number)).starts

    def _across_shards(
        self, number: int, begin: int, n_tokens: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """A window that begins in shard `number` and ends in a later one."""
        parts, starts, done = [], [], 0
        while done < n_tokens:
            end = min(begin + n_tokens - done, self._shards[number].n_tokens)
            part, part_starts = self.read(number, begin, end)
            parts.append(part)
            starts.append(part_starts + done)
            done += end - begin
            number, begin = number + 1, 0
        return np.concatenate(parts), np.concatenate(starts)

    def _map(self, number: int) -> "_Map":
        """The two files of a shard, mapped and kept."""
        shard = self._shards[number]
        tokens = map_file(self._folder, shard.tokens, TOKEN, verify=False)
        offsets = map_file(self._folder, shard.offsets, OFFSET, self._verify)
        checked = bytearray(len(shard.tokens.crc32) // 8)
        self._maps[number] = _Map(shard.tokens, tokens, offsets[:-1], checked)
        return self._maps[number]

    def _compare(self, shard: "_Map", begin: int, end: int) -> None:
        """Compares the blocks of some tokens with their checksums, once each."""
        first, last = begin // TOKENS_A_BLOCK, (end - 1) // TOKENS_A_BLOCK
        for block in range(first, last + 1):
            if not shard.checked[block]:  # two threads at once compare it twice
                _compare_block(self._folder, shard.entry, shard.tokens, block)
                shard.checked[block] = 1


class _Map(NamedTuple):
    """An open shard: tokens (n_tokens,), document starts (n_documents,), blocks compared."""

    entry: FileEntry
    tokens: np.ndarray
    starts: np.ndarray
    checked: bytearray  # a 1 for each


def map_file(
    folder: Path, entry: FileEntry, dtype: np.dtype, verify: bool, remedy: str = MEND
) -> np.ndarray:
    """A file's content as an array that reads from the file, with `verify` all of it compared.

    Raises:
        DataError: it is gone, of another size, or not what was written; `remedy` ends the message.
    """
    path = folder / entry.file
    try:
        mapped = np.memmap(path, dtype=np.uint8, mode="r")
    except (OSError, ValueError) as error:  # ValueError: the file is empty
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{path} cannot be read ({reason}): {remedy}") from None
    if mapped.nbytes != entry.n_bytes:
        raise DataError(
            f"{path} has {mapped.nbytes:,} bytes, its manifest says {entry.n_bytes:,}: {remedy}"
        )
    # A plain view: slicing a np.memmap runs Python code on every slice.
    content = mapped.view(np.ndarray).view(dtype)
    for block in range(len(entry.crc32) // 8 if verify else 0):
        _compare_block(folder, entry, content, block, remedy)
    return content


def _compare_block(
    folder: Path, entry: FileEntry, content: np.ndarray, block: int, remedy: str = MEND
) -> None:
    """Raises DataError where a MiB of a file is not what was written."""
    size = CRC_BLOCK // content.itemsize
    found = isal_zlib.crc32(content[block * size : (block + 1) * size])
    if found != int(entry.crc32[8 * block : 8 * block + 8], 16):
        raise DataError(
            f"{folder / entry.file} is damaged: MiB {block} of it (counted from 0) has another "
            f"checksum than the manifest tells: {remedy}"
        )
