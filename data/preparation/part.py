"""One part of a source, from rows to token shards, in one process; its record tells how far it is.

A shard of training documents and one of held-out documents are open together and close together.
Then the part's record is written: the shards so far, and where the next one begins. A preparation
that was killed goes on from there, and every file comes out as if it had not been.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from data.config import SourceConfig
from data.files import write_atomically
from data.manifest import SPLITS, Shard
from data.shards import ShardWriter
from data.sources.corpora import Part
from data.sources.reading import RowPosition
from data.sources.rows import Policy, rows
from data.tokenizer import MODEL_FILE, Tokenizer, read_tokenizer

COUNTS = ("read", "empty", "filtered", "skipped", "replaced")


@dataclass(frozen=True)
class PartSettings:
    """What all parts of a preparation have in common; goes to each worker once."""

    folder: Path
    sources: dict[str, SourceConfig]
    datasets: dict[str, Any]  # the library's own objects, of the sources that have one
    invalid_text: Policy
    validation_fraction: float
    shard_tokens: int
    tokenizer_name: str


@dataclass
class PartRecord:
    """How far a part is: everything before `position` lies in `shards`."""

    position: RowPosition = RowPosition()  # noqa: RUF009 (a tuple)
    n_bytes: int = 0
    documents: dict[str, int] = field(default_factory=lambda: dict.fromkeys(COUNTS, 0))
    shards: dict[str, list[Shard]] = field(default_factory=lambda: {s: [] for s in SPLITS})
    n_closed: int = 0  # pairs of shards
    done: bool = False

    @property
    def is_clean(self) -> bool:
        """Whether no document was bad, so that every policy would have made the same."""
        return not (self.documents["skipped"] or self.documents["replaced"])

    @property
    def n_documents(self) -> int:
        """Documents that lie in shards."""
        return sum(shard.n_documents for shards in self.shards.values() for shard in shards)

    @property
    def n_tokens(self) -> int:
        """Tokens that lie in shards."""
        return sum(shard.n_tokens for shards in self.shards.values() for shard in shards)

    def files(self) -> dict[str, int]:
        """The files of its shards, with their sizes."""
        shards = [shard for split in SPLITS for shard in self.shards[split]]
        entries = [entry for shard in shards for entry in (shard.tokens, shard.offsets)]
        return {entry.file: entry.n_bytes for entry in entries}

    def write(self, path: Path) -> None:
        """Puts it on the disk; the files that it names are there already."""
        write_atomically(path, json.dumps(asdict(self)).encode())

    @classmethod
    def read(cls, path: Path) -> "PartRecord":
        """The record of a part, an empty one where none can be read."""
        try:
            values = json.loads(path.read_bytes())
            return cls(
                RowPosition(*values.pop("position")),
                shards={s: [Shard.from_json(each) for each in values["shards"][s]] for s in SPLITS},
                **{name: value for name, value in values.items() if name != "shards"},
            )
        except (OSError, ValueError, KeyError, TypeError):
            return cls()


def record_path(folder: Path, part: Part) -> Path:
    """Where the record of a part lies."""
    return folder / part.source / f"part-{part.number:05d}.json"


def prepare_part(
    job: PartSettings, tokenizer: Tokenizer, part: Part, tell: Callable[[int, int, int], None]
) -> None:
    """Writes the shards of a part that are not there yet; its record says `done` then.

    Args:
        tell: is told after each row what of this part is done: bytes of input, documents, tokens

    Raises:
        DataError: the input cannot be read, or is refused.
        OSError: the shards cannot be written.
    """
    path = record_path(job.folder, part)
    record = PartRecord.read(path)
    n_documents, n_tokens = record.n_documents, record.n_tokens
    source, dataset = job.sources[part.source], job.datasets.get(part.source)
    writers = _writers(job, part, record)
    try:
        for row in rows(part, source, job.invalid_text, dataset, record.position):
            record.position = row.after
            record.n_bytes += row.n_bytes
            record.documents["read"] += 1
            if row.outcome != "text":
                record.documents[row.outcome] += 1
            if row.text:
                tokens = tokenizer.encode_document(row.text)
                held_out = is_validation(row.content, job.validation_fraction)
                writers["validation" if held_out else "train"].add(tokens)
                n_documents += 1
                n_tokens += len(tokens)
            tell(record.n_bytes, n_documents, n_tokens)
            if sum(writer.n_tokens for writer in writers.values()) >= job.shard_tokens:
                _close(writers, record)
                record.write(path)
                writers = _writers(job, part, record)
        _close(writers, record)
        record.done = True
        record.n_bytes = part.n_bytes
        record.write(path)
        tell(record.n_bytes, n_documents, n_tokens)
    finally:
        for writer in writers.values():
            writer.abandon()


def is_validation(text: str | bytes, fraction: float) -> bool:
    """Whether a document is held out: by its content alone, so that a growing corpus moves none.

    Args:
        text: the document, or its UTF-8
    """
    content = text.encode() if isinstance(text, str) else text
    digest = hashlib.blake2b(content, digest_size=8, person=b"llamesh-split").digest()
    return int.from_bytes(digest, "little") < fraction * 2**64


def load(job: PartSettings) -> Tokenizer:
    """The tokenizer of a preparation, from its folder."""
    return read_tokenizer(job.folder / MODEL_FILE, job.tokenizer_name)


def _writers(job: PartSettings, part: Part, record: PartRecord) -> dict[str, ShardWriter]:
    """The next pair of shards of a part."""
    number = f"{part.number:05d}-{record.n_closed:03d}"
    return {s: ShardWriter(job.folder, f"{part.source}/{s}-{number}") for s in SPLITS}


def _close(writers: dict[str, ShardWriter], record: PartRecord) -> None:
    """Finishes a pair of shards, of which one may have stayed empty."""
    for split, writer in writers.items():
        shard = writer.close()
        if shard is not None:
            record.shards[split].append(shard)
    record.n_closed += 1
