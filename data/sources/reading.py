"""Reading the rows of a file range in each format: JSON lines, text, Parquet, Arrow, datasets.

Reading can resume after any row, by seeking where the format allows it and by skipping rows
otherwise. Tables are read in small batches, so memory is bounded by the largest document.
`data.sources.rows` checks and filters the rows.
"""

import io
import json
from codecs import BOM_UTF8
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice, repeat
from typing import Any, BinaryIO, NamedTuple

from data.config import SourceConfig
from data.sources.compression import decompressed
from data.sources.corpora import MIB, FileRange, open_arrow

BATCH_ROWS = 128  # table rows converted to Python objects at a time

Tables = Iterator[tuple[Any, Sequence[str], int]]
"""Arrow tables or record batches, column names of the file, and bytes per row (0: unknown)."""


class RowPosition(NamedTuple):
    """A position between two rows of a part.

    Attributes:
        file_range: Index of the range in the part.
        row: Rows (lines, including blank ones) of the range before the position.
        offset: Bytes of the range before the position, for uncompressed JSON lines.
    """

    file_range: int = 0
    row: int = 0
    offset: int = 0


class RawRow(NamedTuple):
    """One row as stored.

    Attributes:
        row: Rows of the range up to and including this one.
        offset: Bytes of the range up to and including this row, for uncompressed JSON lines.
        error: Reason why the complete row is invalid, or an empty string.
        columns: Column names of the file; JSON objects have their own.
    """

    values: Mapping[str, Any]
    row: int
    n_bytes: int
    offset: int = 0
    error: str = ""
    columns: Sequence[str] = ()

    @property
    def choices(self) -> str:
        """The column names, for messages."""
        return ", ".join(map(str, self.columns or self.values))


def read_rows(
    file_range: FileRange, source: SourceConfig, dataset: Any, start: RowPosition
) -> Iterator[RawRow]:
    """Read the rows of a range from a position on."""
    if source.format == "jsonl":
        return _json_rows(file_range, source.text_column, start)
    if source.format in ("stdlib", "text"):
        return _text_rows(file_range, source.text_column, start)
    columns = {source.text_column, *(column for column, _, _ in source.filter or [])}
    if source.format == "huggingface":
        tables = _hub_tables(file_range, dataset, source.streaming, start.row)
    elif source.format == "parquet":
        tables = _parquet_tables(file_range, columns, start.row)
    else:
        tables = _arrow_tables(file_range, start.row)
    return _table_rows(tables, columns, start.row)


@contextmanager
def _open(path: str) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """Open a file and yield its decompressed stream and the file itself."""
    with io.BufferedReader(io.FileIO(path), MIB) as file:
        yield decompressed(file), file


def _text_rows(file_range: FileRange, column: str, start: RowPosition) -> Iterator[RawRow]:
    """Yield a file as one document."""
    if start.row == 0:
        with _open(file_range.path) as (stream, _):
            text = stream.read().removeprefix(BOM_UTF8)
            yield RawRow({column: text}, 1, file_range.n_bytes)


def _json_rows(file_range: FileRange, column: str, start: RowPosition) -> Iterator[RawRow]:
    """Yield one JSON object per line; blank lines are not rows."""
    row, compressed = start.row, file_range.end is None
    with _open(file_range.path) as (stream, file):
        if compressed:
            for _ in range(row):
                stream.readline()
        else:
            stream.seek(file_range.start + start.offset)
        position = file.tell()
        while (compressed or position < (file_range.end or 0)) and (line := stream.readline()):
            row += 1
            before, position = position, file.tell() if compressed else position + len(line)
            if row == 1 and file_range.start == 0:
                line = line.removeprefix(BOM_UTF8)
            if not line.isspace():
                values, error = _parse_line(line, column)
                offset = 0 if compressed else position - file_range.start
                yield RawRow(values, row, position - before, offset, error)


def _parse_line(line: bytes, column: str) -> tuple[Mapping[str, Any], str]:
    """Return the values of a JSON line and an error message or an empty string."""
    message = ""
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        text = line.decode(errors="replace")
        message = f"is not UTF-8 (byte 0x{line[error.start]:02x})"
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:  # invalid JSON, or a number of 5,000 digits
        reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
        return {}, message or f"is not JSON ({reason})"
    if not isinstance(values, dict):
        return {}, f'is a {type(values).__name__}, not a JSON object like {{"{column}": "…"}}'
    return values, message


