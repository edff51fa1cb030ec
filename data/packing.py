"""Packed training windows: complete documents instead of cuts at fixed positions.

`pack` runs best-fit packing (`data.best_fit`) once per window length and writes an index next to
the shards; `PackedStream` reads windows through it. Each shard is packed independently, so memory
is bounded by the documents of one shard.

<folder>/<source>/pack-<seq_len>/train-PPPPP-KKK.pieces   int64, little-endian: for each bin the
                                  index of its first segment, then the number of segments; the
                                  start of each segment in the shard; its length in tokens
<folder>/<source>/pack-<seq_len>/index.json               written last: without it, the index is
                                                          incomplete
"""

from bisect import bisect_right
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
from annotated_types import MinLen
from filelock import FileLock

from data.best_fit import Bins, pack_documents
from data.errors import DataError
from data.files import Checksums, FileEntry, wait_for_writer, write_atomically, write_error
from data.manifest import OFFSET, TOKEN, Manifest, read_record, write_record
from data.mappings import Mappings
from data.progress import ProgressReporter
from data.shards import TokenStream, check_not_truncated, map_file

FORMAT = "llamesh-packing"
FORMAT_VERSION = 1
INDEX_FILE = "index.json"


@dataclass(frozen=True)
class PackedShard:
    """The bins of one shard; field names as in `index.json`.

    Attributes:
        pieces: The file with the segments of all bins.
        n_pieces: Number of segments.
        n_padding: Number of padding tokens.
        n_cut: Number of documents split into several segments.
    """

    pieces: FileEntry
    n_bins: int
    n_pieces: int
    n_padding: int
    n_cut: int


@dataclass(frozen=True)
class PackIndex:
    """The index of one source's training windows of one length.

    Attributes:
        shards_hash: Hash of the manifest whose shards were packed.
        shards: In the order of the manifest.
    """

    seq_len: int
    shards_hash: str
    shards: Annotated[list[PackedShard], MinLen(1)]
    format: str = FORMAT
    version: int = FORMAT_VERSION

    def write(self, folder: Path, source: str) -> None:
        """Write `index.json`, which marks the index as complete."""
        write_record(self, index_folder(folder, source, self.seq_len) / INDEX_FILE)

    @classmethod
    def read(cls, folder: Path, source: str, seq_len: int, shards_hash: str) -> "PackIndex":
        """Read an index and check the sizes of its files.

        Raises:
            DataError: The index is missing, damaged, of another version or for other shards.
        """
        path = index_folder(folder, source, seq_len) / INDEX_FILE
        remedy = repack(path, seq_len)
        try:
            index = read_record(cls, path, (FORMAT, FORMAT_VERSION), remedy)
        except FileNotFoundError:
            raise DataError(
                f"data.packing=best_fit: data.sources.{source} is not packed for seq_len={seq_len} "
                f"({path} is missing); run `python prepare.py … pack={seq_len}` with the same data "
                "and tokenizer"
            ) from None
        if mismatch := index._mismatch(folder, seq_len, shards_hash):
            raise DataError(f"{path} {mismatch}; {remedy}")
        return index

    def _mismatch(self, folder: Path, seq_len: int, shards_hash: str) -> str | None:
        """Return why this index cannot be used, or None."""
        if self.shards_hash != shards_hash:
            return f"belongs to other shards ({self.shards_hash[:12]}, not {shards_hash[:12]})"
        if self.seq_len != seq_len:
            return f"has seq_len={self.seq_len}"
        for shard in self.shards:
            n_numbers = shard.n_bins + 1 + 2 * shard.n_pieces
            if error := shard.pieces.size_error(folder):
                return f"does not match the files: {error}"
            if shard.pieces.n_bytes != n_numbers * OFFSET.itemsize:
                return f"records {n_numbers} numbers in {shard.pieces.n_bytes:,} bytes"
        return None


def index_folder(folder: Path, source: str, seq_len: int) -> Path:
    """Return the folder of a source's index for one window length."""
    return folder / source / f"pack-{seq_len}"


