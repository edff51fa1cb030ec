"""A plan and a search as JSON: `plan.json`.

Memory in bytes of a rank, times in seconds, rates of the whole mesh where no device is named.
"""

from collections.abc import Sequence
from typing import Any

from parallel.mesh import AXES
from planning.config import PlanJobConfig
from planning.memory import Memory
from planning.plan import PARTS, Plan, RunPlan, step_parts
from planning.search import SearchResult


def plan_record(config: PlanJobConfig, plan: RunPlan) -> dict[str, Any]:
    """All stages, and what they come to."""
    first = plan.stages[0]
    return {
        "model": config.model.name,
        "hardware": config.hardware.name,
        "devices": first.job.mesh.world_size,
        "fits": plan.fits,
        "limit": plan.fullest.limit if not plan.fits else first.limit,
        "tokens": plan.tokens,
        "tokens_per_second": plan.tokens_per_second,
        "days": plan.days,
        "cost": plan.cost,
        "stages": [stage_record(stage) for stage in plan.stages],
    }


def stage_record(plan: Plan) -> dict[str, Any]:
    """One stage of a plan."""
    job, links = plan.job, plan.links()
    return {
        "mesh": dict(zip(AXES, job.mesh.sizes, strict=True)),
        "seq_len": job.seq_len,
        "global_batch_size": job.global_batch_size,
        "micro_batch_size": job.micro_batch_size,
        "micro_batches": job.micro_batches,
        "activation_checkpoint": job.parallel.activation_checkpoint,
        "reduce_gradients": job.parallel.reduce_gradients,
        "reshard_after_forward": job.parallel.reshard_after_forward,
        "tokens": plan.tokens,
        "fits": plan.fits,
        "capacity": plan.capacity,
        "memory": {tier: memory_record(memory) for tier, memory in plan.tiers.items()},
        "traffic": [
            {"axis": axis, "link": links[axis], "kind": kind, "part": part, "count": count}
            | {"bytes_sent": sent}
            for axis, kind, part, count, sent in plan.by_axis()
        ],
        "step_seconds": step_parts(plan),
        "tokens_per_second": plan.tokens_per_second,
        "tokens_per_second_per_device": plan.tokens_per_second_per_device,
        "tflops_per_device": plan.tflops(),
        "mfu_causal": plan.mfu(),
        "mfu_full": plan.mfu(causal=False),
    }


def memory_record(memory: Memory) -> dict[str, Any]:
    """Bytes by part, and their sum at the moment that it is of."""
    parts = {part: getattr(memory, part) for part in PARTS}
    return {**parts, "peak": memory.peak, "moment": memory.moment}


def search_record(
    config: PlanJobConfig, found: SearchResult, commands: Sequence[str]
) -> dict[str, Any]:
    """A search as JSON."""
    return {
        "model": config.model.name,
        "hardware": config.hardware.name,
        "devices": config.n_devices,
        "candidates": found.candidates,
        "fitting": found.fitting,
        "best": [
            {
                "overrides": " ".join(choice.overrides),
                "command": command,
                "tokens_per_second": plan.tokens_per_second,
                "memory_peak": plan.fullest.memory.peak,
                "limit": plan.stages[0].limit,
            }
            for (choice, plan), command in zip(found.best, commands, strict=True)
        ],
        "not": {
            why: {"count": one.count, "example": one.example} for why, one in found.reasons.items()
        },
    }
