"""Preparation of one part of a source: rows → documents → token shards, in one process.

A train shard and a validation shard are open together and closed together. After each pair, the
part's record is written: the shards so far and the input position of the next one. An interrupted
preparation resumes from the record and produces the same bytes as an uninterrupted one.
"""

from ctypes import Structure, c_int64
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Predicate

from data.config import DataConfig
from data.errors import DataError
from data.manifest import OUTCOMES, SPLITS, Shard, read_record, write_record
from data.preparation.splitting import split_document
from data.progress import ProgressCounts
from data.shards import ShardWriter
from data.sources.corpora import Part
from data.sources.reading import RowPosition
from data.sources.rows import rows
from data.tokenizer import Tokenizer


class PartCounts(Structure):
    """Processed input of one part, in an array shared by workers and main process."""

    _fields_ = tuple((name, c_int64) for name in ProgressCounts._fields)


@dataclass
class PartRecord:
    """Progress of a part: `shards` contain everything before `position`.

    Attributes:
        documents: Number of rows by outcome.
        n_closed: Closed pairs of shards.
    """

    position: RowPosition = RowPosition()  # noqa: RUF009 (immutable)
    n_bytes: int = 0
    documents: Annotated[dict[str, int], Predicate(lambda value: value.keys() == {*OUTCOMES})] = (
        field(default_factory=lambda: dict.fromkeys(OUTCOMES, 0))
    )
    shards: Annotated[
        dict[str, list[Shard]], Predicate(lambda value: value.keys() == {*SPLITS})
    ] = field(default_factory=lambda: {s: [] for s in SPLITS})
    n_closed: int = 0
    done: bool = False

    @property
    def all_shards(self) -> list[Shard]:
        """Closed shards of both splits."""
        return [shard for shards in self.shards.values() for shard in shards]

    @property
    def counts(self) -> tuple[int, int, int]:
        """Input bytes, documents and tokens in closed shards."""
        shards = self.all_shards
        n_documents = sum(shard.n_documents for shard in shards)
        return self.n_bytes, n_documents, sum(shard.n_tokens for shard in shards)

    def write(self, path: Path) -> None:
        """Write the record; the files it lists must be on disk already."""
        write_record(self, path)

    @classmethod
    def read(cls, path: Path) -> "PartRecord":
        """Read a record; return an empty one if the file is missing or damaged."""
        try:
            return read_record(cls, path, None, "the part is prepared again")
        except (DataError, OSError):
            return cls()


def record_path(folder: Path, part: Part) -> Path:
    """Return the path of a part's record."""
    return folder / part.source / f"part-{part.number:05d}.json"


def prepare_part(
    data: DataConfig,
    tokenizer: Tokenizer,
    datasets: dict[str, Any],
    thresholds: dict[str, int],
    part: Part,
    counts: Any,
) -> None:
    """Write the missing shards of a part, then mark its record as done.

    Args:
        datasets: Objects of the `datasets` library, for the sources that use it.
        thresholds: `tail_threshold(…)` of each source.
        counts: `PartCounts` of this part, which are updated after each row.

    Raises:
        DataError: The input cannot be read or is invalid.
        OSError: The shards cannot be written.
    """
    folder = Path(data.folder)
    path = record_path(folder, part)
    record = PartRecord.read(path)
    source, dataset = data.sources[part.source], datasets[part.source]
    threshold = thresholds[part.source]
    writers = _open_writers(folder, part, record)
    try:
        for row in rows(part, source, data.invalid_text, dataset, record.position):
            record.position = row.after
            counts.n_bytes = record.n_bytes = record.n_bytes + row.n_bytes
            record.documents["read"] += 1
            if row.outcome != "text":
                record.documents[row.outcome] += 1
            pieces = split_document(row.text, row.content, data.validation_fraction, threshold)
            for split, text in zip(SPLITS, pieces, strict=True):
                if text:
                    tokens = tokenizer.encode_document(text)
                    writers[split].add(tokens)
                    counts.n_documents += 1
                    counts.n_tokens += len(tokens)
            if sum(writer.n_tokens for writer in writers.values()) >= data.shard_tokens:
                _close_writers(writers, record)
                record.write(path)
                writers = _open_writers(folder, part, record)
        _close_writers(writers, record)
        record.done = True
        counts.n_bytes = record.n_bytes = part.n_bytes
        record.write(path)
    finally:
        for writer in writers.values():
            writer.abort()


def _open_writers(folder: Path, part: Part, record: PartRecord) -> dict[str, ShardWriter]:
    number = f"{part.number:05d}-{record.n_closed:03d}"
    return {split: ShardWriter(folder, f"{part.source}/{split}-{number}") for split in SPLITS}


def _close_writers(writers: dict[str, ShardWriter], record: PartRecord) -> None:
    for split, writer in writers.items():
        if shard := writer.close():
            record.shards[split].append(shard)
    record.n_closed += 1
