"""Token shards on disk: written atomically, described by a manifest, read through memory maps.

<folder>/tokenizer.model
<folder>/<source>/<split>-00000.tokens    uint32, little-endian
<folder>/<source>/<split>-00000.offsets   int64, little-endian: where each document that begins
                                          in this shard begins, then the number of its tokens
<folder>/manifest.json                    last: a folder without it is not prepared
"""

import hashlib
import json
import os
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from data.errors import DataError

FORMAT = "llamesh-shards"
FORMAT_VERSION = 1
MANIFEST_FILE = "manifest.json"
SPLITS = ("train", "validation")
TOKEN = np.dtype("<u4")
OFFSET = np.dtype("<i8")
ANEW = "delete the folder and prepare it again, or name another data.folder"


@dataclass(frozen=True)
class FileEntry:
    """One file of a shard: its path from the dataset's folder, size and hash."""

    file: str
    n_bytes: int
    sha256: str


@dataclass(frozen=True)
class Shard:
    """One shard: its two files and what they hold; `largest_id` is -1 without tokens."""

    tokens: FileEntry
    offsets: FileEntry
    n_tokens: int
    n_documents: int
    largest_id: int


@dataclass(frozen=True)
class TokenizerEntry:
    """The tokenizer that the ids belong to."""

    name: str
    hash: str
    vocab_size: int
    bos_id: int
    eos_id: int


@dataclass(frozen=True)
class Manifest:
    """What a prepared folder holds.

    `shards` goes by source, then split; `configuration` is what the folder was made from;
    `empty_documents` counts those that were skipped, by source.
    """

    tokenizer: TokenizerEntry
    configuration: dict[str, Any]
    shards: dict[str, dict[str, list[Shard]]]
    empty_documents: dict[str, int] = field(default_factory=dict)
    format: str = FORMAT
    version: int = FORMAT_VERSION

    @property
    def hash(self) -> str:
        """SHA-256 over tokenizer and shards: two folders with the same one hold the same data."""
        values = asdict(self)
        held = json.dumps({key: values[key] for key in ("tokenizer", "shards")}, sort_keys=True)
        return hashlib.sha256(held.encode()).hexdigest()

    def n_tokens(self, split: str, source: str | None = None) -> int:
        """Tokens of a split, of one source or of all."""
        return sum(shard.n_tokens for shard in self._shards(split, source))

    def n_documents(self, split: str, source: str | None = None) -> int:
        """Documents of a split, of one source or of all."""
        return sum(shard.n_documents for shard in self._shards(split, source))

    def write(self, folder: Path) -> None:
        """Writes `manifest.json`, which makes the folder a prepared one."""
        text = json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n"
        write_atomically(folder / MANIFEST_FILE, text.encode())

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """The manifest of a folder, verified against the files that it lists.

        Raises:
            DataError: no manifest, an unknown version, a file gone or of another size, ids beyond
                the tokenizer's vocabulary.
        """
        path = folder / MANIFEST_FILE
        try:
            values = json.loads(path.read_bytes())
        except FileNotFoundError:
            raise DataError(
                f"data.folder ({folder}) holds no prepared data ({MANIFEST_FILE} is missing): "
                "run prepare.py"
            ) from None
        except (OSError, ValueError) as error:
            raise DataError(f"{path} cannot be read ({error}): {ANEW}") from None
        if not isinstance(values, dict) or values.get("format") != FORMAT:
            raise DataError(f"{path} is not the manifest of token shards: name another data.folder")
        if values.get("version") != FORMAT_VERSION:
            raise DataError(
                f"{path} has version {values.get('version')}, this program reads "
                f"{FORMAT_VERSION}: {ANEW}"
            )
        try:
            manifest = _from_json(values)
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{path} is damaged (at {error}): {ANEW}") from None
        manifest._verify(folder)
        return manifest

    def _shards(self, split: str, source: str | None) -> list[Shard]:
        names = self.shards if source is None else [source]
        return [shard for name in names for shard in self.shards[name][split]]

    def _verify(self, folder: Path) -> None:
        """Sizes and ids as listed; the content itself is left to the hashes."""
        for split in SPLITS:
            for shard in self._shards(split, None):
                for entry in (shard.tokens, shard.offsets):
                    path = folder / entry.file
                    try:
                        n_bytes = path.stat().st_size
                    except OSError:
                        raise DataError(f"{path} is missing: {ANEW}") from None
                    if n_bytes != entry.n_bytes:
                        raise DataError(
                            f"{path} has {n_bytes:,} bytes, its manifest says "
                            f"{entry.n_bytes:,}: {ANEW}"
                        )
                if shard.largest_id >= self.tokenizer.vocab_size:
                    raise DataError(
                        f"{folder / shard.tokens.file} holds the id {shard.largest_id}, beyond "
                        f"the tokenizer's {self.tokenizer.vocab_size}: {ANEW}"
                    )


def _from_json(values: dict[str, Any]) -> Manifest:
    """A manifest from what `Manifest.write` wrote."""

    def shard(entry: dict[str, Any]) -> Shard:
        files = {kind: FileEntry(**entry[kind]) for kind in ("tokens", "offsets")}
        return Shard(**{**entry, **files})

    shards = {
        source: {split: [shard(entry) for entry in splits[split]] for split in SPLITS}
        for source, splits in values["shards"].items()
    }
    return Manifest(
        **{**values, "shards": shards, "tokenizer": TokenizerEntry(**values["tokenizer"])}
    )


