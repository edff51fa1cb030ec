"""Copy sharded tensors to host memory, to be written while training changes the originals."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from resilience.errors import is_out_of_memory

State = dict[str, Any]


@dataclass(frozen=True)
class DeferredTensor:
    """A tensor of a state that is computed when it is copied, and then freed.

    Attributes:
        like: Tensor with the same shape, dtype, device and placements.
        read: Returns this rank's shard.
    """

    like: Tensor
    read: Callable[[], Tensor]


@runtime_checkable
class DefersMoments(Protocol):
    """An optimizer whose state dict may have moments that are computed when they are copied."""

    def deferred_moments(self) -> AbstractContextManager[None]:
        """Let `state_dict` return such moments as `DeferredTensor`."""
        ...


def local_bytes(state: State) -> int:
    """Return the bytes of all tensors on this rank."""
    tensors = [_local(value) for value in tree_flatten(state)[0] if isinstance(value, Tensor)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def is_on_device(state: State) -> bool:
    """Return whether a tensor is on a GPU."""
    return any(isinstance(each, Tensor) and _local(each).is_cuda for each in tree_flatten(state)[0])


@torch.no_grad()
def copy_to_host(state: State, buffers: State | None) -> State:
    """Copy all tensors to host memory, into the previous copy if it has the same structure.

    Copies CPU tensors too, because training modifies them while the copy is written. On a GPU the
    copies are queued without waiting for each; the host buffers are complete on return.

    Args:
        buffers: A previous copy that is no longer read.
    """
    values, structure = tree_flatten(state)
    hosts, host_structure = tree_flatten(buffers)
    if host_structure != structure:
        hosts = [_host_like(value) for value in values]
    for index, value in enumerate(values):
        if isinstance(value, DeferredTensor):
            # Its memory is reused by later kernels of the same stream only, after the copy.
            _local(hosts[index]).copy_(value.read(), non_blocking=True)
        elif isinstance(value, Tensor):
            _local(hosts[index]).copy_(_local(value), non_blocking=True)
        else:
            hosts[index] = value
    if is_on_device(state):
        torch.cuda.current_stream().synchronize()
    copied: State = tree_unflatten(hosts, structure)
    return copied


def _host_like(value: Any) -> Tensor | None:
    """Allocate host memory like a tensor, pinned if the tensor is on a GPU."""
    tensor = value.like if isinstance(value, DeferredTensor) else value
    if not isinstance(tensor, Tensor):
        return None
    local = _local(tensor)
    try:
        memory = torch.empty_like(local, device="cpu", pin_memory=local.is_cuda)
    except RuntimeError as error:  # of pinned memory "CUDA error: out of memory", as of a GPU
        if is_out_of_memory(error):
            text = f"cannot pin memory: tried to allocate {local.nbytes} bytes ({error})"
            raise MemoryError(text) from error
        raise
    if not isinstance(tensor, DTensor):
        return memory
    host = cast(DTensor, tensor.detach().cpu() if local.is_cuda else tensor.detach().clone())
    host._local_tensor = memory  # `from_local` would move it to the mesh's device
    return host


def _local(tensor: Tensor) -> Tensor:
    """Return the shard of this rank."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
