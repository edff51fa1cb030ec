"""The bf16 attention backward by matrix products is as accurate as PyTorch's flash kernel on CPU.

The reference is float64. Relative to it both have an error of some thousandths, since they round
to bf16 at different points.
"""

from typing import Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from model import kernels
from model.attention import AttentionKernel
from model.config import ModelConfig
from model.init import initialize
from model.kernels import attention_backward
from model.kernels.attention_backward import ROWS, attention
from model.llama import Llama
from parallel.activation_checkpoint import apply_activation_checkpoint

BATCH, HEADS, HEAD_DIM, SEQ = 2, 4, 32, 2 * ROWS + 44  # the last block of queries is shorter
OPERATION = torch.ops.llamesh.attention_backward.default

pytestmark = pytest.mark.skipif(
    not kernels.has_bf16_units(), reason="needs a CPU with bf16 matrix products"
)


def inputs(
    kv_heads: int, keys: int, common: float = 0.0, sharp: float = 1.0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return queries, keys, values and a gradient of the output.

    Args:
        common: Offset added to all values and all elements of the gradient.
        sharp: Scale of queries and keys; larger values concentrate the attention weights.
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
    """Return a mask to add to the scores, or None for causal attention over one document."""
    if kind == "causal":
        return None
    if kind == "documents":
        document = torch.arange(SEQ) // torch.tensor([[70], [131]])  # (batch, seq)
        visible = (document.unsqueeze(2) == document.unsqueeze(1)).tril().unsqueeze(1)
    else:  # a context-parallel rank holds the first and the last quarter of a row
        queries = torch.cat([torch.arange(SEQ // 2), torch.arange(3 * SEQ // 2, 2 * SEQ)])
        visible = (torch.arange(2 * SEQ) <= queries.unsqueeze(1))[None, None]
    return torch.zeros((), dtype=torch.bfloat16).where(visible, -torch.inf)


def relative_error(grads: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> float:
    """Return the root mean square of the relative errors of the three gradients."""
    pairs = list(zip(grads, exact, strict=True))
    errors = [(grad.double() - true).norm() / true.norm() for grad, true in pairs]
    return torch.stack(errors).square().mean().sqrt().item()


@pytest.mark.parametrize("kind", ["causal", "documents", "context_parallel"])
@pytest.mark.parametrize("kv_heads", [2, 4])
@pytest.mark.parametrize("scores", [1, attention_backward.SCORE_BYTES])  # a head at a time, or all
@pytest.mark.parametrize(("common", "sharp"), [(0.0, 1.0), (4.0, 1.0), (0.0, 3.0)])
def test_gradients_are_as_accurate_as_those_of_the_flash_kernel(
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
    monkeypatch.setattr(attention_backward, "SCORE_BYTES", scores)

    out = attention(q, k, v, mask)
    grads = torch.autograd.grad(out, leaves, gradient)
    flash_out = sdpa(q, k, v, mask)
    assert torch.equal(out, flash_out)
    flash_grads = torch.autograd.grad(flash_out, leaves, gradient)
    q, k, v = wide = [each.detach().double().requires_grad_() for each in leaves]
    exact = torch.autograd.grad(
        sdpa(q, k, v, None if mask is None else mask.double()), wide, gradient.double()
    )
    # Measured ratio: 1.2 to 1.8.
    assert relative_error(grads, exact) <= 2 * relative_error(flash_grads, exact)


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True
    )


@pytest.mark.parametrize("kind", ["causal", "documents"])
def test_custom_op_passes_opcheck(kind: str) -> None:
    mask = masks(kind)
    q, k, v, gradient = (each.detach() for each in inputs(2, SEQ))
    out, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, is_causal=mask is None, attn_mask=mask
    )
    torch.library.opcheck(OPERATION, (gradient, q, k, v, out, sums, mask))


@pytest.mark.parametrize("packed", [False, True])
def test_compiled_gradients_equal_eager_ones(packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "MIN_ATTENTION_QUERIES", 1)
    kernel = AttentionKernel("auto")
    mask = masks("documents" if packed else "causal")
    q, k, v, gradient = (each.transpose(1, 2) for each in inputs(2, SEQ))
    compiled = torch.compile(kernel, fullgraph=True)(q, k, v, mask)
    for grad, eager_grad in zip(
        torch.autograd.grad(compiled, (q, k, v), gradient),
        torch.autograd.grad(kernel(q, k, v, mask), (q, k, v), gradient),
        strict=True,
    ):
        assert torch.equal(grad, eager_grad)


class CallCounter(TorchDispatchMode):
    """Count calls of the custom backward operation."""

    count = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.count += operation == OPERATION
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("choice", "dtype", "seq", "cpu_has_bf16", "expected"),
    [
        ("auto", torch.bfloat16, 512, True, 1),
        ("auto", torch.bfloat16, 511, True, 0),
        ("auto", torch.float32, 512, True, 0),
        ("auto", torch.bfloat16, 512, False, 0),
        ("sdpa", torch.bfloat16, 512, True, 0),
    ],
)
def test_auto_uses_custom_backward_for_long_bf16_rows_on_a_cpu_with_bf16_products(
    choice: str,
    dtype: torch.dtype,
    seq: int,
    cpu_has_bf16: bool,
    expected: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kernels, "has_bf16_units", lambda: cpu_has_bf16)
    q, k, v = (torch.randn(1, seq, 2, 16, dtype=dtype, requires_grad=True) for _ in range(3))
    with CallCounter() as counter:
        AttentionKernel(choice)(q, k, v, None).sum().backward()
    assert counter.count == expected


@pytest.mark.parametrize("mode", ["full", "selective"])
def test_activation_checkpointing_does_not_change_gradients(
    mode: Literal["full", "selective"], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "MIN_ATTENTION_QUERIES", 1)
    config = ModelConfig("small", 64, 2, 4, 2, 128, 256)

    def gradients(checkpointed: bool) -> list[Tensor]:
        model = Llama(config)
        initialize(model, config, seed=3)
        if checkpointed:
            apply_activation_checkpoint(model, mode)
        tokens = torch.arange(2 * SEQ).view(2, SEQ) % 256
        with CallCounter() as counter:
            model.bfloat16()(tokens, labels=tokens).backward()
        assert counter.count == config.n_layers
        return [each.grad for each in model.parameters() if each.grad is not None]

    for grad, expected in zip(gradients(True), gradients(False), strict=True):
        assert torch.equal(grad, expected)
