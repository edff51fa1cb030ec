"""Errors of reading and writing weights."""

from data.errors import shortened


class FormatError(RuntimeError):
    """Weights cannot be read or written; the message names the file, the rule and the remedy."""

    def __init__(self, message: str) -> None:
        super().__init__(shortened(message))
