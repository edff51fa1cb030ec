"""The account of a run's time is the one that a run with known times would make itself."""

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

from resilience.event_log import Ledger, append_line
from resilience.goodput import Goodput, account, signs_of_life
from training.clock import Clock

ROOT = Path(__file__).parents[2]
EPOCH = datetime(2026, 1, 1, tzinfo=UTC).timestamp()
# Times are whole milliseconds, sums of some hundred floats: rounding is far below.
MILLISECOND = 1e-3


@dataclass
class History:
    """A run with made-up times: it writes a ledger, and keeps the account on the side."""

    dice: random.Random
    now: float = EPOCH
    events: list[dict[str, Any]] = field(default_factory=list)
    truth: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(("stalled", "lost", "restart", "rest"), 0.0)
    )
    steps: list[float] = field(default_factory=list)  # seconds of each step that counts
    committed: list[int] = field(default_factory=list)
    starts: int = 0
    lost_steps: int = 0
    idle: float = 0.0  # after it was finished
    unended: float = 0.0  # of a step that a kill cut short

    def pass_time(self, low: float, high: float) -> float:
        seconds = round(self.dice.uniform(low, high), 3)
        self.now = round(self.now + seconds, 3)
        return seconds

    def tell(self, event: str, **fields: Any) -> None:
        self.events.append({"time": iso(self.now), "event": event, **fields})

    def go_back(self, step: int) -> None:
        self.truth["lost"] += sum(self.steps[step:])
        self.lost_steps += len(self.steps) - step
        del self.steps[step:]
        self.committed = [saved for saved in self.committed if saved <= step]

    def start(self, ends: str) -> None:
        """One start of the run, with steps, saves, progress and rewinds, up to a kind of end."""
        dice, truth = self.dice, self.truth
        life = self.now if self.events else None
        last_step = len(self.steps) if self.steps else None
        if self.events and self.events[-1].get("reason") == "finished":
            self.idle += self.pass_time(0, 1000)
        elif self.events:
            truth["restart"] += self.pass_time(0, 1000)
        began = self.now
        truth["restart"] += self.pass_time(1, 60)
        self.go_back(dice.choice([*self.committed, *self.committed[-1:], 0][-3:]))
        self.starts += 1
        told = {"began": iso(began), "last_life": life and iso(life), "last_step": last_step}
        self.tell("start", step=len(self.steps), **told)
        truth["restart"] += self.pass_time(1, 60)
        if dice.random() < 0.2 and ends == "killed":
            return
        clock, zero = {"productive_seconds": 7.0, "stalled_seconds": 2.0}, self.now - 11.0

        def spent() -> dict[str, float]:
            return {"elapsed_seconds": self.now - zero, **clock}

        self.steps.append(0.0)  # with the set-up, of which it is a part
        self.tell("trained", step=len(self.steps), **spent())
        pending: dict[str, Any] | None = None  # a save that is being written
        for _ in range(dice.randrange(20)):
            seconds = self.pass_time(0.5, 3)
            self.steps.append(seconds)
            clock["productive_seconds"] += seconds
            chance = dice.random()
            if pending and chance < 0.5:
                self.committed.append(pending["step"])
                self.tell("save", **pending)
                pending = None
            elif chance < 0.7:
                clock["stalled_seconds"] += (seconds := self.pass_time(0, 2))
                truth["stalled"] += seconds
                truth["rest"] += self.pass_time(0, 0.1)
                pending = {"step": len(self.steps), **spent()}
                self.tell("progress", **pending)
            elif chance < 0.8:
                truth["rest"] += self.pass_time(0, 1)
                self.tell("progress", step=len(self.steps), **spent())
            elif chance < 0.85 and self.committed:
                to = self.committed[-1]
                self.tell("rewound", step=len(self.steps), to=to, **spent())
                self.go_back(to)
                pending = None
        if ends == "killed":
            self.unended = self.pass_time(0.001, 1)
        else:
            self.committed.append(len(self.steps))
            self.tell("stop", step=len(self.steps), reason=ends, **spent())


def iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**32))
def test_parts_are_those_of_the_run_and_add_up_to_its_time(seed: int) -> None:
    dice = random.Random(seed)
    run = History(dice)
    for _ in range(dice.randint(1, 8)):
        run.unended = 0.0
        run.start(dice.choice(["killed", "killed", "killed", "terminated", "finished"]))
        made = account(run.events, datetime.fromtimestamp(run.now, UTC))
        productive = sum(run.steps) + run.unended
        truth = {"productive": productive, **run.truth, "starts": run.starts}
        truth["lost_steps"] = run.lost_steps
        assert asdict(made) == pytest.approx(truth, abs=MILLISECOND)
        assert made.wall == pytest.approx(run.now - EPOCH - run.idle, abs=MILLISECOND)
        run.truth["lost"] += run.unended  # should there be another start


def test_fewer_events_than_expected_are_no_error() -> None:
    """A full disk costs lines, and older runs told less."""
    assert account([]) == Goodput()
    old = [{"time": iso(EPOCH), "event": "start", "step": 0}]
    old.append({"time": iso(EPOCH + 9), "event": "save", "step": 3})
    assert account(old) == Goodput(restart=9.0, starts=1)
    assert account([{"time": iso(EPOCH), "event": "save", "step": 3}, *old]).starts == 1


def test_start_finds_the_newest_sign_of_life_of_the_one_before(tmp_path: Path) -> None:
    ledger, metrics = tmp_path / "ledger.jsonl", tmp_path / "metrics.jsonl"
    assert signs_of_life(ledger, metrics, None)["last_life"] is None
    Ledger(ledger).append("start", step=0)
    for step in (1, 2, 3, 2):  # a rewind
        append_line(metrics, f'{{"step": {step}}}')
    written = metrics.stat().st_mtime
    found = signs_of_life(ledger, metrics, None)
    assert found["last_life"] == iso(written) and found["last_step"] == 2
    assert signs_of_life(ledger, metrics, written - 5)["last_life"] == iso(written)
    assert signs_of_life(ledger, metrics, written + 5)["last_life"] == iso(written + 5)


def test_age_of_a_process_counts_from_its_start() -> None:
    if sys.platform != "linux":
        pytest.skip("only Linux tells")
    script = "from resilience.goodput import process_age; import time; a = process_age()\n"
    script += "time.sleep(0.2); print(a, process_age())"
    begin = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    first, second = map(float, done.stdout.split())
    # The kernel counts in hundredths of a second.
    assert first >= 0 and first + 0.19 < second < time.monotonic() - begin + 0.02


def test_clock_tells_steps_and_stalls_apart_and_keeps_their_sums() -> None:
    clock = Clock()
    for _ in range(2):
        with clock.step():
            time.sleep(0.01)
        with clock.stall():
            time.sleep(0.02)
        clock.read()
    spent = clock.spent()
    assert spent["productive_seconds"] >= 0.02 and spent["stalled_seconds"] >= 0.04
    parts = spent["productive_seconds"] + spent["stalled_seconds"]
    assert parts <= spent["elapsed_seconds"] + 2 * MILLISECOND  # each is rounded


def test_summary_tells_the_ratio_and_every_part() -> None:
    made = Goodput(3600.0, 60.0, 120.0, 200.0, 20.0, starts=3, lost_steps=17)
    ((name, told),) = made.rows()
    assert name == "goodput"
    assert told == (
        "90.0% of 1:06:40: 1:00:00 productive, 0:01:00 stalled, 0:02:00 lost (17 steps), "
        "0:03:20 starting (3 starts), 0:00:20 other"
    )
    assert made.figures()["ratio"] == 0.9 and made.figures()["wall"] == 4000.0
