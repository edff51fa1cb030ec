"""The event log of a run: one durable JSON line per launch, save, stop, rewind and fault.

Goodput is computed from its times, so every line is fsynced and survives a kill right after it. A
kill may still truncate the last line. Readers accept any content and return only lines that are
valid events, so a damaged log changes no result of a run; the next launch repairs it. The same
helpers serve `metrics.jsonl`. The training loop decides which events to record; only rank 0 writes
the log.
"""

import errno
import logging
import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from data.files import (
    parse_json,
    set_aside,
    strict_json,
    sync_folder,
    write_atomically,
)
from resilience.failed_outputs import FailedOutputs

MAX_PENDING_LINES = 100_000  # lines kept in memory while a disk is full: tens of megabytes
MAX_LINE_BYTES = 2**20  # a longer line is damaged; limits the memory of reading it
PROGRESS_SECONDS = 60.0

IsValid = Callable[[Mapping[str, Any]], bool]
"""Whether a record has all required fields, and no field of another type."""


def json_line(record: Mapping[str, Any]) -> str:
    """Return one line of strict JSON, without the newline.

    JSON has no NaN or infinity: such a value becomes `null`, and a last field `nonfinite` keeps the
    original, e.g. `{"loss": null, "nonfinite": {"loss": "nan"}}`. Nested values become `null` only.
    """
    nonfinite = {
        key: str(value)
        for key, value in record.items()
        if isinstance(value, float) and not math.isfinite(value)
    }
    fields = {key: None if key in nonfinite else value for key, value in record.items()}
    if nonfinite:
        fields["nonfinite"] = nonfinite
    return strict_json(fields, ensure_ascii=False, default=str)


def append_line(path: Path, line: str, *, durable: bool = False) -> None:
    """Append one line, after a newline if the last line was truncated by a kill or a full disk.

    Args:
        durable: Also fsync the file and, if it is new, its folder.

    Raises:
        OSError: The file cannot be written; no part of the line remains in it.
    """
    with open(path, "a+b", buffering=0) as file:  # appends, regardless of the read position
        end = file.seek(0, os.SEEK_END)
        truncated = end > 0 and os.pread(file.fileno(), 1, end - 1) != b"\n"
        rest = (b"\n" if truncated else b"") + line.encode(errors="replace") + b"\n"
        try:
            while rest:
                rest = rest[file.write(rest) :]
            if durable:
                os.fsync(file.fileno())
        except OSError:
            with suppress(OSError):
                file.truncate(end)
            raise
    if durable and end == 0:
        sync_folder(path.parent)


class JsonLines(NamedTuple):
    """Content of a file with one JSON object per line.

    Attributes:
        records: Valid objects.
        lines: Their bytes, without the newline.
        ends: Offset in the file after each of them.
        n_damaged: Number of other lines, repetitions included, without an incomplete last line.
        n_bytes: Size of the file.
    """

    records: list[dict[str, Any]]
    lines: list[bytes]
    ends: list[int]
    n_damaged: int
    n_bytes: int


def scan_json_lines(path: Path, is_valid: IsValid = bool) -> JsonLines:
    """Read a file with one JSON object per line, in bounded memory for each line.

    Raises:
        OSError: The file cannot be read, or is not a regular file.
    """
    if os.path.lexists(path) and not path.is_file():  # reading a named pipe would block
        raise OSError(errno.EINVAL, "not a regular file")
    records: dict[bytes, dict[str, Any]] = {}  # no line is repeated: it has a time or a step
    ends: list[int] = []
    n_damaged = 0
    with path.open("rb") as file:
        for line in _bounded_lines(file):
            content = line.removesuffix(b"\n")
            record = _parse(content)
            if record is not None and is_valid(record) and content not in records:
                records[content] = record
                ends.append(file.tell())
            elif content and line != content:
                n_damaged += 1
        return JsonLines([*records.values()], [*records], ends, n_damaged, file.tell())


def _bounded_lines(file: BinaryIO) -> Iterator[bytes]:
    """Yield the lines of a file with their newlines; replace those that are too long."""
    while line := file.readline(MAX_LINE_BYTES):
        if len(line) == MAX_LINE_BYTES:
            while not line.endswith(b"\n") and line:
                line = file.readline(MAX_LINE_BYTES)
            line = b"too long\n"
        yield line


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        record = parse_json(line)
    except ValueError:  # ValueError: also not UTF-8
        return None
    return record if isinstance(record, dict) else None


def read_json_lines(path: Path, is_valid: IsValid = bool) -> list[dict[str, Any]]:
    """Return the valid JSON objects of a file, one per line; [] if it cannot be read."""
    try:
        return scan_json_lines(path, is_valid).records
    except OSError:
        return []


def repair_json_lines(path: Path, is_valid: IsValid) -> str | None:
    """Keep only the valid lines of a file; return a message if it is damaged.

    A damaged file is kept under another name. Without the incomplete last line that a kill leaves,
    a file is intact.

    Raises:
        OSError: The file cannot be renamed or written.
    """
    if not os.path.lexists(path):
        return None
    try:
        found = scan_json_lines(path, is_valid)
    except OSError as error:
        return start_over(path, error)
    if found.n_damaged:
        return replace_lines(path, found, found.lines)
    end = found.ends[-1] if found.ends else 0
    if end < found.n_bytes:
        os.truncate(path, end)
    return None


