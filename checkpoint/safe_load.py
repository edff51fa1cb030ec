"""Read checkpoints without executing code that a file of unknown origin may contain.

PyTorch's DCP unpickles `.metadata` and every value that is not a tensor without restriction. Here
`.metadata` is unpickled with the classes only that DCP saves, and other values with
`torch.load(…, weights_only=True)`, as DCP does for tensors.
"""

import io
import pickle
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, set_element
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem

from data.files import read_file

FILE_NAME = ".metadata"
_DCP = "torch.distributed.checkpoint"
ALLOWED = {
    *((f"{_DCP}.metadata", name) for name in ("Metadata", "MetadataIndex", "StorageMeta")),
    *((f"{_DCP}.metadata", f"{kind}StorageMetadata") for kind in ("Bytes", "Chunk", "Tensor")),
    *((f"{_DCP}.metadata", name) for name in ("TensorProperties", "_MEM_FORMAT_ENCODING")),
    (f"{_DCP}.filesystem", "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("collections", "OrderedDict"),
    *((module, "PosixPath") for module in ("pathlib", "pathlib._local")),
}


class _MetadataUnpickler(pickle.Unpickler):
    """Unpickler of the classes that `.metadata` consists of."""

    def find_class(self, module: str, name: str) -> Any:
        """Return a class or function of the allow-list, or a dtype of torch."""
        dtype = getattr(torch, name, None) if module == "torch" else None
        if (module, name) not in ALLOWED and not isinstance(dtype, torch.dtype):
            raise pickle.UnpicklingError(
                f"it contains {module}.{name} and could execute code, so it is not loaded"
            )
        return super().find_class(module, name)


def read_metadata(folder: Path) -> Metadata:
    """Return the content of `.metadata` of a checkpoint.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is damaged, or contains objects other than those that DCP saves.
    """
    path = folder / FILE_NAME
    content = read_file(path)
    try:
        metadata = _MetadataUnpickler(io.BytesIO(content)).load()
        if not isinstance(metadata, Metadata):
            raise TypeError(f"it contains an object of type {type(metadata).__name__}")
        for entry in metadata.storage_data.values():
            if Path(entry.relative_path).name != entry.relative_path:
                raise ValueError(f"it refers to {entry.relative_path}, outside the checkpoint")
    except Exception as error:  # a damaged pickle can raise any
        raise ValueError(f"{path} cannot be loaded: {error}") from None
    return metadata


class CheckpointReader(dcp.FileSystemReader):
    """DCP's reader with restricted unpickling."""

    _error: Exception | None = None

    def read_metadata(self) -> Metadata:
        """Return the metadata; after an error, which DCP would log with a traceback, none.

        Without the argument `rank`, DCP does not look for a file of this rank.
        """
        try:
            metadata = read_metadata(Path(self.path))
        except (OSError, ValueError) as error:
            self._error = error
            return Metadata({})
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        """Raise the error of `read_metadata`, which DCP forwards to all ranks."""
        if self._error is not None:
            raise self._error
        super().set_up_storage_reader(metadata, is_coordinator, *args, **kwargs)

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Any:  # a Future
        """Read the values of a plan.

        Raises:
            ValueError: A value contains objects of other types than tensors and settings.
        """
        try:
            return super().read_data(plan, planner)
        except pickle.UnpicklingError:  # with PyTorch's advice to load it nevertheless
            raise ValueError(
                f"{self.path} contains objects other than tensors and numbers and could execute "
                "code, so it is not loaded"
            ) from None


class CheckpointLoadPlanner(DefaultLoadPlanner):
    """DCP's planner with restricted unpickling of values that are not tensors."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Load one value with `weights_only=True`; otherwise as the base class does."""
        path = self.mappings[read_item.dest_index.fqn]
        set_element(self.original_state_dict, path, torch.load(value, weights_only=True))
