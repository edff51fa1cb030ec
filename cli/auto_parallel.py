"""`parallel.auto=true`: the mesh and its settings are the first choice of the planner's search.

Every process decides for itself, from the configuration, its device and the number of processes,
which are equal on all ranks; launched ranks compare their choices (`resilience.rank_check`). A
resumed run keeps its choice while the devices and the given keys are the same and it is valid and
fits. Imported by `cli.config` only if the key is set.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from cli.arguments import explicit_keys
from parallel.config import ParallelConfig
from parallel.mesh import AXES, resolve_mesh
from planning.fit_check import CONTEXT_GIB, machine_memory, this_machine
from planning.hardware import PROCESS_GIB, Hardware, load_hardware
from planning.memory import GIB, size_text
from planning.plan import RunPlan, memory_limit
from planning.remedies import change_that_fits, fewest_devices
from planning.request import Choice, PlanRequest, configured_choice, in_yaml, is_open
from planning.search import peak_memory, search
from planning.time_limits import SLOWEST
from planning.valid_meshes import device_count, no_valid_mesh
from resilience.accelerator import resolve_processes
from resilience.gpu_probe import own_gpu
from resilience.processes import Processes, is_first_process
from resilience.run_folder import RunFolder
from training.config import JobConfig
from training.config_rules import HOPPER
from training.config_validation import ConfigError

CHOSEN = (
    *(f"parallel.{axis}" for axis in AXES),
    "parallel.pp_parts",
    "parallel.pp_layers",
    "parallel.pp_checkpoint",
    "train.micro_batch_size",
    "parallel.activation_checkpoint",
    "parallel.reshard_after_forward",
    "parallel.reduce_gradients",
)
"""Keys that the search sets unless the command does."""
KEPT = ("parallel.compile", "parallel.async_tp", "precision.fp8")
"""Keys that `plan.py` searches, and a run does not change by itself."""
SHOWN = 3


@dataclass(frozen=True)
class _LastChoice:
    """The choice of the launch that this one continues.

    Attributes:
        values: All of `CHOSEN`.
        devices: Number and kind of its devices.
        given: Keys that a command has set.
        has_checkpoint: Whether the run has a committed checkpoint.
    """

    values: dict[str, Any]
    devices: str
    given: frozenset[str]
    has_checkpoint: bool


def with_choice(
    composed: DictConfig, load: Callable[[DictConfig], JobConfig], words: Sequence[str]
) -> DictConfig:
    """Return the composed configuration with the chosen mesh and settings.

    Args:
        load: Validates a configuration except for its mesh.
        words: The command line, whose keys are kept by this launch and those that continue it.

    Raises:
        ConfigError: Nothing fits on these devices.
    """
    config = load(composed)
    processes, errors = resolve_processes(config.parallel)
    if errors:
        return composed  # the validation of the mesh reports them
    devices = f"{processes.world_size} × {_device(processes)}"
    typed = {key: OmegaConf.select(composed, key) for key in explicit_keys(words) & {*CHOSEN}}
    left_open = {key for key, value in typed.items() if f"~{key}" in words or is_open(key, value)}
    given = {key: value for key, value in typed.items() if key not in left_open}
    hardware, known = _hardware(processes)

    def request(values: dict[str, Any]) -> PlanRequest:
        loaded = load(_updated(composed, values))
        tokens = loaded.stages().first_token(loaded.train.max_steps)
        capability = processes.capability or HOPPER
        request = PlanRequest(loaded, processes.accelerator, tokens, capability)
        return request.keeping(*values, *KEPT)

    last, earlier = _last_choice(composed, config), {}
    if last is not None:
        earlier = {key: last.values[key] for key in sorted(last.given - {*typed})}
        reason = _difference(last, devices, given, left_open)
        reason = reason or _problem(last, request, processes, hardware)
        if reason is None:
            kept = f"keeps the choice of the last launch on {devices}"
            _print(f"parallel.auto {kept}: {_words(last.values)}")
            return _updated(composed, last.values | _record(last.values, devices, given | earlier))
        _print(f"parallel.auto searches again: {reason}")
    plan_request = request(given | earlier)
    result = search(plan_request, processes.world_size, hardware, keep=SHOWN)
    if earlier and not result.best:
        _print(f"parallel.auto drops {_words(earlier)} of an earlier launch: no mesh fits with it")
        earlier, plan_request = {}, request(given)
        result = search(plan_request, processes.world_size, hardware, keep=SHOWN)
    if not result.best:
        raise ConfigError([_nothing_fits(plan_request, hardware, processes, devices)])
    rates = (
        "" if known else f", with the rates of {hardware.name}: calibrate for those of this machine"
    )
    _print(f"parallel.auto: the first of {result.candidates:,} choices on {devices}{rates}")
    for rank, (choice, run) in enumerate(result.best, start=1):
        _print(f"  {rank}: {_row(choice, run)}")
    choice = result.best[0][0]
    values = {f"parallel.{key}": value for key, value in asdict(choice.parallel).items()}
    values["train.micro_batch_size"] = choice.micro_batch_size
    chosen = {key: values[key] for key in CHOSEN}
    return _updated(composed, chosen | _record(chosen, devices, given | earlier))


# ---------------------------------------------------------------- the last launch


def _last_choice(composed: DictConfig, config: JobConfig) -> _LastChoice | None:
    """Return the choice of the launch that the configuration continues, if it made one.

    A complete command for a run without a checkpoint continues none (`cli.last_launch`).
    """
    record = OmegaConf.select(composed, "parallel.auto_record")
    folder = RunFolder(Path(config.run.dir))
    last = (folder.last_config() or {}) if record else {}
    if not _value(last, "parallel.auto"):
        return None
    values = {key: _value(last, key) for key in CHOSEN}
    before, _, keys = str(record).partition("; ")
    given = frozenset(keys.partition("given ")[2].split()) & {*CHOSEN}
    return _LastChoice(values, before, given, bool(folder.committed_steps()))


def _difference(
    last: _LastChoice, devices: str, given: dict[str, Any], left_open: set[str]
) -> str | None:
    """Return how this launch differs from the last one, if the choice depends on it."""
    if last.devices != devices:
        return f"{last.devices} in the last launch, now {devices}"
    for key, value in sorted(given.items()):
        if value != last.values[key]:
            before = in_yaml(last.values[key])
            return f"{key}={before} in the last launch, now {in_yaml(value)}"
    if released := left_open & last.given:
        before = _words({key: last.values[key] for key in sorted(released)})
        return f"{before} was given to the last launch, and is not now"
    return None if last.has_checkpoint else "the last launch has saved no checkpoint"


def _problem(
    last: _LastChoice,
    request: Callable[[dict[str, Any]], PlanRequest],
    processes: Processes,
    hardware: Hardware,
) -> str | None:
    """Return why the last choice cannot be used with this configuration."""
    try:
        plan_request = request(last.values)
        mesh, errors = resolve_mesh(plan_request.config.parallel, processes.world_size)
        choice = configured_choice(plan_request.config, mesh)
        errors = errors or [*plan_request.mesh_errors(mesh), *plan_request.compute_errors(choice)]
        errors = errors or plan_request.choice_errors(choice)
    except ConfigError as error:
        errors = error.errors
    if errors:
        return f"{errors[0].partition('; ')[0]} with the last choice"
    stages = plan_request.stages(choice)
    limit, peak = min(memory_limit(spec, hardware) for spec, _ in stages), peak_memory(stages).peak
    if peak <= limit:
        return None
    return f"the last choice needs {size_text(peak)} of {size_text(limit)} per rank"


def _nothing_fits(
    request: PlanRequest, hardware: Hardware, processes: Processes, devices: str
) -> str:
    if (invalid := no_valid_mesh(request, processes.world_size)) is not None:
        return f"parallel.auto=true: {invalid}"

    def limit(spec: Any) -> int:
        return memory_limit(spec, hardware)

    omitted = _omitted(request)
    if (change := change_that_fits(request, limit, processes.world_size)) is not None:
        return f"parallel.auto=true finds no mesh that fits on {devices}; {change}{omitted}"
    least = fewest_devices(request, limit, hardware.devices_per_node)
    remedy = "use a smaller model, shorter sequences, a larger batch or other hardware"
    if least is not None:
        number = least.mesh.world_size
        remedy = f"use {'at least ' if number > processes.world_size else ''}{device_count(number)}"
    return f"parallel.auto=true finds no mesh that fits on {devices}; {remedy}{omitted}"


def _omitted(request: PlanRequest) -> str:
    kept = [key for key in sorted(request.kept) if key in CHOSEN]
    return f", or omit {', '.join(kept)}" if kept else ""


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
        "micro-batch": in_yaml(size),
        "checkpointing": settings["activation_checkpoint"],
        "reshard": settings["reshard_after_forward"],
        "reduce": settings["reduce_gradients"],
    }
    memory, tight = size_text(run.fullest.memory.peak), " (tight)" if run.is_tight else ""
    named = ", ".join(f"{name} {value}" for name, value in shown.items())
    return (
        f"{choice.mesh}, {named}: {run.tokens_per_second:,.0f} tokens/s, {memory} per rank{tight}"
    )


def _updated(composed: DictConfig, values: dict[str, Any]) -> DictConfig:
    updated = composed.copy()
    for key, value in values.items():
        OmegaConf.update(updated, key, value, force_add=True)
    return updated


def _record(chosen: dict[str, Any], devices: str, given: Iterable[str]) -> dict[str, str]:
    """Return what a later launch needs to know about this choice."""
    size = f"train.micro_batch_size={in_yaml(chosen['train.micro_batch_size'])}"
    parts = [devices, size, *([f"given {' '.join(sorted(given))}"] if given else [])]
    return {"parallel.auto_record": "; ".join(parts)}


def _value(config: dict[str, Any], key: str) -> Any:
    section, _, name = key.partition(".")
    default = getattr(ParallelConfig(), name, None)  # of keys that an earlier version did not have
    return (config.get(section) or {}).get(name, default)


def _words(values: dict[str, Any]) -> str:
    return " ".join(f"{key}={in_yaml(value)}" for key, value in values.items())


def _print(line: str) -> None:
    if is_first_process():
        print(line, flush=True)
