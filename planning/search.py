"""Search for the fastest mesh, micro-batch size, activation checkpointing and resharding.

Every candidate is planned with the closed forms, a fraction of a second for a thousand.
Validity is decided by the rules of `train.py` (`PlanRequest`).
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import chain, product
from typing import Literal

from parallel.mesh import MeshShape
from planning.hardware import Hardware
from planning.memory import GIB, MemoryBreakdown, step_memory
from planning.plan import RunPlan, capacity, host_peak, memory_limit, plan_run
from planning.request import SEARCHED, Choice, PlanRequest, configured_choice
from planning.step_spec import StepSpec

CHECKPOINT_MODES = ("none", "selective", "full")
"""Values of `parallel.activation_checkpoint`, fastest first."""
REDUCE_MODES: tuple[Literal["step"], Literal["micro_batch"]] = ("step", "micro_batch")
"""Values of `parallel.reduce_gradients`, least communication first."""

Limit = Callable[[StepSpec], int]
"""Return the bytes available to a rank; 0 if the node's host memory is too small."""


@dataclass(frozen=True)
class Remedy:
    """How a run that does not fit can fit.

    Attributes:
        text: For a message.
        overrides: Command-line overrides, if the run can fit on the same devices.
    """

    text: str
    overrides: str = ""

    def __str__(self) -> str:
        return self.text


@dataclass
class Rejection:
    """Number of candidates rejected for one reason, and an example."""

    count: int
    example: str


@dataclass
class SearchResult:
    """The fastest candidates, in order, and the reasons for rejecting the rest."""

    best: list[tuple[Choice, RunPlan]] = field(default_factory=list)
    fitting: int = 0
    candidates: int = 0
    rejections: dict[str, Rejection] = field(default_factory=dict)

    def reject(self, reason: str, example: str) -> None:
        """Count a rejected candidate."""
        self.candidates += 1
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
    parallel = replace(request.config.parallel, **asdict(mesh))
    current = parallel.activation_checkpoint
    modes = CHECKPOINT_MODES if current in CHECKPOINT_MODES else (current, *CHECKPOINT_MODES)
    reshards = (None, True, False) if mesh.dp_shard * mesh.cp > 1 else (None,)
    batch_size, reduces = request.local_batch_size(mesh), mesh.dp * mesh.cp > 1
    for size in divisors(batch_size):
        reductions = REDUCE_MODES if size < batch_size and reduces else REDUCE_MODES[:1]
        for settings in product(modes, reshards, reductions):
            yield Choice(replace(parallel, **dict(zip(SEARCHED, settings, strict=True))), size)


def search(request: PlanRequest, devices: int, hardware: Hardware, keep: int = 10) -> SearchResult:
    """Plan every candidate on `devices` devices and return the `keep` fastest that fit."""
    result = SearchResult()
    fitting: list[tuple[Choice, RunPlan]] = []
    for mesh in meshes(devices):
        if errors := request.mesh_errors(mesh):
            result.reject(f"invalid: {_rule_of(errors[0])}", f"{mesh}: {errors[0]}")
            continue
        for choice in choices(mesh, request):
            if errors := request.choice_errors(choice):
                result.reject(f"invalid: {_rule_of(errors[0])}", errors[0])
                continue
            stages = request.stages(choice)
            memory, limit = peak_memory(stages), capacity(stages[0][0], hardware)
            if memory.peak <= min(memory_limit(spec, hardware) for spec, _ in stages):
                fitting.append((choice, plan_run(stages, hardware)))
                continue
            if memory.peak <= limit:
                used = max(host_peak(spec, hardware.devices_per_node) for spec, _ in stages)
                needs = f"{used / GIB:.1f} of {hardware.host_memory_gib} GiB per node"
                result.reject("out of host memory", f"{choice}: {needs}")
                continue
            needs = f"{memory.peak / GIB:.1f} of {limit / GIB:.1f} GiB"
            result.reject(
                f"out of memory, largest part {memory.largest_part}", f"{choice}: {needs}"
            )

    def order(pair: tuple[Choice, RunPlan]) -> tuple[float, ...]:
        """Ties: fewer axes first, then lower peak memory."""
        n_axes = sum(size > 1 for size in pair[0].mesh.sizes)
        return -pair[1].tokens_per_second, n_axes, pair[1].fullest.memory.peak

    fitting.sort(key=order)
    result.fitting, result.best = len(fitting), fitting[:keep]
    for choice, plan in fitting[keep:]:
        speed = f"{plan.tokens_per_second:,.0f} tokens/s, {plan.fullest.bottleneck}"
        result.reject("fits, but slower", f"{choice}: {speed}")
    result.candidates += len(result.best)
    return result


def peak_memory(stages: Sequence[tuple[StepSpec, int]]) -> MemoryBreakdown:
    """Return the memory of the stage with the highest peak."""
    return max((step_memory(spec) for spec, _ in stages), key=lambda memory: memory.peak)


def _rule_of(error: str) -> str:
    """Return a validation error without values and remedy, to group equal errors."""
    rule = re.split(r"[:;] ", error)[0]
    return re.sub(r" ?\([^)]*\)|=[^\s,]+|\b\d+ ", "", rule)


# ---------------------------------------------------------------- remedies if nothing fits


