"""RMSNorm module; its computation is selected in `model.kernels`."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from model.kernels import rms_norm


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) · weight, computed in float32, returned in the dtype of x.

    Tensor parallelism, which makes the weight a DTensor, sets `function` to `F.rms_norm`.
    """

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))
        self.function: Callable[..., Tensor] = rms_norm

    def reset_parameters(self) -> None:
        """Set the weight to ones; frameworks call this after leaving the meta device."""
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, seq, dim) -> (batch, seq, dim)."""
        return self.function(x, self.weight.shape, self.weight, self.eps)
