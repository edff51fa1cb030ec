"""Search for the fastest mesh and settings: micro-batch, recomputation, resharding, compilation.

The search is best-first: a node of the tree is a mesh with some settings chosen, and its bound is
the time of a step with the fastest values of the others. So the candidates are planned in the order
of their speed, and the search stops at the requested number. Memory is planned before speed where
it rejects more. Validity is decided by the rules of `train.py` (`PlanRequest`).
"""

import heapq
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import count, product
from typing import Any, Literal

from parallel.config import ParallelConfig
from parallel.mesh import AXES, MeshShape
from parallel.pipeline_schedule import bubble
from planning.collectives import placement
from planning.hardware import Hardware
from planning.memory import GIB, MemoryBreakdown, step_memory
from planning.plan import Plan, RunPlan, capacity, host_peak, memory_limit, plan_run
from planning.request import SEARCHED, Choice, PlanRequest
from planning.speed import repeated_seconds
from planning.step_spec import StepSpec

CHECKPOINT_MODES = ("none", "selective", "full")
"""Values of `parallel.activation_checkpoint`, fastest first."""
REDUCE_MODES: tuple[Literal["step"], Literal["micro_batch"]] = ("step", "micro_batch")
"""Values of `parallel.reduce_gradients`, least communication first."""
PART_COUNTS = (1, 2, 4)
"""Values of `parallel.pp_parts`: more shorten the bubble little, and send more often."""
LEAST_LAYERS = 4
"""Layers per pipeline rank in a search."""
NOT_SEARCHED = (
    "train.global_batch_size",
    "model.attention",
    "parallel.sequence_parallel",
    "parallel.loss_parallel",
    "precision.param",
    "precision.reduce",
    "precision.optimizer_state",
    "checkpoint.async_save",
    "memory budgets of parallel.activation_checkpoint",
)
"""Options that change speed or memory and are kept."""
FLOAT32 = 4  # bytes
SLOWER = "slower than the choices listed"
EQUAL = "equal in time and memory to a choice with simpler settings"
FULLER = "at most 0.1% faster than another resharding with less memory, or slower with the same"
WAITING = 0.1
"""Fraction of the fastest steps without a pipeline, in exposed communication between nodes, above
which pipelines are searched; also if meshes without are valid and none fits."""
AT_LEAST = 0.95
"""Of the time of equal stages, than which an interleaved schedule of others may be faster."""
SAME_SPEED = 1.001
"""Ratio of times below which the resharding with less memory is kept."""
LITTLE_SLOWER = 1.01
"""Ratio of times below which a choice with free memory is preferred to a tight one."""
PIPELINE_GAIN = 1.02
"""Ratio of times below which a mesh without a pipeline is preferred to one with it."""

Batch = tuple[int | None, Literal["step", "micro_batch"], Literal["tensorwise", "rowwise"] | None]
"""Micro-batch size, `reduce_gradients` and fp8 recipe."""
Compute = tuple[Any, ...]
"""`compile`, `async_tp` and `activation_checkpoint`."""


@dataclass
class Rejection:
    """Number of candidates rejected for one reason, and an example."""

    count: int
    example: str


@dataclass
class SearchResult:
    """The fastest candidates, in order, and the reasons for rejecting the rest."""

    best: list[tuple[Choice, RunPlan]] = field(default_factory=list)
    candidates: int = 0
    rejections: dict[str, Rejection] = field(default_factory=dict)

    def reject(self, reason: str, example: str, number: int = 1) -> None:
        """Count rejected candidates."""
        self.candidates += number
        self.rejections.setdefault(reason, Rejection(0, example)).count += number


# ---------------------------------------------------------------- candidates


