"""KV cache for generation: each step computes one column per row.

The cache is held by the attention kernels, so the model is unchanged, and a sharded model allocates
only its local kv heads, in its compute data type. Rows of different lengths are padded on the
right. The cache index of a token is its position, so padding is overwritten by generated tokens
before any query attends to it.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from model.attention import AttentionKernel, Mask
from model.llama import Attention, Llama


@contextmanager
def kv_cache(llama: Llama, lengths: Sequence[int], capacity: int) -> Iterator[None]:
    """Enable the KV cache of `llama`, which then returns logits of the last token only.

    The first call is `llama(tokens)` with the prompts (batch, seq), padded on the right. Each later
    call is `llama(tokens, positions)`, both (batch, 1): one token per row and its position. The
    logits are (batch, 1, vocab).

    Args:
        llama: Without context and sequence parallelism.
        lengths: Number of tokens of each prompt.
        capacity: Number of tokens per row to allocate.
    """
    kernel = llama.kernel
    assert type(kernel) is AttentionKernel, "context parallelism is not supported"
    attentions = [module for module in llama.modules() if isinstance(module, Attention)]
    state = _CacheState(lengths, capacity)
    for attention in attentions:
        attention.kernel = _CachedAttention(kernel.choice, state)
    llama.kernel = _CachedAttention(kernel.choice, state)  # for its masks
    hooks = []
    if hasattr(llama, "norm"):  # not in the first stages of a pipeline
        # Before the hooks of tensor parallelism, which convert the input to a DTensor.
        hooks.append(llama.norm.register_forward_pre_hook(state.keep_last_columns, prepend=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        llama.kernel = kernel
        for attention in attentions:
            attention.kernel = kernel


class _CacheState:
    """State shared by all layers: row lengths, and the positions of the current call."""

    def __init__(self, lengths: Sequence[int], capacity: int) -> None:
        self.lengths, self.capacity = lengths, capacity
        self.used = 0  # number of cached tokens of the longest row
        self.positions: Tensor | None = None  # (batch,) of the current call; None for the prompts

    def advance(self, positions: Tensor | None) -> Tensor | None:
        """Start a call and return its attention mask (batch, 1, 1, keys) bool; None for no mask.

        Args:
            positions: (batch, 1), or None for the prompts.
        """
        if positions is None:
            self.used, self.positions = max(self.lengths), None
            return None
        self.used = min(self.used + 1, self.capacity)
        self.positions = positions.squeeze(1)
        if len(set(self.lengths)) == 1:
            return None  # faster kernels are available without a mask
        keys = torch.arange(self.used, device=positions.device)
        return (keys <= positions)[:, None, None]

    def keep_last_columns(self, _: Any, arguments: tuple[Tensor, ...]) -> Tensor:
        """Reduce the prompts' hidden states (batch, seq, dim) to (batch, 1, dim) before the head.

        Logits of all columns would be by far the largest tensor.
        """
        (x,) = arguments
        if self.positions is not None:
            return x
        last = torch.tensor(self.lengths, device=x.device) - 1  # (batch,)
        return x[torch.arange(len(last), device=x.device), last].unsqueeze(1)  # (batch, 1, dim)


class _CachedAttention(AttentionKernel):
    """Attention kernel of one layer that attends to the cached keys and values."""

    def __init__(self, choice: str, state: _CacheState) -> None:
        super().__init__(choice)
        self.state = state

    def mask(
        self,
        positions: Tensor | None,
        token_indices: Tensor | None,
        like: Tensor,
        key_indices: Tensor | None = None,
        n_documents: int | None = None,
    ) -> Mask:
        assert token_indices is None and key_indices is None
        return self.state.advance(positions)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
        positions = self.state.positions
        if positions is None:
            # Zero-initialized: unused entries are masked, but NaN propagates through masking.
            shape = (k.shape[0], self.state.capacity, *k.shape[2:])
            self.k, self.v = k.new_zeros(shape), v.new_zeros(shape)
            self.k[:, : k.shape[1]], self.v[:, : v.shape[1]] = k, v
            return super().__call__(q, k, v, None)
        assert mask is None or isinstance(mask, Tensor)
        rows = torch.arange(len(positions), device=positions.device)
        self.k[rows, positions], self.v[rows, positions] = k[:, 0], v[:, 0]
        keys = self.k[:, : self.state.used].transpose(1, 2)  # (batch, kv_heads, keys, head_dim)
        values = self.v[:, : self.state.used].transpose(1, 2)  # (batch, kv_heads, keys, head_dim)
        # Heads of a group become queries of one kv head, so keys and values are not expanded.
        grouped = q.view(q.shape[0], k.shape[2], -1, q.shape[3])  # (batch, kv_heads, group, …)
        out = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask)
        return out.reshape(q.shape)  # (batch, 1, heads, head_dim)
