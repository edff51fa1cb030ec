"""The one error of this package that a user is meant to read.

Every message names the key or file, its value, the rule that it breaks and the remedy.
"""


class DataError(ValueError):
    """Data or its configuration is not usable; the message says what to do about it."""
