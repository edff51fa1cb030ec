"""The event log of a run: one durable JSON line per launch, save, stop, rewind and fault.

Goodput is computed from its times, so every line is fsynced and survives a kill right after it. A
kill may still truncate the last line; the next append starts a new line, and readers skip the
truncated one. `metrics.jsonl` uses the same file helpers. The training loop decides which events
to record; only rank 0 writes the log.
"""

import json
import logging
import math
import os
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from data.files import strict_json, sync_folder, write_problem

MAX_PENDING_LINES = 100_000  # lines kept in memory while a disk is full: tens of megabytes
PROGRESS_SECONDS = 60.0


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


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Return all complete JSON objects of a file, one per line; [] if the file does not exist."""
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        return []
    records = []
    for line in raw.split(b"\n"):
        with suppress(ValueError):  # truncated JSON or UTF-8, or zeros that were never written
            records.append(json.loads(line))
    return [record for record in records if isinstance(record, dict)]


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
        self.path.parent.mkdir(parents=True, exist_ok=True)
        while self.pending:
            append_line(self.path, self.pending[0], durable=self.durable)
            self.pending.popleft()


class EventLog:
    """Append events to `ledger.jsonl` and read them.

    A line holds `time` (UTC, ISO 8601 with milliseconds), `event` and the fields of the event. An
    unwritable file or full disk does not stop training: `warn` is called once.
    """

    def __init__(self, path: Path, warn: Callable[[str], None] | None = None) -> None:
        self.path = path
        self._file = RetryingWriter(path, durable=True)
        self._warn = warn or logging.getLogger(__name__).warning
        self._warned = False
        self._next_progress = 0.0

    def append(self, event: str, **fields: Any) -> None:
        """Write one event durably."""
        assert "time" not in fields, "the event log adds the time"
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        try:
            self._file.append(json_line({"time": now, "event": event, **fields}))
        except OSError as error:
            if not self._warned:
                self._warned = True
                problem = write_problem(error, self.path.parent)
                self._warn(
                    f"{self.path} cannot be written ({problem}). Training continues; events "
                    "are kept in memory until the folder is writable and has space."
                )

    def progress(self, step: int, spent: Mapping[str, Any], *, now: bool = False) -> None:
        """Record the step reached and the time spent, at most once a minute unless `now`."""
        if now or time.monotonic() >= self._next_progress:
            self._next_progress = time.monotonic() + PROGRESS_SECONDS
            self.append("progress", step=step, **spent)

    def read(self) -> list[dict[str, Any]]:
        """Return all complete events in the order written."""
        return read_json_lines(self.path)
