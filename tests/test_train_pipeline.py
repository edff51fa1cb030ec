"""Runs of `train.py` on a pipeline: hang reports, outputs, and programs that use its results."""

import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
from fork_server import Fault, ForkServer, read
from processes import linux, paused_training, wait_for, wait_until_blocked

from resilience.exit_codes import ExitCode

PP2 = "parallel.pp=2"
STEP_SECONDS = 20  # longer than a step on a loaded machine


@linux
@pytest.mark.parametrize("action", ["SIGKILL", "SIGSTOP"])
def test_report_of_a_dead_stage_says_what_the_other_stage_waits_for(
    fork_server: ForkServer, train_arguments: Any, tmp_path: Path, action: str
) -> None:
    """The last stage dies in step 6, before it sends the gradients of micro-batch 1."""
    fault = Fault(1, 12, action, "parallel.pipeline_links.Links.send")
    limit = f"watchdog.step_seconds={STEP_SECONDS}"
    options = (PP2, "train.micro_batch_size=4", "checkpoint.async_save=false", limit)
    arguments = train_arguments(tmp_path / "run", *options)
    launch = fork_server.start(arguments, 2, fault, terminate_on_failure=False)
    wait_for(lambda: "Last collectives" in read(launch.stderr[0]), "the report")
    if action == "SIGSTOP":
        os.kill(launch.pids[1], signal.SIGKILL)
    codes = fork_server.wait(launch)
    assert codes == [ExitCode.RANK_FAILED, -signal.SIGKILL]
    errors = launch.output(0)
    assert "no heartbeat from rank 1 (pid" in errors
    report = "rank 0 (stage 0) waits for micro-batch 1 from stage 1 (gradients)"
    assert report in errors.splitlines()


@linux
def test_report_of_a_stage_that_hangs_says_what_the_other_stage_waits_for(
    command: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    limits = [f"watchdog.step_seconds={STEP_SECONDS}", "validation.sample_tokens=1"]
    report = "rank 1 (stage 1) waits for micro-batch 0 from stage 0 (hidden states)"
    with paused_training([*command(folder), PP2, *limits], folder) as program:
        wait_until_blocked(program.main.pid)
        errors = program.main.communicate(timeout=300)[1]
        program.wait_for_child()
    assert program.main.returncode == ExitCode.RANK_FAILED
    assert re.search(r"^rank 0 \(pid .* stuck in step ", errors.removeprefix("Aborting: "))
    assert report in errors.splitlines()


@linux
def test_stage_reports_what_it_waits_for_from_a_suspended_main_process(
    command: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    limits = [f"watchdog.step_seconds={STEP_SECONDS}", "validation.sample_tokens=1"]
    report = "rank 1 (stage 1) waits for micro-batch 0 from stage 0 (hidden states)"
    with paused_training([*command(folder), PP2, *limits], folder) as program:
        wait_until_blocked(program.main.pid)
        program.main.send_signal(signal.SIGSTOP)
        errors = program.main.communicate(timeout=300)[1]
        program.wait_for_child()
    assert program.main.returncode == -signal.SIGKILL
    assert errors.startswith("Aborting: no heartbeat from rank 0")
    assert report in errors.splitlines()
