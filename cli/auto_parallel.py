"""`parallel.auto=true`: the mesh and its settings are the first choice of the planner's search.

Every process decides for itself, from the configuration, its device and the number of processes,
which are equal on all ranks; launched ranks compare their choices (`resilience.rank_check`). A
resumed run keeps its choice while the devices and the given keys are the same. Imported by
`cli.config` only if the key is set.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from cli.arguments import explicit_keys
from cli.last_launch import MESH
from parallel.mesh import AXES, Processes, is_first_process
from planning.fit_check import CONTEXT_GIB, machine_memory, this_machine
from planning.hardware import PROCESS_GIB, Hardware, load_hardware
from planning.memory import GIB, size_text
from planning.plan import RunPlan, memory_limit
from planning.remedies import fewest_devices
from planning.request import Choice, PlanRequest
from planning.search import search
from planning.time_limits import SLOWEST
from planning.valid_meshes import device_count, no_valid_mesh
from resilience.accelerator import resolve_processes
from resilience.gpu_probe import own_gpu
from resilience.run_folder import RunFolder
from training.config import JobConfig
from training.config_rules import HOPPER
from training.config_validation import ConfigError

CHOSEN = (
    *(f"parallel.{axis}" for axis in AXES),
    "train.micro_batch_size",
    "parallel.activation_checkpoint",
    "parallel.reshard_after_forward",
    "parallel.reduce_gradients",
)
"""Keys that the search sets unless the command does."""
KEPT = ("parallel.compile", "parallel.async_tp", "precision.fp8")
"""Keys that `plan.py` searches, and a run does not change by itself."""
SHOWN = 3


def with_choice(composed: DictConfig, config: JobConfig, words: Sequence[str]) -> DictConfig:
    """Return the composed configuration with the chosen mesh and settings.

    Args:
        config: The same configuration, validated except for its mesh.
        words: The command line, whose keys are kept.

    Raises:
        ConfigError: Nothing fits on these devices.
    """
    processes, errors = resolve_processes(config.parallel)
    if errors:
        return composed  # the validation of the mesh reports them
    devices = f"{processes.world_size} × {_device(processes)}"
    last = RunFolder(Path(config.run.dir)).last_config() or {}
    record = str((last.get("parallel") or {}).get("auto_record") or "")
    before, recorded_keys = record.partition("; ")[0], record.partition("; given ")[2].split()
    explicit = explicit_keys(words)
    typed = sorted(explicit & {*CHOSEN})
    if explicit & {*MESH}:  # then all of these keys come from this launch
        recorded_keys = [key for key in recorded_keys if key not in MESH]
    given = sorted({*typed, *recorded_keys} & {*CHOSEN})
    values = {key: OmegaConf.select(composed, key) for key in typed}
    if before == devices and all(_value(last, key) == value for key, value in values.items()):
        chosen = {key: _value(last, key) for key in CHOSEN}
        _print(f"parallel.auto keeps the choice of the last launch on {devices}: {_words(chosen)}")
    else:
        if before and before != devices:
            _print(f"parallel.auto searches again: {before} in the last launch, now {devices}")
        chosen = _search(config, processes, devices, given)
    size = f"train.micro_batch_size={chosen['train.micro_batch_size']}"
    chosen["parallel.auto_record"] = f"{devices}; {size}; given {' '.join(given)}"
    updated = composed.copy()
    for key, value in chosen.items():
        OmegaConf.update(updated, key, value, force_add=True)
    return updated


def _search(
    config: JobConfig, processes: Processes, devices: str, given: list[str]
) -> dict[str, Any]:
    """Return the values of the first choice, and print the first three."""
    hardware, known = _hardware(processes)
    tokens = config.stages().first_token(config.train.max_steps)
    capability = processes.capability or HOPPER
    request = PlanRequest(config, processes.accelerator, tokens, capability).keeping(*given, *KEPT)
    result = search(request, processes.world_size, hardware, keep=SHOWN)
    if not result.best:
        raise ConfigError([_nothing_fits(request, hardware, processes, devices)])
    rates = (
        "" if known else f", with the rates of {hardware.name}: calibrate for those of this machine"
    )
    _print(f"parallel.auto: the first of {result.candidates:,} choices on {devices}{rates}")
    for rank, (choice, run) in enumerate(result.best, start=1):
        _print(f"  {rank}: {_row(choice, run)}")
    choice = result.best[0][0]
    values = {f"parallel.{key}": value for key, value in asdict(choice.parallel).items()}
    values["train.micro_batch_size"] = choice.micro_batch_size
    return {key: values[key] for key in CHOSEN}


def _nothing_fits(
    request: PlanRequest, hardware: Hardware, processes: Processes, devices: str
) -> str:
    if (invalid := no_valid_mesh(request, processes.world_size)) is not None:
        return f"parallel.auto=true: {invalid}"

    def limit(spec: Any) -> int:
        return memory_limit(spec, hardware)

    least = fewest_devices(request, limit, hardware.devices_per_node)
    remedy = "use a smaller model, shorter sequences, a larger batch or other hardware"
    if least is not None:
        number = least.mesh.world_size
        remedy = f"use {'at least ' if number > processes.world_size else ''}{device_count(number)}"
    kept = [key for key in sorted(request.kept) if key in CHOSEN]
    omitted = f", or omit {', '.join(kept)}" if kept else ""
    return f"parallel.auto=true finds no mesh that fits on {devices}; {remedy}{omitted}"


def _device(processes: Processes) -> str:
    return own_gpu()[1].name if processes.accelerator == "cuda" else "cpu"


def _hardware(processes: Processes) -> tuple[Hardware, bool]:
    """Return this machine's hardware with its memory, and whether its rates are known.

    Memory is rounded down to GiB: nodes of one kind differ by less in what the system reports.
    """
    known, _ = this_machine(processes)
    hardware = known or load_hardware(SLOWEST[processes.accelerator])
    node = float(math.floor(machine_memory() / GIB)) or machine_memory() / GIB
    if processes.accelerator == "cpu":
        changes: dict[str, Any] = {"memory_gib": node, "reserved_gib": PROCESS_GIB}
    else:
        reserved = known.reserved_gib if known else CONTEXT_GIB
        memory = float(math.floor(own_gpu()[1].memory / GIB))
        changes = {"memory_gib": memory, "reserved_gib": reserved, "host_memory_gib": node}
    return replace(hardware, devices_per_node=processes.per_node, **changes), known is not None


def _row(choice: Choice, run: RunPlan) -> str:
    size, settings = choice.micro_batch_size, choice.settings()
    shown = {
        "micro-batch": size,
        "checkpointing": settings["activation_checkpoint"],
        "reshard": settings["reshard_after_forward"],
        "reduce": settings["reduce_gradients"],
    }
    memory = size_text(run.fullest.memory.peak)
    named = ", ".join(f"{name} {value}" for name, value in shown.items())
    return f"{choice.mesh}, {named}: {run.tokens_per_second:,.0f} tokens/s, {memory} per rank"


def _value(config: dict[str, Any], key: str) -> Any:
    section, _, name = key.partition(".")
    return (config.get(section) or {}).get(name)


def _words(values: dict[str, Any]) -> str:
    return " ".join(f"{key}={value}" for key, value in values.items())


def _print(line: str) -> None:
    if is_first_process():
        print(line, flush=True)
