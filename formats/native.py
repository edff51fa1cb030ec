"""Our checkpoints as weights: read from those that training saved, written as weights alone.

What training saves lies in files of PyTorch's distributed checkpoint, each tensor in as many chunks
as ranks held it, each chunk a little file of `torch.save` inside. Written here are no optimizer and
no position, so that a run can begin with the weights and not go on from them.
"""

import dataclasses
import errno
import pickle
import warnings
from collections.abc import Sequence
from functools import cached_property
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

from checkpoint.files import HashedFiles, find_file_damage, verify_manifest
from checkpoint.position import Position
from checkpoint.writer import commit, write_extra_files, write_manifest
from formats.configuration import checked
from formats.errors import FormatError
from formats.pieces import Piece, StoredTensor, unreadable
from formats.weights import Weights, check_tensors, parameter_shapes
from model.config import ModelConfig

PREFIX = "model."  # of the weights' names in the files, beside the optimizer's


class NativeWeights(Weights):
    """A committed checkpoint, of a run or of weights alone."""

    format = "native"

    def __init__(
        self,
        folder: Path,
        model: ModelConfig,
        stored: dict[str, StoredTensor],
        manifest: dict[str, Any],
    ) -> None:
        super().__init__(folder, model, stored)
        self.step, self.config = manifest["position"]["step"], manifest["config"]
        self.files, self.algorithm = manifest["files"], manifest["algorithm"]

    def _stored_name(self, name: str) -> str:
        return name

    def damage(self) -> str | None:
        """As `Weights.damage`: reads every file, by this process alone."""
        found = (
            find_file_damage(self.folder / name, entry, self.algorithm)
            for name, entry in self.files.items()
        )
        return next((told for told in found if told is not None), None)


class Chunk(Piece):
    """A piece inside a file of its own inside a file; where its values begin is found when asked.

    A checkpoint of many ranks has as many chunks of each tensor, and a reader needs few of them.
    """

    def __init__(
        self, offsets: Sequence[int], shape: Sequence[int], path: Path, begin: int, length: int
    ) -> None:
        super().__init__(offsets, shape, path)
        self.begin, self.length = begin, length

    def start(self) -> int:
        """The place of its first value in the file."""
        return self._values

    @cached_property
    def _values(self) -> int:
        try:
            with self.path.open("rb") as file, FakeTensorMode():
                part: Any = _Part(file, self.begin, self.length)
                tensor = torch.load(part, weights_only=True)
        except OSError as error:
            raise unreadable(self.path, error) from None
        except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
            told = str(error).splitlines()[0]
            raise FormatError(f"{self.path} is damaged ({told}): use another checkpoint") from None
        offset: int = tensor.untyped_storage()._checkpoint_offset
        return self.begin + offset + tensor.storage_offset() * tensor.element_size()


class _Part:
    """A part of an open file that looks like a file, as far as `torch.load` looks."""

    def __init__(self, file: Any, begin: int, length: int) -> None:
        self.file, self.begin, self.length = file, begin, length
        self.seek(0)

    def tell(self) -> int:
        """The place in the part."""
        return int(self.file.tell()) - self.begin

    def seek(self, offset: int, whence: int = 0) -> int:
        """Moves to a place of the part."""
        base = (0, self.tell() if whence == 1 else 0, self.length)[whence]
        self.file.seek(self.begin + base + offset)
        return base + offset

    def read(self, size: int = -1) -> bytes:
        """Bytes from the place on, up to the part's end."""
        left = self.length - self.tell()
        content: bytes = self.file.read(left if size < 0 else min(size, left))
        return content

    def readline(self) -> bytes:
        """Bytes up to a line's end."""
        content: bytes = self.file.readline(self.length - self.tell())
        return content


def open_native(folder: Path) -> NativeWeights:
    """A committed checkpoint, saved by training or by conversion, on any mesh.

    Raises:
        FormatError: it is damaged, or its tensors are not those of its configuration.
    """
    try:
        manifest = verify_manifest(folder)
        values = dict(manifest["config"]["model"])
        metadata = dcp.FileSystemReader(folder).read_metadata()
    except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError) as error:
        told = f"{type(error).__name__}: {error}" if isinstance(error, KeyError) else error
        raise FormatError(f"{folder} is damaged: {told}. Use another checkpoint") from None
    except pickle.UnpicklingError as error:
        raise FormatError(f"{folder} is damaged: {error}. Use another checkpoint") from None
    name = values.pop("name", folder.name)
    model = checked(folder / "manifest.json", name, {**values, "attention": "auto"})
    stored = {}
    for key, entry in metadata.state_dict_metadata.items():
        if not key.startswith(PREFIX) or not isinstance(entry, TensorStorageMetadata):
            continue
        chunks = []
        for chunk in entry.chunks:
            place = metadata.storage_data[MetadataIndex(key, chunk.offsets)]
            path = folder / place.relative_path
            chunks.append(Chunk(chunk.offsets, chunk.sizes, path, place.offset, place.length))
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
    beside: dict[str, bytes],
) -> None:
    """Writes a committed checkpoint of weights alone into an empty folder, tensor by tensor.

    Args:
        dtype: Of the values; None keeps what they have.
        tokenizer: Its configuration, where there is one.
        beside: Small files that travel with the weights, by name.
    """
    state = {
        f"{PREFIX}{name}": torch.empty(shape, dtype=dtype or weights.dtype(name), device="meta")
        for name, shape in weights.shapes.items()
    }
    # A file a tensor: PyTorch keeps the tensors of a file until it is written.
    writer = dcp.FileSystemWriter(
        folder, single_file_per_rank=False, sync_files=True, overwrite=False
    )
    writer.fs = files = HashedFiles()
    try:
        with warnings.catch_warnings(action="ignore"):  # that no processes are there is meant
            dcp.save(state, storage_writer=writer, planner=_OneByOne(weights), no_dist=True)
    except CheckpointException as error:  # no Exception, and around what is one
        cause = next(iter(error.failures.values()))[0]
        if isinstance(cause, FormatError | OSError):
            raise cause from None
        told = str(cause).splitlines()[0]  # a full disk, which PyTorch notices by its counting
        raise OSError(errno.EIO, told) from None
    model = dataclasses.asdict(weights.model)
    config = {"model": model, "tokenizer": tokenizer}
    position = dataclasses.asdict(Position(step=0, samples=0, tokens=0, data_hash=""))
    written = files.written | write_extra_files(folder, beside)
    write_manifest(folder, written, position, config)
    commit(folder)


class _OneByOne(DefaultSavePlanner):
    """Gives out each tensor when its turn to be written has come."""

    def __init__(self, weights: Weights) -> None:
        super().__init__(flatten_state_dict=False)
        self.weights = weights

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        """The values of one parameter, in the dtype that the plan tells."""
        name = write_item.index.fqn.removeprefix(PREFIX)
        shape = self.weights.shapes[name]
        values = self.weights.read(name, [0] * len(shape), shape)
        planned: Tensor = self.state_dict[write_item.index.fqn]
        return values.to(planned.dtype)
