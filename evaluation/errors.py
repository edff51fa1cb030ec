"""Errors of evaluation that the user can fix."""


class TaskError(RuntimeError):
    """A benchmark cannot be loaded or run on this model; the message names task and remedy."""
