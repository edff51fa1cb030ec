"""A run resumes from its own checkpoints, or from where it started."""

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from run_config import changed, commit

import checkpoint.restore
import parallel.parallelize
from checkpoint.position import Position
from resilience.run_folder import RunFolder
from training.recovery import _load_or_initialize


@pytest.mark.parametrize("named", ["run", "checkpoint"])
def test_rewind_to_before_the_first_own_checkpoint_restores_where_the_run_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: str
) -> None:
    other, folder = RunFolder(tmp_path / "other"), RunFolder(tmp_path / "run")
    path = commit(other, 5)
    resume = str(other.path if named == "run" else path)
    commit(folder, 8)
    folder.write_config(changed("run.resume", resume))
    restored: list[tuple[Any, ...]] = []

    def restore(_: RunFolder, source: str, *others: Any) -> Position | None:
        restored.append((source, *others[3:]))
        return None if source == "auto" else Position(5, 10, 80, "same")

    def initialize(*arguments: Any) -> None:
        raise AssertionError("trains from scratch")

    monkeypatch.setattr(checkpoint.restore, "restore", restore)
    monkeypatch.setattr(parallel.parallelize, "initialize_weights", initialize)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    run = SimpleNamespace(dir=str(folder.path), resume=resume, adopt=False)
    config: Any = SimpleNamespace(run=run)
    dataset = SimpleNamespace(hash="same")
    position = _load_or_initialize(config, None, None, dataset, print, 7)
    assert restored == [("auto", 7), (resume,)] and position.step == 5
    assert folder.committed_steps() == []  # the later one is deleted


@pytest.mark.parametrize(
    "resume", ["auto", "never", ".", "checkpoints", "checkpoints/step-00000008"]
)
def test_run_does_not_start_from_its_own_folder(tmp_path: Path, resume: str) -> None:
    folder = RunFolder(tmp_path / "run")
    commit(folder, 8)
    path = resume if resume in ("auto", "never") else str(folder.path / resume)
    assert folder.origin(path) is None
    shutil.copytree(folder.path, tmp_path / "other")
    assert folder.origin(str(tmp_path / "other")) == str(tmp_path / "other")
