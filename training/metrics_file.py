"""The lines of `metrics.jsonl` across launches: valid records, truncation, and missing steps."""

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from resilience.event_log import (
    is_count,
    is_number,
    read_json_lines,
    replace_lines,
    scan_json_lines,
    start_over,
)

COUNTS, NUMBERS = ("samples", "tokens"), ("loss", "grad_norm", "lr", "val_loss")

# Fields in version 0.1, by their present name.
_RENAMED = {b"memory_gib": b"peak_memory_gib", b"data_seconds": b"data_wait_seconds"}
_OLD_FIELD = re.compile(rb'(?<=")(' + b"|".join(_RENAMED) + rb')(?="\s*:)')


def is_record(record: Mapping[str, Any]) -> bool:
    """Return whether a record has its step, and no other field that is read of a wrong type."""
    return (
        is_count(record.get("step"))
        and all(record.get(key) is None or is_count(record[key]) for key in COUNTS)
        and all(record.get(key) is None or is_number(record[key]) for key in NUMBERS)
    )


def read_records(path: Path) -> list[dict[str, Any]]:
    """Return the valid records of a file; [] if it cannot be read."""
    return read_json_lines(path, is_record)


def truncate_records(path: Path, last_step: int) -> str | None:
    """Remove records beyond `last_step` and an incomplete last line; rename fields of version 0.1.

    A file that only loses its end is truncated in place, which also works on a full disk; otherwise
    it is replaced atomically. Other lines keep their bytes. A file with damaged lines is kept under
    another name, unless the run starts from scratch.

    Returns:
        A message if the file was damaged.

    Raises:
        OSError: The file cannot be renamed or written.
    """
    if not os.path.lexists(path):
        return None
    try:
        found = scan_json_lines(path, is_record)
    except OSError as error:
        return start_over(path, error)
    steps = [record["step"] <= last_step for record in found.records] if last_step > 0 else []
    kept = [line for line, is_kept in zip(found.lines, steps, strict=False) if is_kept]
    renamed = [_OLD_FIELD.sub(lambda field: _RENAMED[field[1]], line) for line in kept]
    end = found.ends[len(kept) - 1] if kept else 0
    is_prefix = renamed == found.lines[: len(kept)]
    if last_step == 0:
        os.truncate(path, 0)
    elif found.n_damaged or not is_prefix:
        return replace_lines(path, found, renamed)
    elif end < found.n_bytes:
        os.truncate(path, end)
    return None


def newly_missing(
    path: Path, events: Sequence[Mapping[str, Any]], last_step: int, interval: int
) -> list[tuple[int, int]]:
    """Return the ranges of steps whose metrics are missing and were not reported before.

    Args:
        events: Events of earlier launches. Those of the type `metrics_missing` have the `ranges`
            that were reported.
        last_step: Last step of earlier launches that counts.
        interval: `log.interval` of this launch.
    """
    starts = [event for event in events if event["event"] == "start"]
    first = (starts[0].get("step") or 0) if starts else 0  # the run may start from a checkpoint
    changed = [event["changed"] for event in starts if isinstance(event.get("changed"), dict)]
    former = [each["log.interval"] for each in changed if "log.interval" in each]
    intervals = [value for pair in former if isinstance(pair, list) for value in pair]
    steps = [record["step"] for record in read_records(path)]
    missing = missing_steps(steps, first, last_step, [interval, *filter(is_count, intervals)])
    reported = [event.get("ranges") for event in events if event["event"] == "metrics_missing"]
    known = [each for ranges in reported if isinstance(ranges, list) for each in ranges]
    return [each for each in missing if list(each) not in known]


def missing_steps(
    steps: Iterable[int], first: int, last: int, intervals: Iterable[int]
) -> list[tuple[int, int]]:
    """Return the ranges of steps, without their ends, of which no due step was logged.

    Args:
        steps: Logged steps.
        first: Step before the first one of the run.
        last: Last step done.
        intervals: All values that `log.interval` has had.

    Returns:
        First and last step of each range.
    """
    different = {*intervals}
    interval, is_constant = max(different), len(different) == 1
    logged = sorted({first, *(step for step in steps if first < step <= last), last + 1})
    return [
        (before + 1, after - 1)
        for before, after in pairwise(logged)
        if (after - 1) // interval > before // interval
        and (is_constant or after - before > interval)
    ]
