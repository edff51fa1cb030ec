"""Storage formats for the AdamW moments of one parameter's local shard.

The optimizer reads a chunk as float32, updates it and writes it back. Every format is idempotent:
writing values that were just read changes no bit. Checkpoints can therefore hold float32 values
only, and a run that loads one continues bit for bit.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from model.compiled import compile_for_any_shape

BLOCK = 256  # values per scale
MIN_SCALE = 1e-12


class FloatMoment:
    """Moment stored in a floating-point dtype. Reading float32 values returns a view."""

    def __init__(self, size: int, dtype: torch.dtype, device: torch.device) -> None:
        self.values = torch.zeros(size, dtype=dtype, device=device)  # (size)

    def read(self, start: int, stop: int) -> Tensor:
        """Return the values from `start` to `stop` as float32."""
        return self.values[start:stop].float()

    def write(self, start: int, values: Tensor) -> None:
        """Store float32 values from index `start` on."""
        self.values[start : start + len(values)].copy_(values)


class Int8Moment:
    """Moment with one byte per value and one float32 scale per block (arXiv:2110.02861).

    A byte is an index into a map of 256 levels in [-1, 1] (`signed`) or [0, 1], which are dense
    near zero. Map and block size are torchao's. The scale is the block's value of largest
    magnitude, sign included, so that this value is exactly 1.0 in the map. torchao's optimizer
    scales by the magnitude; its map lacks -1.0, so each save and load would shrink half of the
    blocks by 0.7%.
    """

    def __init__(self, size: int, signed: bool, device: torch.device) -> None:
        blocks = -(-size // BLOCK)
        self.size = size
        self.levels = _levels(signed, device)  # (256), shared by all moments
        self.scales = torch.zeros(blocks, device=device)  # (blocks)
        zero = int((self.levels == 0).nonzero())
        self.codes = torch.full((blocks, BLOCK), zero, dtype=torch.uint8, device=device)

    def read(self, start: int, stop: int) -> Tensor:
        """Return the values from `start`, a multiple of `BLOCK`, to `stop` as float32."""
        blocks = slice(start // BLOCK, -(-stop // BLOCK))
        values = _run(_dequantize, self.codes[blocks], self.scales[blocks], self.levels)
        return values.view(-1)[: stop - start]

    def write(self, start: int, values: Tensor) -> None:
        """Store float32 values from index `start` on; only the shard's last block may be short."""
        values = F.pad(values, (0, -len(values) % BLOCK)).view(-1, BLOCK)
        blocks = slice(start // BLOCK, start // BLOCK + len(values))
        self.codes[blocks], self.scales[blocks] = _run(_quantize, values, self.levels)


Moment = FloatMoment | Int8Moment


def _dequantize(codes: Tensor, scales: Tensor, levels: Tensor) -> Tensor:
    """Return float32 values (blocks, 256) from codes (blocks, 256) and scales (blocks)."""
    return levels[codes.int()] * scales.unsqueeze(1)


def _quantize(values: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    """Return codes of the nearest levels (blocks, 256) and scales (blocks) of the values."""
    highest, lowest = values.amax(dim=1), values.amin(dim=1)
    scales = torch.where(highest >= -lowest, highest, lowest)
    scales = torch.where(scales.abs() < MIN_SCALE, MIN_SCALE, scales)
    midpoints = (levels[1:] + levels[:-1]) / 2
    codes = torch.bucketize(values / scales.unsqueeze(1), midpoints, out_int32=True)
    return codes.to(torch.uint8), scales


_compiled = cache(compile_for_any_shape)


def _run(function: Callable[..., Any], *arguments: Tensor) -> Any:
    """Call a function of tensors, on GPUs compiled: one kernel instead of ten passes."""
    return (_compiled(function) if arguments[0].is_cuda else function)(*arguments)


@cache
def _levels(signed: bool, device: torch.device) -> Tensor:
    """Return the 256 levels in ascending order."""
    from torchao.optim.quant_utils import create_dynamic_map

    return torch.tensor(create_dynamic_map(signed), dtype=torch.float32, device=device)
