"""Shape of a Llama 3 model: the configuration group `model`.

Imports nothing heavy: every program reads it before it knows whether it needs torch.
"""

import dataclasses
from typing import Annotated, Literal, NamedTuple

from annotated_types import Ge, Gt

from model.config_base import FREE, ConfigSection, PositiveInt, ResumePolicy

WEIGHTS = ResumePolicy("forbidden", "the shape of the weights", on_load=True)
FUNCTION = ResumePolicy("override", "the function computed from the same weights")
MAX_DIVISOR = 1024  # in a message; no published model has more heads
Size = Annotated[int, Ge(1), WEIGHTS]


def varlen_supports(head_dim: int, capability: tuple[int, int]) -> bool:
    """Return whether FlashAttention's kernel for documents can train a head size on a GPU.

    The bounds are in mha_varlen_fwd (aten/src/ATen/native/transformers/cuda/flash_attn); the
    backward of 193 to 224 elements needs more shared memory than sm_86, sm_89 and sm_120 have.
    """
    has_backward = capability in ((8, 0), (9, 0), (10, 0), (10, 3)) or not 192 < head_dim <= 224
    return head_dim % 8 == 0 and head_dim <= 256 and has_backward


def flex_head_dims(capability: tuple[int, int]) -> tuple[int, int]:
    """Return the smallest and the largest head size that FlexAttention can train on a GPU.

    The smallest is in torch/_inductor/kernel/flex/flex_attention.py. Above 128 elements a tile has
    256, and the backward in 16 bits needs 112 KiB of shared memory, but sm_86, sm_89 and sm_12x
    have 99 KiB. In float32 128 elements need 80 KiB, but Turing has 64 KiB. Above 256 the tiles do
    not fit on any GPU.
    """
    if capability < (8, 0):
        return 16, 64
    return 16, 128 if capability in ((8, 6), (8, 9)) or capability >= (12, 0) else 256


def attention_kernel(
    choice: str, head_dim: int, capability: tuple[int, int] | None, is_16_bit: bool, complete: bool
) -> str:
    """Return `choice`, or for `auto` the fastest kernel that supports documents on a device.

    Args:
        capability: Compute capability of the GPU; None on CPU.
        complete: Keys are the tokens of the queries, not gathered from other ranks.
    """
    if choice != "auto":
        return choice
    if capability is None or capability < (8, 0):
        return "sdpa"
    if complete and is_16_bit and varlen_supports(head_dim, capability):
        return "varlen"
    smallest, largest = flex_head_dims(capability)
    return "flex" if smallest <= head_dim <= largest else "sdpa"


class ModelPart(NamedTuple):
    """Consecutive layers of a model, with the embedding before and the head after them or not."""

    layers: range
    has_embedding: bool
    has_head: bool


@dataclasses.dataclass(frozen=True)
class RopeScaling(ConfigSection):
    """Llama 3.1's scaling of the low RoPE frequencies.

    A wavelength (in tokens) above `original_max_seq_len / low_freq_factor` is stretched by
    `factor`, one below `original_max_seq_len / high_freq_factor` is unchanged, and one in between
    is interpolated. `factor` is 8 in Llama 3.1 and 32 in Llama 3.2.

    Raises:
        ValueError: `high_freq_factor` is not above `low_freq_factor`.
    """

    factor: Annotated[float, Ge(1)]
    low_freq_factor: Annotated[float, Gt(0)] = 1.0
    high_freq_factor: Annotated[float, Gt(0)] = 4.0
    original_max_seq_len: PositiveInt = 8192

    def __post_init__(self) -> None:
        if not self.high_freq_factor > self.low_freq_factor:
            raise ValueError(
                f"model.rope_scaling.high_freq_factor={self.high_freq_factor} is not above "
                f"model.rope_scaling.low_freq_factor={self.low_freq_factor}; use "
                "model.rope_scaling.high_freq_factor=4 with model.rope_scaling.low_freq_factor=1"
            )


@dataclasses.dataclass(frozen=True)
class ModelConfig(ConfigSection):
    """A Llama 3 model. Sizes count elements; `max_seq_len` counts tokens.

    `attention` selects the attention kernel; `auto` takes the fastest that supports the device and
    the mask.

    Raises:
        ValueError: the head counts do not divide each other or `dim`.
    """

    name: Annotated[str, FREE]
    dim: Size
    n_layers: Size
    n_heads: Size
    n_kv_heads: Size
    ffn_dim: Size
    vocab_size: Size
    norm_eps: Annotated[float, Gt(0), FUNCTION] = 1e-5
    rope_theta: Annotated[float, Gt(1), FUNCTION] = 500000.0
    rope_scaling: Annotated[RopeScaling | None, FUNCTION] = None
    tie_embeddings: Annotated[bool, WEIGHTS] = False
    max_seq_len: Annotated[int, Ge(1), FREE] = 8192
    attention: Annotated[Literal["auto", "sdpa", "flex", "varlen"], FREE] = "auto"

    @property
    def head_dim(self) -> int:
        """Elements of one attention head."""
        return self.dim // self.n_heads

    def __post_init__(self) -> None:
        if min(self.n_heads, self.n_kv_heads) < 1:
            return  # reported by the bounds of the fields
        errors = []
        if self.n_heads % self.n_kv_heads:
            candidates = range(1, min(self.n_heads, MAX_DIVISOR) + 1)
            *most, last = [str(n) for n in candidates if self.n_heads % n == 0]
            divisors = f"{', '.join(most)} or {last}" if most else last
            errors.append(
                f"model.n_heads={self.n_heads} is not a multiple of "
                f"model.n_kv_heads={self.n_kv_heads}; use model.n_kv_heads={divisors}"
            )
        unit = 2 * self.n_heads  # RoPE rotates pairs of elements, so head_dim is even
        if self.dim % unit:
            below = self.dim // unit * unit
            remedy = f"{below} or {below + unit}" if below else str(unit)
            rule = f"is not a multiple of twice model.n_heads={self.n_heads}"
            errors.append(f"model.dim={self.dim} {rule}; use {remedy}")
        if errors:
            raise ValueError("\n".join(errors))
