"""The two layouts of wq and wk: Meta turns elements 2i and 2i+1 of a head together, Hugging Face
i and i + head_dim/2. Rows of a head change places between them; no value changes.
"""

from torch import Tensor


def to_halves(rows: Tensor, head_dim: int) -> Tensor:
    """Meta's order to Hugging Face's: (heads · head_dim, dim) -> the same, heads maybe a few."""
    pairs = rows.unflatten(0, (-1, head_dim // 2, 2))  # (heads, pair, member, dim)
    return pairs.transpose(1, 2).reshape(rows.shape)


def to_pairs(rows: Tensor, head_dim: int) -> Tensor:
    """Hugging Face's order to Meta's: (heads · head_dim, dim) -> the same, heads maybe a few."""
    halves = rows.unflatten(0, (-1, 2, head_dim // 2))  # (heads, member, pair, dim)
    return halves.transpose(1, 2).reshape(rows.shape)
