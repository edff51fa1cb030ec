"""RMSNorm (arXiv:1910.07467) as one autograd function, for eager mode on CPU.

PyTorch has a fused kernel on CUDA only, and its compiler generates one. Uncompiled on a CPU,
`F.rms_norm` makes many passes over the hidden states and saves two of them for the backward. This
function makes fewer passes and saves only its input.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def fused_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Compute x / sqrt(mean(x²) + eps) · weight in float32: (…, dim), (dim) -> (…, dim)."""
    return _RMSNorm.apply(x, weight, eps)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x_fp32 = x.float()
        norms = torch.linalg.vector_norm(x_fp32, dim=-1, keepdim=True)  # (…, 1)
        inverse_rms = norms.square_().div_(x.shape[-1]).add_(eps).rsqrt_()  # (…, 1)
        ctx.save_for_backward(x, weight, inverse_rms)
        return (x_fp32 * inverse_rms).mul_(weight).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, inverse_rms = ctx.saved_tensors
        x_fp32, g, w = x.float(), gradient.float(), weight.float()
        products = g * x_fp32  # (…, dim)
        d_weight = products.flatten(0, -2).t() @ inverse_rms.flatten()  # (dim,)
        # d inverse_rms / dx = -inverse_rms³ · x / dim
        factor = (products @ w).unsqueeze(-1) * inverse_rms.square() / -x.shape[-1]  # (…, 1)
        del products
        d_x = (g * w).addcmul_(x_fp32, factor).mul_(inverse_rms)  # (…, dim)
        return d_x.to(x.dtype), d_weight.to(weight.dtype), None
