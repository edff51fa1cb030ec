"""One fault per run of the program: its messages, its exit code, and how it resumes."""

import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import (
    FAULT_STEPS,
    ROOT,
    read_events,
    read_metrics,
    reproducible_metrics,
    start_program,
)
from fork_server import Fault, ForkServer

from resilience import lock
from resilience.exit_codes import ExitCode
from resilience.run_folder import RunFolder
from resilience.watchdog import PEER_FAILURES

FORWARD = "model.llama.Llama.forward"  # called once a step on each rank of this run
ALWAYS = 10**9
TP2 = "parallel.tp=2"


def test_documentation_lists_every_exit_code() -> None:
    documented = re.findall(r"^\| (\d+) \|", (ROOT / "docs/faults.md").read_text(), re.MULTILINE)
    assert [int(code) for code in documented] == [int(code) for code in ExitCode]


def flip(path: Path) -> None:
    """Flip one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


# ---------------------------------------------------------------- non-finite losses


def test_non_finite_update_on_one_rank_is_skipped_on_all_ranks_and_reported(
    fork_server: ForkServer, train_arguments: Any, uninterrupted: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    bad = Fault(rank=1, function=FORWARD, call=9, last_call=10, action="nan")
    launch = fork_server.run(train_arguments(folder, TP2), 2, bad)
    assert launch.exit_codes == {0: 0, 1: 0}, launch.output()
    expected, found = uninterrupted(2, TP2), reproducible_metrics(folder)
    assert [line["batch_hash"] for line in found] == [line["batch_hash"] for line in expected]
    assert found[:8] == expected[:8]
    assert [line["step"] for line in read_events(folder) if line["event"] == "skip"] == [9, 10]
    assert (
        "Step 10: " in launch.output()
        and "samples 72 to 79; 2 consecutive, 2 in total" in launch.output()
    )
    # Stopping and resuming after the skipped steps does not change the steps that follow.
    again = tmp_path / "again"
    stopped = fork_server.run(train_arguments(again, TP2), 2, bad, Fault(0, 14, "SIGTERM", FORWARD))
    assert stopped.exit_codes == {0: ExitCode.TERMINATED, 1: ExitCode.TERMINATED}, stopped.output()
    assert fork_server.run(train_arguments(again, TP2), 2).exit_codes == {0: 0, 1: 0}
    assert reproducible_metrics(again) == found


def test_crash_in_native_code_prints_the_python_traceback(
    fork_server: ForkServer, train_arguments: Any, tmp_path: Path
) -> None:
    crash = Fault(rank=0, call=6, action="SIGSEGV", function=FORWARD)
    launch = fork_server.run(train_arguments(tmp_path / "run"), 1, crash)
    assert launch.exit_codes == {0: -11}
    assert "Fatal Python error: Segmentation fault" in launch.output()
    assert re.search(r'File ".*train.py", line \d+ in train_step', launch.output())


def test_three_consecutive_skips_rewind_and_exclude_their_samples_despite_later_kills(
    fork_server: ForkServer, train_arguments: Any, uninterrupted: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    bad = Fault(rank=0, function=FORWARD, call=10, last_call=12, action="nan")
    launch = fork_server.run(train_arguments(folder), 1, bad)
    assert launch.exit_codes == {0: 0}, launch.output()
    longer = uninterrupted(1, f"train.max_steps={FAULT_STEPS + 3}", "optim.schedule_steps=24")
    hashes = [line["batch_hash"] for line in longer]
    found = reproducible_metrics(folder)
    assert [line["batch_hash"] for line in found] == hashes[:9] + hashes[12:]
    assert found[:9] == uninterrupted(1)[:9]
    assert found[-1]["samples"] == (FAULT_STEPS + 3) * 8
    events = [line for line in read_events(folder) if line["event"] in ("rewind", "rewound")]
    assert [(line["event"], line["step"]) for line in events] == [("rewind", 12), ("rewound", 12)]
    assert (events[0]["skip"], events[1]["to"]) == ([9, 12], 8)
    # Killed during the rewind and once more after it, the run gives the same result.
    again = tmp_path / "again"
    kill = Fault(rank=0, function="training.recovery._load_or_initialize", call=2, action="SIGKILL")
    assert fork_server.run(train_arguments(again), 1, bad, kill).exit_codes == {0: -9}
    arguments = train_arguments(again, "checkpoint.async_save=false")
    flip(again / "rewinds.json")
    launch = fork_server.run(arguments, 1)
    assert launch.exit_codes == {0: ExitCode.REWINDS} and "is damaged" in launch.output()
    (remedy,) = re.findall(r"add (run\.allow_changes=\S+) to the command", launch.output())
    launch = fork_server.run([*arguments, remedy], 1, Fault(0, 6, "SIGKILL", FORWARD))
    assert launch.exit_codes == {0: -9} and "excluding batches 9 to 11" in launch.output()
    assert (again / "rewinds.json.damaged").exists()
    assert fork_server.run(arguments, 1).exit_codes == {0: 0}
    assert reproducible_metrics(again) == found
    starts = [line["step"] for line in read_events(again) if line["event"] == "start"]
    assert starts == [0, 8, 12]  # the rewind is not repeated


def test_run_whose_losses_stay_non_finite_exits_with_diverged(
    fork_server: ForkServer, train_arguments: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    bad = Fault(rank=0, function=FORWARD, call=10, last_call=ALWAYS, action="nan")
    few = ("faults.max_consecutive_skips=2", "faults.max_rewinds=2")
    launch = fork_server.run(train_arguments(folder, *few), 1, bad)
    assert launch.exit_codes == {0: ExitCode.DIVERGED}, launch.output()
    assert "faults.max_rewinds=2" in launch.output()
    skips = [line["skip"] for line in read_events(folder) if line["event"] == "rewind"]
    assert skips == [[9, 11], [8, 13]] or len(skips) == 2
    assert read_events(folder)[-1]["code"] == ExitCode.DIVERGED


# ---------------------------------------------------------------- silent data corruption


def test_corrupted_replica_is_restored_and_a_second_corruption_on_its_host_stops_the_run(
    fork_server: ForkServer, train_arguments: Any, uninterrupted: Any, tmp_path: Path
) -> None:
    folder, mesh = tmp_path / "run", "parallel.dp_replicate=2"
    arguments = train_arguments(folder, mesh, "faults.replica_check_interval=3")
    step = "training.optimizer.AdamW.step"
    flips = [Fault(1, call, "flip", step) for call in (5, 13)]
    launch = fork_server.run(arguments, 2, *flips)
    assert launch.exit_codes == dict.fromkeys((0, 1), ExitCode.CORRUPTION), launch.output()
    # Step 5 is repeated from the checkpoint of step 4; a flip in step 11 precedes the next save.
    faults = [line for line in read_events(folder) if line["event"] == "fault"]
    assert [line["step"] for line in faults] == [6, 12]
    assert all(line["ranks"] == [0, 1] and len(line["hosts"]) == 2 for line in faults)
    assert "Restored step 4, and repeating the steps after it." in launch.output()
    assert RunFolder(folder).committed_steps()[-1] == 8
    assert fork_server.run(arguments, 2).exit_codes == {0: 0, 1: 0}
    assert reproducible_metrics(folder) == uninterrupted(2, mesh)


def test_rank_that_computes_non_finite_losses_of_good_samples_stops_the_run(
    fork_server: ForkServer, train_arguments: Any, tmp_path: Path
) -> None:
    folder, mesh = tmp_path / "run", "parallel.dp_shard=2"
    transient = Fault(rank=1, function=FORWARD, call=6, action="nan")
    # The next forward passes of rank 1 are the two of the rerun, and step 7.
    broken = Fault(rank=1, function=FORWARD, call=11, last_call=ALWAYS, action="nan")
    launch = fork_server.run(train_arguments(folder, mesh), 2, transient, broken)
    assert launch.exit_codes == dict.fromkeys((0, 1), ExitCode.CORRUPTION), launch.output()
    output = " ".join(launch.output().split())
    assert "Step 6 was recomputed: its loss is finite and equal on other ranks" in output
    assert re.search(r"Stopped after step 9: Silent data corruption on rank 1 \(\S+\): ", output)
    reruns = [line for line in read_events(folder) if line["event"] == "rerun"]
    assert [line["faulty"] for line in reruns] == [[], [1]]
    assert RunFolder(folder).committed_steps()[-1] == 8


@pytest.mark.parametrize("axis", ["tp", "cp", "pp"])
def test_rerun_sees_the_loss_of_each_rank_of_a_data_parallel_group(
    fork_server: ForkServer, train_arguments: Any, tmp_path: Path, axis: str
) -> None:
    """The first rank of the group alone has a wrong loss, or wrong hidden states of a stage."""
    mesh = (f"parallel.{axis}=2", "parallel.dp_shard=2")
    broken = Fault(rank=0, function=FORWARD, call=2, last_call=ALWAYS, action="nan")
    launch = fork_server.run(train_arguments(tmp_path / "run", *mesh), 4, broken)
    assert launch.exit_codes == dict.fromkeys(range(4), ExitCode.CORRUPTION), launch.output()
    reruns = [line for line in read_events(tmp_path / "run") if line["event"] == "rerun"]
    assert [(line["step"], line["faulty"]) for line in reruns] == [(2, [0])]


# ---------------------------------------------------------------- disks and files


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Return a run folder whose checkpoints are on a disk of 2 MB; one checkpoint has 1.6 MB."""
    disk = tmp_path / "run" / "checkpoints"
    disk.mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small disk requires root")
    try:
        yield tmp_path / "run"
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_full_disk_ends_or_continues_the_run_as_configured_and_it_resumes_with_free_space(
    fork_server: ForkServer, train_arguments: Any, uninterrupted: Any, small_disk: Path
) -> None:
    launch = fork_server.run(train_arguments(small_disk, TP2), 2)
    assert launch.exit_codes == {0: ExitCode.SAVE_FAILED, 1: ExitCode.SAVE_FAILED}, launch.output()
    assert (
        "Could not save a checkpoint at step 8" in launch.output()
        and "No space left" in launch.output()
    )
    assert "Traceback" not in launch.output() + launch.output(1)
    disk = small_disk / "checkpoints"
    assert [path.name for path in disk.iterdir()] == ["step-00000004"]
    launch = fork_server.run(train_arguments(small_disk, TP2, "checkpoint.on_failure=continue"), 2)
    assert launch.exit_codes[0] == ExitCode.SAVE_FAILED, (
        launch.output()
    )  # the last step was not saved
    assert reproducible_metrics(small_disk) == uninterrupted(2, TP2)
    subprocess.run(["mount", "-o", "remount,size=20m", str(disk)], check=True)
    launch = fork_server.run(train_arguments(small_disk, TP2), 2)
    assert launch.exit_codes == {0: 0, 1: 0}, launch.output()
    assert reproducible_metrics(small_disk) == uninterrupted(2, TP2)


