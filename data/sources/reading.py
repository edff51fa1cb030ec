"""Reading the rows of a file range in each format: JSON lines, text, Parquet, Arrow, datasets.

Reading can resume after any row, by seeking where the format allows it and by skipping rows
otherwise. Tables are read in small batches, so memory is bounded by the largest document.
`data.sources.rows` checks and filters the rows.
"""

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice, repeat
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

from data.config import SourceConfig
from data.sources.corpora import COMPRESSED, MIB, FileRange, open_arrow

BATCH_ROWS = 128  # table rows converted to Python objects at a time

Tables = Iterator[tuple[Any, Sequence[str]]]
"""Arrow tables or record batches, each with the column names of its file."""


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
        columns: Column names of the file.
    """

    values: Mapping[str, Any]
    row: int
    n_bytes: int
    offset: int = 0
    error: str = ""
    columns: Sequence[str] = ()


def read_rows(
    file_range: FileRange, source: SourceConfig, dataset: Any, start: RowPosition
) -> Iterator[RawRow]:
    """Read the rows of a range from a position on."""
    if source.format == "jsonl":
        return _json_rows(file_range, source.text_column, start)
    if source.format in ("stdlib", "text"):
        return _text_rows(file_range, source.text_column, start)
    tables, n_rows = {
        "parquet": _parquet_tables,
        "arrow": _arrow_tables,
        "huggingface": _hub_tables,
    }[source.format](file_range, source, dataset, start.row)
    bytes_per_row = file_range.n_bytes // n_rows if n_rows else 0
    return _table_rows(tables, source, start.row, bytes_per_row)


@contextmanager
def _open(path: str) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """Open a file and yield its decompressed stream and the file itself."""
    compression = COMPRESSED.get(Path(path).suffix)
    with open(path, "rb", buffering=MIB) as file:
        if compression is None:
            yield file, file
        else:
            import pyarrow

            stream = pyarrow.input_stream(file, compression=compression)
            yield cast(BinaryIO, io.BufferedReader(stream, MIB)), file


def _text_rows(file_range: FileRange, column: str, start: RowPosition) -> Iterator[RawRow]:
    """Yield a file as one document."""
    if start.row == 0:
        with _open(file_range.path) as (stream, _):
            yield RawRow({column: stream.read()}, 1, file_range.n_bytes)


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


def _parquet_tables(
    file_range: FileRange, source: SourceConfig, dataset: Any, skip: int
) -> tuple[Tables, int]:
    """Return batches of the row groups of a range after `skip` rows, and its number of rows."""
    import pyarrow.parquet

    # Without read-ahead: a column of a row group may exceed memory.
    file = pyarrow.parquet.ParquetFile(file_range.path, buffer_size=MIB, pre_buffer=False)
    metadata = file.metadata
    groups = list(range(metadata.num_row_groups))[file_range.start : file_range.end]
    n_rows = sum(metadata.row_group(group).num_rows for group in groups)
    while groups and metadata.row_group(groups[0]).num_rows <= skip:
        skip -= metadata.row_group(groups.pop(0)).num_rows
    names = file.schema_arrow.names
    columns = [name for name in names if name in _used_columns(source)]

    def tables() -> Tables:
        with file:
            # A file without the columns still yields rows, for the error message.
            yield from zip(
                file.iter_batches(BATCH_ROWS, groups, columns, use_threads=False), repeat(names)
            )

    return _skip_rows(tables(), skip), n_rows


def _arrow_tables(
    file_range: FileRange, source: SourceConfig, dataset: Any, skip: int
) -> tuple[Tables, int]:
    """Return the record batches of a range after `skip` rows; their number of rows is unknown."""
    reader = open_arrow(file_range.path)
    names = reader.schema.names

    def tables() -> Tables:
        if hasattr(reader, "num_record_batches"):
            end = reader.num_record_batches if file_range.end is None else file_range.end
            for number in range(file_range.start, end):
                yield reader.get_batch(number), names
        else:
            for batch in islice(reader, file_range.start, file_range.end):
                yield batch, names

    return _skip_rows(tables(), skip), 0


def _hub_tables(
    file_range: FileRange, source: SourceConfig, dataset: Any, skip: int
) -> tuple[Tables, int]:
    """Return rows of a downloaded dataset, or of one streamed shard, after `skip` rows."""
    rows = dataset.with_format("arrow")
    if source.streaming:
        shard = rows.shard(num_shards=dataset.num_shards, index=file_range.start)
        tables = ((table, table.column_names) for table in shard.iter(batch_size=BATCH_ROWS))
        return _skip_rows(tables, skip), 0
    assert file_range.end is not None
    ranges = range(file_range.start + skip, file_range.end, BATCH_ROWS)
    batches = (rows[first : min(first + BATCH_ROWS, file_range.end)] for first in ranges)
    n_rows = file_range.end - file_range.start
    return ((table, table.column_names) for table in batches), n_rows


def _skip_rows(tables: Tables, skip: int) -> Tables:
    for table, names in tables:
        if table.num_rows <= skip:
            skip -= table.num_rows
        else:
            yield table.slice(skip), names
            skip = 0


def _table_rows(tables: Tables, source: SourceConfig, row: int, n_bytes: int) -> Iterator[RawRow]:
    """Yield the rows of tables, with the used columns as Python objects."""
    for table, names in tables:
        present = [name for name in names if name in _used_columns(source)]
        for first in range(0, table.num_rows, BATCH_ROWS):
            batch = table.slice(first, BATCH_ROWS)
            columns = [_to_python(batch.column(name)) for name in present]
            all_values = zip(*columns, strict=True) if columns else repeat((), batch.num_rows)
            for values in all_values:
                row += 1
                yield RawRow(dict(zip(present, values, strict=True)), row, n_bytes, columns=names)


def _to_python(column: Any) -> list[Any]:
    """Convert a column to Python objects; text that is not UTF-8 becomes bytes."""
    import pyarrow

    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        return [_decode(value) for value in column.cast(pyarrow.large_binary()).to_pylist()]


def _decode(value: bytes | None) -> str | bytes | None:
    try:
        return None if value is None else value.decode()
    except UnicodeDecodeError:
        return value


def _used_columns(source: SourceConfig) -> set[str]:
    return {source.text_column, *(column for column, _, _ in source.filter or [])}


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
