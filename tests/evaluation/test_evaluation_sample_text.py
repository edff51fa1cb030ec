"""Text samples during training: greedy reference, end of text, padding, distribution of draws."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from evaluation.generation import sample_text
from model.config import ModelConfig
from model.init import initialize
from model.llama import Llama

BOS, EOS, VOCAB = 26, 27, 28
CPU = torch.device("cpu")


class Letters:
    """Tokenizer with one token per letter from a to z."""

    bos_id, eos_id, vocab_size = BOS, EOS, VOCAB

    @property
    def encoding(self) -> "Letters":
        return self

    def decode_single_token_bytes(self, token: int) -> bytes:
        return self.decode([token]).encode()

    def encode(self, text: str) -> list[int]:
        return [ord(letter) - ord("a") for letter in text]

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(ord("a") + token) if token < 26 else "#" for token in ids)


class Alphabet(nn.Module):
    """Model that predicts the next letter and the end of text after z; records input lengths."""

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
            parameter.mul_(20)  # an untrained model tends to repeat one token
        model.output.weight[EOS] = 0
    return model


def sample(model: nn.Module, prompt: str = "cab", **changed: Any) -> str:
    arguments = {"n_tokens": 12, "temperature": 0.0, "seed": 0, "device": CPU, **changed}
    tokenizer: Any = Letters()
    return sample_text(model, tokenizer, prompt, **arguments)


def test_temperature_zero_is_greedy(llama: Llama) -> None:
    ids = [BOS, *Letters().encode("cab")]
    with torch.no_grad():
        for _ in range(12):
            ids.append(int(llama(torch.tensor([ids]))[0, -1].argmax()))
    expected = Letters().decode(ids[1:])
    assert sample(llama) == expected.partition("#")[0] if EOS in ids else expected
    assert len(set(expected)) > 3  # not a single repeated token


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("seq_multiple", [2, 7, 16])
def test_padding_does_not_change_the_text(
    llama: Llama, temperature: float, seq_multiple: int
) -> None:
    plain = sample(llama, temperature=temperature)
    assert sample(llama, temperature=temperature, seq_multiple=seq_multiple) == plain


@pytest.mark.parametrize("seq_multiple", [1, 2, 5])
def test_input_lengths_are_divisible_by_the_mesh(seq_multiple: int) -> None:
    model = Alphabet()
    sample(model, seq_multiple=seq_multiple)
    assert len(model.lengths) == 12
    assert all(length % seq_multiple == 0 for length in model.lengths)


def test_text_ends_at_end_of_text_but_all_forwards_run() -> None:
    model = Alphabet()
    assert sample(model, "w") == "wxyz"
    assert len(model.lengths) == 12


def test_text_without_end_has_the_requested_length() -> None:
    assert sample(Alphabet(), "a", n_tokens=5) == "abcdef"


def test_tokens_outside_the_tokenizer_are_replacement_characters() -> None:
    """The vocabulary of the model may be padded, for example to a multiple of `parallel.tp`."""

    class Padding(nn.Module):
        def forward(self, tokens: Tensor) -> Tensor:
            padded = torch.full_like(tokens, VOCAB + 3)
            return torch.nn.functional.one_hot(padded, VOCAB + 4).float()

    assert sample(Padding(), "a", n_tokens=2) == "a\ufffd\ufffd"


def test_empty_prompt_starts_from_begin_of_text(llama: Llama) -> None:
    with torch.no_grad():
        likeliest = int(llama(torch.tensor([[BOS]]))[0, -1].argmax())
    assert sample(llama, "", n_tokens=1) == Letters().decode([likeliest])


def test_same_seed_repeats_and_other_seeds_differ(llama: Llama) -> None:
    texts = {seed: sample(llama, temperature=5.0, seed=seed) for seed in range(4)}
    assert texts[0] == sample(llama, temperature=5.0, seed=0)
    assert len(set(texts.values())) > 1


def test_draws_follow_the_distribution_at_the_temperature() -> None:
    """200 draws from (0.8, 0.2) at temperatures 1 and 0.5; tolerance: four standard deviations."""

    class Coin(nn.Module):
        def forward(self, tokens: Tensor) -> Tensor:
            logits = torch.full((1, tokens.shape[1], VOCAB), -1e9)
            logits[..., 0], logits[..., 1] = torch.tensor([0.8, 0.2]).log()
            return logits

    for temperature in (1.0, 0.5):
        powers = [0.8 ** (1 / temperature), 0.2 ** (1 / temperature)]
        probability = powers[0] / sum(powers)
        text = sample(Coin(), "", n_tokens=200, temperature=temperature)
        assert (
            abs(text.count("a") / 200 - probability)
            < 4 * (probability * (1 - probability) / 200) ** 0.5
        )