@pytest.fixture(scope="module")
def stopped_run(
    fork_server: ForkServer, train_arguments: Any, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Return a killed run of two ranks with checkpoints at steps 4 and 8."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    kills = [Fault(rank, 10, "SIGKILL", FORWARD) for rank in (0, 1)]
    fork_server.run(train_arguments(folder, TP2, "checkpoint.async_save=false"), 2, *kills)
    names = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert names == ["step-00000004", "step-00000008"]
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Return the files of a run except its lock, which names the last process."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != "lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def copy_of(folder: Path, to: Path) -> Path:
    subprocess.run(["cp", "-r", str(folder), str(to)], check=True)
    return to


def test_file_denied_to_one_rank_stops_all_and_a_failing_disk_makes_all_fall_back(
    fork_server: ForkServer,
    train_arguments: Any,
    uninterrupted: Any,
    stopped_run: Path,
    tmp_path: Path,
) -> None:
    folder = copy_of(stopped_run, tmp_path / "run")
    newest = str(folder / "checkpoints" / "step-00000008")
    denied = Fault(1, 1, "EACCES", folder=newest, event="read __0_0.*", last_call=ALWAYS)
    launch = fork_server.run(train_arguments(folder, TP2), 2, denied)
    assert launch.exit_codes == dict.fromkeys((0, 1), ExitCode.USER_ERROR), launch.output()
    assert "__0_0.distcp cannot be read (Permission denied)" in launch.output()
    assert RunFolder(folder).committed_steps() == [4, 8]
    failing = replace(denied, action="EIO")
    launch = fork_server.run(train_arguments(folder, TP2), 2, failing)
    assert launch.exit_codes == {0: 0, 1: 0}, launch.output()
    message = re.search(r"Skipped damaged step-00000008.*", launch.output())
    assert message and "rank 1" in message[0] and "Input/output error" in message[0]
    assert reproducible_metrics(folder) == uninterrupted(2, TP2)


def test_run_without_a_valid_checkpoint_stops_and_changes_no_file(
    fork_server: ForkServer, train_arguments: Any, stopped_run: Path, tmp_path: Path
) -> None:
    folder = copy_of(stopped_run, tmp_path / "run")
    for step in (4, 8):
        os.truncate(folder / f"checkpoints/step-{step:08d}/__1_0.distcp", 100)
    before = contents(folder)
    launch = fork_server.run(train_arguments(folder, TP2), 2)
    assert launch.exit_codes == {0: ExitCode.NO_CHECKPOINT, 1: ExitCode.NO_CHECKPOINT}, (
        launch.output()
    )
    for part in ("step-00000004", "step-00000008", "__1_0.distcp"):
        assert part in launch.output()
    assert contents(folder) == before


# ---------------------------------------------------------------- time limit and lock


def test_run_saves_and_stops_before_its_time_limit(
    fork_server: ForkServer, train_arguments: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    long = f"train.max_steps={ALWAYS}"
    launch = fork_server.run(
        train_arguments(folder, long, "optim.schedule_steps=24", "run.time_limit=0.1"), 1
    )
    assert launch.exit_codes == {0: ExitCode.STOPPED}, launch.output()
    events = read_events(folder)
    assert [event["event"] for event in events[-2:]] == ["save", "stop"]
    assert events[-1]["reason"] == "stopped"


def test_second_run_in_a_folder_is_rejected_with_host_pid_and_age(
    command: Any, tmp_path: Path
) -> None:
    held = lock.acquire_lock(RunFolder(tmp_path / "run"), print)
    try:
        done = start_program(command(tmp_path / "run"))
    finally:
        held.release()
    assert done.returncode == ExitCode.LOCKED
    assert re.search(rf"process {os.getpid()} on \S+, started 0:0\d:\d\d ago", done.stderr)
    assert len(done.stderr.splitlines()) == 1 and sys.executable not in done.stderr


@pytest.mark.parametrize(
    ("call", "function"),
    [(1, "training.optimizer.build_optimizer"), (6, FORWARD)],
    ids=["set-up", "step"],
)
def test_all_ranks_exit_if_one_is_out_of_memory(
    fork_server: ForkServer, train_arguments: Any, tmp_path: Path, call: int, function: str
) -> None:
    """The other rank waits in a collective, and no launcher terminates it."""
    folder = tmp_path / "run"
    error = "OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 MiB."
    full = Fault(1, call, error, function)
    launch = fork_server.run(train_arguments(folder, TP2), 2, full, terminate_on_failure=False)
    assert launch.exit_codes == {0: ExitCode.OUT_OF_MEMORY, 1: ExitCode.OUT_OF_MEMORY}
    message = launch.output(1)
    assert "rank 1 is out of memory: measured peak" in message and "; use " in message
    assert "Traceback" not in message and "out of memory" not in launch.output(0)
    assert "Resume with" not in launch.output(0)
    if function == FORWARD:
        last = read_events(folder)[-1]
        assert (last["event"], last["code"]) == ("fault", ExitCode.OUT_OF_MEMORY)


@pytest.mark.parametrize(
    ("call", "function"),
    [(1, "training.optimizer.build_optimizer"), (6, FORWARD)],
    ids=["set-up", "step"],
)
def test_all_ranks_exit_to_be_relaunched_if_the_gpu_of_one_is_defective(
    fork_server: ForkServer, train_arguments: Any, tmp_path: Path, call: int, function: str
) -> None:
    folder = tmp_path / "run"
    ecc = Fault(1, call, "RuntimeError: CUDA error: uncorrectable ECC error encountered", function)
    launch = fork_server.run(train_arguments(folder, TP2), 2, ecc, terminate_on_failure=False)
    code = launch.exit_codes[0]
    assert launch.exit_codes == {0: code, 1: code} and code in PEER_FAILURES
    message = (
        f"rank 1 on {socket.gethostname()} has a hardware fault: CUDA error: uncorrectable ECC"
    )
    assert message in launch.output(1) and "Traceback" not in launch.output(1)
    assert "hardware fault" not in launch.output(0) or function != FORWARD
    last = read_events(folder)[-1]
    assert (last["event"], last["code"]) == ("fault", code)
    assert last["hosts"] == [socket.gethostname()] and last["reason"].startswith(message)
    # The log of a launch that failed in its set-up does not disturb the next one.
    assert fork_server.run(train_arguments(folder, TP2), 2).exit_codes == {0: 0, 1: 0}


def test_rewind_to_step_0_after_a_rerun_trains_from_the_initial_weights(
    fork_server: ForkServer, train_arguments: Any, tmp_path: Path
) -> None:
    """A forward without backward leaves weights gathered, in which initial values would be lost.

    Steps 3 to 5 are bad, each followed by two forwards of the rerun. There is no checkpoint yet.
    """
    found = []
    for size, last_call in ((1, 5), (2, 11)):
        folder = tmp_path / str(size)
        bad = [Fault(rank, 3, "nan", FORWARD, last_call=last_call) for rank in range(size)]
        options = (f"parallel.dp_shard={size}", "checkpoint.interval=100", "train.max_steps=8")
        launch = fork_server.run(train_arguments(folder, *options), size, *bad)
        assert set(launch.exit_codes.values()) == {0}, launch.output()
        assert "Rewound to step 0" in launch.output()
        found.append(read_metrics(folder))
    for one, two in zip(*found, strict=True):
        assert one["batch_hash"] == two["batch_hash"]
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-6)
