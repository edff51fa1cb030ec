"""Killed in any phase of saving, of removing what is old and of preparing, a run goes on exactly.

The phases are not listed by hand: a calm run tells every change that it makes to the disk.
"""

import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from conftest import damages, figures, ledger
from zygote import Plan, Start, Zygote

KILLED = -signal.SIGKILL
# Each save removes the checkpoint before: every start that saves twice goes through all phases.
EVERY_STEP = ("checkpoint.interval=1", "checkpoint.keep_last=1")
# What a start does besides, after one that was killed while it saved.
LEFT_BEHIND = ["remove .step/manifest.json", "rmdir .step"]


def phases_of(start: Start, rank: int) -> list[str]:
    """The changes that a rank told of, each once."""
    return list(dict.fromkeys(re.findall("^fault: (.+)$", start.told(rank), re.MULTILINE)))


def test_run_killed_in_every_phase_of_saving_and_removing_ends_as_if_undisturbed(
    zygote: Zygote, run_of: Callable[..., list[str]], undisturbed: Any, tmp_path: Path
) -> None:
    calm = run_of(tmp_path / "calm", *EVERY_STEP, "train.max_steps=2")
    every = Plan(0, 1, "tell", folder=str(tmp_path / "calm" / "checkpoints"), until=10**6)
    phases = phases_of(zygote.run(calm, 1, every), 0)
    at = phases.index("fsync .step/COMMITTED")
    for expected in ("mkdir .step", "write .step/__0_0.distcp", "rename .step", "rmdir step"):
        assert expected in phases

    folder = tmp_path / "run"
    for phase in [*phases[:at], *LEFT_BEHIND, *phases[at:]]:
        kill = Plan(0, 1, "SIGKILL", folder=str(folder / "checkpoints"), use=re.escape(phase))
        start = zygote.run(run_of(folder, *EVERY_STEP), 1, kill)
        assert start.codes == {0: KILLED}, f"{phase} never came:\n{start.told()}"
        assert damages(folder) == [], phase
    start = zygote.run(run_of(folder, *EVERY_STEP), 1)
    assert start.codes == {0: 0}, start.told()
    assert figures(folder) == undisturbed(1)
    names = [path.name for path in (folder / "checkpoints").iterdir()]
    assert names == [f"step-{len(undisturbed(1)):08d}"]


def test_rank_killed_while_all_save_ends_the_others_and_the_save_before_counts(
    zygote: Zygote, run_of: Callable[..., list[str]], undisturbed: Any, tmp_path: Path
) -> None:
    """Nobody ends the rank that is left: it has to find out."""
    folder = tmp_path / "run"
    arguments = run_of(folder, "parallel.tp=2")
    for phase, victim in {"write .step/__1_0.distcp": 1, "rename .step": 0}.items():
        kill = Plan(victim, 2, "SIGKILL", folder=str(folder / "checkpoints"), use=re.escape(phase))
        start = zygote.run(arguments, 2, kill, alone=True)
        assert start.codes[victim] == KILLED
        assert start.codes[1 - victim] > 0, start.told(1 - victim)
        assert damages(folder) == [], phase
    start = zygote.run(arguments, 2)
    assert start.codes == {0: 0, 1: 0}, start.told()
    assert figures(folder) == undisturbed(2, "parallel.tp=2")
    # The second save of each start failed, so each was one interval ahead of the one before.
    assert [each["step"] for each in ledger(folder) if each["event"] == "start"] == [0, 4, 8]


def test_run_killed_while_it_prepares_its_data_ends_as_if_undisturbed(
    zygote: Zygote, run_of: Callable[..., list[str]], undisturbed: Any, tmp_path: Path
) -> None:
    """Rank 1 waits for the data meanwhile."""
    shards = tmp_path / "shards"
    arguments = run_of(tmp_path / "run", "parallel.tp=2", f"data.folder={shards}")
    for use in ("mkdir .*", "write .*part.*", "rename .*", "write manifest.*"):
        kill = Plan(0, 1, "SIGKILL", folder=str(shards), use=use)
        start = zygote.run(arguments, 2, kill)
        assert start.codes[0] == KILLED, f"{use} never came:\n{start.told()}"
        assert start.codes[1] != 0
    start = zygote.run(arguments, 2)
    assert start.codes == {0: 0, 1: 0}, start.told()
    assert figures(tmp_path / "run") == undisturbed(2, "parallel.tp=2")
