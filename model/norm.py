"""RMSNorm (arXiv:1910.07467): float32 inside, its input's dtype outside.

PyTorch has one kernel for it on CUDA, and its compiler makes one. Left on a CPU are many passes
over the hidden states, two of which are kept for the backward: as one function it takes fewer and
keeps none but its input. Tensors that know where they lie (DTensors) take PyTorch's way.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) · weight.

    A parallel plan that makes the weight a DTensor sets `function` to `F.rms_norm`.
    """

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))
        self.function: Callable[..., Tensor] = rms_norm

    def reset_parameters(self) -> None:
        """All ones; frameworks that materialise the meta device ask each module for this."""
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, seq, dim) -> the same."""
        return self.function(x, self.weight.shape, self.weight, self.eps)


def rms_norm(x: Tensor, shape: torch.Size, weight: Tensor, eps: float) -> Tensor:
    """`F.rms_norm` over the last dim: (…, dim), (dim) -> (…, dim)."""
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return F.rms_norm(x, shape, weight, eps)
    return _RMSNorm.apply(x, weight, eps)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float()
        lengths = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)  # (…, 1)
        inverse = lengths.square_().div_(x.shape[-1]).add_(eps).rsqrt_()  # of the root mean square
        ctx.save_for_backward(x, weight, inverse)
        return (wide * inverse).mul_(weight).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, inverse = ctx.saved_tensors
        wide, g, w = x.float(), gradient.float(), weight.float()
        products = g * wide  # (…, dim)
        d_weight = products.flatten(0, -2).t() @ inverse.flatten()  # (dim,)
        # d inverse / dx = -inverse³ · x / dim
        shared = (products @ w).unsqueeze(-1) * inverse.square() / -x.shape[-1]  # (…, 1)
        del products
        d_x = (g * w).addcmul_(wide, shared).mul_(inverse)  # (…, dim)
        return d_x.to(x.dtype), d_weight.to(weight.dtype), None
