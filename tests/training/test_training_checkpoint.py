"""Checkpoints are committed whole or not at all, and damage is found, named and passed over."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from training import checkpoint
from training.checkpoint import find_damage, find_newest, load, read_position, save
from training.config import OptimConfig
from training.optimizer import build_optimizer
from training.position import Position
from training.run_folder import COMMITTED, RunFolder, RunFolderError

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
    with pytest.raises(RunFolderError) as error:
        find_newest(folder, "auto", silent)
    for part in ("step-00000003", "step-00000012", FILES[0], FILES[1], "run.name"):
        assert part in str(error.value)
    assert folder.committed_steps() == [3, 12]


def test_a_damaged_checkpoint_that_was_asked_for_is_never_replaced_by_another(
    folder: RunFolder,
) -> None:
    flip(folder.step_folder(12) / FILES[0])
    with pytest.raises(RunFolderError, match=r"__0_0\.distcp"):
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


@pytest.mark.parametrize("step", ["write", "manifest", "commit", "rename"])
def test_a_save_that_fails_anywhere_leaves_the_older_checkpoints_and_no_new_one(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """As on a full disk: the error comes out, and the run can go on from what there was."""

    def full(*arguments: Any, **_: Any) -> None:
        raise OSError(28, "No space left on device")

    write = checkpoint._write_synced

    def full_at(path: Path, text: str) -> None:
        if path.name == {"manifest": "manifest.json", "commit": COMMITTED}[step]:
            path.touch()  # what comes before the data
            if step == "manifest":
                full()
            path.unlink()
            full()
        write(path, text)

    if step == "write":
        monkeypatch.setattr(checkpoint.dcp, "save", full)
    elif step == "rename":
        rename = Path.rename
        monkeypatch.setattr(
            Path, "rename", lambda path, to: (full if path.is_dir() else rename)(path, to)
        )
    else:
        monkeypatch.setattr(checkpoint, "_write_synced", full_at)
    with pytest.raises(OSError, match="No space left"):
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

    monkeypatch.setattr(checkpoint.shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.remove_old(folder, keep_last=1)
    assert folder.committed_steps() == [12]
    assert (folder.step_folder(3) / FILES[0]).exists()


@pytest.mark.parametrize(
    ("keep_last", "kept"), [(1, [12]), (2, [3, 12]), (5, [3, 12]), (None, [3, 12])]
)
def test_the_newest_are_kept(folder: RunFolder, keep_last: int | None, kept: list[int]) -> None:
    checkpoint.remove_old(folder, keep_last)
    assert folder.committed_steps() == kept
    assert sorted(folder.checkpoints.iterdir()) == [folder.step_folder(step) for step in kept]
