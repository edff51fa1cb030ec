"""Errors of the launch that a program reports to the user."""


class LaunchError(RuntimeError):
    """The process group cannot be initialized."""
