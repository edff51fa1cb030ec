"""Changes that make a run fit: on the same devices, or else the smallest number of devices.

Validity is decided by the rules of `train.py` (`PlanRequest`), memory by the closed forms.
"""

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from itertools import chain

from parallel.mesh import MeshShape
from planning.request import Choice, PlanRequest
from planning.search import (
    CHECKPOINT_MODES,
    choices,
    meshes,
    part_counts,
    peak_memory,
    searched_meshes,
    settings,
)
from planning.step_spec import StepSpec
from planning.valid_meshes import axis_meshes, device_count

Limit = Callable[[StepSpec], int]
"""Return the bytes available to a rank; 0 if the node's host memory is too small."""

WAITS = "no copy in host memory; training waits for each save"
ROUNDED = "bf16 moments change results slightly"
FASTEST = "plan.py smallest=true finds the fastest choice on the fewest devices"


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
            return Remedy(f"use {synchronous[1]} ({WAITS})", synchronous[1])
    if current is not None:
        finds = "plan.py search=true finds the fastest choice"
        tried = [(each, extra, finds) for each, extra in requests]
        if (smaller := request.with_bf16_moments()) is not None:
            tried.append((*smaller, f"{ROUNDED}; {finds}"))
        for each, extra, note in tried:
            if (nearest := nearest_fit(each, current, limit)) is not None:
                changed = [word for word in nearest.overrides if word not in current.overrides]
                words = " ".join([*changed, extra]).strip()
                return Remedy(f"use {words} ({note})", words)
    elif (change := change_that_fits(request, limit, devices)) is not None:
        return change
    for each, extra in requests:
        if (choice := fewest_devices(each, limit, per_node)) is not None:
            words, number = f"{choice} {extra}".strip(), choice.mesh.world_size
            least = "at least " if number > devices else ""
            count, nodes = device_count(number), -(-number // per_node)
            if request.accelerator == "cpu" and nodes > 1:  # whose processes share its memory
                count += f" on {nodes} nodes"
            return Remedy(f"use {least}{count}, such as with {words} ({FASTEST})")
    return Remedy(
        "no mesh of any size fits: use a smaller model, shorter sequences, a larger batch "
        "(which more devices can share) or other hardware"
    )


def change_that_fits(request: PlanRequest, limit: Limit, devices: int) -> Remedy | None:
    """Return a change of saves or moments with which a mesh of `devices` devices fits, or None."""
    changes = ((request.with_synchronous_saves(), WAITS), (request.with_bf16_moments(), ROUNDED))
    for change, note in changes:
        if change is None:
            continue
        changed, words = change
        on_devices = searched_meshes(devices, changed)
        if any(_least_memory_fit(changed, mesh, limit) is not None for mesh in on_devices):
            return Remedy(f"use {words} ({note})", words)
    return None


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

    Tries the same mesh with smaller micro-batches, more recomputation and resharding first, then
    other meshes, and larger micro-batches last.
    """
    now = current.parallel
    request = request.keeping("parallel.compile", "parallel.async_tp", "precision.fp8")

    def size_of(choice: Choice) -> int:
        return choice.micro_batch_size or request.local_batch_size(choice.mesh)

    size_now = size_of(current)

    def mesh_distance(mesh: MeshShape) -> tuple[int, ...]:
        """Count the differing axes, then prefer outer axes."""
        differing = sum(getattr(now, axis) != size for axis, size in asdict(mesh).items())
        return differing, mesh.tp, mesh.cp, mesh.dp_replicate

    def distance(choice: Choice) -> tuple[float, ...]:
        new, mode = choice.parallel, choice.parallel.activation_checkpoint
        size = size_of(choice)
        # The amount of recomputation is from 0 (`none`) to 2 (`full`).
        recomputation = CHECKPOINT_MODES.index(mode) if isinstance(mode, str) else 2 - 2 * mode
        return (
            new.pp_parts != now.pp_parts,
            mode != now.activation_checkpoint,
            recomputation,
            new.reshard_after_forward != now.reshard_after_forward,
            new.reduce_gradients != now.reduce_gradients,
            abs(size - size_now),
            choice.micro_batch_size != current.micro_batch_size,
        )

    same_stages = meshes(current.mesh.world_size, current.mesh.pp)
    ordered = sorted(same_stages, key=mesh_distance)
    valid = [mesh for mesh in ordered if not request.mesh_errors(mesh)]
    candidates = (
        choice
        for is_larger in (False, True)
        for mesh in valid
        for choice in sorted(choices(mesh, request), key=distance)
        if (size_of(choice) > size_now) == is_larger
    )
    found = _first_fit(request, candidates, limit)
    if found is not None:  # without a change of the micro-batch from null to the same size
        same = replace(found, micro_batch_size=current.micro_batch_size)
        if request.stages(same) == request.stages(found):
            return same
    return found


def fewest_devices(request: PlanRequest, limit: Limit, per_node: int) -> Choice | None:
    """Return a choice that fits on the smallest number of devices, or None if none suffices.

    Any number up to a node, and beyond only complete nodes. Axes that the request keeps are kept.
    Replicas never need fewer devices than shards.
    """
    candidates = sorted(axis_meshes(request), key=lambda mesh: (mesh.world_size, mesh.tp, mesh.cp))
    for mesh in candidates:
        is_on_nodes = mesh.world_size <= per_node or mesh.world_size % per_node == 0
        if is_on_nodes and (choice := _least_memory_fit(request, mesh, limit)) is not None:
            return choice
    return None


def _least_memory_fit(request: PlanRequest, mesh: MeshShape, limit: Limit) -> Choice | None:
    """Return a choice on a mesh that fits, or None if none does.

    Memory is lowest with the entire local batch at once, which accumulates no gradients, or with
    one sequence at a time.
    """
    if request.mesh_errors(mesh):
        return None
    on_mesh = settings(mesh, request, part_counts(mesh, request)[0])
    batch_size = request.local_batch_size(mesh)
    if not on_mesh.compute:
        return None
    extremes = [each for each in on_mesh.batches if each[0] in (batch_size, 1, None)]
    least = on_mesh.reshards[-1]
    for batch in extremes or on_mesh.batches:
        first = on_mesh.choice(batch, on_mesh.compute[-1], least)
        stages = request.stages(first)
        memory = peak_memory(stages)
        weights = memory.parameters + memory.gradients + memory.optimizer + memory.gathered
        if weights > min(limit(spec) for spec, _ in stages):
            continue  # with any recomputation
        others = (on_mesh.choice(batch, each, least) for each in reversed(on_mesh.compute))
        if (choice := _first_fit(request, chain([first], others), limit)) is not None:
            return choice
    return None
