"""The memory check before a run: compare the peak of a training step with the memory of a rank.

`train.py` runs it before anything is allocated or written. Imports torch only to query GPU memory.
"""

from dataclasses import dataclass
from pathlib import Path

from parallel.mesh import MeshShape, Processes, is_first_process
from planning.hardware import LOCAL, PROCESS_GIB, Hardware, hardware_of, load_hardware
from planning.memory import GIB, MemoryBreakdown
from planning.plan import plan_run
from planning.request import Choice, PlanRequest, configured_choice
from planning.search import fewest_devices, fullest_stage, nearest_fit
from training.config import JobConfig

CONTEXT_GIB = 0.5
"""Memory of the CUDA context on GPUs without a hardware file."""


@dataclass(frozen=True)
class FitCheck:
    """Result of the memory check.

    Attributes:
        message: One line with the memory of a step, and a remedy if it does not fit.
        rejected: Whether the run must not start: it does not fit and `run.plan_check=refuse`.
    """

    fits: bool
    message: str
    rejected: bool = False


def check_plan(config: JobConfig, processes: Processes, mesh: MeshShape) -> FitCheck | None:
    """Compare the peak memory of a step with the memory of a rank on this machine.

    Returns:
        The result, or None with `run.plan_check=off`.
    """
    if config.run.plan_check == "off":
        return None
    hardware, available = this_machine(processes)
    tokens = config.stages().first_token(config.train.max_steps)
    request = PlanRequest(config, processes.accelerator, tokens)
    choice = configured_choice(config, mesh)
    stages = request.stages(choice)
    _, memory = fullest_stage(stages)
    used = f"{memory.peak / GIB:.2f} of {available / GIB:.2f} GiB per rank"
    if memory.peak <= available:
        speed = ""
        if hardware is not None:
            speed = f"; about {plan_run(stages, hardware).tokens_per_second:,.0f} tokens/s"
        return FitCheck(True, f"Memory plan: {used} (fits): {largest_parts(memory)}{speed}")
    remedy = _remedy(request, choice, available, processes.per_node)
    message = f"Memory plan: {used} (does not fit): {largest_parts(memory)}; {remedy}"
    if config.run.plan_check == "warn":
        return FitCheck(False, message)
    return FitCheck(False, f"{message}, or run.plan_check=warn to start anyway", rejected=True)


def print_fit_check(check: FitCheck | None) -> None:
    """Print the result of the memory check on the first process."""
    if check is not None and is_first_process():
        print(check.message, flush=True)


def largest_parts(memory: MemoryBreakdown) -> str:
    """Return the three largest parts of a breakdown, in GiB."""
    parts = sorted(memory.by_part().items(), key=lambda item: item[1], reverse=True)
    return ", ".join(f"{part} {size / GIB:.2f}" for part, size in parts[:3])


def _remedy(request: PlanRequest, current: Choice, available: int, per_node: int) -> str:
    """Return overrides that would make the run fit, for an error message."""
    nearest = nearest_fit(request, current, lambda spec: available)
    if nearest is not None:
        changed = [word for word in nearest.overrides if word not in current.overrides]
        return f"use {' '.join(changed)}"
    fewest = fewest_devices(request, lambda spec: available, current.mesh.world_size, per_node)
    if fewest is None:
        return "no mesh of any size fits: use a smaller model, shorter sequences or a smaller batch"
    devices, choice = fewest
    return f"use at least {devices} devices with {' '.join(choice.overrides)}"


def this_machine(processes: Processes) -> tuple[Hardware | None, int]:
    """Return the hardware of this machine, if known, and the bytes available to a rank's tensors.

    The hardware comes from the calibrated file or, on GPUs, from the device name. On CPU the ranks
    of a node share its total memory; memory currently used by other processes is not subtracted,
    because they may free it.
    """
    known = _calibrated(processes.accelerator)
    if processes.accelerator == "cuda":
        import torch

        properties = torch.cuda.get_device_properties(0)
        known = known or hardware_of(properties.name)
        reserved = known.reserved_gib if known else CONTEXT_GIB
        return known, properties.total_memory - int(reserved * GIB)
    return known, machine_memory() // processes.per_node - int(PROCESS_GIB * GIB)


def _calibrated(accelerator: str) -> Hardware | None:
    try:
        hardware = load_hardware(LOCAL)
    except ValueError:
        return None
    return hardware if hardware.accelerator == accelerator else None


def machine_memory(root: Path = Path("/")) -> int:
    """Return the bytes of memory of this machine, or of the cgroup if it is limited."""
    limits = []
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        try:
            limits.append(int((root / "sys/fs/cgroup" / name).read_text()))
        except (OSError, ValueError):  # "max", or not this version of cgroups
            continue
    try:
        total = (root / "proc/meminfo").read_text().partition("MemTotal:")[2].split()[0]
        limits.append(int(total) * 1024)  # KiB
    except (OSError, ValueError, IndexError):
        pass
    return min(limits, default=2**60)
