"""Mixed precision for a process that shares its weights with no other, without FSDP2.

The parameters stay the float32 masters that optimizer and checkpoints know. From a forward on, the
modules hold copies of them in the format of forward and backward; each copy hands its gradient to
its master as soon as it is there, and then gives back its place and its memory.
"""

from collections import defaultdict

import torch
from torch import Tensor, nn

_COPIES = "llamesh_copies"  # a model's attribute


def apply_mixed_precision(model: nn.Module, dtype: torch.dtype) -> None:
    """Lets a model compute in `dtype`, in place; its parameters stay as they are."""
    if dtype != torch.float32:
        vars(model)[_COPIES] = _Copies(model, dtype)


def keep_copies(model: nn.Module, keep: bool) -> None:
    """Whether copies stay behind a backward, for the next micro-batch's forward."""
    copies = vars(model).get(_COPIES)
    if copies is not None:
        copies.keep = keep


class _Copies:
    """The copies of a model's parameters, made when it is called for the first time."""

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        self.dtype, self.keep = dtype, False
        self._copies: list[_Copy] = []
        model.register_forward_pre_hook(lambda model, _: self._enter(model))
        model.register_forward_hook(lambda *_: self._leave(), always_call=True)

    def _enter(self, model: nn.Module) -> None:
        """Puts up-to-date copies in the places of all parameters."""
        if not self._copies:
            self._copies = [
                _Copy(self, parameter, places) for parameter, places in _places(model).items()
            ]
        stale = [copy for copy in self._copies if copy.is_stale()]
        if stale:
            with torch.no_grad():
                torch._foreach_copy_(
                    [copy.refreshed() for copy in stale], [copy.master for copy in stale]
                )
        for copy in self._copies:
            copy.put(copy.weight)

    def _leave(self) -> None:
        """Behind a forward that no backward follows; behind others each gradient sees to it."""
        if not torch.is_grad_enabled():
            for copy in self._copies:
                copy.put(copy.master)


class _Copy:
    """A parameter's copy, with memory only while it is needed."""

    def __init__(
        self, copies: _Copies, master: nn.Parameter, places: list[tuple[nn.Module, str]]
    ) -> None:
        self.copies, self.master, self.places = copies, master, places
        self.version: int | None = None  # of the master, when it was copied
        values = torch.empty_like(master, dtype=copies.dtype, requires_grad=False)
        self.size = values.untyped_storage().nbytes()
        self.weight = nn.Parameter(values, requires_grad=master.requires_grad)
        self.weight.register_post_accumulate_grad_hook(self._hand_over)

    def is_stale(self) -> bool:
        """Whether the master has been written to since, or the memory was given back."""
        return self.version != self.master._version

    def refreshed(self) -> Tensor:
        """The copy, to be written to."""
        self.version = self.master._version
        self.weight.untyped_storage().resize_(self.size)
        return self.weight

    def put(self, parameter: nn.Parameter) -> None:
        """Makes it the parameter of all modules that have this one."""
        for module, name in self.places:
            module._parameters[name] = parameter

    def _hand_over(self, weight: Tensor) -> None:
        """Adds the gradient to the master's; nothing of this backward reads the weight any more."""
        gradient, weight.grad = weight.grad, None
        assert gradient is not None
        if self.master.grad is None:
            self.master.grad = gradient.to(self.master.dtype)
        else:
            self.master.grad += gradient
        self.put(self.master)
        if not self.copies.keep:
            weight.untyped_storage().resize_(0)
            self.version = None


def _places(model: nn.Module) -> dict[nn.Parameter, list[tuple[nn.Module, str]]]:
    """Each parameter with the modules that have it, and its name there."""
    places: dict[nn.Parameter, list[tuple[nn.Module, str]]] = defaultdict(list)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            places[parameter].append((module, name))
    return places
