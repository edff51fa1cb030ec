"""The mean loss is over targets, however the windows are cut into batches and ranks."""

import math
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from evaluation.perplexity import NOTHING, Measured, measure
from model.config import ModelConfig
from model.init import initialize
from model.llama import Llama
from model.loss import IGNORE

WINDOWS, SEQ, VOCAB = 6, 8, 23


class Windows(NamedTuple):
    tokens: Tensor
    positions: Tensor
    labels: Tensor


def held_out() -> Windows:
    """Windows with unequal numbers of targets; one begins a second document."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, VOCAB, (WINDOWS, SEQ), generator=generator)
    labels = torch.randint(0, VOCAB, (WINDOWS, SEQ), generator=generator)
    positions = torch.arange(SEQ).repeat(WINDOWS, 1)
    positions[2, 5:] = torch.arange(SEQ - 5)
    for row in range(WINDOWS):
        labels[row, :row] = IGNORE
    return Windows(tokens, positions, labels)


def batches(size: int) -> list[Windows]:
    pieces = zip(*(field.split(size) for field in held_out()), strict=True)
    return [Windows(*fields) for fields in pieces]


@pytest.fixture(scope="module")
def model() -> Llama:
    config = ModelConfig("small", 16, 2, 2, 1, 24, VOCAB)
    model = Llama(config)
    initialize(model, config, seed=0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8)  # away from the uniform distribution
    return model


def alone(values: Tensor) -> Tensor:
    return values


def mean_loss(model: Llama, batches: list[Windows], *more: Any) -> float:
    """Over the windows of one source."""
    return measure(model, {"one": batches}, *more)["one"].loss


def by_hand(model: Llama, windows: Windows) -> tuple[float, int]:
    """Sum and number, token by token: -log of the probability of the label."""
    total, number = 0.0, 0
    with torch.no_grad():
        for tokens, positions, labels in zip(*windows, strict=True):
            logits = model(tokens.unsqueeze(0), positions.unsqueeze(0))[0].double()
            for place, label in enumerate(labels.tolist()):
                if label != IGNORE:
                    total -= math.log(torch.softmax(logits[place], dim=-1)[label].item())
                    number += 1
    return total, number


@pytest.mark.parametrize("size", [1, 2, 4, WINDOWS])
def test_mean_loss_is_that_of_a_loop_by_hand_for_any_batch_size(model: Llama, size: int) -> None:
    total, number = by_hand(model, held_out())
    found = mean_loss(model, batches(size), torch.device("cpu"), alone)
    assert found == pytest.approx(total / number, rel=1e-6)  # float32 logits
    assert abs(found - math.log(VOCAB)) > 0.01


def test_ranks_are_weighed_by_their_targets(model: Llama) -> None:
    """As a mean over all targets; a mean of the ranks' means is another number."""
    first, *others = batches(2)
    total, number = by_hand(model, held_out())
    rest = sum(by_hand(model, windows)[0] for windows in others)
    rest_number = sum(by_hand(model, windows)[1] for windows in others)

    def with_the_other_ranks(values: Tensor) -> Tensor:
        return values + torch.tensor([[rest, rest_number, 0]], dtype=values.dtype)

    found = mean_loss(model, [first], torch.device("cpu"), with_the_other_ranks)
    assert found == pytest.approx(total / number, rel=1e-6)


def test_windows_without_a_target_are_an_error(model: Llama) -> None:
    tokens, positions, labels = held_out()
    nothing = [Windows(tokens, positions, torch.full_like(labels, IGNORE))]
    with pytest.raises(ValueError, match="no target"):
        mean_loss(model, nothing, torch.device("cpu"), alone)


def test_no_gradient_is_kept(model: Llama) -> None:
    mean_loss(model, batches(2), torch.device("cpu"), alone)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_sources_are_told_apart_and_add_up_to_the_whole(model: Llama) -> None:
    first, second, third = batches(2)
    lengths = torch.arange(VOCAB) % 5
    sources = {"a": [first, third], "b": [second]}
    found = measure(model, sources, torch.device("cpu"), alone, lengths)
    for name, windows in sources.items():
        hands = [by_hand(model, each) for each in windows]
        assert found[name].nats == pytest.approx(sum(total for total, _ in hands), rel=1e-6)
        assert found[name].targets == sum(number for _, number in hands)
        labels = torch.cat([each.labels[each.labels != IGNORE] for each in windows])
        assert found[name].n_bytes == sum(label % 5 for label in labels.tolist())
    whole = sum(found.values(), NOTHING)
    assert whole.targets == found["a"].targets + found["b"].targets
    assert whole.loss == pytest.approx(
        (found["a"].nats + found["b"].nats) / whole.targets, rel=1e-12
    )
    assert whole.perplexity == pytest.approx(math.exp(whole.loss))
    # A bit a byte is log(2) nats of loss for each of them.
    assert whole.bits_per_byte * whole.n_bytes * math.log(2) == pytest.approx(whole.nats)


def test_a_hopeless_model_has_an_infinite_perplexity() -> None:
    assert Measured(nats=7000.0, targets=2, n_bytes=1).perplexity == math.inf
