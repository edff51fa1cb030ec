"""A moment of AdamW at rest: one parameter's local shard, in fewer bits than it is computed with.

The optimizer reads a piece as float32, works on it and writes it back. Every format here is a
projection: writing what was just read changes nothing. So a checkpoint holds float32 values alone,
and the run that loads it goes on bit for bit.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 256  # values that share a scale
TINY = 1e-12  # the smallest scale


class FloatMoment:
    """Values in a floating-point type; float32 ones are read as they lie, without a copy."""

    def __init__(self, size: int, dtype: torch.dtype, device: torch.device) -> None:
        self.values = torch.zeros(size, dtype=dtype, device=device)  # (size)

    def read(self, start: int, stop: int) -> Tensor:
        """The values from `start` to `stop`, float32."""
        return self.values[start:stop].float()

    def write(self, start: int, values: Tensor) -> None:
        """Puts float32 values in the place that begins at `start`."""
        self.values[start : start + len(values)].copy_(values)


class Int8Moment:
    """A byte a value and a float32 scale a block: 8-bit optimizer states (arXiv:2110.02861).

    A byte names one of 256 numbers in [-1, 1] (`signed`) or [0, 1], which lie dense near zero: the
    map is torchao's, as is the size of a block. The scale is the block's largest value with its
    sign, so that this value is exactly 1.0 in the map. torchao's own optimizer scales by the
    magnitude; its map has no -1.0, so each save and load would shrink half of the blocks by 0.7%.
    """

    def __init__(self, size: int, signed: bool, device: torch.device) -> None:
        blocks = -(-size // BLOCK)
        self.size = size
        self.levels = _levels(signed, device)  # (256), shared by all moments
        self.scales = torch.zeros(blocks, device=device)  # (blocks)
        zero = int((self.levels == 0).nonzero())
        self.codes = torch.full((blocks, BLOCK), zero, dtype=torch.uint8, device=device)

    def read(self, start: int, stop: int) -> Tensor:
        """The values from `start`, a multiple of `BLOCK`, to `stop`, float32."""
        blocks = slice(start // BLOCK, -(-stop // BLOCK))
        values = _run(_widen, self.codes[blocks], self.scales[blocks], self.levels)
        return values.view(-1)[: stop - start]

    def write(self, start: int, values: Tensor) -> None:
        """Puts float32 values in the place from `start`; the shard's last block may be short."""
        values = F.pad(values, (0, -len(values) % BLOCK)).view(-1, BLOCK)
        blocks = slice(start // BLOCK, start // BLOCK + len(values))
        self.codes[blocks], self.scales[blocks] = _run(_narrow, values, self.levels)


Moment = FloatMoment | Int8Moment


def _widen(codes: Tensor, scales: Tensor, levels: Tensor) -> Tensor:
    """Codes (blocks, 256) and scales (blocks) to float32 values (blocks, 256)."""
    return levels[codes.int()] * scales.unsqueeze(1)


def _narrow(values: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    """Values (blocks, 256) to the codes of the nearest levels, and the scales (blocks)."""
    highest, lowest = values.amax(dim=1), values.amin(dim=1)
    scales = torch.where(highest >= -lowest, highest, lowest)
    scales = torch.where(scales.abs() < TINY, TINY, scales)
    middles = (levels[1:] + levels[:-1]) / 2
    codes = torch.bucketize(values / scales.unsqueeze(1), middles, out_int32=True)
    return codes.to(torch.uint8), scales


def _run(function: Callable[..., Any], *arguments: Tensor) -> Any:
    """Calls a function of tensors; on GPUs compiled, one kernel instead of ten passes."""
    return (_compiled(function) if arguments[0].is_cuda else function)(*arguments)


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiled twice: for the first number of blocks, then for every other."""
    return torch.compile(function, fullgraph=True)


@cache
def _levels(signed: bool, device: torch.device) -> Tensor:
    """The 256 numbers that a byte names, ascending."""
    from torchao.optim.quant_utils import create_dynamic_map

    return torch.tensor(create_dynamic_map(signed), dtype=torch.float32, device=device)
