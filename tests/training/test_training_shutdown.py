"""The summary at the end of a launch."""

import errno
import math
import os
import signal
import sys
import threading
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch.distributed import DistBackendError, DistNetworkError

from cli.errors import exit_on_user_error
from data.errors import DataError
from resilience.config import FaultsConfig
from resilience.errors import LaunchError, OutOfMemory, exceeded_limit, is_hardware_fault
from resilience.event_log import EventLog
from resilience.exit_codes import ExitCode
from resilience.goodput import Goodput
from resilience.launch import _launch_errors
from resilience.loss_monitor import LossMonitor, StepStats
from resilience.processes import Processes
from training import shutdown
from training.shutdown import goodput_row


def test_goodput_row_shows_the_ratio_and_every_part() -> None:
    goodput = Goodput(3600.0, 60.0, 120.0, 150.0, 50.0, 20.0, starts=3, lost_steps=17)
    assert goodput_row(goodput) == (
        "goodput",
        "90.0% of 1:06:40: 1:00:00 productive, 0:01:00 stalled, 0:02:00 lost (17 steps), "
        "0:02:30 starting (3 launches), 0:00:50 between launches, 0:00:20 other",
    )


def test_goodput_row_omits_parts_that_took_no_time() -> None:
    row = goodput_row(Goodput(3600.0, 0.0, 0.0, 200.0, 0.0, 0.4, starts=1, lost_steps=0))
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


def aborted_run(event_log: EventLog | None = None, **watchdog: Any) -> Any:
    """Return a run on rank 0 with a checkpoint at step 4."""
    return SimpleNamespace(
        config=SimpleNamespace(run=SimpleNamespace(dir="runs/a")),
        processes=Processes("cuda", 1, 1, "self"),
        folder=SimpleNamespace(committed_steps=lambda: [4]),
        position=SimpleNamespace(step=5),
        console=SimpleNamespace(stop=lambda: None),
        watchdog=SimpleNamespace(fault_hosts=(), **watchdog),
        record=lambda *_, **__: None,
        event_log=event_log,
        optional=lambda _: nullcontext(),
    )


def test_run_that_was_out_of_memory_resumes_with_the_change_that_fits(
    monkeypatch: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    log = EventLog(tmp_path / "ledger.jsonl")
    monkeypatch.setattr(sys, "argv", ["train.py"])
    monkeypatch.setattr(shutdown, "_exit", lambda _, code: None)
    error = OutOfMemory("rank 0 is out of memory; use a=1 b=2 (plan.py …)", "a=1 b=2")
    shutdown.abort(aborted_run(publish=lambda *_: True, is_first_with=bool), error)
    hint = capsys.readouterr().err.splitlines()[-1]
    assert hint == "Newest checkpoint: step 4. Resume with: python train.py run.dir=runs/a a=1 b=2"
    # Rank 0 does not add a command without the change if another rank was out of memory.
    shutdown.record_fault(aborted_run(log, exit_code=ExitCode.OUT_OF_MEMORY), str(error))
    assert capsys.readouterr().err == ""
    shutdown.record_fault(aborted_run(log, exit_code=ExitCode.RANK_FAILED), "rank 1 exited")
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


@pytest.mark.parametrize("is_first", [True, False])
def test_unexpected_error_during_set_up_is_printed_by_the_first_rank_with_it(
    monkeypatch: pytest.MonkeyPatch, is_first: bool
) -> None:
    causes: list[str] = []

    def is_first_with(cause: str) -> bool:
        causes.append(cause)
        return is_first

    watchdog: Any = SimpleNamespace(is_first_with=is_first_with)

    def exit_silently(code: int) -> None:
        raise SystemExit(code)

    monkeypatch.setattr(os, "_exit", exit_silently)
    expected = ImportError if is_first else SystemExit
    with pytest.raises(expected), shutdown.published_on_error(watchdog):
        raise ImportError("no module")
    assert len(causes) == 1 and "ImportError: no module" in causes[0]
    with pytest.raises(DataError), shutdown.published_on_error(watchdog):
        raise DataError("missing shard")  # rank 0 prints it
    assert len(causes) == 1


@pytest.mark.parametrize(
    ("error", "command"),
    [
        (OSError(errno.EMFILE, os.strerror(errno.EMFILE), "/data"), "ulimit -n"),
        (DistNetworkError("code: -24, name: EMFILE, message: too many open files"), "ulimit -n"),
        (RuntimeError("can't start new thread"), "ulimit -u"),
        (RuntimeError(os.strerror(errno.EAGAIN)), "ulimit -v"),  # of gloo
        (BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN)), "ulimit -u"),  # of fork
    ],
)
def test_exceeded_limits_name_the_command_that_raises_them(
    monkeypatch: pytest.MonkeyPatch, capsys: Any, error: Exception, command: str
) -> None:
    fault = shutdown.machine_fault(error)
    assert fault is not None and f"{command} is " in fault[0]
    with pytest.raises(SystemExit) as raised, exit_on_user_error():
        raise error
    assert raised.value.code == ExitCode.USER_ERROR
    assert f"{command} is " in capsys.readouterr().err
    monkeypatch.setattr("resource.getrlimit", lambda _: (40 * 1024, 4096 * 1024))
    hard = 4096 if command == "ulimit -v" else 4096 * 1024
    assert f", run: {command} {hard}" in str(exceeded_limit(error))
    with pytest.raises(type(error)), _launch_errors("torchrun", ExitCode.USER_ERROR):
        raise error


