"""Native checkpoints: read the weights of a training checkpoint, write a weights-only checkpoint.

Training saves with PyTorch's distributed checkpoint (DCP), which stores each tensor in one chunk
per rank and each chunk as a `torch.save` archive embedded in a larger file. A checkpoint written
here has no optimizer state and no position: a run can be initialized from it but not resumed.
"""

import dataclasses
import errno
import pickle
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import WriteItem
from torch.distributed.checkpoint.utils import _create_file_view

from checkpoint.files import MANIFEST, HashedFiles, find_file_damage, verify_manifest
from checkpoint.position import Position
from checkpoint.writer import commit, write_extra_files, write_manifest
from formats.config_json import validated_config
from formats.errors import FormatError
from formats.stored_tensor import StoredTensor, TensorSlice, unreadable
from formats.weights import Weights, check_tensors, parameter_shapes
from model.config import ModelConfig
from resilience.renamed_keys import rename_keys

PREFIX = "model."  # of the parameters' names in the files, next to "optimizer."


class NativeWeights(Weights):
    """A committed checkpoint of a training run, or a weights-only checkpoint."""

    format = "native"

    def __init__(
        self,
        folder: Path,
        model: ModelConfig,
        stored: dict[str, StoredTensor],
        manifest: dict[str, Any],
    ) -> None:
        super().__init__(folder, model, stored)
        rename_keys(manifest["config"])
        self.step, self.config = manifest["position"]["step"], manifest["config"]
        self.files, self.algorithm = manifest["files"], manifest["algorithm"]

    def _stored_name(self, name: str) -> str:
        return name

    def damage(self) -> str | None:
        """Return the first difference from the stored hashes; this process reads every file."""
        found = (
            find_file_damage(self.folder / name, entry, self.algorithm)
            for name, entry in self.files.items()
        )
        return next(filter(None, found), None)


def _first_value_offset(path: Path, offset: int, length: int) -> int:
    """Return the byte offset of the first value of a chunk's embedded archive.

    Args:
        offset, length: Byte range of the archive in the file.
    """
    try:
        with path.open("rb") as file, FakeTensorMode():
            archive: Any = _create_file_view(file, offset, length)
            tensor = torch.load(archive, weights_only=True)
    except OSError as error:
        raise unreadable(path, error) from None
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0]
        raise FormatError(f"{path} is damaged ({reason}); use another checkpoint") from None
    storage_offset: int = tensor.untyped_storage()._checkpoint_offset
    return offset + storage_offset + tensor.storage_offset() * tensor.element_size()


def open_native(folder: Path) -> NativeWeights:
    """Open a committed checkpoint saved by training, on any mesh, or by conversion.

    Raises:
        FormatError: It is damaged, or its tensors do not match its configuration.
    """
    try:
        manifest = verify_manifest(folder)
        values = dict(manifest["config"]["model"])
        metadata = dcp.FileSystemReader(folder).read_metadata()
    except (
        *(OSError, ValueError, KeyError, TypeError, AttributeError, EOFError),
        pickle.UnpicklingError,
    ) as error:
        reason = f"{type(error).__name__}: {error}" if isinstance(error, KeyError) else error
        raise FormatError(f"{folder} is damaged: {reason}; use another checkpoint") from None
    name = values.pop("name", folder.name)
    model = validated_config(folder / MANIFEST, name, {**values, "attention": "auto"})
    stored = {}
    for key, entry in metadata.state_dict_metadata.items():
        if not key.startswith(PREFIX) or not isinstance(entry, TensorStorageMetadata):
            continue
        chunks = []
        for chunk in entry.chunks:
            archive = metadata.storage_data[MetadataIndex(key, chunk.offsets)]
            path = folder / archive.relative_path
            # Determined on first use: a reader needs few of the many chunks.
            start = partial(_first_value_offset, path, archive.offset, archive.length)
            chunks.append(TensorSlice(chunk.offsets, chunk.sizes, path, start))
        shape = tuple(entry.size)
        stored[key.removeprefix(PREFIX)] = StoredTensor(entry.properties.dtype, shape, chunks)
    if model.tie_embeddings:
        stored.pop("output.weight", None)
    check_tensors(str(folder), stored, parameter_shapes(model))
    return NativeWeights(folder, model, stored, manifest)


def write_native(
    weights: Weights,
    folder: Path,
    dtype: torch.dtype | None,
    tokenizer: dict[str, Any] | None,
    extra_files: dict[str, bytes],
) -> None:
    """Write a committed weights-only checkpoint into an empty folder, tensor by tensor.

    Args:
        dtype: Data type to write; None keeps the stored one.
        tokenizer: Configuration of the tokenizer, if any.
        extra_files: Content of small files to store with the weights, by name.
    """
    state = {
        f"{PREFIX}{name}": torch.empty(shape, dtype=dtype or weights.dtype(name), device="meta")
        for name, shape in weights.shapes.items()
    }
    # One file per tensor, since DCP keeps all tensors of a file in memory until it is written.
    writer = dcp.FileSystemWriter(
        folder, single_file_per_rank=False, sync_files=True, overwrite=False
    )
    writer.fs = files = HashedFiles()
    try:
        with warnings.catch_warnings(action="ignore"):  # DCP warns that no_dist is set
            dcp.save(state, storage_writer=writer, planner=_ReadOnWrite(weights), no_dist=True)
    except CheckpointException as error:  # a BaseException that wraps the causes
        cause = next(iter(error.failures.values()))[0]
        if isinstance(cause, FormatError | OSError):
            raise cause from None
        # PyTorch reports a full disk as a RuntimeError about the number of written bytes.
        raise OSError(errno.EIO, str(cause).splitlines()[0]) from None
    model = dataclasses.asdict(weights.model)
    config = {"model": model, "tokenizer": tokenizer}
    position = dataclasses.asdict(Position(step=0, samples=0, tokens=0, data_hash=""))
    written = files.written | write_extra_files(folder, extra_files)
    write_manifest(folder, written, position, config)
    commit(folder)


class _ReadOnWrite(DefaultSavePlanner):
    """Save planner that reads each tensor when it is written."""

    def __init__(self, weights: Weights) -> None:
        super().__init__(flatten_state_dict=False)
        self.weights = weights

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        """Return the values of one parameter in the planned data type."""
        name = write_item.index.fqn.removeprefix(PREFIX)
        shape = self.weights.shapes[name]
        values = self.weights.read(name, [0] * len(shape), shape)
        planned: Tensor = self.state_dict[write_item.index.fqn]
        return values.to(planned.dtype)
