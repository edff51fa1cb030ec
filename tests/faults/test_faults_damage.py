"""Files that cannot be written or read are told, and the run comes out as if undisturbed."""

import os
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from conftest import FAULT_STEPS, read_events, reproducible_metrics
from fork_server import Fault, ForkServer
from processes import is_running, wait_for

from resilience.exit_codes import ExitCode

ALWAYS = 10**9
TP2 = "parallel.tp=2"
KEEP_ALL = ("checkpoint.interval=1", "checkpoint.keep_last=null")


def flip(path: Path) -> None:
    """Changes one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    """Takes the last byte away."""
    os.truncate(path, path.stat().st_size - 1)


def test_each_file_of_a_checkpoint_flipped_or_cut_is_named_and_all_fall_back_to_the_whole_one(
    fork_server: ForkServer,
    train_arguments: Callable[..., list[str]],
    uninterrupted: Any,
    tmp_path: Path,
) -> None:
    """As many damaged checkpoints as there are files and damages, and one start."""
    arguments = train_arguments(tmp_path / "run", *KEEP_ALL, TP2)
    first = fork_server.run(arguments, 2)
    assert set(first.exit_codes.values()) == {0}, first.output(0) + first.output(1)
    calm = reproducible_metrics(tmp_path / "run")
    checkpoints = sorted((tmp_path / "run" / "checkpoints").iterdir())
    names = sorted(path.name for path in checkpoints[0].iterdir())
    shards = ["__0_0.distcp", "__1_0.distcp"]
    assert names == [".metadata", "COMMITTED", *shards, "manifest.json", "tokenizer.model"]
    damages = [(name, damage) for name in names for damage in (flip, truncate)]
    assert len(checkpoints) > len(damages) + 1
    hurt = list(zip(reversed(checkpoints), damages, strict=False))
    for checkpoint, (name, damage) in hurt:
        damage(checkpoint / name)

    start = fork_server.run(arguments, 2)
    assert start.exit_codes == {0: 0, 1: 0}, start.output()
    told = " ".join(start.output().split())
    for checkpoint, (name, damage) in hurt:
        about = re.search(rf"Skipped damaged {checkpoint.name}, [^:]*: .*?(?= Skipped|$)", told)
        assert about and re.search(rf"(?<!\S){re.escape(name)}(?!\S)", about[0]), (
            name,
            damage,
            told,
        )
        (aside,) = checkpoint.parent.glob(f"{checkpoint.name}.damaged-*")
        assert (aside / name).exists()
    begun = [event["step"] for event in read_events(tmp_path / "run") if event["event"] == "start"]
    assert begun == [0, int(checkpoints[-len(damages) - 1].name[-8:])]
    assert reproducible_metrics(tmp_path / "run") == calm == uninterrupted(2, TP2)


def test_full_disk_in_any_phase_of_saving_is_told_and_training_goes_on(
    fork_server: ForkServer,
    train_arguments: Callable[..., list[str]],
    uninterrupted: Any,
    tmp_path: Path,
) -> None:
    """One run: its first save fails at the first change to the disk, its second at the second, …"""
    every = Fault(0, 1, "print", folder=str(tmp_path / "calm" / "checkpoints"), last_call=ALWAYS)
    start = fork_server.run(train_arguments(tmp_path / "calm", "train.max_steps=1"), 1, every)
    changes = re.findall(r"^fault: (.+)$", start.output(), re.MULTILINE)
    needs_room = re.compile(r"(mkdir|write|fsync) \.step(?!/\.metadata\.tmp$)(/\S+)?|rename \.step")
    phases = [*dict.fromkeys(change for change in changes if needs_room.fullmatch(change))]
    assert 6 < len(phases) < FAULT_STEPS - 2

    folder = tmp_path / "run"
    full = [
        Fault(0, 1, "ENOSPC", folder=str(folder / "checkpoints"), event=re.escape(phase))
        for phase in phases
    ]
    few = ("checkpoint.interval=1", "checkpoint.on_failure=continue", "checkpoint.keep_last=2")
    start = fork_server.run(train_arguments(folder, *few), 1, *full)
    assert start.exit_codes == {0: 0}, start.output()
    failed = [event for event in read_events(folder) if event["event"] == "save_failed"]
    assert [event["step"] for event in failed] == list(range(1, len(phases) + 1)), start.output()
    assert all("No space left on device" in event["error"] for event in failed)
    assert reproducible_metrics(folder) == uninterrupted(1)
    names = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert names == [f"step-{step:08d}" for step in (FAULT_STEPS - 1, FAULT_STEPS)]


def test_checkpoints_that_cannot_be_removed_cost_room_and_no_more(
    fork_server: ForkServer,
    train_arguments: Callable[..., list[str]],
    uninterrupted: Any,
    tmp_path: Path,
) -> None:
    folder = tmp_path / "run"
    stays = Fault(
        *(0, 1, "EACCES"),
        folder=str(folder / "checkpoints"),
        event="remove step/.*",
        last_call=ALWAYS,
    )
    start = fork_server.run(train_arguments(folder, "checkpoint.keep_last=1"), 1, stays)
    assert start.exit_codes == {0: 0}, start.output()
    assert "step-00000004 (Permission denied). Continuing" in " ".join(start.output().split())
    assert reproducible_metrics(folder) == uninterrupted(1)


def test_full_logs_and_a_tracker_out_of_reach_are_told_once_and_the_weights_come_out_the_same(
    fork_server: ForkServer, train_arguments: Callable[..., list[str]], tmp_path: Path
) -> None:
    calm, full = tmp_path / "calm", tmp_path / "full"
    assert fork_server.run(train_arguments(calm), 1).exit_codes == {0: 0}
    logs = r"write (metrics|ledger)\.jsonl|write (loss|tensorboard).*"
    no_room = Fault(0, 1, "ENOSPC", folder=str(full), event=logs, last_call=ALWAYS)
    start = fork_server.run(
        train_arguments(full, "log.tensorboard=true", "log.wandb=project"), 1, no_room
    )
    assert start.exit_codes == {0: 0}, start.output()
    told = " ".join(start.output().split())
    for failure in (
        r"metrics\.jsonl in \S+ fails \(\[Errno 28\]",
        r"ledger\.jsonl cannot be written \(No space left",
        r"TensorBoard in \S+ fails \(\[Errno 28\]",
        r"W&B in \S+ fails \(Run initialization has timed out\)",
    ):
        assert len(re.findall(failure, told)) == 1, f"{failure}:\n{told}"
    last = Path("checkpoints") / f"step-{FAULT_STEPS:08d}" / "__0_0.distcp"
    assert (full / last).read_bytes() == (calm / last).read_bytes()


def test_frozen_rank_ends_the_run_and_it_goes_on_as_if_undisturbed(
    fork_server: ForkServer,
    train_arguments: Callable[..., list[str]],
    uninterrupted: Any,
    tmp_path: Path,
) -> None:
    folder = tmp_path / "run"
    # Saved before the next step begins: in the background it might never be, with one rank frozen.
    options = ("watchdog.step_seconds=5", "checkpoint.async_save=false")
    freeze = Fault(1, 10, "SIGSTOP", "model.llama.Llama.forward")
    start = fork_server.start(
        train_arguments(folder, TP2, *options), 2, freeze, terminate_on_failure=False
    )
    wait_for(lambda: not is_running(start.pids[0]), "the end of the rank that is left")
    os.kill(start.pids[1], signal.SIGKILL)  # as the launcher of a frozen process does
    assert fork_server.wait(start) == [ExitCode.RANK_FAILED, -signal.SIGKILL], start.output()
    assert "no heartbeat from rank 1 (pid" in start.output()
    shutil.rmtree(folder / "checkpoints" / "step-00000008")  # and the newest is lost besides
    start = fork_server.run(train_arguments(folder, TP2), 2)
    assert start.exit_codes == {0: 0, 1: 0}, start.output()
    assert reproducible_metrics(folder) == uninterrupted(2, TP2)
