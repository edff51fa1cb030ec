"""The rows of a part, filtered and checked for valid text.

Rows that do not meet the source's `filter` are dropped; invalid text is handled according to
`data.invalid_text`. `data.sources.reading` reads the formats.
"""

import operator
import re
from collections.abc import Callable, Iterator
from functools import partial
from numbers import Number
from pathlib import Path
from typing import Any, Literal, NamedTuple

from data.config import SourceConfig
from data.errors import DataError, first_line
from data.sources.compression import COMMANDS
from data.sources.content import BYTE_ORDER_MARKS
from data.sources.corpora import Part
from data.sources.reading import RawRow, RowPosition, describe_location, read_rows

Policy = Literal["strict", "replace", "skip"]
Outcome = Literal["text", "replaced", "empty", "filtered", "skipped"]
Locate = Callable[[int], str]  # location of a row for messages
_SURROGATE = re.compile(r"[\ud800-\udfff]")
_COMPARE: dict[str, Callable[[Any, Any], bool]] = {
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "in": lambda value, options: value in options,
    "not in": lambda value, options: value not in options,
}


class Row(NamedTuple):
    """One row.

    Attributes:
        text: The text for outcomes `text` and `replaced`, otherwise empty.
        content: The text as UTF-8.
        after: Position after this row.
        n_bytes: Input size in bytes, estimated.
    """

    outcome: Outcome
    text: str
    content: bytes
    after: RowPosition
    n_bytes: int


def rows(
    part: Part,
    source: SourceConfig,
    policy: Policy = "strict",
    dataset: Any = None,
    start: RowPosition = RowPosition(),  # noqa: B008 (immutable)
) -> Iterator[Row]:
    """Read the rows of a part from a position on.

    Args:
        dataset: Object of the `datasets` library, for format `huggingface`.

    Raises:
        DataError: The input cannot be read, a value cannot be compared with the filter, or (if
            `strict`) a row has no valid text; the message names file and row.
    """
    key = f"data.sources.{part.source}"
    for index in range(start.file_range, len(part.ranges)):
        file_range = part.ranges[index]
        position = start if index == start.file_range else RowPosition()
        n_read, locate = position.row, partial(describe_location, file_range, source)
        try:
            for raw in read_rows(file_range, source, dataset, position):
                n_read = raw.row
                after = RowPosition(index, raw.row, raw.offset)
                yield Row(*_check(raw, source, policy, locate, key), after, raw.n_bytes)
        except DataError:
            raise
        except Exception as error:  # from the file system, the format or the library
            tool = COMMANDS.get(Path(file_range.path).suffix)
            remedy = f"check it with `{tool} -t`" if tool else "write it again"
            raise DataError(
                f"{key}.path: {file_range.path}: cannot read after row {n_read} "
                f"({first_line(error)}). The file may be truncated; {remedy}."
            ) from error


def _check(
    raw: RawRow, source: SourceConfig, policy: Policy, locate: Locate, key: str
) -> tuple[Outcome, str, bytes]:
    """Return the outcome of a row, its text, and the text as UTF-8."""
    readable = bool(raw.values) or not raw.error
    if source.filter and readable and not _meets_filter(raw, source, locate, key):
        return "filtered", "", b""
    text, content, error = _extract_text(raw, source)
    if not error:
        return ("text" if text else "empty"), text or "", content
    if policy == "strict":
        if readable and source.text_column not in raw.values:
            raise DataError(
                f"{key}.text_column={source.text_column} {error} at {locate(raw.row)}; "
                f"use one of {raw.choices}"
            )
        is_file = source.format in ("stdlib", "text")
        remedy = "convert it to UTF-8" if is_file else "repair it"
        if readable and not is_file:
            remedy += f", use another {key}.text_column"
        raise DataError(
            f"{key}.path: {locate(raw.row)} {error}; {remedy}, or set data.invalid_text to "
            "replace (repairs invalid characters) or skip"
        )
    if policy == "replace" and text is not None:
        return ("replaced" if text else "empty"), text, content
    return "skipped", "", b""


def _extract_text(raw: RawRow, source: SourceConfig) -> tuple[str | None, bytes, str]:
    """Return the text of a row, repaired (None if not repairable), as UTF-8, and the error."""
    column, error = source.text_column, raw.error
    if column not in raw.values:
        return None, b"", error or "is not a column"
    text = raw.values[column]
    if text is None:
        return "", b"", error
    if isinstance(text, bytes):
        encoding = "utf-8"
        if source.format in ("stdlib", "text"):
            marks = (name for mark, name in BYTE_ORDER_MARKS if text.startswith(mark))
            encoding = next(marks, encoding)
        try:
            text = text.decode(encoding)
        except UnicodeDecodeError as exception:
            start = exception.start
            line = text.count(b"\n", 0, start) + 1
            name = encoding.upper()
            error = f"is not {name} (byte 0x{text[start]:02x} in line {line} of its text)"
            text = text.decode(encoding, errors="replace")
    if not isinstance(text, str):
        return None, b"", f"has a {type(text).__name__} in {column}, not text"
    if source.format in ("stdlib", "text"):
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    try:
        content = text.encode()
    except UnicodeEncodeError:
        error = f"has an unpaired surrogate in {column}, which is not Unicode text"
        text = _SURROGATE.sub("\ufffd", text)
        content = text.encode()
    if b"\0" in content:
        error = error or f"has a NUL character in {column}"
        text = text.replace("\0", "\ufffd")
        content = text.encode()
    return text, content, error


def _meets_filter(raw: RawRow, source: SourceConfig, locate: Locate, key: str) -> bool:
    """Return whether a row meets every condition; null meets only `!=` and `not in`."""
    for column, operation, expected in source.filter or []:
        condition = f"{key}.filter=({column} {operation} {expected})"
        # Table rows have every column; a key absent from a JSON object counts as null.
        if column not in raw.values and source.format != "jsonl":
            raise DataError(
                f"{condition}: {column} is not a column at {locate(raw.row)}; use one of "
                f"{raw.choices}"
            )
        value = raw.values.get(column)
        options = expected if isinstance(expected, list) else [expected]
        if value is not None and options and _kind(value) not in map(_kind, options):
            raise DataError(
                f"{condition}: {locate(raw.row)} has a {_kind(value)} in {column}, which cannot be "
                f"compared with a {_kind(options[0])}; change the condition"
            )
        negative = operation in ("!=", "not in")
        if not (negative if value is None else _COMPARE[operation](value, expected)):
            return False
    return True


def _kind(value: Any) -> str:
    """Return the comparable kind of a value; booleans are not numbers here."""
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, Number):
        return "number"
    return "text" if isinstance(value, str) else type(value).__name__
