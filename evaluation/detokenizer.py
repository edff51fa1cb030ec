"""Incremental detokenization: emit a multi-byte character when its last byte has arrived.

Stops are texts that end a completion.
"""

import codecs
from collections.abc import Sequence

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


class StoppedText:
    """The text of one completion, cut at the first stop.

    Characters that may be the start of a stop are held back until it is certain that they are not.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()) -> None:
        self._detokenizer, self._stops = IncrementalDetokenizer(tokenizer), stops
        self._pending = ""
        self.is_stopped = False

    def add(self, token: int) -> str:
        """Return the characters that are certain after this token, possibly none."""
        return self._certain(self._detokenizer.add(token))

    def finish(self) -> str:
        """Return the remaining characters."""
        text = self._certain(self._detokenizer.finish())
        return text if self.is_stopped else text + self._pending

    def _certain(self, text: str) -> str:
        if self.is_stopped:
            return ""
        text = self._pending + text
        found = [index for stop in self._stops if (index := text.find(stop)) >= 0]
        if found:
            self.is_stopped = True
            return text[: min(found)]
        held = max(
            (
                length
                for stop in self._stops
                for length in range(1, min(len(stop), len(text) + 1))
                if text.endswith(stop[:length])
            ),
            default=0,
        )
        self._pending = text[len(text) - held :]
        return text[: len(text) - held]
