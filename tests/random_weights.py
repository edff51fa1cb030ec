"""Random weights for tests: in memory and in Meta's files, and a reference Llama to run them."""

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from formats.stored_tensor import Dims, StoredTensor
from formats.weights import Weights, parameter_shapes
from model.config import ModelConfig, RopeScaling
from model.llama import Llama

SMALL = ModelConfig("small", 64, 2, 16, 8, 96, 144, max_seq_len=512)
SCALED = RopeScaling(factor=8.0, original_max_seq_len=32)
KINDS = {
    "plain": SMALL,
    "scaled": dataclasses.replace(SMALL, rope_scaling=SCALED),
    "tied": dataclasses.replace(SMALL, rope_scaling=RopeScaling(32.0), tie_embeddings=True),
}
SEQ = 48  # longer than the original context of `scaled`


@dataclass(frozen=True)
class MemoryTensor(StoredTensor):
    """A tensor in memory."""

    values: Tensor

    def read(self, offsets: Dims = None, sizes: Dims = None) -> Tensor:
        tensor = self.values
        for dim, size in enumerate(self.shape if sizes is None else sizes):
            tensor = tensor.narrow(dim, 0 if offsets is None else offsets[dim], size)
        return tensor.contiguous().to(self.dtype)


class RandomWeights(Weights):
    """Random weights in memory, scaled so that attention is far from uniform."""

    def __init__(self, model: ModelConfig, dtype: torch.dtype = torch.float32) -> None:
        generator = torch.Generator().manual_seed(0)
        self.values = {
            name: torch.randn(shape, generator=generator).mul_(0.2).add_(len(shape) == 1).to(dtype)
            for name, shape in parameter_shapes(model).items()
        }
        stored = {
            name: MemoryTensor(dtype, tuple(tensor.shape), (), tensor)
            for name, tensor in self.values.items()
        }
        super().__init__("native", Path("made"), model, stored)


def same_bits(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one.view(torch.uint8), other.view(torch.uint8))


def assert_same_weights(one: Weights, other: Weights) -> None:
    """Assert equality bit for bit, and of the configurations except for the name."""
    assert dataclasses.replace(one.model, name="") == dataclasses.replace(other.model, name="")
    assert list(one.tensors) == list(parameter_shapes(one.model)) == list(other.tensors)
    for name, tensor in one.tensors.items():
        assert same_bits(tensor.read(), other.tensors[name].read()), name


def filled(weights: Weights) -> Llama:
    """Return our model with these weights in float32."""
    model = Llama(weights.model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights.tensors[name].read())
    return model


def tokens_of(model: ModelConfig) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(model.vocab_size, (2, SEQ), generator=generator)  # (batch, seq)


def meta_parts(weights: RandomWeights, parts: int) -> list[dict[str, Tensor]]:
    """Return the tensors of each part, implemented independently after Meta's model."""
    row_parallel = ("wo.weight", "w2.weight")
    tensors = dict(weights.values)
    tensors.setdefault("output.weight", tensors["tok_embeddings.weight"])
    kv_rows = weights.model.n_kv_heads * weights.model.head_dim
    found: list[dict[str, Tensor]] = []
    for part in range(parts):
        local = {}
        for name, tensor in tensors.items():
            if tensor.ndim == 1:
                local[name] = tensor
            elif name.endswith(("wk.weight", "wv.weight")) and parts > weights.model.n_kv_heads:
                # Fewer kv heads than parts: consecutive parts store the same head.
                head = part * weights.model.n_kv_heads // parts
                rows = kv_rows // weights.model.n_kv_heads
                local[name] = tensor[head * rows : (head + 1) * rows].clone()
            else:
                dim = 1 if name.endswith(row_parallel) else 0
                local[name] = tensor.chunk(parts, dim)[part].clone()
        found.append(local)
    return found


def write_meta_by_hand(weights: RandomWeights, folder: Path, parts: int, **params: object) -> None:
    """Write a folder as Meta publishes it, using only torch and json."""
    model = weights.model
    folder.mkdir(parents=True)
    for part, tensors in enumerate(meta_parts(weights, parts)):
        torch.save(tensors, folder / f"consolidated.{part:02d}.pth")
    values = {
        "dim": model.dim,
        "n_layers": model.n_layers,
        "n_heads": model.n_heads,
        "n_kv_heads": model.n_kv_heads,
        "vocab_size": model.vocab_size,
        "ffn_dim_multiplier": 0.5,  # 0.5 · 170 = 85, rounded up to a multiple of 32: 96
        "multiple_of": 32,
        "norm_eps": model.norm_eps,
        "rope_theta": model.rope_theta,
        "use_scaled_rope": model.rope_scaling is not None,
        **params,
    }
    (folder / "params.json").write_text(json.dumps(values))


def plain_llama(tensors: dict[str, Tensor], model: ModelConfig, tokens: Tensor) -> Tensor:
    """Return reference logits (batch, seq, vocab): complex rotation, explicit attention scores."""
    head_dim, scaling = model.head_dim, model.rope_scaling
    frequencies = []
    for pair in range(head_dim // 2):
        frequency = model.rope_theta ** (-2 * pair / head_dim)
        if scaling is not None:
            wavelength = 2 * math.pi / frequency
            longest = scaling.original_max_seq_len / scaling.low_freq_factor
            shortest = scaling.original_max_seq_len / scaling.high_freq_factor
            if wavelength > longest:
                frequency /= scaling.factor
            elif wavelength > shortest:
                smooth = (scaling.original_max_seq_len / wavelength - scaling.low_freq_factor) / (
                    scaling.high_freq_factor - scaling.low_freq_factor
                )
                frequency = (1 - smooth) * frequency / scaling.factor + smooth * frequency
        frequencies.append(frequency)
    positions = torch.arange(tokens.shape[1]).double()
    angles = torch.outer(positions, torch.tensor(frequencies).double())
    rotations = torch.exp(1j * angles)  # (seq, pair)

    def weight(name: str) -> Tensor:
        return tensors[f"{name}.weight"].double()

    def norm(x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + model.norm_eps).sqrt() * weight(name)

    def rotated(x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * rotations.unsqueeze(1)).flatten(-2)

    x = weight("tok_embeddings")[tokens]  # (batch, seq, dim)
    for layer in range(model.n_layers):
        prefix = f"layers.{layer}."
        h = norm(x, f"{prefix}attention_norm")
        q, k, v = (
            (h @ weight(f"{prefix}attention.{each}").T).unflatten(-1, (-1, head_dim))
            for each in ("wq", "wk", "wv")
        )
        q, k = rotated(q), rotated(k)  # (batch, seq, heads, head_dim)
        group = model.n_heads // model.n_kv_heads
        heads = []
        for head in range(model.n_heads):
            scores = q[:, :, head] @ k[:, :, head // group].transpose(1, 2) / math.sqrt(head_dim)
            later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
            probs = scores.masked_fill(later, -math.inf).softmax(-1)  # (batch, seq, keys)
            heads.append(probs @ v[:, :, head // group])
        x = x + torch.cat(heads, -1) @ weight(f"{prefix}attention.wo").T
        h = norm(x, f"{prefix}ffn_norm")
        gate, up = (h @ weight(f"{prefix}feed_forward.{each}").T for each in ("w1", "w3"))
        x = x + (gate * gate.sigmoid() * up) @ weight(f"{prefix}feed_forward.w2").T
    last = "tok_embeddings" if model.tie_embeddings else "output"
    return norm(x, "norm") @ weight(last).T
