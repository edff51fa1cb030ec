"""What a source is read from: its files or dataset, cut into parts that are prepared one by one.

The cut depends on the input alone (names, sizes, where lines, row groups and record batches end),
never on how many workers there are. Files come in sorted order, so a source is the same sequence
on every machine. Local formats touch neither the network nor the user's dataset cache. How the
rows of a part are read is left to `data.sources.rows`.
"""

import glob
import hashlib
import os
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.config import SourceConfig
from data.errors import DataError

COMPRESSED = {".gz": "gzip", ".zst": "zstd"}
_LINES = (".jsonl", ".ndjson")
# What a folder contributes: text takes every file in it.
SUFFIXES = {
    "text": ("",),
    "jsonl": (*_LINES, *(lines + packed for lines in _LINES for packed in COMPRESSED)),
    "parquet": (".parquet",),
    "arrow": (".arrow",),
}
NOT_LIBRARY = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
MIB = 2**20
# A source is cut into about 64 parts, for many workers; the largest fills one shard of tokens.
N_PARTS, MIN_PART_BYTES, MAX_PART_BYTES = 64, MIB, 256 * MIB
ARROW_FILE = b"ARROW1"  # how an Arrow file begins; a stream of record batches begins otherwise


@dataclass(frozen=True)
class FileRange:
    """A stretch of a file or a dataset: from `begin` to `end`, or to its end where that is None.

    Counted in bytes (JSON lines, cut at line ends), row groups (Parquet), record batches (Arrow),
    rows (a downloaded dataset) or shards (a streamed one); text and what is compressed stay whole.
    `n_bytes` is what of the input it takes, or an estimate; 0 where nobody knows.
    """

    path: str
    begin: int
    end: int | None
    n_bytes: int


@dataclass(frozen=True)
class Part:
    """What one worker prepares at a time: pieces of a source, in order."""

    source: str
    number: int
    pieces: tuple[FileRange, ...]

    @property
    def n_bytes(self) -> int:
        """Bytes of the input, or 0 where nobody knows."""
        return sum(piece.n_bytes for piece in self.pieces)


@dataclass(frozen=True)
class Corpus:
    """A source, found and cut: what it is (a hash, or a dataset's commit), and its parts.

    `dataset` is the library's own object, downloaded or streamed, for format `huggingface`.
    """

    revision: str
    parts: tuple[Part, ...]
    dataset: Any = None


