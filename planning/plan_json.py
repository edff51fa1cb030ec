"""plan.json: the records of a plan or a search, and the file with its plot.

Memory is in bytes per rank, times are in seconds, and rates cover the entire mesh unless the key
names a device. docs/planning.md lists the keys.
"""

import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from data.files import strict_json, write_atomically, write_problem
from parallel.mesh import MeshShape
from planning.communicators import communicator_bytes, spec_communicators
from planning.config import PlanJobConfig
from planning.failures import FailurePlan
from planning.memory import MemoryBreakdown
from planning.memory_plot import plot_memory
from planning.plan import SECONDS_PER_DAY, Plan, RunPlan
from planning.report import failure_plan
from planning.request import SEARCHED, PlanRequest
from planning.search import SearchResult, given_options, options_not_searched
from training.console import Console

SCHEMA_VERSION = 1
"""Of plan.json; docs/planning.md lists its keys."""


def plan_record(config: PlanJobConfig, run: RunPlan) -> dict[str, Any]:
    """Return the plan of a run as JSON values."""
    spec = run.stages[0].spec
    return {
        "schema_version": SCHEMA_VERSION,
        "model": config.model.name,
        "hardware": config.device.name,
        "power_limit_watts": config.power_limit_watts,
        "framework": config.framework,
        "devices": spec.mesh.world_size,
        "precision": asdict(spec.precision),
        "compile": spec.parallel.compile,
        "attention": spec.attention_name,
        "price_per_hour": config.hardware.price_per_hour,
        "fits": run.fits,
        "bottleneck": run.bottleneck,
        "largest_mesh": run.largest_mesh,
        "tokens": run.tokens,
        "tokens_per_second": run.tokens_per_second,
        "tokens_per_second_interval": run.tokens_per_second_interval,
        "tokens_per_second_per_device": run.tokens_per_second_per_device,
        "tflops_per_device": run.tflops(),
        "mfu_causal": run.mfu(),
        "mfu_full": run.mfu(causal=False),
        "days": run.seconds / SECONDS_PER_DAY,
        **cost_record(config, run),
        "host_memory": max(plan.host_peak for plan in run.stages),
        "nccl": {"communicators": spec_communicators(spec), "bytes": communicator_bytes(spec)},
        "failures": _failure_record(config, run),
        "stages": [_stage_record(stage) for stage in run.stages],
    }


def _failure_record(config: PlanJobConfig, run: RunPlan) -> dict[str, Any]:
    plan, times = failure_plan(config, run), ("mtbf", "restart", "stall", "write")
    return {
        "device_mtbf_days": config.device_mtbf_days,
        **{f"{name}_seconds": getattr(plan.interruptions, f"{name}_seconds") for name in times},
        "checkpoint_bytes": plan.checkpoint_bytes,
        "needed_gb_s_per_node": plan.needed_gb_s,
        "interval_seconds": plan.interval_seconds,
        "goodput": asdict(plan.configured),
        "best_interval": plan.best_interval,
        "best_goodput": asdict(plan.best),
        **_failure_totals(config, run, plan),
    }


def _failure_totals(config: PlanJobConfig, run: RunPlan, plan: FailurePlan) -> dict[str, Any]:
    """Return duration, cost and energy with saves and failures."""
    ratio = plan.expected_seconds / run.seconds
    return {"days": plan.expected_seconds / SECONDS_PER_DAY, **cost_record(config, run, ratio)}


def cost_record(config: PlanJobConfig, run: RunPlan, ratio: float = 1.0) -> dict[str, Any]:
    """Return the cost and energy of `ratio` durations; `cost_usd` is null in another currency."""
    currency = config.hardware.currency
    cost, energy_kwh = (
        None if each is None else each * ratio for each in (run.cost, run.energy_kwh)
    )
    return {
        "cost": cost,
        "currency": currency,
        "cost_usd": cost if currency == "USD" else None,
        "energy_kwh": energy_kwh,
    }


