"""The backward of attention in bf16 on a CPU, as matrix products of whole blocks of queries.

PyTorch's flash kernel for CPUs multiplies tile by tile, far below the rate of its products of
matrices (measured: `python -m bench.cpu_attention`). The forward stays with it. Here its result and
its logarithms of sums are read, and the probabilities computed again from them, as in the kernel's
own backward (FlashAttention-2, arXiv:2307.08691).
"""

import math
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

SHORTEST = 512
"""Of fewer queries the flash kernel's own backward may be the faster one."""

ROWS = 128  # queries of a block
SCORES = 2**21  # bytes that a thread's scores take at once, so that they stay in its cache
BITS = math.log2(math.e)  # of a nat: scores are in bits here, since exp2 is faster than exp


@cache
def multiplies_in_bf16() -> bool:
    """Whether this machine's CPU has units for it, and PyTorch the library that uses them."""
    units = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return units and torch.backends.mkldnn.is_available()


def is_faster(q: Tensor) -> bool:
    """Than the kernel's, on such a CPU, of queries (batch, heads, seq, head_dim)."""
    return q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.shape[2] >= SHORTEST


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """PyTorch's scaled_dot_product_attention in bf16 on CPU, with this backward.

    Args:
        q: (batch, heads, seq, head_dim).
        k, v: (batch, kv_heads, keys, head_dim).
        mask: (batch or 1, 1, seq, keys), added to the scores. None: causal, and keys is seq. With
            as many keys as queries, it has to hide from each query the keys behind it.

    Returns: (batch, heads, seq, head_dim).
    """
    return _Attention.apply(q, k, v, mask)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        out, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, is_causal=mask is None, attn_mask=mask
        )
        ctx.save_for_backward(q, k, v, out, sums, mask)
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
    sums: Tensor,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values.

    Args:
        gradient: Of the result, (batch, heads, seq, head_dim).
        q, k, v, mask: As in `attention`.
        out: Its result.
        sums: (batch, heads, seq) float32, of each query the logarithm of its exponentials' sum.

    Returns: Of the shapes of q, k and v.
    """
    (batch, heads, seq, head_dim), (_, kv_heads, keys, _) = q.shape, k.shape
    n, group = batch * kv_heads, heads // kv_heads

    # A product in bf16 is off by a share of its size. Shifted to the middle between a sure choice
    # and an even one, scores are small in either; what that leaves over becomes a factor.
    shift = ((0.5 * math.log(keys) - sums) * BITS).to(q.dtype)  # (batch, heads, seq)
    factor = (-shift - sums * BITS).exp2_().unsqueeze(-1)  # (batch, heads, seq, 1) float32
    weighted = gradient * factor
    # What a query's gradients have in common is taken off inside the product, before that is
    # rounded: by two columns more, one with the number in bf16 and one with the rest.
    less = (weighted * out).sum(dim=-1, keepdim=True).neg_()
    rounded = less.to(q.dtype)
    columns = [weighted.to(q.dtype), rounded, (less - rounded).to(q.dtype)]

    found = _blocks(
        torch.cat(columns, dim=-1).reshape(n, group, seq, head_dim + 2),
        q.reshape(n, group, seq, head_dim),
        k.reshape(n, keys, head_dim),
        F.pad(v, (0, 2), value=1.0).reshape(n, keys, head_dim + 2),
        shift.reshape(n, group, seq, 1),
        mask,
        kv_heads,
    )
    d_q, d_k, d_v = (
        torch.empty_like(t).copy_(g.view_as(t)) for t, g in zip((q, k, v), found, strict=True)
    )
    return d_q, d_k, d_v


@attention_backward.register_fake
def _(gradient: Any, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _blocks(
    g: Tensor, q: Tensor, k: Tensor, v: Tensor, shift: Tensor, mask: Tensor | None, kv_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The same of so many heads of keys, those of a batch's rows one after the other.

    Args:
        g: (n, group, seq, head_dim + 2), the weighted gradient and the columns behind it.
        q: (n, group, seq, head_dim).
        k: (n, keys, head_dim).
        v: (n, keys, head_dim + 2), the columns behind it ones.
        shift: (n, group, seq, 1), added to the scores.
        kv_heads: Heads of a row.

    Returns: (n, group, seq, head_dim), and twice (n, keys, head_dim) float32.
    """
    (n, group, seq, head_dim), keys = q.shape, k.shape[1]
    scale = head_dim**-0.5
    d_q = torch.empty_like(q)
    d_k, d_v = torch.zeros(2, n, keys, head_dim)  # float32, since they add up
    future = shift.new_full((ROWS, ROWS), -torch.inf).triu_(1)
    for some, own_mask in _rounds(n, group * keys * q.element_size(), mask, kv_heads):
        for first in range(0, seq, ROWS):
            rows = slice(first, min(first + ROWS, seq))
            seen = slice(0, rows.stop if keys == seq else keys)
            if own_mask is None:
                masked = F.pad(future, (first, 0))[: rows.stop - first, seen]  # (rows, seen)
            else:
                masked = own_mask[rows, seen]
            block_q, block_g = q[some, :, rows].flatten(1, 2), g[some, :, rows].flatten(1, 2)
            p = (shift[some, :, rows] + masked).flatten(1, 2)  # (some, group * rows, seen)
            p.baddbmm_(block_q, k[some, seen].mT, alpha=scale * BITS).exp2_()
            d_v[some, seen] += torch.bmm(p.mT, block_g[..., :head_dim])
            d_scores = torch.bmm(block_g, v[some, seen].mT).mul_(p)
            d_q[some, :, rows] = torch.bmm(d_scores, k[some, seen]).unflatten(1, (group, -1))
            d_k[some, seen] += torch.bmm(d_scores.mT, block_q)
    return d_q.mul_(scale), d_k.mul_(scale), d_v


def _rounds(
    n: int, bytes_a_query: int, mask: Tensor | None, kv_heads: int
) -> Iterator[tuple[slice, Tensor | None]]:
    """Heads that are computed at once, as many for each thread, and their mask (seq, keys)."""
    threads = torch.get_num_threads()
    many = max(1, threads * SCORES // (ROWS * bytes_a_query))
    many = many // threads * threads or many
    together = n if mask is None or len(mask) == 1 else kv_heads  # under the same mask
    for begin in range(0, n, together):
        own = None if mask is None else mask[begin // kv_heads, 0]
        for first in range(begin, begin + together, many):
            yield slice(first, min(first + many, begin + together)), own
