"""Plan a training run before launch: `python plan.py hardware=h100 key=value …`.

Accepts every key of `train.py` and predicts memory, communication, throughput and cost on any mesh;
`search=true` finds the fastest mesh. Exits with code 1 if the run does not fit. Allocates no memory
and reads no data. Heavy imports are deferred so that `--help` and configuration errors are fast.
"""

from __future__ import annotations

import shlex
import sys
from typing import TYPE_CHECKING

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from cli.arguments import plan_arguments
from cli.config import load_plan_config
from cli.errors import exit_on_user_error

if TYPE_CHECKING:
    from planning.config import PlanJobConfig
    from planning.request import Choice

PLANNER_KEYS = ("hardware", "devices", "tokens", "trace", "search", "calibrate", "output")
"""Keys that `train.py` does not have."""


@hydra.main(version_base="1.3", config_path="conf", config_name="plan")
def main(composed: DictConfig) -> None:
    """Validate the configuration, then calibrate, search or plan."""
    with exit_on_user_error():
        config = load_plan_config(composed)
        if config.calibrate:
            calibrate()
            return
        fits = search(config) if config.search else plan(config)
    sys.exit(not fits)


def calibrate() -> None:
    """Measure this machine and write conf/hardware/local.yaml."""
    from planning.calibration import measure_local_hardware

    path, hardware = measure_local_hardware()
    print(f"Wrote {path} ({hardware.name}). Use it with hardware={path.stem}.")


def plan(config: PlanJobConfig) -> bool:
    """Report the plan of the configured mesh and return whether it fits."""
    from planning import report
    from planning.plan import capacity, plan_run
    from planning.request import configured_choice
    from planning.search import nearest_fit
    from training.console import Console

    choice = configured_choice(config, config.mesh)
    stages = config.request.stages(choice)
    if config.trace:
        from planning.tracing import trace_memory

        run = plan_run(stages, config.hardware, trace_memory)
    else:
        run = plan_run(stages, config.hardware)
    console = Console(enabled=True)
    report.print_plan(console, config, run)
    record = report.plan_record(config, run)
    if not run.fits:
        nearest = nearest_fit(config.request, choice, lambda spec: capacity(spec, config.hardware))
        if nearest is None:
            record["remedy"] = _fewest_devices(config)
        else:
            changed = [word for word in nearest.overrides if word not in choice.overrides]
            record["remedy"] = (
                f"Fits on the same number of devices with {' '.join(changed)}. "
                "search=true finds the fastest choice."
            )
        console.note(record["remedy"])
    report.write(console, config, record, report.memory_bars(run), run.fullest.capacity)
    return run.fits


def search(config: PlanJobConfig) -> bool:
    """Report the fastest choices for the number of devices and return whether any fits."""
    from planning import report
    from planning.search import search as search_choices
    from training.console import Console

    result = search_choices(config.request, config.n_devices, config.hardware)
    console = Console(enabled=True)
    commands = [train_command(choice) for choice, _ in result.best]
    report.print_search(console, config, result, commands)
    record = report.search_record(config, result, commands)
    limit = 0
    if result.best:
        best = result.best[0][1]
        console.note("Plan of choice 1:\n")
        report.print_plan(console, config, best)
        record["best_plan"] = report.plan_record(config, best)
        limit = best.fullest.capacity
    else:
        record["remedy"] = _fewest_devices(config)
        console.note(record["remedy"])
    bars = [(str(rank), run.fullest.memory) for rank, (_, run) in enumerate(result.best, 1)]
    report.write(console, config, record, bars, limit)
    return bool(result.best)


def train_command(choice: Choice) -> str:
    """Return the `train.py` command for a choice: this command without the planner's own keys."""
    chosen = {word.partition("=")[0] for word in choice.overrides}
    kept = []
    for word in HydraConfig.get().overrides.task:
        key = word.lstrip("+~").partition("=")[0]
        if key.partition(".")[0] not in PLANNER_KEYS and key not in chosen:
            kept.append(word.removeprefix("++"))
    return " ".join(["python train.py", *map(shlex.quote, kept), *choice.overrides])


def _fewest_devices(config: PlanJobConfig) -> str:
    """Return a message with the smallest number of devices on which the run fits."""
    from planning.plan import capacity
    from planning.search import fewest_devices

    hardware, current = config.hardware, config.n_devices
    fewest = fewest_devices(
        config.request,
        lambda spec: capacity(spec, hardware),
        current,
        hardware.devices_per_node,
    )
    if fewest is None:
        return (
            f"Does not fit on any number of {hardware.name} devices. Use a smaller model, shorter "
            "sequences, a larger batch (which more devices can share) or other hardware."
        )
    devices, choice = fewest
    return (
        f"Does not fit on {current} × {hardware.name} with any mesh. The smallest number of "
        f"devices that fits is {devices}, with {' '.join(choice.overrides)}"
    )


if __name__ == "__main__":
    sys.argv[1:] = plan_arguments(sys.argv[1:])
    main()