def _stage_record(plan: Plan) -> dict[str, Any]:
    spec = plan.spec
    sizes = ("seq_len", "global_batch_size", "micro_batch_size", "micro_batches")
    results = ("tokens", "fits", "capacity", "tokens_per_second", "tokens_per_second_per_device")
    traffic = ("axis", "link", "kind", "part", "count", "bytes_sent")
    return {
        "mesh": asdict(spec.mesh),
        **{key: getattr(spec, key) for key in sizes},
        **{key: getattr(spec.parallel, key) for key in SEARCHED},
        **{key: getattr(plan, key) for key in results},
        "memory": {
            tier: {**memory.by_part(), "peak": memory.peak, "phase": memory.phase}
            for tier, memory in plan.tiers.items()
        },
        "pipeline": _pipeline_record(plan),
        "traffic": [dict(zip(traffic, row, strict=True)) for row in plan.traffic()],
        "step_seconds": {**plan.time.by_part(), "total": plan.time.total},
        "tflops_per_device": plan.tflops(),
        "mfu_causal": plan.mfu(),
        "mfu_full": plan.mfu(causal=False),
    }


def _pipeline_record(plan: Plan) -> dict[str, Any] | None:
    """Return the cut, the schedule and the stages of a pipeline; None without."""
    if plan.spec.mesh.pp == 1:
        return None
    time = plan.time
    return {
        "layers": plan.spec.layers_of_stages,
        "bubble": time.bubble / time.total,
        "rank_seconds": list(time.stage_seconds),
        "slowest_rank": time.slowest_stage,
        "fullest_rank": plan.memory.stage,
    }


def search_record(
    config: PlanJobConfig, request: PlanRequest, result: SearchResult, commands: Sequence[str]
) -> dict[str, Any]:
    """Return the result of a search as JSON values.

    Args:
        commands: Of `train.py`; empty for another framework.
    """
    named: Sequence[str | None] = commands or [None] * len(result.best)
    return {
        "schema_version": SCHEMA_VERSION,
        "model": config.model.name,
        "hardware": config.device.name,
        "devices": config.n_devices,
        "candidates": result.candidates,
        "given": given_options(request),
        "not_searched": options_not_searched(request),
        "best": [
            {
                "overrides": str(choice),
                "command": command,
                "tokens_per_second": run.tokens_per_second,
                "days": run.seconds / SECONDS_PER_DAY,
                **cost_record(config, run),
                "failures": _failure_totals(config, run, failure_plan(config, run)),
                "memory_peak": run.fullest.memory.peak,
                "capacity": run.fullest.capacity,
                "bottleneck": run.bottleneck,
            }
            for (choice, run), command in zip(result.best, named, strict=True)
        ],
        "rejections": {reason: asdict(each) for reason, each in result.rejections.items()},
    }


def write(
    console: Console,
    config: PlanJobConfig,
    record: dict[str, Any],
    bars: Sequence[tuple[str, MemoryBreakdown]],
    limits: Sequence[int],
    mesh: MeshShape | None = None,
) -> None:
    """Write plan.json and the plot of memory next to it, unless `output` is null.

    Args:
        bars: Name and memory of each stage of a plan, or of each choice of a search.
        limits: Bytes available to a rank, of each bar.
        mesh: The mesh of all bars; None if their names have it.
    """
    if config.output is None:
        return
    path = Path(config.output)
    image = path.with_suffix(".png")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, f"{strict_json(record, indent=1)}\n".encode())
        if bars:
            title = f"{config.model.name} on {config.n_devices:,} × {config.device.name}"
            plot_memory(bars, limits, image, f"{title}, {mesh}" if mesh else title)
    except OSError as error:
        problem = write_problem(error, path.parent)
        sys.exit(
            f"Error: output={config.output} cannot be written ({problem}); use another path, or "
            "null for no output"
        )
    console.note(f"Wrote {path} and {image}." if bars else f"Wrote {path}.")
