"""float32 Linear layers by oneDNN on AMD CPUs, where PyTorch calls MKL.

oneDNN computes a layer's output and input gradient faster than MKL, which is optimized for Intel
CPUs. The weight gradient multiplies two transposed matrices and stays with MKL, which is mostly
faster there (measured by `python -m bench.cpu_products`). In bf16 PyTorch already calls oneDNN.
The operation is wrapped in a custom op because the compiler takes PyTorch's for a product with a
constant weight.
"""

from typing import Any

import torch
from torch import Tensor, nn


def apply_onednn_linear(module: nn.Module) -> None:
    """Make all `nn.Linear` layers inside `module` use oneDNN, in place.

    In the forward their weights must be complete plain tensors, not DTensors.
    """
    for layer in module.modules():
        if type(layer) is nn.Linear:  # subclasses have their own product
            layer.__class__ = OneDNNLinear


class OneDNNLinear(nn.Linear):
    """`nn.Linear` without bias whose product is `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        """(…, in) -> (…, out)."""
        return linear(x, self.weight)


@torch.library.custom_op("llamesh::linear", mutates_args=())
def linear(x: Tensor, weight: Tensor) -> Tensor:
    """Return x · weightᵀ in float32: (…, in), (out, in) -> (…, out)."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


@linear.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], len(weight))


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
    x, weight = ctx.saved_tensors
    d_weight = gradient.flatten(0, -2).t() @ x.flatten(0, -2)  # (out, in)
    return linear(gradient, weight.t()), d_weight  # (…, in), (out, in)


linear.register_autograd(_backward, setup_context=_setup_context)

LINEAR_OP = torch.ops.llamesh.linear.default
"""The operator that dispatch modes receive for `linear`."""
