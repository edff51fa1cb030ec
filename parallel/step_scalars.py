"""Scalars that all ranks share in one optimizer step, and their layout in a tensor.

`parallel.gradients.clip_grad_norm` sums them in the all-reduce of the gradient norm. Signal
handling and the loss monitor read the sums by field; the traffic model and tracing count them.
Imports torch only inside functions, because signal handling and the traffic model must start
without it.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass, fields
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class StepRequests:
    """Requests of one rank (0 or 1 each); after the all-reduce, how many ranks made each.

    Attributes:
        interrupted: Stop after SIGINT.
        terminated: Stop after SIGTERM.
        stopped: Stop before the time limit, or after SIGUSR1.
        save_failed: Stop because a checkpoint could not be written.
        save: Save a checkpoint.
    """

    interrupted: int = 0
    terminated: int = 0
    stopped: int = 0
    save_failed: int = 0
    save: int = 0

    def to_tensor(self, device: torch.device | str = "cpu") -> Tensor:
        """Return the requests as float32 (n_requests), without blocking on the device."""
        import torch

        return torch.tensor(astuple(self), dtype=torch.float32).to(device, non_blocking=True)


NO_REQUESTS = StepRequests()

N_EXTRA_SCALARS = 1 + len(fields(StepRequests))
"""Scalars summed together with the squared gradient norm: the loss and the requests."""


@dataclass(frozen=True)
class StepScalars:
    """Host-side scalars of one step, identical on all ranks.

    Attributes:
        loss: Loss of the global batch, in nats per target.
        grad_norm: 2-norm of all gradients before clipping.
        requests: How many ranks made each request.
    """

    loss: float
    grad_norm: float
    requests: StepRequests

    @classmethod
    def from_tensor(cls, values: Tensor) -> StepScalars:
        """Wait for the device and return the scalars.

        Args:
            values: (2 + n_requests): loss, gradient norm and requests.
        """
        loss, grad_norm, *requests = values.tolist()
        return cls(loss, grad_norm, StepRequests(*[round(count) for count in requests]))
