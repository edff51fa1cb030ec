"""Stored moments are close to the values written and do not change when rewritten."""

import shutil

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from training import moments
from training.moments import BLOCK, FloatMoment, Int8Moment, Moment

CPU = torch.device("cpu")


def values(kind: str, signed: bool = True) -> Tensor:
    """Return typical moments: many magnitudes, zeros, tiny values, an incomplete last block."""
    generator = torch.Generator().manual_seed(0)
    size = 40 * BLOCK + 17
    normal = torch.randn(size, generator=generator)
    normal = normal if signed else normal.square()
    scale = {
        "normal": torch.ones(size),
        "many magnitudes": torch.logspace(-12, 0, size),
        "tiny": torch.full((size,), 1e-12),
        "with zeros": (torch.arange(size) // 100 % 2).float(),
        "zero": torch.zeros(size),
    }[kind]
    return normal * scale


KINDS = ["normal", "many magnitudes", "tiny", "with zeros", "zero"]


def int8(signed: bool, written: Tensor) -> Int8Moment:
    moment = Int8Moment(len(written), signed, CPU)
    moment.write(0, written)
    return moment


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("signed", [True, False])
def test_int8_write_of_values_just_read_changes_no_bit(kind: str, signed: bool) -> None:
    first = int8(signed, values(kind, signed))
    read = first.read(0, first.size)
    assert torch.equal(int8(signed, read).read(0, first.size), read)


def test_torchao_moment_shrinks_with_each_save_and_load() -> None:
    """The reason for Int8Moment: in half of the blocks the largest magnitude is negative."""
    from torchao.optim.subclass_8bit import OptimState8bit

    written = values("normal")[: 40 * BLOCK]
    moment, again = (OptimState8bit.zeros((40 * BLOCK,), signed=True) for _ in range(2))
    moment.copy_(written)
    again.copy_(moment.dequantize())
    assert (again.dequantize() != moment.dequantize()).float().mean() > 0.3


@pytest.mark.parametrize("signed", [True, False])
def test_int8_error_is_within_half_a_level_distance(signed: bool) -> None:
    """The largest distance of levels is 0.9/64 in [-1, 1] and 0.9/128 in [0, 1].

    The level next to 1.0 is half as far away, as levels are the midpoints of their intervals.
    """
    written = values("normal", signed)
    moment = int8(signed, written)
    largest = torch.nn.functional.pad(written, (0, -len(written) % BLOCK))
    largest = largest.view(-1, BLOCK).abs().amax(dim=1).repeat_interleave(BLOCK)[: len(written)]
    error = (moment.read(0, moment.size) - written).abs() / largest
    half = 0.9 / (64 if signed else 128) / 2
    assert 0.5 * half < error.max() <= half * (1 + 1e-5)  # plus float32 rounding


@pytest.mark.parametrize("signed", [True, False])
def test_int8_keeps_small_values_in_blocks_with_large_ones(signed: bool) -> None:
    """Each decade has fewer levels towards zero: 8 signed ones in the decade below 1e-4."""
    written = torch.tensor([1.0, 1e-1, 1e-2, 1e-3, 1e-4, 0.0]).repeat(BLOCK)[:BLOCK]
    found = int8(signed, written).read(0, BLOCK)
    assert torch.equal(found == 0, written == 0)
    assert ((found - written).abs() <= 0.9 / 8 * written).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_float_moment_rounds_to_nearest(dtype: torch.dtype) -> None:
    written = values("many magnitudes")
    moment = FloatMoment(len(written), dtype, CPU)
    moment.write(0, written)
    assert torch.equal(moment.read(0, len(written)), written.to(dtype).float())


@pytest.mark.parametrize("make", ["int8", "bf16"])
def test_chunks_equal_whole_moment(make: str) -> None:
    written = values("normal")
    size = len(written)

    def empty() -> Moment:
        if make == "int8":
            return Int8Moment(size, True, CPU)
        return FloatMoment(size, torch.bfloat16, CPU)

    full, chunked = empty(), empty()
    full.write(0, written)
    for start in range(0, size, 8 * BLOCK):
        chunked.write(start, written[start : start + 8 * BLOCK])
        stop = min(start + 8 * BLOCK, size)
        assert torch.equal(chunked.read(start, stop), full.read(0, size)[start:stop])


@pytest.mark.parametrize("size", [0, 1, BLOCK - 1])
def test_shard_smaller_than_block(size: int) -> None:
    moment = Int8Moment(size, True, CPU)
    assert torch.equal(moment.read(0, size), torch.zeros(size))
    moment.write(0, torch.full((size,), -3.0))
    assert torch.equal(moment.read(0, size), torch.full((size,), -3.0))


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler here")
def test_compiled_functions_equal_eager_ones_with_at_most_two_graphs_each() -> None:
    """Each shard has a different number of blocks; the second graph has a dynamic shape."""
    torch._dynamo.reset()
    counters.clear()
    levels = moments._levels(True, CPU)
    for blocks in (40, 8, 5, 17, 40, 3):
        given = values("many magnitudes")[: blocks * BLOCK].view(blocks, BLOCK)
        codes, scales = moments._compiled(moments._quantize)(given, levels)
        expected_codes, expected_scales = moments._quantize(given, levels)
        assert torch.equal(codes, expected_codes) and torch.equal(scales, expected_scales)
        values_again = moments._compiled(moments._dequantize)(codes, scales, levels)
        assert torch.equal(values_again, moments._dequantize(codes, scales, levels))
    assert counters["stats"]["unique_graphs"] == 4  # two per function
