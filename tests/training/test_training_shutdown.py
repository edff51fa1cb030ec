"""The summary at the end of a launch."""

import math
from types import SimpleNamespace
from typing import Any

import pytest

from resilience.config import FaultsConfig
from resilience.exit_codes import ExitCode
from resilience.goodput import Goodput
from resilience.loss_monitor import LossMonitor, StepStats
from training import shutdown
from training.shutdown import goodput_row


def test_goodput_row_shows_the_ratio_and_every_part() -> None:
    goodput = Goodput(3600.0, 60.0, 120.0, 200.0, 20.0, starts=3, lost_steps=17)
    assert goodput_row(goodput) == (
        "goodput",
        "90.0% of 1:06:40: 1:00:00 productive, 0:01:00 stalled, 0:02:00 lost (17 steps), "
        "0:03:20 starting (3 launches), 0:00:20 other",
    )


def test_goodput_row_omits_parts_that_took_no_time() -> None:
    row = goodput_row(Goodput(3600.0, 0.0, 0.0, 200.0, 0.4, starts=1, lost_steps=0))
    assert row[1].endswith(": 1:00:00 productive, 0:03:20 starting")


def test_run_whose_updates_were_all_skipped_does_not_finish(monkeypatch: Any) -> None:
    stops: list[Any] = []

    def stop_run(_: Any, *reason: Any) -> None:
        stops.append(reason)
        raise SystemExit

    monkeypatch.setattr(shutdown, "stop_run", stop_run)
    monitor = LossMonitor(FaultsConfig())
    for batch in range(2):
        monitor.check(StepStats(batch + 1, batch, (0, 1), math.nan, math.nan))
    run: Any = SimpleNamespace(monitor=monitor, position=SimpleNamespace(step=2))
    with pytest.raises(SystemExit):
        shutdown.finish(run)
    ((code, reason),) = stops
    assert code == ExitCode.DIVERGED
    assert reason.startswith("every update was skipped; no step had a finite loss, so the initial")
