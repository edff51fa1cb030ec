"""Goodput: how much of a run's wall time went into steps that count, over all its launches.

Computed from the event log alone. Events carry the `step` reached and the time the launch had spent
(`Clock.spent`): `trained` after its first step, `progress` periodically and at each checkpoint,
`rewound` with the step it went back `to`, and `stop`. A kill writes no event: the next `start`
records when the previous launch was last alive, the step it resumes from and when its own process
started. The training loop decides when to write which event.
"""

import os
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from itertools import pairwise, zip_longest
from pathlib import Path
from typing import Any

from resilience.event_log import SECONDS, is_count, read_json_lines

Event = Mapping[str, Any]
"""A line of the event log that is valid (`event_log.is_event`)."""


@dataclass
class Goodput:
    """Wall time of a run since its first launch, in seconds and disjoint parts.

    Attributes:
        productive: Steps that count.
        stalled: Waits for saves, validation and text samples.
        lost: Steps that were repeated, or discarded by a rewind.
        restart: From the start of each launch to the end of its first step.
        between: From the end of one launch to the start of the next, such as the wait in a queue.
            Time after the run had finished is not counted.
        rest: Time that no event covers, such as logging.
        starts: Number of launches.
        lost_steps: Number of steps in `lost`.
    """

    productive: float = 0.0
    stalled: float = 0.0
    lost: float = 0.0
    restart: float = 0.0
    between: float = 0.0
    rest: float = 0.0
    starts: int = 0
    lost_steps: int = 0

    @property
    def wall(self) -> float:
        """Sum of all parts."""
        training = self.productive + self.stalled + self.lost
        return training + self.restart + self.between + self.rest

    @property
    def ratio(self) -> float:
        """Productive fraction of the wall time."""
        return self.productive / self.wall if self.wall else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return all values, rounded, for the event log."""
        parts = {name: round(value, 3) for name, value in asdict(self).items()}
        return {"ratio": round(self.ratio, 4), "wall": round(self.wall, 3), **parts}


class _WorkTimeline:
    """Time spent on the steps that count, as ordered intervals of steps."""

    def __init__(self) -> None:
        self.intervals: list[tuple[int, int, float]] = []  # after a step, up to a step, seconds
        self.step = 0  # reached
        self.lost, self.lost_steps = 0.0, 0

    def add(self, step: int, seconds: float) -> None:
        """Add work that advanced to `step`, or stayed within the current step."""
        step = max(step, self.step)
        self.intervals.append((self.step, step, seconds))
        self.step = step

    def go_back_to(self, step: int) -> None:
        """Move work beyond `step`, partial steps included, to `lost`."""
        self.lost_steps += max(0, self.step - step)
        intervals, self.intervals, self.step = self.intervals, [], step
        for first, last, seconds in intervals:
            kept = seconds * min(max(0.0, (step - first) / max(1, last - first)), 1.0)
            self.lost += seconds - kept
            if first < step:
                self.intervals.append((first, min(last, step), kept))


def compute_goodput(events: Iterable[Event], alive_until: datetime | None = None) -> Goodput:
    """Compute the goodput of a run.

    Args:
        events: Events of the log in the order written; unknown types are ignored.
        alive_until: When the newest launch was last alive, used if it has no `stop` event.
    """
    launches: list[list[Event]] = []  # the events of each
    for event in events:
        if event.get("event") == "start":
            launches.append([])
        is_setup_fault = event.get("event") == "fault" and event.get("step") is None
        if launches and not is_setup_fault:  # of a launch without a start
            launches[-1].append(event)
    goodput, work = Goodput(starts=len(launches)), _WorkTimeline()
    end: float | None = None
    for launch, following in zip_longest(launches, launches[1:]):
        start, next_start = launch[0], following[0] if following else {}
        needed = (*SECONDS, "step")
        points = [each for each in launch if all(each.get(key) is not None for key in needed)]
        stop = next((event for event in launch if event["event"] == "stop"), None)
        previous_end = _start_time(start) if end is None else end
        if stop is not None:
            end = _seconds(stop["time"])
        else:
            end = max(_seconds(event["time"]) for event in launch)
            last_alive = next_start.get("last_life") if following else alive_until
            end = max(end, _seconds(last_alive)) if last_alive else end
        if following:
            end = min(end, _start_time(next_start))
        first_step_time = _seconds(points[0]["time"]) if points else end
        start_time = max(previous_end, min(_start_time(start), first_step_time))
        goodput.between += start_time - previous_end
        goodput.restart += max(0.0, first_step_time - start_time)
        work.go_back_to(start.get("step") or 0)
        if points:
            covered = _add_points(points, work, goodput)
            unknown = max(0.0, end - first_step_time - covered)
            if stop is not None:
                goodput.rest += unknown
            else:  # after a kill: work on the steps up to the last one with metrics
                step = max(next_start.get("step") or 0, next_start.get("last_step") or 0)
                work.add(step, unknown)
        if stop is not None and stop.get("reason") == "finished":
            end = None  # idle time before a finished run is extended does not count
    goodput.productive = sum(seconds for _, _, seconds in work.intervals)
    goodput.lost, goodput.lost_steps = work.lost, work.lost_steps
    return goodput


def _add_points(points: Iterable[Event], work: _WorkTimeline, goodput: Goodput) -> float:
    """Add the time between the events of a launch with time spent; return its sum in seconds."""
    points = sorted(points, key=lambda point: point["elapsed_seconds"])
    work.add(points[0]["step"], 0.0)
    for previous, point in pairwise(points):
        elapsed = point["elapsed_seconds"] - previous["elapsed_seconds"]
        # Within the time that has passed, whatever a damaged log has.
        productive, stalled = (
            min(max(0.0, point[key] - previous[key]), elapsed)
            for key in ("productive_seconds", "stalled_seconds")
        )
        stalled = min(stalled, elapsed - productive)
        work.add(point["step"], productive)
        goodput.stalled += stalled
        goodput.rest += elapsed - productive - stalled
        if point["event"] == "rewound" and point.get("to") is not None:
            work.go_back_to(point["to"])
    return points[-1]["elapsed_seconds"] - points[0]["elapsed_seconds"]


def _start_time(start: Event) -> float:
    """Return when the process of a `start` event started, in Unix seconds."""
    return min(_seconds(start.get("began") or start["time"]), _seconds(start["time"]))


def _seconds(time: str | datetime) -> float:
    """Convert a time of the event log to Unix seconds."""
    return (datetime.fromisoformat(time) if isinstance(time, str) else time).timestamp()


# ---------------------------------------------------------------- fields of the `start` event


def launch_times(event_log: Path, metrics: Path, last_heartbeat: float | None) -> dict[str, Any]:
    """Return fields of the `start` event about this process and the previous launch.

    Args:
        event_log: `ledger.jsonl` of the run.
        metrics: `metrics.jsonl` of the run, before lost steps are removed from it.
        last_heartbeat: Last heartbeat in the lock of the previous launch, in Unix seconds.

    Returns:
        `began`: when this process started; `last_life`: when the previous launch was last alive,
        None at the first launch; `last_step`: its last step with metrics, or None.
    """
    times = [] if last_heartbeat is None else [last_heartbeat]
    for path in (event_log, metrics):
        with suppress(OSError):
            times.append(path.stat().st_mtime)
    records = read_json_lines(metrics, lambda record: is_count(record.get("step")))
    steps = [record["step"] for record in records]
    return {
        "began": _iso(time.time() - process_age_seconds()),
        "last_life": _iso(max(times)) if times else None,
        "last_step": steps[-1] if steps else None,  # after a rewind, less than the highest
    }


def process_age_seconds() -> float:
    """Return the time since this process started; 0 if the system does not report it."""
    try:
        status = Path("/proc/self/stat").read_text(encoding="ascii", errors="replace")
        # Field 22. The name, field 2, may contain spaces: count from its closing parenthesis.
        ticks = int(status.rpartition(")")[2].split()[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError):  # not Linux
        return 0.0


def _iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")
