"""Search for the fastest mesh, micro-batch size, activation checkpointing and resharding.

Every candidate is planned with the closed forms, about a second for a thousand. Validity is decided
by the rules of `train.py` (`PlanRequest`).
"""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product

from parallel.mesh import MeshShape
from planning.hardware import Hardware
from planning.memory import GIB, MemoryBreakdown, step_memory
from planning.plan import RunPlan, capacity, plan_run
from planning.request import CheckpointMode, Choice, PlanRequest, ReduceMode
from planning.step_spec import StepSpec

CHECKPOINT_MODES: tuple[CheckpointMode, ...] = ("none", "selective", "full")
"""Values of `parallel.activation_checkpoint`, fastest first."""
REDUCE_MODES: tuple[ReduceMode, ...] = ("step", "micro_batch")
"""Values of `parallel.reduce_gradients`, least communication first."""


@dataclass
class Rejection:
    """Number of candidates rejected for one reason, and an example."""

    count: int
    example: str


@dataclass
class SearchResult:
    """The fastest candidates, in order, and the reasons for rejecting the rest."""

    candidates: int = 0
    best: list[tuple[Choice, RunPlan]] = field(default_factory=list)
    fitting: int = 0
    rejections: dict[str, Rejection] = field(default_factory=dict)

    def reject(self, reason: str, example: str) -> None:
        """Count a rejected candidate."""
        self.rejections.setdefault(reason, Rejection(0, example)).count += 1


