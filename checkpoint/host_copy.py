"""A copy of sharded tensors in host memory, which is written while training changes the tensors."""

from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

State = dict[str, Any]


@torch.no_grad()
def copy_to_host(state: State, buffers: State | None) -> State:
    """Copies the tensors into host memory, that of the last time where they still fit.

    Copies on CPUs too, as training changes the tensors in place while the copy is being written.
    """
    found: State = _copied(state, buffers)
    if torch.cuda.is_available():
        torch.cuda.current_stream().synchronize()  # the copies do not wait for each other
    return found


def _copied(value: Any, buffer: Any) -> Any:
    """A tensor, or whatever holds tensors, in the memory of `buffer` where that fits."""
    if isinstance(value, dict):
        of = buffer if isinstance(buffer, dict) else {}
        return {key: _copied(each, of.get(key)) for key, each in value.items()}
    if isinstance(value, list | tuple):
        of_list = buffer if isinstance(buffer, list | tuple) else []
        rest = [None] * (len(value) - len(of_list))
        return [_copied(*pair) for pair in zip(value, [*of_list, *rest], strict=False)]
    if not isinstance(value, Tensor):
        return value
    if not _fits(value, buffer):
        buffer = _host_like(value)
    _local(buffer).copy_(_local(value), non_blocking=True)
    return buffer


def _fits(tensor: Tensor, buffer: Any) -> bool:
    """Whether a buffer can hold a tensor as it lies on this mesh."""
    if type(tensor) is not type(buffer) or tensor.dtype != buffer.dtype:
        return False
    if isinstance(tensor, DTensor) and tensor.placements != cast(DTensor, buffer).placements:
        return False
    return tensor.shape == buffer.shape and _local(tensor).shape == _local(buffer).shape


def _host_like(tensor: Tensor) -> Tensor:
    """Host memory for a copy, pinned where it comes from a GPU, placed like the tensor."""
    local = _local(tensor)
    memory = torch.empty_like(local, device="cpu", pin_memory=local.is_cuda)
    if not isinstance(tensor, DTensor):
        return memory
    host = cast(DTensor, tensor.detach().cpu() if local.is_cuda else tensor.detach().clone())
    host._local_tensor = memory  # `from_local` would move it to the mesh's device
    return host


def _local(tensor: Tensor) -> Tensor:
    """This rank's shard."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
