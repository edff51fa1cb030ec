"""Whether a run may go on in its folder is decided before anything is launched or written."""

from pathlib import Path
from typing import Any

import pytest
from run_config import CONFIG, changed, commit

from resilience.run_folder import COMMITTED, RunFolder, RunFolderError
from training.resume_policy import Changes


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


def test_the_same_configuration_goes_on(folder: RunFolder) -> None:
    before = content(folder)
    assert folder.check(CONFIG) == Changes()
    assert content(folder) == before


def test_a_first_start_writes_nothing(tmp_path: Path) -> None:
    assert RunFolder(tmp_path / "new").check(CONFIG) == Changes()
    assert not (tmp_path / "new").exists()


def test_before_the_first_checkpoint_everything_may_change(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.write_config(CONFIG)
    old = CONFIG["model"]["dim"]
    assert folder.check(changed("model.dim", 1)) == Changes(free={"model.dim": [old, 1]})


def resuming(resume: str) -> dict[str, Any]:
    return changed("run.resume", resume)


def test_never_is_refused_where_checkpoints_are(folder: RunFolder, tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match=r"run\.resume \(never\)"):
        folder.check(resuming("never"))
    RunFolder(tmp_path / "new").check(resuming("never"))


def test_a_path_has_to_be_a_committed_checkpoint(folder: RunFolder, tmp_path: Path) -> None:
    new = RunFolder(tmp_path / "new")
    new.check(resuming(str(folder.step_folder(5))))
    (folder.step_folder(5) / COMMITTED).unlink()
    for path in (folder.step_folder(5), tmp_path / "nowhere"):
        with pytest.raises(RunFolderError, match="is not a committed checkpoint"):
            new.check(resuming(str(path)))


def test_a_checkpoint_under_another_name_is_one_too(folder: RunFolder, tmp_path: Path) -> None:
    best = folder.step_folder(5).rename(tmp_path / "best")
    RunFolder(tmp_path / "new").check(resuming(str(best)))
    (best / "manifest.json").write_text("{")
    with pytest.raises(RunFolderError, match=r"manifest\.json"):
        RunFolder(tmp_path / "new").check(resuming(str(best)))


def test_a_path_before_the_newest_checkpoint_is_refused(folder: RunFolder) -> None:
    """The steps after it would have to be written over."""
    with pytest.raises(RunFolderError, match=r"before step 40.*run\.resume=auto to go on"):
        folder.check(resuming(str(folder.step_folder(5))))
    folder.check(resuming(str(folder.step_folder(40))))


def test_checkpoints_that_are_gone_stop_the_run(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.write_config(CONFIG)
    folder.ledger.write_text('{"event": "start", "step": 0}\n{"event": "sa')
    folder.check(CONFIG)  # started and killed before the first save
    folder.ledger.write_text('{"event": "start", "step": 0}\ntorn{\n{"event": "save", "step": 5}\n')
    with pytest.raises(RunFolderError, match=r"ledger\.jsonl tells of saved checkpoints"):
        folder.check(CONFIG)


@pytest.mark.parametrize("text", ["{", "[1, 2]", "", "a: b: c"])
def test_an_unreadable_configuration_stops_the_run(folder: RunFolder, text: str) -> None:
    folder.config.write_text(text)
    with pytest.raises(RunFolderError, match=r"config\.yaml cannot be read"):
        folder.check(CONFIG)


def test_the_configuration_comes_back_as_it_was_written(folder: RunFolder) -> None:
    """Numbers like 1e-8 are strings to YAML 1.1 when written carelessly."""
    assert folder.check(CONFIG) == Changes()
    assert not folder.config.with_suffix(".tmp").exists()


def test_steps_are_read_from_whole_names_of_committed_folders(folder: RunFolder) -> None:
    for name in ("step-00000050.damaged-1", "step-abc", ".step-00000060-1", "step-00000070"):
        (folder.checkpoints / name).mkdir()
        if name != "step-00000070":
            (folder.checkpoints / name / COMMITTED).touch()
    assert folder.committed_steps() == [5, 40]


def test_position_is_that_of_the_newest_checkpoint_that_can_be_read(folder: RunFolder) -> None:
    assert RunFolder(folder.path / "new").newest_position() is None
    commit(folder, 50, samples=100, data_hash="old")
    commit(folder, 60, samples=120, data_hash="new")
    assert folder.newest_position() == {"step": 60, "samples": 120, "data_hash": "new"}
    (folder.step_folder(60) / "manifest.json").write_text("{")
    assert folder.newest_position() == {"step": 50, "samples": 100, "data_hash": "old"}
