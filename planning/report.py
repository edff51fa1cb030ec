"""Reports of a plan or a search: console tables, plan.json and a plot of memory.

In JSON, memory is in bytes per rank, times are in seconds, and rates cover the entire mesh unless
the key names a device.
"""

import json
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from parallel.mesh import AXES
from planning.config import PlanJobConfig
from planning.memory import GIB, PARTS, MemoryBreakdown
from planning.plan import SECONDS_PER_DAY, Plan, RunPlan, link, step_seconds
from planning.search import SearchResult
from training.console import Console, compact

MIB = 2**20
# Persistent state in blue, the rest in orange.
COLORS = {
    "parameters": "#08519c",
    "gradients": "#3182bd",
    "optimizer": "#9ecae1",
    "activations": "#d94801",
    "gathered": "#fd8d3c",
    "logits": "#fdbe85",
    "temporary": "#bdbdbd",
}


# ---------------------------------------------------------------- tables


def print_plan(console: Console, config: PlanJobConfig, run: RunPlan) -> None:
    """Print memory, communication and time of each stage, then a summary."""
    first = run.stages[0]
    names = _stage_names(run)
    console.header(
        f"Plan: {config.model.name} on {first.spec.mesh.world_size} × {config.hardware.name}",
        [
            ("mesh", f"{first.spec.mesh}"),
            *(
                (name or "batch", _batch(stage))
                for name, stage in zip(names, run.stages, strict=True)
            ),
            ("precision", _precision(first)),
            ("checkpointing", str(first.spec.parallel.activation_checkpoint)),
        ],
    )
    bars = memory_bars(run)
    capacities = [stage.capacity for stage in run.stages for _ in stage.tiers]
    unit, size = ("GiB", GIB) if max(m.peak for _, m in bars) >= GIB else ("MiB", MIB)
    console.table(
        f"Peak memory per rank, {unit}",
        ["", *(name for name, _ in bars)],
        [
            *([part, *(f"{m.by_part()[part] / size:,.2f}" for _, m in bars)] for part in PARTS),
            ["peak", *(f"{memory.peak / size:,.2f}" for _, memory in bars)],
            ["available", *(f"{available / size:,.2f}" for available in capacities)],
            ["phase", *(memory.phase for _, memory in bars)],
        ],
    )
    full = run.fullest
    if traffic := full.traffic_by_axis():
        unit, size = ("GiB", GIB) if traffic[0][-1] >= GIB else ("MiB", MIB)
        links = {axis: link(axis, full.spec, full.hardware) for axis, *_ in traffic}
        console.table(
            "Communication per rank and step",
            ["axis", "link", "collective", "purpose", "count", f"{unit} sent"],
            [
                [axis, links[axis], kind, part, f"{count:,}", f"{sent / size:,.3f}"]
                for axis, kind, part, count, sent in traffic
            ],
        )
    for name, stage in zip(names, run.stages, strict=True):
        parts = step_seconds(stage) | {"total": stage.time.total}
        console.table(
            f"Step time{name and ', '}{name}",
            ["", "seconds", "fraction"],
            [
                [part, f"{seconds:.4f}", f"{seconds / stage.time.total:.1%}"]
                for part, seconds in parts.items()
            ],
        )
    console.header("Summary", _summary_rows(config, run))


def _summary_rows(config: PlanJobConfig, run: RunPlan) -> list[tuple[str, str]]:
    full, first = run.fullest, run.stages[0]
    causal, all_pairs = first.mfu(), first.mfu(causal=False)
    mfu = ""
    if causal is not None and all_pairs is not None:
        mfu = f", MFU {causal:.1%} causal, {all_pairs:.1%} full"
    source = f"train.max_steps={config.train.max_steps}" if config.tokens is None else "tokens="
    rows = [
        ("fits", "yes" if run.fits else "no"),
        ("peak memory", f"{full.memory.peak / GIB:.2f} of {full.capacity / GIB:.2f} GiB per rank"),
        ("bottleneck", run.bottleneck),
        ("throughput", f"{run.tokens_per_second:,.0f} tokens/s"),
        ("per device", f"{first.tokens_per_second_per_device:,.0f} tokens/s"),
        ("", f"{first.tflops():.3g} TFLOP/s{mfu}"),
        ("tokens", f"{compact(run.tokens)} ({source})"),
    ]
    if run.days is not None:
        rows.append(("duration", _duration(run.days)))
    if run.cost is not None:
        price = config.hardware.price_per_hour
        rows.append(("cost", f"{run.cost:,.0f} at {price:g} per device-hour"))
    return rows


