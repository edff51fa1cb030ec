"""What a prepared folder holds, as its `manifest.json` tells: format version 2, docs/shards.md.

<folder>/tokenizer.model
<folder>/<source>/<split>-PPPPP-KKK.tokens    uint32, little-endian
<folder>/<source>/<split>-PPPPP-KKK.offsets   int64, little-endian: where each document that begins
                                              in this shard begins, then the number of its tokens
<folder>/manifest.json                        last: a folder without it is not prepared
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data.errors import DataError
from data.files import Checksums, write_atomically

FORMAT = "llamesh-shards"
FORMAT_VERSION = 2
MANIFEST_FILE = "manifest.json"
SPLITS = ("train", "validation")
TOKEN = np.dtype("<u4")
OFFSET = np.dtype("<i8")
ANEW = "delete the folder and prepare it again, or name another data.folder"


@dataclass(frozen=True)
class FileEntry:
    """One file of a shard: its path from the dataset's folder, size, hash and checksums.

    `crc32` has 8 hexadecimal digits for each MiB of the file, in order.
    """

    file: str
    n_bytes: int
    sha256: str
    crc32: str

    @classmethod
    def of(cls, file: str, sums: Checksums) -> "FileEntry":
        """The entry of content that went through `sums`."""
        return cls(file, sums.n_bytes, sums.sha256, sums.crc32)


@dataclass(frozen=True)
class Shard:
    """One shard: its two files and what they hold."""

    tokens: FileEntry
    offsets: FileEntry
    n_tokens: int
    n_documents: int
    largest_id: int

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Shard":
        """A shard from its fields as JSON has them."""
        files = {kind: FileEntry(**values[kind]) for kind in ("tokens", "offsets")}
        return cls(**{**values, **files})


@dataclass(frozen=True)
class SourceEntry:
    """One source: what was read, what became of its documents, and its shards by split.

    `revision` is a hub dataset's commit or its builder's hash, of local files a SHA-256 over their
    names and sizes. `documents` counts those `read`, and of these the `empty`, `filtered`,
    `skipped` and `replaced` ones.
    """

    revision: str
    documents: dict[str, int]
    shards: dict[str, list[Shard]]


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
    """What a prepared folder holds; `configuration` is what it was made from."""

    tokenizer: TokenizerEntry
    configuration: dict[str, Any]
    sources: dict[str, SourceEntry]
    format: str = FORMAT
    version: int = FORMAT_VERSION

    @property
    def hash(self) -> str:
        """SHA-256 over tokenizer and shards: two folders with the same one hold the same data."""
        held = {
            "tokenizer": asdict(self.tokenizer),
            "shards": {
                name: {split: [asdict(shard) for shard in source.shards[split]] for split in SPLITS}
                for name, source in self.sources.items()
            },
        }
        return hashlib.sha256(json.dumps(held, sort_keys=True).encode()).hexdigest()

    def n_tokens(self, split: str, source: str | None = None) -> int:
        """Tokens of a split, of one source or of all."""
        return sum(shard.n_tokens for shard in self.shards(split, source))

    def n_documents(self, split: str, source: str | None = None) -> int:
        """Documents of a split, of one source or of all."""
        return sum(shard.n_documents for shard in self.shards(split, source))

    def shards(self, split: str, source: str | None = None) -> list[Shard]:
        """The shards of a split, of one source or of all."""
        names = self.sources if source is None else [source]
        return [shard for name in names for shard in self.sources[name].shards[split]]

    def write(self, folder: Path) -> None:
        """Writes `manifest.json`, which makes the folder a prepared one."""
        text = json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n"
        write_atomically(folder / MANIFEST_FILE, text.encode())

    @classmethod
    def read(cls, folder: Path, compare: bool = True) -> "Manifest":
        """The manifest of a folder, with `compare` compared with the files that it lists.

        Raises:
            DataError: no manifest, an unknown version; a file gone or of another size, ids beyond
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
            manifest = cls._from_json(values)
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{path} is damaged (at {error}): {ANEW}") from None
        found = manifest.problems(folder) if compare else []
        if found:
            raise DataError("\n".join(f"{problem}: {ANEW}" for problem in found))
        return manifest

    def problems(self, folder: Path) -> list[str]:
        """Each file whose size, and each shard whose ids, are not as they must be."""
        found = []
        for shard in (shard for split in SPLITS for shard in self.shards(split)):
            for entry in (shard.tokens, shard.offsets):
                path = folder / entry.file
                try:
                    n_bytes = path.stat().st_size
                except OSError:
                    found.append(f"{path} is missing")
                    continue
                if n_bytes != entry.n_bytes:
                    found.append(
                        f"{path} has {n_bytes:,} bytes, its manifest says {entry.n_bytes:,}"
                    )
            if shard.largest_id >= self.tokenizer.vocab_size:
                found.append(
                    f"{folder / shard.tokens.file} holds the id {shard.largest_id}, beyond the "
                    f"tokenizer's {self.tokenizer.vocab_size}"
                )
        return found

    @classmethod
    def _from_json(cls, values: dict[str, Any]) -> "Manifest":
        """A manifest from what `write` wrote."""
        sources = {
            name: SourceEntry(
                entry["revision"],
                entry["documents"],
                {
                    split: [Shard.from_json(shard) for shard in entry["shards"][split]]
                    for split in SPLITS
                },
            )
            for name, entry in values["sources"].items()
        }
        tokenizer = TokenizerEntry(**values["tokenizer"])
        return cls(**{**values, "sources": sources, "tokenizer": tokenizer})
