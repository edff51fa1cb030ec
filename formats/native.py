"""Native checkpoints: read the weights of a training checkpoint, write a weights-only checkpoint.

Training saves with PyTorch's distributed checkpoint (DCP), which stores each tensor in one chunk
per rank and each chunk as a `torch.save` archive embedded in a larger file. A checkpoint written
here has no optimizer state and no position: a run can be initialized from it but not resumed.
"""

import dataclasses
import errno
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import WriteItem
from torch.distributed.checkpoint.utils import _create_file_view

from checkpoint.files import MANIFEST, HashedFiles, find_file_damage, verify_manifest
from checkpoint.position import Position
from checkpoint.safe_load import read_metadata
from checkpoint.writer import commit, write_extra_files, write_manifest
from data.errors import first_line
from data.tokenizer import Tokenizer
from formats.config_json import validated_config
from formats.errors import FormatError
from formats.stored_tensor import StoredTensor, TensorSlice, unreadable
from formats.weights import Weights, check_tensors
from model.config import ModelConfig
from resilience.renamed_keys import rename_keys

PREFIX = "model."  # of the parameters' names in the files, next to "optimizer."


@dataclass(frozen=True)
class _EmbeddedSlice(TensorSlice):
    """A slice in a `torch.save` archive, which occupies `length` bytes of the file from `start`."""

    length: int

    @cached_property  # a reader needs few of the many slices
    def first_byte(self) -> int:
        """Byte offset of the first element in the file."""
        try:
            with self.path.open("rb") as file, FakeTensorMode(), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of the pickle protocol of a damaged file
                archive: Any = _create_file_view(file, self.start, self.length)
                tensor = torch.load(archive, weights_only=True)
                storage_offset: int = tensor.untyped_storage()._checkpoint_offset
        except OSError as error:
            raise unreadable(self.path, error) from None
        except Exception as error:  # of the unpickler, such as IndexError
            reason = first_line(error)
            raise FormatError(
                f"{self.path} is damaged ({reason}); use another checkpoint"
            ) from None
        return self.start + storage_offset + tensor.storage_offset() * tensor.element_size()


def open_native(folder: Path) -> Weights:
    """Open a committed checkpoint saved by training, on any mesh, or by conversion.

    Raises:
        FormatError: It is damaged, or its tensors do not match its configuration.
    """
    try:
        manifest = verify_manifest(folder)
        values = {**manifest["config"]["model"], "attention": "auto"}
        stored = _stored_tensors(folder, read_metadata(folder))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}" if isinstance(error, KeyError) else error
        raise FormatError(f"{folder} is damaged: {reason}; use another checkpoint") from None
    model = validated_config(folder / MANIFEST, values)
    config_model = model
    model, tensors = check_tensors(folder, config_model, stored)
    warnings = []
    if model.tie_embeddings != config_model.tie_embeddings:
        warnings.append(
            f"{folder}: model.tie_embeddings=true, but output.weight differs from "
            "tok_embeddings.weight; the model is read as untied (model.tie_embeddings=false)"
        )

    def damage() -> str | None:
        algorithm = manifest["algorithm"]
        found = (find_file_damage(folder / n, e, algorithm) for n, e in manifest["files"].items())
        return next(filter(None, found), None)

    step, config = manifest["position"]["step"], manifest["config"]
    rename_keys(config)
    return Weights("native", folder, model, tensors, step, config, damage, warnings)


def _stored_tensors(folder: Path, metadata: Metadata) -> dict[str, StoredTensor]:
    """Return the parameters in the files of a checkpoint, by name."""
    stored = {}
    for key, entry in metadata.state_dict_metadata.items():
        if not key.startswith(PREFIX) or not isinstance(entry, TensorStorageMetadata):
            continue
        chunks = []
        for chunk in entry.chunks:
            archive = metadata.storage_data[MetadataIndex(key, chunk.offsets)]
            path, shape = folder / archive.relative_path, tuple(chunk.sizes)
            chunks.append(
                _EmbeddedSlice(tuple(chunk.offsets), shape, path, archive.offset, archive.length)
            )
        name, shape = key.removeprefix(PREFIX), tuple(entry.size)
        if not chunks:
            raise FormatError(
                f"{folder / '.metadata'} has no part of {name}; use another checkpoint"
            )
        stored[name] = StoredTensor(entry.properties.dtype, shape, chunks)
    return stored


def write_native(
    model: ModelConfig,
    tensors: Mapping[str, StoredTensor],
    tokenizer: Tokenizer | None,
    folder: Path,
    files: Mapping[str, bytes] = MappingProxyType({}),
) -> None:
    """Write a committed weights-only checkpoint into an empty folder, tensor by tensor.

    Args:
        files: Files of the source that are kept (`formats.metadata`).
    """
    state = {
        f"{PREFIX}{name}": torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        for name, tensor in tensors.items()
    }
    # One file per tensor, since DCP keeps all tensors of a file in memory until it is written.
    writer = dcp.FileSystemWriter(
        folder, single_file_per_rank=False, sync_files=True, overwrite=False
    )
    writer.fs = fingerprints = HashedFiles()
    try:
        with warnings.catch_warnings(action="ignore"):  # DCP warns that no_dist is set
            dcp.save(state, storage_writer=writer, planner=_ReadOnWrite(tensors), no_dist=True)
    except CheckpointException as error:  # a BaseException that wraps the causes
        cause = next(iter(error.failures.values()))[0]
        if isinstance(cause, FormatError | OSError):
            raise cause from None
        # PyTorch reports a full disk as a RuntimeError about the number of written bytes.
        raise OSError(errno.EIO, first_line(cause)) from None
    config: dict[str, Any] = {"model": dataclasses.asdict(model), "tokenizer": None}
    written = fingerprints.written | write_extra_files(folder, files)
    if tokenizer is not None:
        config["tokenizer"] = {"name": tokenizer.name, "vocab_size": tokenizer.vocab_size}
        written |= write_extra_files(folder, tokenizer.files())
    position = dataclasses.asdict(Position(step=0, samples=0, tokens=0, data_hash=""))
    write_manifest(folder, written, position, config)
    commit(folder)


class _ReadOnWrite(DefaultSavePlanner):
    """Save planner that reads each tensor when it is written."""

    def __init__(self, tensors: Mapping[str, StoredTensor]) -> None:
        super().__init__(flatten_state_dict=False)
        self.tensors = tensors

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        """Return the values of one parameter."""
        return self.tensors[write_item.index.fqn.removeprefix(PREFIX)].read()
