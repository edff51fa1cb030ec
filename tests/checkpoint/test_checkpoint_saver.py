"""A save beside the training holds what was there when it began, and fails alone."""

import errno
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from checkpoint import saving
from checkpoint.config import CheckpointConfig
from checkpoint.position import Position
from checkpoint.restore import load
from checkpoint.saver import Outcome, Saver
from resilience.run_folder import RunFolder
from training.config import OptimConfig
from training.optimizer import build_optimizer


@pytest.fixture(scope="module", autouse=True)
def _group() -> Iterator[None]:
    """A process group of one, without a port."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Training:
    """A small model that is trained and saved, and what was reported of it."""

    def __init__(self, folder: Path, **config: Any) -> None:
        self.folder = RunFolder(folder)
        self.model = nn.Linear(3, 4)
        self.optimizer = build_optimizer(self.model, OptimConfig(lr=0.1))
        self.told: list[str] = []
        self.saver = Saver(self.folder, CheckpointConfig(**config), {}, self.told.append)

    def train(self) -> None:
        self.model(torch.randn(5, 3)).square().sum().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def save(self, step: int) -> bool:
        return self.saver.save(self.model, self.optimizer, Position(step, step, step, "hash"))

    def outcomes(self) -> list[Outcome]:
        self.saver.finish()
        return self.saver.poll()

    def values(self) -> list[Tensor]:
        """Copies of parameters, moments and counts."""
        states = [self.optimizer.state[p] for p in self.model.parameters()]
        found = [*self.model.parameters(), *(v for state in states for v in state.values())]
        return [value.detach().clone() for value in found]


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Writing waits until it is set."""
    gate, write = threading.Event(), saving.write_shards

    def held(*arguments: Any) -> Any:
        assert gate.wait(60)
        return write(*arguments)

    monkeypatch.setattr(saving, "write_shards", held)
    return gate


def test_checkpoint_holds_the_values_of_its_step_however_far_training_is(
    tmp_path: Path, gate: threading.Event
) -> None:
    one, other = Training(tmp_path), Training(tmp_path / "other")
    for training in (one, other):
        training.train()
    expected = one.values()
    assert one.save(1) and not one.folder.committed_steps()
    one.train()
    assert not any(map(torch.equal, expected, one.values()))
    gate.set()
    (outcome,) = one.outcomes()
    assert outcome.error is None and one.folder.committed_steps() == [1]
    load(outcome.path, other.model, other.optimizer)
    assert all(map(torch.equal, other.values(), expected))
    one.save(2)  # into the same memory
    assert one.outcomes()[0].error is None
    load(one.folder.step_folder(2), other.model, other.optimizer)
    assert all(map(torch.equal, other.values(), one.values()))


@pytest.mark.parametrize("asynchronous", [True, False])
@pytest.mark.parametrize("phase", ["write_shards", "write_manifest", "commit", "publish"])
def test_save_that_fails_is_told_at_the_next_look_and_never_committed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, phase: str, asynchronous: bool
) -> None:
    training = Training(tmp_path, async_save=asynchronous)
    training.train()

    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as disk:
        disk.setattr(saving, phase, full)
        training.save(1)
        (outcome,) = training.outcomes()
    assert outcome.step == 1 and "No space left on device" in (outcome.error or "")
    assert training.folder.committed_steps() == []
    assert list(training.folder.checkpoints.iterdir()) == []
    training.save(2)
    assert training.outcomes()[0].error is None
    assert training.folder.committed_steps() == [2]


def test_save_that_finds_another_under_way_is_left_out_where_that_is_asked_for(
    tmp_path: Path, gate: threading.Event
) -> None:
    training = Training(tmp_path, when_busy="skip")
    training.train()
    assert training.save(1)
    assert not training.save(2)
    gate.set()
    assert [outcome.step for outcome in training.outcomes()] == [1]
    assert training.save(3)
    assert [outcome.step for outcome in training.outcomes()] == [3]
    assert training.folder.committed_steps() == [1, 3]


def test_save_that_finds_another_under_way_waits_for_it_else(
    tmp_path: Path, gate: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = Training(tmp_path, when_busy="wait")
    training.train()
    training.save(1)
    finish = training.saver.finish

    def open_the_gate_and_finish() -> None:
        gate.set()
        finish()

    monkeypatch.setattr(training.saver, "finish", open_the_gate_and_finish)
    assert training.save(2)
    assert [outcome.step for outcome in training.outcomes()] == [1, 2]
    assert training.folder.committed_steps() == [1, 2]


def test_checkpoint_counts_whatever_becomes_of_the_removal_of_old_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = Training(tmp_path, keep_last=1)
    training.train()

    def refuse(path: Path) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr("checkpoint.retention.shutil.rmtree", refuse)
    for step in (1, 2, 3):
        training.save(step)
        assert training.outcomes()[0].error is None
    assert training.folder.committed_steps() == [3]
    assert len(training.told) == len(set(training.told)) >= 2  # each folder that stays, once
    assert all("cannot be removed (Permission denied)" in told for told in training.told)
