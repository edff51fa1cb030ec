"""What the model promises beyond parity: documents, loss, ties, kernels, number formats."""

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
LENGTHS = (13, 1, 29, 5)  # of the documents in a row, one of them a single token

# Packed and alone the same sums run in another order and in other tiles, in float32: 1e-6 of the
# largest value measured. Seeing one token of another document moves logits by more than 1e-2.
TOLERANCE = 1e-5


def assert_close(actual: Tensor, expected: Tensor) -> None:
    atol = TOLERANCE * expected.abs().max().item()
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


def random_model(config: ModelConfig = CONFIG) -> Llama:
    """Weights large enough for attention to be far from uniform."""
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


def test_packed_documents_equal_each_document_alone_in_logits_and_gradients() -> None:
    packed, alone = random_model(), random_model()
    tokens = random_tokens(2, sum(LENGTHS))
    # The two rows are cut differently, so a mask of one row cannot serve the other.
    rows = (LENGTHS, LENGTHS[::-1])
    positions = torch.cat([packed_positions(lengths) for lengths in rows])
    labels = tokens.roll(1, dims=1)
    expected = torch.stack(
        [
            torch.cat([alone(part.unsqueeze(0))[0] for part in row.split(lengths)])
            for row, lengths in zip(tokens, rows, strict=True)
        ]
    )  # (batch, seq, vocab)
    assert_close(packed(tokens, positions).detach(), expected.detach())
    packed(tokens, positions, labels).backward()
    F.cross_entropy(expected.flatten(0, 1), labels.flatten(), reduction="sum").backward()
    for name, parameter in packed.named_parameters():
        reference = alone.get_parameter(name).grad
        assert parameter.grad is not None and reference is not None
        assert_close(parameter.grad, reference)


def test_no_position_given_is_one_document_from_zero() -> None:
    model, tokens = random_model(), random_tokens(2, 40)
    positions = torch.arange(40).expand(2, 40)
    assert_close(model(tokens, positions).detach(), model(tokens).detach())


def test_row_that_starts_inside_a_document_sees_what_it_holds_of_it() -> None:
    """RoPE depends on distances alone, so a later start changes nothing but rounding."""
    model, tokens = random_model(), random_tokens(1, 30)
    positions = torch.cat([torch.arange(7, 27), torch.arange(10)]).unsqueeze(0)
    expected = torch.cat([model(tokens[:, :20]), model(tokens[:, 20:])], dim=1)
    assert_close(model(tokens, positions).detach(), expected.detach())


@pytest.mark.parametrize("packed", [False, True])
def test_logits_do_not_see_later_tokens(packed: bool) -> None:
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
    by_hand = -sum(
        probabilities[b, s, labels[b, s]]
        for b in range(2)
        for s in range(24)
        if labels[b, s] != IGNORE
    )
    assert loss.dtype == torch.float32 and loss.shape == ()
    # 42 terms, each rounded to 6e-8 of itself.
    torch.testing.assert_close(loss.double(), by_hand, rtol=1e-6, atol=0)
    loss.backward()
    silent = torch.full_like(labels, IGNORE)
    assert model(tokens, labels=silent).item() == 0.0


def test_tied_weight_gets_the_gradients_of_both_its_ends() -> None:
    tied, untied, tokens = random_model(TIED), Llama(CONFIG), random_tokens(2, 24)
    untied.load_state_dict({**tied.state_dict(), "output.weight": tied.output.weight})
    for model in (tied, untied):
        model(tokens, labels=tokens.roll(1, dims=1)).backward()
    ends = untied.tok_embeddings.weight.grad, untied.output.weight.grad
    assert ends[0] is not None and ends[1] is not None
    assert ends[0].any() and ends[1].any() and tied.output.weight.grad is not None
    assert_close(tied.output.weight.grad, ends[0] + ends[1])


def test_parameter_names_are_metas() -> None:
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


def test_tie_survives_leaving_the_meta_device_and_casts() -> None:
    with torch.device("meta"):
        model = Llama(TIED)
    assert model.output.weight is model.tok_embeddings.weight
    for moved in (model.to_empty(device="cpu"), model.to(torch.float64), model.bfloat16()):
        assert moved.output.weight is moved.tok_embeddings.weight
        assert not moved.output.weight.is_meta


def test_tie_weights_repairs_what_replacing_parameters_broke() -> None:
    model = Llama(TIED)
    for module in (model.tok_embeddings, model.output):
        module.weight = nn.Parameter(module.weight.detach().clone())
    assert model.output.weight is not model.tok_embeddings.weight
    model.tie_weights()
    assert model.output.weight is model.tok_embeddings.weight
    untied = Llama(CONFIG)
    untied.tie_weights()
    assert untied.output.weight is not untied.tok_embeddings.weight


def test_rope_turns_pairs_by_position_times_frequency() -> None:
    """Against multiplication by e^(i·angle) in float64: Meta's definition, adjacent elements."""
    positions = torch.tensor([[0, 1, 2, 0, 90]])
    frequencies = rope_frequencies(CONFIG)
    rotations = rope_rotations(positions, frequencies)
    x = torch.randn(1, 5, 4, CONFIG.head_dim, generator=torch.Generator().manual_seed(5))
    angles = positions.double().unsqueeze(-1) * frequencies.double()  # (1, seq, head_dim/2)
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)))
    turned = pairs * torch.polar(torch.ones_like(angles), angles).unsqueeze(2)
    expected = torch.view_as_real(turned).flatten(-2)
    # An angle of 90 in float32 is off by 4e-6 at the most.
    torch.testing.assert_close(apply_rope(x, rotations).double(), expected, rtol=0, atol=2e-5)
    assert rotations.dtype == torch.float32


def test_rope_and_its_gradient_are_the_same_compiled() -> None:
    rotations = rope_rotations(torch.arange(50).unsqueeze(0), rope_frequencies(CONFIG))
    x, weights = torch.randn(
        2, 2, 50, 3, CONFIG.head_dim, generator=torch.Generator().manual_seed(7)
    )
    x.requires_grad_()
    found = []
    for rotate in (apply_rope, torch.compile(apply_rope, fullgraph=True)):
        turned = rotate(x, rotations)
        found.append((turned, *torch.autograd.grad(turned, x, weights)))
    # Each element is a sum of two products of numbers below 6, rounded in another order.
    torch.testing.assert_close(*found, rtol=0, atol=12 * 2**-23)


def test_rope_of_bfloat16_rounds_once_at_the_end() -> None:
    rotations = rope_rotations(torch.arange(50).unsqueeze(0), rope_frequencies(CONFIG))
    x = torch.randn(2, 50, 4, CONFIG.head_dim, generator=torch.Generator().manual_seed(6))
    x = x.bfloat16()
    turned = apply_rope(x, rotations)
    assert turned.dtype == torch.bfloat16
    assert torch.equal(turned, apply_rope(x.float(), rotations).bfloat16())
