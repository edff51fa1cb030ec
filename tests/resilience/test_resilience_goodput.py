"""Goodput computed from the event log matches a simulated run with known times."""

import random
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resilience.event_log import EventLog, append_line
from resilience.goodput import Goodput, compute_goodput, launch_times

ROOT = Path(__file__).parents[2]
EPOCH = datetime(2026, 1, 1, tzinfo=UTC).timestamp()
# Times are multiples of 1 ms; the rounding error of summing a few hundred floats is far below.
TOLERANCE_SECONDS = 1e-3


@dataclass
class SimulatedRun:
    """A run with random times that writes events and keeps the expected goodput."""

    rng: random.Random
    now: float = EPOCH
    events: list[dict[str, Any]] = field(default_factory=list)
    expected: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(
            ("stalled", "lost", "restart", "between", "rest"), 0.0
        )
    )
    steps: list[float] = field(default_factory=list)  # seconds of each step that counts
    committed: list[int] = field(default_factory=list)
    starts: int = 0
    lost_steps: int = 0
    idle: float = 0.0  # after the run had finished
    unfinished: float = 0.0  # in a step interrupted by a kill

    def pass_time(self, low: float, high: float) -> float:
        seconds = round(self.rng.uniform(low, high), 3)
        self.now = round(self.now + seconds, 3)
        return seconds

    def record(self, event: str, **fields: Any) -> None:
        self.events.append({"time": iso(self.now), "event": event, **fields})

    def go_back(self, step: int) -> None:
        self.expected["lost"] += sum(self.steps[step:])
        self.lost_steps += len(self.steps) - step
        del self.steps[step:]
        self.committed = [saved for saved in self.committed if saved <= step]

    def start(self, ends: str) -> None:
        """Simulate one launch with steps, saves, progress and rewinds, and how it ends."""
        rng, expected = self.rng, self.expected
        last_alive = self.now if self.events else None
        last_step = len(self.steps) if self.steps else None
        if self.events and self.events[-1].get("reason") == "finished":
            self.idle += self.pass_time(0, 1000)
        elif self.events:
            expected["between"] += self.pass_time(0, 1000)
        launch_time = self.now
        expected["restart"] += self.pass_time(1, 60)
        self.go_back(rng.choice([*self.committed, *self.committed[-1:], 0][-3:]))
        self.starts += 1
        times = {"began": iso(launch_time), "last_life": last_alive and iso(last_alive)}
        self.record("start", step=len(self.steps), last_step=last_step, **times)
        expected["restart"] += self.pass_time(1, 60)
        if rng.random() < 0.2 and ends == "killed":
            return
        clock, zero = {"productive_seconds": 7.0, "stalled_seconds": 2.0}, self.now - 11.0

        def spent() -> dict[str, float]:
            return {"elapsed_seconds": self.now - zero, **clock}

        self.steps.append(0.0)  # counts as part of the set-up
        self.record("trained", step=len(self.steps), **spent())
        pending: dict[str, Any] | None = None  # a save in progress
        for _ in range(rng.randrange(20)):
            seconds = self.pass_time(0.5, 3)
            self.steps.append(seconds)
            clock["productive_seconds"] += seconds
            chance = rng.random()
            if pending and chance < 0.5:
                self.committed.append(pending["step"])
                self.record("save", **pending)
                pending = None
            elif chance < 0.7:
                clock["stalled_seconds"] += (seconds := self.pass_time(0, 2))
                expected["stalled"] += seconds
                expected["rest"] += self.pass_time(0, 0.1)
                pending = {"step": len(self.steps), **spent()}
                self.record("progress", **pending)
            elif chance < 0.8:
                expected["rest"] += self.pass_time(0, 1)
                self.record("progress", step=len(self.steps), **spent())
            elif chance < 0.85 and self.committed:
                to = self.committed[-1]
                self.record("rewound", step=len(self.steps), to=to, **spent())
                self.go_back(to)
                pending = None
        if ends == "killed":
            self.unfinished = self.pass_time(0.001, 1)
        else:
            self.committed.append(len(self.steps))
            self.record("stop", step=len(self.steps), reason=ends, **spent())


def iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**32))
def test_goodput_matches_a_simulated_run_and_parts_add_up(seed: int) -> None:
    rng = random.Random(seed)
    run = SimulatedRun(rng)
    for _ in range(rng.randint(1, 8)):
        run.unfinished = 0.0
        run.start(rng.choice(["killed", "killed", "killed", "terminated", "finished"]))
        goodput = compute_goodput(run.events, datetime.fromtimestamp(run.now, UTC))
        productive = sum(run.steps) + run.unfinished
        expected = {"productive": productive, **run.expected, "starts": run.starts}
        expected["lost_steps"] = run.lost_steps
        assert asdict(goodput) == pytest.approx(expected, abs=TOLERANCE_SECONDS)
        wall = run.now - EPOCH - run.idle
        assert goodput.wall == pytest.approx(wall, abs=TOLERANCE_SECONDS)
        run.expected["lost"] += run.unfinished  # if another launch follows


def test_missing_events_are_not_an_error() -> None:
    """A full disk loses events, and older versions wrote fewer."""
    assert compute_goodput([]) == Goodput()
    old = [{"time": iso(EPOCH), "event": "start", "step": 0}]
    old.append({"time": iso(EPOCH + 9), "event": "save", "step": 3})
    assert compute_goodput(old) == Goodput(restart=9.0, starts=1)
    assert compute_goodput([{"time": iso(EPOCH), "event": "save", "step": 3}, *old]).starts == 1


def test_launch_times_use_the_last_activity_of_the_previous_launch(tmp_path: Path) -> None:
    event_log, metrics = tmp_path / "ledger.jsonl", tmp_path / "metrics.jsonl"
    assert launch_times(event_log, metrics, None)["last_life"] is None
    EventLog(event_log).append("start", step=0)
    for loss, step in enumerate((1, 2, 3, 2)):  # the last one after a rewind
        append_line(metrics, f'{{"step": {step}, "loss": {loss}}}')
    written = metrics.stat().st_mtime
    found = launch_times(event_log, metrics, None)
    assert found["last_life"] == iso(written) and found["last_step"] == 2
    assert launch_times(event_log, metrics, written - 5)["last_life"] == iso(written)
    assert launch_times(event_log, metrics, written + 5)["last_life"] == iso(written + 5)


def test_process_age_counts_from_its_start() -> None:
    if sys.platform != "linux":
        pytest.skip("Linux only")
    script = "from resilience.goodput import process_age_seconds as age; import time; a = age()\n"
    script += "time.sleep(0.2); print(a, age())"
    started_at = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    first, second = map(float, done.stdout.split())
    # The kernel counts in units of 10 ms.
    assert first >= 0 and first + 0.19 < second < time.monotonic() - started_at + 0.02


def test_dictionary_for_the_event_log_has_ratio_and_wall_time() -> None:
    values = Goodput(3600.0, 60.0, 120.0, 200.0, 20.0, starts=3, lost_steps=17).to_dict()
    assert values["ratio"] == 0.9 and values["wall"] == 4000.0
