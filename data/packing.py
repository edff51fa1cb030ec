"""Windows of whole documents: written once beside the shards as an index, then read like others.

Which documents share a bin is `data.best_fit`'s, what lies on the disk `data.pack_index`'s. Each
shard is packed by itself, so memory is bounded by one shard's documents.
"""

import fcntl
import time
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.console import Console
from rich.progress import track

from data.best_fit import Bins, pack_documents
from data.errors import DataError
from data.files import Checksums, write_atomically
from data.manifest import OFFSET, TOKEN, FileEntry, Manifest
from data.pack_index import INDEX_FILE, PackedShard, PackIndex, anew, index_folder
from data.progress import PreparationProgress
from data.shards import TokenStream, map_file


def pack(folder: Path | str, seq_len: int, progress: bool = True) -> None:
    """Packs the training documents of a prepared folder into windows of `seq_len` and a label.

    What is packed already is left as it is; an index that is damaged to see, or of other shards,
    is written anew. Waits while another process packs the same.

    Args:
        progress: tell on standard error what comes of it, and on a terminal how far it is

    Raises:
        DataError: the folder is not prepared, damaged or not writable.
    """
    folder = Path(folder)
    manifest = Manifest.read(folder)
    if is_packed(folder, manifest, seq_len):
        with suppress(OSError):  # of a process that was killed just before; or there is none
            _lock_file(folder, seq_len).unlink()
        return
    show = PreparationProgress(progress)
    try:
        with _claimed(folder, seq_len):
            for source in manifest.sources:
                if not _is_whole(folder, source, seq_len, manifest.hash):
                    _pack_source(folder, manifest, source, seq_len, show)
    except OSError as error:
        raise DataError(
            f"data.folder ({folder}) cannot be written ({error.strerror or error}), and "
            f"documents are not packed for a length of {seq_len}: make room or make it "
            "writable, then start again, or use data.packing=null"
        ) from error


def is_packed(folder: Path, manifest: Manifest, seq_len: int) -> bool:
    """Whether every source has a whole index for windows of `seq_len`."""
    return all(_is_whole(folder, source, seq_len, manifest.hash) for source in manifest.sources)


def wait_until_packed(
    folder: Path | str, seq_len: int, poll_seconds: float = 0.5, idle_seconds: float = 60
) -> None:
    """Waits for another process's `pack` to end, however long that takes.

    Raises:
        DataError: the folder is damaged, or for `idle_seconds` no process was packing it.
    """
    folder = Path(folder)
    manifest = Manifest.read(folder)
    last_seen = time.monotonic()
    while not is_packed(folder, manifest, seq_len):
        if _is_claimed(folder, seq_len):
            last_seen = time.monotonic()
        elif time.monotonic() - last_seen > idle_seconds:
            raise DataError(
                f"data.folder ({folder}) is not packed for a length of {seq_len}, and for "
                f"{idle_seconds:.0f} s no process has been at it: see what the first process "
                f"says, or run `python prepare.py … pack={seq_len}` first"
            )
        time.sleep(poll_seconds)


