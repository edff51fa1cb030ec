"""All attention kernels match a reference softmax over the visible keys, written in float64."""

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from model.attention import (
    DOCUMENT_MULTIPLE,
    AttentionKernel,
    VarlenMask,
    block_mask,
    document_mask,
    select_kernel,
)

# Lengths of the documents in a row. Boundaries of 128-token tiles fall inside two documents.
LENGTHS = (13, 1, 29, 5, 130, 100)
SEQ, HEADS, HEAD_DIM = sum(LENGTHS), 6, 16

cuda = pytest.param(
    "cuda",
    marks=[
        pytest.mark.gpu,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    ],
)


def packed_positions() -> Tensor:
    """Return (batch, seq) positions of two packed rows; the second starts inside a document."""
    row = torch.cat([torch.arange(length) for length in LENGTHS])
    return torch.stack([row, torch.cat([row[20:], torch.arange(20)])])


def inputs(kv_heads: int, device: str = "cpu", seq: int = SEQ) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    q, k, v = (
        torch.randn(2, seq, heads, HEAD_DIM, generator=generator).to(device).requires_grad_()
        for heads in (HEADS, kv_heads, kv_heads)
    )
    return q, k, v


def reference_mask(positions: Tensor | None) -> Tensor:
    """Return the (batch, seq, seq) mask of visible keys, computed from document indices."""
    if positions is None:
        return torch.ones(1, SEQ, SEQ, dtype=torch.bool).tril()
    starts = positions == 0
    starts[:, 0] = True
    document = starts.cumsum(dim=1)
    return (document.unsqueeze(2) == document.unsqueeze(1)).tril()


