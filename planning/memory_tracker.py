"""Exact accounting of a process's tensor memory by category.

A dispatch mode sees every local operation and keeps weak references to the storages of its results;
the total after an operation is the sum over live storages at their current size. DTensors count
with their local shards. With `fake=True` only fake tensors count, otherwise only real ones: DTensor
uses fake tensors for shape propagation. Workspaces inside kernels and tensors created before the
tracker are not seen.
"""

from collections import Counter
from collections.abc import Container, Sequence
from math import inf
from typing import Any

import torch
from torch import Tensor
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

COLLECTIVE_NAMESPACES = ("c10d", "_c10d_functional")


class MemoryTracker(TorchDispatchMode):
    """Record the bytes held by category at the peak of each phase.

    The category of tensors that neither model nor optimizer owns is the phase that created them.

    Args:
        fake: Count fake tensors instead of real ones.
        collective_namespaces: Operator namespaces whose results form the category `collectives`.
        on_cpu: Add what an operator allocates and frees on CPU: the copies that gloo makes in a
            collective, and conversions of data types, which are part of the kernels on GPUs.

    Attributes:
        phase: Current phase, set by the caller.
        model, optimizer: Set by the caller after construction; ownership determines categories.
        paused: Set by the caller while operators do not count.
        shared: Set by the caller: storages that others hold too, to which autograd does not add.
        peaks: Bytes by category at the peak of each phase.
    """

    def __init__(
        self,
        fake: bool = False,
        collective_namespaces: Sequence[str] = COLLECTIVE_NAMESPACES,
        on_cpu: bool = False,
    ) -> None:
        super().__init__()
        self.on_cpu, self.paused, self._is_dtensor_sum = on_cpu, False, False
        self.fake, self.collective_namespaces = fake, collective_namespaces
        self.phase = "setup"
        self.model: torch.nn.Module | None = None
        self.optimizer: torch.optim.Optimizer | None = None
        self.shared: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self.peaks: dict[str, dict[str, int]] = {}
        self._categories: WeakIdKeyDictionary = WeakIdKeyDictionary()  # storage: category
        self._sizes: WeakIdKeyDictionary = WeakIdKeyDictionary()  # storage: bytes when last seen
        self._bound = inf  # of the total, which takes longer to compute

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, (DTensor, AsyncCollectiveTensor)) for kind in types):
            self._is_dtensor_sum = func is torch.ops.aten.add.Tensor
            return NotImplemented  # redispatched as local operations, which are handled here
        if self.fake and self._sums_gradients(func, args):
            return args[0].add_(args[1])
        if self.fake and func is torch.ops._c10d_functional.wait_tensor.default:
            return args[0]  # as the real operator does; the fake one returns a new tensor
        out = func(*args, **(kwargs or {}))
        if self.paused:
            return out
        collective = func.namespace in self.collective_namespaces
        tensors = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        if not tensors:
            self._bound = inf  # it may have written to arguments whose storage was just resized
        for tensor in tensors:
            if not is_traceable_wrapper_subclass(tensor):
                self._add(tensor.untyped_storage(), collective)
        buffer = self._buffer(func, args, kwargs or {}, out) if self.on_cpu else 0
        highest = sum(self.peaks.get(self.phase, {}).values())
        if self._bound + buffer > highest:
            self._bound = self.total()
            if self._bound + buffer > highest:
                self.peaks[self.phase] = self.held() | ({"buffer": buffer} if buffer else {})
        return out

    def _sums_gradients(self, func: Any, args: Any) -> bool:
        """Return whether autograd adds the gradients of a tensor with several uses.

        It does so in place, but not for subclasses such as fake tensors and DTensors
        (torch/csrc/autograd/input_buffer.cpp, can_accumulate_inplace).
        """
        if func is not torch.ops.aten.add.Tensor or self.paused:
            return False
        is_dtensor, self._is_dtensor_sum = self._is_dtensor_sum, False
        in_backward = torch._C._current_graph_task_id() != -1 and not torch.is_grad_enabled()
        if not in_backward or is_dtensor or not all(isinstance(each, Tensor) for each in args):
            return False
        return args[0].shape == args[1].shape and args[0].untyped_storage() not in self.shared

    def _buffer(self, func: Any, args: Any, kwargs: Any, out: Any) -> int:
        """Return the largest buffer of an operator on CPU, 0 for operators without one.

        An all-gather receives into a flat copy of its outputs; a reduce-scatter is an all-reduce of
        a copy of its input (torch/csrc/distributed/c10d/ProcessGroupGloo.cpp). A sum of two data
        types converts each tensor of the narrower one, the result as well (TensorIterator), and a
        concatenation its largest input.
        """
        name = str(func)
        if func is torch.ops.aten.add_.Tensor:
            return _conversion_bytes(*args[:2])
        if name == "fsdp.chunk_cat.default" and args[0][0].dtype != kwargs["out"].dtype:
            return max(each.nbytes for each in args[0])
        if func.namespace not in COLLECTIVE_NAMESPACES:
            return 0
        if "all_gather" in name or "allgather" in name:
            return _tensor_bytes(out if func.namespace == "_c10d_functional" else args[0])
        if "reduce_scatter" in name:
            functional = func.namespace == "_c10d_functional"
            return _tensor_bytes(args[0] if functional else args[1])
        return 0

    def rename(self, category: str, previous: Container[str] | None = None) -> None:
        """Move live unowned tensors, all or those of `previous` categories, to `category`."""
        for storage, present in self._categories.items():
            if previous is None or present in previous:
                self._categories[storage] = category

    def total(self) -> int:
        """Return the bytes held now."""
        # Sizes are read each time: FSDP2 frees and refills buffers by resizing their storages.
        return sum(storage.nbytes() for storage in self._categories)

    def held(self) -> dict[str, int]:
        """Return the bytes held now, by category."""
        owned = self._owned()
        held: Counter[str] = Counter()
        for storage, category in self._categories.items():
            held[owned.get(storage._cdata, category)] += storage.nbytes()
        return dict(held)

    def _add(self, storage: torch.UntypedStorage, collective: bool) -> None:
        if (storage.device.type == "meta") != self.fake:  # fake tensors have meta storages
            return
        if collective:
            self._categories[storage] = "collectives"
        elif storage not in self._categories:
            self._categories[storage] = self.phase
        before, self._sizes[storage] = self._sizes.get(storage, 0), storage.nbytes()
        self._bound += max(0, storage.nbytes() - before)

    @torch.no_grad()
    def _owned(self) -> dict[int, str]:
        """Return the category of each storage owned by model or optimizer."""
        if self.model is None or self.optimizer is None:
            return {}
        owned: list[tuple[Tensor | None, str]] = []
        # While FSDP2 has a module unsharded, its parameters are the gathered weights.
        for parameter in self.model.parameters():
            owned += [(parameter, "gathered_weights"), (parameter.grad, "gathered_gradients")]
        for parameter in [p for g in self.optimizer.param_groups for p in g["params"]]:
            owned += [(parameter, "parameters"), (parameter.grad, "gradients")]
            states = self.optimizer.state.get(parameter, {}).values()
            owned += [(state, "optimizer") for state in states]
        return {
            local_tensor(tensor).untyped_storage()._cdata: category
            for tensor, category in owned
            if tensor is not None
        }


def _conversion_bytes(total: Tensor, term: Any) -> int:
    """Return the size of the converted tensors in `total += term`."""
    if not isinstance(term, Tensor):
        return 0
    itemsize = max(total.itemsize, term.itemsize)
    converted = (total.itemsize < itemsize) * 2 + (term.itemsize < itemsize)
    return converted * total.numel() * itemsize


def _tensor_bytes(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


def local_tensor(tensor: Tensor) -> Tensor:
    """Return a tensor or its shard; `to_local` is a view that dispatches through every mode."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor
