"""`rewinds.json` is read exactly as it was written, and never silently replaced by less."""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from run_config import CONFIG, changed, commit

from resilience.event_log import EventLog
from resilience.exit_codes import ExitCode
from resilience.rewinds import (
    FILE_NAME,
    RewindsError,
    last_step_before,
    load_rewinds,
    merge_ranges,
    open_rewinds,
    unfinished_rewind,
    write_rewinds,
)
from resilience.run_folder import COMMITTED, RunFolder, RunFolderError
from resilience.run_identity import establish_identity
from training.run_folder_check import check_run_folder

REWINDS = [(9, 12), (8, 13)]  # the second one follows the first, whose batches it contains


def save(folder: RunFolder, step: int, **position: Any) -> None:
    """Create a checkpoint whose manifest has the committed hash."""
    rewrite(commit(folder, step, **position))


def rewrite(checkpoint: Path, **fields: Any) -> None:
    manifest = checkpoint / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | fields))
    (checkpoint / COMMITTED).write_text(hashlib.sha256(manifest.read_bytes()).hexdigest())


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    """A run with two rewinds, of which the newest checkpoint has the first."""
    folder = RunFolder(tmp_path / "run")
    folder.write_config(CONFIG)
    save(folder, 4)
    save(folder, 12, skips=[[9, 12]], rewinds=[[9, 12]])
    write_rewinds(folder, REWINDS)
    log = EventLog(folder.event_log)
    for number, skip in enumerate(REWINDS, start=1):
        log.append("rewind", number=number, step=12, skip=skip, before=skip[0])
    return folder


def rejected(folder: RunFolder) -> str:
    """Return the message with which a damaged file is rejected, before launch too."""
    with pytest.raises(RewindsError) as error:
        check_run_folder(folder, CONFIG)
    assert error.value.code == ExitCode.REWINDS == 67
    with pytest.raises(RewindsError, match=r"^\S+/rewinds\.json "):
        open_rewinds(folder, rebuild=False)
    assert f"run.allow_changes=[{FILE_NAME}]" in str(error.value)
    return str(error.value)


