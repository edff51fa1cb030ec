"""The rows of a piece as its format holds them: JSON lines, text, Parquet, Arrow, a dataset.

Reading can go on after any row: it seeks where the format can, else it passes over the rows.
Tables are read in small batches, so that memory is bounded by the largest document. What a row is
worth is left to `data.sources.rows`.
"""

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import repeat
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

from data.config import SourceConfig
from data.sources.corpora import COMPRESSED, MIB, FileRange, open_arrow

BATCH_ROWS = 128  # of a table, turned into Python objects at once


class RowPosition(NamedTuple):
    """A place between two rows of a part."""

    piece: int = 0
    row: int = 0  # rows (lines, with the blank ones) of the piece before it
    offset: int = 0  # bytes of the piece before it, where it is JSON lines that are not compressed


class RawRow(NamedTuple):
    """One row as its format holds it; `problem` tells what is wrong with all of it."""

    values: Mapping[str, Any]
    row: int
    n_bytes: int
    offset: int = 0
    problem: str = ""
    columns: Sequence[str] = ()


def read(
    piece: FileRange, source: SourceConfig, dataset: Any, begin: RowPosition
) -> Iterator[RawRow]:
    """The rows of a piece in its format."""
    if source.format == "jsonl":
        return _json_rows(piece, source.text_column, begin)
    if source.format in ("stdlib", "text"):
        return _text_rows(piece, source.text_column, begin)
    tables, n_rows = {
        "parquet": _parquet_tables,
        "arrow": _arrow_tables,
        "huggingface": _hub_tables,
    }[source.format](piece, source, dataset, begin.row)
    share = piece.n_bytes // n_rows if n_rows else 0
    return _table_rows(tables, source, begin.row, share)


@contextmanager
def _opened(path: str) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """A file to read bytes from, unpacked by its suffix, and the file itself."""
    compression = COMPRESSED.get(Path(path).suffix)
    with open(path, "rb", buffering=MIB) as file:
        if compression is None:
            yield file, file
        else:
            import pyarrow

            unpacked = pyarrow.input_stream(file, compression=compression)
            yield cast(BinaryIO, io.BufferedReader(unpacked, MIB)), file


def _text_rows(piece: FileRange, column: str, begin: RowPosition) -> Iterator[RawRow]:
    """A file as one document."""
    if begin.row == 0:
        with _opened(piece.path) as (stream, _):
            yield RawRow({column: stream.read()}, 1, piece.n_bytes)


def _json_rows(piece: FileRange, column: str, begin: RowPosition) -> Iterator[RawRow]:
    """One JSON object a line; blank lines are no rows."""
    row, packed = begin.row, piece.end is None
    with _opened(piece.path) as (stream, file):
        if packed:
            for _ in range(row):
                stream.readline()
        else:
            stream.seek(piece.begin + begin.offset)
        place = file.tell()
        while (packed or place < (piece.end or 0)) and (line := stream.readline()):
            row += 1
            before, place = place, file.tell() if packed else place + len(line)
            if not line.isspace():
                values, problem = _parsed(line, column)
                offset = 0 if packed else place - piece.begin
                yield RawRow(values, row, place - before, offset, problem)


def _parsed(line: bytes, column: str) -> tuple[Mapping[str, Any], str]:
    """The values of a line of JSON, and what is wrong with it."""
    problem = ""
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        text = line.decode(errors="replace")
        problem = f"is not UTF-8 (byte 0x{line[error.start]:02x})"
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:  # a broken line, a number of 5,000 digits
        message = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
        return {}, problem or f"is not JSON ({message})"
    if not isinstance(values, dict):
        return {}, f'is a {type(values).__name__}, not a JSON object like {{"{column}": "…"}}'
    return values, problem


def _parquet_tables(
    piece: FileRange, source: SourceConfig, dataset: Any, skip: int
) -> tuple[Iterator[Any], int]:
    """The row groups of a piece after `skip` rows, in small batches; the number of all rows."""
    import pyarrow.parquet

    # Without buffering ahead: a column of a row group may be larger than memory.
    file = pyarrow.parquet.ParquetFile(piece.path, buffer_size=MIB, pre_buffer=False)
    metadata = file.metadata
    groups = list(range(metadata.num_row_groups))[piece.begin : piece.end]
    n_rows = sum(metadata.row_group(group).num_rows for group in groups)
    while groups and metadata.row_group(groups[0]).num_rows <= skip:
        skip -= metadata.row_group(groups.pop(0)).num_rows
    columns = [c for c in file.schema_arrow.names if c in _wanted_columns(source)]
    names = file.schema_arrow.names

    def tables() -> Iterator[Any]:
        with file:
            batches = file.iter_batches(BATCH_ROWS, groups, columns, use_threads=False)
            # A file without the columns still has rows, which are told as such.
            yield from zip(batches, repeat(names))

    return _after(tables(), skip), n_rows


