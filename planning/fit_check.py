"""The check of a run against its plan on this machine: memory, host memory and time limits.

`train.py` runs it before anything is allocated or written. Imports torch only to query GPU memory.
"""

import os
from contextlib import suppress
from pathlib import Path

from parallel.mesh import MeshShape
from planning.communicators import communicator_bytes
from planning.failures import interval_warnings, plan_failures
from planning.hardware import LOCAL, PROCESS_GIB, Hardware, hardware_of, load_hardware
from planning.memory import GIB, MemoryBreakdown, size_text
from planning.plan import host_peak, plan_run
from planning.remedies import remedy
from planning.request import Choice, PlanRequest, configured_choice
from planning.search import peak_memory
from planning.step_spec import StepSpec
from planning.time_limits import limit_warnings, planned_seconds, time_limits
from resilience.config import TimeLimits
from resilience.gpu_probe import own_gpu
from resilience.processes import Processes
from training.config import JobConfig
from training.config_rules import HOPPER
from training.config_validation import ConfigError
from training.plan_comparison import PlanComparison, PlannedStep

CONTEXT_GIB = 0.5
"""Memory of the CUDA context on GPUs without a hardware file."""
ON_GPUS = (
    "start it on a machine with GPUs, or plan it here with python plan.py and the same arguments "
    "(hardware=h100 or another file of conf/hardware)"
)
"""Remedy for a run that does not fit on the CPU of a machine without GPUs."""


def check_plan(config: JobConfig, processes: Processes, mesh: MeshShape) -> str | None:
    """Compare the peak memory of a step with the memory of a rank on this machine.

    Returns:
        One line with the memory of a step, a remedy if it does not fit, and warnings about the time
        limits of the watchdog and, on known hardware, the interval of checkpoints. None with
        `run.plan_check=off`.

    Raises:
        ConfigError: It does not fit and `run.plan_check=refuse`.
    """
    if config.run.plan_check == "off":
        return None
    hardware, of_device = this_machine(processes)
    request, choice = plan_request(config, processes, mesh)
    stages = request.stages(choice)
    memory, host_limit = peak_memory(stages), machine_memory()
    specs = [spec for spec, _ in stages]
    available = of_device - communicator_bytes(specs[0])
    host = max(host_peak(spec, processes.per_node) for spec in specs)
    used = f"Memory plan: {size_text(memory.peak)} of {size_text(available)} per rank"
    parts = largest_parts(memory)
    run = None if hardware is None else plan_run(stages, hardware)
    warnings = [*limit_warnings(config.watchdog, planned_seconds(specs, hardware))]
    fits = memory.peak <= available and host <= host_limit
    if run is not None and fits:
        warnings += interval_warnings(plan_failures(config.checkpoint, run))
    lines = [f"Warning: {warning}" for warning in warnings]
    if host:
        parts += f"; host memory {size_text(host)} of {size_text(host_limit)} per node"
    if fits:
        speed = "" if run is None else f"; about {run.tokens_per_second:,.0f} tokens/s"
        return "\n".join([f"{used} (fits): {parts}{speed}", *lines])

    def limit(spec: StepSpec) -> int:
        fits_host = host_peak(spec, processes.per_node) <= host_limit
        return of_device - communicator_bytes(spec) if fits_host else 0

    more = remedy(request, limit, mesh.world_size, processes.per_node, choice)
    advice = str(more)
    on_cpu = processes.accelerator == "cpu"
    cpu_only = on_cpu and config.parallel.accelerator == "auto"
    if on_cpu and not more.overrides:  # more processes of this machine share its memory
        advice = ON_GPUS if cpu_only else f"use parallel.accelerator=auto and {ON_GPUS}"
    message = f"{used} (does not fit): {parts}; {advice}"
    if cpu_only:
        message = f"torch finds no GPU here, so the run is planned on the CPU. {message}"
    if config.run.plan_check == "refuse":
        raise ConfigError([f"{message}, or run.plan_check=warn to start anyway"])
    return "\n".join([message, *lines])


def plan_comparison(
    config: JobConfig, processes: Processes, mesh: MeshShape
) -> PlanComparison | None:
    """Return the plan that a run is compared with; None on unknown hardware or without a check."""
    hardware, _ = this_machine(processes)
    if hardware is None or config.run.plan_check == "off":
        return None
    request, choice = plan_request(config, processes, mesh)
    run = plan_run(request.stages(choice), hardware)
    process_gib = PROCESS_GIB if processes.accelerator == "cpu" else 0
    steps = {
        (plan.spec.seq_len, plan.spec.global_batch_size): PlannedStep(
            plan.time.total, plan.tokens_per_second, plan.memory.peak / GIB + process_gib
        )
        for plan in run.stages
    }
    stall = plan_failures(config.checkpoint, run).interruptions.stall_seconds
    return PlanComparison(steps, stall, process_gib)


def watchdog_limits(config: JobConfig, processes: Processes, mesh: MeshShape) -> TimeLimits:
    """Return the time limits of the watchdog, where they are null from the plan of this machine."""
    request, choice = plan_request(config, processes, mesh)
    hardware, _ = this_machine(processes)
    specs = [spec for spec, _ in request.stages(choice)]
    return time_limits(config.watchdog, planned_seconds(specs, hardware))


def plan_request(
    config: JobConfig, processes: Processes, mesh: MeshShape
) -> tuple[PlanRequest, Choice]:
    """Return the run as a request to the planner, and its configured choice."""
    tokens = config.stages().first_token(config.train.max_steps)
    capability, flash_attention = processes.capability or HOPPER, "FA2"
    if processes.accelerator == "cuda":
        from training.flash_attention import select_flash_attention

        head_dim, deterministic = config.model.head_dim, config.train.deterministic
        flash_attention = select_flash_attention(head_dim, deterministic, capability)
    request = PlanRequest(config, processes.accelerator, tokens, capability, flash_attention)
    return request, configured_choice(config, mesh)


def largest_parts(memory: MemoryBreakdown) -> str:
    """Return the three largest parts of a breakdown."""
    parts = sorted(memory.by_part().items(), key=lambda item: item[1], reverse=True)
    return ", ".join(f"{part} {size_text(size)}" for part, size in parts[:3])


def this_machine(processes: Processes) -> tuple[Hardware | None, int]:
    """Return the hardware of this machine, if known, and the bytes available to a rank.

    On GPUs, NCCL and tensors share them.

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
        gpu = own_gpu()[1]
        known = known or hardware_of(gpu.name)
        reserved = known.reserved_gib if known else CONTEXT_GIB
        return known, gpu.memory - int(reserved * GIB)
    return known, machine_memory() // processes.per_node - int(PROCESS_GIB * GIB)


def machine_memory(cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """Return the bytes of memory of this machine, or of this process's cgroups if they limit it."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    files = [cgroups / "memory.max", cgroups / "memory/memory.limit_in_bytes"]
    with suppress(OSError):  # the path of a job's cgroup, as SLURM and systemd create them
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            name = "memory.limit_in_bytes" if controllers else "memory.max"
            root = cgroups / "memory" if controllers else cgroups
            folder = root / path.lstrip("/")
            if controllers in ("", "memory"):
                files += [each / name for each in (folder, *folder.parents) if root in each.parents]
    for file in files:
        with suppress(OSError, ValueError):  # "max", or not this version of cgroups
            limits.append(int(file.read_text()))
    return min(limits)
