"""Recognising what a file contains, and rejecting files that the configured format cannot read.

The name of a file is not evidence: a `.jsonl` file may hold Parquet, a `.parquet` file an error
page, a `.txt` file compressed text. Only the first bytes are read (and the last ones of tables).
"""

import codecs
import csv
import glob
import io
import json
import os
import re
import shlex
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple

from data.config import SourceConfig
from data.errors import DataError
from data.sources.compression import SUFFIXES as COMPRESSED
from data.sources.compression import compression_of, decompressed

HEAD_BYTES = 4096
LINES = (".jsonl", ".ndjson")
# Files taken from a folder, by format; `text` takes all.
SUFFIXES = {
    "text": ("",),
    "jsonl": (*LINES, *(lines + packed for lines in LINES for packed in COMPRESSED)),
    "parquet": (".parquet",),
    "arrow": (".arrow",),
}
NAMES = {
    "text": "plain text",
    "jsonl": "JSON lines",
    "parquet": "Parquet",
    "arrow": "Arrow",
}
_EXTRACT, _DECOMPRESS = "extract its files", "decompress it"
_CONVERT, _TEXT_OF = "convert it to Parquet or JSON lines", "extract its text into a .txt file"
# First bytes, what they identify, and what to do with such a file.
_BINARY: tuple[tuple[bytes, str, str], ...] = (
    (b"PARE", "an encrypted Parquet file", "decrypt it"),
    (b"FEA1", "a Feather version 1 file", "convert it to Arrow with `pyarrow.feather`"),
    (b"ORC", "an ORC file", _CONVERT),
    (b"Obj\x01", "an Avro file", _CONVERT),
    (b"SQLite format 3\0", "an SQLite database", _CONVERT),
    (b"\x89HDF\r\n", "an HDF5 file", _CONVERT),
    (b"\x93NUMPY", "a NumPy file", _CONVERT),
    (b"\x80\x02", "a Python pickle", _CONVERT),
    (b"\x80\x03", "a Python pickle", _CONVERT),
    (b"\x80\x04\x95", "a Python pickle", _CONVERT),
    (b"\x80\x05\x95", "a Python pickle", _CONVERT),
    (b"%PDF-", "a PDF document", _TEXT_OF),
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "a Microsoft Office document", _TEXT_OF),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", _EXTRACT),
    (b"Rar!\x1a\x07", "a RAR archive", _EXTRACT),
    (b"\x04\x22\x4d\x18", "LZ4-compressed", "decompress it with `lz4 -d`"),
    (b"\x1f\x9d", "compressed by `compress`", "decompress it with `uncompress`"),
    (b"LZIP", "lzip-compressed", "decompress it with `lzip -d`"),
    (b"\x89PNG\r\n", "a PNG image", "remove it"),
    (b"\xff\xd8\xff", "a JPEG image", "remove it"),
    (b"GIF8", "a GIF image", "remove it"),
    (b"RIFF", "a RIFF media file", "remove it"),
    (b"\x7fELF", "a program", "remove it"),
    (b"MZ\x90\0", "a program", "remove it"),
    (b"version https://git-lfs", "a Git LFS pointer", "download the file with `git lfs pull`"),
)
# In order: the mark of UTF-16 is a prefix of the one of UTF-32.
BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
# Files that describe a dataset, next to its data.
_DOCUMENTATION = re.compile(
    r"(readme|licen[cs]e|copying|notice|citation|changelog|dataset_?card)(\.\w+)?|dataset_infos?\.json",
    re.IGNORECASE,
)
_OBJECT_IN_ARRAY = re.compile(rb'\s*\[\s*\{\s*"(?:[^"\\]|\\.)*"\s*:')
_COLUMN_NAME = re.compile(r"[^\W\d][\w .-]{0,39}")
_CONTROL = [bytes([code]) for code in set(range(32)) - set(b"\a\b\t\n\v\f\r\x1b")]


class Content(NamedTuple):
    """What a file contains.

    Attributes:
        kind: A format of local sources, or `lines`: text with some JSON lines; `records`: text with
            rows that no format reads, such as CSV; `empty`, `other` or `damaged`; or, for text that
            is not UTF-8, its encoding.
        compression: Name of the compression around the content, or None.
        description, remedy: For messages, mostly about the kinds `other` and `damaged`.
    """

    kind: str
    compression: str | None = None
    description: str = ""
    remedy: str = ""


def inspect_files(files: Sequence[Path], text_column: str) -> list[Content]:
    """Return the content of each file, in order.

    Raises:
        OSError: A file cannot be opened.
    """
    if len(files) < 64:
        return [inspect_file(file, text_column) for file in files]
    with ThreadPoolExecutor(16) as pool:  # on network file systems, opening takes the time
        return list(pool.map(lambda file: inspect_file(file, text_column), files))