def _parquet_tables(file_range: FileRange, used: set[str], skip: int) -> Tables:
    """Yield batches of the row groups of a range after `skip` rows."""
    import pyarrow.parquet

    # Without read-ahead: a column of a row group may exceed memory.
    path = file_range.path
    with pyarrow.parquet.ParquetFile(path, buffer_size=MIB, pre_buffer=False) as file:
        groups = list(range(file.metadata.num_row_groups))[file_range.start : file_range.end]
        sizes = {group: file.metadata.row_group(group).num_rows for group in groups}
        n_bytes = file_range.n_bytes // max(sum(sizes.values()), 1)
        while groups and sizes[groups[0]] <= skip:
            skip -= sizes[groups.pop(0)]
        names = file.schema_arrow.names
        # A file without the columns still yields rows, for the error message.
        columns = [name for name in names if name in used]
        batches = file.iter_batches(BATCH_ROWS, groups, columns, use_threads=False)
        for batch in _skip_rows(batches, skip):
            yield batch, names, n_bytes


def _arrow_tables(file_range: FileRange, skip: int) -> Tables:
    """Yield the record batches of a range after `skip` rows; their number of rows is unknown."""
    reader = open_arrow(file_range.path)
    if hasattr(reader, "num_record_batches"):
        end = reader.num_record_batches if file_range.end is None else file_range.end
        batches: Iterator[Any] = map(reader.get_batch, range(file_range.start, end))
    else:
        batches = islice(reader, file_range.start, file_range.end)
    for batch in _skip_rows(batches, skip):
        yield batch, reader.schema.names, 0


def _hub_tables(file_range: FileRange, dataset: Any, streaming: bool, skip: int) -> Tables:
    """Yield rows of a downloaded dataset, or of one streamed shard, after `skip` rows."""
    rows, start, end = dataset.with_format("arrow"), file_range.start, file_range.end or 0
    if streaming:
        shard = rows.shard(num_shards=dataset.num_shards, index=start)
        tables, n_bytes = _skip_rows(shard.iter(batch_size=BATCH_ROWS), skip), 0
    else:
        firsts = range(start + skip, end, BATCH_ROWS)
        tables = (rows[first : min(first + BATCH_ROWS, end)] for first in firsts)
        n_bytes = file_range.n_bytes // (end - start)
    for table in tables:
        yield table, table.column_names, n_bytes


def _skip_rows(tables: Iterator[Any], skip: int) -> Iterator[Any]:
    for table in tables:
        if table.num_rows > skip:
            yield table.slice(skip)
        skip = max(skip - table.num_rows, 0)


def _table_rows(tables: Tables, used: set[str], row: int) -> Iterator[RawRow]:
    """Yield the rows of tables, with the used columns as Python objects."""
    for table, names, n_bytes in tables:
        present = [name for name in names if name in used]
        for first in range(0, table.num_rows, BATCH_ROWS):
            batch = table.slice(first, BATCH_ROWS)
            columns = [_to_python(batch.column(name)) for name in present]
            all_values = zip(*columns, strict=True) if columns else repeat((), batch.num_rows)
            for values in all_values:
                row += 1
                yield RawRow(dict(zip(present, values, strict=True)), row, n_bytes, columns=names)


def _to_python(column: Any) -> list[Any]:
    """Convert a column to Python objects; text that is not UTF-8 becomes bytes.

    Raises:
        ValueError: Offsets of a damaged Arrow file point outside of its buffers, which pyarrow
            would otherwise read.
    """
    import pyarrow

    binary = {pyarrow.string(): pyarrow.binary(), pyarrow.large_string(): pyarrow.large_binary()}
    # Validation as text would also reject text that is not UTF-8.
    column.cast(binary.get(column.type, column.type)).validate(full=True)
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        return [_decode(value) for value in column.cast(pyarrow.large_binary()).to_pylist()]


def _decode(value: bytes | None) -> str | bytes | None:
    try:
        return None if value is None else value.decode()
    except UnicodeDecodeError:
        return value


def describe_location(file_range: FileRange, source: SourceConfig, row: int) -> str:
    """Return the location of a row for messages; rows before the range are counted only here."""
    path, start = file_range.path, file_range.start
    if source.format in ("stdlib", "text"):
        return path
    if source.format == "jsonl":
        return f"line {_count_lines(path, start) + row} of {path}"
    if source.format == "parquet" and start:
        import pyarrow.parquet

        metadata = pyarrow.parquet.read_metadata(path)
        row += sum(metadata.row_group(group).num_rows for group in range(start))
    if source.format == "arrow" and start:
        return f"row {row} from record batch {start} of {path}"
    if source.format == "huggingface" and source.streaming:
        return f"row {row} of shard {start} of {path}"
    if source.format == "huggingface":
        row += start
    return f"row {row} of {path}"


def _count_lines(path: str, n_bytes: int) -> int:
    """Return the number of lines in the first `n_bytes` of a file."""
    n_lines = 0
    with open(path, "rb") as stream:
        while chunk := stream.read(min(n_bytes, MIB)):
            n_lines += chunk.count(b"\n")
            n_bytes -= len(chunk)
    return n_lines
