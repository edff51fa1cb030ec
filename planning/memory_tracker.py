"""Counts a process's tensor memory exactly, by what it is for, as CUDA's allocator would in sum.

A dispatch mode sees every local operation and keeps weak references to the storages of their
results: what is alive after an operation, at the size that it has then, is what is held. DTensors
count with their local shards; fake tensors count where all tensors are fake, else they are those on
which DTensor tries out shapes. What a kernel needs inside itself, and what was made before the
tracker came, stays unseen.
"""

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

# What nobody owns is named by the phase that made it, but for the results of collectives.
MADE_IN = {
    "setup": "setup",
    "forward": "activations",
    "backward": "backward_temporaries",  # and gradients that have not reached their parameter
    "update": "update_temporaries",
}
COLLECTIVES = ("c10d", "_c10d_functional")  # libraries of operations


class MemoryTracker(TorchDispatchMode):
    """Bytes held, by category, at the peak of each phase.

    Args:
        made_in: What a tensor that nobody owns is called, by the phase that made it; a phase that
            is not in it names its tensors itself.
        fake: Whether the tensors to count are fake ones.
        collectives: Libraries of operations whose results are named collectives.

    Attributes:
        phase: Set by whoever runs the step.
        model, optimizer: Set once they are there; who owns a tensor then decides what it is.
        peaks: By phase, what was held when it was most, in bytes by category.
    """

    def __init__(
        self,
        made_in: Mapping[str, str] = MADE_IN,
        fake: bool = False,
        collectives: tuple[str, ...] = COLLECTIVES,
    ) -> None:
        super().__init__()
        self.made_in, self.fake, self.collectives = made_in, fake, collectives
        self.phase = "setup"
        self.model: torch.nn.Module | None = None
        self.optimizer: torch.optim.Optimizer | None = None
        self.peaks: dict[str, dict[str, int]] = {}
        self._made: WeakIdKeyDictionary = WeakIdKeyDictionary()  # storage: category

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, (DTensor, AsyncCollectiveTensor)) for kind in types):
            return NotImplemented  # they turn it into local operations, which come here
        out = func(*args, **(kwargs or {}))
        collective = func.namespace in self.collectives
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and not is_traceable_wrapper_subclass(tensor):
                self._note(tensor.untyped_storage(), collective)
        peak = self.peaks.get(self.phase)
        if peak is None or self.total() > sum(peak.values()):
            self.peaks[self.phase] = self.held()
        return out

    def rename(self, category: str) -> None:
        """From now on what nobody owns of all that is alive is of this category."""
        for storage in self._made:
            self._made[storage] = category

    def total(self) -> int:
        """Bytes held now."""
        # Each time anew: FSDP2 frees and fills its buffers by giving their storages another size.
        return sum(storage.nbytes() for storage in self._made)

    def held(self) -> dict[str, int]:
        """Bytes held now, by category."""
        owned = self._owned()
        held: Counter[str] = Counter()
        for storage, category in self._made.items():
            held[owned.get(storage._cdata, category)] += storage.nbytes()
        return dict(held)

    def _note(self, storage: torch.UntypedStorage, collective: bool) -> None:
        """Counts a storage from now on."""
        if (storage.device.type == "meta") != self.fake:  # a fake tensor's is on meta
            return
        if collective:
            self._made[storage] = "collectives"
        elif storage not in self._made:
            self._made[storage] = self.made_in.get(self.phase, self.phase)

    @torch.no_grad()
    def _owned(self) -> dict[int, str]:
        """The storages that model and optimizer own, and what each of them is."""
        owned: dict[int, str] = {}
        if self.model is None or self.optimizer is None:
            return owned
        # While FSDP2 has gathered a module's weights, they are its parameters.
        for parameter in self.model.parameters():
            _own(owned, parameter, "gathered_weights")
            _own(owned, parameter.grad, "gathered_gradients")
        for parameter in [p for g in self.optimizer.param_groups for p in g["params"]]:
            _own(owned, parameter, "parameters")
            _own(owned, parameter.grad, "gradients")
            for state in self.optimizer.state.get(parameter, {}).values():
                _own(owned, state, "optimizer")
        return owned


def _own(owned: dict[int, str], tensor: Tensor | None, category: str) -> None:
    """Enters the storage of a tensor, or of its local shard."""
    if tensor is not None:
        # Not `to_local`, a view that goes through every mode.
        local = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
        owned[local.untyped_storage()._cdata] = category
