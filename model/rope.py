"""Rotary position embedding, in real arithmetic and in float32.

Rotations are computed from the positions in each forward and never stored: no length limit, nothing
that a cast to bfloat16 could spoil, nothing for the meta device to forget. Pairs are Meta's,
elements 2i and 2i+1 of a head; Hugging Face pairs i with i + head_dim/2 and permutes wq and wk.
"""

import math

import torch
from torch import Tensor

from model.config import ModelConfig


def rope_frequencies(config: ModelConfig, device: torch.device | str | None = None) -> Tensor:
    """Angle in radians that each pair of a head turns by per token, fastest first.

    theta^(-2i/head_dim) (RoFormer, arXiv:2104.09864), slowed as Llama 3.1 publishes it
    (`apply_scaling` in Meta's llama-models): slow frequencies divided by the factor, fast ones
    kept, a linear blend in cycles per original context between them.

    Returns: (head_dim/2,) float32.
    """
    exponents = torch.arange(0, config.head_dim, 2, device=device).float() / config.head_dim
    frequencies = 1.0 / (config.rope_theta**exponents)  # (head_dim/2,)
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    cycles = scaling.original_max_seq_len * frequencies / (2 * math.pi)
    keep = (cycles - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    keep = keep.clamp(0.0, 1.0)  # 0: stretch fully, 1: leave alone
    return (1 - keep) * frequencies / scaling.factor + keep * frequencies


def rope_rotations(positions: Tensor, frequencies: Tensor) -> Tensor:
    """Cosine and sine of each position's angles, once a forward, shared by all layers.

    Args:
        positions: (batch, seq) integers, or (1, seq) where all rows agree.
        frequencies: (head_dim/2,) float32, radians per token.

    Returns: (batch, seq, head_dim/2, 2) float32, the cosine first.
    """
    angles = positions.unsqueeze(-1).float() * frequencies  # (batch, seq, head_dim/2)
    return torch.stack((angles.cos(), angles.sin()), dim=-1)


def apply_rope(x: Tensor, rotations: Tensor) -> Tensor:
    """Turn each pair (2i, 2i+1) of x by its position's angle; float32 inside, x's dtype outside.

    Args:
        x: (batch, seq, heads, head_dim), heads may be local.
        rotations: (batch or 1, seq, head_dim/2, 2).
    """
    rotations = rotations.unsqueeze(2)  # (batch, seq, 1, head_dim/2, 2)
    pairs = x.float().unflatten(-1, (-1, 2))  # (batch, seq, heads, head_dim/2, 2)
    if torch.compiler.is_compiling():  # Inductor has no complex numbers
        (cos, sin), (even, odd) = rotations.unbind(-1), pairs.unbind(-1)
        turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    else:  # the same in one kernel instead of six
        turned = torch.view_as_complex(pairs) * torch.view_as_complex(rotations)
        turned = torch.view_as_real(turned)  # (batch, seq, heads, head_dim/2, 2)
    return turned.flatten(-2).to(x.dtype)  # (batch, seq, heads, head_dim)
