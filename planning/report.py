"""Reports of a plan or a search on the console."""

import math
from collections.abc import Sequence

from parallel.config import PrecisionConfig
from parallel.mesh import AXES
from parallel.pipeline_schedule import describe_pipeline
from planning.communicators import communicator_bytes, spec_communicators
from planning.config import PlanJobConfig
from planning.failures import ExpectedGoodput, FailurePlan, plan_failures, time_text
from planning.memory import GIB, PARTS, MemoryBreakdown, size_text, size_unit
from planning.plan import TIGHT, Plan, RunPlan
from planning.request import Choice, PlanRequest, in_yaml
from planning.search import SearchResult, given_options, options_not_searched
from planning.step_spec import StepSpec
from planning.time_limits import PhaseSeconds, planned_seconds, time_limits
from training.console import Console, compact, duration

COLUMNS = {
    "activation_checkpoint": "checkpointing",
    "reshard_after_forward": "reshard",
    "reduce_gradients": "reduce",
}
"""Headings of the settings that a search varies, if they are not the key."""


# ---------------------------------------------------------------- tables


def print_plan(console: Console, config: PlanJobConfig, run: RunPlan) -> None:
    """Print memory, communication and time of each stage, then a summary."""
    spec, full = run.stages[0].spec, run.fullest
    stages = list(zip(_stage_names(run), run.stages, strict=True))
    console.header(
        f"Plan: {config.model.name} on {spec.mesh.world_size} × {config.device.name}",
        [
            ("devices", config.devices_text),
            ("mesh", str(spec.mesh)),
            *((name or "batch", _batch(stage)) for name, stage in stages),
            *_pipeline(spec),
            ("precision", _precision(spec.precision)),
            ("attention", spec.attention_name),
            ("checkpointing", _checkpointing(spec)),
        ],
    )
    bars, capacities = memory_bars(run), bar_limits(run)
    unit, size = size_unit(max(memory.peak for _, memory in bars))
    sizes = {part: [memory.by_part()[part] for _, memory in bars] for part in PARTS}
    sizes |= {"peak": [memory.peak for _, memory in bars], "available": capacities}
    console.table(
        f"Peak memory per rank, {unit}",
        ["", *(name for name, _ in bars)],
        [
            *([name, *(f"{each / size:,.2f}" for each in row)] for name, row in sizes.items()),
            ["phase", *(memory.phase for _, memory in bars)],
            *(
                [["pipeline rank", *(str(memory.stage) for _, memory in bars)]]
                if spec.mesh.pp > 1
                else []
            ),
        ],
    )
    if traffic := full.traffic():
        unit, size = size_unit(traffic[0][-1])
        name = next(name for name, stage in stages if stage is full)
        busiest = " of the busiest pipeline rank" if spec.mesh.pp > 1 else ""
        console.table(
            f"Communication per rank{busiest} and step{name and ', '}{name}",
            ["axis", "link", "collective", "purpose", "count", f"{unit} sent"],
            [[*names, f"{count:,}", f"{sent / size:,.3f}"] for *names, count, sent in traffic],
        )
    for name, stage in stages:
        total = stage.time.total
        parts = stage.time.by_part() | {"total": total}
        slowest = f", slowest pipeline rank {stage.time.slowest_stage}" if spec.mesh.pp > 1 else ""
        console.table(
            f"Step time{slowest}{name and ', '}{name}",
            ["", "seconds", "fraction"],
            [[part, f"{time:.4f}", f"{time / total:.1%}"] for part, time in parts.items()],
        )
    console.header("Checkpoints and failures", _failure_rows(config, run))
    console.header("Summary", _summary_rows(config, run))


