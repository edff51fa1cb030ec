"""A dead or hanging process aborts all ranks within a timeout, is named, and leaves no process."""

import json
import os
import re
import signal
import socket
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import read_events, start_python
from ports import free_port
from processes import DEADLINE, Program, is_running, linux, paused_training, wait_until_blocked
from torch.distributed.flight_recorder.components.loader import read_dir

from resilience.config import TimeLimits
from resilience.exit_codes import ExitCode

pytestmark = linux

STEP_SECONDS = 20  # longer than a step on a loaded machine
SETUP_SECONDS = 9000  # the longest limit of the run


@pytest.fixture
def paused(command: Any, tmp_path: Path) -> Iterator[tuple[Path, Program]]:
    """Return folder and processes of a run on two ranks, where rank 0 blocks after step 9."""
    folder = tmp_path / "run"
    limits = [f"watchdog.step_seconds={STEP_SECONDS}", f"watchdog.setup_seconds={SETUP_SECONDS}"]
    # With one token of text, rank 0 soon blocks.
    arguments = [*command(folder), "parallel.tp=2", "validation.sample_tokens=1", *limits]
    with paused_training(arguments, folder) as program:
        wait_until_blocked(program.main.pid)
        yield folder, program


def wait_for_abort(program: Program) -> str:
    """Return standard error of a run that aborts; check that no process remains."""
    # Detection takes STEP_SECONDS; DEADLINE allows for a loaded machine.
    errors = program.main.communicate(timeout=DEADLINE)[1]
    program.wait_for_child()
    assert not is_running(program.child)
    return errors


def test_killed_rank_is_reported_with_signal_and_last_phase_and_logged(
    paused: tuple[Path, Program],
) -> None:
    folder, program = paused
    os.kill(program.child, signal.SIGKILL)
    errors = wait_for_abort(program)
    assert program.main.returncode == ExitCode.RANK_FAILED
    first, *rest = errors.splitlines()
    assert f"rank 1 (pid {program.child} on {socket.gethostname()})" in first
    # The phase belongs to the last heartbeat; the rank may be some steps further.
    assert re.search(
        r"was killed by SIGKILL\. Last seen in (set-up|step \d+|checkpoint 6):$", first
    )
    assert any("train.py:" in line for line in rest)
    assert rest[-1].startswith("Newest checkpoint: step 6. Resume with: python train.py ")
    assert len(errors.splitlines()) < 15
    last = json.loads((folder / "ledger.jsonl").read_text().splitlines()[-1])
    assert (last["event"], last["code"]) == ("fault", ExitCode.RANK_FAILED) and "SIGKILL" in last[
        "reason"
    ]
    assert last["hosts"] == [socket.gethostname()]


def test_suspended_rank_is_reported_and_killed(
    paused: tuple[Path, Program],
) -> None:
    _, program = paused
    os.kill(program.child, signal.SIGSTOP)
    errors = wait_for_abort(program)
    assert program.main.returncode == ExitCode.RANK_FAILED
    assert f"no heartbeat from rank 1 (pid {program.child} on" in errors.splitlines()[0]
    assert "train.py:" in errors


def test_suspended_main_process_is_reported_and_killed_by_other_rank(
    paused: tuple[Path, Program],
) -> None:
    folder, program = paused
    program.main.send_signal(signal.SIGSTOP)
    errors = wait_for_abort(program)
    assert program.main.returncode == -signal.SIGKILL  # SIGTERM would not end a suspended process
    assert errors.startswith("Aborting: no heartbeat from rank 0")
    last = read_events(folder)[-1]  # written by the other rank
    assert (last["event"], last["hosts"]) == ("fault", [socket.gethostname()])


def test_hanging_rank_is_reported_with_stack_before_waiting_ranks(
    paused: tuple[Path, Program],
) -> None:
    folder, program = paused  # it hangs without further action
    errors = wait_for_abort(program)
    assert program.main.returncode == ExitCode.RANK_FAILED
    hanging, waiting = errors.index("rank 0 (pid"), errors.index("rank 1 (pid")
    assert hanging < waiting
    assert f"rank 0 (pid {program.main.pid}" in errors and "stuck in step" in errors
    assert "write_sample" in errors[hanging:waiting] and "waiting in step" in errors[waiting:]
    dumps = folder / "flight_recorder"
    assert f"torchfrtrace --just_print_entries {dumps}\n" in errors
    collectives, _ = read_dir(Namespace(trace_dir=str(dumps), prefix="rank_"))
    # Otherwise NCCL ends the process after 10 minutes. Groups of the checkpoint thread wait longer.
    timeout = TimeLimits(SETUP_SECONDS, STEP_SECONDS, 0).group_timeout.total_seconds()
    for rank in ("rank_0", "rank_1"):
        timeouts = {each["timeout_ms"] for each in collectives[rank]["entries"]}
        assert min(timeouts) == timeout * 1000


def test_failed_rendezvous_ends_after_setup_timeout(command: Any, tmp_path: Path) -> None:
    port = free_port()
    first_of_two = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1"}
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    done = start_python(
        [*command(tmp_path / "run"), "watchdog.setup_seconds=10"],
        environment=first_of_two | address,
    )
    assert done.returncode == ExitCode.RANK_FAILED_BEFORE_SAVE
    assert "in set-up for" in done.stderr and "every node" in done.stderr
    assert len(done.stderr.splitlines()) < 15


def test_port_in_use_is_reported_in_one_line(command: Any, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        done = start_python(
            [*command(tmp_path / "run"), "parallel.tp=2"], environment={"MASTER_PORT": str(port)}
        )
    assert done.returncode == ExitCode.USER_ERROR
    assert f"MASTER_PORT={port} is used by another process" in done.stderr
    assert len(done.stderr.splitlines()) == 1
