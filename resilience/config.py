"""Configuration of fault handling. Imports nothing heavy."""

import math
from dataclasses import astuple, dataclass
from datetime import timedelta
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt

from model.config_base import ConfigSection, PositiveInt


@dataclass(frozen=True)
class FaultsConfig(ConfigSection):
    """Actions on non-finite and unusually large losses, and on silent data corruption.

    Attributes:
        max_consecutive_skips: Non-finite updates are skipped; after this many in a row the run
            rewinds to its last valid checkpoint and excludes the samples of those steps.
        max_rewinds: Rewinds before the run aborts.
        spike_threshold: Report a loss this many standard deviations above the running mean; None
            disables.
        rewind_on_spike: Rewind after a spike as after non-finite updates.
        replica_check_interval: Steps between comparisons of replicated state by hash
            (`resilience.replica_check`), also made before each checkpoint; None disables both.
    """

    max_consecutive_skips: PositiveInt = 3
    max_rewinds: Annotated[int, Ge(0)] = 3
    spike_threshold: Annotated[float, Gt(0)] | None = 8.0
    rewind_on_spike: bool = False
    replica_check_interval: PositiveInt | None = 100


LEAST_SETUP_SECONDS = 1800.0  # unless it is configured
TimeLimit = Literal["off"] | Annotated[float, Gt(0)] | None


@dataclass(frozen=True)
class WatchdogConfig(ConfigSection):
    """Seconds before a hang is reported with stack traces and the run exits.

    None is ten times the planned duration (`planning.time_limits`), `off` is no limit.
    `setup_seconds` covers the launch up to the end of the first step.
    """

    setup_seconds: TimeLimit = None
    step_seconds: TimeLimit = None
    checkpoint_seconds: TimeLimit = None


def preflight_seconds(setup_seconds: Any) -> float:
    """Return the limit of a check before the launch, which reads small files only.

    Args:
        setup_seconds: `watchdog.setup_seconds`; may be invalid before the validation.
    """
    if setup_seconds == "off":
        return math.inf
    is_number = isinstance(setup_seconds, int | float) and setup_seconds > 0
    return setup_seconds if is_number else LEAST_SETUP_SECONDS


@dataclass(frozen=True)
class TimeLimits:
    """Seconds that each phase of a run may take; infinite without a limit."""

    setup: float = math.inf
    step: float = math.inf
    checkpoint: float = math.inf

    @property
    def group_timeout(self) -> timedelta:
        """Timeout of process groups and their store: beyond all limits, so it never comes first."""
        return min(timedelta(days=7), timedelta(seconds=min(max(astuple(self)), 1e9) + 120))

    def __str__(self) -> str:
        phases = {"set-up": self.setup, "step": self.step, "checkpoint": self.checkpoint}
        return ", ".join(
            f"{phase} {'off' if seconds == math.inf else f'{_plain(seconds)} s'}"
            for phase, seconds in phases.items()
        )


def _plain(seconds: float) -> str:
    """Return a number without an exponent."""
    return f"{seconds:,.0f}" if seconds >= 1000 else f"{seconds:g}"