def _summary_rows(config: PlanJobConfig, run: RunPlan) -> list[tuple[str, str]]:
    full, causal, mesh = run.fullest, run.mfu(), run.stages[0].spec.mesh
    pp = f"pp={mesh.pp}, " if mesh.pp > 1 else ""
    others = f"{pp}cp={mesh.cp} and tp={mesh.tp}"
    mfu = "" if causal is None else f", MFU {causal:.1%} causal, {run.mfu(causal=False):.1%} full"
    source = f"train.max_steps={config.train.max_steps}" if config.tokens is None else "tokens="
    rows = [
        ("fits", "yes" if run.fits else "no"),
        ("peak memory", f"{size_text(full.memory.peak)} of {size_text(full.capacity)} per rank"),
        *_nccl_rows(run),
        *_host_rows(config, run),
        ("bottleneck", run.bottleneck),
        ("throughput", f"{_decimals(run.tokens_per_second)} tokens/s{_throughput_interval(run)}"),
        ("per device", f"{_decimals(run.tokens_per_second_per_device)} tokens/s"),
        ("", f"{run.tflops():.3g} TFLOP/s{mfu}"),
        ("largest mesh", f"{run.largest_mesh:,} devices with {others}"),
        ("tokens", f"{compact(run.tokens)} ({source})"),
        ("duration", duration(run.seconds) if run.seconds >= 1 else "under a second"),
    ]
    hardware = config.device
    if run.cost is not None and hardware.price_per_hour is not None:
        price = in_currency(f"{hardware.price_per_hour:g}", hardware.currency)
        rows.append(("cost", f"{money(run.cost, hardware.currency)} at {price} per device-hour"))
    if run.energy_kwh is not None:
        limit = f"at most, {hardware.power_watts:g} W per device without hosts"
        rows.append(("energy", f"{energy(run.energy_kwh)} {limit}"))
    if hardware.note is not None:
        rows.append(("note", hardware.note))
    limits = time_limits(config.watchdog, phase_seconds(run))
    return [*rows, ("time limits", str(limits))]


def _throughput_interval(run: RunPlan) -> str:
    """Return the interval of the throughput as text."""
    interval = run.tokens_per_second_interval
    if interval is None:
        return ""
    return " (80% interval: {:,.0f} to {:,.0f})".format(*interval)


def phase_seconds(run: RunPlan) -> PhaseSeconds:
    """Return the planned seconds of the phases with a time limit."""
    return planned_seconds([plan.spec for plan in run.stages], run.stages[0].hardware)


def _host_rows(config: PlanJobConfig, run: RunPlan) -> list[tuple[str, str]]:
    """Return the row about the host memory of nodes with GPUs."""
    peak, available = max(plan.host_peak for plan in run.stages), config.hardware.host_memory_gib
    if not peak:
        return []
    limit = "" if available is None else f" of {available:,.0f}"
    saves = "asynchronous" if config.checkpoint.async_save else "synchronous"
    return [("host memory", f"{peak / GIB:,.0f}{limit} GiB per node, {saves} saves")]


def _nccl_rows(run: RunPlan) -> list[tuple[str, str]]:
    """Return the row about NCCL's buffers, which the available memory excludes."""
    spec = run.stages[0].spec
    size, count = communicator_bytes(spec), spec_communicators(spec)
    return [("NCCL buffers", f"{size_text(size)} per rank, communicators: {count}")] if size else []


def failure_plan(config: PlanJobConfig, run: RunPlan) -> FailurePlan:
    """Return what failures and saves cost a run."""
    return plan_failures(config.checkpoint, run, config.device_mtbf_days, config.restart_seconds)


def _failure_rows(config: PlanJobConfig, run: RunPlan) -> list[tuple[str, str]]:
    """Return rows about the size and time of saves, and the goodput with failures."""
    plan = failure_plan(config, run)
    times, gigabytes = plan.interruptions, plan.checkpoint_bytes / 1e9
    saves = "asynchronous" if config.checkpoint.async_save else "synchronous"
    writing = gigabytes / plan.n_nodes / plan.storage_gb_s
    given = config.restart_seconds
    restart = "planned" if given is None else f"restart_seconds={given:g}"
    planned, best = plan.configured, plan.best
    finishes = math.isfinite(plan.expected_seconds)
    rows = [
        (
            "checkpoint",
            f"{_decimals(gigabytes)} GB, {_decimals(gigabytes / plan.n_nodes)} GB per node: "
            f"{_decimals(writing)} s at {plan.storage_gb_s:g} GB/s; for the interval, storage must "
            f"sustain {_decimals(plan.needed_gb_s)} GB/s per node",
        ),
        ("save stall", f"{_decimals(times.stall_seconds)} s, {saves} saves"),
        ("interval", f"{_interval(config, plan)}; best {_steps(plan.best_interval)}"),
        (
            "failures",
            f"one in {time_text(times.mtbf_seconds)} on {plan.n_devices:,} × "
            f"{config.device.name} (device_mtbf_days={config.device_mtbf_days:g})",
        ),
        ("restart", f"{times.restart_seconds:,.0f} s ({restart})"),
        ("goodput", goodput_text(planned, best)),
        ("total duration", duration(plan.expected_seconds) if finishes else "never finishes"),
    ]
    if run.cost is not None and finishes:
        cost = run.cost * plan.expected_seconds / run.seconds
        rows.append(("total cost", money(cost, config.hardware.currency)))
    return rows


