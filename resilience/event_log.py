"""The run's ledger: one durable JSON line for each start, save, stop, fallback and fault.

From its times the run's goodput is computed, so a line must survive the kill that follows it:
each is fsynced. A kill may still tear the last line; the next one begins on a line of its own and
the torn one is skipped on reading. The file helpers below serve `metrics.jsonl` too. What is
worth a line is decided by the training loop; only rank 0 keeps a ledger.
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

MAX_WAITING = 100_000  # lines kept in memory while a disk is full: tens of megabytes
PROGRESS_SECONDS = 60.0


def json_line(record: Mapping[str, Any]) -> str:
    """One line of strict JSON, without the newline.

    JSON has no NaN or infinity: such a value becomes `null`, and the line gains a last field
    `nonfinite` that keeps what it was, e.g. `{"loss": null, "nonfinite": {"loss": "nan"}}`.
    """
    nonfinite = {
        key: str(value)
        for key, value in record.items()
        if isinstance(value, float) and not math.isfinite(value)
    }
    fields = {key: None if key in nonfinite else value for key, value in record.items()}
    if nonfinite:
        fields["nonfinite"] = nonfinite
    return json.dumps(fields, ensure_ascii=False, allow_nan=False, default=str)


def append_line(path: Path, line: str, *, durable: bool = False) -> None:
    """Append one line; after a torn last line (a kill, a full disk) begin a new one first.

    `durable` also forces the line, and the name of a file just made, to the disk.
    Raises OSError when the file cannot be written; then nothing of the line stays in it.
    """
    with open(path, "a+b", buffering=0) as file:  # appends, wherever the reading position is
        end = file.seek(0, os.SEEK_END)
        torn = False
        if end > 0:
            file.seek(end - 1)
            torn = file.read(1) != b"\n"
        rest = (b"\n" if torn else b"") + line.encode(errors="replace") + b"\n"
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


def sync_folder(folder: Path) -> None:
    """Force a folder's entries to the disk: a new or renamed file is not safe before that."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Every whole JSON object of a file of lines; torn lines are skipped, no file is no lines."""
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        return []
    records = []
    for line in raw.split(b"\n"):
        try:
            record = json.loads(line)
        except ValueError:  # torn JSON, torn UTF-8, or the zeros of a block that was never written
            continue
        if isinstance(record, dict):
            records.append(record)
    return records


class RetryingWriter:
    """Appends lines to a file; those that it refuses are kept, and written before the next one.

    So a disk that was full for a while costs no line, unless the process ends before it has space.
    """

    def __init__(self, path: Path, *, durable: bool = False) -> None:
        self.path, self.durable = path, durable
        self._waiting: deque[str] = deque(maxlen=MAX_WAITING)

    def append(self, line: str) -> None:
        """Raises OSError where the file still refuses."""
        self._waiting.append(line)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        while self._waiting:
            append_line(self.path, self._waiting[0], durable=self.durable)
            self._waiting.popleft()

    @property
    def waiting(self) -> int:
        """How many lines the file has not taken yet."""
        return len(self._waiting)

    def take_back(self) -> None:
        """Forgets the newest of the lines that were refused."""
        self._waiting.pop()


class Ledger:
    """Appends events to `ledger.jsonl` and reads them back.

    A line holds `time` (UTC, ISO 8601 with milliseconds), `event` and the event's own fields.
    An unwritable or full disk does not stop training: it is told once through `warn`.
    """

    def __init__(self, path: Path, warn: Callable[[str], None] | None = None) -> None:
        self.path = path
        self._file = RetryingWriter(path, durable=True)
        self._warn = warn or logging.getLogger(__name__).warning
        self._warned = False
        self._next_progress = 0.0

    def append(self, event: str, *, required: bool = False, **fields: Any) -> None:
        """Write one event durably: when this returns without a warning, it is on the disk.

        Raises:
            OSError: it cannot be written, and is `required`: nothing may follow without it.
        """
        assert "time" not in fields, "the ledger writes the time itself"
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        try:
            self._file.append(json_line({"time": now, "event": event, **fields}))
        except OSError as error:
            if required:
                self._file.take_back()
                raise
            if not self._warned:
                self._warned = True
                self._warn(
                    f"{self.path} cannot be written ({error.strerror}): training goes on, events "
                    "are missing from the ledger until the folder is writable and has space"
                )

    def progress(self, step: int, spent: Mapping[str, Any], *, now: bool = False) -> None:
        """Tell how far the run is: at most once a minute, or `now`, where a checkpoint is taken."""
        if now or time.monotonic() >= self._next_progress:
            self._next_progress = time.monotonic() + PROGRESS_SECONDS
            self.append("progress", step=step, **spent)

    def read(self) -> list[dict[str, Any]]:
        """All events in the order written, without those torn by a kill."""
        return read_json_lines(self.path)
