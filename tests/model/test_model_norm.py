"""The fused RMSNorm for CPUs matches PyTorch's and saves less for the backward."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from model.norm import RMSNorm

BATCH, SEQ, DIM, EPS = 3, 50, 96, 1e-5


def inputs(dtype: torch.dtype, scale: float) -> tuple[RMSNorm, Tensor, Tensor]:
    """Return a norm, its input and a gradient of its output."""
    torch.manual_seed(2)
    norm = RMSNorm(DIM, EPS)
    torch.nn.init.uniform_(norm.weight, 0.5, 2.0)
    x = scale * (torch.randn(BATCH, SEQ, DIM) + 0.5)
    return norm.to(dtype), x.to(dtype).requires_grad_(), torch.randn(BATCH, SEQ, DIM).to(dtype)


def results(norm: RMSNorm, x: Tensor, gradient: Tensor) -> tuple[Tensor, ...]:
    """Return the output and the gradients of input and weight."""
    y = norm(x)
    return y, *torch.autograd.grad(y, (x, norm.weight), gradient)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 1e-3])  # eps is negligible, and dominant
def test_fused_norm_is_as_accurate_as_pytorch(dtype: torch.dtype, scale: float) -> None:
    norm, x, gradient = inputs(dtype, scale)
    fused = results(norm, x, gradient)
    norm.function = F.rms_norm
    pytorch = results(norm, x, gradient)
    exact = results(norm.double(), x.detach().double().requires_grad_(), gradient.double())
    for ours, theirs, true in zip(fused, pytorch, exact, strict=True):
        assert ours.dtype == dtype and ours.shape == true.shape
        error, pytorch_error = ((y.double() - true).norm() / true.norm() for y in (ours, theirs))
        # eps: the sums run in a different order.
        assert error <= 2 * pytorch_error + torch.finfo(torch.float32).eps


def test_fused_norm_saves_input_weight_and_one_value_per_token() -> None:
    norm, x, _ = inputs(torch.float32, 1.0)
    shapes: list[tuple[int, ...]] = []

    def pack(tensor: Tensor) -> Tensor:
        shapes.append(tuple(tensor.shape))
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        norm(x)
    assert sorted(shapes) == sorted([(BATCH, SEQ, DIM), (DIM,), (BATCH, SEQ, 1)])


def test_compiled_norm_matches_eager() -> None:
    norm, x, gradient = inputs(torch.float32, 1.0)
    compiled = results(torch.compile(norm, fullgraph=True), x, gradient)  # type: ignore[arg-type]
    for actual, expected in zip(compiled, results(norm, x, gradient), strict=True):
        torch.testing.assert_close(actual, expected)  # sums in a different order
