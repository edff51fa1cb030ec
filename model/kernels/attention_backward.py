"""Backward of bf16 attention on CPU, as matrix products over blocks of queries.

The backward of PyTorch's flash kernel for CPUs multiplies tile by tile, far below the throughput
of its matrix products (measured by `python -m bench.cpu_attention`). The forward remains PyTorch's
kernel. The backward recomputes the probabilities from its output and log-sum-exp, as the kernel's
own backward does (FlashAttention-2, arXiv:2307.08691).
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

ROWS = 128  # queries per block
SCORE_BYTES = 2**21  # scores per thread at a time, so that they stay in its cache
LOG2_E = math.log2(math.e)  # scores are in base 2 here, since exp2 is faster than exp


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Compute PyTorch's scaled_dot_product_attention in bf16 on CPU, with this backward.

    Args:
        q: (batch, heads, seq, head_dim).
        k, v: (batch, kv_heads, keys, head_dim).
        mask: (batch or 1, 1, seq, keys), added to the scores. With keys == seq it must be causal.
            None: causal, with keys == seq.

    Returns: (batch, heads, seq, head_dim).
    """
    return _Attention.apply(q, k, v, mask)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        out, logsumexp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, is_causal=mask is None, attn_mask=mask
        )
        ctx.save_for_backward(q, k, v, out, logsumexp, mask)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return *attention_backward(gradient, *ctx.saved_tensors), None


@torch.library.custom_op("llamesh::attention_backward", mutates_args=())
def attention_backward(
    gradient: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v, in their shapes.

    Args:
        gradient: Gradient of the output, (batch, heads, seq, head_dim).
        q, k, v, mask: As in `attention`.
        out: Output of `attention`.
        logsumexp: (batch, heads, seq) float32, log-sum-exp of each query's scores.
    """
    (batch, heads, seq, head_dim), (_, kv_heads, keys, _) = q.shape, k.shape
    n, group = batch * kv_heads, heads // kv_heads

    # bf16 has a relative error, so the scores are shifted to be small: by the middle between the
    # shifts for a one-hot and for a uniform distribution. The rest of the normalization becomes a
    # factor on the gradient.
    shift = ((0.5 * math.log(keys) - logsumexp) * LOG2_E).to(q.dtype)  # (batch, heads, seq)
    factor = (-shift - logsumexp * LOG2_E).exp2_().unsqueeze(-1)  # (batch, heads, seq, 1) float32
    weighted = gradient * factor
    # The row term of the softmax gradient is subtracted inside the product, before the result is
    # rounded: by two extra columns, the term in bf16 and its rounding error.
    row_term = (weighted * out).sum(dim=-1, keepdim=True).neg_()  # (batch, heads, seq, 1)
    rounded = row_term.to(q.dtype)
    columns = [weighted.to(q.dtype), rounded, (row_term - rounded).to(q.dtype)]

    gradients = _backward_blocks(
        torch.cat(columns, dim=-1).reshape(n, group, seq, head_dim + 2),
        q.reshape(n, group, seq, head_dim),
        k.reshape(n, keys, head_dim),
        F.pad(v, (0, 2), value=1.0).reshape(n, keys, head_dim + 2),
        shift.reshape(n, group, seq, 1),
        mask,
        kv_heads,
    )
    d_q, d_k, d_v = (
        torch.empty_like(t).copy_(g.view_as(t)) for t, g in zip((q, k, v), gradients, strict=True)
    )
    return d_q, d_k, d_v


@attention_backward.register_fake
def _(gradient: Any, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _backward_blocks(
    g: Tensor, q: Tensor, k: Tensor, v: Tensor, shift: Tensor, mask: Tensor | None, kv_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v with the heads of all batch rows in one dim, n.

    Args:
        g: (n, group, seq, head_dim + 2), the weighted gradient and the two extra columns.
        q: (n, group, seq, head_dim).
        k: (n, keys, head_dim).
        v: (n, keys, head_dim + 2), the extra columns being ones.
        shift: (n, group, seq, 1), added to the scores.
        kv_heads: Key-value heads per batch row.

    Returns: (n, group, seq, head_dim), and twice (n, keys, head_dim) in float32.
    """
    (n, group, seq, head_dim), keys = q.shape, k.shape[1]
    scale = head_dim**-0.5
    d_q = torch.empty_like(q)
    d_k, d_v = torch.zeros(2, n, keys, head_dim)  # float32, because blocks accumulate into them
    future = shift.new_full((ROWS, ROWS), -torch.inf).triu_(1)
    for heads, heads_mask in _head_chunks(n, group * keys * q.element_size(), mask, kv_heads):
        for first in range(0, seq, ROWS):
            rows = slice(first, min(first + ROWS, seq))
            seen = slice(0, rows.stop if keys == seq else keys)
            if heads_mask is None:
                masked = F.pad(future, (first, 0))[: rows.stop - first, seen]  # (rows, seen)
            else:
                masked = heads_mask[rows, seen]
            # Each (heads, group * rows, …).
            block_q, block_g = q[heads, :, rows].flatten(1, 2), g[heads, :, rows].flatten(1, 2)
            p = (shift[heads, :, rows] + masked).flatten(1, 2)  # (heads, group * rows, seen)
            p.baddbmm_(block_q, k[heads, seen].mT, alpha=scale * LOG2_E).exp2_()
            d_v[heads, seen] += torch.bmm(p.mT, block_g[..., :head_dim])
            d_scores = torch.bmm(block_g, v[heads, seen].mT).mul_(p)
            d_q[heads, :, rows] = torch.bmm(d_scores, k[heads, seen]).unflatten(1, (group, -1))
            d_k[heads, seen] += torch.bmm(d_scores.mT, block_q)
    return d_q.mul_(scale), d_k.mul_(scale), d_v


def _head_chunks(
    n: int, bytes_per_query: int, mask: Tensor | None, kv_heads: int
) -> Iterator[tuple[slice, Tensor | None]]:
    """Yield the heads of one chunk, the same number per thread, and their mask (seq, keys)."""
    threads = torch.get_num_threads()
    size = max(1, threads * SCORE_BYTES // (ROWS * bytes_per_query))
    size = size // threads * threads or size
    same_mask = n if mask is None or len(mask) == 1 else kv_heads
    for start in range(0, n, same_mask):
        heads_mask = None if mask is None else mask[start // kv_heads, 0]
        for first in range(start, start + same_mask, size):
            yield slice(first, min(first + size, start + same_mask)), heads_mask
