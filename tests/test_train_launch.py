"""Launchers, restarts, kills and signals do not change the results of a run."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, STEPS, read_metrics, start_program, start_python
from processes import DEADLINE, Program, linux, paused_training

from resilience.signals import REPEAT_SECONDS

# Meshes sum in different orders: rounding errors of 1e-7 per sum, growing over the steps.
TOLERANCE = 1e-6

Completed = subprocess.CompletedProcess[str]


@pytest.fixture(scope="module")
def single(command: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Completed]:
    """Return folder and output of the run on one process."""
    folder = tmp_path_factory.mktemp("single") / "run"
    return folder, start_program(command(folder))


@pytest.fixture(scope="module")
def pair(command: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Completed]:
    """Return folder and output of the run on two processes launched by the program."""
    folder = tmp_path_factory.mktemp("pairs") / "run"
    return folder, start_python([*command(folder), "parallel.tp=2"])


def curve(folder: Path, key: str) -> list[Any]:
    """Return a metric of every step in order; check that no step is missing."""
    lines = read_metrics(folder)
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line[key] for line in lines]


def logged_steps(done: Completed) -> list[int]:
    """Return the steps of the metrics lines on standard output."""
    return [int(step) for step in re.findall(rf"^ *(\d+)/{STEPS} ", done.stdout, re.MULTILINE)]


def printed_command(done: Completed, description: str) -> list[str]:
    """Return the arguments of the command printed under a description in the summary."""
    lines = done.stdout.splitlines()
    words = shlex.split(lines[next(i for i, line in enumerate(lines) if description in line) + 1])
    assert words[0] == "python"
    return words[1:]


# ---------------------------------------------------------------- output


def test_successful_run_prints_once_and_nothing_to_standard_error(
    single: tuple[Path, Completed], pair: tuple[Path, Completed]
) -> None:
    for _, done in (single, pair):
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        assert logged_steps(done) == list(range(1, STEPS + 1))
    # Without continuation lines, whose number depends on the seconds in the summary.
    one, two = (re.findall(r"^ {0,12}\S.*$", done.stdout, re.M) for _, done in (single, pair))
    assert len(one) == len(two), "the second rank prints too"


def test_run_whose_output_is_closed_finishes_with_a_console_log(
    command: Any, tmp_path: Path
) -> None:
    arguments = [sys.executable, *command(tmp_path / "run"), "parallel.tp=2"]
    pipe, both = subprocess.PIPE, subprocess.STDOUT
    program = subprocess.Popen(arguments, cwd=ROOT, stdout=pipe, stderr=both, text=True)
    assert program.stdout is not None
    next(line for line in program.stdout if line.lstrip().startswith(f"1/{STEPS} "))
    program.stdout.close()
    assert program.wait(DEADLINE) == 0
    heading, *lines = (tmp_path / "run" / "console.log").read_text().splitlines()
    assert "without standard output (Broken pipe) and standard error (Broken pipe)" in heading
    assert any(line.startswith("Finished: ") for line in lines)


# ---------------------------------------------------------------- launchers


def test_torchrun_gives_same_run_as_self_launch(
    command: Any, pair: tuple[Path, Completed], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node=2"]
    done = start_python([*launcher, *command(folder), "parallel.tp=2"])
    assert done.returncode == 0, done.stderr
    assert "launched by torchrun" in done.stdout and "fp32, sdpa attention" in done.stdout
    assert logged_steps(done) == list(range(1, STEPS + 1))
    reference, _ = pair
    assert curve(folder, "batch_hash") == curve(reference, "batch_hash")
    losses = curve(folder, "loss")
    assert losses == pytest.approx(curve(reference, "loss"), rel=TOLERANCE, abs=0)


# ---------------------------------------------------------------- restarts


@pytest.fixture
def finished(single: tuple[Path, Completed], tmp_path: Path) -> tuple[Path, Callable[..., Any]]:
    """Return a copy of the finished run and a function that runs a command of its summary."""
    source, done = single
    folder = tmp_path / "run"
    shutil.copytree(source, folder)

    def start(description: str, omit: str = " ") -> Completed:
        words = [w for w in printed_command(done, description) if not w.startswith(omit)]
        again = start_program([word.replace(str(source), str(folder)) for word in words])
        assert again.returncode == 0, again.stderr
        assert again.stderr == ""
        return again

    return folder, start


def test_same_length_of_a_finished_run_changes_nothing(
    finished: tuple[Path, Callable[..., Completed]],
) -> None:
    folder, start = finished
    kept = ["metrics.jsonl", "samples.txt", f"checkpoints/step-{STEPS:08d}/manifest.json"]
    before = [(folder / name).read_bytes() for name in kept]
    again = start("Train longer", omit="train.max_steps=")
    assert logged_steps(again) == []
    assert "finished already" in again.stdout.lower()
    assert [(folder / name).read_bytes() for name in kept] == before


def test_printed_command_to_train_longer_resumes_from_last_checkpoint(
    finished: tuple[Path, Callable[..., Completed]],
) -> None:
    folder, start = finished
    before = read_metrics(folder)
    start("Train longer")
    assert read_metrics(folder)[:STEPS] == before
    hashes = curve(folder, "batch_hash")
    assert len(hashes) == len(set(hashes)) == 2 * STEPS  # no batch is repeated
    ledger = [json.loads(line) for line in (folder / "ledger.jsonl").read_text().splitlines()]
    assert [line["step"] for line in ledger if line["event"] == "start"] == [0, STEPS]


# ---------------------------------------------------------------- kills and signals


@pytest.fixture
def paused(command: Any, tmp_path: Path) -> Iterator[tuple[Path, Program]]:
    """Return folder and processes of a run on two ranks, where rank 0 blocks after step 9."""
    with paused_training(
        [*command(tmp_path / "run"), "parallel.tp=2"], tmp_path / "run"
    ) as program:
        yield tmp_path / "run", program


@linux
def test_killed_run_resumes_from_newest_checkpoint_bit_for_bit(
    command: Any, pair: tuple[Path, Completed], paused: tuple[Path, Program]
) -> None:
    folder, program = paused
    program.main.kill()
    program.wait_for_child()
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-00000006"]
    (folder / "samples.txt").unlink()
    done = start_program([*command(folder), "parallel.tp=2"], world_size=2)
    assert done.returncode == 0, done.stderr
    assert logged_steps(done) == list(range(7, STEPS + 1))
    reference, _ = pair
    for key in ("batch_hash", "samples", "loss", "grad_norm"):
        assert curve(folder, key) == curve(reference, key)


CODES = {signal.SIGTERM: 143, signal.SIGUSR1: 75, signal.SIGINT: 130}


def assert_saved_and_stopped(folder: Path, number: signal.Signals, output: str) -> list[str]:
    """Check the clean exit of a run that received a signal in step 9; return its resume command."""
    # The signal arrived after step 9, so the ranks agree on it in the all-reduce of step 10.
    last = output.splitlines()[-3:]
    assert last[0].startswith("Stopped after step 10: ")
    assert last[1].startswith("goodput ")
    assert last[2].startswith("Newest checkpoint: step 10. Resume with: ")
    saved = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert saved == ["step-00000006", "step-00000010"]
    ledger = [json.loads(line) for line in (folder / "ledger.jsonl").read_text().splitlines()]
    assert [(line["event"], line["step"]) for line in ledger][-2:] == [("save", 10), ("stop", 10)]
    assert ledger[-1]["code"] == CODES[number]
    return shlex.split(last[2].partition("Resume with: ")[2])


# Users and schedulers signal the main process, another rank, or all processes.
SIGNALS = {
    "SIGTERM to rank 1": (signal.SIGTERM, lambda program: [program.child]),
    "SIGUSR1 to rank 0": (signal.SIGUSR1, lambda program: [program.main.pid]),
    "SIGINT twice to all": (signal.SIGINT, lambda program: [program.main.pid, program.child] * 2),
}


@linux
@pytest.mark.parametrize("case", SIGNALS)
def test_signal_to_any_rank_saves_once_and_exits_all_ranks_with_its_code(
    command: Any, pair: tuple[Path, Completed], paused: tuple[Path, Program], case: str
) -> None:
    folder, program = paused
    number, receivers = SIGNALS[case]
    for process in receivers(program):
        os.kill(process, number)
    unblock(folder)
    output, errors = program.main.communicate(timeout=DEADLINE)
    program.wait_for_child()
    assert program.main.returncode == CODES[number]
    assert errors == ""
    if program.main.pid in receivers(program):  # another rank cannot print it
        (notice,) = [line for line in output.splitlines() if "Stopping after this step" in line]
        assert ("again to exit at once" in notice) == (number == signal.SIGINT)
    python, *words = assert_saved_and_stopped(folder, number, output)
    assert python == "python"
    if number == signal.SIGTERM:  # resuming is the same after every signal
        (folder / "samples.txt").unlink()
        assert start_program(words, world_size=2).returncode == 0
        reference, _ = pair
        for key in ("batch_hash", "samples", "loss", "grad_norm"):
            assert curve(folder, key) == curve(reference, key)


def unblock(folder: Path) -> None:
    """Read the pipe that the run is blocked on."""
    with (folder / "samples.txt").open() as pipe:
        assert "step 9" in pipe.read()


@linux
def test_second_interrupt_exits_at_once_and_the_first_says_so(
    paused: tuple[Path, Program],
) -> None:
    """The main thread is blocked in step 9, as in a long step, a save or a compilation."""
    folder, program = paused
    assert program.main.stdout is not None
    os.kill(program.main.pid, signal.SIGINT)
    for line in program.main.stdout:
        if "press ctrl-c again" in line.lower():  # while the step is still running
            break
    time.sleep(REPEAT_SECONDS + 0.5)
    os.kill(program.main.pid, signal.SIGINT)
    _, errors = program.main.communicate(timeout=DEADLINE)
    program.wait_for_child()
    assert program.main.returncode == 130
    assert errors.startswith("Exited without saving the last steps. Newest checkpoint: step 6.")
    assert not (folder / "lock").exists()


@linux
def test_interrupt_during_start_up_prints_one_line(command: Any, tmp_path: Path) -> None:
    program = Program([*command(tmp_path / "run"), "parallel.tp=2"])
    try:
        os.kill(program.main.pid, signal.SIGINT)
        output, errors = program.main.communicate(timeout=DEADLINE)
        program.wait_for_child()
    finally:
        program.kill()
    assert program.main.returncode == 130
    assert errors == "Interrupted before the first step.\n"
    loading, plan = output.splitlines()
    assert loading == "Loading …" and plan.startswith("Memory plan:")


@linux
def test_kill_of_main_process_during_start_up_leaves_no_process(
    command: Any, tmp_path: Path
) -> None:
    program = Program([*command(tmp_path / "run"), "parallel.tp=2"])
    try:
        program.main.kill()
        program.wait_for_child()
    finally:
        program.kill()


@linux
def test_kill_of_torchrun_leaves_no_process(command: Any, tmp_path: Path) -> None:
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node=1"]
    arguments = [*launcher, *command(tmp_path / "run")]
    with paused_training(arguments, tmp_path / "run") as program:
        program.main.kill()
        program.wait_for_child()
