"""The summary at the end of a launch."""

import math
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from parallel.mesh import Processes
from resilience.config import FaultsConfig
from resilience.errors import OutOfMemory
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


def aborted_run(**watchdog: Any) -> Any:
    """Return a run on rank 0 with a checkpoint at step 4."""
    return SimpleNamespace(
        config=SimpleNamespace(run=SimpleNamespace(dir="runs/a")),
        processes=Processes("cuda", 1, 1, "self"),
        folder=SimpleNamespace(committed_steps=lambda: [4]),
        position=SimpleNamespace(step=5),
        console=SimpleNamespace(stop=lambda: None),
        watchdog=SimpleNamespace(**watchdog),
        record=lambda *_, **__: None,
        event_log=None,
    )


def test_run_that_was_out_of_memory_resumes_with_the_change_that_fits(
    monkeypatch: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py"])
    monkeypatch.setattr(shutdown, "_exit", lambda _, code: None)
    error = OutOfMemory("rank 0 is out of memory; use a=1 b=2 (plan.py …)", "a=1 b=2")
    shutdown.abort(aborted_run(publish=lambda *_: True), error)
    hint = capsys.readouterr().err.splitlines()[-1]
    assert hint == "Checkpoint saved at step 4. Resume with: python train.py run.dir=runs/a a=1 b=2"
    # Rank 0 does not add a command without the change if another rank was out of memory.
    shutdown.record_fault(aborted_run(exit_code=ExitCode.OUT_OF_MEMORY), str(error))
    assert capsys.readouterr().err == ""
    shutdown.record_fault(aborted_run(exit_code=ExitCode.RANK_FAILED), "rank 1 exited")
    assert capsys.readouterr().err.endswith("python train.py run.dir=runs/a\n")


@pytest.mark.parametrize("is_first", [True, False])
def test_rank_that_is_out_of_memory_during_set_up_makes_all_ranks_exit(is_first: bool) -> None:
    published: list[Any] = []

    def publish(*given: Any) -> bool:
        published.append(given)
        return is_first

    watchdog: Any = SimpleNamespace(publish=publish)
    with pytest.raises(OutOfMemory) as raised, shutdown.published_on_error(watchdog):
        raise OutOfMemory("rank 1 is out of memory\n  details")
    assert published == [(ExitCode.OUT_OF_MEMORY, "rank 1 is out of memory")]
    assert raised.value.is_first == is_first