def inspect_file(path: Path, text_column: str = "text") -> Content:
    """Return what a file contains, from its first bytes.

    Raises:
        OSError: The file cannot be opened.
    """
    with io.BufferedReader(io.FileIO(path), 2**16) as file:
        compression = compression_of(file.peek(16)[:16])
        try:
            head = decompressed(file, HEAD_BYTES).read(HEAD_BYTES)
        except Exception as error:  # of any decompression library
            if isinstance(error, OSError) and error.errno:
                raise
            remedy = f"check it with `{compression} -t`"
            reason = f"a damaged or truncated {compression} file ({str(error) or 'it ends early'})"
            return Content("damaged", compression, reason, remedy)
        content = _identify(head, path, text_column, compression)
        if content.kind in ("parquet", "arrow") and compression is None:
            content = _check_end(file, content, head)
    return content._replace(compression=compression)


def is_documentation(path: Path) -> bool:
    """Return whether a file describes the data next to it, by its name."""
    return bool(_DOCUMENTATION.fullmatch(path.name))


def _identify(head: bytes, path: Path, text_column: str, compression: str | None) -> Content:
    if not head:
        return Content("empty")
    if head.startswith(b"PAR1"):
        return Content("parquet")
    if head.startswith((b"ARROW1", b"\xff\xff\xff\xff")):
        return Content("arrow")
    for magic, description, remedy in _BINARY:
        if head.startswith(magic):
            return Content("other", None, description, remedy)
    if head.startswith((b"PK\3\4", b"PK\5\6")):
        names = (
            ((b"word/", b"xl/", b"ppt/", b"[Content_Types]"), "a Microsoft Office document"),
            ((b"mimetypeapplication/epub",), "an EPUB book"),
            ((b"mimetypeapplication/vnd.oasis",), "an OpenDocument file"),
        )
        found = (name for marks, name in names if any(mark in head for mark in marks))
        document = next(found, None)
        return Content(
            "other", None, document or "a ZIP archive", _TEXT_OF if document else _EXTRACT
        )
    if head[257:262] == b"ustar":
        return Content("other", None, "a tar archive", _EXTRACT)
    for mark, encoding in BYTE_ORDER_MARKS:
        if head.startswith(mark):
            return Content(encoding)
    return _identify_text(head.removeprefix(codecs.BOM_UTF8), path, text_column, compression)


def _identify_text(head: bytes, path: Path, text_column: str, compression: str | None) -> Content:
    if len(head) < HEAD_BYTES and not head.strip():
        return Content("empty")
    if encoding := _unmarked_encoding(head):
        return Content(encoding)
    if len(head) >= 32 and sum(map(head.count, _CONTROL)) > 0.03 * len(head):
        return Content("other", None, "a binary file", "remove it")
    start = head.lstrip()[:15].lower()
    if start.startswith((b"<!doctype html", b"<html")):
        return Content("text", None, "an HTML page", "download the file again")
    if not start.startswith((b"{", b"[")):
        if separator := _csv_separator(head, path, text_column):
            name = "a TSV file" if separator == "\t" else "a CSV file"
            rows = f"csv.DictReader(file, delimiter={separator!r})"
            return Content("records", None, name, _to_lines(rows, "row", path, compression))
        return Content("lines" if _parsed_lines(head) else "text")
    is_named = not {suffix.lower() for suffix in path.suffixes}.isdisjoint(LINES)
    first, end, _ = head.lstrip().partition(b"\n")
    values, n_lines = _parsed_lines(head), len(_complete_lines(head))
    objects = [value for value in values if isinstance(value, dict)]
    has_column = any(isinstance(value.get(text_column), str) for value in objects)
    if objects and len(objects) == n_lines and (n_lines > 1 or is_named or has_column):
        return Content("jsonl")
    if row := _row_of_array(head, text_column):
        remedy = _to_lines("json.load(file)", row, path, compression)
        return Content("records", None, "a JSON array", remedy)
    if end and not values and isinstance(_parse(first.rstrip().removesuffix(b",")), dict):
        remedy = _shell(r"sed 's/,[[:space:]]*$//'", path, compression)
        return Content("records", None, "JSON objects separated by commas", remedy)
    if end and not values and first.rstrip().endswith((b"{", b"[", b",")):
        column = re.escape(json.dumps(text_column, ensure_ascii=False).encode()) + rb"\s*:"
        kind = "records" if start.startswith(b"{") and re.search(column, head) else "text"
        remedy = "write one object per line, as `jq -c .` does"
        return Content(kind, None, "JSON over several lines", remedy)
    if not end and is_named and start.startswith(b"{"):  # the first line is longer than the head
        return Content("jsonl")
    return Content("lines")


