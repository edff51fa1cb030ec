"""Every kernel computes the same attention: against a softmax over visible keys, written out."""

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from model.attention import AttentionKernel, Documents, block_mask, document_mask

LENGTHS = (13, 1, 29, 5, 130, 100)  # of the documents in a row; tiles of 128 cut two of them
SEQ, HEADS, HEAD_DIM = sum(LENGTHS), 6, 16

cuda = pytest.param(
    "cuda",
    marks=[
        pytest.mark.gpu,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    ],
)


def packed_positions() -> Tensor:
    """(batch, seq): two rows of documents, the second from the middle of one on."""
    whole = torch.cat([torch.arange(length) for length in LENGTHS])
    return torch.stack([whole, torch.cat([whole[20:], torch.arange(20)])])


def inputs(kv_heads: int, device: str = "cpu", seq: int = SEQ) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    q, k, v = (
        torch.randn(2, seq, heads, HEAD_DIM, generator=generator).to(device).requires_grad_()
        for heads in (HEADS, kv_heads, kv_heads)
    )
    return q, k, v


def whole_mask(positions: Tensor | None) -> Tensor:
    """(batch, seq, seq) who sees whom, from the documents' numbers."""
    if positions is None:
        return torch.ones(1, SEQ, SEQ, dtype=torch.bool).tril()
    starts = positions == 0
    starts[:, 0] = True
    document = starts.cumsum(dim=1)
    return (document.unsqueeze(2) == document.unsqueeze(1)).tril()