def packed_lengths(folder: Path, source: str) -> list[int]:
    """Return the window lengths for which a source has a complete index."""
    found = (folder / source).glob(f"pack-*/{INDEX_FILE}")
    lengths = (path.parent.name.removeprefix("pack-") for path in found)
    return sorted(int(length) for length in lengths if length.isdecimal())


def repack(path: Path, seq_len: int) -> str:
    """Return the remedy for an unusable index file."""
    return f"delete {path.parent}, then run `python prepare.py … pack={seq_len}`"


def pack(folder: Path | str, seq_len: int, progress: bool = True) -> None:
    """Pack the training documents of a prepared folder into windows of `seq_len` + 1 tokens.

    Usable indexes are kept; missing, visibly damaged or outdated ones are written. Waits while
    another process packs the same length.

    Args:
        progress: Report on standard error.

    Raises:
        DataError: The folder is not prepared, damaged or not writable.
    """
    folder = Path(folder)
    manifest = Manifest.read(folder)
    lock_file = _lock_file(folder, seq_len)
    if is_packed(folder, manifest, seq_len):
        with suppress(OSError):  # left by a process killed after its last index, or absent
            lock_file.unlink()
        return
    reporter = ProgressReporter(progress)
    try:
        with FileLock(lock_file, fallback_to_soft=False):
            for source in _unpacked_sources(folder, manifest, seq_len):
                _pack_source(folder, manifest, source, seq_len, reporter)
            lock_file.unlink(missing_ok=True)  # only after success: a waiter has nothing to do
    except OSError as error:
        # Three numbers for each window and each segment.
        n_segments = manifest.n_documents("train") + 2 * manifest.n_tokens("train") // seq_len
        raise DataError(
            f"{write_error(folder, error, 3 * OFFSET.itemsize * n_segments)}, and run again, or "
            f"use data.packing=null; documents are not packed for seq_len={seq_len}"
        ) from error


def is_packed(folder: Path, manifest: Manifest, seq_len: int) -> bool:
    """Return whether every source has a usable index for windows of `seq_len`."""
    return not any(_unpacked_sources(folder, manifest, seq_len))


def wait_until_packed(folder: Path | str, seq_len: int) -> None:
    """Wait, without time limit, until another process has packed the folder.

    Raises:
        DataError: The folder is damaged, or no process works on it.
    """
    folder = Path(folder)
    manifest = Manifest.read(folder)
    wait_for_writer(
        lambda: is_packed(folder, manifest, seq_len),
        _lock_file(folder, seq_len),
        f"data.folder={folder} is not packed for seq_len={seq_len}",
        f"`python prepare.py … pack={seq_len}`",
    )


