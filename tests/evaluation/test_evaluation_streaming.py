"""Text that is shown token by token: whole characters alone, and in the end the text of all."""

import pytest

from data.config import TokenizerConfig
from data.tokenizer import Tokenizer, ready_tokenizer
from evaluation.streaming import TextStream, text_of


@pytest.fixture(scope="module")
def byte() -> Tokenizer:
    found = ready_tokenizer(TokenizerConfig(name="byte", vocab_size=272))
    assert found is not None
    return found


def test_a_character_is_shown_when_its_last_byte_is_there(byte: Tokenizer) -> None:
    text = "aé世😀b"
    stream = TextStream(byte)
    shown = [stream.add(token) for token in byte.encode(text)]
    assert shown == ["a", "", "é", "", "", "世", "", "", "", "😀", "b"]
    assert stream.end() == ""


@pytest.mark.parametrize(
    "tokens",
    [
        list("😀".encode()[:3]),  # ends in the middle of a character
        [*"世".encode()[:2], ord("a"), 0xFF, *"é".encode()],
        [ord("a"), *"é".encode()[:1], 258, 256, ord("b")],  # special tokens by their names
        [],
    ],
)
def test_the_pieces_are_the_text_of_all_tokens(byte: Tokenizer, tokens: list[int]) -> None:
    assert text_of(byte, tokens) == byte.decode(tokens)


def test_a_token_that_the_tokenizer_lacks_is_shown_as_unknown(byte: Tokenizer) -> None:
    """A model may have room for more tokens than its tokenizer has."""
    first, second = "é".encode()
    unknown = "\N{REPLACEMENT CHARACTER}"
    assert text_of(byte, [ord("a"), first, byte.vocab_size, second]) == f"a{unknown * 3}"