def written_out(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Softmax over visible keys in float64; query head i reads key-value head i // group."""
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


def gradients(out: Tensor, of: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Of a sum with other weights for every element."""
    weights = torch.linspace(-1, 1, out.numel(), device=out.device).reshape(out.shape)
    return torch.autograd.grad((out * weights).sum(), of)


@pytest.mark.parametrize("device", ["cpu", cuda])
@pytest.mark.parametrize("kv_heads", [1, 2, 6])
@pytest.mark.parametrize("packed", [False, True])
def test_sdpa_equals_written_out_softmax(device: str, kv_heads: int, packed: bool) -> None:
    positions = packed_positions().to(device) if packed else None
    q, k, v = inputs(kv_heads, device)
    kernel = AttentionKernel("sdpa")
    out = kernel(q, k, v, kernel.mask(positions, None, like=q))
    expected = written_out(q, k, v, whole_mask(positions).to(device))
    # float32 against float64, sums of up to 278 terms of size 1.
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=1e-5)
    for own, other in zip(gradients(out, (q, k, v)), gradients(expected, (q, k, v)), strict=True):
        torch.testing.assert_close(own, other, rtol=0, atol=1e-4)


@pytest.mark.parametrize("device", ["cpu", cuda])
def test_flex_equals_written_out_softmax(device: str) -> None:
    """Its compiled kernel, forward; backward where there is one, which is not on CPUs."""
    positions = packed_positions().to(device)
    q, k, v = inputs(2, device)
    kernel = AttentionKernel("flex")
    mask = kernel.mask(positions, None, like=q)
    assert isinstance(mask, BlockMask)
    if device == "cpu":
        q, k, v = q.detach(), k.detach(), v.detach()
    out = kernel(q, k, v, mask)
    expected = written_out(q, k, v, whole_mask(positions).to(device))
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=1e-5)
    if device == "cuda":
        both = zip(gradients(out, (q, k, v)), gradients(expected, (q, k, v)), strict=True)
        for own, other in both:
            torch.testing.assert_close(own, other, rtol=0, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("choice", ["sdpa", "flex", "varlen", "auto"])
def test_kernels_agree_in_bf16_on_packed_batches(choice: str) -> None:
    positions = packed_positions().cuda()
    q, k, v = (t.detach().bfloat16().requires_grad_() for t in inputs(2, "cuda"))
    kernel = AttentionKernel(choice)
    out = kernel(q, k, v, kernel.mask(positions, None, like=q))
    expected = written_out(q, k, v, whole_mask(positions).cuda())
    # bf16 keeps 8 bits: outputs of size 1 are off by 2**-8, gradients are sums of such.
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=2**-6)
    for own, other in zip(gradients(out, (q, k, v)), gradients(expected, (q, k, v)), strict=True):
        torch.testing.assert_close(own.double(), other.double(), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("grouped", [False, True])
def test_varlen_gets_every_document_of_every_row(
    monkeypatch: pytest.MonkeyPatch, grouped: bool
) -> None:
    """The kernel itself runs on CUDA alone: in its place the same sum, document by document.

    Newer versions of it take fewer heads of keys and values than of queries.
    """

    def with_groups(q: Tensor, k: Tensor, v: Tensor, *rest: Any, enable_gqa: bool, **named: Any):  # type: ignore[no-untyped-def]
        group = q.shape[1] // k.shape[1]
        assert enable_gqa and group > 1
        k, v = (t.repeat_interleave(group, dim=1) for t in (k, v))
        return by_document(q, k, v, *rest, **named)

    def by_document(q: Tensor, k: Tensor, v: Tensor, borders: Tensor, *rest: Any, **named: Any):  # type: ignore[no-untyped-def]
        assert named == {"window_size": (-1, 0)} and borders.dtype == torch.int32
        assert rest[1] == rest[2] >= int(borders.diff().max())
        pieces = []
        for a, b in itertools.pairwise(borders.tolist()):
            own = [t[a:b].transpose(0, 1) for t in (q, k, v)]  # each (heads, tokens, head_dim)
            pieces.append(F.scaled_dot_product_attention(own[0], own[1], own[2], is_causal=True))
        return torch.cat(pieces, dim=1).transpose(0, 1)

    kernel_of = {False: by_document, True: with_groups}
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", kernel_of[grouped])
    positions = packed_positions()
    q, k, v = inputs(2)
    kernel = AttentionKernel("varlen")
    mask = kernel.mask(positions, None, like=q)
    assert isinstance(mask, Documents)
    expected = written_out(q, k, v, whole_mask(positions))
    torch.testing.assert_close(kernel(q, k, v, mask).double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("seq", [SEQ, 256])
def test_masks_of_some_queries_are_rows_of_the_whole_mask(packed: bool, seq: int) -> None:
    """Queries and keys in any order, as context parallelism deals them."""
    positions = packed_positions()[:, :seq] if packed else None
    whole = whole_mask(packed_positions() if packed else None)[:, :seq, :seq]
    keys = torch.randperm(seq, generator=torch.Generator().manual_seed(0))
    for own in (torch.arange(40, 120), torch.cat([torch.arange(5), torch.arange(200, 250)])):
        expected = whole[:, own][:, :, keys].unsqueeze(1)
        local = None if positions is None else positions[:, own]
        q = torch.zeros(2, len(own), HEADS, HEAD_DIM)
        mask = AttentionKernel("sdpa").mask(local, own, q, key_places=keys)
        assert isinstance(mask, Tensor) and torch.equal(mask == 0, expected)
        assert (mask[~expected] == -torch.inf).all()


@pytest.mark.parametrize("seq", [SEQ, 256])
def test_tiles_of_flex_skip_nothing_that_is_seen_and_mask_all_that_is_not(seq: int) -> None:
    """Against the written-out mask, in its own order and in that of two context-parallel ranks."""
    positions = packed_positions()[:, :seq]
    places = torch.arange(seq)
    quarter = seq // 4
    dealt = torch.cat([places[:quarter], places[-quarter:]])
    for own, keys in ((places, places), (dealt, torch.cat([dealt, places[quarter:-quarter]]))):
        begins = own - positions[:, own]
        tiles = block_mask(begins, own, keys)
        exact = document_mask(begins, own, keys)[:, 0]
        rows, columns = torch.arange(len(own)), torch.arange(len(keys))
        for row in range(2):
            partial, whole = (dense[row, 0] for dense in _dense(tiles))
            assert not (partial & whole).any()
            seen = exact[row]
            by_tile = (partial | whole)[rows // 128][:, columns // 128]
            assert not (seen & ~by_tile).any()
            assert seen[whole[rows // 128][:, columns // 128]].all()
    # One document a row: of two or three tiles, one lies whole below the diagonal, none above.
    partial, whole = _dense(block_mask(torch.zeros(1, seq, dtype=torch.int64), places, places))
    assert whole.sum() == 1 and whole[0, 0, 1, 0]
    assert not (partial | whole).triu(1).any()


def test_a_tile_that_reaches_beyond_the_keys_is_masked_by_element() -> None:
    """Though its queries see all the keys in it: the rest of the tile are none."""
    queries = torch.arange(200, 328)
    for n_keys, expected in ((140, [True, False]), (256, [True, False]), (128, [True])):
        keys = torch.arange(n_keys)
        partial, whole = _dense(block_mask(torch.zeros(1, 128, dtype=torch.int64), queries, keys))
        assert whole.flatten().tolist() == expected
        assert (partial | whole).all()


def _dense(mask: BlockMask) -> tuple[Tensor, Tensor]:
    """Which tiles are masked by element, which are whole; each bool (batch, 1, rows, columns)."""
    found = []
    for counts, indices in (
        (mask.kv_num_blocks, mask.kv_indices),
        (mask.full_kv_num_blocks, mask.full_kv_indices),
    ):
        assert counts is not None and indices is not None
        listed = torch.arange(indices.shape[-1]) < counts.unsqueeze(-1)
        tiles = torch.zeros(indices.shape, dtype=torch.bool)
        found.append(tiles.scatter(-1, indices.long(), listed))
    return found[0], found[1]


def test_auto_takes_sdpa_on_cpu_and_no_mask_where_rows_are_whole() -> None:
    kernel = AttentionKernel("auto")
    q = torch.zeros(2, SEQ, 1, 1)
    assert kernel.mask(None, None, like=q) is None
    assert isinstance(kernel.mask(packed_positions(), None, like=q), Tensor)
