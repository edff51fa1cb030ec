"""The exception that data code raises for problems a user can fix."""


class DataError(ValueError):
    """Unusable data or data configuration; the message gives key or file, value and remedy."""

    def __init__(self, message: str) -> None:
        # File names that are not UTF-8 contain surrogates, which cannot be printed.
        super().__init__(message.encode(errors="backslashreplace").decode())
