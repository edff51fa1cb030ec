"""A disk that hangs ends all ranks, or names those that the kernel cannot end, in time."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT
from frozen_mount import FrozenMount, frozen_mount
from processes import is_running, mounts, wait_for

from resilience.exit_codes import ExitCode

pytestmark = [pytest.mark.slow, mounts]

LIMIT = 15  # of a step and of a checkpoint: longer than both on a loaded machine
MARGIN = 10  # within which all ranks exit after the limit


class FrozenRun:
    """A run of two ranks, whose run folder or data are on a mount that will be frozen."""

    def __init__(self, disk: FrozenMount, arguments: list[str], folder: Path, log: Path) -> None:
        limits = [f"watchdog.{name}_seconds={LIMIT}" for name in ("step", "checkpoint")]
        more = ["train.max_steps=100000", "checkpoint.interval=2", "log.interval=1", *limits]
        with log.open("wb") as errors:
            self.main = subprocess.Popen(
                [sys.executable, *arguments, "parallel.tp=2", *more],
                cwd=ROOT,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                start_new_session=True,
            )
        ledger = folder / "ledger.jsonl"
        wait_for(
            lambda: self.main.poll() is not None or _read(ledger).count('"save"') > 1, "two saves"
        )
        assert self.main.poll() is None, log.read_text()
        listed = Path(f"/proc/{self.main.pid}/task/{self.main.pid}/children").read_text().split()
        ranks = [pid for pid in listed if b"train.py" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        (self.child,) = map(int, ranks)

    def has_exited(self) -> bool:
        """Return whether both ranks have exited, as far as the kernel can end their threads."""
        return all(_has_exited(pid) for pid in (self.main.pid, self.child))

    def is_blocked(self) -> bool:
        """Return whether a thread of a rank waits for the mount."""
        return any(map(_is_blocked, (self.main.pid, self.child)))


@pytest.mark.parametrize(
    ("frozen", "reason"),
    [
        ("/metrics.jsonl$", "stuck in step"),
        ("/__1_0", "stuck in checkpoint"),
        ("/shards/", "waiting for data in step"),
        ("", None),  # the log too
    ],
    ids=["metrics", "checkpoint of one rank", "data", "all, with the log"],
)
def test_all_ranks_exit_in_time(
    frozen: str,
    reason: str | None,
    command: Callable[[Path], list[str]],
    data_overrides: list[str],
    tmp_path: Path,
) -> None:
    with frozen_mount(tmp_path) as disk:
        arguments = command(disk.path / "run")
        if frozen == "/shards/":
            (prepared,) = (each for each in data_overrides if each.startswith("data.folder="))
            shutil.copytree(prepared.partition("=")[2], disk.folder / "shards")
            arguments[arguments.index(prepared)] = f"data.folder={disk.path / 'shards'}"
        log = (tmp_path if reason else disk.path) / "errors"
        run = FrozenRun(disk, arguments, disk.folder / "run", log)
        disk.freeze(frozen)
        wait_for(run.is_blocked, "a rank to block")
        blocked_at = time.monotonic()
        wait_for(run.has_exited, "all ranks to exit")
        assert time.monotonic() - blocked_at < LIMIT + MARGIN
        if reason:
            errors = log.read_text()
            assert f" {reason} " in errors
            for rank, pid in enumerate((run.main.pid, run.child)):
                if _is_blocked(pid):  # otherwise it may still be exiting
                    lines = [each for each in errors.splitlines() if "D state" in each]
                    named = f"rank {rank} (pid {pid} on {socket.gethostname()}) "
                    assert any(line.startswith(named) for line in lines), errors
        disk.close()
    assert run.main.wait() in (ExitCode.RANK_FAILED, ExitCode.RANK_FAILED_BEFORE_SAVE)


def test_launch_with_a_frozen_run_folder_exits_and_names_it(
    command: Callable[[Path], list[str]], tmp_path: Path
) -> None:
    with frozen_mount(tmp_path) as disk:
        run = disk.path / "run"
        disk.freeze("")
        main = subprocess.Popen(
            [sys.executable, *command(run), "watchdog.setup_seconds=1"],
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
        )
        wait_for(lambda: _has_exited(main.pid), "the launch to exit")
        disk.close()
    _, errors = main.communicate()
    assert main.returncode == ExitCode.RANK_FAILED_BEFORE_SAVE
    assert f"Aborting: reading run.dir={run} on {socket.gethostname()} takes more than" in errors
    assert str(disk.path) in errors.partition("takes more than")[2], errors


def _is_blocked(pid: int) -> bool:
    """Return whether a thread of a process waits for the mount."""
    channels = Path(f"/proc/{pid}").glob("task/*/wchan")
    return any(_read(each) == "request_wait_answer" for each in channels)


def _has_exited(pid: int) -> bool:
    """Return whether a process is gone, a zombie, or has SIGKILL pending in its main thread."""
    pending = re.search(r"SigPnd:\s*(\w+)", _read(Path(f"/proc/{pid}/status")))
    is_killed = pending is not None and int(pending[1], 16) >> (signal.SIGKILL - 1) & 1 == 1
    return is_killed or not is_running(pid)


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