def find(name: str, source: SourceConfig) -> Corpus:
    """Finds what the source of this name is read from, and cuts it into parts.

    Raises:
        DataError: there is nothing to read, or not in this format.
    """
    key = f"data.sources.{name}"
    if source.format == "huggingface":
        return _hub_corpus(name, source, key)
    try:
        files = source_files(source, key)
        sizes = [file.stat().st_size for file in files]
        part_bytes = min(max(sum(sizes) // N_PARTS, MIN_PART_BYTES), MAX_PART_BYTES)
        pieces = (
            piece
            for file, size in zip(files, sizes, strict=True)
            for piece in _pieces(file, size, part_bytes, source.format, key)
        )
        return Corpus(_revision(files, sizes), tuple(_grouped(name, pieces, part_bytes)))
    except OSError as error:
        raise DataError(f"{key}.path ({source.path}) cannot be read ({error})") from error


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


def open_arrow(path: str) -> Any:
    """A memory-mapped Arrow file, or stream, as a reader of record batches."""
    import pyarrow

    mapped = pyarrow.memory_map(path)
    is_file = mapped.read(len(ARROW_FILE)) == ARROW_FILE
    mapped.seek(0)
    return pyarrow.ipc.open_file(mapped) if is_file else pyarrow.ipc.open_stream(mapped)


def first_line(error: Exception) -> str:
    """A foreign error in one line."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__


def _revision(files: list[Path], sizes: list[int]) -> str:
    """SHA-256 over the files' names, from the folder that they share, and sizes."""
    base = os.path.commonpath([file.absolute().parent for file in files])
    digest = hashlib.sha256()
    for file, size in zip(files, sizes, strict=True):
        name = file.absolute().relative_to(base).as_posix()
        digest.update(os.fsencode(name) + b"\0%d\0" % size)
    return digest.hexdigest()


def _grouped(name: str, pieces: Iterable[FileRange], part_bytes: int) -> Iterator[Part]:
    """Parts of neighbouring pieces, each of `part_bytes` or a little more."""
    number, group, n_bytes = 0, list[FileRange](), 0
    for piece in pieces:
        group.append(piece)
        n_bytes += piece.n_bytes
        if n_bytes >= part_bytes:
            yield Part(name, number, tuple(group))
            number, group, n_bytes = number + 1, [], 0
    if group:
        yield Part(name, number, tuple(group))


def _pieces(file: Path, size: int, part_bytes: int, format_: str, key: str) -> Iterator[FileRange]:
    """A file whole, or a large one cut where its format allows."""
    path = str(file.absolute())
    plain_lines = format_ == "jsonl" and file.suffix not in COMPRESSED
    if plain_lines and size > part_bytes:
        yield from _line_pieces(path, size, part_bytes)
    elif format_ in ("parquet", "arrow") and size > part_bytes:
        try:
            sizes = _row_group_sizes(path) if format_ == "parquet" else _batch_sizes(path)
        except (OSError, ValueError) as error:  # pyarrow.ArrowInvalid is a ValueError
            raise DataError(
                f"{key}.path: {path} is not a whole {format_.capitalize()} file "
                f"({first_line(error)}): write it again"
            ) from None
        yield from _counted_pieces(path, size, sizes, part_bytes)
    else:
        yield FileRange(path, 0, size if plain_lines else None, size)


def _line_pieces(path: str, size: int, part_bytes: int) -> Iterator[FileRange]:
    """Byte ranges of about `part_bytes`, each ending with a line."""
    with open(path, "rb") as stream:
        begin = 0
        while begin < size:
            stream.seek(begin + part_bytes - 1)
            while (read := stream.readline(MIB)) and not read.endswith(b"\n"):
                pass
            end = min(stream.tell(), size) if read else size
            yield FileRange(path, begin, end, end - begin)
            begin = end


def _counted_pieces(path: str, size: int, sizes: list[int], part_bytes: int) -> Iterator[FileRange]:
    """Runs of row groups or record batches; a run's share of the file goes by their `sizes`."""
    total = max(sum(sizes), 1)
    begin = before = done = 0
    for number, each in enumerate(sizes, start=1):
        done += each
        n_bytes = (done - before) * size // total
        if n_bytes >= part_bytes or number == len(sizes):
            yield FileRange(path, begin, number, n_bytes)
            begin, before = number, done


def _row_group_sizes(path: str) -> list[int]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        groups = range(file.metadata.num_row_groups)
        return [file.metadata.row_group(group).total_byte_size for group in groups]


def _batch_sizes(path: str) -> list[int]:
    """Of a memory-mapped file, so that the batches themselves are not read."""
    reader = open_arrow(path)
    if hasattr(reader, "num_record_batches"):
        return [1] * reader.num_record_batches
    return [batch.nbytes for batch in reader]


def _hub_corpus(name: str, source: SourceConfig, key: str) -> Corpus:
    """A dataset by name, or a local folder that is laid out like one."""
    import datasets

    datasets.disable_progress_bars()  # each would draw over the preparation's own
    try:
        builder = datasets.load_dataset_builder(
            source.path, name=source.name, revision=source.revision
        )
        if source.streaming:
            dataset = builder.as_streaming_dataset(split=source.split)
            n_shards = dataset.num_shards
            n_bytes = (builder.info.dataset_size or 0) // n_shards
            pieces = [FileRange(str(source.path), i, i + 1, n_bytes) for i in range(n_shards)]
        else:
            builder.download_and_prepare()
            dataset = builder.as_dataset(split=source.split)
            n_rows, size = len(dataset), dataset.data.nbytes
            part_bytes = min(max(size // N_PARTS, MIN_PART_BYTES), MAX_PART_BYTES)
            rows = max(n_rows * part_bytes // max(size, 1), 1)
            pieces = [
                FileRange(str(source.path), i, min(i + rows, n_rows), size * rows // n_rows)
                for i in range(0, n_rows, rows)
            ]
    except Exception as error:  # the library raises whatever its file systems raise
        raise DataError(
            f"{key}.path ({source.path}) cannot be read as a dataset "
            f"(name={source.name}, split={source.split}, revision={source.revision}; "
            f"{first_line(error)}): check these, the network, and that it is public"
        ) from error
    parts = [Part(name, number, (piece,)) for number, piece in enumerate(pieces)]
    return Corpus(_hub_revision(builder), tuple(parts), dataset)


def _hub_revision(builder: Any) -> str:
    """A dataset's commit; of a local one, whose hash in the library tells nothing, as of files."""
    names = [name for files in (builder.config.data_files or {}).values() for name in files]
    files = [Path(name) for name in names]
    if files and all(file.is_file() for file in files):
        return _revision(files, [file.stat().st_size for file in files])
    return str(builder.hash)
