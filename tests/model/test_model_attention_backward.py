"""The backward of attention by products is that of the kernel whose forward it follows, in bf16.

Judged by float64, in which both are off by some thousandths: each rounds to bf16, at other places.
"""

from typing import Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from model.attention import AttentionKernel
from model.config import ModelConfig
from model.init import initialize
from model.kernels import attention_backward
from model.kernels.attention_backward import ROWS, attention
from model.llama import Llama
from parallel.activation_checkpoint import apply_activation_checkpoint

BATCH, HEADS, HEAD_DIM, SEQ = 2, 4, 32, 2 * ROWS + 44  # the last block is a shorter one
OPERATION = torch.ops.llamesh.attention_backward.default

pytestmark = pytest.mark.skipif(
    not attention_backward.multiplies_in_bf16(), reason="this CPU has no products in bf16"
)


def inputs(
    kv_heads: int, keys: int, common: float = 0.0, sharp: float = 1.0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries, keys, values, and a gradient of the result.

    Args:
        common: What each value, and each element of the gradient, has in common with all others.
        sharp: The larger, the surer a query is of its key.
    """
    torch.manual_seed(7)
    q, k, v, gradient = (
        (scale * torch.randn(BATCH, length, heads, HEAD_DIM) + offset)
        .bfloat16()
        .transpose(1, 2)
        .requires_grad_()
        for heads, length, scale, offset in (
            (HEADS, SEQ, sharp, 0),
            (kv_heads, keys, sharp, 0),
            (kv_heads, keys, 1, common),
            (HEADS, SEQ, 1, common),
        )
    )
    return q, k, v, gradient


def masks(kind: str) -> Tensor | None:
    """Added to the scores: documents of other lengths in each row; a part of longer rows."""
    if kind == "causal":
        return None
    if kind == "documents":
        document = torch.arange(SEQ) // torch.tensor([[70], [131]])  # (batch, seq)
        seen = (document.unsqueeze(2) == document.unsqueeze(1)).tril().unsqueeze(1)
    else:  # a context-parallel rank's: the first and the last quarter of a row
        places = torch.cat([torch.arange(SEQ // 2), torch.arange(3 * SEQ // 2, 2 * SEQ)])
        seen = (torch.arange(2 * SEQ) <= places.unsqueeze(1))[None, None]
    return torch.zeros((), dtype=torch.bfloat16).where(seen, -torch.inf)


def error(found: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> float:
    """What gradients are off by over their size, the root of the mean square of the three."""
    pairs = list(zip(found, exact, strict=True))
    shares = [(own.double() - true).norm() / true.norm() for own, true in pairs]
    return torch.stack(shares).square().mean().sqrt().item()


@pytest.mark.parametrize("kind", ["causal", "documents", "part of the keys"])
@pytest.mark.parametrize("kv_heads", [2, 4])
@pytest.mark.parametrize("scores", [1, attention_backward.SCORES])  # a head at a time, or all
@pytest.mark.parametrize(("common", "sharp"), [(0.0, 1.0), (4.0, 1.0), (0.0, 3.0)])
def test_gradients_are_as_close_as_the_kernel_s_own(
    kind: str,
    kv_heads: int,
    scores: int,
    common: float,
    sharp: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mask = masks(kind)
    keys = SEQ if mask is None else mask.shape[-1]
    q, k, v, gradient = inputs(kv_heads, keys, common, sharp)
    leaves = (q, k, v)
    monkeypatch.setattr(attention_backward, "SCORES", scores)

    out = attention(q, k, v, mask)
    found = torch.autograd.grad(out, leaves, gradient)
    kernel = sdpa(q, k, v, mask)
    assert torch.equal(out, kernel)
    theirs = torch.autograd.grad(kernel, leaves, gradient)
    q, k, v = wide = [each.detach().double().requires_grad_() for each in leaves]
    exact = torch.autograd.grad(
        sdpa(q, k, v, None if mask is None else mask.double()), wide, gradient.double()
    )
    assert error(found, exact) <= 2 * error(theirs, exact)  # measured: 1.2 to 1.8


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """PyTorch's."""
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True
    )


@pytest.mark.parametrize("kind", ["causal", "documents"])
def test_what_the_compiler_is_told_of_it_is_what_it_does(kind: str) -> None:
    mask = masks(kind)
    q, k, v, gradient = (each.detach() for each in inputs(2, SEQ))
    out, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, is_causal=mask is None, attn_mask=mask
    )
    torch.library.opcheck(OPERATION, (gradient, q, k, v, out, sums, mask))


@pytest.mark.parametrize("packed", [False, True])
def test_compiled_it_gives_the_same(packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_backward, "SHORTEST", 1)
    kernel = AttentionKernel("auto")
    mask = masks("documents" if packed else "causal")
    q, k, v, gradient = (each.transpose(1, 2) for each in inputs(2, SEQ))
    compiled = torch.compile(kernel, fullgraph=True)(q, k, v, mask)
    for own, other in zip(
        torch.autograd.grad(compiled, (q, k, v), gradient),
        torch.autograd.grad(kernel(q, k, v, mask), (q, k, v), gradient),
        strict=True,
    ):
        assert torch.equal(own, other)


class Counted(TorchDispatchMode):
    """How often the operation runs."""

    count = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.count += operation == OPERATION
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("choice", "dtype", "seq", "units", "expected"),
    [
        ("auto", torch.bfloat16, 512, True, 1),
        ("auto", torch.bfloat16, 511, True, 0),
        ("auto", torch.float32, 512, True, 0),
        ("auto", torch.bfloat16, 512, False, 0),
        ("sdpa", torch.bfloat16, 512, True, 0),
    ],
)
def test_auto_takes_it_for_long_rows_in_bf16_where_the_cpu_multiplies_in_it(
    choice: str,
    dtype: torch.dtype,
    seq: int,
    units: bool,
    expected: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("model.attention.multiplies_in_bf16", lambda: units)
    q, k, v = (torch.randn(1, seq, 2, 16, dtype=dtype, requires_grad=True) for _ in range(3))
    with Counted() as counted:
        AttentionKernel(choice)(q, k, v, None).sum().backward()
    assert counted.count == expected


@pytest.mark.parametrize("kept", ["full", "selective"])
def test_recomputing_blocks_get_the_same_gradients(
    kept: Literal["full", "selective"], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_backward, "SHORTEST", 1)
    config = ModelConfig("small", 64, 2, 4, 2, 128, 256)

    def gradients(recomputes: bool) -> list[Tensor]:
        model = Llama(config)
        initialize(model, config, seed=3)
        if recomputes:
            apply_activation_checkpoint(model, kept)
        tokens = torch.arange(2 * SEQ).view(2, SEQ) % 256
        with Counted() as counted:
            model.bfloat16()(tokens, labels=tokens).backward()
        assert counted.count == config.n_layers
        return [each.grad for each in model.parameters() if each.grad is not None]

    for own, other in zip(gradients(True), gradients(False), strict=True):
        assert torch.equal(own, other)
