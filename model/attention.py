"""Causal grouped-query attention, inside documents: one seam for every kernel.

The modules hand over queries, keys and values and never learn which kernel ran: it follows from
the mask, which is made once a forward and shared by all layers. Projections and RoPE stay in
`model.llama`. A parallel plan may put an object of the same two methods in the place of
`AttentionKernel`, one that hands it more keys than queries.
"""

from functools import cache
from inspect import signature
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from model.kernels.attention_backward import attention, is_faster, multiplies_in_bf16

BLOCK = 128  # queries or keys of a tile of FlexAttention's block mask
DOCUMENTS = 16  # the number of documents is rounded up to a multiple of it


class Documents(NamedTuple):
    """The rows of a batch laid end to end and cut at the documents' borders, for `varlen_attn`."""

    borders: Tensor  # (documents + 1,) int32, from 0 to batch * seq
    longest: int  # no document has more tokens


Mask = Tensor | BlockMask | Documents | None
"""Who sees whom, in the form that the chosen kernel takes; None: plain causal, whole rows."""


class AttentionKernel:
    """Softmax attention by one of PyTorch's kernels.

    Args:
        choice: `sdpa` runs everywhere, on a dense mask where there are documents. `flex` skips the
            tiles that no query sees; it has no backward on CPU. `varlen` is FlashAttention on
            sequences of any length; on CUDA, in 16 bits. `auto` takes `sdpa` on CPU and wherever
            rows are plainly causal, else `varlen` where it runs, else `flex`; in bf16 on CPU with
            a backward of our own.
    """

    def __init__(self, choice: str) -> None:
        self.choice = choice
        self.bf16_products = choice == "auto" and multiplies_in_bf16()

    def mask(
        self,
        positions: Tensor | None,
        places: Tensor | None,
        like: Tensor,
        key_places: Tensor | None = None,
        n_documents: int | None = None,
    ) -> Mask:
        """Who may look at whom: oneself and what came before, in the same document.

        Args:
            positions: (batch, seq) integers, restarting at 0 with each document, of the queries.
                A row that starts in the middle of a document starts at another position. None: one
                document a row.
            places: (seq,) where in the whole sequence each query lies; None: 0, 1, …
            like: A tensor of the device and dtype of the queries.
            key_places: (keys,) the same for the keys; None: the queries' own.
            n_documents: No more begin in all rows, a row's first one counted in any case. None:
                where their number is needed it is asked of the device, and waited for.
        """
        if positions is None and places is None:
            return None
        if places is None:
            assert positions is not None
            places = torch.arange(positions.shape[1], device=positions.device)
        begins = places.unsqueeze(0) if positions is None else positions  # (batch or 1, seq)
        begins = places - begins  # where the query's document begins
        keys = places if key_places is None else key_places
        choice = self._choose(like) if self.choice == "auto" else self.choice
        if choice == "varlen" and key_places is None and positions is not None:
            return _documents(begins, places, n_documents)
        if choice == "sdpa":
            # As the kernel adds it to the scores: of booleans each layer would make this anew.
            seen = document_mask(begins, places, keys)
            return torch.zeros((), dtype=like.dtype, device=like.device).where(seen, -torch.inf)
        return block_mask(begins, places, keys)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
        """Attention, scaled by 1/sqrt(head_dim); heads may be local.

        Args:
            q: (batch, seq, heads, head_dim).
            k, v: (batch, keys, kv_heads, head_dim); heads is a multiple of kv_heads, and query
                head i reads key-value head i * kv_heads // heads.
            mask: From `mask`.

        Returns: (batch, seq, heads, head_dim).
        """
        if isinstance(mask, Documents):
            return _varlen(q, k, v, mask)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (batch, heads, seq, …)
        if isinstance(mask, BlockMask):
            out = _flex(q, k, v, mask)
        elif self.bf16_products and is_faster(q):
            out = attention(q, k, v, mask)
        else:
            out = _sdpa(q, k, v, mask)
        return out.transpose(1, 2)  # (batch, seq, heads, head_dim)

    @staticmethod
    def _choose(like: Tensor) -> str:
        """The fastest kernel for documents that runs on the tensor's device, in its dtype."""
        if not like.is_cuda:
            return "sdpa"
        return "varlen" if like.dtype in (torch.bfloat16, torch.float16) else "flex"


def document_mask(begins: Tensor, places: Tensor, key_places: Tensor) -> Tensor:
    """The mask of `AttentionKernel.mask`, written out.

    Args:
        begins: (batch or 1, seq) the place where each query's document begins.
        places: (seq,) of the queries.
        key_places: (keys,).

    Returns: (batch or 1, 1, seq, keys) bool, [b, 0, query, key] true where query sees key.
    """
    seen = key_places <= places.unsqueeze(1)  # (seq, keys)
    return (seen & (key_places >= begins.unsqueeze(2))).unsqueeze(1)  # (batch, 1, seq, keys)


