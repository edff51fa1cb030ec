"""Incremental detokenization: complete characters only, and the same text as decoding at once."""

import pytest

from data.config import TokenizerConfig
from data.tokenizer import Tokenizer, ready_tokenizer
from evaluation.detokenizer import IncrementalDetokenizer, StoppedText, detokenize


@pytest.fixture(scope="module")
def byte() -> Tokenizer:
    found = ready_tokenizer(TokenizerConfig(name="byte", vocab_size=272))
    assert found is not None
    return found


def test_character_is_emitted_with_its_last_byte(byte: Tokenizer) -> None:
    text = "aé世😀b"
    detokenizer = IncrementalDetokenizer(byte)
    emitted = [detokenizer.add(token) for token in byte.encode(text)]
    assert emitted == ["a", "", "é", "", "", "世", "", "", "", "😀", "b"]
    assert detokenizer.finish() == ""


@pytest.mark.parametrize(
    "tokens",
    [
        list("😀".encode()[:3]),  # ends in the middle of a character
        [*"世".encode()[:2], ord("a"), 0xFF, *"é".encode()],
        [ord("a"), *"é".encode()[:1], 258, 256, ord("b")],  # special tokens are shown by name
        [],
    ],
)
def test_emitted_text_equals_decoding_all_tokens(byte: Tokenizer, tokens: list[int]) -> None:
    assert detokenize(byte, tokens) == byte.decode(tokens)


def test_token_beyond_the_vocabulary_is_shown_as_unknown(byte: Tokenizer) -> None:
    """A model's vocabulary may exceed that of its tokenizer."""
    first, second = "é".encode()
    unknown = "\N{REPLACEMENT CHARACTER}"
    assert detokenize(byte, [ord("a"), first, byte.vocab_size, second]) == f"a{unknown * 3}"


@pytest.mark.parametrize(
    ("text", "stops", "expected"),
    [
        ("one\n\ntwo", ["\n\n"], "one"),
        ("one\ntwo\n", ["\n\n"], "one\ntwo\n"),  # a start of the stop at the end is text
        ("abab abc", ["abc"], "abab "),
        ("aab", ["ab", "aab"], ""),  # the first one in the text
        ("Grüße 世界!", ["世界"], "Grüße "),
        ("text", [], "text"),
    ],
)
def test_text_ends_before_the_first_stop(
    byte: Tokenizer, text: str, stops: list[str], expected: str
) -> None:
    """Tokens are bytes, so each stop spans several; no part of one is emitted early."""
    found = StoppedText(byte, stops)
    emitted = ""
    for token in byte.encode(text):
        emitted += found.add(token)
        assert expected.startswith(emitted)
        if found.is_stopped:
            break
    assert emitted + found.finish() == expected
    assert found.is_stopped == (expected != text)
