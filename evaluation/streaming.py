"""Tokens as text, one by one: a character of several bytes is shown when its last byte is there."""

import codecs

from data.tokenizer import Tokenizer

UNKNOWN = "\N{REPLACEMENT CHARACTER}"


class TextStream:
    """The text of tokens as they come; all of its pieces together are that of all the tokens."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.encoding, self.vocab_size = tokenizer.encoding, tokenizer.vocab_size
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def add(self, token: int) -> str:
        """The characters that this token completes, maybe none."""
        if token >= self.vocab_size:  # a model may have room for more tokens than there are
            return self.end() + UNKNOWN
        return self._decoder.decode(self.encoding.decode_single_token_bytes(token))

    def end(self) -> str:
        """What is left where the last character is not whole."""
        return self._decoder.decode(b"", final=True)


def text_of(tokenizer: Tokenizer, tokens: list[int]) -> str:
    """The text of all the tokens."""
    stream = TextStream(tokenizer)
    return "".join([*(stream.add(token) for token in tokens), stream.end()])
