"""Device type and number of the processes of a run on this machine.

A machine that has a GPU which torch does not see is an error: training would silently run on the
CPU. With `parallel.accelerator=cpu` no GPU is queried.
"""

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace

from parallel.config import BF16_CAPABILITY, ParallelConfig
from parallel.mesh import AXES
from resilience.gpu_probe import (
    TO_CPU,
    Gpu,
    Machine,
    gpu_index,
    is_hidden,
    missing_gpu_error,
    probe_machine,
    requested_gpu_error,
    unsupported_gpu_error,
)
from resilience.processes import Processes, launched_processes, process_ranks


def resolve_processes(
    config: ParallelConfig,
    environment: Mapping[str, str] = os.environ,
    machine: Machine | None = None,
) -> tuple[Processes, list[str]]:
    """Return device type and process counts, and their validation errors.

    `resilience.launcher_variables` reports the errors in the launcher's environment variables.

    Args:
        machine: None probes this one, unless `parallel.accelerator=cpu`.
    """
    errors = []
    if config.accelerator == "cpu":
        machine = Machine()
    else:
        machine = machine or probe_machine()
        if missing := missing_gpu_error(machine, environment):
            errors.append(missing)
        elif config.accelerator == "cuda" and not machine.gpus:
            errors.append(requested_gpu_error(machine, environment))
    on_gpus = bool(machine.gpus or errors) or config.accelerator == "cuda"
    accelerator = "cuda" if on_gpus else "cpu"
    started = launched_processes(environment)
    if started is not None:
        processes = Processes(accelerator, started.per_node, started.num_nodes, started.launcher)
        errors += world_size_errors(config, started)
    else:
        mesh_size = math.prod(max(getattr(config, axis), 1) for axis in AXES)
        num_nodes = config.num_nodes or 1
        on_this_machine = len(machine.gpus) if on_gpus else max(mesh_size // num_nodes, 1)
        processes = Processes(accelerator, config.devices or on_this_machine, num_nodes, "self")
    if machine.gpus:
        errors += _gpu_errors(processes, machine, environment)
        used = _used_gpus(processes, machine, environment)
        capability = min((gpu.capability for gpu in used), default=None)
        processes = replace(processes, capability=capability)
    return processes, errors


def accelerator_warnings(
    config: ParallelConfig, processes: Processes, environment: Mapping[str, str] = os.environ
) -> Iterator[str]:
    """Yield a warning if a run uses the CPU although the user has selected GPUs."""
    on_cpu = config.accelerator == "auto" and processes.accelerator == "cpu"
    if on_cpu and not is_hidden(environment) and "CUDA_VISIBLE_DEVICES" in environment:
        value = environment["CUDA_VISIBLE_DEVICES"]
        yield (
            f"CUDA_VISIBLE_DEVICES={value} names no GPU that torch sees: the run uses the CPU; use "
            "parallel.accelerator=cuda to see the reason, or parallel.accelerator=cpu"
        )


def _used_gpus(
    processes: Processes, machine: Machine, environment: Mapping[str, str]
) -> tuple[Gpu, ...]:
    """Return the GPUs of all processes of this run, or the GPU of a launched process."""
    if processes.launcher == "self":
        return machine.gpus[: processes.per_node]
    index = gpu_index(process_ranks(environment)[1], len(machine.gpus))
    return machine.gpus[index : index + 1]


def _gpu_errors(
    processes: Processes, machine: Machine, environment: Mapping[str, str]
) -> Iterator[str]:
    """Yield errors in the assignment of GPUs to processes, and of GPUs that torch cannot use."""
    visible, wanted = len(machine.gpus), processes.per_node
    # Visible GPUs may be this process's own or those of all; `resilience.rank_check` finds out.
    # torchrun shows all its processes the same ones, unless a script changes that.
    shared = processes.launcher == "torchrun" and "CUDA_VISIBLE_DEVICES" not in environment
    if wanted > visible and processes.launcher == "self":
        yield (
            f"parallel.devices={wanted} exceeds the {visible} visible GPUs; use at most {visible}, "
            f"or {TO_CPU}"
        )
    elif wanted > visible and (visible > 1 or shared) and not _are_bound(processes, environment):
        yield (
            f"{processes.launcher} started {wanted} processes on this node, but this one sees "
            f"{visible} GPUs; start one process per GPU (--ntasks-per-node={visible}, "
            f"--nproc-per-node={visible}), request more GPUs (--gpus-per-node={wanted}), or use "
            f"{TO_CPU}"
        )
    used = _used_gpus(processes, machine, environment)
    yield from dict.fromkeys(filter(None, (unsupported_gpu_error(machine, gpu) for gpu in used)))
    if len({gpu.capability >= BF16_CAPABILITY for gpu in used}) > 1:
        names = ", ".join(dict.fromkeys(gpu.name for gpu in used))
        yield (
            f"this machine has GPUs with and without bf16 ({names}); choose GPUs of one kind with "
            f"CUDA_VISIBLE_DEVICES, or use {TO_CPU}"
        )


def _are_bound(processes: Processes, environment: Mapping[str, str]) -> bool:
    """Return whether srun shows each task a part of the node's GPUs, which suffice for all."""
    on_node = environment.get("SLURM_GPUS_ON_NODE", "")
    enough = on_node.isdecimal() and int(on_node) >= processes.per_node
    return processes.launcher == "srun" and enough


def world_size_errors(config: ParallelConfig, started: Processes) -> list[str]:
    """Return errors if the launched processes do not match the configuration."""
    return [
        f"parallel.{key}={value} does not match {started.launcher}, which started {actual}; "
        f"use parallel.{key}=null, or start {value}"
        for key, actual in (("devices", started.per_node), ("num_nodes", started.num_nodes))
        if (value := getattr(config, key)) is not None and value != actual
    ]
