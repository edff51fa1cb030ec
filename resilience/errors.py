"""Errors of `parallel` that a program reports to the user."""


class LaunchError(RuntimeError):
    """The process group cannot be initialized."""
