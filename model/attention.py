"""Causal grouped-query attention within documents, behind one interface for all kernels.

Which kernel runs follows from the mask, which is built once per forward and shared by all layers.
Projections and RoPE are in `model.llama`, CPU kernels in `model.kernels`. A transform of the model
may replace `AttentionKernel` by an object with the same two methods, for example one that gathers
more keys than it has queries (context parallelism, the key-value cache).
"""

from collections.abc import Callable
from functools import cache
from inspect import signature
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from model.compiled import compile_for_any_shape
from model.config import attention_kernel
from model.kernels import select_sdpa

BLOCK_SIZE = 128  # queries and keys per tile of FlexAttention's block mask
DOCUMENT_MULTIPLE = 16  # `cu_seqlens` is padded to a multiple of it, to limit recompilation


class VarlenMask(NamedTuple):
    """Document boundaries of a batch whose rows are concatenated, for `varlen_attn`."""

    cu_seqlens: Tensor  # (documents + 1,) int32, from 0 to batch * seq
    max_seqlen: int  # upper bound of a document's length


Mask = Tensor | BlockMask | VarlenMask | None
"""Attention mask in the form of the selected kernel; None: causal over complete rows."""


class AttentionKernel:
    """Softmax attention by one of PyTorch's kernels.

    Args:
        choice: `sdpa` runs everywhere and needs a dense mask for documents. `flex` skips tiles that
            are masked entirely; it has no backward on CPU. `varlen` is FlashAttention on sequences
            of any length; CUDA only, 16-bit only. `auto` is resolved by `select_kernel`; `sdpa` has
            the backward of `model.kernels.attention_backward` then, in bf16 on CPU.
        head_dim: Elements per head, which `auto` depends on.
    """

    def __init__(self, choice: str, head_dim: int = 128) -> None:
        self.choice, self.head_dim = choice, head_dim
        self.sdpa = select_sdpa(_sdpa) if choice == "auto" else _sdpa
        self.flex: Callable[..., Tensor] = _flex

    def mask(
        self,
        positions: Tensor | None,
        token_indices: Tensor | None,
        like: Tensor,
        key_indices: Tensor | None = None,
        n_documents: int | None = None,
    ) -> Mask:
        """Build the mask: each query sees itself and earlier tokens of the same document.

        Args:
            positions: (batch, seq) integers of the queries, restarting at 0 with each document. A
                row may start inside a document, then at another position. None: one document per
                row.
            token_indices: (seq,) index of each query in the full sequence. None: 0, 1, …
            like: A tensor with the device and dtype of the queries.
            key_indices: (keys,) index of each key in the full sequence. None: `token_indices`.
            n_documents: Upper bound of the number of documents in all rows, including the document
                that a row starts inside. None: a kernel that needs the number reads it from the
                device, which synchronizes.
        """
        if positions is None and token_indices is None:
            return None
        if token_indices is None:
            assert positions is not None
            token_indices = torch.arange(positions.shape[1], device=positions.device)
        offsets = token_indices.unsqueeze(0) if positions is None else positions
        starts = token_indices - offsets  # (batch or 1, seq), start index of the document
        keys = token_indices if key_indices is None else key_indices
        complete = key_indices is None and positions is not None
        choice = select_kernel(self.choice, self.head_dim, like.device, like.dtype, complete)
        if choice == "varlen" and complete:
            return _varlen_mask(starts, token_indices, n_documents)
        if choice == "sdpa":
            # As SDPA adds it to the scores: it would convert a bool mask again in each layer.
            visible = document_mask(starts, token_indices, keys)
            return torch.zeros((), dtype=like.dtype, device=like.device).where(visible, -torch.inf)
        return block_mask(starts, token_indices, keys)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
        """Compute attention, scaled by 1/sqrt(head_dim). The number of heads may be local.

        Args:
            q: (batch, seq, heads, head_dim).
            k, v: (batch, keys, kv_heads, head_dim); heads is a multiple of kv_heads, and query
                head i reads key-value head i * kv_heads // heads.
            mask: From `mask`.

        Returns: (batch, seq, heads, head_dim).
        """
        if isinstance(mask, VarlenMask):
            return _varlen(q, k, v, mask)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (batch, heads, seq, …)
        out = self.flex(q, k, v, mask) if isinstance(mask, BlockMask) else self.sdpa(q, k, v, mask)
        return out.transpose(1, 2)  # (batch, seq, heads, head_dim)


