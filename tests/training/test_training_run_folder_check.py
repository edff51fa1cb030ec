"""Starting or resuming a run in its folder is checked before anything is launched or written."""

import copy
import hashlib
import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from run_config import CONFIG, changed, commit

from resilience.run_folder import COMMITTED, RunFolder, RunFolderError
from training.resume_policy import Changes
from training.run_folder_check import check_run_folder, checkpoint_warnings


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    """A run with its configuration and two checkpoints."""
    folder = RunFolder(tmp_path / "run")
    folder.write_config(CONFIG)
    for step in (5, 40):
        commit(folder, step)
    return folder


def content(folder: RunFolder) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.path.rglob("*") if path.is_file()}


def test_same_configuration_resumes_without_writing(folder: RunFolder) -> None:
    """Also covers reading back the configuration: YAML 1.1 would read 1e-8 as a string."""
    before = content(folder)
    assert check_run_folder(folder, CONFIG) == Changes()
    assert content(folder) == before


def test_first_launch_writes_nothing(tmp_path: Path) -> None:
    assert check_run_folder(RunFolder(tmp_path / "new"), CONFIG) == Changes()
    assert not (tmp_path / "new").exists()


def test_everything_may_change_before_the_first_checkpoint(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.write_config(CONFIG)
    old = CONFIG["model"]["dim"]
    changes = check_run_folder(folder, changed("model.dim", 1))
    assert changes == Changes(free={"model.dim": [old, 1]})


def resuming(resume: str) -> dict[str, Any]:
    return changed("run.resume", resume)


def test_resume_never_is_rejected_if_checkpoints_exist(folder: RunFolder, tmp_path: Path) -> None:
    with pytest.raises(
        RunFolderError, match=r"use run\.resume=auto to resume, or another run\.dir"
    ):
        check_run_folder(folder, resuming("never"))
    check_run_folder(RunFolder(tmp_path / "new"), resuming("never"))


def test_resume_path_must_be_a_committed_checkpoint(folder: RunFolder, tmp_path: Path) -> None:
    new = RunFolder(tmp_path / "new")
    check_run_folder(new, resuming(str(folder.step_folder(5))))
    (folder.step_folder(5) / COMMITTED).unlink()
    for path in (folder.step_folder(5), tmp_path / "nowhere"):
        with pytest.raises(RunFolderError, match="is not a committed checkpoint"):
            check_run_folder(new, resuming(str(path)))


def test_resume_path_may_be_a_run_folder(folder: RunFolder, tmp_path: Path) -> None:
    """Once the new run has steps of its own, the same command resumes those."""
    new = RunFolder(tmp_path / "new")
    for path in (folder.path, folder.checkpoints):
        check_run_folder(new, resuming(str(path)))
        assert new.resume_source(str(path)) == str(path)
        assert folder.resume_source(str(path)) == "auto"
    new.write_config(resuming(str(folder.path)))
    commit(new, 1)
    assert new.resume_source(str(folder.path)) == "auto"  # although step 5 of the other is newer
    with pytest.raises(RunFolderError, match="or a run folder with one; use auto, never, or a"):
        check_run_folder(RunFolder(tmp_path / "third"), resuming(str(tmp_path)))


def test_renamed_checkpoint_can_be_resumed(folder: RunFolder, tmp_path: Path) -> None:
    best = folder.step_folder(5).rename(tmp_path / "best")
    check_run_folder(RunFolder(tmp_path / "new"), resuming(str(best)))
    (best / "manifest.json").write_text("{")
    with pytest.raises(RunFolderError, match=r"manifest\.json"):
        check_run_folder(RunFolder(tmp_path / "new"), resuming(str(best)))


def test_resume_path_before_the_newest_checkpoint_is_rejected(folder: RunFolder) -> None:
    """The checkpoints of later steps would be overwritten."""
    with pytest.raises(RunFolderError, match=r"before step 40.*run\.resume=auto to resume"):
        check_run_folder(folder, resuming(str(folder.step_folder(5))))
    check_run_folder(folder, resuming(str(folder.step_folder(40))))


def test_missing_checkpoints_that_were_saved_are_an_error(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.write_config(CONFIG)
    folder.event_log.write_text('{"event": "start", "step": 0}\n{"event": "sa')
    check_run_folder(folder, CONFIG)  # killed before the first save
    folder.event_log.write_text(
        '{"event": "start", "step": 0}\ntorn{\n{"event": "save", "step": 5}\n'
    )
    with pytest.raises(RunFolderError, match=r"records saved checkpoints.* another run\.dir"):
        check_run_folder(folder, CONFIG)


@pytest.mark.parametrize("text", ["{", "[1, 2]", "", "a: b: c"])
def test_configuration_that_cannot_be_read_is_that_of_the_newest_checkpoint_or_an_error(
    folder: RunFolder, tmp_path: Path, text: str
) -> None:
    folder.config.write_text(text)
    assert folder.last_config() == CONFIG
    with pytest.raises(RunFolderError, match="cannot change within a run"):
        check_run_folder(folder, changed("run.seed", 9))
    other = RunFolder(tmp_path / "without checkpoints")
    other.path.mkdir()
    other.config.write_text(text)
    with pytest.raises(RunFolderError, match=r"config\.yaml cannot be read"):
        check_run_folder(other, CONFIG)


@pytest.mark.parametrize("damage", ["a: b: c", "[" * 10_000, "folder", "pipe"])
def test_damaged_configuration_is_kept_when_it_is_written_again(
    folder: RunFolder, damage: str
) -> None:
    assert folder.write_config(CONFIG) is None
    folder.config.unlink()
    if damage == "folder":
        folder.config.mkdir()
    elif damage == "pipe":
        os.mkfifo(folder.config)
    else:
        folder.config.write_text(damage)
    assert folder.last_config() == CONFIG  # of the newest checkpoint
    check_run_folder(folder, CONFIG)
    assert "config.yaml.damaged. The configuration of the newest" in (
        folder.write_config(CONFIG) or ""
    )
    assert folder.read_config() == CONFIG and folder.write_config(CONFIG) is None


@pytest.mark.parametrize("lost", [False, True], ids=["config.yaml", "manifest"])
def test_renamed_keys_of_an_older_run_are_not_changes(folder: RunFolder, lost: bool) -> None:
    """Without `config.yaml` the configuration is read from the newest manifest."""
    old = copy.deepcopy(CONFIG)
    old["faults"]["max_in_a_row"] = old["faults"].pop("max_consecutive_skips")
    old["data"]["stream_lanes"] = old["data"].pop("stream_shards")
    folder.write_config(old)
    if lost:
        folder.config.unlink()
        path = folder.step_folder(40) / "manifest.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"config": old}))
    assert check_run_folder(folder, CONFIG) == Changes()


def test_run_folder_that_is_a_file_part_of_a_run_or_a_folder_of_runs_is_rejected(
    folder: RunFolder, tmp_path: Path
) -> None:
    file = tmp_path / "file"
    file.touch()
    for path, message in (
        (file, "is a file; use a folder"),
        (file / "run", f"is below {file}, a file; use a folder"),
        (folder.checkpoints, f"use run.dir={folder.path} to resume that run"),
        (tmp_path, f"has run folders in it (run); use run.dir={folder.path} to resume that run"),
        (folder.step_folder(folder.committed_steps()[-1]), f"use run.dir={folder.path} to resume"),
    ):
        with pytest.raises(RunFolderError, match=re.escape(message)):
            check_run_folder(RunFolder(path), CONFIG)


def record_save(folder: RunFolder, step: int) -> None:
    with folder.event_log.open("a") as file:
        event = {"event": "save", "step": step, "path": folder.step_folder(step).name}
        file.write(json.dumps(event) + "\n")


def test_newest_checkpoint_without_committed_is_reported_with_the_command_to_restore_it(
    folder: RunFolder,
) -> None:
    for step in (5, 40):
        record_save(folder, step)
        manifest = folder.step_folder(step) / "manifest.json"
        manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"run_id": "a"}))
    assert list(checkpoint_warnings(folder)) == []
    (folder.step_folder(5) / COMMITTED).unlink()
    assert list(checkpoint_warnings(folder)) == []  # older than the newest checkpoint
    (folder.step_folder(40) / COMMITTED).unlink()
    with pytest.raises(RunFolderError, match=rf"{folder.step_folder(40).name} has no COMMITTED"):
        check_run_folder(folder, CONFIG)
    (folder.step_folder(5) / COMMITTED).touch()
    (warning,) = checkpoint_warnings(folder)
    command = re.search(r"restore the file: (\(.*COMMITTED\))\. All", warning)
    assert command is not None
    subprocess.run(["bash", "-c", command[1]], check=True)
    assert folder.committed_steps() == [5, 40]
    restored = (folder.step_folder(40) / COMMITTED).read_text().strip()
    content = (folder.step_folder(40) / "manifest.json").read_bytes()
    assert restored == hashlib.sha256(content).hexdigest()
    assert list(checkpoint_warnings(folder)) == []


def test_saved_checkpoint_that_is_a_dangling_link_is_reported(folder: RunFolder) -> None:
    target = folder.step_folder(40)
    target.rename(moved := folder.path / "moved")
    target.symlink_to("/absent/volume")
    folder.event_log.write_text('{"event": "save", "path": "step-00000040"}\n')
    expected = f"{target} is a link or file instead of the folder"
    assert any(expected in message for message in checkpoint_warnings(folder))
    target.unlink()
    moved.rename(target)  # the remedy
    assert not any(expected in message for message in checkpoint_warnings(folder))


def test_folder_that_the_event_log_does_not_know_is_not_reported(folder: RunFolder) -> None:
    folder.step_folder(50).mkdir()
    assert not any("COMMITTED" in warning for warning in checkpoint_warnings(folder))


def test_checkpoint_of_an_earlier_version_is_reported_once(folder: RunFolder) -> None:
    (warning,) = checkpoint_warnings(folder)
    assert "step-00000040 was saved by an earlier version" in warning
    manifest = folder.step_folder(40) / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"run_id": "a"}))
    assert list(checkpoint_warnings(folder)) == []
