"""The exception that data code raises for problems a user can fix."""


class DataError(ValueError):
    """Unusable data or data configuration; the message gives key or file, value and remedy."""