class PackedStream:
    """The packed training windows of one source, for the lengths that `pack` has processed.

    A window contains segments end to end, each treated as a document. The rest is padding with the
    end-of-text token; each padding token is its own document, so none is a target.
    """

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        source: str,
        verify: bool = True,
        mappings: Mappings | None = None,
    ) -> None:
        self._folder, self._source, self._verify = folder, source, verify
        self._shards_hash = manifest.hash
        self._padding_id = manifest.tokenizer.eos_id
        self._mappings = mappings or Mappings()
        self._tokens = TokenStream(folder, manifest.shards("train", source), verify, self._mappings)
        self._indexes: dict[int, _OpenIndex] = {}
        self.n_tokens = self._tokens.n_tokens

    def n_windows(self, seq_len: int) -> int:
        """Return the number of windows.

        Raises:
            DataError: The source is not packed for this length, or the index is damaged.
        """
        return self._index(seq_len).ends[-1]

    def window(self, index: int, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
        """Read one window.

        Args:
            index: 0 <= index < n_windows(seq_len)

        Returns:
            tokens: (seq_len + 1,) uint32
            starts: (n_segments + n_padding,) int64, indices in the window at which a segment or
                padding token starts

        Raises:
            DataError: A file is missing or damaged.
        """
        packed = self._index(seq_len)
        if not 0 <= index < packed.ends[-1]:
            raise IndexError(f"window {index} is out of range ({packed.ends[-1]} windows)")
        shard_index = bisect_right(packed.ends, index)
        bins = self._mappings.get(
            (id(self), seq_len, shard_index), partial(self._open_bins, packed, shard_index, seq_len)
        )
        pieces = self._folder / packed.shards[shard_index].pieces.file
        check_not_truncated(bins.offsets, pieces, repack(pieces, seq_len))
        bin_index = index - (packed.ends[shard_index] - len(bins.offsets) + 1)
        segments = slice(bins.offsets[bin_index], bins.offsets[bin_index + 1])
        tokens = np.full(seq_len + 1, self._padding_id, dtype=TOKEN)
        starts, end = [], 0
        spans = zip(bins.starts[segments].tolist(), bins.lengths[segments].tolist(), strict=True)
        for start, length in spans:
            starts.append(end)
            tokens[end : end + length] = self._tokens.read(shard_index, start, start + length)[0]
            end += length
        return tokens, np.array([*starts, *range(end, seq_len + 1)], dtype=np.int64)

    def _index(self, seq_len: int) -> "_OpenIndex":
        if seq_len not in self._indexes:
            index = PackIndex.read(self._folder, self._source, seq_len, self._shards_hash)
            ends = np.cumsum([shard.n_bins for shard in index.shards]).tolist()
            self._indexes[seq_len] = _OpenIndex(index.shards, ends, set())
        return self._indexes[seq_len]

    def _open_bins(self, packed: "_OpenIndex", shard_index: int, seq_len: int) -> Bins:
        shard = packed.shards[shard_index]
        remedy = repack(self._folder / shard.pieces.file, seq_len)
        verify = self._verify and shard_index not in packed.verified
        content = map_file(self._folder, shard.pieces, OFFSET, verify, remedy)
        packed.verified.add(shard_index)
        n_offsets = shard.n_bins + 1
        offsets, starts, lengths = np.split(content, [n_offsets, n_offsets + shard.n_pieces])
        return Bins(offsets, starts, lengths, shard.n_cut)


class _OpenIndex(NamedTuple):
    shards: list[PackedShard]
    ends: list[int]  # cumulative number of bins
    verified: set[int]  # shards whose bins were compared with their checksums


def _pack_source(
    folder: Path, manifest: Manifest, source: str, seq_len: int, reporter: ProgressReporter
) -> None:
    """Write the index of one source."""
    target = index_folder(folder, source, seq_len)
    (target / INDEX_FILE).unlink(missing_ok=True)
    target.mkdir(exist_ok=True)
    shards = manifest.shards("train", source)
    stream = TokenStream(folder, shards)
    packed: list[PackedShard] = []
    with reporter.bar(f"packing {source}") as update:
        for shard_index, shard in enumerate(shards):
            update(shard_index, len(shards))
            bins = pack_documents(stream.starts(shard_index), shard.n_tokens, seq_len + 1)
            path = target / f"{Path(shard.tokens.file).stem}.pieces"
            content = np.concatenate(bins[:3]).astype(OFFSET).tobytes()
            write_atomically(path, content)
            n_bins = len(bins.offsets) - 1
            n_padding = n_bins * (seq_len + 1) - int(bins.lengths.sum())
            entry = Checksums(content).entry(path.relative_to(folder).as_posix())
            packed.append(PackedShard(entry, n_bins, len(bins.starts), n_padding, bins.n_split))
    PackIndex(seq_len, manifest.hash, packed).write(folder, source)
    n_bins, n_padding, n_split = (
        sum(getattr(shard, field) for shard in packed) for field in ("n_bins", "n_padding", "n_cut")
    )
    reporter.log(
        f"Packed {source} for seq_len={seq_len}: {n_bins:,} windows, "
        f"{n_padding / (n_bins * (seq_len + 1)):.2%} padding; split {n_split:,} of "
        f"{manifest.n_documents('train', source):,} documents"
    )


def _unpacked_sources(folder: Path, manifest: Manifest, seq_len: int) -> Iterator[str]:
    """Yield the sources without a usable index."""
    for source in manifest.sources:
        try:
            PackIndex.read(folder, source, seq_len, manifest.hash)
        except DataError:
            yield source


def _lock_file(folder: Path, seq_len: int) -> Path:
    return folder / f"pack-{seq_len}.lock"
