"""Checkpoints are committed whole or not at all, and damage is found, named and passed over."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import xxhash
from torch import nn

from checkpoint import retention, saving
from checkpoint.files import damage_of, read_position
from checkpoint.position import Position
from checkpoint.restore import NoCheckpoint, find_damage, load, restore
from checkpoint.saving import SaveFailed, save
from resilience.run_folder import COMMITTED, RunFolder
from training.config import OptimConfig
from training.optimizer import build_optimizer

FILES = ["__0_0.distcp", ".metadata", "manifest.json", COMMITTED]


@pytest.fixture(scope="module", autouse=True)
def _group() -> Iterator[None]:
    """A process group of one, without a port."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def small() -> tuple[nn.Module, torch.optim.AdamW]:
    """A model with a matrix and a vector, trained for one step."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    optimizer = build_optimizer(model, OptimConfig(lr=0.1))
    model(torch.randn(5, 3)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    return model, optimizer


def save_step(folder: RunFolder, step: int, seed: int = 0) -> nn.Module:
    """Saves a model whose values follow from step and seed."""
    torch.manual_seed(1000 * seed + step)
    model, optimizer = small()
    save(folder, model, optimizer, Position(step, 8 * step, 64 * step, "hash"), {"key": "value"})
    return model


def flip(file: Path) -> None:
    """Changes one bit in the middle."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def truncate(file: Path) -> None:
    """Takes the last byte away, as a full disk does."""
    os.truncate(file, file.stat().st_size - 1)


def remove(file: Path) -> None:
    file.unlink()


def empty(file: Path) -> None:
    os.truncate(file, 0)


def find_newest(folder: RunFolder, resume: str, report: Callable[[str], None]) -> Path | None:
    """The checkpoint that restoring goes on from; its weights are those that were saved."""
    model, optimizer = small()
    position = restore(folder, resume, model, optimizer, report)
    return None if position is None else folder.step_folder(position.step)


def silent(_: str) -> None:
    """For those who pass nothing over."""


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    for step in (3, 12):
        save_step(RunFolder(folder), step)
    return folder


@pytest.fixture
def folder(two_steps: Path, tmp_path: Path) -> RunFolder:
    """A run of its own with the checkpoints 3 and 12."""
    return RunFolder(shutil.copytree(two_steps, tmp_path / "run"))


def test_loading_gives_back_parameters_moments_steps_and_position(tmp_path: Path) -> None:
    torch.manual_seed(0)
    (model, optimizer), position = small(), Position(7, 56, 448, "hash")
    target = save(RunFolder(tmp_path), model, optimizer, position, {"a": {"b": 1}})
    other_model, other_optimizer = small()
    load(target, other_model, other_optimizer)
    assert read_position(target) == position
    for parameter, other in zip(model.parameters(), other_model.parameters(), strict=True):
        assert torch.equal(parameter, other)
        for key, value in optimizer.state[parameter].items():
            assert torch.equal(value, other_optimizer.state[other][key]), key
    assert json.loads((target / "manifest.json").read_text())["config"] == {"a": {"b": 1}}