def print_search(
    console: Console, config: PlanJobConfig, result: SearchResult, commands: Sequence[str]
) -> None:
    """Print the fastest choices with their commands, and why the rest were rejected."""
    console.header(
        f"Search: {config.model.name} on {config.n_devices} × {config.hardware.name}",
        [("candidates", f"{result.candidates:,}"), ("fitting", f"{result.fitting:,}")],
    )
    if result.best:
        console.table(
            f"Fastest {len(result.best)}",
            ["", *AXES, "micro-batch", "checkpointing", "reshard", "reduce", "GiB", "tokens/s"],
            [
                [
                    str(rank),
                    *map(str, choice.mesh.sizes),
                    str(choice.micro_batch_size),
                    str(choice.activation_checkpoint),
                    choice.reshard,
                    choice.reduce_gradients,
                    f"{run.fullest.memory.peak / GIB:.2f}",
                    f"{run.tokens_per_second:,.0f}",
                ]
                for rank, (choice, run) in enumerate(result.best, start=1)
            ],
        )
        numbered = [(str(rank), command) for rank, command in enumerate(commands, start=1)]
        console.summary("Commands:", [], numbered)
        console.note("")
    if result.rejections:
        ordered = sorted(result.rejections.items(), key=lambda item: -item[1].count)
        rows = [(f"{each.count:,}", f"{why}; e.g. {each.example}") for why, each in ordered]
        console.header("Rejected candidates", rows)


def memory_bars(run: RunPlan) -> list[tuple[str, MemoryBreakdown]]:
    """Return (name, memory) for each stage and each method of computing its memory."""
    return [
        (f"{name} {tier}".strip(), memory)
        for name, stage in zip(_stage_names(run), run.stages, strict=True)
        for tier, memory in stage.tiers.items()
    ]


def _stage_names(run: RunPlan) -> list[str]:
    """Return one name per stage, empty if there is only one."""
    if len(run.stages) == 1:
        return [""]
    return [f"stage {number}" for number in range(1, len(run.stages) + 1)]


def _batch(plan: Plan) -> str:
    spec = plan.spec
    return (
        f"{spec.global_batch_size} sequences of {spec.seq_len} tokens per step; "
        f"{spec.micro_batches} micro-batches of {spec.micro_batch_size} per data-parallel rank"
    )


def _precision(plan: Plan) -> str:
    precision = plan.spec.precision
    fp8 = f", matrix products in fp8 ({precision.fp8})" if precision.fp8 else ""
    return (
        f"{precision.param}{fp8}, gradient reduction in {precision.reduce}, optimizer state in "
        f"{precision.optimizer_state}"
    )


def _duration(days: float) -> str:
    if days >= 2:
        return f"{days:,.1f} days"
    hours = days * 24
    return f"{hours:.1f} hours" if hours >= 2 else f"{days * SECONDS_PER_DAY:.1f} seconds"


# ---------------------------------------------------------------- plan.json


def plan_record(config: PlanJobConfig, run: RunPlan) -> dict[str, Any]:
    """Return the plan of a run as JSON values."""
    return {
        "model": config.model.name,
        "hardware": config.hardware.name,
        "devices": run.stages[0].spec.mesh.world_size,
        "fits": run.fits,
        "limit": run.bottleneck,
        "tokens": run.tokens,
        "tokens_per_second": run.tokens_per_second,
        "days": run.days,
        "cost": run.cost,
        "stages": [_stage_record(stage) for stage in run.stages],
    }