ECC = RuntimeError("CUDA error: uncorrectable ECC error encountered\nCUDA kernel errors might")
NCCL = DistBackendError("NCCL error in: NCCLUtils.cpp:94, remote process exited, ncclRemoteError")
GLOO = RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed")


@pytest.mark.parametrize(("error", "named"), [(ECC, True), (NCCL, False), (GLOO, False)])
def test_fault_of_a_machine_or_connection_exits_to_be_relaunched(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: Exception, named: bool
) -> None:
    monkeypatch.setenv("SLURMD_NODENAME", "n2")
    hosts = ["n2"] if named else []
    published: list[Any] = []
    waited: list[Any] = []
    codes: list[Any] = []

    def publish(*given: Any) -> bool:
        published.append(given)
        run.watchdog.fault_hosts = given[2]
        return True

    monkeypatch.setattr(shutdown, "_exit", lambda _, code: codes.append(code))
    monkeypatch.setattr(
        shutdown, "compute_goodput", lambda *_, **__: Goodput(1, 0, 0, 0, 0, 0, 1, 0)
    )
    run = aborted_run(
        EventLog(tmp_path / "ledger.jsonl"),
        publish=publish,
        is_first_with=bool,
        wait_for_abort=waited.append,
        exit_code=ExitCode.RANK_FAILED,
    )
    run.clock = SimpleNamespace(spent=dict)
    shutdown.abort(run, error)
    assert codes == [ExitCode.RANK_FAILED]
    assert waited == ([] if named else [error])  # a peer may have died
    [(code, reason, sent)] = published
    assert (code, sent) == (ExitCode.RANK_FAILED, hosts) and reason.startswith("rank 0 on n2 ")
    [event] = run.event_log.read()
    assert (event["event"], event["hosts"], event["reason"]) == ("fault", hosts, reason)

    published.clear()
    run.watchdog.on_abort = (recorded := list[str]()).append
    with pytest.raises(LaunchError) as raised, shutdown.published_on_error(run.watchdog):
        raise error
    assert raised.value.code == ExitCode.RANK_FAILED and published == [(code, reason, hosts)]
    assert recorded == [reason]


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: device-side assert triggered"),
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("2 correctable ECC errors; Xid 13, Xid 31"),
        RuntimeError("Distributed package doesn't have NCCL built in"),
        DistBackendError("NCCL error: ncclInvalidUsage: invalid usage of NCCL library"),
        ValueError("wrong"),
    ],
)
def test_errors_of_programs_are_not_faults_of_a_machine(error: Exception) -> None:
    assert shutdown.machine_fault(error) is None


@pytest.mark.parametrize(
    "text",
    [
        "CUDA error: uncorrectable NVLink error detected during the execution",
        "NVRM: Xid (PCI:0000:3b:00): 48, pid=1, name=python, Double Bit ECC Error",
        "NVRM: Xid (PCI:0000:3b:00): 63, Row Remapper",
        "Xid 94",
        "xid: 74",
        "Unable to determine the device handle for GPU 0000:3B:00.0: GPU is lost.",
    ],
)
def test_messages_about_the_hardware_are_recognized(text: str) -> None:
    assert is_hardware_fault(text)


def test_signals_end_a_process_whose_lock_is_on_a_disk_that_hangs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    codes: list[int] = []
    monkeypatch.setattr(shutdown, "LEAVE_SECONDS", 0.05)
    monkeypatch.setattr(os, "_exit", codes.append)
    disk = threading.Event()
    lock: Any = SimpleNamespace(abandon=disk.wait, release=disk.wait)
    shutdown.exit_early(lock, ExitCode.TERMINATED)
    run = aborted_run()
    run.lock, run.fabric = lock, SimpleNamespace(is_global_zero=False)
    run.console.note = lambda text: None
    shutdown.report_signal(run, signal.SIGINT, again=True)
    disk.set()
    assert codes == [ExitCode.TERMINATED, ExitCode.INTERRUPTED]
    assert capsys.readouterr().err.startswith("Received SIGTERM or SIGHUP before the first step.\n")
