"""A dead or stuck process ends the whole run in bounded time, named, and leaves no process."""

import json
import os
import re
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import start_python
from processes import DEADLINE, Program, is_running, linux, paused_training

from resilience.exit_codes import ExitCode

pytestmark = linux

# Long enough for a step on a loaded machine, short enough to wait for.
LIMIT = 12


@pytest.fixture
def standing(command: Any, tmp_path: Path) -> Iterator[tuple[Path, Program]]:
    """A run of ranks 0 and 1 where rank 0 stands still at the end of step 9."""
    folder = tmp_path / "run"
    arguments = [*command(folder), "parallel.tp=2", f"watchdog.step_seconds={LIMIT}"]
    with paused_training(arguments, folder) as program:
        yield folder, program


def end_of(program: Program) -> str:
    """What is told on standard error by a run that ends now, with all its processes."""
    # A rank is silent or late for LIMIT, then all hear of it; the rest is a loaded machine.
    told = program.main.communicate(timeout=DEADLINE)[1]
    program.wait_for_child()
    assert not is_running(program.child)
    return told


def test_killed_rank_is_named_with_signal_and_last_place_and_the_ledger_has_it(
    standing: tuple[Path, Program],
) -> None:
    folder, program = standing
    os.kill(program.child, signal.SIGKILL)
    told = end_of(program)
    assert program.main.returncode == ExitCode.RANK_FAILED
    first, *rest = told.splitlines()
    assert f"rank 1 (pid {program.child} on {socket.gethostname()})" in first
    # A rank tells where it is once a beat, and since the last one it may have gone some steps on.
    assert re.search(
        r"was killed by SIGKILL\. Last seen in (set-up|step \d+|checkpoint 6):$", first
    )
    assert any("train.py:" in line for line in rest)
    assert rest[-1].startswith("Checkpoint saved at step 6. Resume with: python train.py ")
    assert len(told.splitlines()) < 15
    last = json.loads((folder / "ledger.jsonl").read_text().splitlines()[-1])
    assert (last["event"], last["code"]) == ("fault", ExitCode.RANK_FAILED) and "SIGKILL" in last[
        "reason"
    ]


def test_frozen_rank_is_named_with_its_last_place_and_killed(
    standing: tuple[Path, Program],
) -> None:
    _, program = standing
    os.kill(program.child, signal.SIGSTOP)
    told = end_of(program)
    assert program.main.returncode == ExitCode.RANK_FAILED
    assert f"no heartbeat from rank 1 (pid {program.child} on" in told.splitlines()[0]
    assert "train.py:" in told


def test_frozen_main_process_is_named_and_ended_by_the_other(
    standing: tuple[Path, Program],
) -> None:
    _, program = standing
    program.main.send_signal(signal.SIGSTOP)
    told = end_of(program)
    assert program.main.returncode == -signal.SIGKILL  # or it would stay stopped for ever
    assert told.startswith("Aborting: no heartbeat from rank 0")


def test_stuck_rank_is_told_before_those_that_wait_for_it_with_the_line_it_stands_at(
    standing: tuple[Path, Program],
) -> None:
    _, program = standing  # and nothing is done to it: it stands still by itself
    told = end_of(program)
    assert program.main.returncode == ExitCode.RANK_FAILED
    stuck, waiting = told.index("rank 0 (pid"), told.index("rank 1 (pid")
    assert stuck < waiting
    assert f"rank 0 (pid {program.main.pid}" in told and "stuck in step" in told
    assert "write_sample" in told[stuck:waiting] and "waiting in step" in told[waiting:]


def test_processes_that_never_meet_end_after_the_limit_of_set_up(
    command: Any, tmp_path: Path
) -> None:
    two_nodes = ["parallel.num_nodes=2", "parallel.dp_shard=2", "watchdog.setup_seconds=10"]
    done = start_python([*command(tmp_path / "run"), *two_nodes])
    assert done.returncode == ExitCode.RANK_FAILED_BEFORE_SAVE
    assert "in set-up for" in done.stderr and "every node" in done.stderr
    assert len(done.stderr.splitlines()) < 15


def test_port_that_another_program_has_is_told_in_a_line(command: Any, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        done = start_python(
            [*command(tmp_path / "run"), "parallel.tp=2"], environment={"MASTER_PORT": str(port)}
        )
    assert done.returncode == ExitCode.USER_ERROR
    assert f"127.0.0.1:{port}" in done.stderr and "MASTER_PORT" in done.stderr
    assert len(done.stderr.splitlines()) == 1
