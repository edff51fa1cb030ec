"""Llama beyond parity with transformers: packed documents, loss, tied weights, RoPE, dtypes."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import ModelConfig
from model.llama import Llama
from model.loss import IGNORE
from model.rope import apply_rope, rope_frequencies, rope_rotations

CONFIG = ModelConfig(
    name="small",
    dim=64,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    ffn_dim=96,
    vocab_size=61,
    max_seq_len=128,
)
TIED = dataclasses.replace(CONFIG, tie_embeddings=True)
LENGTHS = (13, 1, 29, 5)  # lengths of the documents in a row; one is a single token

# Packed and separate documents are summed in a different order and in other tiles, in float32:
# measured 1e-6 of the largest value. Attending to one token of another document changes logits by
# more than 1e-2.
TOLERANCE = 1e-5


def assert_close(actual: Tensor, expected: Tensor) -> None:
    atol = TOLERANCE * expected.abs().max().item()
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


def random_model(config: ModelConfig = CONFIG) -> Llama:
    """Build a model whose weights are large enough for attention to be far from uniform."""
    generator, model = torch.Generator().manual_seed(0), Llama(config)
    with torch.no_grad():
        for parameter in model.parameters():
            mean = 1.0 if parameter.dim() == 1 else 0.0
            parameter.normal_(mean, 0.2, generator=generator)
    return model


def random_tokens(batch: int, seq: int) -> Tensor:
    return torch.randint(
        CONFIG.vocab_size, (batch, seq), generator=torch.Generator().manual_seed(2)
    )


def packed_positions(lengths: tuple[int, ...] = LENGTHS) -> Tensor:
    return torch.cat([torch.arange(length) for length in lengths]).unsqueeze(0)  # (1, seq)


def test_packed_documents_match_separate_documents_in_logits_and_gradients() -> None:
    packed, separate = random_model(), random_model()
    tokens = random_tokens(2, sum(LENGTHS))
    # The two rows have different boundaries, so each needs a different mask.
    rows = (LENGTHS, LENGTHS[::-1])
    positions = torch.cat([packed_positions(lengths) for lengths in rows])
    labels = tokens.roll(1, dims=1)
    expected = torch.stack(
        [
            torch.cat([separate(document.unsqueeze(0))[0] for document in row.split(lengths)])
            for row, lengths in zip(tokens, rows, strict=True)
        ]
    )  # (batch, seq, vocab)
    assert_close(packed(tokens, positions).detach(), expected.detach())
    packed(tokens, positions, labels).backward()
    F.cross_entropy(expected.flatten(0, 1), labels.flatten(), reduction="sum").backward()
    for name, parameter in packed.named_parameters():
        reference = separate.get_parameter(name).grad
        assert parameter.grad is not None and reference is not None
        assert_close(parameter.grad, reference)


def test_default_positions_are_one_document_starting_at_zero() -> None:
    model, tokens = random_model(), random_tokens(2, 40)
    positions = torch.arange(40).expand(2, 40)
    assert_close(model(tokens, positions).detach(), model(tokens).detach())


def test_row_that_starts_inside_a_document_attends_within_the_segment() -> None:
    """RoPE depends on distances only, so a larger first position changes only rounding."""
    model, tokens = random_model(), random_tokens(1, 30)
    positions = torch.cat([torch.arange(7, 27), torch.arange(10)]).unsqueeze(0)
    expected = torch.cat([model(tokens[:, :20]), model(tokens[:, 20:])], dim=1)
    assert_close(model(tokens, positions).detach(), expected.detach())


@pytest.mark.parametrize("packed", [False, True])
def test_logits_do_not_depend_on_later_tokens(packed: bool) -> None:
    model, tokens = random_model(), random_tokens(1, sum(LENGTHS))
    positions = packed_positions() if packed else None
    changed = tokens.clone()
    changed[:, 20:] = (changed[:, 20:] + 1) % CONFIG.vocab_size
    before, after = model(tokens, positions), model(changed, positions)
    assert torch.equal(before[:, :20], after[:, :20])
    assert not torch.allclose(before[:, 20:], after[:, 20:])


def test_loss_is_the_float32_sum_over_targets() -> None:
    model, tokens = random_model(), random_tokens(2, 24)
    labels = random_tokens(2, 24).roll(3, dims=1)
    labels[0, :5] = IGNORE
    labels[1, 23] = IGNORE
    loss = model(tokens, labels=labels)
    probabilities = model(tokens).double().log_softmax(-1)  # (batch, seq, vocab)
    expected = -sum(
        probabilities[b, s, labels[b, s]]
        for b in range(2)
        for s in range(24)
        if labels[b, s] != IGNORE
    )
    assert loss.dtype == torch.float32 and loss.shape == ()
    # 42 terms, each with a relative rounding error of 6e-8.
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    loss.backward()
    all_ignored = torch.full_like(labels, IGNORE)
    assert model(tokens, labels=all_ignored).item() == 0.0


def test_tied_weight_gradient_sums_embedding_and_output_gradients() -> None:
    tied, untied, tokens = random_model(TIED), Llama(CONFIG), random_tokens(2, 24)
    untied.load_state_dict({**tied.state_dict(), "output.weight": tied.output.weight})
    for model in (tied, untied):
        model(tokens, labels=tokens.roll(1, dims=1)).backward()
    embedding, output = untied.tok_embeddings.weight.grad, untied.output.weight.grad
    assert embedding is not None and output is not None
    assert embedding.any() and output.any() and tied.output.weight.grad is not None
    assert_close(tied.output.weight.grad, embedding + output)


def test_parameter_names_are_those_of_meta_checkpoints() -> None:
    layer = [
        *(f"attention.{name}" for name in ("wq", "wk", "wv", "wo")),
        *(f"feed_forward.{name}" for name in ("w1", "w2", "w3")),
        "attention_norm",
        "ffn_norm",
    ]
    layers = [f"layers.{n}.{name}" for n in range(CONFIG.n_layers) for name in layer]
    expected = {f"{name}.weight" for name in ["tok_embeddings", *layers, "norm", "output"]}
    assert {name for name, _ in Llama(CONFIG).named_parameters()} == expected
    assert Llama(CONFIG).state_dict().keys() == expected
    tied = {name for name, _ in Llama(TIED).named_parameters()}
    assert tied == expected - {"output.weight"}


def test_weights_stay_tied_after_leaving_the_meta_device_and_casts() -> None:
    with torch.device("meta"):
        model = Llama(TIED)
    assert model.output.weight is model.tok_embeddings.weight
    for moved in (model.to_empty(device="cpu"), model.to(torch.float64), model.bfloat16()):
        assert moved.output.weight is moved.tok_embeddings.weight
        assert not moved.output.weight.is_meta


def test_tie_weights_restores_the_tie_after_parameters_are_replaced() -> None:
    model = Llama(TIED)
    for module in (model.tok_embeddings, model.output):
        module.weight = nn.Parameter(module.weight.detach().clone())
    assert model.output.weight is not model.tok_embeddings.weight
    model.tie_weights()
    assert model.output.weight is model.tok_embeddings.weight
    untied = Llama(CONFIG)
    untied.tie_weights()
    assert untied.output.weight is not untied.tok_embeddings.weight


def test_rope_rotates_adjacent_pairs_by_position_times_frequency() -> None:
    """The reference is Meta's definition: multiplication by e^(i·angle), in float64."""
    positions = torch.tensor([[0, 1, 2, 0, 90]])
    frequencies = rope_frequencies(CONFIG)
    rotations = rope_rotations(positions, frequencies)
    x = torch.randn(1, 5, 4, CONFIG.head_dim, generator=torch.Generator().manual_seed(5))
    angles = positions.double().unsqueeze(-1) * frequencies.double()  # (1, seq, head_dim/2)
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)))
    rotated = pairs * torch.polar(torch.ones_like(angles), angles).unsqueeze(2)
    expected = torch.view_as_real(rotated).flatten(-2)
    # An angle of 90 in float32 has an error of at most 4e-6.
    torch.testing.assert_close(apply_rope(x, rotations).double(), expected, rtol=0, atol=2e-5)
    assert rotations.dtype == torch.float32


def test_compiled_rope_matches_eager_rope_and_its_gradient() -> None:
    rotations = rope_rotations(torch.arange(50).unsqueeze(0), rope_frequencies(CONFIG))
    x, weights = torch.randn(
        2, 2, 50, 3, CONFIG.head_dim, generator=torch.Generator().manual_seed(7)
    )
    x.requires_grad_()
    results = []
    for rotate in (apply_rope, torch.compile(apply_rope, fullgraph=True)):
        rotated = rotate(x, rotations)
        results.append((rotated, *torch.autograd.grad(rotated, x, weights)))
    # Each element is a sum of two products of numbers below 6, rounded in a different order.
    torch.testing.assert_close(*results, rtol=0, atol=12 * 2**-23)


def test_bfloat16_rope_rounds_once_at_the_end() -> None:
    rotations = rope_rotations(torch.arange(50).unsqueeze(0), rope_frequencies(CONFIG))
    x = torch.randn(2, 50, 4, CONFIG.head_dim, generator=torch.Generator().manual_seed(6))
    x = x.bfloat16()
    rotated = apply_rope(x, rotations)
    assert rotated.dtype == torch.bfloat16
    assert torch.equal(rotated, apply_rope(x.float(), rotations).bfloat16())
