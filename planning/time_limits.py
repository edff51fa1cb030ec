"""Time limits of the watchdog: ten times the planned duration of each phase, unless configured.

A limit only needs to be far above the longest phase without a fault, and a constant cannot be: a
step takes a second or ten minutes. The plan is within a factor of two on known hardware. On other
machines the slowest known device of the same kind is planned for.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from planning.hardware import Hardware, load_hardware
from planning.host import checkpoint_bytes
from planning.speed import step_time
from planning.step_spec import StepSpec
from resilience.config import LEAST_SETUP_SECONDS, TimeLimits, WatchdogConfig

FACTOR = 10
MARGIN = 2
"""A configured limit below this many times the plan is reported."""
LEAST = TimeLimits(setup=LEAST_SETUP_SECONDS, step=600, checkpoint=1800)
SLOWEST = {"cpu": "cpu", "cuda": "a100"}
"""Hardware files for machines without one, by accelerator."""
START_SECONDS, COMPILE_SECONDS = 60, 120
"""Start of processes and libraries; compilation of the block and of the loss."""


@dataclass(frozen=True)
class PhaseSeconds:
    """Planned seconds of the phases with a time limit.

    Attributes:
        setup: From launch to the end of the first step, with a checkpoint to verify and load.
        step: The longest step of all stages.
        checkpoint: To write a checkpoint.
    """

    setup: float
    step: float
    checkpoint: float


def planned_seconds(specs: Sequence[StepSpec], hardware: Hardware | None) -> PhaseSeconds:
    """Return the planned seconds of each phase.

    Args:
        specs: The step of each stage.
        hardware: None if unknown.
    """
    spec = specs[0]
    hardware = hardware or load_hardware(SLOWEST[spec.accelerator])
    step = max(step_time(each, hardware).total for each in specs)
    nodes = -(-spec.mesh.world_size // hardware.devices_per_node)
    seconds_per_byte = 1 / (nodes * hardware.storage_gb_s * 1e9)
    saving = checkpoint_bytes(spec) * seconds_per_byte
    loading = saving * (1 + spec.mesh.dp_replicate)  # all is verified, each replica loads all
    compiling = COMPILE_SECONDS if spec.parallel.compile else 0
    return PhaseSeconds(START_SECONDS + compiling + loading + step, step, saving)


def time_limits(config: WatchdogConfig, planned: PhaseSeconds) -> TimeLimits:
    """Return the configured limits, derived from the plan where they are null."""

    def limit(name: str) -> float:
        given = getattr(config, f"{name}_seconds")
        if given is None:
            return max(float(round(FACTOR * getattr(planned, name))), getattr(LEAST, name))
        return float("inf") if given == "off" else given

    return TimeLimits(limit("setup"), limit("step"), limit("checkpoint"))


def limit_warnings(config: WatchdogConfig, planned: PhaseSeconds) -> Iterator[str]:
    """Yield a warning for each configured limit that is not well above the plan."""
    phases = {"setup": "the set-up", "step": "a step", "checkpoint": "a checkpoint"}
    for name, phase in phases.items():
        given, seconds = getattr(config, f"{name}_seconds"), getattr(planned, name)
        if isinstance(given, float | int) and given < MARGIN * seconds:
            derived = getattr(time_limits(WatchdogConfig(), planned), name)
            yield (
                f"watchdog.{name}_seconds={given:g} is less than {MARGIN} times the planned "
                f"{seconds:,.0f} s of {phase}, so the watchdog may abort a run without a fault; "
                f"use watchdog.{name}_seconds=null, which is {derived:.0f} here, or off"
            )
