"""Errors of reading and writing weights."""


class FormatError(RuntimeError):
    """Weights cannot be read or written; the message names the file, the rule and the remedy."""
