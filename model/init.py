"""Counter-based weight initialization: the same values on every mesh, device and process count.

Each element is a function of the seed, the parameter name and its linear index in the global
tensor. The arithmetic is on integers up to one exact conversion to float32 and one multiplication,
which all devices round alike. Any change here changes every new run and requires a new VERSION.
"""

import hashlib
import math
import struct
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from model.config import ModelConfig

VERSION = "llamesh-init-1"
BASE_STD = 0.02

LocalBlock = Callable[[Tensor], tuple[Tensor, Sequence[int]]]
"""Maps a parameter to its local block and the offsets of that block in the global tensor."""

# Elements filled at a time. Temporaries are a few int64 tensors of this size; on CPU they should
# fit in the cache.
_CHUNK_CPU, _CHUNK_DEVICE = 2**16, 2**22

_MASK64 = 2**64 - 1
_GAMMA = 0x9E3779B97F4A7C15
_MIX = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
_LANES = 0x0000FFFF0000FFFF
_WORDS = 3  # a normal value sums twelve 16-bit uniforms: three words with four each
_MEAN_OF_SUM = 12 * 0xFFFF // 2
_STD_OF_SUM = math.sqrt(2.0**32 - 1)  # of twelve variances (65536² - 1) / 12


def parameter_std(name: str, config: ModelConfig) -> float | None:
    """Return the standard deviation of a parameter's initial values, None for ones (norms).

    0.02, and 0.02 / sqrt(2 · n_layers) for the two projections of a layer that add to the residual
    stream, so that its variance does not grow with depth (GPT-2's paper, section 2.3; Megatron-LM,
    arXiv:1909.08053, section 4).

    Raises:
        ValueError: The name does not belong to a Llama parameter.
    """
    kind = name.removesuffix(".weight").rpartition(".")[2]
    if kind in ("norm", "attention_norm", "ffn_norm"):
        return None
    if kind in ("wo", "w2"):
        return BASE_STD / math.sqrt(2 * config.n_layers)
    if kind in ("tok_embeddings", "output", "wq", "wk", "wv", "w1", "w3"):
        return BASE_STD
    remedy = "add it to model.init.parameter_std"
    raise ValueError(f"parameter {name} has no initialization rule; {remedy}")


def complete_block(parameter: Tensor) -> tuple[Tensor, Sequence[int]]:
    """Return a parameter that is not sharded, and its offsets: 0 in each dim."""
    return parameter, [0] * parameter.dim()


@torch.no_grad()
def initialize(
    model: nn.Module, config: ModelConfig, seed: int, local_block: LocalBlock = complete_block
) -> None:
    """Fill every parameter in place.

    Args:
        model: Parameters have their global names and shapes; their values may be shards.
        config: Configuration of the model.
        seed: Any integer.
        local_block: Returns the part of a parameter that this process holds, and its offsets.
    """
    for name, parameter in model.named_parameters():
        local, offsets = local_block(parameter)
        std = parameter_std(name, config)
        if std is None:
            local.fill_(1.0)
        else:
            fill_block(local, name, parameter.shape, offsets, std, seed)


def fill_block(
    block: Tensor, name: str, shape: Sequence[int], offsets: Sequence[int], std: float, seed: int
) -> None:
    """Fill a block of a parameter with its initial values, normal with mean 0.

    Normal values are approximated by sums of twelve uniform ones (Irwin-Hall), bounded by 6 std.

    Args:
        name: Name of the parameter in the model.
        shape: Shape of the complete parameter.
        offsets: Index of the block's first element, per dim.
        std: Standard deviation.
        seed: Seed of the run.
    """
    strides = [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]  # of a contiguous tensor
    # A hash makes similar seeds and names unrelated.
    digest = hashlib.blake2b(f"{VERSION}\n{seed}\n{name}".encode(), digest_size=8).digest()
    # The factor from sums to values is rounded to float32 here and not on the device.
    (scale,) = struct.unpack("<f", struct.pack("<f", std / _STD_OF_SUM))
    _fill(block, offsets, strides, int.from_bytes(digest, "little"), scale)


def _fill(
    block: Tensor, offsets: Sequence[int], strides: Sequence[int], key: int, scale: float
) -> None:
    """Fill a block in place, splitting it in halves until they are small."""
    if block.numel() == 0:
        return
    if block.numel() > (_CHUNK_CPU if block.device.type == "cpu" else _CHUNK_DEVICE):
        dim = next(dim for dim, size in enumerate(block.shape) if size > 1)
        middle = block.shape[dim] // 2
        first, second = block.tensor_split([middle], dim)
        further = [offset + middle * (d == dim) for d, offset in enumerate(offsets)]
        _fill(first, offsets, strides, key, scale)
        _fill(second, further, strides, key, scale)
        return
    index = torch.zeros((), dtype=torch.int64, device=block.device)
    for size, offset, stride in zip(block.shape, offsets, strides, strict=True):
        indices = torch.arange(offset, offset + size, device=block.device)  # (size,)
        index = index.unsqueeze(-1) + indices * stride  # (…, size)
    block.copy_(_normal_sums(index, key).float().mul_(scale))


def _normal_sums(index: Tensor, key: int) -> Tensor:
    """Return centered sums of twelve 16-bit uniforms per index: int64, |sum| < 2**19."""
    first = index * _signed(_WORDS * _GAMMA)
    total = torch.zeros_like(index)
    for word in range(_WORDS):
        random = _mix(first + _signed(key + (word + 1) * _GAMMA))
        # Each 32-bit lane accumulates six uniforms and cannot overflow.
        total += random & _LANES
        total += (random >> 16) & _LANES
    return (total & 0xFFFFFFFF) + (total >> 32) - _MEAN_OF_SUM


def _mix(state: Tensor) -> Tensor:
    """Apply the output function of splitmix64 (Steele, Lea, Flood, OOPSLA 2014), in place.

    int64 wraps around like uint64; a logical shift is an arithmetic shift with masked sign bits.
    """
    for shift, factor in _MIX:
        state ^= (state >> shift) & (_MASK64 >> shift)
        state *= _signed(factor)
    state ^= (state >> 31) & (_MASK64 >> 31)
    return state


def _signed(value: int) -> int:
    """Return the int64 with the same low 64 bits."""
    value &= _MASK64
    return value - 2**64 if value >= 2**63 else value
