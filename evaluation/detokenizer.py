"""Incremental detokenization: emit a multi-byte character when its last byte has arrived."""

import codecs

from data.tokenizer import Tokenizer

UNKNOWN = "\N{REPLACEMENT CHARACTER}"


class IncrementalDetokenizer:
    """Convert tokens to text one at a time; the concatenated output is the text of all tokens."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.encoding, self.vocab_size = tokenizer.encoding, tokenizer.vocab_size
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def add(self, token: int) -> str:
        """Return the characters that this token completes, possibly none."""
        if token >= self.vocab_size:  # the model's vocabulary may exceed the tokenizer's
            return self.finish() + UNKNOWN
        return self._decoder.decode(self.encoding.decode_single_token_bytes(token))

    def finish(self) -> str:
        """Return the replacement for an incomplete last character, if any."""
        return self._decoder.decode(b"", final=True)


def detokenize(tokenizer: Tokenizer, tokens: list[int]) -> str:
    """Return the text of all tokens."""
    detokenizer = IncrementalDetokenizer(tokenizer)
    return "".join([*map(detokenizer.add, tokens), detokenizer.finish()])