def select_kernel(
    choice: str, head_dim: int, device: torch.device, dtype: torch.dtype, complete: bool
) -> str:
    """Return the kernel of `model.config.attention_kernel` for these tensors."""
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    return attention_kernel(choice, head_dim, capability, dtype != torch.float32, complete)


def document_mask(starts: Tensor, token_indices: Tensor, key_indices: Tensor) -> Tensor:
    """Return the dense mask of `AttentionKernel.mask`.

    Args:
        starts: (batch or 1, seq) index where each query's document starts.
        token_indices: (seq,) index of each query.
        key_indices: (keys,) index of each key.

    Returns: (batch or 1, 1, seq, keys) bool; [b, 0, query, key] is True where query sees key.
    """
    causal = key_indices <= token_indices.unsqueeze(1)  # (seq, keys)
    return (causal & (key_indices >= starts.unsqueeze(2))).unsqueeze(1)  # (batch, 1, seq, keys)


def block_mask(starts: Tensor, token_indices: Tensor, key_indices: Tensor) -> BlockMask:
    """Return the same mask for FlexAttention, without building the dense one.

    Tiles are classified by their smallest and largest indices. A tile is skipped if its last query
    precedes its first key, or its last key precedes its earliest document. It is full if its first
    query sees all of its keys. FlexAttention masks all other tiles element by element.

    Args: As for `document_mask`.
    """
    first, last = _tile_bounds(token_indices)  # each (query tiles,)
    earliest, latest = _tile_bounds(starts)  # each (batch or 1, query tiles)
    first_key, last_key = _tile_bounds(key_indices)  # each (key tiles,)
    visible = (first_key <= last.unsqueeze(-1)) & (last_key >= earliest.unsqueeze(-1))
    full = (last_key <= first.unsqueeze(-1)) & (first_key >= latest.unsqueeze(-1))
    # A tile that extends beyond the sequence is masked element by element.
    full[..., -1, :] &= len(token_indices) % BLOCK_SIZE == 0
    full[..., -1] &= len(key_indices) % BLOCK_SIZE == 0

    one_row = starts[0] if starts.shape[0] == 1 else None  # as an index, 0 would be a tensor

    def mask_mod(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        start = starts[batch, query] if one_row is None else one_row[query]
        index = key_indices[key]
        return (index <= token_indices[query]) & (index >= start)

    return BlockMask.from_kv_blocks(
        *_tile_lists(visible & ~full),
        *_tile_lists(full),
        BLOCK_SIZE=BLOCK_SIZE,
        mask_mod=mask_mod,
        seq_lengths=(len(token_indices), len(key_indices)),
    )


def _tile_bounds(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return the minimum and maximum of each tile of the last dim, whose last tile may be short."""
    missing = -values.shape[-1] % BLOCK_SIZE
    padding = values[..., -1:].expand(*values.shape[:-1], missing)
    tiles = torch.cat([values, padding], dim=-1).unflatten(-1, (-1, BLOCK_SIZE))
    return tiles.amin(dim=-1), tiles.amax(dim=-1)


def _tile_lists(tiles: Tensor) -> tuple[Tensor, Tensor]:
    """Return a bool (batch, query tiles, key tiles) as counts and indices, with a head dim of 1."""
    counts = tiles.sum(dim=-1, dtype=torch.int32)  # (batch, query tiles)
    indices = torch.argsort(tiles.int(), dim=-1, descending=True, stable=True).int()
    return counts.unsqueeze(1), indices.unsqueeze(1)


def _varlen_mask(starts: Tensor, token_indices: Tensor, n_documents: int | None) -> VarlenMask:
    """Return the document boundaries; documents missing to the upper bound are empty."""
    is_start = starts == token_indices  # (batch or 1, seq)
    is_start[:, 0] = True  # also for a row that starts inside a document
    end, flat = is_start.numel(), is_start.flatten()
    if n_documents is None:
        offsets = torch.nonzero(flat).squeeze(1)  # (documents,)
    else:
        size = -(-n_documents // DOCUMENT_MULTIPLE) * DOCUMENT_MULTIPLE
        offsets = torch.nonzero_static(flat, size=size, fill_value=end).squeeze(1)  # (size,)
    return VarlenMask(F.pad(offsets, (0, 1), value=end).int(), starts.shape[1])


def _varlen(q: Tensor, k: Tensor, v: Tensor, mask: VarlenMask) -> Tensor:
    """FlashAttention over concatenated documents: (batch, seq, heads, head_dim) in and out."""
    from torch.nn.attention.varlen import varlen_attn  # PyTorch 2.10 and later

    group = q.shape[2] // k.shape[2]
    kwargs: dict[str, Any] = {"window_size": (-1, 0)}  # causal
    if group > 1 and "enable_gqa" in signature(varlen_attn).parameters:
        kwargs["enable_gqa"] = True
    elif group > 1:  # older versions of PyTorch
        k, v = (t.repeat_interleave(group, dim=2) for t in (k, v))
    flat = [t.flatten(0, 1) for t in (q, k, v)]  # each (batch * seq, heads or kv_heads, head_dim)
    offsets, longest = mask
    out: Any = cast(Any, varlen_attn)(*flat, offsets, offsets, longest, longest, **kwargs)
    return out.unflatten(0, q.shape[:2])  # (batch, seq, heads, head_dim)


def _flex(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> Tensor:
    """FlexAttention: (batch, heads, seq, head_dim) in and out."""
    kernel: Any = flex_attention if torch.compiler.is_compiling() else _compiled_flex()
    options: dict[str, int] | None = None
    # For sm_100 Inductor 2.13 selects a backward with 4 warps, whose threads keep 13 KB of
    # registers in local memory (Triton 3.7.1); with 8 warps, as for sm_90, 40 bytes. Both sizes
    # are from tests/cuda/code_generation.py; neither kernel has been timed.
    if q.is_cuda and q.dtype != torch.float32 and 64 < q.shape[3] <= 128 and _has_sm_100():
        options = {"bwd_num_warps": 8}
    return kernel(
        q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1], kernel_options=options
    )


@torch.compiler.assume_constant_result
def _has_sm_100() -> bool:
    """Return whether this process's GPU has compute capability 10.x."""
    return torch.cuda.get_device_capability()[0] == 10


@cache
def _compiled_flex() -> Any:
    """FlexAttention as a fused kernel; uncompiled it materializes the scores."""
    return compile_for_any_shape(flex_attention)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """PyTorch's scaled_dot_product_attention: (batch, heads, seq, head_dim) in and out."""
    heads, head_dim, scale = q.shape[1], q.shape[3], None
    grouped = heads != k.shape[1]
    # On CUDA PyTorch materializes the (seq, keys) scores unless the flash or the memory-efficient
    # kernel supports the inputs (aten/src/ATen/native/transformers/cuda/sdp_utils.cpp). The flash
    # kernel takes no mask and no float32, and on some GPUs at most 192 elements per head in
    # training; the memory-efficient one takes no enable_gqa and needs aligned heads.
    if q.is_cuda and (mask is not None or q.dtype == torch.float32 or head_dim > 192):
        if grouped:
            k, v = (t.repeat_interleave(heads // t.shape[1], dim=1) for t in (k, v))
            grouped = False
        if padding := -head_dim % 8:
            q, k, v = (F.pad(t, (0, padding)) for t in (q, k, v))
            scale = head_dim**-0.5
    # On CPU both forms run the flash kernel; enable_gqa measured 5% faster than expanding.
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=grouped
    )
    return out if scale is None else out[..., :head_dim]
