"""Text samples: the likeliest token by hand, the end of the text, and padding that is not seen."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from evaluation.sampling import sample_text
from model.config import ModelConfig
from model.init import initialize
from model.llama import Llama

BOS, EOS, VOCAB = 26, 27, 28
CPU = torch.device("cpu")


class Letters:
    """A token for each letter from a to z."""

    bos_id, eos_id = BOS, EOS

    def encode(self, text: str) -> list[int]:
        return [ord(letter) - ord("a") for letter in text]

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(ord("a") + token) if token < 26 else "#" for token in ids)


class Alphabet(nn.Module):
    """Says the next letter, and ends the text after z; notes what it is asked."""

    def __init__(self) -> None:
        super().__init__()
        self.lengths: list[int] = []

    def forward(self, tokens: Tensor) -> Tensor:
        self.lengths.append(tokens.shape[1])
        following = torch.where(tokens == 25, EOS, tokens + 1).clamp(max=VOCAB - 1)
        return torch.nn.functional.one_hot(following, VOCAB).float()


@pytest.fixture(scope="module")
def llama() -> Llama:
    config = ModelConfig("small", 16, 2, 2, 1, 24, VOCAB)
    model = Llama(config)
    initialize(model, config, seed=0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(20)  # an untrained model likes to repeat one token
        model.output.weight[EOS] = 0
    return model


def sample(model: nn.Module, prompt: str = "cab", **changed: Any) -> str:
    arguments = {"n_tokens": 12, "temperature": 0.0, "seed": 0, "device": CPU, **changed}
    return sample_text(model, Letters(), prompt, **arguments)


def test_temperature_zero_takes_the_likeliest_token_of_a_growing_text(llama: Llama) -> None:
    ids = [BOS, *Letters().encode("cab")]
    with torch.no_grad():
        for _ in range(12):
            ids.append(int(llama(torch.tensor([ids]))[0, -1].argmax()))
    expected = Letters().decode(ids[1:])
    assert sample(llama) == expected.partition("#")[0] if EOS in ids else expected
    assert len(set(expected)) > 3  # more than the one token that a dead model repeats


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("multiple_of", [2, 7, 16])
def test_padding_changes_nothing(llama: Llama, temperature: float, multiple_of: int) -> None:
    plain = sample(llama, temperature=temperature)
    assert sample(llama, temperature=temperature, multiple_of=multiple_of) == plain


@pytest.mark.parametrize("multiple_of", [1, 2, 5])
def test_the_model_sees_lengths_that_the_mesh_divides(multiple_of: int) -> None:
    model = Alphabet()
    sample(model, multiple_of=multiple_of)
    assert len(model.lengths) == 12
    assert all(length % multiple_of == 0 for length in model.lengths)


def test_text_stops_at_its_end_and_every_rank_still_runs_every_forward() -> None:
    model = Alphabet()
    assert sample(model, "w") == "wxyz"
    assert len(model.lengths) == 12


def test_text_without_an_end_has_as_many_tokens_as_asked() -> None:
    assert sample(Alphabet(), "a", n_tokens=5) == "abcdef"


def test_an_empty_prompt_starts_from_the_beginning_of_a_text(llama: Llama) -> None:
    with torch.no_grad():
        likeliest = int(llama(torch.tensor([[BOS]]))[0, -1].argmax())
    assert sample(llama, "", n_tokens=1) == Letters().decode([likeliest])


def test_a_seed_repeats_and_another_one_differs(llama: Llama) -> None:
    texts = {seed: sample(llama, temperature=5.0, seed=seed) for seed in range(4)}
    assert texts[0] == sample(llama, temperature=5.0, seed=0)
    assert len(set(texts.values())) > 1


def test_draws_follow_the_probabilities_of_the_temperature() -> None:
    """200 draws from (0.8, 0.2) and its sharpened form; four standard deviations are allowed."""

    class Coin(nn.Module):
        def forward(self, tokens: Tensor) -> Tensor:
            logits = torch.full((1, tokens.shape[1], VOCAB), -1e9)
            logits[..., 0], logits[..., 1] = torch.tensor([0.8, 0.2]).log()
            return logits

    for temperature in (1.0, 0.5):
        powers = [0.8 ** (1 / temperature), 0.2 ** (1 / temperature)]
        share = powers[0] / sum(powers)
        text = sample(Coin(), "", n_tokens=200, temperature=temperature)
        assert abs(text.count("a") / 200 - share) < 4 * (share * (1 - share) / 200) ** 0.5
