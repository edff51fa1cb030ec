"""What `plan.py` answers: tables for a person, plan.json for a program, plan.png for both.

The figures are `planning.plan`'s; here is which of them are told, and how they are put.
"""

import json
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig

from cli.arguments import CONF
from planning.config import PlanJobConfig
from planning.fit_check import LOCAL, PlanRequest, given_choice
from planning.memory import Memory
from planning.plan import RunPlan, capacity, plan_run
from planning.plan_json import plan_record, search_record
from planning.search import Choice, SearchSpace, fewest_devices, remedy, search
from planning.tables import print_plan, print_search, stage_names
from training.console import Console

# The keys of plan.py that train.py does not have.
OWN = ("hardware", "devices", "tokens", "trace", "search", "calibrate", "output")


def answer_plan(config: PlanJobConfig) -> bool:
    """Tells the plan of a configuration as it stands; returns whether it fits."""
    asked = PlanRequest(
        config, config.hardware.accelerator, config.budget, config.is_hopper
    ).search_space()
    choice = given_choice(config, config.mesh)
    jobs = asked.jobs(choice)
    if config.trace:
        from planning.traced import traced_memory

        plan = plan_run(jobs, config.hardware, traced_memory)
    else:
        plan = plan_run(jobs, config.hardware)
    console = Console(enabled=True)
    print_plan(console, config, plan)
    record = plan_record(config, plan)
    if not plan.fits:
        told = _would_fit(config, asked, choice, plan)
        console.note(told)
        record["remedy"] = told
    bars = [
        (" ".join([*name.split(), tier]), memory)
        for name, stage in zip(stage_names(plan), plan.stages, strict=True)
        for tier, memory in stage.tiers.items()
    ]
    _write(console, config, record, bars, plan.fullest.capacity)
    return plan.fits


def answer_search(config: PlanJobConfig) -> bool:
    """Tells the best of all that may be chosen for so many devices; returns whether any fits."""
    asked = PlanRequest(
        config, config.hardware.accelerator, config.budget, config.is_hopper
    ).search_space()
    found = search(asked, config.n_devices, config.hardware)
    console = Console(enabled=True)
    commands = [command(choice) for choice, _ in found.best]
    print_search(console, config, found, commands)
    record: dict[str, Any] = search_record(config, found, commands)
    if found.best:
        best = found.best[0][1]
        console.note("The best one:")
        console.note("")
        print_plan(console, config, best)
        record["best_plan"] = plan_record(config, best)
    else:
        told = _fewest(config, asked, config.n_devices)
        console.note(told)
        record["remedy"] = told
    bars = [(str(place), plan.fullest.memory) for place, (_, plan) in enumerate(found.best, 1)]
    room = found.best[0][1].fullest.capacity if found.best else 0
    _write(console, config, record, bars, room)
    return bool(found.best)


def measure_machine() -> None:
    """Measures this machine's device, and writes what later plans call `hardware=local`."""
    from planning.calibration import calibrate, write_hardware

    path = CONF / "hardware" / f"{LOCAL}.yaml"
    hardware = calibrate()
    write_hardware(hardware, path)
    print(f"{path}: {hardware.name}, measured. Plan on it with hardware={LOCAL}")


def command(choice: Choice) -> str:
    """The command that trains with a choice: the words of this plan, but for the planner's own."""
    chosen = {word.partition("=")[0] for word in choice.overrides}
    kept = []
    for word in HydraConfig.get().overrides.task:
        key = word.lstrip("+~").partition("=")[0]
        if key.partition(".")[0] not in OWN and key not in chosen:
            kept.append(word.removeprefix("++"))
    return " ".join(["python train.py", *map(shlex.quote, kept), *choice.overrides])


def _would_fit(config: PlanJobConfig, asked: SearchSpace, choice: Choice, plan: RunPlan) -> str:
    """What would fit, in words to type."""
    found = remedy(asked, choice, lambda job: plan.fullest.capacity)
    if found is None:
        return _fewest(config, asked, config.n_devices)
    new = [word for word in found.overrides if word not in choice.overrides]
    return f"Fits on as many devices with {' '.join(new)}; search=true finds the fastest."


def _fewest(config: PlanJobConfig, asked: SearchSpace, more_than: int) -> str:
    """The smallest number of devices that would do."""
    hardware = config.hardware
    found = fewest_devices(
        asked, lambda job: capacity(job, hardware), more_than, hardware.devices_per_node
    )
    if found is None:
        return (
            f"Fits on no number of {hardware.name}: use a smaller model, shorter sequences, a "
            "larger batch (which more devices can share), or another hardware."
        )
    devices, choice = found
    return (
        f"Fits on no mesh of {more_than} × {hardware.name}. The smallest number of devices that "
        f"would do is {devices}, with {' '.join(choice.overrides)}"
    )


def _write(
    console: Console,
    config: PlanJobConfig,
    record: dict[str, Any],
    bars: Sequence[tuple[str, Memory]],
    room: int,
) -> None:
    """plan.json, and the picture beside it."""
    if config.output is None:
        return
    from planning.picture import draw_memory

    path = Path(config.output)
    picture = path.with_suffix(".png")
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, path)
        draw_memory(bars, room, picture, f"{config.model.name} on {config.hardware.name}")
    except OSError as error:
        sys.exit(f"output ({config.output}) cannot be written: {error}; use another, or null")
    console.note(f"{path} and {picture} hold this.")
