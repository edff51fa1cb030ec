"""Dividing the files or the dataset of a source into parts.

The division depends only on the input (names, sizes, boundaries of lines, row groups and record
batches), not on the number of workers. Files are sorted, so a source is the same sequence on every
machine. Local formats use neither the network nor the `datasets` cache. `data.sources.listing`
finds the files, `data.sources.rows` reads the parts.
"""

import hashlib
import os
import sysconfig
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from data.config import SourceConfig
from data.errors import DataError, first_line
from data.sources.content import (
    NAMES,
    Content,
    format_override,
    inspect_file,
    inspect_files,
    reject_other_formats,
    rows_as_text,
)
from data.sources.listing import list_files

STDLIB_EXCLUDES = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
MIB = 2**20
# About 64 parts per source serve many workers; the largest part fills one shard of tokens.
N_PARTS, MIN_PART_BYTES, MAX_PART_BYTES = 64, MIB, 256 * MIB
ARROW_FILE_MAGIC = b"ARROW1"  # absent from an Arrow stream of record batches


@dataclass(frozen=True)
class FileRange:
    """A range of a file or dataset, from `start` to `end` (None: to the end of the file).

    The unit is bytes (JSON lines, divided at line ends), row groups (Parquet), record batches
    (Arrow), rows (downloaded datasets) or dataset shards (streamed datasets); text and compressed
    files are not divided. `n_bytes` is the input size, possibly estimated; 0 if unknown.
    """

    path: str
    start: int
    end: int | None
    n_bytes: int


@dataclass(frozen=True)
class Part:
    """A unit of work for one worker: consecutive ranges of a source."""

    source: str
    number: int
    ranges: tuple[FileRange, ...]

    @property
    def n_bytes(self) -> int:
        """Input size in bytes, or 0 if unknown."""
        return sum(file_range.n_bytes for file_range in self.ranges)


@dataclass(frozen=True)
class Corpus:
    """A source divided into parts.

    Attributes:
        revision: A hash of the input, or the dataset's commit.
        dataset: Object of the `datasets` library, downloaded or streamed, for format `huggingface`.
        notes: Lines for the user about paths that are not read.
    """

    revision: str
    parts: tuple[Part, ...]
    dataset: Any = None
    notes: tuple[str, ...] = ()


def find_corpus(name: str, source: SourceConfig, policy: str = "strict") -> Corpus:
    """Find the input of the source with this name and divide it into parts.

    Args:
        policy: `data.invalid_text`.

    Raises:
        DataError: There is no input, or not in the configured format.
    """
    key = f"data.sources.{name}"
    if source.format == "huggingface":
        return _hub_corpus(name, source, key)
    try:
        notes: list[str] = []
        files = source_files(source, key, notes)
        sizes = [file.stat().st_size for file in files]
        contents = [Content("text")] * len(files)
        if source.format != "stdlib":
            contents = inspect_files(files, source.text_column)
            reject_other_formats(files, contents, source, key, policy == "skip")
        if source.format == "parquet" and policy == "strict":
            _check_columns(files, source, key)
        if source.format == "text" and (found := rows_as_text(files, contents)[0]):
            notes.append(
                f"{key}: reads {len(found):,} of {len(files):,} files as plain text although they "
                f"hold rows of JSON or CSV, such as {files[found[0]]}; to read their "
                "text column, move them to a source of format jsonl"
            )
        part_bytes = _part_bytes(sum(sizes))
        divided = (
            _divide_file(file, size, part_bytes, source.format, content, key)
            for file, size, content in zip(files, sizes, contents, strict=True)
        )
        parts = tuple(_group(name, chain.from_iterable(divided), part_bytes))
        return Corpus(_revision(files, sizes), parts, notes=tuple(notes))
    except OSError as error:
        raise DataError(
            f"{key}.path={source.path}: cannot read ({error}); make it readable for this user, or "
            "remove it"
        ) from error


