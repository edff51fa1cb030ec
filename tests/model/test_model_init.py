"""Initial weights are a function of seed, name and index, and normally distributed."""

import dataclasses
import hashlib
import math
import random
import struct
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

import model.init
from model.config import ModelConfig
from model.init import fill_block, initialize, parameter_std
from model.llama import Llama

CONFIG = ModelConfig(
    name="small", dim=48, n_layers=2, n_heads=6, n_kv_heads=2, ffn_dim=80, vocab_size=59
)
STD = 0.02
GOLDEN = {
    (0, "tok_embeddings.weight", 0): -70160,
    (0, "tok_embeddings.weight", 1): 22679,
    (42, "layers.3.feed_forward.w2.weight", 123456789): -65131,
    (1099511627776, "output.weight", 2147483653): -103885,
}


def reference_sum(seed: int, name: str, index: int) -> int:
    """Compute the centered sum of twelve uniforms in Python integers, from the specification."""
    text = f"llamesh-init-1\n{seed}\n{name}".encode()
    key = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")
    uniforms = []
    for counter in range(3 * index, 3 * index + 3):
        z = (key + (counter + 1) * 0x9E3779B97F4A7C15) % 2**64
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        z ^= z >> 31
        uniforms += [z >> shift & 0xFFFF for shift in (0, 16, 32, 48)]
    return sum(uniforms) - 12 * 65535 // 2


def float32(value: float) -> float:
    return struct.unpack("<f", struct.pack("<f", value))[0]


def reference_value(seed: int, name: str, index: int, std: float) -> float:
    """Compute one weight; the product is exact in float64, so float32 rounds it once."""
    return float32(reference_sum(seed, name, index) * float32(std / math.sqrt(2**32 - 1)))


def test_splitmix64_of_the_reference_gives_the_published_sequence() -> None:
    """The expected values for seed 1234567 come from the published implementation."""
    z, out = 1234567, []
    for _ in range(2):
        z = (z + 0x9E3779B97F4A7C15) % 2**64
        y = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        y = (y ^ (y >> 27)) * 0x94D049BB133111EB % 2**64
        out.append(y ^ (y >> 31))
    assert out == [6457827717110365317, 3203168211198807973]


def initial_block(
    name: str,
    shape: Sequence[int],
    offsets: Sequence[int],
    sizes: Sequence[int],
    std: float,
    seed: int,
) -> Tensor:
    block = torch.empty(tuple(sizes))
    fill_block(block, name, shape, offsets, std, seed)
    return block


@pytest.mark.parametrize("seed", [0, 7, -1, 2**70])
def test_values_equal_the_reference_bit_for_bit(seed: int) -> None:
    shape, name = (128256, 16384), "tok_embeddings.weight"
    for offsets in ((0, 0), (131, 16381), (128255, 16380)):  # the last index is above 2**31
        block = initial_block(name, shape, offsets, (1, 3), STD, seed)
        start = offsets[0] * shape[1] + offsets[1]
        expected = [reference_value(seed, name, start + i, STD) for i in range(3)]
        assert block.dtype == torch.float32
        assert block.tolist() == [expected]


def test_values_of_version_1_never_change() -> None:
    """The values were recorded from `reference_sum`.

    A change here changes every run; increment VERSION instead.
    """
    assert model.init.VERSION == "llamesh-init-1"
    for (seed, name, index), value in GOLDEN.items():
        assert reference_sum(seed, name, index) == value
        block = initial_block(name, (2**20, 2**12), (index >> 12, index % 2**12), (1, 1), STD, seed)
        assert block.item() == float32(value * float32(STD / math.sqrt(2**32 - 1)))