def test_one_process_sends_its_plan_to_nobody(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A collective of what describes a large model slows each later step on CPU."""

    def sent(*_: Any, **__: Any) -> None:
        raise AssertionError("an object was sent")

    for name in ("gather_object", "all_gather_object", "scatter_object_list"):
        monkeypatch.setattr(dist, name, sent)
    model, optimizer = small()
    written = saving.write_shards(saving.tensors_of(model, optimizer), tmp_path / "one", None)
    assert written.keys() == {"__0_0.distcp", ".metadata"}
    load(tmp_path / "one", model, optimizer)


def test_places_of_lanes_come_back_and_older_checkpoints_have_none(folder: RunFolder) -> None:
    assert read_position(folder.step_folder(12)).lanes is None
    lanes = {"0": [0, 1, 17, 300], "1": [2, 0, 0, 0]}
    position = Position(13, 104, 832, "hash", lanes, batches=13)
    assert read_position(save(folder, *small(), position, {})) == position
    assert position.after(batches=14, samples=112, tokens=64).lanes is None  # each step tells anew
    assert position.on("hash") == position
    assert position.on("other") == Position(13, 104, 832, "other", batches=13)
    manifest = folder.step_folder(12) / "manifest.json"
    values = json.loads(manifest.read_text())
    for key in ("lanes", "batches", "skips", "vitals"):  # as the first version had it
        del values["position"][key]
    manifest.write_text(json.dumps(values))
    assert read_position(folder.step_folder(12)) == Position(12, 96, 768, "hash", batches=12)


def test_loading_without_an_optimizer_gives_the_model(folder: RunFolder) -> None:
    torch.manual_seed(99)
    expected = save_step(RunFolder(folder.path.parent / "again"), 12)
    model, _ = small()
    load(folder.step_folder(12), model)
    for parameter, other in zip(expected.parameters(), model.parameters(), strict=True):
        assert torch.equal(parameter, other)


def test_every_file_of_a_checkpoint_is_known(folder: RunFolder) -> None:
    """So that the tests below damage each of them."""
    assert sorted(path.name for path in folder.step_folder(12).iterdir()) == sorted(FILES)
    assert find_damage(folder.step_folder(12)) is None


@pytest.mark.parametrize("damage", [flip, truncate, empty, remove])
@pytest.mark.parametrize("name", FILES)
def test_damage_of_any_file_is_named_and_the_older_checkpoint_taken(
    folder: RunFolder, name: str, damage: Any
) -> None:
    newest = folder.step_folder(12)
    damage(newest / name)
    if not (newest / COMMITTED).exists():  # no checkpoint any more, so nothing to report
        assert find_newest(folder, "auto", silent) == folder.step_folder(3)
        return
    found = find_damage(newest)
    assert found is not None and name in found
    content = {path.name: path.read_bytes() for path in newest.iterdir()}
    told: list[str] = []
    assert find_newest(folder, "auto", told.append) == folder.step_folder(3)
    assert len(told) == 1 and newest.name in told[0] and name in told[0]
    [aside] = folder.checkpoints.glob("step-00000012.damaged-*")
    assert {path.name: path.read_bytes() for path in aside.iterdir()} == content
    assert aside.name in told[0]
    assert folder.committed_steps() == [3]
    save_step(folder, 12)  # the step comes again, beside what was put aside
    assert find_newest(folder, "auto", silent) == newest and aside.exists()


def test_every_byte_of_the_manifest_counts(folder: RunFolder) -> None:
    """A digit of the position is as valid JSON as another one."""
    manifest = folder.step_folder(12) / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"step": 12', '"step": 13'))
    assert "manifest.json" in (find_damage(folder.step_folder(12)) or "")


def test_when_no_checkpoint_is_whole_the_run_stops_and_nothing_is_moved(folder: RunFolder) -> None:
    for step, name in ((3, FILES[0]), (12, FILES[1])):
        flip(folder.step_folder(step) / name)
    with pytest.raises(NoCheckpoint) as error:
        find_newest(folder, "auto", silent)
    for part in ("step-00000003", "step-00000012", FILES[0], FILES[1], "run.name"):
        assert part in str(error.value)
    assert folder.committed_steps() == [3, 12]


def test_a_damaged_checkpoint_that_was_asked_for_is_never_replaced_by_another(
    folder: RunFolder,
) -> None:
    flip(folder.step_folder(12) / FILES[0])
    with pytest.raises(NoCheckpoint, match=r"__0_0\.distcp"):
        find_newest(folder, str(folder.step_folder(12)), silent)
    assert find_newest(folder, str(folder.step_folder(3)), silent) == folder.step_folder(3)


def test_a_first_start_finds_nothing(tmp_path: Path) -> None:
    assert find_newest(RunFolder(tmp_path / "new"), "auto", silent) is None
    assert not (tmp_path / "new").exists()


def test_the_highest_step_wins_not_the_youngest_file(folder: RunFolder) -> None:
    save_step(folder, 9)
    future = folder.step_folder(12).stat().st_mtime + 1000
    for path in [folder.step_folder(3), *folder.step_folder(3).iterdir()]:
        os.utime(path, (future, future))
    assert find_newest(folder, "auto", silent) == folder.step_folder(12)


def test_a_folder_without_committed_is_never_taken_and_the_next_save_replaces_it(
    folder: RunFolder,
) -> None:
    (folder.step_folder(12) / COMMITTED).unlink()
    (folder.step_folder(12) / "left").touch()
    assert folder.committed_steps() == [3]
    assert find_newest(folder, "auto", silent) == folder.step_folder(3)
    save_step(folder, 12)
    assert not (folder.step_folder(12) / "left").exists()
    assert find_newest(folder, "auto", silent) == folder.step_folder(12)


def test_what_a_killed_save_left_is_no_checkpoint_and_goes_with_the_next_save(
    folder: RunFolder,
) -> None:
    leftover = folder.checkpoints / ".step-00000020-0123abcd"
    shutil.copytree(folder.step_folder(12), leftover)  # killed just before the rename
    assert folder.committed_steps() == [3, 12]
    assert find_newest(folder, "auto", silent) == folder.step_folder(12)
    save_step(folder, 20)
    assert not leftover.exists()
    assert folder.committed_steps() == [3, 12, 20]
    assert find_damage(folder.step_folder(20)) is None


def test_nothing_is_written_over_a_committed_checkpoint(folder: RunFolder) -> None:
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
def test_a_save_that_fails_anywhere_leaves_the_older_checkpoints_and_no_new_one(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch, phase: str
) -> None:
    """As on a full disk: the error comes out, and the run can go on from what there was."""

    def full(*arguments: Any, **_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saving, phase, full)
    with pytest.raises(SaveFailed, match=r"rank 0: .*No space left"):
        save_step(folder, 20)
    monkeypatch.undo()
    assert folder.committed_steps() == [3, 12]
    assert find_newest(folder, "auto", silent) == folder.step_folder(12)
    save_step(folder, 20)
    assert [path.name for path in sorted(folder.checkpoints.iterdir())] == [
        f"step-{number:08d}" for number in (3, 12, 20)
    ]


def test_removal_takes_committed_first(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(path: Path) -> None:
        assert path == folder.step_folder(3)
        raise KeyboardInterrupt

    monkeypatch.setattr(retention.shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        retention.remove_old(folder, keep_last=1, keep_every=None)
    assert folder.committed_steps() == [12]
    assert (folder.step_folder(3) / FILES[0]).exists()


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
def test_the_newest_and_every_so_many_are_kept(
    tmp_path: Path, keep_last: int | None, keep_every: int | None, kept: list[int]
) -> None:
    folder = committed(tmp_path, 3, 6, 9, 12)
    assert retention.remove_old(folder, keep_last, keep_every) == []
    assert folder.committed_steps() == kept
    assert sorted(folder.checkpoints.iterdir()) == [folder.step_folder(step) for step in kept]


def committed(path: Path, *steps: int) -> RunFolder:
    """A run's folder as retention sees it, without tensors."""
    folder = RunFolder(path)
    for step in steps:
        folder.step_folder(step).mkdir(parents=True)
        (folder.step_folder(step) / COMMITTED).touch()
        (folder.step_folder(step) / FILES[0]).touch()
    return folder


def test_what_cannot_be_deleted_is_no_checkpoint_any_more_and_told_by_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = committed(tmp_path, 3, 6, 9)

    def refused(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(retention.shutil, "rmtree", refused)
    problems = retention.remove_old(folder, 1, None)
    assert len(problems) == 2
    for step, line in zip((3, 6), problems, strict=True):
        assert str(folder.step_folder(step)) in line
    assert all("Permission denied" in line for line in problems)
    assert folder.committed_steps() == [9]


def test_a_rewind_removes_what_lies_beyond_it(tmp_path: Path) -> None:
    folder = committed(tmp_path, 3, 6, 9)
    assert retention.remove_beyond(folder, 4) == []
    assert folder.committed_steps() == [3]
    assert list(folder.checkpoints.iterdir()) == [folder.step_folder(3)]


def test_a_rewind_goes_to_the_newest_at_or_before_its_step(folder: RunFolder) -> None:
    for before, step in ((12, 12), (11, 3), (3, 3)):
        position = restore(folder, "auto", *small(), silent, before=before)
        assert position is not None and position.step == step
    assert restore(folder, "auto", *small(), silent, before=2) is None
    assert folder.committed_steps() == [3, 12]  # none was passed over


def test_a_checkpoint_that_is_whole_and_does_not_load_is_passed_over(folder: RunFolder) -> None:
    """As one whose files are whole and tell of other tensors."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))
    optimizer = build_optimizer(model, OptimConfig(lr=0.1))
    save(folder, model, optimizer, Position(20, 160, 1280, "hash"), {})
    assert find_damage(folder.step_folder(20)) is None
    told: list[str] = []
    assert find_newest(folder, "auto", told.append) == folder.step_folder(12)
    assert len(told) == 1 and "step-00000020" in told[0] and "rank 0" in told[0]


def as_version_1(checkpoint: Path) -> None:
    """Makes the manifest what the first version of the format wrote."""
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["format_version"] = 1
    del manifest["algorithm"]
    for name, entry in manifest["files"].items():
        del entry["hash"]
        entry["sha256"] = hashlib.sha256((checkpoint / name).read_bytes()).hexdigest()
    text = json.dumps(manifest, indent=1)
    (checkpoint / "manifest.json").write_text(text)
    (checkpoint / COMMITTED).write_text(hashlib.sha256(text.encode()).hexdigest())


def test_checkpoints_of_the_first_format_are_read_and_verified(folder: RunFolder) -> None:
    newest = folder.step_folder(12)
    as_version_1(newest)
    assert find_damage(newest) is None
    assert find_newest(folder, "auto", silent) == newest
    flip(newest / FILES[0])
    assert f"{FILES[0]} has another hash (sha256)" in (find_damage(newest) or "")


def test_hashes_made_while_writing_are_those_of_the_files(folder: RunFolder) -> None:
    newest = folder.step_folder(12)
    files = json.loads((newest / "manifest.json").read_text())["files"]
    assert files.keys() == set(FILES[:2])
    for name, entry in files.items():
        content = (newest / name).read_bytes()
        assert entry == {"bytes": len(content), "hash": xxhash.xxh3_128_hexdigest(content)}
        assert damage_of(newest / name, entry, "xxh3_128") is None


def test_a_format_of_the_future_is_named(folder: RunFolder) -> None:
    manifest = folder.step_folder(12) / "manifest.json"
    text = manifest.read_text().replace('"format_version": 2', '"format_version": 3')
    manifest.write_text(text)
    (manifest.parent / COMMITTED).write_text(hashlib.sha256(text.encode()).hexdigest())
    assert "version 3" in (find_damage(manifest.parent) or "")


def test_the_optimizer_s_settings_are_those_of_the_start_not_the_checkpoint_s(
    tmp_path: Path,
) -> None:
    """Else a decay or a beta that was allowed to change is recorded as changed, and is not."""
    model, optimizer = small()
    target = save(RunFolder(tmp_path), model, optimizer, Position(7, 56, 448, "hash"), {})
    config = OptimConfig(lr=0.2, betas=(0.5, 0.6), eps=1e-3, weight_decay=0.7)
    now = build_optimizer(model, config)
    built = [{key: group[key] for key in group if key != "params"} for group in now.param_groups]
    moments = {p: optimizer.state[p]["exp_avg"].clone() for p in model.parameters()}
    load(target, model, now)
    loaded = [{key: group[key] for key in group if key != "params"} for group in now.param_groups]
    assert loaded == built and {group["weight_decay"] for group in loaded} == {0.7, 0.0}
    assert all(torch.equal(now.state[p]["exp_avg"], moments[p]) for p in model.parameters())
