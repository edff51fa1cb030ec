"""A background save writes the tensors of its step; a failed one is never committed."""

import errno
import os
import resource
import threading
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any, cast

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from save_checkpoint import RUN_ID
from torch import Tensor, nn
from torch.distributed.checkpoint import filesystem
from torch.utils._pytree import tree_map_only

from checkpoint import writer
from checkpoint.config import CheckpointConfig
from checkpoint.files import HashedFiles
from checkpoint.position import Position
from checkpoint.restore import load
from checkpoint.saver import Saver, SaveResult
from resilience.run_folder import RunFolder
from training.config import OptimConfig
from training.optimizer import StateFormat, build_optimizer


@pytest.fixture(scope="module", autouse=True)
def _group() -> Iterator[None]:
    """A process group of one process, without a port."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Training:
    """A small model that is trained and saved."""

    def __init__(self, folder: Path, state: StateFormat = "fp32", **config: Any) -> None:
        self.folder = RunFolder(folder)
        self.model = nn.Linear(3, 4)
        self.optimizer = build_optimizer(self.model, OptimConfig(lr=0.1), state)
        self.messages: list[str] = []
        self.saver = Saver(
            self.folder, RUN_ID, CheckpointConfig(**config), {}, self.messages.append
        )

    def train(self) -> None:
        self.model(torch.randn(5, 3)).square().sum().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def save(self, step: int) -> bool:
        return self.saver.save(self.model, self.optimizer, Position(step, step, step, "hash"))

    def results(self) -> list[SaveResult]:
        self.saver.finish()
        return self.saver.poll()

    def values(self) -> list[Tensor]:
        """Return copies of parameters and optimizer state."""
        states = [self.optimizer.state[p] for p in self.model.parameters()]
        found = [*self.model.parameters(), *(v for state in states for v in state.values())]
        return [value.detach().clone() for value in found]


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """An event that writing waits for."""
    gate, write = threading.Event(), writer.write_shards

    def write_when_open(*arguments: Any) -> Any:
        assert gate.wait(60)
        return write(*arguments)

    monkeypatch.setattr(writer, "write_shards", write_when_open)
    return gate


def test_checkpoint_has_the_values_of_its_step_while_training_continues(
    tmp_path: Path, gate: threading.Event
) -> None:
    training, other = Training(tmp_path), Training(tmp_path / "other")
    for each in (training, other):
        each.train()
    expected = training.values()
    assert training.save(1) and not training.folder.committed_steps()
    training.train()
    assert not any(map(torch.equal, expected, training.values()))
    gate.set()
    (result,) = training.results()
    assert result.error is None and training.folder.committed_steps() == [1]
    load(result.path, other.model, other.optimizer)
    assert all(map(torch.equal, other.values(), expected))
    training.save(2)  # reuses the host buffers
    assert training.results()[0].error is None
    load(training.folder.step_folder(2), other.model, other.optimizer)
    assert all(map(torch.equal, other.values(), training.values()))


@pytest.mark.parametrize("async_save", [True, False])
@pytest.mark.parametrize("phase", ["write_shards", "write_manifest", "commit", "publish"])
def test_failed_save_is_reported_by_the_next_poll_and_never_committed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, phase: str, async_save: bool
) -> None:
    training = Training(tmp_path, async_save=async_save)
    training.train()

    def disk_full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(writer, phase, disk_full)
        training.save(1)
        (result,) = training.results()
    assert result.step == 1 and "No space left on device" in (result.error or "")
    assert training.folder.committed_steps() == []
    assert list(training.folder.checkpoints.iterdir()) == []
    training.save(2)
    assert training.results()[0].error is None
    assert training.folder.committed_steps() == [2]


def test_save_during_another_one_is_skipped_if_when_busy_is_skip(
    tmp_path: Path, gate: threading.Event
) -> None:
    training = Training(tmp_path, when_busy="skip")
    training.train()
    assert training.save(1)
    assert not training.save(2)
    gate.set()
    assert [result.step for result in training.results()] == [1]
    assert training.save(3)
    assert [result.step for result in training.results()] == [3]
    assert training.folder.committed_steps() == [1, 3]


def test_save_during_another_one_waits_if_when_busy_is_wait(
    tmp_path: Path, gate: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = Training(tmp_path, when_busy="wait")
    training.train()
    training.save(1)
    finish = training.saver.finish

    def open_gate_and_finish() -> None:
        gate.set()
        finish()

    monkeypatch.setattr(training.saver, "finish", open_gate_and_finish)
    assert training.save(2)
    assert [result.step for result in training.results()] == [1, 2]
    assert training.folder.committed_steps() == [1, 2]


def test_checkpoint_is_valid_even_if_old_ones_cannot_be_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = Training(tmp_path, keep_last=1)
    training.train()

    def deny(path: Path) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr("checkpoint.retention.shutil.rmtree", deny)
    for step in (1, 2, 3):
        training.save(step)
        assert training.results()[0].error is None
    assert training.folder.committed_steps() == [3]
    assert len(training.messages) == len(set(training.messages)) >= 2  # once for each folder
    assert all("(Permission denied). Continuing" in message for message in training.messages)


def test_write_error_of_a_full_disk_replaces_the_error_of_torch(tmp_path: Path) -> None:
    """`torch.save` into a file whose write fails raises "enforce fail … unexpected pos"."""
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, unlimited[1]))
    try:
        with (
            pytest.raises(OSError, match="File too large; the limit is"),
            HashedFiles(80_000).create_stream(tmp_path / "shard", "wb") as stream,
        ):
            torch.save(torch.zeros(20_000), cast(IO[bytes], stream))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)


# ---------------------------------------------------------------- on a GPU


@pytest.mark.parametrize("async_save", [True, False])
def test_writing_host_tensors_does_not_wait_for_the_training_stream(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, async_save: bool
) -> None:
    """DCP's loader for tensors on a GPU synchronizes the stream of the thread that creates it."""
    waits: list[str] = []
    stream = SimpleNamespace(
        device_type="cuda", synchronize=lambda: waits.append(threading.current_thread().name)
    )
    module = SimpleNamespace(current_stream=lambda: stream, stream=lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(filesystem, "_get_available_device_type", lambda: "cuda")
    monkeypatch.setattr(filesystem, "_get_device_module", lambda _: module)
    training = Training(tmp_path, async_save=async_save)
    training.train()
    training.save(1)
    assert training.results()[0].error is None and not waits


def test_thread_that_writes_selects_the_gpu_of_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise CUDA calls of the thread would create a context on GPU 0 for every rank."""
    selected: list[tuple[str, int]] = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(
        torch.cuda,
        "set_device",
        lambda device: selected.append((threading.current_thread().name, device)),
    )
    training = Training(tmp_path)
    training.train()
    training.save(1)
    assert training.results()[0].error is None and selected == [("checkpoint", 3)]


@pytest.mark.parametrize("state", ["bf16", "int8"])
def test_low_bit_moments_are_converted_into_the_copy_without_another_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: StateFormat
) -> None:
    training = Training(tmp_path, state)
    training.train()
    expected = writer.tensors_of(training.model, training.optimizer)
    with monkeypatch.context() as patch:
        patch.setattr(training.optimizer, "_convert", None)  # of a state dict of tensors
        training.save(1)
    assert training.results()[0].error is None
    found = tree_map_only(Tensor, torch.zeros_like, expected)
    dcp.load(found, checkpoint_id=training.folder.step_folder(1), no_dist=True)
    for part in (found, expected):
        del part["optimizer"]["param_groups"]
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