def _stage_record(plan: Plan) -> dict[str, Any]:
    spec = plan.spec
    return {
        "mesh": dict(zip(AXES, spec.mesh.sizes, strict=True)),
        "seq_len": spec.seq_len,
        "global_batch_size": spec.global_batch_size,
        "micro_batch_size": spec.micro_batch_size,
        "micro_batches": spec.micro_batches,
        "activation_checkpoint": spec.parallel.activation_checkpoint,
        "reduce_gradients": spec.parallel.reduce_gradients,
        "reshard_after_forward": spec.parallel.reshard_after_forward,
        "tokens": plan.tokens,
        "fits": plan.fits,
        "capacity": plan.capacity,
        "memory": {
            tier: {**memory.by_part(), "peak": memory.peak, "moment": memory.phase}
            for tier, memory in plan.tiers.items()
        },
        "traffic": [
            {
                "axis": axis,
                "link": link(axis, spec, plan.hardware),
                "kind": kind,
                "part": part,
                "count": count,
                "bytes_sent": sent,
            }
            for axis, kind, part, count, sent in plan.traffic_by_axis()
        ],
        "step_seconds": {**step_seconds(plan), "all": plan.time.total},
        "tokens_per_second": plan.tokens_per_second,
        "tokens_per_second_per_device": plan.tokens_per_second_per_device,
        "tflops_per_device": plan.tflops(),
        "mfu_causal": plan.mfu(),
        "mfu_full": plan.mfu(causal=False),
    }


def search_record(
    config: PlanJobConfig, result: SearchResult, commands: Sequence[str]
) -> dict[str, Any]:
    """Return the result of a search as JSON values."""
    return {
        "model": config.model.name,
        "hardware": config.hardware.name,
        "devices": config.n_devices,
        "candidates": result.candidates,
        "fitting": result.fitting,
        "best": [
            {
                "overrides": " ".join(choice.overrides),
                "command": command,
                "tokens_per_second": run.tokens_per_second,
                "memory_peak": run.fullest.memory.peak,
                "limit": run.bottleneck,
            }
            for (choice, run), command in zip(result.best, commands, strict=True)
        ],
        "not": {
            reason: {"count": each.count, "example": each.example}
            for reason, each in result.rejections.items()
        },
    }


def write(
    console: Console,
    config: PlanJobConfig,
    record: dict[str, Any],
    bars: Sequence[tuple[str, MemoryBreakdown]],
    limit: int,
) -> None:
    """Write plan.json and the plot of memory next to it, unless `output` is null."""
    if config.output is None:
        return
    path = Path(config.output)
    image = path.with_suffix(".png")
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, path)
        if bars:
            plot_memory(bars, limit, image, f"{config.model.name} on {config.hardware.name}")
    except OSError as error:
        sys.exit(f"Error: output={config.output}: {error}; use another path, or null for no output")
    console.note(f"Wrote {path} and {image}." if bars else f"Wrote {path}.")


# ---------------------------------------------------------------- plot


def plot_memory(
    bars: Sequence[tuple[str, MemoryBreakdown]], limit: int, image: Path, title: str
) -> None:
    """Plot memory by part as stacked bars, with the available memory as a line.

    Raises:
        OSError: The image cannot be written.
    """
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # silence "building the font cache"
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 1.6 + 0.55 * len(bars)), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    left = [0.0] * len(bars)
    for part in PARTS:
        sizes = [getattr(memory, part) / GIB for _, memory in bars]
        if any(sizes):
            axes.barh(range(len(bars)), sizes, left=left, color=COLORS[part], label=part)
            left = [before + size for before, size in zip(left, sizes, strict=True)]
    for row, size in enumerate(left):
        axes.annotate(f"{size:.1f}", (size, row), (4, 0), textcoords="offset points", va="center")
    limit_gib = limit / GIB
    axes.axvline(limit_gib, color="#252525", linestyle="--", linewidth=1.2)
    axes.annotate(
        f"available: {limit_gib:.1f}",
        (limit_gib, 1),
        (0, 2),
        xycoords=("data", "axes fraction"),
        textcoords="offset points",
        ha="center",
        va="bottom",
    )
    axes.set_yticks(range(len(bars)), [name for name, _ in bars], parse_math=False)
    axes.invert_yaxis()
    axes.set_title(title, loc="left", fontweight="bold", pad=18, parse_math=False)
    axes.set_xlabel("peak memory per rank (GiB)")
    axes.set_xlim(0, 1.12 * max(*left, limit_gib))
    axes.grid(axis="x", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(frameon=False, loc="outside lower center", ncols=4)
    temporary = image.with_name(image.name + ".tmp")
    FigureCanvasAgg(figure).print_figure(temporary, format="png")
    os.replace(temporary, image)