def goodput_text(planned: ExpectedGoodput, best: ExpectedGoodput) -> str:
    """Return the goodput with its losses, and the best, with decimals that tell them apart."""
    pair = (planned.productive, best.productive)
    digits = next((each for each in (1, 2, 3) if len({f"{one:.{each}%}" for one in pair}) > 1), 2)
    productive, lost, restart, stalled, most = (
        f"{each:.{digits}%}"
        for each in (*pair[:1], planned.lost, planned.restart, planned.stalled, *pair[1:])
    )
    return f"{productive} (lost steps {lost}, restarts {restart}, saves {stalled}); best {most}"


def _interval(config: PlanJobConfig, plan: FailurePlan) -> str:
    """Return when checkpoints are saved, and the time between saves."""
    checkpoint = config.checkpoint
    parts = [] if checkpoint.interval is None else [_steps(checkpoint.interval)]
    if checkpoint.interval_minutes is not None:
        parts.append(f"{checkpoint.interval_minutes:g} minutes")
    when = " or ".join(parts) or "last step only"
    return f"{when} ({time_text(plan.interval_seconds)})"


def _steps(count: int) -> str:
    return "1 step" if count == 1 else f"{count:,} steps"


def _decimals(value: float) -> str:
    """Return a number with a decimal below 100."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 1 else f"{value:.2g}"


def print_search(
    console: Console,
    config: PlanJobConfig,
    request: PlanRequest,
    result: SearchResult,
    commands: Sequence[str],
) -> None:
    """Print the fastest choices, their commands if there are any, and why others were rejected."""
    settings = [choice.settings() for choice, _ in result.best]
    differing = [key for key in (settings or [{}])[0] if len({each[key] for each in settings}) > 1]
    shared = [
        f"{key}={value}" for key, value in (settings or [{}])[0].items() if key not in differing
    ]
    console.header(
        f"Search: {config.model.name} on {config.n_devices} × {config.device.name}",
        [
            ("devices", config.devices_text),
            ("candidates", f"{result.candidates:,}"),
            ("given", ", ".join(given_options(request)) or "none"),
            ("not searched", ", ".join(options_not_searched(request))),
            *([("in all below", ", ".join(shared))] if shared else []),
        ],
    )
    if result.best:
        unit, size = size_unit(max(run.fullest.memory.peak for _, run in result.best))
        columns = [COLUMNS.get(key, key) for key in differing]
        has_tight = any(run.is_tight for _, run in result.best)
        console.table(
            f"Fastest {len(result.best)}",
            [
                *("", *AXES, "micro-batch", *columns, unit),
                *([""] if has_tight else []),
                "tokens/s",
                *(["cost"] if config.hardware.price_per_hour is not None else []),
            ],
            [
                [
                    *(
                        in_yaml(each)
                        for each in (rank, *choice.mesh.sizes, choice.micro_batch_size)
                    ),
                    *(choice.settings()[key] for key in differing),
                    f"{run.fullest.memory.peak / size:.2f}",
                    *(["tight" if run.is_tight else ""] if has_tight else []),
                    f"{run.tokens_per_second:,.0f}",
                    *([] if run.cost is None else [money(run.cost, config.hardware.currency)]),
                ]
                for rank, (choice, run) in enumerate(result.best, start=1)
            ],
        )
        if has_tight:
            console.note(f"tight: uses more than {TIGHT:.0%} of the available memory\n")
        if commands:
            numbered = [
                f"  {rank}:\n    {command}" for rank, command in enumerate(commands, start=1)
            ]
            console.note("\n\n".join(["Commands:", *numbered, ""]).removesuffix("\n"))
    if result.rejections:
        ordered = sorted(result.rejections.items(), key=lambda item: -item[1].count)
        rows = [(f"{each.count:,}", f"{why}; e.g. {each.example}") for why, each in ordered]
        console.header("Rejected candidates", rows)


def recommendation(result: SearchResult, rank: int, run: RunPlan, commands: Sequence[str]) -> str:
    """Return the recommended choice with its advantage, free memory and command.

    Args:
        rank: Of the choice, from 1.
        run: Its plan, with traced memory if that is known.
    """
    speed, full = run.tokens_per_second, run.fullest
    parts = [f"Recommended: choice {rank} ({result.best[rank - 1][0].mesh})"]
    for choice, other in result.best[rank : rank + 1]:
        ratio = speed / other.tokens_per_second - 1
        percent = f"{abs(ratio):.1%}"
        faster = f"{percent} {'faster' if ratio >= 0 else 'slower'} than"
        parts.append(f"{'as fast as' if percent == '0.0%' else faster} the next")
        if other.is_tight and not run.is_tight:
            parts[-1] += ", which is tight"
        elif choice.mesh.pp > 1 == result.best[rank - 1][0].mesh.pp and ratio < 0:
            parts[-1] += ", which is a pipeline"
    free = full.capacity - full.memory.peak
    tight = " (tight)" if run.is_tight else ""
    parts.append(f"{size_text(free)} of {size_text(full.capacity)} free{tight}")
    command = f": {commands[rank - 1]}" if commands else ""
    return f"{', '.join(parts)}{command}"


def money(cost: float, currency: str) -> str:
    """Return an amount, with cents below 100."""
    if 0 < cost < 0.01:
        return f"under {in_currency('0.01', currency)}"
    return in_currency(f"{cost:,.2f}" if cost < 100 else f"{cost:,.0f}", currency)


def in_currency(amount: str, currency: str) -> str:
    """Return an amount with the sign of US dollars, or the code of another currency."""
    return f"${amount}" if currency == "USD" else f"{amount} {currency}"


def energy(kwh: float) -> str:
    """Return an energy in kWh, or from a thousand on in MWh."""
    return f"{kwh:,.3g} kWh" if kwh < 1000 else f"{kwh / 1000:,.1f} MWh"


def memory_bars(run: RunPlan) -> list[tuple[str, MemoryBreakdown]]:
    """Return (name, memory) for each stage and each method of computing its memory."""
    return [
        (f"{name} {tier}".strip(), memory)
        for name, stage in zip(_stage_names(run), run.stages, strict=True)
        for tier, memory in stage.tiers.items()
    ]


def bar_limits(run: RunPlan) -> list[int]:
    """Return the bytes available to a rank for each of `memory_bars`."""
    return [stage.capacity for stage in run.stages for _ in stage.tiers]


def choice_names(choices: Sequence[Choice]) -> list[str]:
    """Return rank and mesh of each choice, and the settings by which those of a mesh differ."""
    values = [
        {"micro-batch": in_yaml(choice.micro_batch_size), **choice.settings()} for choice in choices
    ]
    names = []
    for rank, choice in enumerate(choices, start=1):
        same = [
            each for each, other in zip(values, choices, strict=True) if other.mesh == choice.mesh
        ]
        differing = [key for key in same[0] if len({each[key] for each in same}) > 1]
        words = [f"{COLUMNS.get(key, key)} {values[rank - 1][key]}" for key in differing]
        names.append(f"{rank}: {choice.mesh}\n{', '.join(words)}".strip())
    return names


def _stage_names(run: RunPlan) -> list[str]:
    """Return one name per stage, empty if there is only one."""
    names = [f"stage {number}" for number in range(1, len(run.stages) + 1)]
    return names if len(names) > 1 else [""]


def _batch(plan: Plan) -> str:
    spec = plan.spec
    batches = "micro-batch" if spec.micro_batches == 1 else "micro-batches"
    return (
        f"{spec.global_batch_size} sequences of {spec.seq_len} tokens per step; "
        f"{spec.micro_batches} {batches} of {spec.micro_batch_size} per data-parallel rank"
    )


def _pipeline(spec: StepSpec) -> list[tuple[str, str]]:
    if spec.mesh.pp == 1:
        return []
    text = describe_pipeline(spec.layers_of_stages, spec.mesh.pp, spec.micro_batches)
    return [("pipeline", text)]


def _checkpointing(spec: StepSpec) -> str:
    """Return the activation checkpointing, in order of the pipeline ranks if theirs differ."""
    modes = [str(stage.parallel.activation_checkpoint) for stage in spec.stages]
    return modes[0] if len({*modes}) == 1 else f"{', '.join(modes)} by pipeline rank"


def _precision(precision: PrecisionConfig) -> str:
    fp8 = f", matrix products in fp8 ({precision.fp8})" if precision.fp8 else ""
    return (
        f"{precision.param}{fp8}, gradient reduction in {precision.reduce}, optimizer state in "
        f"{precision.optimizer_state}"
    )