def _row_of_array(head: bytes, text_column: str) -> str | None:
    """Return an expression for the JSON line of `row`, an element of a JSON array; None for text.

    Text may start with a bracket, and a JSON line may be an array.
    """
    if _OBJECT_IN_ARRAY.match(head):
        return "row"
    text = head.decode(errors="replace").lstrip()[1:].lstrip()
    with suppress(ValueError, RecursionError):
        element, end = json.JSONDecoder().raw_decode(text)
        if isinstance(element, str) and re.match(r'\s*(,\s*"|\]\s*$)', text[end:]):
            return f"{{{text_column!r}: row}}"
    return None


def _csv_separator(head: bytes, path: Path, text_column: str) -> str | None:
    """Return the separator of a CSV or TSV file with a header, or None for other text.

    The header names the text column (or several columns, in a file with that suffix), and all rows
    have as many fields as the header.
    """
    is_named = not {suffix.lower() for suffix in path.suffixes}.isdisjoint((".csv", ".tsv"))
    lines = head.decode(errors="replace").splitlines(keepends=True)
    for separator in ",\t;":
        try:
            header, *rows = csv.reader(lines, delimiter=separator)
        except csv.Error:
            continue
        if len(head) >= HEAD_BYTES:  # the last row is not complete
            rows = rows[:-1]
        names = [name.strip() if is_named else name for name in header]  # prose has spaces
        if len(set(names)) < len(names) or not all(map(_COLUMN_NAME.fullmatch, names)):
            continue
        has_column = text_column in names and (is_named or (len(names) > 1 and len(rows) > 0))
        is_table = has_column or (is_named and len(names) > 1 and len(rows) > 0)
        if is_table and all(len(row) == len(names) for row in rows if row):
            return separator
    return None


def _to_lines(rows: str, row: str, path: Path, compression: str | None) -> str:
    """Return the remedy that writes JSON lines, from Python expressions of `file` and `row`."""
    start = "import csv; csv.field_size_limit(10**9); " if "csv." in rows else ""
    script = (
        f"{start}import json; file = open(0, encoding='utf-8-sig', newline=''); "
        f"[print(json.dumps({row})) for row in {rows}]"
    )
    return _shell(f'python -c "{script}"', path, compression)


def _shell(command: str, path: Path, compression: str | None) -> str:
    """Return the remedy that converts a file with a shell command."""
    source, target = shlex.quote(str(path)), shlex.quote(f"{path.name.split('.')[0]}.lines.jsonl")
    if compression:
        return f"convert it with `{compression} -dc {source} | {command} > {target}`"
    return f"convert it with `{command} < {source} > {target}`"


def _unmarked_encoding(head: bytes) -> str | None:
    """Return the encoding of UTF-16 or UTF-32 text without a byte order mark, or None."""
    if len(head) < 32:
        return None
    if head.count(0) > 0.7 * len(head):
        return "utf-32-le" if head[0] else "utf-32-be"
    high_first, low_first = (2 * head[first::2].count(0) > 0.8 * len(head) for first in (0, 1))
    if high_first == low_first:
        return None
    return "utf-16-be" if high_first else "utf-16-le"


def _complete_lines(head: bytes) -> list[bytes]:
    *lines, last = head.split(b"\n")
    if len(head) < HEAD_BYTES:
        lines.append(last)
    return [line for line in lines if line.strip()]


def _parsed_lines(head: bytes) -> list[object]:
    """Return the values of the lines that are JSON objects or arrays."""
    values = map(_parse, _complete_lines(head))
    return [value for value in values if isinstance(value, (dict, list))]


def _parse(line: bytes) -> object:
    """Return the value of a JSON line, or None."""
    with suppress(ValueError, RecursionError):
        return json.loads(line)
    return None


def _check_end(file: BinaryIO, content: Content, head: bytes) -> Content:
    """Return the content, or `damaged` if the file does not end as its format requires."""
    magic = head[:4] if content.kind == "parquet" else b"ARROW1"
    if not head.startswith(magic):  # a stream of record batches has no footer
        return content
    size = file.seek(0, os.SEEK_END)
    file.seek(max(size - len(magic), 0))
    if size >= 12 and file.read() == magic:
        return content
    reason = f"not a complete {NAMES[content.kind]} file (its end is missing)"
    return Content("damaged", None, reason, "write or download it again")


