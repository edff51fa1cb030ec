"""Mixed precision for a single process, without FSDP2.

Parameters remain the float32 master weights that the optimizer and checkpoints use. From the
forward on, modules hold copies in the compute dtype; each copy adds its gradient to its master as
soon as it is computed, then the master is restored and the copy's memory freed.
"""

from collections import defaultdict

import torch
from torch import Tensor, nn

_COPIES = "llamesh_copies"  # attribute of the model

Uses = list[tuple[nn.Module, str]]
"""The modules that use a parameter, and its name in each."""


def apply_mixed_precision(model: nn.Module, dtype: torch.dtype) -> None:
    """Make a model compute in `dtype`, in place; its parameters do not change."""
    if dtype != torch.float32:
        vars(model)[_COPIES] = _Copies(model, dtype)


def keep_copies(model: nn.Module, keep: bool) -> None:
    """Set whether copies are kept after a backward, for the next micro-batch."""
    copies = vars(model).get(_COPIES)
    if copies is not None:
        copies.keep = keep


class _Copies:
    """Copies of a model's parameters, created in its first forward."""

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        self.dtype, self.keep = dtype, False
        self._copies: list[_Copy] = []
        model.register_forward_pre_hook(lambda model, _: self._enter(model))
        model.register_forward_hook(lambda *_: self._leave(), always_call=True)

    def _enter(self, model: nn.Module) -> None:
        """Replace all parameters by up-to-date copies."""
        if not self._copies:
            self._copies = [_Copy(self, *item) for item in _parameter_uses(model).items()]
        # The master has changed since the copy, or the copy's memory was freed.
        stale = [copy for copy in self._copies if copy.version != copy.master._version]
        if stale:
            weights = [copy.prepare() for copy in stale]
            with torch.no_grad():
                torch._foreach_copy_(weights, [copy.master for copy in stale])
        for copy in self._copies:
            copy.assign(copy.weight)

    def _leave(self) -> None:
        """Restore the masters after a forward without backward; else each gradient does it."""
        if not torch.is_grad_enabled():
            for copy in self._copies:
                copy.assign(copy.master)


class _Copy:
    """Copy of a parameter, allocated only while it is needed."""

    def __init__(self, copies: _Copies, master: nn.Parameter, uses: Uses) -> None:
        self.copies, self.master, self.uses = copies, master, uses
        self.version: int | None = None  # version of the master that was copied
        values = torch.empty_like(master, dtype=copies.dtype, requires_grad=False)
        self.size = values.untyped_storage().nbytes()
        self.weight = nn.Parameter(values, requires_grad=master.requires_grad)
        self.weight.register_post_accumulate_grad_hook(self._accumulate)

    def prepare(self) -> Tensor:
        """Allocate the copy and return it for writing."""
        self.version = self.master._version
        self.weight.untyped_storage().resize_(self.size)
        return self.weight

    def assign(self, parameter: nn.Parameter) -> None:
        """Set the parameter in all modules that use this one."""
        for module, name in self.uses:
            module._parameters[name] = parameter

    def _accumulate(self, weight: Tensor) -> None:
        """Add the gradient to the master's; this backward no longer reads the weight."""
        gradient, weight.grad = weight.grad, None
        assert gradient is not None
        if self.master.grad is None:
            self.master.grad = gradient.to(self.master.dtype)
        else:
            self.master.grad += gradient
        self.assign(self.master)
        if not self.copies.keep:
            weight.untyped_storage().resize_(0)
            self.version = None


def _parameter_uses(model: nn.Module) -> dict[nn.Parameter, Uses]:
    """Return each parameter with its uses."""
    uses: dict[nn.Parameter, Uses] = defaultdict(list)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            uses[parameter].append((module, name))
    return uses
