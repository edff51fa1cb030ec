"""Held-out loss: the mean over targets, independent of batches and ranks."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from data.dataset import Dataset
from data.errors import DataError
from data.loader import Batch
from evaluation.config import EvaluationConfig
from evaluation.held_out import LossTotals, evaluate_loss, open_held_out
from model.config import ModelConfig
from model.init import initialize
from model.llama import Llama
from model.loss import IGNORE

WINDOWS, SEQ, VOCAB = 6, 8, 23


def held_out() -> Batch:
    """Return windows with unequal numbers of targets; one contains a second document."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, VOCAB, (WINDOWS, SEQ), generator=generator)
    labels = torch.randint(0, VOCAB, (WINDOWS, SEQ), generator=generator)
    positions = torch.arange(SEQ).repeat(WINDOWS, 1)
    positions[2, 5:] = torch.arange(SEQ - 5)
    for row in range(WINDOWS):
        labels[row, :row] = IGNORE
    return Batch(tokens, positions, labels)


def batches(size: int) -> list[Batch]:
    windows: Any = held_out()
    parts = zip(*(field.split(size) for field in windows), strict=True)
    return [Batch(*fields) for fields in parts]


@pytest.fixture(scope="module")
def model() -> Llama:
    config = ModelConfig("small", 16, 2, 2, 1, 24, VOCAB)
    model = Llama(config)
    initialize(model, config, seed=0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8)  # away from the uniform distribution
    return model


def single_rank(values: Tensor) -> Tensor:
    return values


def mean_loss(model: Llama, batches: list[Batch], *more: Any) -> float:
    return evaluate_loss(model, {"one": batches}, *more)["one"].loss


def reference(model: Llama, windows: Any) -> tuple[float, int]:
    """Return sum and number of negative log-likelihoods, computed token by token."""
    total, number = 0.0, 0
    with torch.no_grad():
        for tokens, positions, labels in zip(*windows, strict=True):
            logits = model(tokens.unsqueeze(0), positions.unsqueeze(0))[0].double()
            for index, label in enumerate(labels.tolist()):
                if label != IGNORE:
                    total -= math.log(torch.softmax(logits[index], dim=-1)[label].item())
                    number += 1
    return total, number


@pytest.mark.parametrize("size", [1, 2, 4, WINDOWS])
def test_mean_loss_equals_reference_for_any_batch_size(model: Llama, size: int) -> None:
    total, number = reference(model, held_out())
    found = mean_loss(model, batches(size), torch.device("cpu"), single_rank)
    assert found == pytest.approx(total / number, rel=1e-6)  # float32 logits
    assert abs(found - math.log(VOCAB)) > 0.01


def test_ranks_are_weighted_by_number_of_targets(model: Llama) -> None:
    """The mean of the ranks' means would differ."""
    first, *others = batches(2)
    total, number = reference(model, held_out())
    rest = sum(reference(model, windows)[0] for windows in others)
    rest_number = sum(reference(model, windows)[1] for windows in others)

    def add_other_ranks(values: Tensor) -> Tensor:
        return values + torch.tensor([[rest, rest_number, 0]], dtype=values.dtype)

    found = mean_loss(model, [first], torch.device("cpu"), add_other_ranks)
    assert found == pytest.approx(total / number, rel=1e-6)


def test_windows_without_target_raise(model: Llama) -> None:
    tokens, positions, labels = held_out()
    masked = [Batch(tokens, positions, torch.full_like(labels, IGNORE))]
    with pytest.raises(ValueError, match="contain no target"):
        mean_loss(model, masked, torch.device("cpu"), single_rank)


def test_no_gradient_is_computed(model: Llama) -> None:
    mean_loss(model, batches(2), torch.device("cpu"), single_rank)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_source_totals_are_separate_and_add_up(model: Llama) -> None:
    first, second, third = batches(2)
    lengths = torch.arange(VOCAB) % 5
    sources = {"a": [first, third], "b": [second]}
    found = evaluate_loss(model, sources, torch.device("cpu"), single_rank, lengths)
    for name, windows in sources.items():
        expected = [reference(model, each) for each in windows]
        assert found[name].nats == pytest.approx(sum(nats for nats, _ in expected), rel=1e-6)
        assert found[name].targets == sum(number for _, number in expected)
        labels = torch.cat([each.labels[each.labels != IGNORE] for each in windows])
        assert found[name].n_bytes == sum(label % 5 for label in labels.tolist())
    total = sum(found.values(), LossTotals())
    assert total.targets == found["a"].targets + found["b"].targets
    assert total.loss == pytest.approx(
        (found["a"].nats + found["b"].nats) / total.targets, rel=1e-12
    )
    assert total.perplexity == pytest.approx(math.exp(total.loss))
    # 1 bit per byte is log(2) nats per byte.
    assert total.bits_per_byte * total.n_bytes * math.log(2) == pytest.approx(total.nats)


def test_perplexity_overflows_to_infinity() -> None:
    assert LossTotals(nats=7000.0, targets=2, n_bytes=1).perplexity == math.inf


@pytest.mark.parametrize(
    ("name", "remedy"),
    [("node", "did you mean {}/node-byte-272?"), ("x", "use a folder that prepare.py has written")],
)
def test_folder_that_is_not_a_dataset_is_named_by_its_key(
    name: str, remedy: str, tmp_path: Path
) -> None:
    (tmp_path / "node-byte-272").mkdir()
    (tmp_path / "node-byte-272" / "manifest.json").touch()
    weights: Any = SimpleNamespace(config={}, folder=tmp_path, model=SimpleNamespace(max_seq_len=8))
    with pytest.raises(DataError) as error:
        open_held_out(weights, EvaluationConfig(data=str(tmp_path / name)), optional=False)
    message = f"evaluation.data={tmp_path / name} has no prepared data; {remedy}"
    assert str(error.value) == message.format(tmp_path)


def test_windows_longer_than_the_context_are_rejected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "manifest.json").touch()
    dataset = SimpleNamespace(n_validation_windows=lambda seq_len: 1)
    monkeypatch.setattr(Dataset, "open", lambda *_, **__: dataset)
    weights: Any = SimpleNamespace(config={}, folder=tmp_path, model=SimpleNamespace(max_seq_len=8))
    with pytest.raises(
        DataError, match=r"evaluation.seq_len=9 exceeds max_seq_len=8 of .*at most 8"
    ):
        open_held_out(weights, EvaluationConfig(data=str(tmp_path), seq_len=9), optional=False)
