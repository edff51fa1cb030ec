"""A run killed in any phase of saving, pruning or preparing data resumes bit for bit.

The phases are not listed by hand: a run without faults prints every change it makes to the disk.
"""

import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from conftest import checkpoint_errors, read_events, reproducible_metrics
from fork_server import Fault, ForkServer, Launch

KILLED = -signal.SIGKILL
# Each save deletes the previous checkpoint: a launch that saves twice goes through all phases.
EVERY_STEP = ("checkpoint.interval=1", "checkpoint.keep_last=1")
# Additional changes of a launch that follows one killed during a save.
CLEANUP = ["remove .step/manifest.json", "rmdir .step"]


def phases_of(launch: Launch, rank: int) -> list[str]:
    """Return the distinct changes that a rank printed, in order."""
    return list(dict.fromkeys(re.findall("^fault: (.+)$", launch.output(rank), re.MULTILINE)))


def test_kill_in_every_phase_of_saving_and_pruning_resumes_bit_for_bit(
    fork_server: ForkServer,
    train_arguments: Callable[..., list[str]],
    uninterrupted: Any,
    tmp_path: Path,
) -> None:
    arguments = train_arguments(tmp_path / "reference", *EVERY_STEP, "train.max_steps=2")
    checkpoints = str(tmp_path / "reference" / "checkpoints")
    print_all = Fault(0, 1, "print", folder=checkpoints, last_call=10**6)
    phases = phases_of(fork_server.run(arguments, 1, print_all), 0)
    commit = phases.index("fsync .step/COMMITTED")
    for expected in ("mkdir .step", "write .step/__0_0.distcp", "rename .step", "rmdir .step"):
        assert expected in phases

    folder = tmp_path / "run"
    for phase in [*phases[:commit], *CLEANUP, *phases[commit:]]:
        kill = Fault(0, 1, "SIGKILL", folder=str(folder / "checkpoints"), event=re.escape(phase))
        launch = fork_server.run(train_arguments(folder, *EVERY_STEP), 1, kill)
        assert launch.exit_codes == {0: KILLED}, f"{phase} did not occur:\n{launch.output()}"
        assert checkpoint_errors(folder) == [], phase
    launch = fork_server.run(train_arguments(folder, *EVERY_STEP), 1)
    assert launch.exit_codes == {0: 0}, launch.output()
    assert reproducible_metrics(folder) == uninterrupted(1)
    names = [path.name for path in (folder / "checkpoints").iterdir()]
    assert names == [f"step-{len(uninterrupted(1)):08d}"]


def test_rank_killed_during_a_save_ends_the_others_and_the_previous_save_counts(
    fork_server: ForkServer,
    train_arguments: Callable[..., list[str]],
    uninterrupted: Any,
    tmp_path: Path,
) -> None:
    """The surviving rank is not terminated from outside: it must detect the failure."""
    folder = tmp_path / "run"
    arguments = train_arguments(folder, "parallel.tp=2")
    for phase, victim in {"write .step/__1_0.distcp": 1, "rename .step": 0}.items():
        checkpoints = str(folder / "checkpoints")
        kill = Fault(victim, 2, "SIGKILL", folder=checkpoints, event=re.escape(phase))
        launch = fork_server.run(arguments, 2, kill, terminate_on_failure=False)
        assert launch.exit_codes[victim] == KILLED
        assert launch.exit_codes[1 - victim] > 0, launch.output(1 - victim)
        assert checkpoint_errors(folder) == [], phase
    launch = fork_server.run(arguments, 2)
    assert launch.exit_codes == {0: 0, 1: 0}, launch.output()
    assert reproducible_metrics(folder) == uninterrupted(2, "parallel.tp=2")
    # The second save of each launch failed, so each resumed one interval after the previous one.
    starts = [event["step"] for event in read_events(folder) if event["event"] == "start"]
    assert starts == [0, 4, 8]


def test_kill_while_preparing_data_resumes_bit_for_bit(
    fork_server: ForkServer,
    train_arguments: Callable[..., list[str]],
    uninterrupted: Any,
    tmp_path: Path,
) -> None:
    """Rank 0 prepares the dataset while rank 1 waits for it."""
    shards = tmp_path / "shards"
    arguments = train_arguments(tmp_path / "run", "parallel.tp=2", f"data.folder={shards}")
    for event in ("mkdir .*", "write .*part.*", "rename .*", "write manifest.*"):
        kill = Fault(0, 1, "SIGKILL", folder=str(shards), event=event)
        launch = fork_server.run(arguments, 2, kill)
        assert launch.exit_codes[0] == KILLED, f"{event} did not occur:\n{launch.output()}"
        assert launch.exit_codes[1] != 0
    launch = fork_server.run(arguments, 2)
    assert launch.exit_codes == {0: 0, 1: 0}, launch.output()
    assert reproducible_metrics(tmp_path / "run") == uninterrupted(2, "parallel.tp=2")
