"""The rows of a part, one after the other, each judged: text, or why it is none.

What does not meet the source's `filter` is left out, and what is not text meets the policy
`data.invalid_text`. How each format is read is left to `data.sources.reading`.
"""

import operator
import re
from collections.abc import Callable, Iterator
from numbers import Number
from typing import Any, Literal, NamedTuple

from data.config import SourceConfig
from data.errors import DataError
from data.sources.corpora import FileRange, Part, first_line
from data.sources.reading import RawRow, RowPosition, describe_location, read

Policy = Literal["strict", "replace", "skip"]
Outcome = Literal["text", "replaced", "empty", "filtered", "skipped"]
_SURROGATE = re.compile(r"[\ud800-\udfff]")
_COMPARE: dict[str, Callable[[Any, Any], bool]] = {
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "in": lambda found, options: found in options,
    "not in": lambda found, options: found not in options,
}


class Row(NamedTuple):
    """One row: its text (`text` and `replaced` alone), the text as UTF-8, and what comes after."""

    outcome: Outcome
    text: str
    content: bytes
    after: RowPosition
    n_bytes: int  # of the input, an estimate


def rows(
    part: Part,
    source: SourceConfig,
    policy: Policy = "strict",
    dataset: Any = None,
    start: RowPosition = RowPosition(),  # noqa: B008 (a tuple)
) -> Iterator[Row]:
    """The rows of a part from a position on.

    Args:
        dataset: the library's own object, for format `huggingface`

    Raises:
        DataError: what cannot be read, a row that does not compare with the filter and, under
            `strict`, a row whose text is none; it names file and row.
    """
    key = f"data.sources.{part.source}"
    for number in range(start.piece, len(part.pieces)):
        piece = part.pieces[number]
        begin = start if number == start.piece else RowPosition()
        last = begin.row
        try:
            for raw in read(piece, source, dataset, begin):
                last = raw.row
                outcome, text, content = _judged(raw, source, policy, piece, key)
                after = RowPosition(number, raw.row, raw.offset)
                yield Row(outcome, text, content, after, raw.n_bytes)
        except DataError:
            raise
        except Exception as error:  # of the file system, the format or the library
            raise DataError(
                f"{key}.path: {piece.path} cannot be read after row {last} ({first_line(error)}): "
                "see that it is whole, or write it again"
            ) from error


def _judged(
    raw: RawRow, source: SourceConfig, policy: Policy, piece: FileRange, key: str
) -> tuple[Outcome, str, bytes]:
    """What becomes of a row: outcome, text, and the text as UTF-8."""
    readable = bool(raw.values) or not raw.problem
    if source.filter and readable and not _meets_all(raw, source, piece, key):
        return "filtered", "", b""
    text, content, problem = _text_of(raw, source)
    if not problem:
        return ("text" if text else "empty"), text or "", content
    if policy == "strict":
        place = describe_location(piece, source, raw.row)
        if readable and source.text_column not in raw.values:
            raise DataError(
                f"{key}.text_column ({source.text_column}) {problem} at {place}: "
                f"use one of {', '.join(map(str, raw.columns or raw.values))}"
            )
        raise DataError(
            f"{key}.path: {place} {problem}: repair it, choose another {key}.text_column, or set "
            "data.invalid_text to replace (what can be repaired) or to skip"
        )
    if policy == "replace" and text is not None:
        return ("replaced" if text else "empty"), text, content
    return "skipped", "", b""


def _text_of(raw: RawRow, source: SourceConfig) -> tuple[str | None, bytes, str]:
    """The text of a row, repaired (None where there is none), as UTF-8, and what was wrong."""
    column, problem = source.text_column, raw.problem
    if column not in raw.values:
        return None, b"", problem or "is no column"
    text = raw.values[column]
    if text is None:
        return "", b"", problem
    if isinstance(text, bytes):
        try:
            text = text.decode()
        except UnicodeDecodeError as error:
            line = text.count(b"\n", 0, error.start) + 1
            problem = f"is not UTF-8 (byte 0x{text[error.start]:02x} in line {line} of its text)"
            text = text.decode(errors="replace")
    if not isinstance(text, str):
        return None, b"", f"holds a {type(text).__name__} in {column}, not text"
    if source.format in ("stdlib", "text"):
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    try:
        content = text.encode()
    except UnicodeEncodeError:
        problem = f"holds half of a surrogate pair in {column}, which is not Unicode text"
        text = _SURROGATE.sub("\ufffd", text)
        content = text.encode()
    if b"\0" in content:
        problem = problem or f"holds a NUL character in {column}"
        text = text.replace("\0", "\ufffd")
        content = text.encode()
    return text, content, problem


def _meets_all(raw: RawRow, source: SourceConfig, piece: FileRange, key: str) -> bool:
    """Whether a row meets every condition of the filter; null meets `!=` and `not in` alone."""
    for column, operation, value in source.filter or []:
        # A row of a table has every column; in JSON a key that is not there says null.
        if column not in raw.values and source.format != "jsonl":
            raise DataError(
                f"{key}.filter ({column} {operation} {value}): {column} is no column at "
                f"{describe_location(piece, source, raw.row)}: use one of "
                f"{', '.join(map(str, raw.columns or raw.values))}"
            )
        found = raw.values.get(column)
        if found is None:
            met = operation in ("!=", "not in")
        else:
            options = value if isinstance(value, list) else [value]
            if options and _kind(found) not in map(_kind, options):
                where = describe_location(piece, source, raw.row)
                raise DataError(
                    f"{key}.filter ({column} {operation} {value}): {where} holds a "
                    f"{_kind(found)} in {column}, which does not compare with a "
                    f"{_kind(options[0])}: change the condition"
                )
            met = _COMPARE[operation](found, value)
        if not met:
            return False
    return True


def _kind(value: Any) -> str:
    """What a value compares with: true and false are no numbers here."""
    if isinstance(value, bool):
        return "truth value"
    if isinstance(value, Number):
        return "number"
    return "text" if isinstance(value, str) else type(value).__name__