class PackedStream:
    """The training windows of one source, of whole documents; lengths as they are packed.

    A window holds pieces end to end, each a document of its own; what they leave is padding with
    the tokenizer's end of sequence, where each token is a document, so that none is a target.
    """

    def __init__(self, folder: Path, manifest: Manifest, source: str, verify: bool = True) -> None:
        self._folder, self._source, self._verify = folder, source, verify
        self._shards_hash = manifest.hash
        self._padding = manifest.tokenizer.eos_id
        self._tokens = TokenStream(folder, manifest.shards("train", source), verify)
        self._indexes: dict[int, _OpenIndex] = {}
        self.n_tokens = self._tokens.n_tokens

    def n_windows(self, seq_len: int) -> int:
        """How many windows there are.

        Raises:
            DataError: the source is not packed for this length, or the index is damaged.
        """
        return self._index(seq_len).ends[-1]

    def window(self, index: int, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
        """One window.

        Args:
            index: 0 … n_windows(seq_len)-1

        Returns:
            tokens: uint32 (seq_len + 1,)
            starts: int64 (pieces + padding,), the places of the window where one of them begins

        Raises:
            DataError: a file is gone, or not what was written.
        """
        packed = self._index(seq_len)
        if not 0 <= index < packed.ends[-1]:
            raise IndexError(f"window {index} of {packed.ends[-1]}")
        number = bisect_right(packed.ends, index)
        bins = packed.bins.get(number) or self._bins(packed, number, seq_len)
        place = index - (packed.ends[number] - len(bins.offsets) + 1)
        pieces = slice(bins.offsets[place], bins.offsets[place + 1])
        tokens = np.full(seq_len + 1, self._padding, dtype=TOKEN)
        starts, end = [], 0
        spans = zip(bins.begins[pieces].tolist(), bins.lengths[pieces].tolist(), strict=True)
        for begin, length in spans:
            starts.append(end)
            tokens[end : end + length] = self._tokens.read(number, begin, begin + length)[0]
            end += length
        return tokens, np.array([*starts, *range(end, seq_len + 1)], dtype=np.int64)

    def _index(self, seq_len: int) -> "_OpenIndex":
        """The index for a length, opened at first use."""
        if seq_len not in self._indexes:
            index = PackIndex.read(self._folder, self._source, seq_len, self._shards_hash)
            ends = np.cumsum([shard.n_bins for shard in index.shards]).tolist()
            self._indexes[seq_len] = _OpenIndex(index.shards, ends, {})
        return self._indexes[seq_len]

    def _bins(self, packed: "_OpenIndex", number: int, seq_len: int) -> Bins:
        """The bins of a shard, mapped and kept."""
        shard = packed.shards[number]
        remedy = anew(self._folder / shard.pieces.file, seq_len)
        content = map_file(self._folder, shard.pieces, OFFSET, self._verify, remedy)
        offsets, begins, lengths = np.split(
            content, [shard.n_bins + 1, shard.n_bins + 1 + shard.n_pieces]
        )
        packed.bins[number] = Bins(offsets, begins, lengths, shard.n_cut)
        return packed.bins[number]


class _OpenIndex(NamedTuple):
    """An index that is read from: `ends` counts the bins up to each shard's last."""

    shards: list[PackedShard]
    ends: list[int]
    bins: dict[int, Bins]


def _pack_source(
    folder: Path, manifest: Manifest, source: str, seq_len: int, show: PreparationProgress
) -> None:
    """Writes the index of one source."""
    there = index_folder(folder, source, seq_len)
    (there / INDEX_FILE).unlink(missing_ok=True)
    there.mkdir(exist_ok=True)
    shards = manifest.shards("train", source)
    stream = TokenStream(folder, shards)
    packed = []
    bar = show.shown and Console(stderr=True).is_terminal
    for number, shard in enumerate(
        track(
            shards,
            f"packing {source}",
            console=Console(stderr=True),
            transient=True,
            disable=not bar,
        )
    ):
        bins = pack_documents(stream.starts(number), shard.n_tokens, seq_len + 1)
        content = np.concatenate(bins[:3]).astype(OFFSET).tobytes()
        sums = Checksums()
        sums.update(content)
        path = there / f"{Path(shard.tokens.file).stem}.pieces"
        write_atomically(path, content)
        n_bins = len(bins.offsets) - 1
        packed.append(
            PackedShard(
                pieces=FileEntry.of(path.relative_to(folder).as_posix(), sums),
                n_bins=n_bins,
                n_pieces=len(bins.begins),
                n_padding=n_bins * (seq_len + 1) - int(bins.lengths.sum()),
                n_cut=bins.n_cut,
            )
        )
    PackIndex(seq_len, manifest.hash, packed).write(folder, source)
    n_bins, n_padding, n_cut = (
        sum(getattr(shard, each) for shard in packed) for each in ("n_bins", "n_padding", "n_cut")
    )
    show.say(
        f"{source} packed for a length of {seq_len}: {n_bins:,} windows, "
        f"{n_padding / (n_bins * (seq_len + 1)):.2%} padding; {n_cut:,} of "
        f"{manifest.n_documents('train', source):,} documents are longer and cut"
    )


def _is_whole(folder: Path, source: str, seq_len: int, shards_hash: str) -> bool:
    """Whether a source has an index that `PackIndex.read` takes."""
    try:
        PackIndex.read(folder, source, seq_len, shards_hash)
    except DataError:
        return False
    return True


def _lock_file(folder: Path, seq_len: int) -> Path:
    return folder / f"pack-{seq_len}.lock"


@contextmanager
def _claimed(folder: Path, seq_len: int) -> Iterator[None]:
    """Holds the packing of a length for this process; waits for another one's end.

    The lock's file goes only when all is packed: who waited for it then has nothing left to do.
    """
    path = _lock_file(folder, seq_len)
    with open(path, "a", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
        path.unlink(missing_ok=True)


def _is_claimed(folder: Path, seq_len: int) -> bool:
    """Whether a living process packs this length."""
    try:
        with open(_lock_file(folder, seq_len), encoding="utf-8") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # no file, no packing
        return False
    return False
