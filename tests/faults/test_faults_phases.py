"""Killed before any change that saving and retention make to the disk, a run goes on exactly."""

import re
from pathlib import Path
from typing import Any

import pytest
from conftest import figures
from zygote import Plan, Zygote


def test_run_killed_before_every_change_to_its_checkpoints_ends_as_if_undisturbed(
    zygote: Zygote, run_of: Any, undisturbed: Any, tmp_path: Path
) -> None:
    """One run, whose n-th start dies before its n-th change: each change's turn comes."""
    folder = tmp_path / "run"
    change, codes, kinds = 0, [-9], set()
    while codes == [-9]:
        change += 1
        plan = Plan(rank=0, call=change, do="SIGKILL", folder=str(folder / "checkpoints"))
        start = zygote.run(run_of(folder), 1, plan)
        codes = list(start.codes.values())
        kinds |= set(re.findall(r"fault before (\S+)", start.told()))
    assert codes == [0], start.told()
    # Folders made, files written, COMMITTED and others removed, folders removed and renamed.
    assert kinds == {"os.mkdir", "open", "os.remove", "os.rmdir", "os.rename"}
    assert figures(folder) == undisturbed(1)
    names = {path.name for path in (folder / "checkpoints").iterdir()}
    assert names == {"step-00000020", "step-00000024"}


PHASES = [
    *("make_folder", "write_shards", "write_manifest", "commit", "publish"),
]


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("asynchronous", ["true", "false"])
def test_other_rank_killed_in_a_phase_of_saving_takes_nothing_with_it(
    zygote: Zygote, run_of: Any, undisturbed: Any, tmp_path: Path, rank: int, asynchronous: str
) -> None:
    folder = tmp_path / "run"
    arguments = run_of(folder, "parallel.tp=2", f"checkpoint.async_save={asynchronous}")
    killed = 0
    for phase in PHASES if rank == 0 else ["write_shards"]:
        plan = Plan(rank=rank, call=2, do="SIGKILL", at=f"training.checkpoint.saving.{phase}")
        start = zygote.run(arguments, 2, plan)
        killed += start.codes[rank] == -9
    assert killed
    start = zygote.run(arguments, 2)
    assert start.codes == {0: 0, 1: 0}, start.told()
    assert figures(folder) == undisturbed(2, "parallel.tp=2")
