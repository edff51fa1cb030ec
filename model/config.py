"""Shape of a Llama 3 model: the configuration group `model`.

Imports nothing heavy, since every program reads it before it knows whether it needs torch.
"""

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's stretching of the slow RoPE frequencies, `model.rope_scaling`.

    A wavelength (in tokens) above `original_max_seq_len / low_freq_factor` is stretched `factor`
    times, one below `original_max_seq_len / high_freq_factor` is kept, between them it is blended.
    """

    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_seq_len: int = 8192

    def problems(self) -> list[str]:
        """Every broken rule, as `key (value) rule: remedy`."""
        found = []
        if not self.factor >= 1:
            found.append(
                f"model.rope_scaling.factor ({self.factor}) is below 1: use 8 (Llama 3.1), 32"
                " (Llama 3.2), or model.rope_scaling=null for none"
            )
        if not self.low_freq_factor > 0:
            found.append(
                f"model.rope_scaling.low_freq_factor ({self.low_freq_factor}) is not positive:"
                " use 1.0"
            )
        if not self.high_freq_factor > self.low_freq_factor:
            found.append(
                f"model.rope_scaling.high_freq_factor ({self.high_freq_factor}) is not above"
                f" model.rope_scaling.low_freq_factor ({self.low_freq_factor}): use 4.0 and 1.0"
            )
        if not self.original_max_seq_len >= 1:
            found.append(
                f"model.rope_scaling.original_max_seq_len ({self.original_max_seq_len}) is not"
                " positive: use 8192"
            )
        return found


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """One Llama 3. Sizes count elements, `max_seq_len` counts tokens.

    `attention` is the kernel that computes it; `auto` takes the fastest that the device and the
    mask admit.
    """

    name: str
    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    ffn_dim: int
    vocab_size: int
    norm_eps: float = 1e-5
    rope_theta: float = 500000.0
    rope_scaling: RopeScaling | None = None
    tie_embeddings: bool = False
    max_seq_len: int = 8192
    attention: Literal["auto", "sdpa", "flex", "varlen"] = "auto"

    @property
    def head_dim(self) -> int:
        """Elements of one attention head."""
        return self.dim // self.n_heads

    def problems(self) -> list[str]:
        """Every broken rule, as `key (value) rule: remedy`."""
        found = []
        sizes = "dim n_layers n_heads n_kv_heads ffn_dim vocab_size max_seq_len"
        for key in sizes.split():
            if getattr(self, key) < 1:
                found.append(f"model.{key} ({getattr(self, key)}) is not positive: use 1 or more")
        if not found:
            found += self._head_errors()
        if not self.norm_eps > 0:
            found.append(f"model.norm_eps ({self.norm_eps}) is not positive: use 1e-5")
        if not self.rope_theta > 1:
            found.append(f"model.rope_theta ({self.rope_theta}) is not above 1: use 500000")
        if self.rope_scaling is not None:
            found += self.rope_scaling.problems()
        return found

    def _head_errors(self) -> list[str]:
        """The rules that tie dim and the numbers of heads together, which are all positive."""
        found = []
        if self.n_heads % self.n_kv_heads:
            divisors = [str(n) for n in range(1, self.n_heads + 1) if self.n_heads % n == 0]
            found.append(
                f"model.n_heads ({self.n_heads}) is not a multiple of model.n_kv_heads"
                f" ({self.n_kv_heads}): use {', '.join(divisors)} for model.n_kv_heads"
            )
        if self.dim % (2 * self.n_heads):
            # RoPE turns pairs of elements, so a head needs an even number of them.
            unit = 2 * self.n_heads
            below = self.dim // unit * unit
            remedy = f"{below} or {below + unit}" if below else str(unit)
            found.append(
                f"model.dim ({self.dim}) is not a multiple of twice model.n_heads ({self.n_heads}):"
                f" use {remedy}"
            )
        return found