def start_over(path: Path, error: OSError) -> str:
    """Keep a file that cannot be read under another name, and return a message.

    Raises:
        OSError: The file cannot be renamed.
    """
    aside = set_aside(path)
    kept = f" and is kept as {aside.name}" if aside else ""
    return f"{path} cannot be read ({error.strerror}){kept}. Continuing with a new file."


def replace_lines(path: Path, found: JsonLines, lines: Sequence[bytes]) -> str | None:
    """Replace a file by some of its lines; if others are damaged, keep it and return a message.

    Raises:
        OSError: The file cannot be renamed or written; it is unchanged.
    """
    content = b"".join(line + b"\n" for line in lines)
    if not found.n_damaged:
        write_atomically(path, content)
        return None
    aside = set_aside(path)
    assert aside is not None, "the file has been read"
    try:
        write_atomically(path, content)
    except OSError:
        with suppress(OSError):
            os.rename(aside, path)
        raise
    return (
        f"{path} is damaged and is kept as {aside.name} (invalid lines: {found.n_damaged}). "
        f"Continuing with its valid lines ({len(lines)})."
    )


# ---------------------------------------------------------------- events

COUNTS = ("step", "to", "last_step")
TIMES = ("began", "last_life")
SECONDS = ("elapsed_seconds", "productive_seconds", "stalled_seconds")


def is_event(record: Mapping[str, Any]) -> bool:
    """Return whether a record has time and event type, and no other field of a wrong type.

    Fields of `COUNTS`, `TIMES` and `SECONDS` may be missing or null.
    """
    return (
        isinstance(record.get("event"), str)
        and is_time(record.get("time"))
        and all(record.get(key) is None or is_count(record[key]) for key in COUNTS)
        and all(record.get(key) is None or is_time(record[key]) for key in TIMES)
        and all(
            record.get(key) is None or (is_number(record[key]) and record[key] >= 0)
            for key in SECONDS
        )
    )


def is_time(value: Any) -> bool:
    """Return whether a value is an ISO 8601 time with its offset from UTC."""
    try:
        return isinstance(value, str) and datetime.fromisoformat(value).tzinfo is not None
    except ValueError:
        return False


def is_count(value: Any) -> bool:
    """Return whether a value is an integer from 0 to 2^53, which JSON keeps exact."""
    return type(value) is int and 0 <= value <= 2**53


def is_number(value: Any) -> bool:
    """Return whether a value is a finite number; an integer may exceed the range of floats."""
    return type(value) in (int, float) and -1e300 < value < 1e300


class RetryingWriter:
    """Append lines to a file, and keep lines that fail in memory for the next attempt.

    A temporarily full disk therefore loses no line, unless the process exits before space is freed.

    Attributes:
        pending: Lines not written yet.
    """

    def __init__(self, path: Path, *, durable: bool = False) -> None:
        self.path, self.durable = path, durable
        self.pending: deque[str] = deque(maxlen=MAX_PENDING_LINES)

    def append(self, line: str) -> None:
        """Write all pending lines and this one.

        Raises:
            OSError: The file still cannot be written; the line stays pending.
        """
        self.pending.append(line)
        while self.pending:
            append_line(self.path, self.pending[0], durable=self.durable)
            self.pending.popleft()


class EventLog:
    """Append events to `ledger.jsonl` and read them.

    A line holds `time` (UTC, ISO 8601 with milliseconds), `event` and the fields of the event. An
    unwritable file or full disk does not stop training.

    Args:
        failed: Receives warnings. Default: they are logged.
    """

    def __init__(self, path: Path, failed: FailedOutputs | None = None) -> None:
        self.path = path
        self._file = RetryingWriter(path, durable=True)
        self._failed = failed or FailedOutputs(path.parent, logging.getLogger(__name__).warning)
        self._next_progress = 0.0

    def append(self, event: str, **fields: Any) -> None:
        """Write one event durably."""
        assert "time" not in fields, "the event log adds the time"
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        with self._warned_on_error():
            self._file.append(json_line({"time": now, "event": event, **fields}))

    def repair(self) -> None:
        """Keep only the valid events of earlier launches, and warn if the file is damaged."""
        with self._warned_on_error():
            if (message := repair_json_lines(self.path, is_event)) is not None:
                self._failed.warn(message)

    @contextmanager
    def _warned_on_error(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._failed.report(self.path.name, error)

    def progress(self, step: int, spent: Mapping[str, Any], *, now: bool = False) -> None:
        """Record the step reached and the time spent, at most once a minute unless `now`."""
        if now or time.monotonic() >= self._next_progress:
            self._next_progress = time.monotonic() + PROGRESS_SECONDS
            self.append("progress", step=step, **spent)

    def read(self) -> list[dict[str, Any]]:
        """Return all valid events in order, with those that could not be written yet."""
        pending = map(parse_json, self._file.pending)
        return [*read_json_lines(self.path, is_event), *pending]
