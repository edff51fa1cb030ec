"""Preparation of one part of a source: rows → documents → token shards, in one process.

A train shard and a validation shard are open together and closed together. After each pair, the
part's record is written: the shards so far and the input position of the next one. An interrupted
preparation resumes from the record and produces the same bytes as an uninterrupted one.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from data.config import DataConfig
from data.files import write_atomically
from data.manifest import SPLITS, Shard
from data.shards import ShardWriter
from data.sources.corpora import Part
from data.sources.reading import RowPosition
from data.sources.rows import rows
from data.tokenizer import MODEL_FILE, Tokenizer, read_tokenizer

OUTCOMES = ("read", "empty", "filtered", "skipped", "replaced")


@dataclass(frozen=True)
class PartSettings:
    """Settings shared by all parts of a preparation; sent to each worker once.

    Attributes:
        datasets: Objects of the `datasets` library, for the sources that use it.
    """

    data: DataConfig
    datasets: dict[str, Any]
    tokenizer_name: str

    @property
    def folder(self) -> Path:
        return Path(self.data.folder)


@dataclass
class PartRecord:
    """Progress of a part: `shards` contain everything before `position`.

    Attributes:
        documents: Number of rows by outcome.
        n_closed: Closed pairs of shards.
    """

    position: RowPosition = RowPosition()  # noqa: RUF009 (immutable)
    n_bytes: int = 0
    documents: dict[str, int] = field(default_factory=lambda: dict.fromkeys(OUTCOMES, 0))
    shards: dict[str, list[Shard]] = field(default_factory=lambda: {s: [] for s in SPLITS})
    n_closed: int = 0
    done: bool = False

    @property
    def is_clean(self) -> bool:
        """Whether all text was valid, so that `data.invalid_text` had no effect."""
        return not (self.documents["skipped"] or self.documents["replaced"])

    @property
    def n_documents(self) -> int:
        """Documents in closed shards."""
        return sum(shard.n_documents for shards in self.shards.values() for shard in shards)

    @property
    def n_tokens(self) -> int:
        """Tokens in closed shards."""
        return sum(shard.n_tokens for shards in self.shards.values() for shard in shards)

    def file_sizes(self) -> dict[str, int]:
        """Return the size in bytes of each shard file."""
        shards = [shard for split in SPLITS for shard in self.shards[split]]
        entries = [entry for shard in shards for entry in (shard.tokens, shard.offsets)]
        return {entry.file: entry.n_bytes for entry in entries}

    def write(self, path: Path) -> None:
        """Write the record; the files it lists must be on disk already."""
        write_atomically(path, json.dumps(asdict(self)).encode())

    @classmethod
    def read(cls, path: Path) -> "PartRecord":
        """Read a record; return an empty one if the file is missing or unreadable."""
        try:
            values = json.loads(path.read_bytes())
            values["position"] = RowPosition(*values["position"])
            values["shards"] = {
                split: [Shard.from_json(shard) for shard in values["shards"][split]]
                for split in SPLITS
            }
            return cls(**values)
        except (OSError, ValueError, KeyError, TypeError):
            return cls()


def record_path(folder: Path, part: Part) -> Path:
    """Return the path of a part's record."""
    return folder / part.source / f"part-{part.number:05d}.json"


def prepare_part(
    settings: PartSettings,
    tokenizer: Tokenizer,
    part: Part,
    update: Callable[[int, int, int], None],
) -> None:
    """Write the missing shards of a part, then mark its record as done.

    Args:
        update: Called after each row with this part's processed input bytes, documents and tokens.

    Raises:
        DataError: The input cannot be read or is invalid.
        OSError: The shards cannot be written.
    """
    data = settings.data
    path = record_path(settings.folder, part)
    record = PartRecord.read(path)
    n_documents, n_tokens = record.n_documents, record.n_tokens
    source, dataset = data.sources[part.source], settings.datasets.get(part.source)
    writers = _open_writers(settings, part, record)
    try:
        for row in rows(part, source, data.invalid_text, dataset, record.position):
            record.position = row.after
            record.n_bytes += row.n_bytes
            record.documents["read"] += 1
            if row.outcome != "text":
                record.documents[row.outcome] += 1
            if row.text:
                tokens = tokenizer.encode_document(row.text)
                validation = is_validation(row.content, data.validation_fraction)
                writers["validation" if validation else "train"].add(tokens)
                n_documents += 1
                n_tokens += len(tokens)
            update(record.n_bytes, n_documents, n_tokens)
            if sum(writer.n_tokens for writer in writers.values()) >= data.shard_tokens:
                _close_writers(writers, record)
                record.write(path)
                writers = _open_writers(settings, part, record)
        _close_writers(writers, record)
        record.done = True
        record.n_bytes = part.n_bytes
        record.write(path)
        update(record.n_bytes, n_documents, n_tokens)
    finally:
        for writer in writers.values():
            writer.abort()


def is_validation(text: str | bytes, fraction: float) -> bool:
    """Return whether a document belongs to the validation split.

    The decision is a hash of the content, so no document changes splits when the corpus grows.

    Args:
        text: The document, as a string or as UTF-8.
    """
    content = text.encode() if isinstance(text, str) else text
    digest = hashlib.blake2b(content, digest_size=8, person=b"llamesh-split").digest()
    return int.from_bytes(digest, "little") < fraction * 2**64


def load_tokenizer_of(settings: PartSettings) -> Tokenizer:
    """Load the tokenizer from the dataset folder."""
    return read_tokenizer(settings.folder / MODEL_FILE, settings.tokenizer_name)


def _open_writers(settings: PartSettings, part: Part, record: PartRecord) -> dict[str, ShardWriter]:
    number = f"{part.number:05d}-{record.n_closed:03d}"
    return {s: ShardWriter(settings.folder, f"{part.source}/{s}-{number}") for s in SPLITS}


def _close_writers(writers: dict[str, ShardWriter], record: PartRecord) -> None:
    for split, writer in writers.items():
        shard = writer.close()
        if shard is not None:
            record.shards[split].append(shard)
    record.n_closed += 1
