"""Checkpoints are committed completely or not at all; damaged ones are reported and skipped."""

import builtins
import errno
import hashlib
import io
import json
import os
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import xxhash
from save_checkpoint import RUN_ID, save
from torch import nn

from checkpoint import writer
from checkpoint.files import find_file_damage
from checkpoint.position import Position
from checkpoint.restore import NoCheckpoint, find_damage, load, restore
from checkpoint.retention import hidden_name
from checkpoint.writer import SaveFailed
from resilience.run_folder import COMMITTED, RunFolder, RunFolderError, read_manifest
from training.config import OptimConfig
from training.optimizer import build_optimizer

FILES = ["__0_0.distcp", ".metadata", "manifest.json", COMMITTED]


@pytest.fixture(scope="module", autouse=True)
def _group() -> Iterator[None]:
    """A process group of one process, without a port."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def build_trained() -> tuple[nn.Module, torch.optim.AdamW]:
    """Return a small model and its optimizer after one step."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    optimizer = build_optimizer(model, OptimConfig(lr=0.1))
    model(torch.randn(5, 3)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    return model, optimizer


def save_step(folder: RunFolder, step: int, seed: int = 0, create: bool = True) -> nn.Module:
    """Save a model whose values depend on step and seed only."""
    torch.manual_seed(1000 * seed + step)
    model, optimizer = build_trained()
    position = Position(step, 8 * step, 64 * step, "hash")
    save(folder, model, optimizer, position, {"key": "value"}, create)
    return model


def flip(file: Path) -> None:
    """Flip one bit in the middle."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def truncate(file: Path) -> None:
    """Remove the last byte."""
    os.truncate(file, file.stat().st_size - 1)


def remove(file: Path) -> None:
    file.unlink()


def empty(file: Path) -> None:
    os.truncate(file, 0)


def restored_folder(folder: RunFolder, resume: str, report: Callable[[str], None]) -> Path | None:
    """Restore into a new model; return the folder of the checkpoint used."""
    model, optimizer = build_trained()
    position = restore(folder, resume, model, optimizer, report)
    return None if position is None else folder.step_folder(position.step)


def ignore(message: str) -> None:
    pass


def read_position(checkpoint: Path) -> Position:
    """Read the position without verifying the manifest."""
    manifest = read_manifest(checkpoint)
    assert manifest is not None
    return Position.from_dict(manifest["position"])


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    for step in (3, 12):
        save_step(RunFolder(folder), step)
    return folder


@pytest.fixture
def folder(two_steps: Path, tmp_path: Path) -> RunFolder:
    """A copy of a run with checkpoints at steps 3 and 12."""
    return RunFolder(shutil.copytree(two_steps, tmp_path / "run"))


def test_load_restores_parameters_optimizer_state_and_position(tmp_path: Path) -> None:
    torch.manual_seed(0)
    (model, optimizer), position = build_trained(), Position(7, 56, 448, "hash")
    target = save(RunFolder(tmp_path), model, optimizer, position, {"a": {"b": 1}})
    other_model, other_optimizer = build_trained()
    load(target, other_model, other_optimizer)
    assert read_position(target) == position
    for parameter, other in zip(model.parameters(), other_model.parameters(), strict=True):
        assert torch.equal(parameter, other)
        for key, value in optimizer.state[parameter].items():
            assert torch.equal(value, other_optimizer.state[other][key]), key
    assert json.loads((target / "manifest.json").read_text())["config"] == {"a": {"b": 1}}


def test_single_process_uses_no_object_collectives(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A collective of a large model's plan slows down each later step on CPU."""

    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("an object collective was used")

    for name in ("gather_object", "all_gather_object", "scatter_object_list"):
        monkeypatch.setattr(dist, name, fail)
    model, optimizer = build_trained()
    written = writer.write_shards(writer.tensors_of(model, optimizer), tmp_path / "one", None)
    assert written.keys() == {"__0_0.distcp", ".metadata"}
    load(tmp_path / "one", model, optimizer)


def test_stream_shards_are_restored(folder: RunFolder) -> None:
    assert read_position(folder.step_folder(12)).stream_shards is None
    stream_shards = {"0": [0, 1, 17, 300], "1": [2, 0, 0, 0]}
    position = Position(13, 104, 832, "hash", stream_shards, batches=13)
    assert read_position(save(folder, *build_trained(), position, {})) == position
    assert position.with_data("hash") == position
    assert position.with_data("other") == Position(13, 104, 832, "other", batches=13)


def test_position_of_the_first_version_is_read(folder: RunFolder) -> None:
    manifest = folder.step_folder(12) / "manifest.json"
    values = json.loads(manifest.read_text())
    for key in ("stream_shards", "batches", "skips", "monitor_state"):
        del values["position"][key]
    manifest.write_text(json.dumps(values))
    assert read_position(folder.step_folder(12)) == Position(12, 96, 768, "hash", batches=12)


def test_checkpoint_with_the_names_of_0_1_is_restored(folder: RunFolder) -> None:
    newest = folder.step_folder(12)
    manifest = json.loads((newest / "manifest.json").read_text())
    state, lanes = {"skipped": 1, "in_a_row": 0, "seen": 12, "mean": 3.0}, {"0": [0, 1, 17, 300]}
    position = {"step": 12, "samples": 96, "tokens": 768, "data_hash": "hash", "batches": 13}
    manifest["position"] = position | {"skips": [[4, 5]], "lanes": lanes, "vitals": state}
    text = json.dumps(manifest, indent=1)
    (newest / "manifest.json").write_text(text)
    (newest / COMMITTED).write_text(hashlib.sha256(text.encode()).hexdigest())
    restored = restore(folder, "auto", *build_trained(), ignore)
    assert restored == Position(12, 96, 768, "hash", lanes, 13, ((4, 5),), monitor_state=state)


def test_tests_below_damage_every_file_of_a_checkpoint(folder: RunFolder) -> None:
    assert sorted(path.name for path in folder.step_folder(12).iterdir()) == sorted(FILES)
    assert find_damage(folder.step_folder(12)) is None


@pytest.mark.parametrize("damage", [flip, truncate, empty, remove])
@pytest.mark.parametrize("name", FILES)
def test_damage_of_any_file_is_reported_and_the_older_checkpoint_restored(
    folder: RunFolder, name: str, damage: Any
) -> None:
    newest = folder.step_folder(12)
    damage(newest / name)
    if not (newest / COMMITTED).exists():  # no longer a checkpoint: nothing to report
        assert restored_folder(folder, "auto", ignore) == folder.step_folder(3)
        return
    found = find_damage(newest)
    assert found is not None and name in found
    content = {path.name: path.read_bytes() for path in newest.iterdir()}
    messages: list[str] = []
    assert restored_folder(folder, "auto", messages.append) == folder.step_folder(3)
    assert len(messages) == 1 and newest.name in messages[0] and name in messages[0]
    [renamed] = folder.checkpoints.glob("step-00000012.damaged-*")
    assert {path.name: path.read_bytes() for path in renamed.iterdir()} == content
    assert renamed.name in messages[0]
    assert folder.committed_steps() == [3]
    save_step(folder, 12)  # the step can be saved again
    assert restored_folder(folder, "auto", ignore) == newest and renamed.exists()


@pytest.mark.parametrize("name", [*FILES, COMMITTED])
def test_named_pipe_instead_of_a_file_is_damage(folder: RunFolder, name: str) -> None:
    path = folder.step_folder(12) / name
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    assert restored_folder(folder, "auto", ignore) == folder.step_folder(3)
    [renamed] = folder.checkpoints.glob("step-00000012.damaged-*")
    assert (renamed / name).is_fifo()


def test_copy_of_a_checkpoint_under_the_name_of_another_step_is_not_restored(
    folder: RunFolder,
) -> None:
    shutil.copytree(folder.step_folder(3), folder.step_folder(20))
    messages: list[str] = []
    assert restored_folder(folder, "auto", messages.append) == folder.step_folder(12)
    [message] = messages
    assert "it is the checkpoint of step 3 under another name" in message
    assert len(list(folder.checkpoints.glob("step-00000020.damaged-*"))) == 1


def test_folder_that_was_moved_during_the_run_is_not_created_again(folder: RunFolder) -> None:
    folder.path.rename(moved := folder.path.with_name("moved"))
    with pytest.raises(SaveFailed, match="was moved or removed during the run"):
        save_step(folder, 20, create=False)
    assert not folder.path.exists()
    save_step(RunFolder(moved), 20)


def test_every_byte_of_the_manifest_is_verified(folder: RunFolder) -> None:
    """Another digit in the position is valid JSON too."""
    manifest = folder.step_folder(12) / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"step": 12', '"step": 13'))
    assert "manifest.json" in (find_damage(folder.step_folder(12)) or "")


def test_manifest_with_a_name_that_no_file_has_is_damaged(folder: RunFolder) -> None:
    manifest = folder.step_folder(12) / "manifest.json"
    values = json.loads(manifest.read_bytes())
    values["files"]["\ud800"] = {"bytes": 1, "hash": ""}
    manifest.write_text(json.dumps(values))
    digest = hashlib.sha256(manifest.read_bytes()).hexdigest()
    (folder.step_folder(12) / "COMMITTED").write_text(digest)
    assert "manifest.json" in (find_damage(folder.step_folder(12)) or "")


def test_without_a_valid_checkpoint_restore_raises_and_renames_no_folder(folder: RunFolder) -> None:
    for step, name in ((3, FILES[0]), (12, FILES[1])):
        flip(folder.step_folder(step) / name)
    with pytest.raises(NoCheckpoint) as error:
        restored_folder(folder, "auto", ignore)
    for part in ("step-00000003", "step-00000012", FILES[0], FILES[1], "run.dir"):
        assert part in str(error.value)
    assert folder.committed_steps() == [3, 12]


def test_damaged_checkpoint_of_run_resume_is_never_replaced_by_another(
    folder: RunFolder,
) -> None:
    flip(folder.step_folder(12) / FILES[0])
    with pytest.raises(NoCheckpoint, match=r"__0_0\.distcp"):
        restored_folder(folder, str(folder.step_folder(12)), ignore)
    assert restored_folder(folder, str(folder.step_folder(3)), ignore) == folder.step_folder(3)


def test_first_launch_has_no_position(tmp_path: Path) -> None:
    assert restored_folder(RunFolder(tmp_path / "new"), "auto", ignore) is None
    assert not (tmp_path / "new").exists()


def test_highest_step_is_restored_regardless_of_file_times(folder: RunFolder) -> None:
    save_step(folder, 9)
    future = folder.step_folder(12).stat().st_mtime + 1000
    for path in [folder.step_folder(3), *folder.step_folder(3).iterdir()]:
        os.utime(path, (future, future))
    assert restored_folder(folder, "auto", ignore) == folder.step_folder(12)


def test_uncommitted_folder_is_never_restored_and_kept_by_the_next_save(
    folder: RunFolder,
) -> None:
    (folder.step_folder(12) / COMMITTED).unlink()
    (folder.step_folder(12) / "notes").touch()
    assert folder.committed_steps() == [3]
    assert restored_folder(folder, "auto", ignore) == folder.step_folder(3)
    save_step(folder, 12)
    assert not (folder.step_folder(12) / "notes").exists()
    assert len(list(folder.checkpoints.glob("step-00000012.uncommitted-*/notes"))) == 1
    assert restored_folder(folder, "auto", ignore) == folder.step_folder(12)


def test_leftover_of_a_killed_save_is_ignored_and_deleted_by_the_next_save(
    folder: RunFolder,
) -> None:
    leftover = hidden_name(folder.step_folder(20), RUN_ID)
    shutil.copytree(folder.step_folder(12), leftover)  # killed just before the rename
    assert folder.committed_steps() == [3, 12]
    assert restored_folder(folder, "auto", ignore) == folder.step_folder(12)
    save_step(folder, 20)
    assert not leftover.exists()
    assert folder.committed_steps() == [3, 12, 20]
    assert find_damage(folder.step_folder(20)) is None


@pytest.mark.parametrize("target", ["missing", "self", "file"])
def test_link_with_the_name_of_a_step_does_not_fail_a_save(folder: RunFolder, target: str) -> None:
    link = folder.step_folder(20)
    link.symlink_to({"missing": "/no/such/folder", "self": str(link), "file": __file__}[target])
    save_step(folder, 18)
    save_step(folder, 20)
    assert folder.committed_steps() == [3, 12, 18, 20]
    assert len(list(folder.checkpoints.glob("step-00000020.uncommitted-*"))) == 1


@pytest.mark.parametrize("name", [*FILES, ""])
def test_unreadable_newest_checkpoint_stops_the_run_instead_of_using_an_older_one(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """The file system denies access, which `chmod` does not do for root."""
    hidden = folder.step_folder(12) / name
    before = sorted(folder.checkpoints.rglob("*"))
    deny_access(monkeypatch, hidden)
    with pytest.raises(
        RunFolderError, match=r"12.* cannot be read \(Permission denied\)"
    ) as raised:
        restored_folder(folder, "auto", ignore)
    assert not isinstance(raised.value, NoCheckpoint)
    monkeypatch.undo()
    assert sorted(folder.checkpoints.rglob("*")) == before
    assert restored_folder(folder, "auto", ignore) == folder.step_folder(12)


def test_unreadable_older_checkpoint_does_not_stop_a_run(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    deny_access(monkeypatch, folder.step_folder(3))
    assert restored_folder(folder, "auto", ignore) == folder.step_folder(12)
    save_step(folder, 20)
    monkeypatch.undo()
    assert folder.committed_steps() == [3, 12, 20]


def deny_access(monkeypatch: pytest.MonkeyPatch, denied: Path) -> None:
    """Let `open` and `stat` fail for a file, or for the files of a folder."""

    def denying(function: Callable[..., Any], file: Any, *arguments: Any, **options: Any) -> Any:
        if not isinstance(file, int):
            path = Path(os.fsdecode(file))
            within = denied in path.parents
            if within or (path == denied and function is not os.stat):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(file))
        return function(file, *arguments, **options)

    for module, name in ((io, "open"), (builtins, "open"), (os, "open"), (os, "stat")):
        monkeypatch.setattr(module, name, partial(denying, getattr(module, name)))


def test_committed_checkpoint_is_never_overwritten(folder: RunFolder) -> None:
    before = {
        p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.step_folder(12).iterdir()
    }
    save_step(folder, 12, seed=1)
    after = {
        p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.step_folder(12).iterdir()
    }
    assert before == after
    assert [path.name for path in folder.checkpoints.glob(".*")] == []


@pytest.mark.parametrize(
    "phase", ["make_folder", "write_shards", "write_manifest", "commit", "publish", "sync_folder"]
)
def test_save_failing_in_any_phase_keeps_older_checkpoints_and_commits_none(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch, phase: str
) -> None:

    def disk_full(*arguments: Any, **_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer, phase, disk_full)
    with pytest.raises(SaveFailed, match=r"rank 0: .*No space left"):
        save_step(folder, 20)
    monkeypatch.undo()
    assert folder.committed_steps() == [3, 12]
    assert restored_folder(folder, "auto", ignore) == folder.step_folder(12)
    save_step(folder, 20)
    assert [path.name for path in sorted(folder.checkpoints.iterdir())] == [
        f"step-{number:08d}" for number in (3, 12, 20)
    ]


def test_rewind_restores_the_newest_checkpoint_at_or_before_its_step(folder: RunFolder) -> None:
    for before, step in ((12, 12), (11, 3), (3, 3)):
        position = restore(folder, "auto", *build_trained(), ignore, before=before)
        assert position is not None and position.step == step
    assert restore(folder, "auto", *build_trained(), ignore, before=2) is None
    assert folder.committed_steps() == [3, 12]  # none was skipped


def test_valid_checkpoint_that_cannot_be_loaded_is_skipped(folder: RunFolder) -> None:
    """Its files are intact but hold tensors of other shapes."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))
    optimizer = build_optimizer(model, OptimConfig(lr=0.1))
    save(folder, model, optimizer, Position(20, 160, 1280, "hash"), {})
    assert find_damage(folder.step_folder(20)) is None
    messages: list[str] = []
    assert restored_folder(folder, "auto", messages.append) == folder.step_folder(12)
    assert len(messages) == 1
    assert "step-00000020" in messages[0] and "rank 0" in messages[0]


def as_version_1(checkpoint: Path) -> None:
    """Rewrite the manifest in version 1 of the format."""
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["format_version"] = 1
    del manifest["algorithm"]
    for name, entry in manifest["files"].items():
        del entry["hash"]
        entry["sha256"] = hashlib.sha256((checkpoint / name).read_bytes()).hexdigest()
    text = json.dumps(manifest, indent=1)
    (checkpoint / "manifest.json").write_text(text)
    (checkpoint / COMMITTED).write_text(hashlib.sha256(text.encode()).hexdigest())


def test_format_version_1_is_read_and_verified(folder: RunFolder) -> None:
    newest = folder.step_folder(12)
    as_version_1(newest)
    assert find_damage(newest) is None
    assert restored_folder(folder, "auto", ignore) == newest
    flip(newest / FILES[0])
    assert f"the hash of {FILES[0]} (sha256) differs" in (find_damage(newest) or "")


def test_hashes_computed_while_writing_match_the_files(folder: RunFolder) -> None:
    newest = folder.step_folder(12)
    files = json.loads((newest / "manifest.json").read_text())["files"]
    assert files.keys() == set(FILES[:2])
    for name, entry in files.items():
        content = (newest / name).read_bytes()
        assert entry == {"bytes": len(content), "hash": xxhash.xxh3_128_hexdigest(content)}
        assert find_file_damage(newest / name, entry, "xxh3_128") is None


def test_newer_format_version_is_reported(folder: RunFolder) -> None:
    manifest = folder.step_folder(12) / "manifest.json"
    text = manifest.read_text().replace('"format_version": 2', '"format_version": 3')
    manifest.write_text(text)
    (manifest.parent / COMMITTED).write_text(hashlib.sha256(text.encode()).hexdigest())
    assert "version 3" in (find_damage(manifest.parent) or "")


def test_loaded_optimizer_keeps_its_own_hyperparameters(tmp_path: Path) -> None:
    """Otherwise an allowed change of weight decay or betas would have no effect."""
    model, optimizer = build_trained()
    target = save(RunFolder(tmp_path), model, optimizer, Position(7, 56, 448, "hash"), {})
    config = OptimConfig(lr=0.2, betas=(0.5, 0.6), eps=1e-3, weight_decay=0.7)
    now = build_optimizer(model, config)
    built = [{key: group[key] for key in group if key != "params"} for group in now.param_groups]
    moments = {p: optimizer.state[p]["exp_avg"].clone() for p in model.parameters()}
    load(target, model, now)
    loaded = [{key: group[key] for key in group if key != "params"} for group in now.param_groups]
    assert loaded == built and {group["weight_decay"] for group in loaded} == {0.7, 0.0}
    assert all(torch.equal(now.state[p]["exp_avg"], moments[p]) for p in model.parameters())