def _arrow_tables(
    piece: FileRange, source: SourceConfig, dataset: Any, skip: int
) -> tuple[Iterator[Any], int]:
    """The record batches of a piece after `skip` rows; nobody counts all rows before."""
    reader = open_arrow(piece.path)
    names = reader.schema.names

    def tables() -> Iterator[Any]:
        if hasattr(reader, "num_record_batches"):
            end = reader.num_record_batches if piece.end is None else piece.end
            for number in range(piece.begin, end):
                yield reader.get_batch(number), names
        else:
            for number, batch in enumerate(reader):
                if piece.end is not None and number >= piece.end:
                    return
                if number >= piece.begin:
                    yield batch, names

    return _after(tables(), skip), 0


def _hub_tables(
    piece: FileRange, source: SourceConfig, dataset: Any, skip: int
) -> tuple[Iterator[Any], int]:
    """The rows of a downloaded dataset, or one shard of a streamed one, after `skip` rows."""
    rows = dataset.with_format("arrow")
    if source.streaming:
        shard = rows.shard(num_shards=dataset.num_shards, index=piece.begin)
        tables = ((table, table.column_names) for table in shard.iter(batch_size=BATCH_ROWS))
        return _after(tables, skip), 0
    assert piece.end is not None
    ranges = range(piece.begin + skip, piece.end, BATCH_ROWS)
    found = (rows[first : min(first + BATCH_ROWS, piece.end)] for first in ranges)
    return ((table, table.column_names) for table in found), piece.end - piece.begin


def _after(tables: Iterator[Any], skip: int) -> Iterator[Any]:
    """The tables without their first `skip` rows."""
    for table, names in tables:
        if table.num_rows <= skip:
            skip -= table.num_rows
        else:
            yield table.slice(skip), names
            skip = 0


def _table_rows(
    tables: Iterator[Any], source: SourceConfig, row: int, n_bytes: int
) -> Iterator[RawRow]:
    """The rows of Arrow tables or record batches, the wanted columns as Python objects."""
    for whole, names in tables:
        present = [name for name in names if name in _wanted_columns(source)]
        for first in range(0, whole.num_rows, BATCH_ROWS):
            table = whole.slice(first, BATCH_ROWS)
            columns = [_objects(table.column(name)) for name in present]
            values = zip(*columns, strict=True) if columns else repeat((), table.num_rows)
            for each in values:
                row += 1
                yield RawRow(dict(zip(present, each, strict=True)), row, n_bytes, columns=names)


def _objects(column: Any) -> list[Any]:
    """A column as Python objects; text that is not UTF-8 as bytes."""
    import pyarrow

    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        return [_as_text(value) for value in column.cast(pyarrow.large_binary()).to_pylist()]


def _as_text(value: bytes | None) -> str | bytes | None:
    """Text where the bytes are UTF-8."""
    try:
        return None if value is None else value.decode()
    except UnicodeDecodeError:
        return value


def _wanted_columns(source: SourceConfig) -> set[str]:
    return {source.text_column, *(column for column, _, _ in source.filter or [])}


def describe_location(piece: FileRange, source: SourceConfig, row: int) -> str:
    """Where a row of a piece is, for a person; the rows before the piece are counted only now."""
    if source.format in ("stdlib", "text"):
        return piece.path
    if source.format == "jsonl":
        return f"line {_lines_before(piece) + row} of {piece.path}"
    if source.format == "parquet" and piece.begin:
        import pyarrow.parquet

        metadata = pyarrow.parquet.read_metadata(piece.path)
        row += sum(metadata.row_group(group).num_rows for group in range(piece.begin))
    if source.format == "arrow" and piece.begin:
        return f"row {row} from record batch {piece.begin} on of {piece.path}"
    if source.format == "huggingface" and source.streaming:
        return f"row {row} of shard {piece.begin} of {piece.path}"
    if source.format == "huggingface":
        row += piece.begin
    return f"row {row} of {piece.path}"


def _lines_before(piece: FileRange) -> int:
    """How many lines of the file come before the piece."""
    left, lines = piece.begin, 0
    if not left:
        return 0
    with open(piece.path, "rb") as stream:
        while chunk := stream.read(min(left, MIB)):
            lines += chunk.count(b"\n")
            left -= len(chunk)
    return lines
