"""Documents of a source, one string each, read through Hugging Face `datasets`.

Everything streams: memory stays bounded, local formats never touch the network nor the user's
dataset cache. Files come in sorted order, so a source is the same sequence on every machine.
What is done with a document is left to `data.prepare`.
"""

import glob
import json
import os
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path

import datasets

from data.config import SourceConfig
from data.errors import DataError

# What a folder contributes: text takes every file in it.
SUFFIXES = {"text": ("",), "jsonl": (".jsonl", ".ndjson"), "parquet": (".parquet",)}
NOT_LIBRARY = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


def documents(source: SourceConfig, key: str = "data.sources.<name>") -> Iterator[str]:
    """The source's documents in their stored order; a null text counts as an empty document.

    Args:
        source: what to read
        key: its place in the configuration, for messages

    Raises:
        DataError: nothing to read, no such column, bytes that are not UTF-8, text that is none.
    """
    datasets.disable_progress_bars()  # each would draw over the preparation's own
    if source.format == "huggingface":
        yield from _hub_documents(source, key)
        return
    files = source_files(source, key)
    with tempfile.TemporaryDirectory(prefix="llamesh-") as cache:  # for the library's lock files
        if source.format == "jsonl":
            for file in files:
                yield from _json_documents(file, source.text_column, cache, key)
        elif source.format == "parquet":
            for file in files:
                yield from _parquet_documents(file, source.text_column, cache, key)
        else:
            yield from _text_documents(files, cache, key)


def source_files(source: SourceConfig, key: str = "data.sources.<name>") -> list[Path]:
    """The files of a local source, sorted.

    Raises:
        DataError: the path names no file.
    """
    if source.format == "stdlib":
        root = Path(sysconfig.get_paths()["stdlib"])
        return sorted(
            file
            for file in root.rglob("*.py")
            if not NOT_LIBRARY.intersection(file.relative_to(root).parts)
        )
    assert source.path is not None
    path = Path(source.path).expanduser()
    suffixes = SUFFIXES[source.format]
    if path.is_file():
        return [path]
    if path.is_dir():
        files = [
            file
            for file in path.rglob("*")
            if file.is_file()
            and file.name.endswith(suffixes)
            and not any(part.startswith(".") for part in file.relative_to(path).parts)
        ]
        what = "a folder without a " + (" or ".join(suffixes).strip() or "visible") + " file"
    else:
        files = [Path(name) for name in glob.glob(str(path), recursive=True)]
        files = [file for file in files if file.is_file()]
        what = "no file, folder or glob that matches one"
    if not files:
        raise DataError(
            f"{key}.path ({source.path}) is {what}, seen from {Path.cwd()}: name an existing one"
        )
    return sorted(files)


def _stream(
    builder: str, files: list[Path], cache: str, sample_by: str | None = None
) -> datasets.IterableDataset:
    """The rows of local files through one of the library's own readers."""
    names = [glob.escape(os.path.abspath(file)) for file in files]  # a name may hold a `[`
    options = {} if sample_by is None else {"sample_by": sample_by}
    return datasets.load_dataset(
        builder, data_files=names, split="train", streaming=True, cache_dir=cache, **options
    )


def _text_documents(files: list[Path], cache: str, key: str) -> Iterator[str]:
    """Each file one document, line ends as `\\n`."""
    try:
        for row in _stream("text", files, cache, sample_by="document"):
            yield row["text"]
    except UnicodeDecodeError:
        raise DataError(_not_utf8(files, key)) from None


def _json_documents(file: Path, column: str, cache: str, key: str) -> Iterator[str]:
    """One JSON object a line.

    The library's own JSON reader fixes the columns' types by the first rows and fails on later
    ones that differ in columns of no interest here, so its line reader is used instead.
    """
    try:
        for number, row in enumerate(_stream("text", [file], cache, sample_by="line"), start=1):
            if not row["text"].strip():
                continue
            place = f"{key}.path: line {number} of {file}"
            try:
                values = json.loads(row["text"])
            except json.JSONDecodeError as error:
                raise DataError(
                    f"{place} is not JSON ({error.msg}): write one object a line"
                ) from None
            if not isinstance(values, dict):
                raise DataError(
                    f"{place} is a {type(values).__name__}, not a JSON object: "
                    f'write {{"{column}": "…"}}'
                )
            yield _text_of(values, column, place, key)
    except UnicodeDecodeError:
        raise DataError(_not_utf8([file], key)) from None


def _parquet_documents(file: Path, column: str, cache: str, key: str) -> Iterator[str]:
    """The text column of one Parquet file, row group by row group."""
    import pyarrow

    place = f"{key}.path: {file}"
    try:
        rows = _stream("parquet", [file], cache)
        columns = rows.column_names
        if columns is not None and column in columns:
            rows = rows.select_columns([column])
        for number, row in enumerate(rows, start=1):
            yield _text_of(row, column, f"{place}, row {number},", key)
    except pyarrow.ArrowInvalid as error:
        raise DataError(
            f"{place} is not a whole Parquet file ({_first_line(error)}): write it again"
        ) from None
    except UnicodeDecodeError:
        raise DataError(f"{place}: column {column} holds bytes that are not UTF-8") from None


def _hub_documents(source: SourceConfig, key: str) -> Iterator[str]:
    """A dataset by name, or a local folder that is laid out like one."""
    try:
        rows = datasets.load_dataset(
            source.path,
            name=source.name,
            split=source.split,
            revision=source.revision,
            streaming=True,
        )
        rows = iter(rows)
        row = next(rows, None)
    except Exception as error:  # the library raises whatever its file systems raise
        raise DataError(
            f"{key}.path ({source.path}) cannot be read as a dataset "
            f"(name={source.name}, split={source.split}, revision={source.revision}; "
            f"{_first_line(error)}): check these, the network, and that it is public"
        ) from error
    number = 1
    while row is not None:
        place = f"{key}.path ({source.path}): row {number}"
        yield _text_of(row, source.text_column, place, key)
        row = next(rows, None)
        number += 1


def _text_of(row: dict[str, object], column: str, place: str, key: str) -> str:
    """The text of one row, checked."""
    if column not in row:
        raise DataError(
            f"{key}.text_column ({column}) is no column at {place.removeprefix(key + '.')}: "
            f"use one of {', '.join(map(str, row))}"
        )
    text = row[column]
    if text is None:
        return ""
    if not isinstance(text, str):
        raise DataError(
            f"{place} holds a {type(text).__name__} in {column}, not text: "
            f"choose another {key}.text_column"
        )
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise DataError(
                f"{place} holds half of a surrogate pair in {column}, which is not Unicode text: "
                "repair or remove it"
            ) from None
    return text


def _not_utf8(files: list[Path], key: str) -> str:
    """The message for the first file that does not decode."""
    for file in files:
        with open(file, "rb") as stream:
            for number, line in enumerate(stream, start=1):
                try:
                    line.decode()
                except UnicodeDecodeError as error:
                    return (
                        f"{key}.path: line {number} of {file} is not UTF-8 "
                        f"(byte 0x{line[error.start]:02x}): convert the file to UTF-8"
                    )
    return f"{key}.path: the files changed while they were read: start again"


def _first_line(error: Exception) -> str:
    """A foreign error in one line."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__
