"""Killed in any phase of saving, of removing what is old and of preparing, a run goes on exactly.

The phases are not listed by hand: a calm run tells every change that it makes to the disk.
"""

import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from conftest import checkpoint_errors, read_events, reproducible_metrics
from fork_server import Fault, ForkServer, Launch

KILLED = -signal.SIGKILL
# Each save removes the checkpoint before: every start that saves twice goes through all phases.
EVERY_STEP = ("checkpoint.interval=1", "checkpoint.keep_last=1")
# What a start does besides, after one that was killed while it saved.
LEFT_BEHIND = ["remove .step/manifest.json", "rmdir .step"]


def phases_of(start: Launch, rank: int) -> list[str]:
    """The changes that a rank told of, each once."""
    return list(dict.fromkeys(re.findall("^fault: (.+)$", start.output(rank), re.MULTILINE)))


def test_run_killed_in_every_phase_of_saving_and_removing_ends_as_if_undisturbed(
    fork_server: ForkServer,
    train_arguments: Callable[..., list[str]],
    uninterrupted: Any,
    tmp_path: Path,
) -> None:
    calm = train_arguments(tmp_path / "calm", *EVERY_STEP, "train.max_steps=2")
    every = Fault(0, 1, "print", folder=str(tmp_path / "calm" / "checkpoints"), last_call=10**6)
    phases = phases_of(fork_server.run(calm, 1, every), 0)
    at = phases.index("fsync .step/COMMITTED")
    for expected in ("mkdir .step", "write .step/__0_0.distcp", "rename .step", "rmdir step"):
        assert expected in phases

    folder = tmp_path / "run"
    for phase in [*phases[:at], *LEFT_BEHIND, *phases[at:]]:
        kill = Fault(0, 1, "SIGKILL", folder=str(folder / "checkpoints"), event=re.escape(phase))
        start = fork_server.run(train_arguments(folder, *EVERY_STEP), 1, kill)
        assert start.exit_codes == {0: KILLED}, f"{phase} never came:\n{start.output()}"
        assert checkpoint_errors(folder) == [], phase
    start = fork_server.run(train_arguments(folder, *EVERY_STEP), 1)
    assert start.exit_codes == {0: 0}, start.output()
    assert reproducible_metrics(folder) == uninterrupted(1)
    names = [path.name for path in (folder / "checkpoints").iterdir()]
    assert names == [f"step-{len(uninterrupted(1)):08d}"]


def test_rank_killed_while_all_save_ends_the_others_and_the_save_before_counts(
    fork_server: ForkServer,
    train_arguments: Callable[..., list[str]],
    uninterrupted: Any,
    tmp_path: Path,
) -> None:
    """Nobody ends the rank that is left: it has to find out."""
    folder = tmp_path / "run"
    arguments = train_arguments(folder, "parallel.tp=2")
    for phase, victim in {"write .step/__1_0.distcp": 1, "rename .step": 0}.items():
        kill = Fault(
            victim, 2, "SIGKILL", folder=str(folder / "checkpoints"), event=re.escape(phase)
        )
        start = fork_server.run(arguments, 2, kill, terminate_on_failure=False)
        assert start.exit_codes[victim] == KILLED
        assert start.exit_codes[1 - victim] > 0, start.output(1 - victim)
        assert checkpoint_errors(folder) == [], phase
    start = fork_server.run(arguments, 2)
    assert start.exit_codes == {0: 0, 1: 0}, start.output()
    assert reproducible_metrics(folder) == uninterrupted(2, "parallel.tp=2")
    # The second save of each start failed, so each was one interval ahead of the one before.
    assert [each["step"] for each in read_events(folder) if each["event"] == "start"] == [0, 4, 8]


def test_run_killed_while_it_prepares_its_data_ends_as_if_undisturbed(
    fork_server: ForkServer,
    train_arguments: Callable[..., list[str]],
    uninterrupted: Any,
    tmp_path: Path,
) -> None:
    """Rank 1 waits for the data meanwhile."""
    shards = tmp_path / "shards"
    arguments = train_arguments(tmp_path / "run", "parallel.tp=2", f"data.folder={shards}")
    for use in ("mkdir .*", "write .*part.*", "rename .*", "write manifest.*"):
        kill = Fault(0, 1, "SIGKILL", folder=str(shards), event=use)
        start = fork_server.run(arguments, 2, kill)
        assert start.exit_codes[0] == KILLED, f"{use} never came:\n{start.output()}"
        assert start.exit_codes[1] != 0
    start = fork_server.run(arguments, 2)
    assert start.exit_codes == {0: 0, 1: 0}, start.output()
    assert reproducible_metrics(tmp_path / "run") == uninterrupted(2, "parallel.tp=2")