def test_run_without_rewinds_has_no_file(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert load_rewinds(folder) == [] and open_rewinds(folder, rebuild=False) == ([], None)
    assert not folder.rewinds.exists()


def test_rewinds_are_read_as_written_and_survive_a_kill_during_the_write(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*paths: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write_rewinds(folder, [*REWINDS, (20, 21)])
    monkeypatch.undo()
    assert (folder.path / "rewinds.json.tmp").exists()
    assert load_rewinds(folder) == REWINDS
    write_rewinds(folder, [*REWINDS, (20, 21)])
    assert load_rewinds(folder) == [*REWINDS, (20, 21)]
    check_run_folder(folder, CONFIG)


def test_moved_folder_keeps_its_rewinds(folder: RunFolder, tmp_path: Path) -> None:
    folder.path.rename(tmp_path / "moved")
    assert load_rewinds(RunFolder(tmp_path / "moved")) == REWINDS


def test_each_flipped_bit_and_each_truncation_is_rejected(folder: RunFolder) -> None:
    content = folder.rewinds.read_bytes()
    damaged = [content[:end] for end in range(len(content))]
    for index in range(len(content)):
        for bit in range(8):
            flipped = bytearray(content)
            flipped[index] ^= 1 << bit
            damaged.append(bytes(flipped))
    for each in damaged:
        folder.rewinds.write_bytes(each)
        with pytest.raises(RewindsError, match="is damaged"):
            load_rewinds(folder)
    rejected(folder)


def with_hash(rewinds: Any) -> bytes:
    values = {"run_id": None, "rewinds": rewinds}
    digest = hashlib.sha256(json.dumps(values).encode()).hexdigest()
    return json.dumps(values | {"sha256": digest}).encode() + b"\n"


@pytest.mark.parametrize(
    "rewinds",
    [
        *([[-1, 3]], [[3, 3]], [[5, 2]], [[1, 2, 3]], [[1]], [1, 2], 7, None, {"a": 1}, "ab"),
        *([[1.0, 2]], [["1", 2]], [[True, 2]], [[None, 2]]),
        *([[9, 12], [9, 12]], [[9, 12], [10, 14]], [[9, 12], [6, 11]]),  # already excluded
    ],
    ids=str,
)
def test_impossible_ranges_with_a_valid_hash_are_rejected(folder: RunFolder, rewinds: Any) -> None:
    folder.rewinds.write_bytes(with_hash(rewinds))
    assert "is damaged" in rejected(folder)


@pytest.mark.parametrize(
    "content", [b"", b"\0" * 100, b"[" * 10**5, b"null", b"[]", b'{"rewinds": ' + b"9" * 5000]
)
def test_other_content_is_rejected(folder: RunFolder, content: bytes) -> None:
    folder.rewinds.write_bytes(content)
    assert "is damaged" in rejected(folder)


def test_file_that_is_no_file_is_rejected(folder: RunFolder) -> None:
    folder.rewinds.unlink()
    folder.rewinds.symlink_to("missing")
    assert "is not a regular file" in rejected(folder)
    folder.rewinds.unlink()
    os.mkfifo(folder.rewinds)
    assert "is not a regular file" in rejected(folder)
    folder.rewinds.unlink()
    folder.rewinds.mkdir()
    assert "is not a regular file" in rejected(folder)
    rewinds, message = open_rewinds(folder, rebuild=True)
    assert rewinds == REWINDS and "rewinds.json.damaged" in (message or "")


def test_missing_older_and_foreign_files_are_rejected(folder: RunFolder) -> None:
    folder.rewinds.unlink()
    assert "is missing, but step-00000012 has rewinds" in rejected(folder)
    for other in ([], [(9, 11)]):
        write_rewinds(folder, other)
        assert "lacks rewinds that step-00000012 has" in rejected(folder)
    write_rewinds(folder, REWINDS[:1])  # of the newest checkpoint: it has not used the second
    check_run_folder(folder, CONFIG)
    folder.rewinds.unlink()
    shutil.rmtree(folder.step_folder(12))
    assert "is missing, but ledger.jsonl has rewinds" in rejected(folder)


def test_file_of_another_run_is_rejected(folder: RunFolder, tmp_path: Path) -> None:
    other = RunFolder(tmp_path / "other")
    establish_identity(other, adopt=False)
    write_rewinds(other, REWINDS)
    check_run_folder(folder, CONFIG)  # its file was written before the run had an identity
    establish_identity(folder, adopt=False)
    check_run_folder(folder, CONFIG)
    shutil.copy(other.rewinds, folder.rewinds)
    assert "belongs to another run" in rejected(folder)
    assert open_rewinds(folder, rebuild=True)[0] == REWINDS


def test_adopted_checkpoint_of_another_run_has_no_copy_of_this_run(folder: RunFolder) -> None:
    establish_identity(folder, adopt=False)
    rewrite(folder.step_folder(12), run_id="0" * 32)
    assert load_rewinds(folder) == REWINDS and unfinished_rewind(folder, [(1, 2)]) is None
    write_rewinds(folder, REWINDS[1:])
    assert load_rewinds(folder) == REWINDS[1:]


@pytest.mark.parametrize("ledger", ["complete", "empty", "missing"])
def test_remedy_rebuilds_the_file_and_keeps_the_damaged_one(folder: RunFolder, ledger: str) -> None:
    if ledger == "empty":
        folder.event_log.write_bytes(b"")
    elif ledger == "missing":
        folder.event_log.unlink()
    for number in (1, 2):
        folder.rewinds.write_bytes(b"damaged")
        rejected(folder)
        check_run_folder(folder, changed("run.allow_changes", [FILE_NAME]))
        rewinds, message = open_rewinds(folder, rebuild=True)
        assert rewinds == (REWINDS if ledger == "complete" else REWINDS[:1])
        assert message and "excluding batches 9 to 11" in message
        aside = "rewinds.json.damaged" + ("-2" if number == 2 else "")
        assert (folder.path / aside).read_bytes() == b"damaged" and aside in message
        assert load_rewinds(folder) == rewinds
        assert open_rewinds(folder, rebuild=True) == (rewinds, None)


def test_rewinds_of_an_earlier_version_are_moved_from_the_event_log(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    log = EventLog(folder.event_log)
    skips: list[Any] = [[3, 4], [3, 4], "3", None, [9, 2], {}, [7, 8]]  # one of them twice
    for skip in skips:
        log.append("rewind", step=9, skip=skip, before=3)
    log.append("rewound", step=9, to=3)
    with folder.event_log.open("ab") as file:
        file.write(b'{"event": "rewind", "sk')  # incomplete because of a kill
    assert load_rewinds(folder) == [(3, 4), (7, 8)] and not folder.rewinds.exists()
    rewinds, message = open_rewinds(folder, rebuild=False)
    assert rewinds == [(3, 4), (7, 8)] and "of an earlier version" in (message or "")
    folder.event_log.unlink()
    assert open_rewinds(folder, rebuild=False) == ([(3, 4), (7, 8)], None)


def test_damaged_event_log_of_an_earlier_version_is_reported(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    EventLog(folder.event_log).append("rewind", step=9, skip=[3, 4], before=3)
    line = folder.event_log.read_bytes()
    for content, rewinds in ((line + b"damaged\n", [(3, 4)]), (b"damaged\n", [])):
        shutil.rmtree(folder.checkpoints, ignore_errors=True)
        folder.rewinds.unlink(missing_ok=True)
        folder.event_log.write_bytes(content)
        save(folder, 2)
        found, message = open_rewinds(folder, rebuild=False)
        assert found == rewinds and "is damaged (invalid lines: 1)" in (message or "")
        save(folder, 4, rewinds=[])  # by this version
        assert open_rewinds(folder, rebuild=False) == (rewinds, None)


def test_event_log_cannot_change_the_rewinds_of_the_file(folder: RunFolder) -> None:
    content = folder.event_log.read_bytes()
    for other in (b"", content.replace(b"9, 12", b"9, 14"), content + content, b"\0" * 99):
        folder.event_log.write_bytes(other)
        assert open_rewinds(folder, rebuild=False) == (REWINDS, None)


def test_file_that_cannot_be_written_is_reported(tmp_path: Path) -> None:
    (tmp_path / "rewinds.json.tmp").mkdir()
    with pytest.raises(RunFolderError, match=r"rewinds\.json cannot be written .* free space"):
        write_rewinds(RunFolder(tmp_path), REWINDS)


@pytest.mark.parametrize(
    ("position", "expected"),
    [
        ({"step": 12}, 9),  # saved before the rewind, which did not take effect
        ({"step": 9}, None),  # the rewind restores this one
        ({"step": 16, "skips": [[9, 12]]}, None),  # saved after the rewind
        ({"step": 16, "skips": [[2, 4], [9, 12]]}, None),
        ({"step": 8, "skips": [[2, 4]]}, 7),  # of an earlier rewind, or of another run
        ({"step": 7, "skips": [[2, 4]]}, None),
    ],
)
def test_rewind_is_unfinished_if_the_newest_checkpoint_does_not_exclude_its_batches(
    tmp_path: Path, position: dict[str, Any], expected: int | None
) -> None:
    folder = RunFolder(tmp_path)
    assert unfinished_rewind(folder, [(9, 12)]) is None  # no checkpoint
    save(folder, **position)
    assert unfinished_rewind(folder, [(9, 12)]) == expected
    assert unfinished_rewind(folder, []) is None


def test_manifest_that_differs_from_its_hash_does_not_decide(tmp_path: Path) -> None:
    """A rewind deletes later checkpoints, which a damaged manifest must not cause."""
    folder = RunFolder(tmp_path)
    save(folder, 16, skips=[[9, 12]])
    save(folder, 20, skips=[[9, 12]])
    manifest = folder.step_folder(20) / "manifest.json"
    manifest.write_text(manifest.read_text().replace("[[9, 12]]", "[[1, 12]]"))
    assert unfinished_rewind(folder, [(9, 12)]) is None


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 5)), max_size=4), st.integers(0, 40))
def test_steps_before_a_batch_do_not_count_excluded_batches(
    ranges: list[tuple[int, int]], batch: int
) -> None:
    skips = merge_ranges((first, first + size) for first, size in ranges)
    excluded = {index for skip in skips for index in range(*skip)}
    assert last_step_before(batch, skips) == len(set(range(batch)) - excluded)


@pytest.mark.parametrize(
    ("ranges", "expected"),
    [
        ([], ()),
        ([(5, 7), (1, 2)], ((1, 2), (5, 7))),
        ([(1, 3), (3, 4), (2, 6), (8, 9)], ((1, 6), (8, 9))),
        ([[1, 9], (2, 3)], ((1, 9),)),
    ],
)
def test_merged_ranges_contain_each_batch_once(ranges: Any, expected: Any) -> None:
    assert merge_ranges(ranges) == expected
    batches = {n for first, stop in ranges for n in range(first, stop)}
    assert sorted(batches) == [
        n for first, stop in merge_ranges(ranges) for n in range(first, stop)
    ]