def source_files(
    source: SourceConfig, key: str = "data.sources.<name>", notes: list[str] | None = None
) -> list[Path]:
    """Return the files of a local source, sorted.

    Args:
        notes: Receives lines about paths that are not read.

    Raises:
        DataError: The path matches no file.
    """
    if source.format != "stdlib":
        return list_files(source, key, [] if notes is None else notes)
    root = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(root.rglob("*.py"))
    return [f for f in files if STDLIB_EXCLUDES.isdisjoint(f.relative_to(root).parts)]


def list_revision(source: SourceConfig) -> str:
    """Return the revision of a local source without opening its files.

    Raises:
        DataError: The path matches no file.
    """
    files = source_files(source)
    return _revision(files, [file.stat().st_size for file in files])


def open_arrow(path: str) -> Any:
    """Memory-map an Arrow file or stream and return its record batch reader."""
    import pyarrow

    mapped = pyarrow.memory_map(path)
    is_file = mapped.read(len(ARROW_FILE_MAGIC)) == ARROW_FILE_MAGIC
    mapped.seek(0)
    return pyarrow.ipc.open_file(mapped) if is_file else pyarrow.ipc.open_stream(mapped)


def _check_columns(files: list[Path], source: SourceConfig, key: str) -> None:
    """Raise DataError if a Parquet file has rows without the text column, before any is read."""
    import pyarrow.parquet

    def columns(file: Path) -> list[str]:
        with suppress(OSError, ValueError), pyarrow.parquet.ParquetFile(file) as table:
            return table.schema_arrow.names if table.metadata.num_rows else []
        return []  # damaged: reported when it is read

    with ThreadPoolExecutor(16) as pool:  # on network file systems, opening takes the time
        for file, names in zip(files, pool.map(columns, files), strict=True):
            if names and source.text_column not in names:
                raise DataError(
                    f"{key}.text_column={source.text_column} is not a column at row 1 of {file}; "
                    f"use one of {', '.join(names)}"
                )


