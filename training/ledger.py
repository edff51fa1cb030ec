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
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any


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
    Raises OSError when the file cannot be written.
    """
    with open(path, "a+b") as file:  # appends at the end wherever the reading position is
        end = file.seek(0, os.SEEK_END)
        torn = False
        if end > 0:
            file.seek(end - 1)
            torn = file.read(1) != b"\n"
        file.write((b"\n" if torn else b"") + line.encode(errors="replace") + b"\n")
        file.flush()
        if durable:
            os.fsync(file.fileno())
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


class Ledger:
    """Appends events to `ledger.jsonl` and reads them back.

    A line holds `time` (UTC, ISO 8601 with milliseconds), `event` and the event's own fields.
    An unwritable or full disk does not stop training: it is told once through `warn`.
    """

    def __init__(self, path: Path, warn: Callable[[str], None] | None = None) -> None:
        self.path = path
        self._warn = warn or logging.getLogger(__name__).warning
        self._warned = False

    def append(self, event: str, *, required: bool = False, **fields: Any) -> None:
        """Write one event durably: when this returns without a warning, it is on the disk."""
        assert "time" not in fields, "the ledger writes the time itself"
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            append_line(self.path, json_line({"time": now, "event": event, **fields}), durable=True)
        except OSError as error:
            if required:
                raise
            if not self._warned:
                self._warned = True
                self._warn(
                    f"{self.path} cannot be written ({error.strerror}): training goes on, events "
                    "are missing from the ledger until the folder is writable and has space"
                )

    def read(self) -> list[dict[str, Any]]:
        """All events in the order written, without those torn by a kill."""
        return read_json_lines(self.path)
