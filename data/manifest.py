"""The manifest of a prepared dataset folder: format version 2, specified in docs/shards.md.

<folder>/tokenizer.model
<folder>/<source>/<split>-PPPPP-KKK.tokens    uint32, little-endian token ids
<folder>/<source>/<split>-PPPPP-KKK.offsets   int64, little-endian: start of each document in the
                                              shard, then the number of tokens
<folder>/manifest.json                        written last: without it, the folder is not prepared
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
REPREPARE = "delete the folder and prepare it again, or choose another data.folder"


@dataclass(frozen=True)
class FileEntry:
    """One file of a dataset.

    Attributes:
        file: Path relative to the dataset folder.
        crc32: CRC-32 of each MiB of the file, 8 hexadecimal digits each.
    """

    file: str
    n_bytes: int
    sha256: str
    crc32: str

    @classmethod
    def from_checksums(cls, file: str, checksums: Checksums) -> "FileEntry":
        return cls(file, checksums.n_bytes, checksums.sha256, checksums.crc32)

    @property
    def n_blocks(self) -> int:
        """Number of checksummed MiB."""
        return len(self.crc32) // 8

    def block_crc32(self, block: int) -> int:
        """Return the CRC-32 of one MiB."""
        return int(self.crc32[8 * block : 8 * block + 8], 16)


@dataclass(frozen=True)
class Shard:
    """The two files of one shard and their contents."""

    tokens: FileEntry
    offsets: FileEntry
    n_tokens: int
    n_documents: int
    largest_id: int

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Shard":
        files = {kind: FileEntry(**values[kind]) for kind in ("tokens", "offsets")}
        return cls(**{**values, **files})


@dataclass(frozen=True)
class SourceEntry:
    """One source of a dataset.

    Attributes:
        revision: A hub dataset's commit or builder hash; for local files, the SHA-256 of their
            names and sizes.
        documents: Number of documents `read`, and how many were `empty`, `filtered`, `skipped` or
            `replaced`.
        shards: Shards per split, in stream order.
    """

    revision: str
    documents: dict[str, int]
    shards: dict[str, list[Shard]]


@dataclass(frozen=True)
class TokenizerEntry:
    """The tokenizer that produced the token ids."""

    name: str
    hash: str
    vocab_size: int
    bos_id: int
    eos_id: int


@dataclass(frozen=True)
class Manifest:
    """Contents of a prepared folder; `configuration` holds the keys that determined them."""

    tokenizer: TokenizerEntry
    configuration: dict[str, Any]
    sources: dict[str, SourceEntry]
    format: str = FORMAT
    version: int = FORMAT_VERSION

    @property
    def hash(self) -> str:
        """SHA-256 over tokenizer and shards; equal hashes mean identical data."""
        content = {
            "tokenizer": asdict(self.tokenizer),
            "shards": {
                name: {split: [asdict(shard) for shard in source.shards[split]] for split in SPLITS}
                for name, source in self.sources.items()
            },
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def n_tokens(self, split: str, source: str | None = None) -> int:
        """Return the number of tokens of a split, in one source or all."""
        return sum(shard.n_tokens for shard in self.shards(split, source))

    def n_documents(self, split: str, source: str | None = None) -> int:
        """Return the number of documents of a split, in one source or all."""
        return sum(shard.n_documents for shard in self.shards(split, source))

    def shards(self, split: str, source: str | None = None) -> list[Shard]:
        """Return the shards of a split, in one source or all."""
        names = self.sources if source is None else [source]
        return [shard for name in names for shard in self.sources[name].shards[split]]

    def write(self, folder: Path) -> None:
        """Write `manifest.json`, which marks the folder as prepared."""
        text = json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n"
        write_atomically(folder / MANIFEST_FILE, text.encode())

    @classmethod
    def read(cls, folder: Path, check_files: bool = True) -> "Manifest":
        """Read the manifest of a folder.

        Args:
            check_files: Also check that the listed files exist with the recorded sizes.

        Raises:
            DataError: No manifest, an unsupported version, a missing file or one of another size,
                or ids outside the tokenizer's vocabulary.
        """
        path = folder / MANIFEST_FILE
        try:
            values = json.loads(path.read_bytes())
        except FileNotFoundError:
            raise DataError(
                f"data.folder={folder} has no prepared data ({MANIFEST_FILE} is missing); "
                "run prepare.py"
            ) from None
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: cannot read ({error}); {REPREPARE}") from None
        if not isinstance(values, dict) or values.get("format") != FORMAT:
            raise DataError(f"{path} is not a token-shard manifest; choose another data.folder")
        if values.get("version") != FORMAT_VERSION:
            raise DataError(
                f"{path}: version={values.get('version')} is not supported, only version "
                f"{FORMAT_VERSION}; {REPREPARE}"
            )
        try:
            manifest = cls._from_json(values)
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{path} is damaged (at {error}); {REPREPARE}") from None
        errors = manifest.errors(folder) if check_files else []
        if errors:
            raise DataError("\n".join(f"{error}; {REPREPARE}" for error in errors))
        return manifest

    def errors(self, folder: Path) -> list[str]:
        """Return a message for each missing or resized file and each id out of range."""
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
                        f"{path} has {n_bytes:,} bytes, but the manifest records {entry.n_bytes:,}"
                    )
            if shard.largest_id >= self.tokenizer.vocab_size:
                found.append(
                    f"{folder / shard.tokens.file} contains token id {shard.largest_id}, outside "
                    f"the tokenizer's vocab_size={self.tokenizer.vocab_size}"
                )
        return found

    @classmethod
    def _from_json(cls, values: dict[str, Any]) -> "Manifest":
        sources = {
            name: SourceEntry(
                entry["revision"],
                entry["documents"],
                {split: [Shard.from_json(s) for s in entry["shards"][split]] for split in SPLITS},
            )
            for name, entry in values["sources"].items()
        }
        tokenizer = TokenizerEntry(**values["tokenizer"])
        return cls(**{**values, "sources": sources, "tokenizer": tokenizer})