def remedy(
    request: PlanRequest, limit: Limit, devices: int, per_node: int, current: Choice | None = None
) -> Remedy:
    """Return overrides that make a run fit on `devices` devices, or else on more.

    Args:
        current: The choice to change as little as possible. None if no choice fits on `devices`.
    """
    requests = [(request, "")]
    if (synchronous := request.with_synchronous_saves()) is not None:
        requests.append(synchronous)
        if current is not None and _first_fit(synchronous[0], [current], limit) is not None:
            words = synchronous[1]
            text = f"use {words} (no copy in host memory; training waits for each save)"
            return Remedy(text, words)
    if current is not None:
        finds = "plan.py search=true finds the fastest choice"
        tried = [(each, extra, finds) for each, extra in requests]
        if (smaller := request.with_bf16_moments()) is not None:
            tried.append((*smaller, f"bf16 moments change results slightly; {finds}"))
        for each, extra, note in tried:
            if (nearest := nearest_fit(each, current, limit)) is not None:
                changed = [word for word in nearest.overrides if word not in current.overrides]
                words = " ".join([*changed, extra]).strip()
                return Remedy(f"use {words} ({note})", words)
    for each, extra in requests:
        if (choice := fewest_devices(each, limit, devices, per_node)) is not None:
            words = f"{choice} {extra}".strip()
            return Remedy(f"use at least {choice.mesh.world_size} devices with {words}")
    return Remedy(
        "no mesh of any size fits: use a smaller model, shorter sequences, a larger batch "
        "(which more devices can share) or other hardware"
    )


def _first_fit(request: PlanRequest, candidates: Iterable[Choice], limit: Limit) -> Choice | None:
    """Return the first candidate that is valid and fits."""
    for choice in candidates:
        stages = request.stages(choice)
        available = min(limit(spec) for spec, _ in stages)
        if not request.choice_errors(choice) and peak_memory(stages).peak <= available:
            return choice
    return None


def nearest_fit(request: PlanRequest, current: Choice, limit: Limit) -> Choice | None:
    """Return the fitting choice on the same number of devices nearest to the current one.

    Tries the same mesh with other micro-batch sizes, more recomputation and resharding first, then
    other meshes.
    """
    now = current.parallel

    def mesh_distance(mesh: MeshShape) -> tuple[int, ...]:
        """Count the differing axes, then prefer outer axes."""
        differing = sum(getattr(now, axis) != size for axis, size in asdict(mesh).items())
        return differing, mesh.tp, mesh.cp, mesh.dp_replicate

    def distance(choice: Choice) -> tuple[float, ...]:
        new, mode = choice.parallel, choice.parallel.activation_checkpoint
        # The amount of recomputation is from 0 (`none`) to 2 (`full`).
        recomputation = CHECKPOINT_MODES.index(mode) if isinstance(mode, str) else 2 - 2 * mode
        return (
            mode != now.activation_checkpoint,
            recomputation,
            new.reshard_after_forward != now.reshard_after_forward,
            new.reduce_gradients != now.reduce_gradients,
            -(choice.micro_batch_size or 0),
        )

    ordered = sorted(meshes(current.mesh.world_size), key=mesh_distance)
    valid = (mesh for mesh in ordered if not request.mesh_errors(mesh))
    on_each = (sorted(choices(mesh, request), key=distance) for mesh in valid)
    return _first_fit(request, chain.from_iterable(on_each), limit)


def fewest_devices(
    request: PlanRequest, limit: Limit, more_than: int, per_node: int
) -> Choice | None:
    """Return a choice that fits on the smallest number of devices.

    Beyond one node, only multiples of a node count. Only the choices with the least memory are
    tried on each mesh: no replicas, full recomputation, resharding, and either the entire local
    batch at once or one sequence at a time. Returns None if no number of devices suffices.
    """
    one_device = configured_choice(request.config, MeshShape(1, 1, 1, 1))
    specs = [spec for spec, _ in request.stages(one_device)]
    axes = (
        divisors(specs[0].model.n_heads),
        divisors(math.gcd(*(spec.seq_len for spec in specs))),
        divisors(math.gcd(*(spec.global_batch_size for spec in specs))),
    )
    candidates = [
        MeshShape(1, shard, cp, tp)
        for tp, cp, shard in product(*axes)
        if more_than < (size := shard * cp * tp) and (size % per_node == 0 or per_node % size == 0)
    ]

    def smallest(mesh: MeshShape) -> Iterator[Choice]:
        recomputed = replace(request.config.parallel, activation_checkpoint="full")
        reshard = True if mesh.dp_shard * mesh.cp > 1 else None
        parallel = replace(recomputed, reshard_after_forward=reshard, **asdict(mesh))
        step, micro_batch = REDUCE_MODES
        batch_size = request.local_batch_size(mesh)
        for size, reduction in ((batch_size, step), (1, step), (1, micro_batch)):
            yield Choice(replace(parallel, reduce_gradients=reduction), size)

    candidates.sort(key=lambda mesh: (mesh.world_size, mesh.tp, mesh.cp))
    valid = (mesh for mesh in candidates if not request.mesh_errors(mesh))
    return _first_fit(request, chain.from_iterable(map(smallest, valid)), limit)