def reject_other_formats(
    files: Sequence[Path],
    contents: Sequence[Content],
    source: SourceConfig,
    key: str,
    may_skip: bool = False,
) -> None:
    """Check that every file has content that the format of the source can read.

    Args:
        may_skip: Invalid rows are dropped (`data.invalid_text=skip`), so that some files of lines
            or text may have other content.

    Raises:
        DataError: A file has other content; the message gives its format and the remedy.
    """
    wrong = [i for i, content in enumerate(contents) if not _is_readable(content, source.format)]
    if source.format == "text":
        rows, others = rows_as_text(files, contents)
        wrong = wrong or ([] if others else rows)  # among other files, such as code, they are text
    if not wrong or (may_skip and source.format in ("text", "jsonl") and len(wrong) < len(files)):
        return
    file, content = files[wrong[0]], contents[wrong[0]]
    other = content.kind if content.kind in NAMES and not content.description else None
    expected = f", not {NAMES[source.format]}"
    if content.compression and content.kind in NAMES and source.format in ("parquet", "arrow"):
        what, remedy = f"{content.compression}-compressed", _DECOMPRESS
    elif content.kind == "empty":
        expected = ""
        what, remedy = "empty", "write or download it again, or remove it"
    elif content.kind.startswith("utf"):
        encoding = content.kind.upper().replace("-BE", "BE").replace("-LE", "LE")
        what, expected = f"{encoding} text", ", not UTF-8"
        remedy = f"convert it with `iconv -f {encoding} -t UTF-8 {file} > NEW_FILE`"
    elif other is None:
        what, remedy = content.description, content.remedy
    else:
        what = _describe(other, content)
        remedy = f"use {format_override(source, key, other, file)}"
        good = [each for i, each in enumerate(files) if i not in set(wrong)]
        if good and glob.has_magic(str(source.path)):
            remedy = (
                f"use {key}.path={good[0].parent}/*{full_suffix(good[0])}, or move it elsewhere"
            )
        elif good:
            remedy += f" for such files, or move them out of {source.path}"
    if content.kind == "damaged":  # an archive or a table of which only the start can be read
        raise DataError(f"{key}.path: {file}: cannot read; {file.name} is {what}; {remedy}")
    if content.kind == "records" and source.format != "jsonl":
        named = key == f"data.sources.{source.format}"
        remedy += f" and use {'data' if named else f'{key}.format'}=jsonl"
    if len(wrong) < len(files) and other is None:
        remedy += f", or move it out of {source.path}"
    also = f" (also {len(wrong) - 1:,} of the other {len(files) - 1:,} files)" * (len(wrong) > 1)
    raise DataError(f"{key}.path: {file} is {what}{expected}{also}; {remedy}")


def _is_readable(content: Content, format_: str) -> bool:
    kind = content.kind
    if format_ in ("parquet", "arrow"):
        return kind == format_ and content.compression is None
    if format_ == "jsonl":
        return kind in ("jsonl", "lines", "empty")
    return kind in ("text", "jsonl", "lines", "records", "empty", "utf-16", "utf-32")


def rows_as_text(files: Sequence[Path], contents: Sequence[Content]) -> tuple[list[int], list[int]]:
    """Return the indices of files that hold rows, such as JSON lines or CSV, and of other text.

    Empty files and documentation are neither.
    """
    rows, others = list[int](), list[int]()
    for index, (file, content) in enumerate(zip(files, contents, strict=True)):
        if content.kind in ("jsonl", "records"):
            rows.append(index)
        elif content.kind != "empty" and not is_documentation(file):
            others.append(index)
    return rows, others


def _describe(kind: str, content: Content) -> str:
    article = {"parquet": "a Parquet file", "arrow": "an Arrow file"}.get(kind, NAMES[kind])
    return f"{content.compression}-compressed {NAMES[kind]}" if content.compression else article


def format_override(source: SourceConfig, key: str, format_: str, file: Path) -> str:
    """Return the command-line arguments that read a file of a source in another format.

    A folder gives only the files with a suffix of the format, a glob all files that it matches.
    """
    path = str(source.path)
    named = file.name.lower().endswith(SUFFIXES[format_])
    if Path(path).expanduser().is_dir() and not (named and format_ != "text"):
        path = f"{path.rstrip('/')}/**/*{full_suffix(file)}"
    if key == f"data.sources.{source.format}":  # the source of the group `data=FORMAT`
        return f"data={format_} data.sources.{format_}.path={path}"
    return f"{key}.format={format_}" + f" {key}.path={path}" * (path != source.path)


def full_suffix(file: Path) -> str:
    """Return the suffix of a file, with the one of its compression, like `.json.gz`."""
    n_suffixes = 2 if file.suffix in COMPRESSED else 1
    return "".join(file.suffixes[-n_suffixes:])
