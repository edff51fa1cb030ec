"""Configuration of checkpoints. Imports nothing heavy."""

import math
from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Gt, Lt

from model.config_base import ConfigSection, PositiveInt


@dataclass(frozen=True)
class CheckpointConfig(ConfigSection):
    """When checkpoints are saved and deleted; the last step is always saved.

    Attributes:
        interval: Steps between checkpoints; None disables.
        interval_minutes: Minutes between checkpoints; None disables.
        keep_last: Number of newest checkpoints to keep; None keeps all.
        keep_every: Keep the checkpoints of every such step.
        async_save: Write in the background while training continues.
        when_busy: Whether a save that starts while the previous one is being written waits or is
            skipped.
        on_failure: Whether a failed save stops the run.
    """

    interval: PositiveInt | None = 40
    interval_minutes: Annotated[float, Gt(0), Lt(math.inf)] | None = None
    keep_last: PositiveInt | None = 3
    keep_every: PositiveInt | None = None
    async_save: bool = True
    when_busy: Literal["wait", "skip"] = "wait"
    on_failure: Literal["stop", "continue"] = "stop"
