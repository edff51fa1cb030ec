"""Where the time of a run went, over all its starts: an account made from the ledger alone.

The events tell the `step` reached and what the start had spent by then (`Clock.spent`): `trained`
after its first step, `progress` now and then and whenever a checkpoint is taken, `rewound` (`to`
which step), `stop`. Nobody writes down a kill: the next `start` tells the last signs of life that
it found, beside the step gone on from and when its process began. What is written when is decided
by the training loop.
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
from training.console import duration


@dataclass(frozen=True)
class Goodput:
    """Seconds of a run from the beginning of its first start to now, in parts that add up.

    `productive`: steps that count. `stalled`: waits for saves, validation, text samples. `lost`:
    steps that were done again, or by a rewind left out. `restart`: from the end of one start
    (first: from the beginning) to the end of the next one's first step; not counted is the time
    after the run had finished. `rest`: what no event tells of, as logging.
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
        """All of it."""
        return self.productive + self.stalled + self.lost + self.restart + self.rest

    @property
    def ratio(self) -> float:
        """The share of the time that was productive."""
        return self.productive / self.wall if self.wall else 0.0

    def figures(self) -> dict[str, Any]:
        """For the ledger."""
        parts = {name: round(value, 3) for name, value in asdict(self).items()}
        return {"ratio": round(self.ratio, 4), "wall": round(self.wall, 3), **parts}

    def rows(self) -> list[tuple[str, str]]:
        """For the summary at the end of a run."""
        steps = f" ({self.lost_steps} steps)" if self.lost_steps else ""
        starts = f" ({self.starts} starts)" if self.starts > 1 else ""
        return [
            (
                "goodput",
                f"{self.ratio:.1%} of {duration(self.wall)}: {duration(self.productive)} "
                f"productive, {duration(self.stalled)} stalled, {duration(self.lost)} lost{steps}, "
                f"{duration(self.restart)} starting{starts}, {duration(self.rest)} other",
            )
        ]


@dataclass
class _Piece:
    """Seconds of work on the steps after `first` up to `last`."""

    first: int
    last: int
    seconds: float


class _Work:
    """The steps that count, as pieces in order: going back to a step takes what lies after it."""

    def __init__(self) -> None:
        self._pieces: list[_Piece] = []
        self.step = 0  # reached
        self.lost = 0.0
        self.lost_steps = 0

    @property
    def productive(self) -> float:
        """Seconds of the steps that count."""
        return sum(piece.seconds for piece in self._pieces)

    def do(self, step: int, seconds: float) -> None:
        """Work that led from the step reached to a later one, or to none."""
        self._pieces.append(_Piece(self.step, max(step, self.step), seconds))
        self.step = max(step, self.step)

    def go_to(self, step: int) -> None:
        """The next work begins at this step: what was done beyond it, also in part, is lost."""
        self.lost_steps += max(0, self.step - step)
        kept = []
        for piece in self._pieces:
            share = 1.0
            if piece.first >= step:  # also of a step that began there and did not end
                share = 0.0
            elif piece.last > step:
                share = (step - piece.first) / (piece.last - piece.first)
            self.lost += piece.seconds * (1 - share)
            if share:
                kept.append(_Piece(piece.first, min(piece.last, step), piece.seconds * share))
        self._pieces, self.step = kept, step


class _Start:
    """One start of a run: its events, in the order in which they happened."""

    def __init__(self, start: Mapping[str, Any]) -> None:
        self.start = start
        self.began = min(_seconds(start.get("began") or start["time"]), _seconds(start["time"]))
        self.last_event = _seconds(start["time"])
        self.first_step_done: float | None = None
        self.points: list[Mapping[str, Any]] = []
        self.stop: Mapping[str, Any] | None = None

    def add(self, event: Mapping[str, Any]) -> None:
        """Takes one more event of this start."""
        self.last_event = max(self.last_event, _seconds(event["time"]))
        if "elapsed_seconds" in event:
            self.first_step_done = self.first_step_done or _seconds(event["time"])
            self.points.append(event)
        if event["event"] == "stop":
            self.stop = event

    def end(self, last_life: float, limit: float) -> float:
        """When it was last alive, at most `limit`: the beginning of the next start."""
        if self.stop is not None:
            return min(_seconds(self.stop["time"]), limit)
        return min(max(last_life, self.last_event), limit)


