"""Rotary position embedding in float32, with real or complex arithmetic.

Rotations are computed from the positions in each forward and never stored: there is no maximum
length, and no buffer that a cast to bfloat16 or the meta device could change. As in Meta's code, a
pair is elements 2i and 2i+1 of a head; Hugging Face pairs i with i + head_dim/2 and permutes wq
and wk accordingly.
"""

import math

import torch
from torch import Tensor

from model.config import ModelConfig


def rope_frequencies(config: ModelConfig, device: torch.device | str | None = None) -> Tensor:
    """Return the rotation of each pair of a head per token in radians, highest frequency first.

    theta^(-2i/head_dim) (RoFormer, arXiv:2104.09864), scaled as in Llama 3.1 (`apply_scaling` in
    Meta's llama-models): low frequencies are divided by the factor, high ones unchanged, and those
    between interpolated linearly in cycles per original context.

    Returns: (head_dim/2,) float32.
    """
    exponents = torch.arange(0, config.head_dim, 2, device=device).float() / config.head_dim
    frequencies = 1.0 / (config.rope_theta**exponents)  # (head_dim/2,)
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    cycles = scaling.original_max_seq_len * frequencies / (2 * math.pi)
    keep = (cycles - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    keep = keep.clamp(0.0, 1.0)  # 1: unchanged, 0: divided by the factor
    return (1 - keep) * frequencies / scaling.factor + keep * frequencies


def rope_rotations(positions: Tensor, frequencies: Tensor) -> Tensor:
    """Return cosine and sine of each position's angles, once per forward for all layers.

    Args:
        positions: (batch, seq) integers, or (1, seq) if they are equal in all rows.
        frequencies: (head_dim/2,) float32, radians per token.

    Returns: (batch, seq, head_dim/2, 2) float32, cosine first.
    """
    angles = positions.unsqueeze(-1).float() * frequencies  # (batch, seq, head_dim/2)
    return torch.stack((angles.cos(), angles.sin()), dim=-1)


def apply_rope(x: Tensor, rotations: Tensor) -> Tensor:
    """Rotate each pair (2i, 2i+1) of x by its position's angle, in float32; return x's dtype.

    Args:
        x: (batch, seq, heads, head_dim); the number of heads may be local.
        rotations: (batch or 1, seq, head_dim/2, 2).
    """
    rotations = rotations.unsqueeze(2)  # (batch, seq, 1, head_dim/2, 2)
    pairs = x.float().unflatten(-1, (-1, 2))  # (batch, seq, heads, head_dim/2, 2)
    if torch.compiler.is_compiling():  # Inductor does not support complex numbers
        (cos, sin), (even, odd) = rotations.unbind(-1), pairs.unbind(-1)
        rotated = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    else:  # the same in one kernel instead of six
        product = torch.view_as_complex(pairs) * torch.view_as_complex(rotations)
        rotated = torch.view_as_real(product)  # (batch, seq, heads, head_dim/2, 2)
    return rotated.flatten(-2).to(x.dtype)  # (batch, seq, heads, head_dim)