def _part_bytes(n_bytes: int) -> int:
    return min(max(n_bytes // N_PARTS, MIN_PART_BYTES), MAX_PART_BYTES)


def _revision(files: list[Path], sizes: list[int]) -> str:
    """Return the SHA-256 of file sizes and names, relative to the common parent folder."""
    base = os.path.commonpath([file.absolute().parent for file in files])
    digest = hashlib.sha256()
    for file, size in zip(files, sizes, strict=True):
        name = file.absolute().relative_to(base).as_posix()
        digest.update(os.fsencode(name) + b"\0%d\0" % size)
    return digest.hexdigest()


def _group(name: str, ranges: Iterable[FileRange], part_bytes: int) -> Iterator[Part]:
    """Group consecutive ranges into parts of at least `part_bytes`."""
    number, group, n_bytes = 0, list[FileRange](), 0
    for file_range in ranges:
        group.append(file_range)
        n_bytes += file_range.n_bytes
        if n_bytes >= part_bytes:
            yield Part(name, number, tuple(group))
            number, group, n_bytes = number + 1, [], 0
    if group:
        yield Part(name, number, tuple(group))


def _divide_file(
    file: Path, size: int, part_bytes: int, format_: str, content: Content, key: str
) -> Iterator[FileRange]:
    """Yield the ranges of a file, several if it is large and its format allows division."""
    path = str(file.absolute())
    plain_lines = format_ == "jsonl" and content.compression is None
    if plain_lines and size > part_bytes:
        yield from _divide_lines(path, size, part_bytes)
    elif format_ in ("parquet", "arrow") and size > part_bytes:
        try:
            sizes = _row_group_sizes(path) if format_ == "parquet" else _batch_sizes(path)
        except (OSError, ValueError) as error:  # pyarrow.ArrowInvalid is a ValueError
            raise DataError(
                f"{key}.path: {path} is not a complete {format_.capitalize()} file "
                f"({first_line(error)}); write it again"
            ) from None
        yield from _divide_units(path, size, sizes, part_bytes)
    else:
        yield FileRange(path, 0, size if plain_lines else None, size)


def _divide_lines(path: str, size: int, part_bytes: int) -> Iterator[FileRange]:
    """Yield byte ranges of about `part_bytes`, each ending at a line end."""
    with open(path, "rb") as stream:
        start = 0
        while start < size:
            stream.seek(start + part_bytes - 1)
            while (read := stream.readline(MIB)) and not read.endswith(b"\n"):
                pass
            end = min(stream.tell(), size) if read else size
            yield FileRange(path, start, end, end - start)
            start = end


def _divide_units(
    path: str, size: int, unit_sizes: list[int], part_bytes: int
) -> Iterator[FileRange]:
    """Yield ranges of row groups or record batches, with bytes in proportion to `unit_sizes`."""
    total = max(sum(unit_sizes), 1)
    start = start_size = end_size = 0
    for end, unit_size in enumerate(unit_sizes, start=1):
        end_size += unit_size
        n_bytes = (end_size - start_size) * size // total
        if n_bytes >= part_bytes or end == len(unit_sizes):
            yield FileRange(path, start, end, n_bytes)
            start, start_size = end, end_size


def _row_group_sizes(path: str) -> list[int]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        groups = range(file.metadata.num_row_groups)
        return [file.metadata.row_group(group).total_byte_size for group in groups]


def _batch_sizes(path: str) -> list[int]:
    """Return relative record batch sizes; the memory map avoids reading the batches."""
    reader = open_arrow(path)
    if hasattr(reader, "num_record_batches"):
        return [1] * reader.num_record_batches
    return [batch.nbytes for batch in reader]


def _hub_corpus(name: str, source: SourceConfig, key: str) -> Corpus:
    """Find a hub dataset, or a local folder with the same layout."""
    import datasets

    datasets.disable_progress_bars()  # they would overwrite the bar of the preparation
    path = str(source.path)
    _reject_other_layouts(source, key)
    try:
        builder = datasets.load_dataset_builder(path, name=source.name, revision=source.revision)
        if source.streaming:
            dataset = builder.as_streaming_dataset(split=source.split)
            n_shards = dataset.num_shards
            n_bytes = (builder.info.dataset_size or 0) // n_shards
            ranges = [FileRange(path, i, i + 1, n_bytes) for i in range(n_shards)]
        else:
            builder.download_and_prepare()
            dataset = builder.as_dataset(split=source.split)
            n_rows, size = len(dataset), dataset.data.nbytes
            n_part_rows = max(n_rows * _part_bytes(size) // max(size, 1), 1)
            ranges = [
                FileRange(path, i, min(i + n_part_rows, n_rows), size * n_part_rows // n_rows)
                for i in range(0, n_rows, n_part_rows)
            ]
    except Exception as error:  # the library propagates errors of any file system
        raise DataError(
            f"{key}.path={path}: cannot read the dataset (name={source.name}, split={source.split},"
            f" revision={source.revision}; {first_line(error.__cause__ or error)}); check these "
            "values, the network, and that the dataset is public"
        ) from error
    parts = tuple(Part(name, number, (each,)) for number, each in enumerate(ranges))
    return Corpus(_hub_revision(builder), parts, dataset)


def _reject_other_layouts(source: SourceConfig, key: str) -> None:
    """Raise DataError for local paths that `load_dataset` cannot read, or reads wrongly."""
    path = Path(str(source.path))
    if path.is_file():
        content = inspect_file(path, source.text_column)
        if content.kind in NAMES:
            raise DataError(
                f"{key}.path={path} is a file, but format huggingface reads a dataset by its name "
                f"or folder; use {format_override(source, key, content.kind, path)}"
            )
    # It would read the files that `map` cached in the folder as well.
    if any((path / index).is_file() for index in ("state.json", "dataset_dict.json")):
        files = (file for file in path.rglob("*.arrow"))
        raise DataError(
            f"{key}.path={path} was written by `save_to_disk`, which format huggingface does not "
            f"read; use {format_override(source, key, 'arrow', next(files, path / '0.arrow'))}"
        )


def _hub_revision(builder: Any) -> str:
    """Return a dataset's commit, or `_revision` of local files (the library has no usable hash)."""
    groups = (builder.config.data_files or {}).values()
    files = [Path(name) for names in groups for name in names]
    if files and all(file.is_file() for file in files):
        return _revision(files, [file.stat().st_size for file in files])
    return str(builder.hash)
