"""Plan a training run before launch: `python plan.py hardware=h100 key=value …`.

Accepts every key of `train.py` and predicts memory, communication, throughput and cost on any mesh;
`search=true` finds the fastest mesh. Exits with code 1 if the run does not fit. Allocates no memory
and reads no data. Heavy imports are deferred so that `--help` and configuration errors are fast.
"""

from __future__ import annotations

import dataclasses
import shlex
import sys
from functools import partial

from cli.arguments import explicit_keys, parse_options, typed_files
from cli.composition import compose_config
from cli.config import load_plan_config, print_warnings
from cli.errors import exit_on_user_error
from cli.start_up import start_up
from planning.config import PlanJobConfig
from planning.config_warnings import currency_warnings, flash_attention_warnings
from planning.failures import interval_warnings
from planning.frameworks import DEFAULT
from planning.plan import RunPlan, memory_limit, plan_run
from planning.remedies import fewest_devices, remedy
from planning.request import Choice, PlanRequest, configured_choice
from planning.search import search as search_choices
from planning.time_limits import limit_warnings
from planning.valid_meshes import no_valid_mesh
from training.config_warnings import async_tp_warnings

PLANNER_KEYS = (
    *("hardware", "devices", "tokens", "device_mtbf_days", "restart_seconds"),
    *(
        "flash_attention_impl",
        "framework",
        "power_limit_watts",
        "trace",
        "search",
        "search_fp8",
        "smallest",
        "calibrate",
        "output",
    ),
)
"""Keys that `train.py` does not have."""
LAUNCH_KEYS = ("parallel.devices", "parallel.num_nodes")


def main(arguments: list[str]) -> None:
    """Validate the configuration, then calibrate, search or plan."""
    with exit_on_user_error():
        config = load_plan_config(compose_config("plan", arguments))
        if config.calibrate:
            from planning.calibration import measure_local_hardware

            path, hardware = measure_local_hardware()
            print(f"Wrote {path} ({hardware.name}). Use it with hardware={path.stem}.")
            return
        given = explicit_keys(parse_options(arguments, "plan").words)
        print_warnings(currency_warnings(config.hardware, given))
        fits = search(config, arguments) if config.searches else plan(config)
    sys.exit(not fits)


def plan(config: PlanJobConfig) -> bool:
    """Report the plan of the configured mesh and return whether it fits."""
    from planning import plan_json, report
    from training.console import Console

    if config.trace:
        from planning.tracing import trace_memory
    choice = configured_choice(config, config.mesh)
    stages = config.request.stages(choice)
    run = plan_run(stages, config.device, trace_memory if config.trace else None)
    console = Console(enabled=True)
    report.print_plan(console, config, run)
    record = plan_json.plan_record(config, run)
    _warn(config, run)
    if not run.fits:
        record["remedy"] = _remedy(config, config.request, choice)
        console.note(record["remedy"])
    bars, limits = report.memory_bars(run), report.bar_limits(run)
    plan_json.write(console, config, record, bars, limits, choice.mesh)
    return run.fits


def search(config: PlanJobConfig, arguments: list[str]) -> bool:
    """Report the fastest choices for the number of devices and return whether any fits."""
    from planning import plan_json, report
    from training.console import Console

    request = config.request.keeping(*explicit_keys(parse_options(arguments, "plan").words))
    if config.smallest:
        limit = partial(memory_limit, hardware=config.device)
        least = fewest_devices(request, limit, config.device.devices_per_node)
        if least is not None:
            config = dataclasses.replace(config, devices=least.mesh.world_size)
    result = search_choices(request, config.n_devices, config.device)
    console = Console(enabled=True)
    commands = [train_command(choice, config, arguments) for choice, _ in result.best]
    if config.framework != DEFAULT:
        commands = []
    report.print_search(console, config, request, result, commands)
    record = plan_json.search_record(config, request, result, commands)
    recommended = ""
    for rank, (choice, best) in enumerate(result.best, start=1):
        if config.trace:
            from planning.tracing import trace_memory

            best = plan_run(request.stages(choice), config.device, trace_memory)
        console.note(f"Plan of choice {rank}:\n")
        report.print_plan(console, config, best)
        if best.fits:
            train = dataclasses.replace(config.train, micro_batch_size=choice.micro_batch_size)
            print_warnings(async_tp_warnings(choice.parallel, train))
            _warn(config, best)
            record["best_plan"] = plan_json.plan_record(config, best) | {"choice": rank}
            recommended = report.recommendation(result, rank, best, commands)
            break
        console.note(f"Traced memory of choice {rank} does not fit.")
    if not result.best:
        record["remedy"] = _remedy(config, request)
        console.note(record["remedy"])
    if recommended:
        console.note(recommended)
    names = report.choice_names([choice for choice, _ in result.best])
    plans = [run.fullest for _, run in result.best]
    bars = [(name, each.memory) for name, each in zip(names, plans, strict=True)]
    plan_json.write(console, config, record, bars, [each.capacity for each in plans])
    return bool(recommended)


def _warn(config: PlanJobConfig, run: RunPlan) -> None:
    """Print warnings about attention, time limits, and the interval of checkpoints if it fits."""
    from planning import report

    print_warnings(flash_attention_warnings(run.stages[0].spec))
    print_warnings(limit_warnings(config.watchdog, report.phase_seconds(run)))
    if run.fits:
        print_warnings(interval_warnings(report.failure_plan(config, run)))


def _remedy(config: PlanJobConfig, request: PlanRequest, current: Choice | None = None) -> str:
    hardware, devices = config.device, config.n_devices
    is_given = config.devices is not None
    if current is None and (invalid := no_valid_mesh(request, devices, is_given)) is not None:
        return f"Invalid configuration: {invalid}"
    limit = partial(memory_limit, hardware=hardware)
    found = remedy(request, limit, devices, hardware.devices_per_node, current)
    return f"Does not fit on {devices} × {hardware.name}: {found}"


def train_command(choice: Choice, config: PlanJobConfig, arguments: list[str]) -> str:
    """Return the `train.py` command for a choice: this command without the planner's own keys.

    The mesh gives the number of processes; that of an experiment is removed if it is another one.
    """
    options, parallel, kept = parse_options(arguments, "plan"), config.parallel, []
    omitted = {word.partition("=")[0] for word in choice.overrides}.union(
        LAUNCH_KEYS, {"parallel.auto"}
    )
    for word in options.words:
        plain_word = word.lstrip("+-")
        key = plain_word.lstrip("~").partition("=")[0]
        if key.partition(".")[0] not in PLANNER_KEYS and key not in omitted:
            kept.append(plain_word)
    per_node = parallel.devices or config.hardware.devices_per_node
    is_other = per_node * (parallel.num_nodes or 1) != choice.mesh.world_size
    if typed_files(options, "experiment"):
        values = {key: getattr(parallel, key.partition(".")[2]) for key in LAUNCH_KEYS}
        unset = explicit_keys(options.words).intersection(LAUNCH_KEYS)
        if is_other or unset:
            unset |= {key for key, value in values.items() if value is not None}
        kept += [f"{key}=null" for key in sorted(unset)]
    return " ".join(["python train.py", *map(shlex.quote, kept), *choice.overrides])


if __name__ == "__main__":
    start_up()
    main(sys.argv[1:])
