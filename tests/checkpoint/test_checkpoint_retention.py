"""Only what the run itself created is deleted; everything else is kept and reported."""

import json
import shutil
from pathlib import Path

import pytest
from save_checkpoint import RUN_ID

from checkpoint import retention
from resilience.run_folder import COMMITTED, RunFolder

OTHER_ID = "f" * 32


def committed_folder(path: Path, *steps: int, run_id: str | None = RUN_ID) -> RunFolder:
    """Create a run folder with committed checkpoints without tensors."""
    folder = RunFolder(path)
    for step in steps:
        target = folder.step_folder(step)
        target.mkdir(parents=True)
        position = {"step": step, "samples": step, "data_hash": "same"}
        manifest = {"position": position, "config": {}, "run_id": run_id}
        (target / "manifest.json").write_text(json.dumps(manifest))
        (target / COMMITTED).touch()
    return folder


@pytest.mark.parametrize(
    ("keep_last", "keep_every", "kept"),
    [
        (1, None, [12]),
        (2, None, [9, 12]),
        (5, None, [3, 6, 9, 12]),
        (None, None, [3, 6, 9, 12]),
        (None, 5, [3, 6, 9, 12]),
        (1, 6, [6, 12]),
        (2, 3, [3, 6, 9, 12]),
    ],
)
def test_keep_last_and_keep_every_checkpoints_are_kept(
    tmp_path: Path, keep_last: int | None, keep_every: int | None, kept: list[int]
) -> None:
    folder = committed_folder(tmp_path, 3, 6, 9, 12)
    assert retention.remove_old(folder, RUN_ID, keep_last, keep_every) == []
    assert folder.committed_steps() == kept
    assert sorted(folder.checkpoints.iterdir()) == [folder.step_folder(step) for step in kept]


def test_killed_deletion_leaves_no_checkpoint_and_is_completed_by_the_next_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = committed_folder(tmp_path, 3, 12)

    def killed(path: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(retention.shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            retention.remove_old(folder, RUN_ID, keep_last=1, keep_every=None)
    assert folder.committed_steps() == [12]
    assert len(list(folder.checkpoints.iterdir())) == 2
    assert retention.remove_leftovers(folder, RUN_ID) == []
    assert list(folder.checkpoints.iterdir()) == [folder.step_folder(12)]


def test_checkpoint_that_cannot_be_deleted_is_uncommitted_and_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = committed_folder(tmp_path, 3, 6, 9)

    def deny(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(retention.shutil, "rmtree", deny)
    errors = retention.remove_old(folder, RUN_ID, 1, None)
    assert len(errors) == 2
    for step, line in zip((3, 6), errors, strict=True):
        assert folder.step_folder(step).name in line
    assert all("Permission denied" in line for line in errors)
    assert folder.committed_steps() == [9]


def test_copy_under_the_name_of_a_later_step_does_not_count(tmp_path: Path) -> None:
    folder = committed_folder(tmp_path, 3, 6, 9)
    shutil.copytree(folder.step_folder(3), folder.step_folder(20))
    assert retention.remove_old(folder, RUN_ID, 1, None) == []
    assert folder.committed_steps() == [9, 20]


def test_rewind_deletes_later_checkpoints(tmp_path: Path) -> None:
    folder = committed_folder(tmp_path, 3, 6, 9)
    assert retention.remove_beyond(folder, RUN_ID, 4) == []
    assert folder.committed_steps() == [3]
    assert list(folder.checkpoints.iterdir()) == [folder.step_folder(3)]


def test_checkpoint_of_an_earlier_version_is_deleted(tmp_path: Path) -> None:
    folder = committed_folder(tmp_path, 3, 6, run_id=None)
    assert retention.remove_old(folder, RUN_ID, 1, None) == []
    assert folder.committed_steps() == [6]


def test_checkpoint_of_another_run_is_kept_and_reported(tmp_path: Path) -> None:
    folder = committed_folder(tmp_path, 3, run_id=OTHER_ID)
    committed_folder(tmp_path, 6, 9)
    (message,) = retention.remove_old(folder, RUN_ID, 1, None)
    assert str(folder.step_folder(3)) in message
    assert folder.committed_steps() == [3, 9]


def test_checkpoint_with_a_damaged_manifest_is_kept_and_reported(tmp_path: Path) -> None:
    folder = committed_folder(tmp_path, 3, 6)
    (folder.step_folder(3) / "manifest.json").write_bytes(b"{")
    (message,) = retention.remove_old(folder, RUN_ID, 1, None)
    assert str(folder.step_folder(3)) in message
    assert folder.committed_steps() == [3, 6]


def test_rewind_renames_later_checkpoints_of_another_run(tmp_path: Path) -> None:
    folder = committed_folder(tmp_path, 3, 6)
    committed_folder(tmp_path, 9, run_id=OTHER_ID)
    (message,) = retention.remove_beyond(folder, RUN_ID, 4)
    assert str(folder.step_folder(9)) in message
    assert folder.committed_steps() == [3]
    assert len(list(folder.checkpoints.glob("step-00000009.other-run-*/COMMITTED"))) == 1


FOREIGN = [
    "step-00000008-hf",  # an export
    "step-00000008",  # a copy in progress
    "step-00000008.damaged-0123abcd",
    "step-00000008 (copy)",
    "step-notes",
    ".step-00000008-hf-0123abcd",  # a conversion in progress
    ".step-00000008-0123abcd",  # of an earlier version
    f".step-00000008.{OTHER_ID}.0123abcd",  # of another run
    f".step-00000008.{RUN_ID}.0123abcd.old",
    f".step-00000008.{RUN_ID}.0123abc",
    "notes",
]


@pytest.mark.parametrize("name", FOREIGN)
def test_folder_that_the_run_did_not_create_is_kept_and_reported(tmp_path: Path, name: str) -> None:
    folder = committed_folder(tmp_path, 3)
    (folder.checkpoints / name).mkdir()
    (folder.checkpoints / name / "file").touch()
    (folder.checkpoints / "file").touch()
    (message,) = retention.remove_leftovers(folder, RUN_ID)
    assert message.endswith(
        f"not valid checkpoints of this run and are neither used nor deleted: {name}."
    )
    assert (folder.checkpoints / name / "file").exists()
    assert (folder.checkpoints / "file").exists()


def test_link_with_the_name_of_a_leftover_is_kept(tmp_path: Path) -> None:
    folder = committed_folder(tmp_path / "run", 3)
    target = tmp_path / "other"
    target.mkdir()
    (target / "file").touch()
    link = folder.checkpoints / retention.hidden_name(folder.step_folder(8), RUN_ID).name
    link.symlink_to(target)
    (message,) = retention.remove_leftovers(folder, RUN_ID)
    assert link.name in message
    assert (link / "file").exists()