def account(events: Iterable[Mapping[str, Any]], alive_until: datetime | None = None) -> Goodput:
    """The account of a run.

    Args:
        events: The ledger's, in the order written; those of other kinds are passed over.
        alive_until: Until when the newest start is known to be alive, where no `stop` tells it.
    """
    starts: list[_Start] = []
    for event in events:
        if event.get("event") == "start":
            starts.append(_Start(event))
        elif starts:
            starts[-1].add(event)
    work, stalled, restart, rest = _Work(), 0.0, 0.0, 0.0
    end = None
    for start, following in zip(starts, [*starts[1:], None], strict=False):
        if end is not None:
            restart += max(0.0, start.began - end)
        begin = start.began if end is None else max(start.began, end)
        if following is None:
            end = start.end(alive_until.timestamp() if alive_until else 0.0, math.inf)
        else:
            last_life = following.start.get("last_life")
            end = start.end(_seconds(last_life) if last_life else 0.0, following.began)
        work.go_to(start.start["step"])
        if start.first_step_done is None:
            restart += max(0.0, end - begin)
        else:
            restart += max(0.0, start.first_step_done - begin)
            stalls, others = _train(start, following, end, work)
            stalled, rest = stalled + stalls, rest + others
        if start.stop is not None and start.stop.get("reason") == "finished":
            end = None  # whoever makes a finished run longer has not kept it waiting
    return Goodput(work.productive, stalled, work.lost, restart, rest, len(starts), work.lost_steps)


def _train(start: _Start, following: _Start | None, end: float, work: _Work) -> tuple[float, float]:
    """Books what a start did after its first step; returns the seconds of stalls and of the rest.

    `end` is when it was last alive. From the newest event on nobody knows more: after a kill that
    is taken for work, on steps up to the last one of which there are figures.
    """
    stalled = rest = 0.0
    points = sorted(start.points, key=lambda point: point["elapsed_seconds"])
    before = points[0]
    work.do(before["step"], 0.0)
    for point in points[1:]:
        elapsed, productive, stalls = (
            point[key] - before[key]
            for key in ("elapsed_seconds", "productive_seconds", "stalled_seconds")
        )
        work.do(point["step"], productive)
        stalled += stalls
        rest += max(0.0, elapsed - productive - stalls)
        if point["event"] == "rewound":
            work.go_to(point["to"])
        before = point
    assert start.first_step_done is not None
    known = before["elapsed_seconds"] - points[0]["elapsed_seconds"]
    unknown = max(0.0, end - start.first_step_done - known)
    if start.stop is not None:
        return stalled, rest + unknown
    steps = [following.start["step"], following.start.get("last_step") or 0] if following else []
    work.do(max([work.step, *steps]), unknown)
    return stalled, rest


def _seconds(time: str) -> float:
    """Unix seconds of a ledger's time."""
    return datetime.fromisoformat(time).timestamp()


# ---------------------------------------------------------------- what a start tells


def signs_of_life(ledger: Path, metrics: Path, last_beat: float | None) -> dict[str, Any]:
    """Fields of `start` about this process and the start before it, whose files lie there still.

    Args:
        ledger: The run's `ledger.jsonl`.
        metrics: The run's `metrics.jsonl`, before the lost steps are dropped from it.
        last_beat: When the lock of the start before was last touched, in Unix seconds.

    Returns:
        `began`, `last_life` (None at the first start) and `last_step` (None without figures).
    """
    times = [] if last_beat is None else [last_beat]
    for path in (ledger, metrics):
        with suppress(OSError):
            times.append(path.stat().st_mtime)
    steps: list[int] = []
    with suppress(OSError):
        steps = [record["step"] for record in read_json_lines(metrics) if "step" in record]
    return {
        "began": _iso(time.time() - process_age()),
        "last_life": _iso(max(times)) if times else None,
        "last_step": steps[-1] if steps else None,  # a rewind makes it lower than the highest
    }


def process_age() -> float:
    """Seconds since this process began; 0 where the system does not tell."""
    try:
        status = Path("/proc/self/stat").read_text(encoding="ascii", errors="replace")
        # Field 22, counted from behind the name in parentheses, which is the second one.
        ticks = int(status.rpartition(")")[2].split()[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError):  # no Linux
        return 0.0


def _iso(seconds: float) -> str:
    """A ledger's time from Unix seconds."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")
