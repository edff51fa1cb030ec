"""Copy sharded tensors to host memory, to be written while training changes the originals."""

from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_flatten, tree_unflatten

State = dict[str, Any]


def local_bytes(state: State) -> int:
    """Return the bytes of all tensors on this rank."""
    tensors = [_local(value) for value in tree_flatten(state)[0] if isinstance(value, Tensor)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@torch.no_grad()
def copy_to_host(state: State, buffers: State | None) -> State:
    """Copy all tensors to host memory, into the previous copy if it has the same structure.

    Copies CPU tensors too, because training modifies them while the copy is written.
    """
    values, structure = tree_flatten(state)
    hosts, host_structure = tree_flatten(buffers)
    if host_structure != structure:
        hosts = [_host_like(value) if isinstance(value, Tensor) else None for value in values]
    for index, value in enumerate(values):
        if isinstance(value, Tensor):
            _local(hosts[index]).copy_(_local(value), non_blocking=True)
        else:
            hosts[index] = value
    if torch.cuda.is_available():
        torch.cuda.current_stream().synchronize()  # copies are queued without waiting
    copied: State = tree_unflatten(hosts, structure)
    return copied


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
