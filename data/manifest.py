"""The manifest of a prepared dataset folder: format version 2, specified in docs/shards.md.

<folder>/tokenizer.model
<folder>/<source>/<split>-PPPPP-KKK.tokens    uint32, little-endian token ids
<folder>/<source>/<split>-PPPPP-KKK.offsets   int64, little-endian: start of each document in the
                                              shard, then the number of tokens
<folder>/manifest.json                        written last: without it, the folder is not prepared
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, TypeVar

import numpy as np
from annotated_types import Predicate
from pydantic import TypeAdapter, ValidationError

from data.errors import DataError
from data.files import FileEntry, parse_json, read_file, write_atomically

FORMAT = "llamesh-shards"
FORMAT_VERSION = 2
MANIFEST_FILE = "manifest.json"
SPLITS = ("train", "validation")
OUTCOMES = ("read", "empty", "filtered", "skipped", "replaced")  # of rows; `read` counts all
TOKEN = np.dtype("<u4")
OFFSET = np.dtype("<i8")
REPREPARE = "delete the folder and prepare it again, or choose another data.folder"


@dataclass(frozen=True)
class Shard:
    """The two files of one shard and their contents."""

    tokens: FileEntry
    offsets: FileEntry
    n_tokens: int
    n_documents: int
    largest_id: int

    @property
    def files(self) -> tuple[FileEntry, FileEntry]:
        """Both files."""
        return self.tokens, self.offsets

    @property
    def n_bytes(self) -> int:
        """Size of both files."""
        return self.tokens.n_bytes + self.offsets.n_bytes


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
    shards: Annotated[dict[str, list[Shard]], Predicate(lambda value: {*SPLITS} <= value.keys())]


@dataclass(frozen=True)
class TokenizerEntry:
    """The tokenizer that produced the token ids."""

    name: str
    hash: str
    vocab_size: int
    bos_id: int
    eos_id: int


def _is_configuration(values: dict[str, Any]) -> bool:
    """Return whether sources and tokenizer, if present, have settings."""
    sources, tokenizer = values.get("data.sources", {}), values.get("tokenizer", {})
    groups = [tokenizer, sources, *(sources.values() if isinstance(sources, dict) else [])]
    return all(isinstance(each, dict) for each in groups)


@dataclass(frozen=True)
class Manifest:
    """Contents of a prepared folder; `configuration` holds the keys that determined them."""

    tokenizer: TokenizerEntry
    configuration: Annotated[dict[str, Any], Predicate(_is_configuration)]
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

    def n_tokens(self, split: str | None = None, source: str | None = None) -> int:
        """Return the number of tokens of one split or all, in one source or all."""
        return sum(shard.n_tokens for shard in self.shards(split, source))

    def n_documents(self, split: str, source: str | None = None) -> int:
        """Return the number of documents of a split, in one source or all."""
        return sum(shard.n_documents for shard in self.shards(split, source))

    def shards(self, split: str | None = None, source: str | None = None) -> list[Shard]:
        """Return the shards of one split or all, in one source or all."""
        sources = self.sources.values() if source is None else [self.sources[source]]
        splits = SPLITS if split is None else [split]
        return [shard for each in splits for entry in sources for shard in entry.shards[each]]

    def write(self, folder: Path) -> None:
        """Write `manifest.json`, which marks the folder as prepared."""
        write_record(self, folder / MANIFEST_FILE)

    @classmethod
    def read(cls, folder: Path, check_files: bool = True) -> "Manifest":
        """Read the manifest of a folder.

        Args:
            check_files: Also check that the listed files exist with the recorded sizes.

        Raises:
            DataError: No manifest, an unsupported version, a missing file or one of another size,
                or ids outside the tokenizer's vocabulary.
        """
        try:
            path, remedy = folder / MANIFEST_FILE, f"restore it from a copy, or {REPREPARE}"
            manifest = read_record(cls, path, (FORMAT, FORMAT_VERSION), remedy)
        except FileNotFoundError:
            raise DataError(
                f"data.folder={folder} has no prepared data ({MANIFEST_FILE} is missing); "
                "run prepare.py"
            ) from None
        errors = manifest.errors(folder) if check_files else ()
        if message := "\n".join(f"{error}; {REPREPARE}" for error in errors):
            raise DataError(message)
        return manifest

    def errors(self, folder: Path) -> Iterator[str]:
        """Yield a message for each missing or resized file and each id out of range."""
        for shard in self.shards():
            yield from filter(None, (entry.size_error(folder) for entry in shard.files))
            if shard.largest_id >= self.tokenizer.vocab_size:
                yield (
                    f"{folder / shard.tokens.file} contains token id {shard.largest_id}, outside "
                    f"the tokenizer's vocab_size={self.tokenizer.vocab_size}"
                )


Record = TypeVar("Record")
_adapter: Callable[[Any], TypeAdapter] = cache(TypeAdapter)  # takes milliseconds to create


def write_record(record: Any, path: Path) -> None:
    """Write a dataclass as JSON with the SHA-256 of its content, for `read_record`."""
    values = asdict(record)
    values["sha256"] = _content_hash(values)
    text = json.dumps(values, indent=1) + "\n"  # in ASCII: paths may not be UTF-8
    write_atomically(path, text.encode())


def _content_hash(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def read_record(
    record: type[Record], path: Path, supported: tuple[str, int] | None, remedy: str
) -> Record:
    """Read a JSON file with the fields of a dataclass.

    Args:
        supported: Values of the fields `format` and `version`. None: the record has none, and its
            hash is required.
        remedy: End of all error messages.

    Raises:
        FileNotFoundError: The file is missing.
        DataError: The file is damaged or of another version.
    """
    try:
        values = parse_json(read_file(path))
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot read ({error}); {remedy}") from None
    if not isinstance(values, dict):
        raise DataError(f"{path} is damaged (not a JSON object); {remedy}")
    recorded = values.pop("sha256", None)  # version 0.2 and other programs write none
    is_old = recorded is None and supported is not None
    if recorded != _content_hash(values) and not is_old:
        raise DataError(f"{path} is damaged (its content differs from its sha256); {remedy}")
    found = values.get("format"), values.get("version")
    if supported is not None and found != supported:
        raise DataError(
            f"{path}: format={found[0]}, version={found[1]} is not supported, only "
            f"format={supported[0]}, version={supported[1]}; {remedy}"
        )
    try:
        return _adapter(record).validate_python(values)
    except ValidationError as error:
        location = ".".join(map(str, error.errors()[0]["loc"]))
        raise DataError(f"{path} is damaged (at {location}); {remedy}") from None
