"""Goodput: how much of a run's wall time went into steps that count, over all its launches.

Computed from the event log alone. Events carry the `step` reached and the time the launch had spent
(`Clock.spent`): `trained` after its first step, `progress` periodically and at each checkpoint,
`rewound` with the step it went back `to`, and `stop`. A kill writes no event: the next `start`
records when the previous launch was last alive, the step it resumes from and when its own process
started. The training loop decides when to write which event.
"""

import math
import os
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from resilience.event_log import read_json_lines


@dataclass(frozen=True)
class Goodput:
    """Wall time of a run since its first launch, in seconds and disjoint parts.

    Attributes:
        productive: Steps that count.
        stalled: Waits for saves, validation and text samples.
        lost: Steps that were repeated, or discarded by a rewind.
        restart: From the end of one launch (first: from its start) to the end of the first step of
            the next. Time after the run had finished is not counted.
        rest: Time that no event covers, such as logging.
        starts: Number of launches.
        lost_steps: Number of steps in `lost`.
    """

    productive: float = 0.0
    stalled: float = 0.0
    lost: float = 0.0
    restart: float = 0.0
    rest: float = 0.0
    starts: int = 0
    lost_steps: int = 0

    @property
    def wall(self) -> float:
        """Sum of all parts."""
        return self.productive + self.stalled + self.lost + self.restart + self.rest

    @property
    def ratio(self) -> float:
        """Productive fraction of the wall time."""
        return self.productive / self.wall if self.wall else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return all values, rounded, for the event log."""
        parts = {name: round(value, 3) for name, value in asdict(self).items()}
        return {"ratio": round(self.ratio, 4), "wall": round(self.wall, 3), **parts}


@dataclass
class _Interval:
    """Seconds of work on the steps after `first` up to `last`."""

    first: int
    last: int
    seconds: float


class _WorkTimeline:
    """Time spent on the steps that count, as ordered intervals of steps."""

    def __init__(self) -> None:
        self._intervals: list[_Interval] = []
        self.step = 0  # reached
        self.lost = 0.0
        self.lost_steps = 0

    @property
    def productive(self) -> float:
        return sum(interval.seconds for interval in self._intervals)

    def add(self, step: int, seconds: float) -> None:
        """Add work that advanced to `step`, or stayed within the current step."""
        self._intervals.append(_Interval(self.step, max(step, self.step), seconds))
        self.step = max(step, self.step)

    def go_back_to(self, step: int) -> None:
        """Move work beyond `step`, partial steps included, to `lost`."""
        self.lost_steps += max(0, self.step - step)
        kept = []
        for interval in self._intervals:
            fraction = 1.0
            if interval.first >= step:  # includes an unfinished step
                fraction = 0.0
            elif interval.last > step:
                fraction = (step - interval.first) / (interval.last - interval.first)
            self.lost += interval.seconds * (1 - fraction)
            if fraction:
                last = min(interval.last, step)
                kept.append(_Interval(interval.first, last, interval.seconds * fraction))
        self._intervals, self.step = kept, step


class _Launch:
    """One launch of a run: its events in order."""

    def __init__(self, start: Mapping[str, Any]) -> None:
        self.start = start
        self.start_time = min(
            _seconds(start.get("began") or start["time"]), _seconds(start["time"])
        )
        self.last_event_time = _seconds(start["time"])
        self.first_step_time: float | None = None
        self.points: list[Mapping[str, Any]] = []  # events with the time spent
        self.stop: Mapping[str, Any] | None = None

    def add(self, event: Mapping[str, Any]) -> None:
        self.last_event_time = max(self.last_event_time, _seconds(event["time"]))
        if "elapsed_seconds" in event:
            self.first_step_time = self.first_step_time or _seconds(event["time"])
            self.points.append(event)
        if event["event"] == "stop":
            self.stop = event

    def end_time(self, last_alive: float, limit: float) -> float:
        """Return when it was last alive, at most `limit`, the start of the next launch."""
        if self.stop is not None:
            return min(_seconds(self.stop["time"]), limit)
        return min(max(last_alive, self.last_event_time), limit)


def compute_goodput(
    events: Iterable[Mapping[str, Any]], alive_until: datetime | None = None
) -> Goodput:
    """Compute the goodput of a run.

    Args:
        events: Events of the log in the order written; unknown types are ignored.
        alive_until: When the newest launch was last alive, used if it has no `stop` event.
    """
    launches: list[_Launch] = []
    for event in events:
        if event.get("event") == "start":
            launches.append(_Launch(event))
        elif launches:
            launches[-1].add(event)
    work, stalled, restart, rest = _WorkTimeline(), 0.0, 0.0, 0.0
    end = None
    for launch, following in zip(launches, [*launches[1:], None], strict=False):
        if end is not None:
            restart += max(0.0, launch.start_time - end)
        begin_time = launch.start_time if end is None else max(launch.start_time, end)
        if following is None:
            end = launch.end_time(alive_until.timestamp() if alive_until else 0.0, math.inf)
        else:
            last_alive = following.start.get("last_life")
            end = launch.end_time(_seconds(last_alive) if last_alive else 0.0, following.start_time)
        work.go_back_to(launch.start["step"])
        if launch.first_step_time is None:
            restart += max(0.0, end - begin_time)
        else:
            restart += max(0.0, launch.first_step_time - begin_time)
            more_stalled, more_rest = _add_training(launch, following, end, work)
            stalled, rest = stalled + more_stalled, rest + more_rest
        if launch.stop is not None and launch.stop.get("reason") == "finished":
            end = None  # idle time before a finished run is extended does not count
    return Goodput(
        work.productive, stalled, work.lost, restart, rest, len(launches), work.lost_steps
    )


def _add_training(
    launch: _Launch, following: _Launch | None, end: float, work: _WorkTimeline
) -> tuple[float, float]:
    """Add the work of a launch after its first step; return its seconds of stalls and of the rest.

    Args:
        end: When the launch was last alive. After a kill, time since the newest event counts as
            work on the steps up to the last one with metrics.
    """
    stalled = rest = 0.0
    points = sorted(launch.points, key=lambda point: point["elapsed_seconds"])
    previous = points[0]
    work.add(previous["step"], 0.0)
    for point in points[1:]:
        elapsed, productive, stalls = (
            point[key] - previous[key]
            for key in ("elapsed_seconds", "productive_seconds", "stalled_seconds")
        )
        work.add(point["step"], productive)
        stalled += stalls
        rest += max(0.0, elapsed - productive - stalls)
        if point["event"] == "rewound":
            work.go_back_to(point["to"])
        previous = point
    assert launch.first_step_time is not None
    known = previous["elapsed_seconds"] - points[0]["elapsed_seconds"]
    unknown = max(0.0, end - launch.first_step_time - known)
    if launch.stop is not None:
        return stalled, rest + unknown
    steps = [following.start["step"], following.start.get("last_step") or 0] if following else []
    work.add(max([work.step, *steps]), unknown)
    return stalled, rest


def _seconds(time: str) -> float:
    """Convert a time of the event log to Unix seconds."""
    return datetime.fromisoformat(time).timestamp()


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
    steps: list[int] = []
    with suppress(OSError):
        steps = [record["step"] for record in read_json_lines(metrics) if "step" in record]
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
