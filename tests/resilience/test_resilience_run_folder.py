"""A run folder lists its configuration and committed checkpoints from names and small files."""

import json
from pathlib import Path

import pytest

from resilience.run_folder import COMMITTED, RunFolder, RunFolderError, checkpoints_in


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    """A run with two checkpoints."""
    folder = RunFolder(tmp_path / "run")
    for step in (5, 40):
        commit(folder, step)
    return folder


def commit(folder: RunFolder, step: int, data_hash: str = "hash") -> None:
    path = folder.step_folder(step)
    path.mkdir(parents=True)
    position = {"step": step, "samples": 2 * step, "data_hash": data_hash}
    (path / "manifest.json").write_text(json.dumps({"position": position, "config": {}}))
    (path / COMMITTED).touch()


def test_configuration_is_read_back_unchanged_and_leaves_no_temporary_file(
    folder: RunFolder,
) -> None:
    """A YAML 1.1 parser would read 1e-8 as a string."""
    assert folder.read_config() is None
    config = {"optim": {"eps": 1e-8, "betas": [0.9, 0.95]}, "run": {"name": "é"}}
    folder.write_config(config)
    assert folder.read_config() == config
    assert sorted(path.name for path in folder.path.iterdir()) == ["checkpoints", "config.yaml"]


def test_configuration_with_a_repeated_key_is_rejected(tmp_path: Path) -> None:
    """Keys in another mapping, and those that a merge brings, are not repeated."""
    folder = RunFolder(tmp_path)
    folder.config.write_text("a: &a {x: 1}\nb: {<<: *a, x: 2}\nc: {<<: *a}\n")
    assert folder.read_config() == {"a": {"x": 1}, "b": {"x": 2}, "c": {"x": 1}}
    for text in ("train: {tp: 1}\nrun: {dir: x}\ntrain: {tp: 2}\n", "train: {tp: 1, tp: 2}\n"):
        folder.config.write_text(text)
        with pytest.raises(
            RunFolderError, match=r"is given twice \(lines 1 and [13]\); remove one"
        ):
            folder.read_config()


def test_committed_steps_ignore_other_names_and_uncommitted_folders(folder: RunFolder) -> None:
    for name in ("step-00000050.damaged-1", "step-abc", ".step-00000060-1", "step-00000070"):
        (folder.checkpoints / name).mkdir()
        if name != "step-00000070":
            (folder.checkpoints / name / COMMITTED).touch()
    assert folder.committed_steps() == [5, 40]


@pytest.mark.parametrize("kind", ["file", "dangling link", "loop"])
def test_checkpoints_on_a_volume_that_is_not_mounted_are_not_taken_as_none(
    tmp_path: Path, kind: str
) -> None:
    folder = RunFolder(tmp_path)
    if kind == "file":
        folder.checkpoints.touch()
    else:
        folder.checkpoints.symlink_to("checkpoints" if kind == "loop" else "/absent/volume")
    with pytest.raises(RunFolderError, match="checkpoints is neither a folder nor a link to one"):
        folder.committed_steps()
    assert checkpoints_in(folder.checkpoints / "step-00000001") == []


def test_newest_position_is_read_from_the_newest_readable_manifest(folder: RunFolder) -> None:
    assert RunFolder(folder.path / "new").newest_position() is None
    commit(folder, 50, data_hash="old")
    commit(folder, 60, data_hash="new")
    assert folder.newest_position() == {"step": 60, "samples": 120, "data_hash": "new"}
    (folder.step_folder(60) / "manifest.json").write_text("{")
    assert folder.newest_position() == {"step": 50, "samples": 100, "data_hash": "old"}