def reference_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Compute attention in float64; query head i reads key-value head i // group."""
    group = q.shape[2] // k.shape[2]
    heads = []
    for head in range(q.shape[2]):
        q_head, k_head, v_head = (
            t.double()[:, :, i]  # (batch, seq, head_dim)
            for t, i in ((q, head), (k, head // group), (v, head // group))
        )
        scores = q_head @ k_head.transpose(1, 2) / q.shape[3] ** 0.5  # (batch, seq, seq)
        heads.append(scores.masked_fill(~mask, float("-inf")).softmax(-1) @ v_head)
    return torch.stack(heads, dim=2)


def gradients(out: Tensor, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Return the gradients of a sum that weights each element of `out` differently."""
    weights = torch.linspace(-1, 1, out.numel(), device=out.device).reshape(out.shape)
    return torch.autograd.grad((out * weights).sum(), inputs)


@pytest.mark.parametrize("device", ["cpu", cuda])
@pytest.mark.parametrize("kv_heads", [1, 2, 6])
@pytest.mark.parametrize("packed", [False, True])
def test_sdpa_matches_reference_attention(device: str, kv_heads: int, packed: bool) -> None:
    positions = packed_positions().to(device) if packed else None
    q, k, v = inputs(kv_heads, device)
    kernel = AttentionKernel("sdpa")
    out = kernel(q, k, v, kernel.mask(positions, None, like=q))
    expected = reference_attention(q, k, v, reference_mask(positions).to(device))
    # float32 against float64; sums of up to 278 terms of magnitude 1.
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=1e-5)
    pairs = zip(gradients(out, (q, k, v)), gradients(expected, (q, k, v)), strict=True)
    for grad, expected_grad in pairs:
        torch.testing.assert_close(grad, expected_grad, rtol=0, atol=1e-4)


@pytest.mark.parametrize("device", ["cpu", cuda])
def test_flex_matches_reference_attention(device: str) -> None:
    """The compiled kernel runs forward on every device; it has no backward on CPUs."""
    positions = packed_positions().to(device)
    q, k, v = inputs(2, device)
    kernel = AttentionKernel("flex")
    mask = kernel.mask(positions, None, like=q)
    assert isinstance(mask, BlockMask)
    if device == "cpu":
        q, k, v = q.detach(), k.detach(), v.detach()
    out = kernel(q, k, v, mask)
    expected = reference_attention(q, k, v, reference_mask(positions).to(device))
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=1e-5)
    if device == "cuda":
        pairs = zip(gradients(out, (q, k, v)), gradients(expected, (q, k, v)), strict=True)
        for grad, expected_grad in pairs:
            torch.testing.assert_close(grad, expected_grad, rtol=0, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("choice", ["sdpa", "flex", "varlen", "auto"])
def test_kernels_match_reference_in_bf16_on_packed_batches(choice: str) -> None:
    positions = packed_positions().cuda()
    q, k, v = (t.detach().bfloat16().requires_grad_() for t in inputs(2, "cuda"))
    kernel = AttentionKernel(choice)
    out = kernel(q, k, v, kernel.mask(positions, None, like=q))
    expected = reference_attention(q, k, v, reference_mask(positions).cuda())
    # bf16 has 8 significant bits: outputs of magnitude 1 have an error of 2**-8, and gradients
    # are sums of such terms.
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=2**-6)
    pairs = zip(gradients(out, (q, k, v)), gradients(expected, (q, k, v)), strict=True)
    for grad, expected_grad in pairs:
        torch.testing.assert_close(grad.double(), expected_grad.double(), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("bound", [None, 0, 5])
@pytest.mark.parametrize("grouped", [False, True])
def test_varlen_attends_within_every_document_of_every_row(
    monkeypatch: pytest.MonkeyPatch, grouped: bool, bound: int | None
) -> None:
    """The kernel requires CUDA, so the test replaces it with SDPA applied to each document.

    Newer versions of the kernel accept fewer key-value heads than query heads.
    """

    def with_groups(q: Tensor, k: Tensor, v: Tensor, *rest: Any, enable_gqa: bool, **named: Any):  # type: ignore[no-untyped-def]
        group = q.shape[1] // k.shape[1]
        assert enable_gqa and group > 1
        k, v = (t.repeat_interleave(group, dim=1) for t in (k, v))
        return by_document(q, k, v, *rest, **named)

    def by_document(q: Tensor, k: Tensor, v: Tensor, borders: Tensor, *rest: Any, **named: Any):  # type: ignore[no-untyped-def]
        assert named == {"window_size": (-1, 0)} and borders.dtype == torch.int32
        assert rest[1] == rest[2] >= int(borders.diff().max())
        outputs = []
        assert (borders.diff() >= 0).all()
        for a, b in itertools.pairwise(borders.tolist()):
            qkv = [t[a:b].transpose(0, 1) for t in (q, k, v)]  # each (heads, tokens, head_dim)
            outputs.append(F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2], is_causal=True))
        return torch.cat(outputs, dim=1).transpose(0, 1)

    kernel_of: dict[bool, Any] = {False: by_document, True: with_groups}
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", kernel_of[grouped])
    positions = packed_positions()
    q, k, v = inputs(2)
    kernel = AttentionKernel("varlen")
    # The first document of a row may start before the row.
    n_segments = int((positions == 0).sum()) + int((positions[:, 0] > 0).sum())
    n_documents = None if bound is None else n_segments + bound
    mask = kernel.mask(positions, None, like=q, n_documents=n_documents)
    assert isinstance(mask, VarlenMask)
    # With a bound, the remaining documents are empty.
    assert len(mask.cu_seqlens) == (n_segments + 1 if bound is None else DOCUMENT_MULTIPLE + 1)
    expected = reference_attention(q, k, v, reference_mask(positions))
    torch.testing.assert_close(kernel(q, k, v, mask).double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("seq", [SEQ, 256])
def test_mask_of_a_subset_of_queries_equals_rows_of_the_full_mask(packed: bool, seq: int) -> None:
    """Queries and keys may be in any order, as under context parallelism."""
    positions = packed_positions()[:, :seq] if packed else None
    full = reference_mask(packed_positions() if packed else None)[:, :seq, :seq]
    keys = torch.randperm(seq, generator=torch.Generator().manual_seed(0))
    for queries in (torch.arange(40, 120), torch.cat([torch.arange(5), torch.arange(200, 250)])):
        expected = full[:, queries][:, :, keys].unsqueeze(1)
        local = None if positions is None else positions[:, queries]
        q = torch.zeros(2, len(queries), HEADS, HEAD_DIM)
        mask = AttentionKernel("sdpa").mask(local, queries, q, key_indices=keys)
        assert isinstance(mask, Tensor) and torch.equal(mask == 0, expected)
        assert (mask[~expected] == -torch.inf).all()


@pytest.mark.parametrize("seq", [SEQ, 256])
def test_flex_tiles_cover_all_visible_keys_and_full_tiles_have_no_hidden_key(seq: int) -> None:
    """Checked in sequence order and in the order of one of two context-parallel ranks."""
    positions = packed_positions()[:, :seq]
    indices = torch.arange(seq)
    quarter = seq // 4
    on_rank = torch.cat([indices[:quarter], indices[-quarter:]])
    for queries, keys in (
        (indices, indices),
        (on_rank, torch.cat([on_rank, indices[quarter:-quarter]])),
    ):
        starts = queries - positions[:, queries]
        tiles = block_mask(starts, queries, keys)
        exact = document_mask(starts, queries, keys)[:, 0]
        rows, columns = torch.arange(len(queries)), torch.arange(len(keys))
        for row in range(2):
            partial, full = (dense[row, 0] for dense in _dense(tiles))
            assert not (partial & full).any()
            visible = exact[row]
            covered = (partial | full)[rows // 128][:, columns // 128]
            assert not (visible & ~covered).any()
            assert visible[full[rows // 128][:, columns // 128]].all()
    # One document per row: one full tile below the diagonal, no tile above it.
    partial, full = _dense(block_mask(torch.zeros(1, seq, dtype=torch.int64), indices, indices))
    assert full.sum() == 1 and full[0, 0, 1, 0]
    assert not (partial | full).triu(1).any()


def test_tile_that_extends_beyond_the_last_key_is_masked_by_element() -> None:
    """Its queries see all keys in the tile, but the rest of the tile is not backed by keys."""
    queries = torch.arange(200, 328)
    for n_keys, expected in ((140, [True, False]), (256, [True, False]), (128, [True])):
        keys = torch.arange(n_keys)
        partial, full = _dense(block_mask(torch.zeros(1, 128, dtype=torch.int64), queries, keys))
        assert full.flatten().tolist() == expected
        assert (partial | full).all()


def _dense(mask: BlockMask) -> tuple[Tensor, Tensor]:
    """Return which tiles are partial and which are full, each bool (batch, 1, rows, columns)."""
    dense = []
    for counts, indices in (
        (mask.kv_num_blocks, mask.kv_indices),
        (mask.full_kv_num_blocks, mask.full_kv_indices),
    ):
        assert counts is not None and indices is not None
        listed = torch.arange(indices.shape[-1]) < counts.unsqueeze(-1)
        tiles = torch.zeros(indices.shape, dtype=torch.bool)
        dense.append(tiles.scatter(-1, indices.long(), listed))
    return dense[0], dense[1]


def test_auto_selects_sdpa_on_cpu_and_no_mask_for_single_document_rows() -> None:
    kernel = AttentionKernel("auto")
    q = torch.zeros(2, SEQ, 1, 1)
    assert kernel.mask(None, None, like=q) is None
    assert isinstance(kernel.mask(packed_positions(), None, like=q), Tensor)


@pytest.mark.parametrize(
    ("capability", "head_dim", "dtype", "complete", "expected"),
    [
        ((9, 0), 128, torch.bfloat16, True, "varlen"),
        ((9, 0), 128, torch.bfloat16, False, "flex"),
        ((8, 0), 128, torch.float32, True, "flex"),
        ((8, 9), 100, torch.bfloat16, True, "flex"),
        ((9, 0), 264, torch.bfloat16, True, "sdpa"),
        ((9, 0), 12, torch.bfloat16, True, "sdpa"),
        ((9, 0), 8, torch.bfloat16, True, "varlen"),
        ((9, 0), 8, torch.bfloat16, False, "sdpa"),
        ((7, 5), 128, torch.float32, True, "sdpa"),
    ],
)
def test_auto_selects_a_kernel_that_supports_gpu_head_size_and_dtype(
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int],
    head_dim: int,
    dtype: torch.dtype,
    complete: bool,
    expected: str,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    found = select_kernel("auto", head_dim, torch.device("cuda"), dtype, complete)
    assert found == expected


class OnCuda(Tensor):
    """A CPU tensor that claims to be on CUDA."""

    is_cuda = True


@pytest.mark.parametrize("head_dim", [16, 18, 256])
@pytest.mark.parametrize("packed", [False, True])
def test_sdpa_on_cuda_never_needs_the_math_kernel(
    monkeypatch: pytest.MonkeyPatch, head_dim: int, packed: bool
) -> None:
    """The memory-efficient kernel takes float32 and masks, but no enable_gqa or odd heads."""
    calls = []
    function = F.scaled_dot_product_attention

    def recorded(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        calls.append((q.shape[3] % 8, k.shape[1], v.shape[1], options["enable_gqa"]))
        return function(q, k, v, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", recorded)
    q, k, v = (torch.randn(2, SEQ, heads, head_dim) for heads in (HEADS, 2, 2))
    positions = packed_positions() if packed else None
    kernel = AttentionKernel("sdpa")
    mask = kernel.mask(positions, None, like=q)
    out = kernel(q.as_subclass(OnCuda), k.as_subclass(OnCuda), v.as_subclass(OnCuda), mask)
    assert calls == [(0, HEADS, HEADS, False)]
    expected = reference_attention(q, k, v, reference_mask(positions))
    torch.testing.assert_close(out.as_subclass(Tensor).double(), expected, rtol=0, atol=1e-5)