def block_mask(begins: Tensor, places: Tensor, key_places: Tensor) -> BlockMask:
    """The same for FlexAttention, from the ends of each tile and never written out.

    A tile is skipped where even its last query comes before its first key, or its last key before
    its earliest document; it is whole where its first query sees all of it. What the ends leave
    open is a tile that FlexAttention masks element by element.

    Args: As `document_mask`.
    """
    first, last = _ends(places)  # each (query tiles,)
    earliest, latest = _ends(begins)  # each (batch or 1, query tiles)
    first_key, last_key = _ends(key_places)  # each (key tiles,)
    some = (first_key <= last.unsqueeze(-1)) & (last_key >= earliest.unsqueeze(-1))
    whole = (last_key <= first.unsqueeze(-1)) & (first_key >= latest.unsqueeze(-1))
    # Tiles that reach beyond the sequence are masked by element.
    whole[..., -1, :] &= len(places) % BLOCK == 0
    whole[..., -1] &= len(key_places) % BLOCK == 0

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        row = batch if begins.shape[0] > 1 else 0
        return (key_places[key] <= places[query]) & (key_places[key] >= begins[row, query])

    return BlockMask.from_kv_blocks(
        *_listed(some & ~whole),
        *_listed(whole),
        BLOCK_SIZE=BLOCK,
        mask_mod=sees,
        seq_lengths=(len(places), len(key_places)),
    )


def _ends(values: Tensor) -> tuple[Tensor, Tensor]:
    """Least and greatest value of each tile of the last dim, the last tile maybe a shorter one."""
    missing = -values.shape[-1] % BLOCK
    padding = values[..., -1:].expand(*values.shape[:-1], missing)
    tiles = torch.cat([values, padding], dim=-1).unflatten(-1, (-1, BLOCK))
    return tiles.amin(dim=-1), tiles.amax(dim=-1)


def _listed(tiles: Tensor) -> tuple[Tensor, Tensor]:
    """Bool (batch, query tiles, key tiles) as counts and indices, with a dim of one head."""
    counts = tiles.sum(dim=-1, dtype=torch.int32)
    indices = torch.argsort(tiles.int(), dim=-1, descending=True, stable=True).int()
    return counts.unsqueeze(1), indices.unsqueeze(1)


def _documents(begins: Tensor, places: Tensor, n_documents: int | None) -> Documents:
    """Borders of the documents of whole rows; those that are missing to a bound are empty."""
    starts = begins == places  # (batch or 1, seq)
    starts[:, 0] = True  # a row that starts in the middle of a document
    ends, whole = starts.numel(), starts.flatten()
    if n_documents is None:
        borders = torch.nonzero(whole).squeeze(1)  # (documents,)
    else:
        # Sizes that come again and again are compiled once.
        bound = -(-n_documents // DOCUMENTS) * DOCUMENTS
        borders = torch.nonzero_static(whole, size=bound, fill_value=ends).squeeze(1)
    return Documents(F.pad(borders, (0, 1), value=ends).int(), begins.shape[1])


def _varlen(q: Tensor, k: Tensor, v: Tensor, mask: Documents) -> Tensor:
    """FlashAttention over documents laid end to end; (batch, seq, heads, head_dim) in and out."""
    from torch.nn.attention.varlen import varlen_attn  # from PyTorch 2.10 on

    group = q.shape[2] // k.shape[2]
    borders, longest = mask
    named: dict[str, Any] = {"window_size": (-1, 0)}  # causal
    if group > 1 and "enable_gqa" in signature(varlen_attn).parameters:
        named["enable_gqa"] = True
    elif group > 1:  # older versions of PyTorch
        k, v = (t.repeat_interleave(group, dim=2) for t in (k, v))
    # Each (batch * seq, heads, head_dim); heads of k and v may be fewer.
    flat = [t.flatten(0, 1) for t in (q, k, v)]
    out: Any = cast(Any, varlen_attn)(*flat, borders, borders, longest, longest, **named)
    return out.unflatten(0, q.shape[:2])


def _flex(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> Tensor:
    """FlexAttention; (batch, heads, seq, head_dim) in and out."""
    kernel: Any = flex_attention if torch.compiler.is_compiling() else _compiled_flex()
    return kernel(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1])


@cache
def _compiled_flex() -> Any:
    """FlexAttention as a fused kernel; uncompiled it would write out the scores."""
    return torch.compile(flex_attention, dynamic=False)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """PyTorch's scaled_dot_product_attention; (batch, heads, seq, head_dim) in and out."""
    grouped = q.shape[1] != k.shape[1]
    if grouped and mask is not None and q.is_cuda:
        # With a mask, CUDA's flash kernel is out, and the memory-efficient one does not take
        # enable_gqa: without the expansion PyTorch would write out the (seq, keys) scores.
        k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)  # (batch, heads, keys, head_dim)
        v = v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)
        grouped = False
    # On CPU both ways run the flash kernel; enable_gqa measured 5% faster than expanding.
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped
    )
