"""Copy sharded tensors to host memory, to be written while training changes the originals."""

from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

State = dict[str, Any]


@torch.no_grad()
def copy_to_host(state: State, buffers: State | None) -> State:
    """Copy all tensors to host memory, reusing the buffers of the previous copy where they fit.

    Copies CPU tensors too, because training modifies them while the copy is written.
    """
    copied: State = _copy(state, buffers)
    if torch.cuda.is_available():
        torch.cuda.current_stream().synchronize()  # copies are queued without waiting
    return copied


def _copy(value: Any, buffer: Any) -> Any:
    """Copy a tensor, or all tensors of a nested value, into `buffer` if it fits."""
    if isinstance(value, dict):
        buffers = buffer if isinstance(buffer, dict) else {}
        return {key: _copy(item, buffers.get(key)) for key, item in value.items()}
    if isinstance(value, list | tuple):
        items = buffer if isinstance(buffer, list | tuple) else []
        items = [*items, *[None] * (len(value) - len(items))]
        return [_copy(*pair) for pair in zip(value, items, strict=False)]
    if not isinstance(value, Tensor):
        return value
    if not _fits(value, buffer):
        buffer = _host_like(value)
    _local(buffer).copy_(_local(value), non_blocking=True)
    return buffer


def _fits(tensor: Tensor, buffer: Any) -> bool:
    """Return whether a buffer has the type, dtype, placements and shapes of a tensor."""
    if type(tensor) is not type(buffer) or tensor.dtype != buffer.dtype:
        return False
    if isinstance(tensor, DTensor) and tensor.placements != cast(DTensor, buffer).placements:
        return False
    return tensor.shape == buffer.shape and _local(tensor).shape == _local(buffer).shape


def _host_like(tensor: Tensor) -> Tensor:
    """Allocate host memory like a tensor, pinned if the tensor is on a GPU."""
    local = _local(tensor)
    memory = torch.empty_like(local, device="cpu", pin_memory=local.is_cuda)
    if not isinstance(tensor, DTensor):
        return memory
    host = cast(DTensor, tensor.detach().cpu() if local.is_cuda else tensor.detach().clone())
    host._local_tensor = memory  # `from_local` would move it to the mesh's device
    return host


def _local(tensor: Tensor) -> Tensor:
    """Return the shard of this rank."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
