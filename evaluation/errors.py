"""Errors of evaluation and generation that the user can fix."""

NOT_FINITE = "values exceed the range of the data type; use an earlier checkpoint or other weights"
"""Reason and remedy for weights that are finite but compute NaN or infinity."""


class EvaluationError(RuntimeError):
    """Weights cannot be evaluated or prompted; the message names the reason and the remedy."""


class TaskError(EvaluationError):
    """A benchmark cannot be loaded or run on this model; the message names task and remedy."""
