"""The exception that data code raises for problems a user can fix."""

MAX_MESSAGE = 16_384  # characters


class DataError(ValueError):
    """Unusable data or data configuration; the message gives key or file, value and remedy."""

    def __init__(self, message: str) -> None:
        # File names that are not UTF-8 contain surrogates, which cannot be printed.
        super().__init__(shortened(message.encode(errors="backslashreplace").decode()))


def first_line(error: BaseException) -> str:
    """Return a library's exception as one line."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__


def shortened(message: str) -> str:
    """Return a message without its middle if it is long: damaged files have names of any length."""
    half = MAX_MESSAGE // 2
    return message if len(message) <= MAX_MESSAGE else f"{message[:half]} … {message[-half:]}"
