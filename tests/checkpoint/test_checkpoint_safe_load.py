"""No program executes code that a checkpoint contains, although its hashes are valid."""

import hashlib
import io
import json
import os
import pickle
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import xxhash
from save_checkpoint import save
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorProperties, TensorStorageMetadata

from checkpoint.position import Position
from checkpoint.restore import NoCheckpoint, restore
from checkpoint.safe_load import FILE_NAME, read_metadata
from formats.detection import open_weights
from formats.errors import FormatError
from formats.native import _stored_tensors
from resilience.run_folder import COMMITTED, MANIFEST, RunFolder
from training.config import OptimConfig
from training.optimizer import build_optimizer


class Code:
    """Creates a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.folder),)


@pytest.fixture(autouse=True)
def _group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def small() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Linear(2, 2)
    return model, build_optimizer(model, OptimConfig(lr=0.1))


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path / "run")
    model, optimizer = small()
    save(folder, model, optimizer, Position(3, 24, 192, "hash"), {"model": {}})
    return folder


def replace(checkpoint: Path, name: str, content: bytes) -> None:
    """Replace a file of a checkpoint, with valid hashes."""
    (checkpoint / name).write_bytes(content)
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    entry = {"bytes": len(content), "hash": xxhash.xxh3_128_hexdigest(content)}
    text = json.dumps({**manifest, "files": {**manifest["files"], name: entry}})
    (checkpoint / MANIFEST).write_text(text)
    (checkpoint / COMMITTED).write_text(hashlib.sha256(text.encode()).hexdigest())


def metadata_with_code(checkpoint: Path, marker: Path) -> None:
    metadata = read_metadata(checkpoint)
    metadata.planner_data = Code(marker)
    replace(checkpoint, FILE_NAME, pickle.dumps(metadata))


def value_with_code(checkpoint: Path, marker: Path) -> None:
    """Replace the learning rate in `__0_0.distcp`, which is not a tensor."""
    metadata = read_metadata(checkpoint)
    index = next(each for each in metadata.storage_data if each.fqn.endswith(".lr"))
    stream, entry = io.BytesIO(), metadata.storage_data[index]
    torch.save(Code(marker), stream)
    content = (checkpoint / entry.relative_path).read_bytes()
    entry.offset, entry.length = len(content), len(stream.getvalue())
    replace(checkpoint, FILE_NAME, pickle.dumps(metadata))
    replace(checkpoint, entry.relative_path, content + stream.getvalue())


@pytest.mark.parametrize("infect", [metadata_with_code, value_with_code])
def test_resuming_executes_no_code_of_a_checkpoint(
    infect: Callable[[Path, Path], None],
    run: RunFolder,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    checkpoint, marker = run.step_folder(3), tmp_path / "executed"
    infect(checkpoint, marker)
    with pytest.raises(NoCheckpoint, match=r"step-00000003: cannot be loaded .*could execute code"):
        restore(run, "auto", *small(), report=lambda _: None)
    assert not marker.exists() and capfd.readouterr() == ("", "")
    state = {"optimizer": {"param_groups.0.lr": 0.0}}
    with suppress(CheckpointException):  # of what the code returned
        dcp.load(state, storage_reader=dcp.FileSystemReader(checkpoint), no_dist=True)
    assert marker.exists()  # the file does contain code, which DCP's own reader executes


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (pickle.dumps(Code(Path("executed"))), "mkdir and could execute code"),
        (pickle.dumps({"a": torch.float32}), "an object of type dict"),
        (pickle.dumps(Metadata({})), "no attribute 'values'"),
        (b"\x80\x04", "Ran out of input"),
        (b"", "Ran out of input"),
    ],
)
def test_programs_report_metadata_that_dcp_did_not_write(
    content: bytes, reason: str, run: RunFolder
) -> None:
    """The way of evaluation, generation, conversion and `run.init_from`."""
    checkpoint = run.step_folder(3)
    replace(checkpoint, FILE_NAME, content)
    with pytest.raises(FormatError) as raised:
        open_weights(checkpoint)
    assert f"{checkpoint / FILE_NAME} cannot be loaded: " in str(raised.value)
    assert reason in str(raised.value)


def test_metadata_may_not_refer_to_files_outside_the_checkpoint(run: RunFolder) -> None:
    checkpoint = run.step_folder(3)
    metadata = read_metadata(checkpoint)
    for entry in metadata.storage_data.values():
        entry.relative_path = "../other/__0_0.distcp"
    replace(checkpoint, FILE_NAME, pickle.dumps(metadata))
    with pytest.raises(FormatError, match="outside the checkpoint"):
        open_weights(checkpoint)


def test_tensor_without_parts_is_rejected(tmp_path: Path) -> None:
    properties = TensorProperties(dtype=torch.float32)
    entry = TensorStorageMetadata(properties, torch.Size([2, 2]), [])
    metadata = Metadata({"model.norm.weight": entry})
    with pytest.raises(FormatError, match=r"\.metadata has no part of norm\.weight"):
        _stored_tensors(tmp_path, metadata)
