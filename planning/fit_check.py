"""The memory check before a run: compare the peak of a training step with the memory of a rank.

`train.py` runs it before anything is allocated or written. Imports torch only to query GPU memory.
"""

import os
from contextlib import suppress
from pathlib import Path

from parallel.mesh import MeshShape, Processes
from planning.hardware import LOCAL, PROCESS_GIB, Hardware, hardware_of, load_hardware
from planning.memory import GIB, MemoryBreakdown
from planning.plan import plan_run
from planning.request import PlanRequest, configured_choice
from planning.search import peak_memory, remedy
from training.config import JobConfig
from training.config_validation import ConfigError

CONTEXT_GIB = 0.5
"""Memory of the CUDA context on GPUs without a hardware file."""


def check_plan(config: JobConfig, processes: Processes, mesh: MeshShape) -> str | None:
    """Compare the peak memory of a step with the memory of a rank on this machine.

    Returns:
        One line with the memory of a step, and a remedy if it does not fit. None with
        `run.plan_check=off`.

    Raises:
        ConfigError: It does not fit and `run.plan_check=refuse`.
    """
    if config.run.plan_check == "off":
        return None
    hardware, available = this_machine(processes)
    tokens = config.stages().first_token(config.train.max_steps)
    request = PlanRequest(config, processes.accelerator, tokens)
    choice = configured_choice(config, mesh)
    stages = request.stages(choice)
    memory = peak_memory(stages)
    used = f"Memory plan: {memory.peak / GIB:.2f} of {available / GIB:.2f} GiB per rank"
    if memory.peak <= available:
        speed = ""
        if hardware is not None:
            speed = f"; about {plan_run(stages, hardware).tokens_per_second:,.0f} tokens/s"
        return f"{used} (fits): {largest_parts(memory)}{speed}"
    more = remedy(request, lambda _: available, mesh.world_size, processes.per_node, choice)
    message = f"{used} (does not fit): {largest_parts(memory)}; {more}"
    if config.run.plan_check == "refuse":
        raise ConfigError([f"{message}, or run.plan_check=warn to start anyway"])
    return message


def largest_parts(memory: MemoryBreakdown) -> str:
    """Return the three largest parts of a breakdown, in GiB."""
    parts = sorted(memory.by_part().items(), key=lambda item: item[1], reverse=True)
    return ", ".join(f"{part} {size / GIB:.2f}" for part, size in parts[:3])


def this_machine(processes: Processes) -> tuple[Hardware | None, int]:
    """Return the hardware of this machine, if known, and the bytes available to a rank's tensors.

    The hardware comes from the calibrated file or, on GPUs, from the device name. On CPU the ranks
    of a node share its total memory; memory currently used by other processes is not subtracted,
    because they may free it.
    """
    known = None
    with suppress(ValueError):  # not calibrated
        known = load_hardware(LOCAL)
    if known is not None and known.accelerator != processes.accelerator:
        known = None
    if processes.accelerator == "cuda":
        import torch

        properties = torch.cuda.get_device_properties(0)
        known = known or hardware_of(properties.name)
        reserved = known.reserved_gib if known else CONTEXT_GIB
        return known, properties.total_memory - int(reserved * GIB)
    return known, machine_memory() // processes.per_node - int(PROCESS_GIB * GIB)


def machine_memory(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Return the bytes of memory of this machine, or of the cgroup if it is limited."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        with suppress(OSError, ValueError):  # "max", or not this version of cgroups
            limits.append(int((cgroup / name).read_text()))
    return min(limits)