@pytest.mark.parametrize("shape", [(37, 23), (211,), (5, 7, 11)])
def test_any_block_equals_the_slice_of_the_full_tensor(
    shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = random.Random(0)
    full = initial_block("w", shape, [0] * len(shape), shape, STD, 3)
    for _ in range(60):
        # Small chunks, so that these small blocks are split as large ones are.
        monkeypatch.setattr(model.init, "_CHUNK_CPU", draw.choice([1, 2, 10, 1000]))
        spans = [sorted(draw.choices(range(size + 1), k=2)) for size in shape]
        offsets, sizes = [a for a, _ in spans], [b - a for a, b in spans]
        block = initial_block("w", shape, offsets, sizes, STD, 3)
        assert torch.equal(block, full[tuple(slice(a, b) for a, b in spans)])


def test_temporary_memory_is_bounded_by_the_chunk_size(monkeypatch: pytest.MonkeyPatch) -> None:
    largest = 0
    inner = model.init._normal_sums

    def spy(index: Tensor, key: int) -> Tensor:
        nonlocal largest
        largest = max(largest, index.numel())
        return inner(index, key)

    monkeypatch.setattr(model.init, "_normal_sums", spy)
    initial_block("w", (3, 400_000), (0, 0), (3, 400_000), STD, 0)
    assert 0 < largest <= model.init._CHUNK_CPU <= 2**22


def test_values_are_normal() -> None:
    """Moments are within five standard errors of those of a sum of twelve uniforms.

    One seed in a million would fail by chance; the result for this seed is deterministic.
    """
    n = 1000 * 1000
    x = initial_block("w", (1000, 1000), (0, 0), (1000, 1000), STD, 11).double() / STD
    error = 5 / math.sqrt(n)
    assert abs(x.mean().item()) < error
    assert abs(x.var().item() - 1) < math.sqrt(2) * error
    assert abs((x**3).mean().item()) < math.sqrt(15) * error
    assert abs((x**4).mean().item() - (3 - 6 / (5 * 12))) < math.sqrt(96) * error
    # Kolmogorov-Smirnov statistic. The Irwin-Hall distribution itself differs from the normal
    # distribution by about 0.002.
    cumulated = torch.special.ndtr(x.flatten().sort().values)
    gap = (cumulated - (torch.arange(n) + 0.5) / n).abs().max().item()
    assert gap < 0.002 + 2 / math.sqrt(n)


def correlation(a: Tensor, b: Tensor) -> float:
    return float(np.corrcoef(a.flatten().numpy(), b.flatten().numpy())[0, 1])


def test_neighboring_elements_parameters_and_seeds_are_uncorrelated() -> None:
    def draw(name: str, seed: int) -> Tensor:
        return initial_block(name, (500, 512), (0, 0), (500, 512), STD, seed)

    x = draw("layers.0.attention.wq.weight", 0)
    pairs = {
        "next column": (x[:, :-1], x[:, 1:]),
        "next row": (x[:-1], x[1:]),
        "other parameter": (x, draw("layers.0.attention.wk.weight", 0)),
        "next layer": (x, draw("layers.1.attention.wq.weight", 0)),
        "next seed": (x, draw("layers.0.attention.wq.weight", 1)),
    }
    for label, (a, b) in pairs.items():
        assert abs(correlation(a, b)) < 5 / math.sqrt(a.numel()), label
        assert abs(correlation(a.abs(), b.abs())) < 5 / math.sqrt(a.numel()), label


def test_residual_output_projections_have_scaled_std_and_unknown_names_are_rejected() -> None:
    for name, parameter in Llama(CONFIG).named_parameters():
        std = parameter_std(name, CONFIG)
        if parameter.dim() == 1:
            assert std is None
        elif name.endswith(("wo.weight", "w2.weight")):
            assert std == 0.02 / math.sqrt(2 * CONFIG.n_layers)
        else:
            assert std == 0.02
    with pytest.raises(ValueError, match=r"parameter layers\.0\.gate\.weight has no init"):
        parameter_std("layers.0.gate.weight", CONFIG)


def initialized(config: ModelConfig = CONFIG, seed: int = 5) -> dict[str, Tensor]:
    model = Llama(config)
    initialize(model, config, seed)
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def test_initialize_fills_every_parameter_from_seed_and_name_only() -> None:
    torch.manual_seed(1)
    first = initialized()
    torch.manual_seed(2)
    second = initialized()
    for name, value in first.items():
        assert torch.equal(value, second[name])
        std = parameter_std(name, CONFIG)
        if std is None:
            assert torch.equal(value, torch.ones_like(value))
            continue
        expected = initial_block(name, value.shape, (0, 0), value.shape, std, 5)
        assert torch.equal(value, expected)
        assert not torch.equal(value, initialized(seed=6)[name])


def test_tied_and_deeper_models_have_equal_weights_under_equal_names() -> None:
    untied = initialized()
    for name, value in initialized(dataclasses.replace(CONFIG, tie_embeddings=True)).items():
        assert torch.equal(value, untied[name])
    deeper = initialized(dataclasses.replace(CONFIG, n_layers=3))
    assert torch.equal(
        deeper["layers.1.attention.wq.weight"], untied["layers.1.attention.wq.weight"]
    )


def test_concatenated_shards_equal_the_full_parameter() -> None:
    """Three ranks hold unequal shards of the rows of each parameter."""
    full = initialized()
    shards: dict[str, list[Tensor]] = {name: [] for name in full}
    for rank in range(3):
        model = Llama(CONFIG)
        names = {id(parameter): name for name, parameter in model.named_parameters()}

        def local_block(
            parameter: Tensor, rank: int = rank, names: dict[int, str] = names
        ) -> tuple[Tensor, list[int]]:
            rows = -(-parameter.shape[0] // 3)
            first = min(rank * rows, parameter.shape[0])
            local = torch.zeros_like(parameter[first : first + rows])
            shards[names[id(parameter)]].append(local)
            return local, [first] + [0] * (parameter.dim() - 1)

        initialize(model, CONFIG, 5, local_block)
    for name, value in full.items():
        assert torch.equal(torch.cat(shards[name]), value)