class ShardWriter:
    """Writes the documents of one source and split; a document lies in one shard, whole.

    A shard is closed when the next document would take it over `shard_tokens`. Its files appear
    under their names only when they are complete and on the disk.
    """

    def __init__(self, folder: Path, source: str, split: str, shard_tokens: int) -> None:
        self.folder, self.source, self.split = folder, source, split
        self.shard_tokens = shard_tokens
        self.shards: list[Shard] = []
        self._file: BinaryIO | None = None
        self._starts = [0]  # of the open shard: where each document begins, then its tokens
        self._largest_id = -1
        self._hash = hashlib.sha256()
        (folder / source).mkdir(parents=True, exist_ok=True)

    def add(self, tokens: np.ndarray) -> None:
        """Appends one document, uint32 (tokens,)."""
        if self._file is not None and self._starts[-1] + len(tokens) > self.shard_tokens:
            self._finish_shard()
        if self._file is None:
            self._starts = [0]
            self._largest_id = -1
            self._hash = hashlib.sha256()
            path = self._path("tokens", temporary=True)
            self._file = path.open("wb")
        content = tokens.astype(TOKEN).tobytes()
        self._file.write(content)
        self._hash.update(content)
        self._starts.append(self._starts[-1] + len(tokens))
        self._largest_id = max(self._largest_id, int(tokens.max(initial=0)))

    def close(self) -> list[Shard]:
        """Finishes the last shard and returns all of them."""
        if self._file is not None:
            self._finish_shard()
        return self.shards

    def abandon(self) -> None:
        """Closes the file that is open; its temporary name tells that it is not whole."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _path(self, kind: str, temporary: bool = False) -> Path:
        name = f"{self.split}-{len(self.shards):05d}.{kind}" + (".tmp" if temporary else "")
        return self.folder / self.source / name

    def _finish_shard(self) -> None:
        assert self._file is not None
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._file = None
        offsets = np.array(self._starts, dtype=OFFSET).tobytes()
        write_atomically(self._path("offsets"), offsets)
        os.replace(self._path("tokens", temporary=True), self._path("tokens"))
        sync_folder(self.folder / self.source)
        n_tokens = self._starts[-1]
        shard = Shard(
            tokens=self._entry("tokens", n_tokens * TOKEN.itemsize, self._hash.hexdigest()),
            offsets=self._entry("offsets", len(offsets), hashlib.sha256(offsets).hexdigest()),
            n_tokens=n_tokens,
            n_documents=len(self._starts) - 1,
            largest_id=self._largest_id,
        )
        self.shards.append(shard)

    def _entry(self, kind: str, n_bytes: int, sha256: str) -> FileEntry:
        return FileEntry(f"{self.source}/{self._path(kind).name}", n_bytes, sha256)


class TokenStream:
    """The tokens of one source and split: its shards, mapped into memory, end to end.

    Windows are `seq_len` + 1 tokens at a stride of `seq_len`: the last token of one is the first
    of the next, where it is a label and there an input.
    """

    def __init__(self, folder: Path, shards: Sequence[Shard]) -> None:
        self._folder = folder
        self._shards = list(shards)
        self._ends = np.cumsum([shard.n_tokens for shard in shards], dtype=np.int64).tolist()
        self._maps: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self.n_tokens: int = self._ends[-1] if self._ends else 0

    def n_windows(self, seq_len: int) -> int:
        """How many whole windows there are; the tokens after the last one are not used."""
        return max(self.n_tokens - 1, 0) // seq_len

    def window(self, index: int, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
        """One window.

        Args:
            index: 0 … n_windows(seq_len)-1

        Returns:
            tokens: uint32 (seq_len + 1,)
            starts: int64 (documents,), the places of the window where a document begins
        """
        if not 0 <= index < self.n_windows(seq_len):
            raise IndexError(f"window {index} of {self.n_windows(seq_len)}")
        begin = index * seq_len
        end = begin + seq_len + 1
        tokens, starts = [], []
        number = bisect_right(self._ends, begin)
        while begin < end:
            shard_tokens, shard_starts = self._map(number)
            shard_begin = self._ends[number] - self._shards[number].n_tokens
            part = slice(begin - shard_begin, min(end, self._ends[number]) - shard_begin)
            tokens.append(shard_tokens[part])
            first, last = np.searchsorted(shard_starts, [part.start, part.stop])
            starts.append(shard_starts[first:last] + (shard_begin - index * seq_len))
            begin = shard_begin + part.stop
            number += 1
        return np.concatenate(tokens), np.concatenate(starts)

    def _map(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens (n_tokens,) and document starts (n_documents,) of a shard, mapped at first use."""
        if number not in self._maps:
            shard = self._shards[number]
            tokens = np.memmap(self._folder / shard.tokens.file, dtype=TOKEN, mode="r")
            offsets = np.memmap(self._folder / shard.offsets.file, dtype=OFFSET, mode="r")
            # Plain views: slicing a np.memmap runs Python code on every slice.
            self._maps[number] = tokens.view(np.ndarray), offsets.view(np.ndarray)[:-1]
        return self._maps[number]


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
