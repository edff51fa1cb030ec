"""A checkpoint belongs to its run; one of another run is rejected unless it is adopted."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from run_config import commit

from resilience.run_folder import RunFolder, RunFolderError
from resilience.run_identity import (
    RunIdentity,
    check_identity,
    establish_identity,
    read_identity,
)


def commit_of(folder: RunFolder, step: int, run_id: str | None) -> Path:
    """Create a committed checkpoint of a run; None: of a version without identities."""
    target = commit(folder, step)
    if run_id is not None:
        manifest = json.loads((target / "manifest.json").read_text())
        (target / "manifest.json").write_text(json.dumps(manifest | {"run_id": run_id}))
    return target


def new_run(path: Path, *steps: int) -> tuple[RunFolder, str]:
    """Create a run with checkpoints; return its folder and UUID."""
    folder = RunFolder(path)
    run_id = establish_identity(folder, adopt=False).id
    for step in steps:
        commit_of(folder, step, run_id)
    return folder, run_id


def test_identity_is_created_once_and_survives_a_move(tmp_path: Path) -> None:
    folder, run_id = new_run(tmp_path / "run", 4)
    assert establish_identity(folder, adopt=False) == RunIdentity(run_id)
    moved = RunFolder(folder.path.rename(tmp_path / "renamed"))
    check_identity(moved, adopt=False)
    assert establish_identity(moved, adopt=False) == RunIdentity(run_id)


def test_two_runs_have_different_identities(tmp_path: Path) -> None:
    assert new_run(tmp_path / "a")[1] != new_run(tmp_path / "b")[1]


@pytest.mark.parametrize("step", [2, 8])
def test_checkpoint_of_another_run_is_rejected_and_adopted_on_request(
    tmp_path: Path, step: int
) -> None:
    folder, run_id = new_run(tmp_path / "a", 4)
    other, other_id = new_run(tmp_path / "b", step)
    copied = folder.step_folder(step)
    shutil.copytree(other.step_folder(step), copied)
    with pytest.raises(RunFolderError, match=rf"{copied.name}.*run\.adopt=true"):
        check_identity(folder, adopt=False)
    check_identity(folder, adopt=True)
    assert establish_identity(folder, adopt=True) == RunIdentity(run_id, (other_id,))
    check_identity(folder, adopt=False)  # later launches do not need the key
    assert establish_identity(folder, adopt=False) == RunIdentity(run_id, (other_id,))


def test_checkpoints_of_another_run_in_a_new_folder_are_rejected(tmp_path: Path) -> None:
    """The folder has a configuration of a launch that did not reach its first checkpoint."""
    folder, _ = new_run(tmp_path / "a")
    other, _ = new_run(tmp_path / "b", 4)
    shutil.copytree(other.checkpoints, folder.checkpoints)
    with pytest.raises(RunFolderError, match=r"run\.adopt=true"):
        check_identity(folder, adopt=False)


def test_checkpoints_of_earlier_versions_are_accepted(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    commit_of(folder, 4, None)
    check_identity(folder, adopt=False)
    establish_identity(folder, adopt=False)
    check_identity(folder, adopt=False)


@pytest.mark.parametrize(
    "content", [None, b"", b"{", b"[]", b"null", b"\xff", b'{"id": 3}', b'{"id": "x"}']
)
def test_lost_identity_is_recovered_from_the_checkpoints(
    tmp_path: Path, content: bytes | None
) -> None:
    folder, run_id = new_run(tmp_path, 4, 8)
    folder.identity.unlink() if content is None else folder.identity.write_bytes(content)
    assert read_identity(folder) is None
    check_identity(folder, adopt=False)
    assert establish_identity(folder, adopt=False) == RunIdentity(run_id)
    assert read_identity(folder) == RunIdentity(run_id)


@pytest.mark.parametrize("create", [Path.mkdir, os.mkfifo])
def test_identity_that_is_no_file_is_not_replaced(
    tmp_path: Path, create: Callable[[Path], None]
) -> None:
    folder = RunFolder(tmp_path)
    create(folder.identity)
    with pytest.raises(RunFolderError, match=r"run\.json is not a regular file.* move it away"):
        check_identity(folder, adopt=False)
    folder.identity.rename(tmp_path / "away")  # the remedy
    check_identity(folder, adopt=False)