def meshes(devices: int, pp: int = 1) -> Iterator[MeshShape]:
    """Yield every mesh of `devices` ranks with `pp` pipeline ranks."""
    if devices % pp:
        return
    for tp in divisors(devices // pp):
        for cp in divisors(devices // pp // tp):
            for dp_shard in divisors(devices // pp // tp // cp):
                yield MeshShape(devices // pp // tp // cp // dp_shard, dp_shard, cp, tp, pp)


def divisors(number: int) -> list[int]:
    """Return all divisors in ascending order."""
    low = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return low + [number // n for n in reversed(low) if n * n != number]


def searched_meshes(
    devices: int, request: PlanRequest, pp: int | None = None
) -> Iterator[MeshShape]:
    """Yield the meshes of `devices` ranks with the axes that the request keeps.

    Args:
        pp: Pipeline ranks; None: those that the request keeps, or 1.
    """
    sizes = kept_axes(request)
    for mesh in meshes(devices, sizes.get("pp", 1) if pp is None else pp):
        if all(getattr(mesh, axis) == size for axis, size in sizes.items()):
            yield mesh


def pipeline_sizes(devices: int, request: PlanRequest) -> list[int]:
    """Return the sizes of `pp` above 1 that a search tries."""
    if "pp" in kept_axes(request):
        return []
    most = request.config.model.n_layers // LEAST_LAYERS
    return [size for size in divisors(devices) if 1 < size <= most]


def part_counts(mesh: MeshShape, request: PlanRequest) -> list[int]:
    """Return the values of `pp_parts` on a mesh; given layers of each stage determine it."""
    parallel, n_layers = request.config.parallel, request.config.model.n_layers
    if "parallel.pp_parts" in request.kept:
        return [parallel.pp_parts]
    if "parallel.pp_layers" in request.kept and parallel.pp_layers is not None:
        return [max(len(parallel.pp_layers) // mesh.pp, 1)]
    counts = PART_COUNTS if mesh.pp > 1 else PART_COUNTS[:1]
    return [each for each in counts if each == 1 or mesh.pp * each <= n_layers]


def kept_axes(request: PlanRequest) -> dict[str, int]:
    """Return the sizes of the axes that the request keeps."""
    given = [axis for axis in AXES if f"parallel.{axis}" in request.kept]
    configured = {axis: getattr(request.config.parallel, axis) for axis in given}
    return {axis: size for axis, size in configured.items() if size != -1}


@dataclass(frozen=True)
class Settings:
    """The values of each setting on one mesh, without those that have no effect there.

    Attributes:
        batches: In any order.
        compute: The fastest values of each setting first.
        reshards: Values of `reshard_after_forward`, fastest and largest memory first.
    """

    parallel: ParallelConfig
    batches: list[Batch]
    compute: list[Compute]
    reshards: tuple[bool | None, ...]

    @property
    def has_budgets(self) -> bool:
        """Whether a memory budget of the compiler is among the values."""
        return any(isinstance(mode, float) for *_, mode in self.compute)

    def choice(self, batch: Batch, compute: Compute, reshard: bool | None) -> Choice:
        """Return the choice with these values."""
        size, reduce, fp8 = batch
        compiled, async_tp, mode = compute
        parallel = replace(
            self.parallel,
            compile=compiled,
            async_tp=async_tp,
            activation_checkpoint=mode,
            reshard_after_forward=reshard,
            reduce_gradients=reduce,
        )
        return Choice(parallel, size, fp8)


def settings(mesh: MeshShape, request: PlanRequest, pp_parts: int) -> Settings:
    """Return the settings to search on a valid mesh; those that the request keeps have one value.

    Of `compile` and `async_tp` the configured value and the opposite are searched. Layers of each
    stage that only an experiment gives are balanced again on other pipelines.
    """
    config, kept = request.config, request.kept
    parallel = replace(config.parallel, **asdict(mesh), pp_parts=pp_parts)
    layers = parallel.pp_layers or ()
    if mesh.pp > 1 and "parallel.pp_layers" not in kept and len(layers) != mesh.pp * pp_parts:
        parallel = replace(parallel, pp_layers=None)
    if "parallel.pp_checkpoint" not in kept:
        parallel = replace(parallel, pp_checkpoint=None)

    def values(key: str, others: Sequence[Any]) -> list[Any]:
        return [getattr(parallel, key)] if f"parallel.{key}" in kept else list(others)

    compiled = parallel.resolved(request.accelerator).compile is True
    both = (parallel.compile, False) if compiled else (True, parallel.compile)
    modes: tuple[Any, ...] = CHECKPOINT_MODES
    if parallel.pp_checkpoint is not None:  # which replaces them
        modes = (parallel.activation_checkpoint,)
    if parallel.activation_checkpoint not in modes:
        modes = (parallel.activation_checkpoint, *modes)
    if parallel.pp_checkpoint is not None:
        modes = (parallel.activation_checkpoint,)
    on_mesh = Settings(parallel, [], [], ())
    compute = product(
        values("compile", both),
        values("async_tp", (True, False)),
        values("activation_checkpoint", modes),
    )
    no_batch: Batch = (1, "step", None)
    valid = [
        each for each in compute if not request.compute_errors(on_mesh.choice(no_batch, each, None))
    ]
    sharded = mesh.dp_shard * mesh.cp > 1
    batch_size = request.local_batch_size(mesh)
    later = [stage.global_batch_size or 0 for stage in config.data.stages or []]
    largest = max(batch_size, *(size // mesh.dp for size in later), 0)
    sizes: list[int | None] = [*divisors(batch_size)]
    if largest > batch_size:  # null is another size in each stage
        sizes.append(None)
    if mesh.pp > 1:  # fewer micro-batches than stages leave most of a step to the bubble
        sizes = [each for each in sizes if each and each * mesh.pp <= batch_size] or sizes[:1]
    if "train.micro_batch_size" in kept:
        sizes = [config.train.micro_batch_size or batch_size]
    batches = [
        (size, reduce, fp8)
        for size in sizes
        for reduce in values(
            "reduce_gradients",
            REDUCE_MODES
            if size is not None and size < largest and mesh.dp * mesh.cp > 1 and mesh.pp == 1
            else REDUCE_MODES[:1],
        )
        for fp8 in request.fp8_recipes()
    ]
    of_mesh = (False, None, True) if mesh.pp == 1 else (None, True)  # null is false in pipelines
    reshards = values("reshard_after_forward", of_mesh if sharded else (None,))
    return Settings(parallel, batches, valid, tuple(reshards))


def choices(mesh: MeshShape, request: PlanRequest) -> Iterator[Choice]:
    """Yield the candidates on a valid mesh."""
    for pp_parts in part_counts(mesh, request):
        on_mesh = settings(mesh, request, pp_parts)
        for each in product(on_mesh.batches, on_mesh.compute, on_mesh.reshards):
            yield on_mesh.choice(*each)


def peak_memory(stages: Sequence[tuple[StepSpec, int]]) -> MemoryBreakdown:
    """Return the memory of the stage with the highest peak."""
    return max((step_memory(spec) for spec, _ in stages), key=lambda memory: memory.peak)


# ---------------------------------------------------------------- search


def search(request: PlanRequest, devices: int, hardware: Hardware, keep: int = 10) -> SearchResult:
    """Return the `keep` fastest choices on `devices` devices that fit."""
    return _Search(request, hardware).run(devices, keep)


@dataclass(frozen=True)
class _Node:
    """A choice, whose settings from `level` on have their fastest values until they are chosen.

    The levels are batch, `compile` with `async_tp`, `activation_checkpoint` and
    `reshard_after_forward`; all are chosen at level 4. A pipeline starts below level 0 with a lower
    bound of its time, and at level 0 its memory is not planned yet.
    """

    level: int
    on_mesh: Settings
    batch: Batch
    compute: Compute
    reshard: bool | None

    @property
    def choice(self) -> Choice:
        return self.on_mesh.choice(self.batch, self.compute, self.reshard)

    @property
    def open_compute(self) -> list[Compute]:
        """The values of the `compute` settings of the candidates below this node."""
        n_chosen = (0, 0, 2, 3, 3)[max(self.level, 0)]
        chosen = self.compute[:n_chosen]
        return [each for each in self.on_mesh.compute if each[:n_chosen] == chosen]

    @property
    def n_candidates(self) -> int:
        """Number of candidates below this node."""
        return len(self.open_compute) * (1 if self.level == 4 else len(self.on_mesh.reshards))

    def children(self) -> list["_Node"]:
        """Return the nodes with the next setting chosen."""
        level = self.level + 1
        if self.level == 3:
            return [replace(self, level=level, reshard=each) for each in self.on_mesh.reshards]
        by_value = {each[:level]: each for each in reversed(self.open_compute)}
        return [replace(self, level=level, compute=each) for each in reversed(by_value.values())]


class _Search:
    """The state of a search: a heap of nodes, and the memory of candidates."""

    def __init__(self, request: PlanRequest, hardware: Hardware) -> None:
        self.request, self.hardware = request, hardware
        self.result = SearchResult()
        self.heap: list[tuple[Any, ...]] = []
        self.numbers = count()
        self.found: set[tuple[Any, ...]] = set()
        self.known_stages: dict[tuple[Any, ...], list[tuple[StepSpec, int]]] = {}
        self.memories: dict[tuple[Any, ...], MemoryBreakdown] = {}
        self.known_passes: dict[tuple[Any, ...], float] = {}
        self.known_seconds: dict[tuple[Any, ...], float] = {}
        self.shards: dict[ParallelConfig, MemoryBreakdown] = {}
        self.limits: dict[tuple[ParallelConfig, int | None], int] = {}

    def run(self, devices: int, keep: int) -> SearchResult:
        """Return the result: the nodes that remain are slower than the fastest `keep` choices.

        The first choice is the fastest that is not tight, if it is hardly slower than the fastest,
        or instead of a pipeline the fastest without, if that is.
        """
        for mesh in searched_meshes(devices, self.request):
            self.add_mesh(mesh)
        leaves: list[tuple[_Node, RunPlan]] = []
        preferred: tuple[_Node, RunPlan] | None = None
        first = next(self.fastest_first(), None)
        if first is not None:
            self.push(first[0])
            self.found.clear()
        is_valid = any(not reason.startswith("invalid") for reason in self.result.rejections)
        if is_valid if first is None else self.waits_for_network(first[1]):
            for pp in pipeline_sizes(devices, self.request):
                for mesh in searched_meshes(devices, self.request, pp):
                    if mesh.dp_replicate == 1 or "dp_replicate" in kept_axes(self.request):
                        self.add_mesh(mesh)
        for node, plan in self.fastest_first():
            leaves.append((node, plan))
            slower = self.seconds(node) / self.seconds(leaves[0][0])
            is_simpler = _is_pipeline(preferred) and not _is_pipeline(leaves[-1])
            limit = PIPELINE_GAIN if is_simpler else LITTLE_SLOWER
            if not plan.is_tight and slower <= limit and (preferred is None or is_simpler):
                preferred = leaves[-1]
            is_final = preferred is not None and not _is_pipeline(preferred)
            if len(leaves) >= keep and (is_final or slower > PIPELINE_GAIN):
                break
        if preferred is not None:
            leaves.remove(preferred)
            leaves.insert(0, preferred)
        self.result.best = [(node.choice, plan) for node, plan in leaves[:keep]]
        self.result.candidates += len(self.result.best)
        for node, _ in leaves[keep:]:
            self.reject(SLOWER, node, f": {1 / self.seconds(node):,.0f} tokens/s")
        for seconds, *_, node in sorted(self.heap, key=lambda entry: entry[:-1]):
            self.reject(SLOWER, node, f": at most {1 / seconds:,.0f} tokens/s")
        return self.result

    def fastest_first(self) -> Iterator[tuple["_Node", RunPlan]]:
        """Yield the choices that fit in the order of their speed, without equal ones."""
        while self.heap:
            seconds, *ties, _, node = heapq.heappop(self.heap)
            if node.level < 0:
                self.push(replace(node, level=0))
                continue
            if node.level == 0:
                if (fastest := self.fastest_that_may_fit(replace(node, level=1))) is not None:
                    self.push(fastest)
                continue
            if node.level < 4:
                self.expand(node)
                continue
            stages = self.stages(node)
            sizes = tuple(spec.micro_batch_size for spec, _ in stages)  # null is resolved
            key = node.choice.mesh, sizes, f"{seconds:.9g}", ties[-2]
            if key in self.found:
                self.reject(EQUAL, node, "")
                continue
            self.found.add(key)
            yield node, plan_run(stages, self.hardware)

    def waits_for_network(self, run: RunPlan) -> bool:
        """Return whether much of the steps is exposed communication between nodes.

        Only there a pipeline may be faster: it gathers weights less often, and has a bubble.
        """
        exposed = sum(
            seconds / plan.time.total * plan.seconds
            for plan in run.stages
            for axis, seconds in plan.time.exposed.items()
            if not placement(axis, plan.spec.mesh, self.hardware.devices_per_node).inside_node
        )
        return exposed > WAITING * run.seconds

    def add_mesh(self, mesh: MeshShape) -> None:
        """Add the nodes of a mesh, or count its candidates as rejected."""
        if errors := self.request.mesh_errors(mesh):
            self.result.reject(f"invalid: {_rule_of(errors[0])}", f"{mesh}: {errors[0]}")
            return
        for pp_parts in part_counts(mesh, self.request):
            self.add_settings(mesh, settings(mesh, self.request, pp_parts))

    def add_settings(self, mesh: MeshShape, on_mesh: Settings) -> None:
        """Add the nodes of a mesh with one number of parts per pipeline rank."""
        if not on_mesh.compute:  # for given settings
            trial = Choice(on_mesh.parallel, None)
            error = self.request.compute_errors(trial)[0]
            self.result.reject(f"invalid: {_rule_of(error)}", f"{mesh}: {error}")
            return
        for batch in on_mesh.batches:
            node = _Node(1, on_mesh, batch, on_mesh.compute[0], on_mesh.reshards[0])
            if errors := self.request.choice_errors(node.choice):
                self.reject(f"invalid: {_rule_of(errors[0])}", node, f": {errors[0]}")
            elif mesh.pp > 1:
                self.push(replace(node, level=-1))
            elif (fastest := self.fastest_that_may_fit(node)) is not None:
                self.push(fastest)

    def fastest_that_may_fit(self, node: _Node) -> _Node | None:
        """Return the node with the fastest settings that may fit, or reject the node.

        Of the compiler's memory budgets it is not known whether they are faster than other
        recomputation.
        """
        on_mesh, limit = node.on_mesh, self.limit(node)
        least = replace(node, reshard=on_mesh.reshards[-1])
        # All candidates of a mesh have the same shards of weights and moments.
        known = self.shards.get(on_mesh.parallel)
        memory = known if known and known.peak > limit else self.weights(least)
        self.shards[on_mesh.parallel] = replace(memory, gradients=0, gathered=0)
        if memory.peak > limit:
            self.reject_memory(node, memory)
            return None
        # The fastest resharding keeps all weights gathered, the next one hardly any.
        reshard = on_mesh.reshards[0]
        if len(on_mesh.reshards) > 1:
            spec = self.stages(node)[0][0]
            element = spec.param_bytes if node.batch[2] is None else 1
            n_shards = spec.mesh.dp_shard * spec.mesh.cp
            exceeds = memory.parameters * n_shards * element // FLOAT32 > limit
            if exceeds or self.weights(replace(node, reshard=reshard)).peak > limit:
                reshard = on_mesh.reshards[1]
        for compute in on_mesh.compute:
            memory = self.memory(replace(least, compute=compute), limit)
            if memory.peak <= limit:
                is_ordered = compute[:2] == node.compute[:2] and not on_mesh.has_budgets
                return replace(
                    node, compute=compute if is_ordered else node.compute, reshard=reshard
                )
        self.reject_memory(node, memory)
        return None

    def weights(self, node: _Node) -> MemoryBreakdown:
        """Return the memory of weights, gradients and moments in one phase of a step.

        It depends neither on recomputation and compilation nor on the size of several
        micro-batches.
        """
        specs, (_, reduce, fp8) = [spec for spec, _ in self.stages(node)], node.batch
        shortest = sorted(specs, key=lambda spec: -spec.local_tokens)
        different = {spec.micro_batches > 1: spec for spec in shortest}
        key = node.on_mesh.parallel, reduce, fp8, node.reshard, tuple(sorted(different))
        if key not in self.memories:
            smallest = replace(node, compute=node.on_mesh.compute[-1]).choice.parallel
            memories = (
                step_memory(replace(spec, parallel=smallest)) for spec in different.values()
            )
            memory = max(memories, key=lambda memory: memory.peak)
            self.memories[key] = replace(memory, activations=0, logits=0, host=0, temporary=0)
        return self.memories[key]

    def expand(self, node: _Node) -> None:
        """Replace a node by those with the next setting chosen that may fit."""
        children = []
        for child in node.children():
            if child.level >= 3:  # at level 3 with the least memory of any resharding
                reshard = child.reshard if child.level == 4 else node.on_mesh.reshards[-1]
                memory = self.memory(replace(child, reshard=reshard), self.limit(child))
                if memory.peak > self.limit(child):
                    self.reject_memory(child, memory)
                    continue
            children.append(child)
        for child in children:
            if child.level == 4 and any(self.is_fuller(child, other) for other in children):
                self.reject(FULLER, child, "")
            else:
                self.push(child)

    def is_fuller(self, node: _Node, other: _Node) -> bool:
        """Return whether another resharding has no more memory at practically the same speed."""
        (peak, seconds), (other_peak, other_seconds) = (
            (self.memory(each, self.limit(each)).peak, self.seconds(each)) for each in (node, other)
        )
        if other_peak == peak:
            return f"{other_seconds:.9g}" != f"{seconds:.9g}" and other_seconds < seconds
        return other_peak < peak and other_seconds <= SAME_SPEED * seconds

    def push(self, node: _Node) -> None:
        """Add a node. Ties: fewer axes first, then lower peak memory, then the defaults."""
        ties: tuple[int, ...] = (0, 0, 0, 0)
        if node.level == 4:
            choice, peak = node.choice, self.memory(node, self.limit(node)).peak
            n_axes = sum(size > 1 for size in choice.mesh.sizes)
            ties = 1, n_axes, peak, _n_changes(choice.parallel)
        heapq.heappush(self.heap, (self.seconds(node), *ties, next(self.numbers), node))

    def stages(self, node: _Node) -> list[tuple[StepSpec, int]]:
        """Return (step, number of tokens) for each stage."""
        key = node.on_mesh.parallel, node.batch, node.compute, node.reshard
        if key not in self.known_stages:
            self.known_stages[key] = self.request.stages(node.choice)
        return self.known_stages[key]

    def seconds(self, node: _Node) -> float:
        """Return the seconds per token, averaged over all stages; below level 0 at least these."""
        if node.level < 0:
            return self.least_seconds(node)
        key = node.on_mesh.parallel, node.batch, node.compute, node.reshard
        if key not in self.known_seconds:
            plans = [Plan(spec, self.hardware, tokens, {}) for spec, tokens in self.stages(node)]
            seconds = sum(plan.seconds for plan in plans)
            self.known_seconds[key] = seconds / sum(plan.tokens for plan in plans)
        return self.known_seconds[key]

    def least_seconds(self, node: _Node) -> float:
        """Return seconds per token that a pipeline needs with any settings.

        That is computation, with the communication of tp and cp, in equal stages, with the bubble.
        """
        parallel, stages = node.on_mesh.parallel, self.stages(node)
        per_token = 0.0
        for spec, tokens in stages:
            shape = replace(spec.mesh, pp=1, dp_shard=1, dp_replicate=1)
            key = shape, spec.micro_batch_size, spec.seq_len, spec.precision
            if key not in self.known_passes:
                one_rank = replace(spec.parallel, pp=1, pp_parts=1, pp_layers=None)
                one_rank = replace(one_rank, pp_checkpoint=None, async_tp=True)
                one_rank = replace(one_rank, activation_checkpoint="none")
                whole = replace(spec, mesh=shape, parallel=one_rank)
                whole = replace(whole, global_batch_size=spec.micro_batch_size)
                self.known_passes[key] = repeated_seconds(whole, self.hardware)
            busy = self.known_passes[key] * spec.micro_batches / spec.mesh.pp
            busy /= 1 - bubble(spec.mesh.pp, parallel.pp_parts, spec.micro_batches)
            per_token += tokens / spec.tokens * busy
        return AT_LEAST * per_token / sum(tokens for _, tokens in stages)

    def memory(self, node: _Node, limit: int) -> MemoryBreakdown:
        """Return the memory of the fullest stage, or of one that exceeds the limit.

        It does not depend on `async_tp`.
        """
        compiled, _, mode = node.compute
        key = node.on_mesh.parallel, node.batch, compiled, mode, node.reshard
        if key not in self.memories:
            longest = sorted(self.stages(node), key=lambda stage: -stage[0].local_tokens)
            memories = []
            for spec, _ in longest:
                memories.append(step_memory(spec))
                if memories[-1].peak > limit:
                    break
            self.memories[key] = max(memories, key=lambda memory: memory.peak)
        return self.memories[key]

    def limit(self, node: _Node) -> int:
        """Return the memory available to a rank, which depends on mesh and micro-batch."""
        key = node.on_mesh.parallel, node.batch[0]
        if key not in self.limits:
            specs = [spec for spec, _ in self.stages(node)]
            self.limits[key] = min(memory_limit(spec, self.hardware) for spec in specs)
        return self.limits[key]

    def reject(self, reason: str, node: _Node, example: str) -> None:
        known = reason in self.result.rejections
        shown = "" if known else f"{node.choice}{example}"
        self.result.reject(reason, shown, node.n_candidates)

    def reject_memory(self, node: _Node, memory: MemoryBreakdown) -> None:
        """Count the candidates below a node, which do not fit."""
        specs = [spec for spec, _ in self.stages(node)]
        available = capacity(specs[0], self.hardware)
        if memory.peak <= available:
            used = max(host_peak(spec, self.hardware.devices_per_node) for spec in specs)
            needs = f": {used / GIB:.1f} of {self.hardware.host_memory_gib} GiB per node"
            self.reject("out of host memory", node, needs)
        else:
            needs = f": {memory.peak / GIB:.1f} of {available / GIB:.1f} GiB"
            self.reject(f"out of memory, largest part {memory.largest_part}", node, needs)


def _is_pipeline(leaf: tuple[_Node, RunPlan] | None) -> bool:
    return leaf is not None and leaf[0].choice.mesh.pp > 1


def _n_changes(parallel: ParallelConfig) -> int:
    """Return the number of searched settings that differ from their default."""
    default = ParallelConfig()
    return sum(getattr(parallel, key) != getattr(default, key) for key in SEARCHED)


def given_options(request: PlanRequest) -> list[str]:
    """Return the options that a search keeps because they are given, as `key=value`."""
    choice = Choice(request.config.parallel, request.config.train.micro_batch_size)
    choice = replace(choice, fp8=request.config.precision.fp8)
    return [word for word in choice.overrides if word.partition("=")[0] in request.kept]


def options_not_searched(request: PlanRequest) -> list[str]:
    """Return the names of options that a search does not vary, other than given ones."""
    is_known = request.searches_fp8 or "precision.fp8" in request.kept
    fp8 = [] if is_known else ["precision.fp8 (search_fp8=true)"]
    return [*fp8, *NOT_SEARCHED]


def _rule_of(error: str) -> str:
    """Return a validation error without values and remedy, to group equal errors."""
    rule = re.split(r"[:;] ", error)[0]
    return re.sub(r" ?\([^)]*\)|=[^\s,]+|\b\d+ ", "", rule)
