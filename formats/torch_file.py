"""Tensors in files of `torch.save`: names, shapes and file offsets, without reading values.

Files are loaded with `weights_only=True`, which rejects files that contain code, and as fake
tensors, which record the file offsets of their values.
"""

import pickle
import warnings
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from data.errors import first_line
from formats.errors import FormatError
from formats.stored_tensor import StoredTensor, TensorSlice, reject_lfs_pointer, unreadable


def read_torch_file(path: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a file by name.

    Raises:
        FormatError: The file is damaged, contains code, or is not a dictionary of tensors.
    """
    reject_lfs_pointer(path)
    with FakeTensorMode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the pickle protocol of a damaged file
        try:
            tensors = torch.load(path, map_location="cpu", weights_only=True)
        except OSError as error:
            raise unreadable(path, error) from None
        except pickle.UnpicklingError:
            raise FormatError(
                f"{path} contains objects other than tensors and could execute code, so it is not "
                "loaded; use the published weights, or save them as a plain dictionary of tensors"
            ) from None
        except Exception as error:  # of the unpickler, such as IndexError
            reason = first_line(error)
            raise FormatError(f"{path} is damaged ({reason}); download or copy it again") from None
    values = tensors.values() if isinstance(tensors, dict) else [None]
    if not all(isinstance(value, torch.Tensor) for value in values):
        raise FormatError(
            f"{path} is not a dictionary of tensors; save the weights as torch.save("
            "model.state_dict(), file)"
        )
    return {name: _stored(path, name, tensor) for name, tensor in tensors.items()}


def _stored(path: Path, name: str, tensor: torch.Tensor) -> StoredTensor:
    if not tensor.is_contiguous():
        raise FormatError(f"{path}: {name} is not contiguous; save it after contiguous()")
    storage_offset: Any = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
    if storage_offset is None:
        raise FormatError(
            f"{path} uses the file format of PyTorch before 1.6; load and save it with a "
            "current version"
        )
    start = storage_offset + tensor.storage_offset() * tensor.element_size()
    shape = tuple(tensor.shape)
    full = TensorSlice((0,) * len(shape), shape, path, start)
    return StoredTensor(tensor.dtype, shape, [full])
