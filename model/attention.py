"""Causal grouped-query attention, inside documents.

One seam for every kernel: the modules hand over queries, keys and values and never learn which
kernel ran. Projections and RoPE stay in `model.llama`.
"""

import torch.nn.functional as F
from torch import Tensor


def document_mask(positions: Tensor) -> Tensor:
    """Who may look at whom: oneself and what came before, in the same document.

    A document begins where the position is 0; a row that starts in the middle of a document starts
    at another position, and its first tokens are a document as well.

    Args:
        positions: (batch, seq) integers, restarting at 0 with each document.

    Returns: (batch, 1, seq, seq) bool, [b, 0, query, key] true where query sees key.
    """
    document = (positions == 0).cumsum(dim=1)  # (batch, seq)
    same = document.unsqueeze(2) == document.unsqueeze(1)  # (batch, seq, seq)
    return same.tril().unsqueeze(1)  # (batch, 1, seq, seq)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Softmax attention, scaled by 1/sqrt(head_dim); heads may be local.

    Args:
        q: (batch, seq, heads, head_dim).
        k, v: (batch, seq, kv_heads, head_dim); heads is a multiple of kv_heads, and query head i
            reads key-value head i * kv_heads // heads.
        mask: (batch, 1, seq, seq) bool as from `document_mask`, or None for plain causal.

    Returns: (batch, seq, heads, head_dim).
    """
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (batch, heads, seq, …)
    grouped = q.shape[1] != k.shape[1]
    if grouped and mask is not None and q.is_cuda:
        # With a mask, CUDA's flash kernel is out, and the memory-efficient one does not take
        # enable_gqa: without the expansion PyTorch would write out the (seq, seq) scores.
        k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)  # (batch, heads, seq, head_dim)
        v = v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)
        grouped = False
    # On CPU both ways run the flash kernel; enable_gqa measured 5% faster than expanding.
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped
    )  # (batch, heads, seq, head_dim)
    return out.transpose(1, 2)  # (batch, seq, heads, head_dim)
