"""float32 products of an AMD CPU by oneDNN, in the place of the MKL that PyTorch calls there.

Of a layer, oneDNN computes the output and the gradient of the input faster than MKL, which is made
for another maker's CPUs. The gradient of the weight, both of whose factors lie crosswise in memory,
stays with MKL, mostly faster there (measured: `python -m bench.cpu_products`). In bf16 PyTorch
calls oneDNN by itself. PyTorch's operation is wrapped as one of our own: its compiler takes the
other for a product with a constant.
"""

from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from model.llama import Llama
from parallel.config import ParallelConfig, PrecisionConfig


def apply_onednn_products(model: Llama) -> None:
    """Lets the Linear layers of the blocks multiply by oneDNN, in place.

    Their weights have to be whole in the forward: no DTensors.
    """
    for layer in model.layers.modules():
        if type(layer) is nn.Linear:  # and not one that multiplies in another way already
            layer.__class__ = _Linear


def multiplies_by_onednn(
    mesh: DeviceMesh, parallel: ParallelConfig, precision: PrecisionConfig
) -> bool:
    """Whether a plan's products are such: whole, in float32, on a CPU that AMD made."""
    # A compiler that chooses what to recompute knows PyTorch's own products, and no others.
    chosen = parallel.compile and parallel.activation_checkpoint not in ("none", "selective", 1.0)
    float32 = precision.fp8 is None and precision.param != "bf16"
    whole = mesh["tp"].size() == 1
    return mesh.device_type == "cpu" and float32 and whole and not chosen and _mkl_is_slower()


@cache
def _mkl_is_slower() -> bool:
    """Whether PyTorch has both libraries, on a CPU that AMD made."""
    try:
        processors = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    libraries = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    return libraries and "AuthenticAMD" in processors


class _Linear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight)


@torch.library.custom_op("llamesh::linear", mutates_args=())
def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x · weightᵀ, float32: (…, in), (out, in) -> (…, out)."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


@linear.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], len(weight))


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
    x, weight = ctx.saved_tensors
    d_weight = gradient.flatten(0, -2).t() @ x.flatten(0, -2)  # (out, in)
    return linear(gradient, weight.t()), d_weight  # (…, in)


linear.register_autograd(_gradients, setup_context=_keep)

OPERATION = torch.ops.llamesh.linear.default
"""As dispatch modes see `linear`."""
