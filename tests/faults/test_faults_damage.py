"""Files that cannot be written or read are reported, and the run's results do not change."""

import os
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from conftest import (
    FAULT_STEPS,
    REPRODUCIBLE_KEYS,
    read_events,
    read_metrics,
    reproducible_metrics,
)
from fork_server import Fault, ForkServer
from processes import is_running, wait_for

from resilience.exit_codes import ExitCode

ALWAYS = 10**9
TP2 = "parallel.tp=2"
KEEP_ALL = ("checkpoint.interval=1", "checkpoint.keep_last=null")


def flip(path: Path) -> None:
    """Flip one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    """Remove the last byte of a file."""
    os.truncate(path, path.stat().st_size - 1)


def test_each_damaged_file_is_named_and_all_ranks_fall_back_to_the_newest_valid_checkpoint(
    fork_server: ForkServer,
    train_arguments: Callable[..., list[str]],
    uninterrupted: Any,
    tmp_path: Path,
) -> None:
    """One launch after damaging one checkpoint per combination of file and damage."""
    arguments = train_arguments(tmp_path / "run", *KEEP_ALL, TP2)
    first = fork_server.run(arguments, 2)
    assert set(first.exit_codes.values()) == {0}, first.output(0) + first.output(1)
    expected = reproducible_metrics(tmp_path / "run")
    checkpoints = sorted((tmp_path / "run" / "checkpoints").iterdir())
    names = sorted(path.name for path in checkpoints[0].iterdir())
    shards = ["__0_0.distcp", "__1_0.distcp"]
    assert names == [".metadata", "COMMITTED", *shards, "manifest.json", "tokenizer.model"]
    damages = [(name, damage) for name in names for damage in (flip, truncate)]
    assert len(checkpoints) > len(damages) + 1
    damaged = list(zip(reversed(checkpoints), damages, strict=False))
    for checkpoint, (name, damage) in damaged:
        damage(checkpoint / name)

    launch = fork_server.run(arguments, 2)
    assert launch.exit_codes == {0: 0, 1: 0}, launch.output()
    output = " ".join(launch.output().split())
    for checkpoint, (name, damage) in damaged:
        message = re.search(rf"Skipped damaged {checkpoint.name}, [^:]*: .*?(?= Skipped|$)", output)
        assert message and re.search(rf"(?<!\S){re.escape(name)}(?!\S)", message[0]), (
            name,
            damage,
            output,
        )
        (aside,) = checkpoint.parent.glob(f"{checkpoint.name}.damaged-*")
        assert (aside / name).exists()
    starts = [event["step"] for event in read_events(tmp_path / "run") if event["event"] == "start"]
    assert starts == [0, int(checkpoints[-len(damages) - 1].name[-8:])]
    assert reproducible_metrics(tmp_path / "run") == expected == uninterrupted(2, TP2)


def test_full_disk_in_any_phase_of_saving_is_reported_and_training_continues(
    fork_server: ForkServer,
    train_arguments: Callable[..., list[str]],
    uninterrupted: Any,
    tmp_path: Path,
) -> None:
    """In one run, the n-th save fails at the n-th change that a save makes to the disk."""
    every = Fault(
        0, 1, "print", folder=str(tmp_path / "reference" / "checkpoints"), last_call=ALWAYS
    )
    launch = fork_server.run(train_arguments(tmp_path / "reference", "train.max_steps=1"), 1, every)
    changes = re.findall(r"^fault: (.+)$", launch.output(), re.MULTILINE)
    needs_space = re.compile(
        r"(mkdir|write|fsync) \.step(?!/\.metadata\.tmp$)(/\S+)?|rename \.step"
    )
    phases = [*dict.fromkeys(change for change in changes if needs_space.fullmatch(change))]
    assert 6 < len(phases) < FAULT_STEPS - 2

    folder = tmp_path / "run"
    full = [
        Fault(0, 1, "ENOSPC", folder=str(folder / "checkpoints"), event=re.escape(phase))
        for phase in phases
    ]
    few = ("checkpoint.interval=1", "checkpoint.on_failure=continue", "checkpoint.keep_last=2")
    launch = fork_server.run(train_arguments(folder, *few), 1, *full)
    assert launch.exit_codes == {0: 0}, launch.output()
    failed = [event for event in read_events(folder) if event["event"] == "save_failed"]
    assert [event["step"] for event in failed] == list(range(1, len(phases) + 1)), launch.output()
    assert all("No space left on device" in event["error"] for event in failed)
    assert reproducible_metrics(folder) == uninterrupted(1)
    names = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert names == [f"step-{step:08d}" for step in (FAULT_STEPS - 1, FAULT_STEPS)]


def test_checkpoint_that_cannot_be_deleted_does_not_affect_the_run(
    fork_server: ForkServer,
    train_arguments: Callable[..., list[str]],
    uninterrupted: Any,
    tmp_path: Path,
) -> None:
    folder = tmp_path / "run"
    undeletable = Fault(
        *(0, 1, "EACCES"),
        folder=str(folder / "checkpoints"),
        event=r"remove \.step/.*",
        last_call=ALWAYS,
    )
    launch = fork_server.run(train_arguments(folder, "checkpoint.keep_last=1"), 1, undeletable)
    assert launch.exit_codes == {0: 0}, launch.output()
    message = r"\.step-00000004\.\S+ \(Permission denied\)\. Continuing"
    assert re.search(message, " ".join(launch.output().split()))
    assert reproducible_metrics(folder) == uninterrupted(1)


def test_failing_logs_and_trackers_are_reported_once_and_do_not_change_the_weights(
    fork_server: ForkServer, train_arguments: Callable[..., list[str]], tmp_path: Path
) -> None:
    reference, full = tmp_path / "reference", tmp_path / "full"
    assert fork_server.run(train_arguments(reference), 1).exit_codes == {0: 0}
    logs = r"write (metrics|ledger)\.jsonl|write (loss|tensorboard).*"
    no_space = Fault(0, 1, "ENOSPC", folder=str(full), event=logs, last_call=ALWAYS)
    launch = fork_server.run(
        train_arguments(full, "log.tensorboard=true", "log.wandb=project"), 1, no_space
    )
    assert launch.exit_codes == {0: 0}, launch.output()
    output = " ".join(launch.output().split())
    for failure in (
        r"Could not write \S+ in \S+ \(No space left .* free\)",
        r"Could not write W&B in \S+ \(\w+: Run initialization has timed out\)",
    ):
        assert len(re.findall(failure, output)) == 1, f"{failure}:\n{output}"
    last = Path("checkpoints") / f"step-{FAULT_STEPS:08d}" / "__0_0.distcp"
    assert (full / last).read_bytes() == (reference / last).read_bytes()


def test_file_system_that_becomes_read_only_is_reported_once(
    fork_server: ForkServer, train_arguments: Callable[..., list[str]], tmp_path: Path
) -> None:
    """Once as the reason that outputs fail, and once as the reason to stop."""
    folder = tmp_path / "run"
    read_only = Fault(0, 30, "EROFS", folder=str(folder), last_call=ALWAYS)
    options = ("log.tensorboard=true", "validation.interval=5", "validation.sample_tokens=4")
    launch = fork_server.run(train_arguments(folder, *options), 1, read_only)
    assert launch.exit_codes == {0: ExitCode.SAVE_FAILED}, launch.output()
    output = " ".join(launch.output().split())
    assert output.count("Read-only file system") == 2, output
    assert len(re.findall(r"Could not write \S+ in \S+ \(Read-only file system\)", output)) == 1
    saves = r"Could not save a checkpoint at step 4: (rank 0: )?Read-only file system\. Stopping"
    assert len(re.findall(saves, output)) == 1, output
    assert "Traceback" not in output


OUTPUTS = {
    "training.run_summary.header": "the header",
    "training.throughput.build_throughput": "the throughput",
    "training.console.Console.log": "metrics on the console",
    "training.loss_plot.plot_loss": "loss.png",
    "training.shutdown.compute_goodput": "the goodput",
    "training.shutdown.summary": "the summary",
    "training.shutdown.resume_command": "the command to resume",
}


def test_damaged_logs_and_failing_outputs_change_no_exit_code(
    fork_server: ForkServer,
    train_arguments: Callable[..., list[str]],
    uninterrupted: Any,
    tmp_path: Path,
) -> None:
    folder = tmp_path / "run"
    stop = Fault(0, 10, "SIGUSR1", "model.llama.Llama.forward")
    launch = fork_server.run(train_arguments(folder), 1, stop)
    assert launch.exit_codes == {0: ExitCode.STOPPED}, launch.output()
    ledger, metrics = folder / "ledger.jsonl", folder / "metrics.jsonl"
    flipped = ledger.read_bytes().replace(b"productive_seconds", b"prodXctive_seconds")
    ledger.write_bytes(flipped.replace(b'"time": "2', b'"time": "x', 1))
    metrics.write_bytes(b"")
    bug = "RuntimeError: a bug"
    bugs = [Fault(0, 1, bug, name, last_call=ALWAYS) for name in OUTPUTS]
    stop = Fault(0, 6, "SIGUSR1", "model.llama.Llama.forward")
    launch = fork_server.run(train_arguments(folder, "validation.interval=1"), 1, *bugs, stop)
    assert launch.exit_codes == {0: ExitCode.STOPPED}, launch.output()
    output = " ".join(launch.output().split())
    assert (
        "ledger.jsonl is damaged and is kept as ledger.jsonl.damaged (invalid lines: 1)" in output
    )
    assert re.search(r"has lost the metrics of steps 1 to 1\d\.", output), output
    named = {name for name in OUTPUTS.values() if output.count(f"Could not write {name} ") == 1}
    assert named == {*OUTPUTS.values()} - {"the summary"}, output
    metrics.write_bytes(b"\xff\n")
    ledger.write_bytes(bytes(range(256)) * 9 + b'{"event": "start", "time": -1, "step": NaN}\n')
    launch = fork_server.run(train_arguments(folder), 1, *bugs[-3:])
    assert launch.exit_codes == {0: ExitCode.FINISHED}, launch.output()
    assert "Could not write the summary " in launch.output()
    assert "has no event of earlier launches" in " ".join(launch.output().split())
    found = [{key: line[key] for key in REPRODUCIBLE_KEYS} for line in read_metrics(folder)]
    assert found == uninterrupted(1)[-len(found) :]  # the samples and losses of the last steps


def test_suspended_rank_ends_the_run_which_then_resumes_bit_for_bit(
    fork_server: ForkServer,
    train_arguments: Callable[..., list[str]],
    uninterrupted: Any,
    tmp_path: Path,
) -> None:
    folder = tmp_path / "run"
    # A background save might never finish with one rank suspended, so save synchronously.
    options = ("watchdog.step_seconds=5", "checkpoint.async_save=false")
    suspend = Fault(1, 10, "SIGSTOP", "model.llama.Llama.forward")
    launch = fork_server.start(
        train_arguments(folder, TP2, *options), 2, suspend, terminate_on_failure=False
    )
    wait_for(lambda: not is_running(launch.pids[0]), "rank 0 to exit")
    os.kill(launch.pids[1], signal.SIGKILL)  # as the launcher of a suspended process does
    assert fork_server.wait(launch) == [ExitCode.RANK_FAILED, -signal.SIGKILL], launch.output()
    assert "no heartbeat from rank 1 (pid" in launch.output()
    shutil.rmtree(folder / "checkpoints" / "step-00000008")  # the newest checkpoint is lost as well
    launch = fork_server.run(train_arguments(folder, TP2), 2)
    assert launch.exit_codes == {0: 0, 1: 0}, launch.output()
    assert reproducible_metrics(folder) == uninterrupted(2, TP2)
