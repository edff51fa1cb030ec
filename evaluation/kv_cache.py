"""Keys and values of the tokens so far, so that a step of generation computes one column a row.

The cache lives in the attention kernels, as context parallelism does: the model stays as it is, and
a sharded one allocates what its local kv_heads need, in the dtype that it computes in. Rows of
different lengths are padded on the right. A token's place in the cache is its position, so what was
padding is written over by the tokens that follow, and no query sees it before.
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
def cached(llama: Llama, lengths: Sequence[int], places: int) -> Iterator[None]:
    """Within it `llama` remembers, and yields logits of each row's last token: (batch, 1, vocab).

    The first call is `llama(tokens)`, with the prompts (batch, seq), padded on the right. Each one
    after it is `llama(tokens, positions)`, both (batch, 1): one more token of every row, and its
    place in its row.

    Args:
        llama: Its activations are whole along seq: neither context nor sequence parallelism.
        lengths: Tokens of each prompt.
        places: Tokens that a row may come to have; the cache is allocated for so many.
    """
    kernel = llama.kernel
    assert type(kernel) is AttentionKernel, "context parallelism holds parts of rows"
    attentions = [module for module in llama.modules() if isinstance(module, Attention)]
    rows = _Rows(lengths, places)
    for attention in attentions:
        attention.kernel = _CachingKernel(kernel.choice, rows)
    llama.kernel = attentions[0].kernel
    # Before the hooks of tensor parallelism, which hand the norm a DTensor.
    handle = llama.norm.register_forward_pre_hook(rows.keep_last_columns, prepend=True)
    try:
        yield
    finally:
        handle.remove()
        llama.kernel = kernel
        for attention in attentions:
            attention.kernel = kernel


class _Rows:
    """What the layers share: how far the rows are, and where the tokens of this call go."""

    def __init__(self, lengths: Sequence[int], places: int) -> None:
        self.lengths, self.places = lengths, places
        self.used = 0  # places of the longest row that hold a token
        self.positions: Tensor | None = None  # (batch,) of this call's tokens; None: the prompts

    def advance(self, positions: Tensor | None) -> Tensor | None:
        """Takes in where the tokens of a call go; returns what their queries see, None for all.

        Args:
            positions: (batch, 1), or None for the prompts.

        Returns: (batch, 1, 1, keys) bool.
        """
        if positions is None:
            self.used, self.positions = max(self.lengths), None
            return None
        self.used = min(self.used + 1, self.places)
        self.positions = positions.squeeze(1)
        if len(set(self.lengths)) == 1:
            return None  # without a mask there are faster kernels
        keys = torch.arange(self.used, device=positions.device)
        return (keys <= positions)[:, None, None]

    def keep_last_columns(self, _: Any, arguments: tuple[Tensor, ...]) -> Tensor:
        """(batch, seq, dim) of the prompts -> (batch, 1, dim) of each one's last token.

        The head over all columns would be by far the largest tensor of all: a vocabulary wide.
        """
        (x,) = arguments
        if self.positions is not None:
            return x
        last = torch.tensor(self.lengths, device=x.device) - 1  # (batch,)
        return x[torch.arange(len(last), device=x.device), last].unsqueeze(1)


class _CachingKernel(AttentionKernel):
    """An attention kernel of one layer whose keys and values are those of all tokens so far."""

    def __init__(self, choice: str, rows: _Rows) -> None:
        super().__init__(choice)
        self.rows = rows

    def mask(
        self,
        positions: Tensor | None,
        token_indices: Tensor | None,
        like: Tensor,
        key_indices: Tensor | None = None,
        n_documents: int | None = None,
    ) -> Mask:
        assert token_indices is None and key_indices is None
        return self.rows.advance(positions)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
        positions = self.rows.positions
        if positions is None:
            # Zeros: a place that no token of its row has reached is masked, and NaN would shine
            # through a mask.
            shape = (k.shape[0], self.rows.places, *k.shape[2:])
            self.k, self.v = k.new_zeros(shape), v.new_zeros(shape)
            self.k[:, : k.shape[1]], self.v[:, : v.shape[1]] = k, v
            return super().__call__(q, k, v, None)
        assert mask is None or isinstance(mask, Tensor)
        each = torch.arange(len(positions), device=positions.device)
        self.k[each, positions], self.v[each, positions] = k[:, 0], v[:, 0]
        keys = self.k[:, : self.rows.used].transpose(1, 2)  # (batch, kv_heads, keys, head_dim)
        values = self.v[:, : self.rows.used].transpose(1, 2)  # (batch, kv_heads, keys, head_dim)
        # The heads that share keys stand as queries: nothing is expanded to all heads.
        grouped = q.view(q.shape[0], k.shape[2], -1, q.shape[3])  # (batch, kv_heads, group, …)
        out = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask)
        return out.reshape(q.shape)  # (batch, 1, heads, head_dim)
