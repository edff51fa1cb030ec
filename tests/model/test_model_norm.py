"""RMSNorm as one function on CPU is PyTorch's, and keeps less for the backward."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from model.norm import RMSNorm

BATCH, SEQ, DIM, EPS = 3, 50, 96, 1e-5


def inputs(dtype: torch.dtype, scale: float) -> tuple[RMSNorm, Tensor, Tensor]:
    """A norm, its input and a gradient of its result."""
    torch.manual_seed(2)
    norm = RMSNorm(DIM, EPS)
    torch.nn.init.uniform_(norm.weight, 0.5, 2.0)
    x = scale * (torch.randn(BATCH, SEQ, DIM) + 0.5)
    return norm.to(dtype), x.to(dtype).requires_grad_(), torch.randn(BATCH, SEQ, DIM).to(dtype)


def results(norm: RMSNorm, x: Tensor, gradient: Tensor) -> tuple[Tensor, ...]:
    """Output, and gradients of input and weight."""
    y = norm(x)
    return y, *torch.autograd.grad(y, (x, norm.weight), gradient)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 1e-3])  # where eps is nothing, and where it decides
def test_it_is_as_close_to_float64_as_pytorch_s(dtype: torch.dtype, scale: float) -> None:
    norm, x, gradient = inputs(dtype, scale)
    found = results(norm, x, gradient)
    norm.function = F.rms_norm
    theirs = results(norm, x, gradient)
    exact = results(norm.double(), x.detach().double().requires_grad_(), gradient.double())
    for own, other, true in zip(found, theirs, exact, strict=True):
        assert own.dtype == dtype and own.shape == true.shape
        off, theirs_off = ((each.double() - true).norm() / true.norm() for each in (own, other))
        assert off <= 2 * theirs_off + torch.finfo(torch.float32).eps  # a sum in another order


def test_it_keeps_its_input_its_weight_and_a_number_for_each_token() -> None:
    norm, x, _ = inputs(torch.float32, 1.0)
    kept: list[tuple[int, ...]] = []

    def keep(each: Tensor) -> Tensor:
        kept.append(tuple(each.shape))
        return each

    with saved_tensors_hooks(keep, lambda each: each):
        norm(x)
    assert sorted(kept) == sorted([(BATCH, SEQ, DIM), (DIM,), (BATCH, SEQ, 1)])


def test_compiled_it_is_the_same() -> None:
    norm, x, gradient = inputs(torch.float32, 1.0)
    found = results(torch.compile(norm, fullgraph=True), x, gradient)  # type: ignore[arg-type]
    for own, other in zip(found, results(norm, x, gradient), strict=True):
        torch.testing.assert_close(own, other)  # sums in another order
