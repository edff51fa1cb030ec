"""What evaluation raises where the user can act."""


class TaskError(RuntimeError):
    """A benchmark cannot be loaded or asked of this model; the message names task and remedy."""