def meshes(devices: int) -> Iterator[MeshShape]:
    """Yield every mesh of `devices` ranks."""
    for tp in divisors(devices):
        for cp in divisors(devices // tp):
            for dp_shard in divisors(devices // tp // cp):
                yield MeshShape(devices // tp // cp // dp_shard, dp_shard, cp, tp)


def divisors(number: int) -> list[int]:
    """Return all divisors in ascending order."""
    low = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return low + [number // n for n in reversed(low) if n * n != number]


def choices(mesh: MeshShape, request: PlanRequest) -> Iterator[Choice]:
    """Yield the candidates on a valid mesh, without settings that have no effect there."""
    current = request.config.parallel.activation_checkpoint
    modes = CHECKPOINT_MODES if current in CHECKPOINT_MODES else (current, *CHECKPOINT_MODES)
    reshards = (None, True, False) if mesh.dp_shard * mesh.cp > 1 else (None,)
    batch_size, reduces = request.local_batch_size(mesh), mesh.dp * mesh.cp > 1
    for size in divisors(batch_size):
        reductions = REDUCE_MODES if size < batch_size and reduces else REDUCE_MODES[:1]
        for mode, reshard, reduction in product(modes, reshards, reductions):
            yield Choice(mesh, size, mode, reshard, reduction)


def search(request: PlanRequest, devices: int, hardware: Hardware, keep: int = 10) -> SearchResult:
    """Plan every candidate on `devices` devices and return the `keep` fastest that fit."""
    result = SearchResult()
    fitting: list[tuple[Choice, RunPlan]] = []
    for mesh in meshes(devices):
        if errors := request.mesh_errors(mesh):
            result.candidates += 1
            result.reject(f"invalid: {_rule_of(errors[0])}", f"{mesh}: {errors[0]}")
            continue
        for choice in choices(mesh, request):
            result.candidates += 1
            if errors := request.choice_errors(choice):
                result.reject(f"invalid: {_rule_of(errors[0])}", errors[0])
                continue
            stages = request.stages(choice)
            spec, memory = fullest_stage(stages)
            limit = capacity(spec, hardware)
            if memory.peak > limit:
                needs = f"{memory.peak / GIB:.1f} of {limit / GIB:.1f} GiB"
                result.reject(
                    f"out of memory, largest part {memory.largest_part}",
                    f"{' '.join(choice.overrides)}: {needs}",
                )
                continue
            fitting.append((choice, plan_run(stages, hardware)))
    # Ties: fewer axes first, then lower peak memory.
    fitting.sort(
        key=lambda pair: (
            -pair[1].tokens_per_second,
            sum(size > 1 for size in pair[0].mesh.sizes),
            pair[1].fullest.memory.peak,
        )
    )
    result.fitting, result.best = len(fitting), fitting[:keep]
    if slower := fitting[keep:]:
        choice, plan = slower[0]
        speed = f"{plan.tokens_per_second:,.0f} tokens/s, {plan.fullest.bottleneck}"
        example = f"{' '.join(choice.overrides)}: {speed}"
        result.rejections["fits, but slower"] = Rejection(len(slower), example)
    return result


def fullest_stage(
    stages: Sequence[tuple[StepSpec, int]],
) -> tuple[StepSpec, MemoryBreakdown]:
    """Return the stage with the highest peak memory, and its memory."""
    memories = [(spec, step_memory(spec)) for spec, _ in stages]
    return max(memories, key=lambda pair: pair[1].peak)


def _rule_of(error: str) -> str:
    """Return a validation error without values and remedy, to group equal errors."""
    rule = re.split(r"[:;] ", error)[0]
    return re.sub(r" ?\([^)]*\)|=[^\s,]+|\b\d+ ", "", rule)


# ---------------------------------------------------------------- remedies if nothing fits


def nearest_fit(
    request: PlanRequest, current: Choice, limit_of: Callable[[StepSpec], int]
) -> Choice | None:
    """Return the fitting choice on the same number of devices nearest to the current one.

    Tries the same mesh with other micro-batch sizes, more recomputation and resharding first, then
    other meshes.

    Args:
        limit_of: Bytes available to a rank.
    """
    on_same = [] if request.mesh_errors(current.mesh) else [current.mesh]
    all_meshes = meshes(current.mesh.world_size)
    others = sorted(all_meshes, key=lambda mesh: _mesh_distance(mesh, current.mesh))
    for mesh in [*on_same, *others]:
        if request.mesh_errors(mesh):
            continue
        ordered = sorted(
            choices(mesh, request),
            key=lambda choice: (
                choice.activation_checkpoint != current.activation_checkpoint,
                _recomputation(choice.activation_checkpoint),
                choice.reshard_after_forward != current.reshard_after_forward,
                choice.reduce_gradients != current.reduce_gradients,
                -(choice.micro_batch_size or 0),
            ),
        )
        for choice in ordered:
            if _is_valid_and_fits(request, choice, limit_of):
                return choice
    return None


def _is_valid_and_fits(
    request: PlanRequest, choice: Choice, limit_of: Callable[[StepSpec], int]
) -> bool:
    if request.choice_errors(choice):
        return False
    spec, memory = fullest_stage(request.stages(choice))
    return memory.peak <= limit_of(spec)


def _recomputation(mode: CheckpointMode) -> float:
    """Return the amount of recomputation, from 0 (`none`) to 2 (`full`)."""
    return CHECKPOINT_MODES.index(mode) if isinstance(mode, str) else 2 - 2 * mode


def _mesh_distance(mesh: MeshShape, current: MeshShape) -> tuple[int, ...]:
    """Return a sort key: number of differing axes, then preference for outer axes."""
    pairs = zip(mesh.sizes, current.sizes, strict=True)
    return (sum(one != other for one, other in pairs), mesh.tp, mesh.cp, mesh.dp_replicate)


def fewest_devices(
    request: PlanRequest, limit_of: Callable[[StepSpec], int], more_than: int, per_node: int
) -> tuple[int, Choice] | None:
    """Return the smallest number of devices on which some choice fits, and that choice.

    Beyond one node, only multiples of a node count. Only the choices with the least memory are
    tried on each mesh: no replicas, full recomputation, resharding, and either the entire local
    batch at once or one sequence at a time. Returns None if no number of devices suffices.
    """
    specs = [
        spec for spec, _ in request.stages(Choice(MeshShape(1, 1, 1, 1), 1, "full", None, "step"))
    ]
    shards = divisors(math.gcd(*(spec.global_batch_size for spec in specs)))
    cps = divisors(math.gcd(*(spec.seq_len for spec in specs)))
    candidates = [
        MeshShape(1, shard, cp, tp)
        for tp in divisors(specs[0].model.n_heads)
        for cp in cps
        for shard in shards
        if more_than < (size := shard * cp * tp) and (size % per_node == 0 or per_node % size == 0)
    ]
    for mesh in sorted(candidates, key=lambda mesh: (mesh.world_size, mesh.tp, mesh.cp)):
        if request.mesh_errors(mesh):
            continue
        reshard = True if mesh.dp_shard * mesh.cp > 1 else None
        settings: tuple[tuple[int, ReduceMode], ...] = (
            (request.local_batch_size(mesh), "step"),
            (1, "step"),
            (1, "micro_batch"),
        )
        for size, reduction in settings:
            choice = Choice(mesh, size, "full", reshard, reduction)
            if _is_valid_and_fits(request, choice, limit_of):
                return mesh.world_size, choice
    return None
