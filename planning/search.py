"""The best way to run a job on some devices: every mesh, micro-batch, recomputation, resharding.

Every choice is planned by the closed forms, so a thousand take about a second. What may be chosen
is told by the caller's rules, which are those of `train.py`: there is no second copy of them.
"""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Literal

from parallel.config import ParallelConfig
from parallel.mesh import AXES, MeshShape
from planning.hardware import Hardware
from planning.job import Job
from planning.memory import Memory, step_memory
from planning.plan import GIB, PARTS, RunPlan, capacity, plan_run

Kept = Literal["none", "full", "selective"] | float
Reduction = Literal["step", "micro_batch"]
KEPT: tuple[Kept, ...] = ("none", "selective", "full")
"""Choices of `parallel.activation_checkpoint`, the fastest first."""
REDUCTIONS: tuple[Reduction, ...] = ("step", "micro_batch")
"""Choices of `parallel.reduce_gradients`, the one that sends less first."""


@dataclass(frozen=True)
class Choice:
    """What is chosen: a mesh, and how a rank computes its share on it."""

    mesh: MeshShape
    micro_batch_size: int | None
    activation_checkpoint: Kept
    reshard_after_forward: bool | None
    reduce_gradients: Reduction

    def parallel(self, given: ParallelConfig) -> ParallelConfig:
        """The configuration with this choice in it."""
        mesh = self.mesh
        return replace(
            given,
            dp_replicate=mesh.dp_replicate,
            dp_shard=mesh.dp_shard,
            cp=mesh.cp,
            tp=mesh.tp,
            activation_checkpoint=self.activation_checkpoint,
            reshard_after_forward=self.reshard_after_forward,
            reduce_gradients=self.reduce_gradients,
        )

    @property
    def reshard(self) -> str:
        """`parallel.reshard_after_forward` as a person types it."""
        return {None: "null", True: "true", False: "false"}[self.reshard_after_forward]

    @property
    def overrides(self) -> tuple[str, ...]:
        """The words that choose it, behind `python train.py`."""
        size = "null" if self.micro_batch_size is None else self.micro_batch_size
        return (
            *(f"parallel.{axis}={n}" for axis, n in zip(AXES, self.mesh.sizes, strict=True)),
            f"train.micro_batch_size={size}",
            f"parallel.activation_checkpoint={self.activation_checkpoint}",
            f"parallel.reshard_after_forward={self.reshard}",
            f"parallel.reduce_gradients={self.reduce_gradients}",
        )


@dataclass(frozen=True)
class SearchSpace:
    """What is asked, and by which rules: the planner's view of one configuration.

    Args:
        parallel: Its parallel section; axes, checkpointing and resharding are what is chosen.
        share: Sequences of a data rank in a step, of a mesh that the rules allow.
        problems: What the rules say against a mesh, whatever is chosen on it; and against a choice.
        jobs: The stages of the run under a choice, each with its tokens.
    """

    parallel: ParallelConfig
    share: Callable[[MeshShape], int]
    mesh_errors: Callable[[MeshShape], list[str]]
    choice_errors: Callable[[Choice], list[str]]
    jobs: Callable[[Choice], Sequence[tuple[Job, int | None]]]


@dataclass
class Reason:
    """Why choices are not among the best: how many, and one of them with the whole reason."""

    count: int
    example: str


@dataclass
class SearchResult:
    """What a search found: the best first, and why the others are not there."""

    candidates: int = 0
    best: list[tuple[Choice, RunPlan]] = field(default_factory=list)
    fitting: int = 0
    reasons: dict[str, Reason] = field(default_factory=dict)

    def refuse(self, why: str, example: str) -> None:
        """Counts a choice under its reason."""
        reason = self.reasons.setdefault(why, Reason(0, example))
        reason.count += 1


def meshes(devices: int) -> Iterator[MeshShape]:
    """Every mesh of so many places."""
    for tp in divisors(devices):
        for cp in divisors(devices // tp):
            for dp_shard in divisors(devices // tp // cp):
                yield MeshShape(devices // tp // cp // dp_shard, dp_shard, cp, tp)


def divisors(number: int) -> list[int]:
    """Ascending."""
    low = [n for n in range(1, int(number**0.5) + 1) if number % n == 0]
    return low + [number // n for n in reversed(low) if n * n != number]


def choices(mesh: MeshShape, question: SearchSpace) -> Iterator[Choice]:
    """Everything that may be chosen on a mesh that the rules allow."""
    given = question.parallel.activation_checkpoint
    kept = KEPT if given in KEPT else (given, *KEPT)
    reshards = (None, True, False) if mesh.dp_shard * mesh.cp > 1 else (None,)
    share, sums = question.share(mesh), mesh.dp * mesh.cp > 1
    for size in divisors(share):
        reductions = REDUCTIONS if size < share and sums else REDUCTIONS[:1]
        for recomputed, reshard, reduction in product(kept, reshards, reductions):
            yield Choice(mesh, size, recomputed, reshard, reduction)


def search(question: SearchSpace, devices: int, hardware: Hardware, keep: int = 10) -> SearchResult:
    """Plans every choice for so many devices; the `keep` fastest of those that fit come back."""
    found = SearchResult()
    fitting: list[tuple[Choice, RunPlan]] = []
    for mesh in meshes(devices):
        if problems := question.mesh_errors(mesh):
            found.candidates += 1
            found.refuse(f"the rules: {_without_numbers(problems[0])}", f"{mesh}: {problems[0]}")
            continue
        for choice in choices(mesh, question):
            found.candidates += 1
            if problems := question.choice_errors(choice):
                found.refuse(f"the rules: {_without_numbers(problems[0])}", problems[0])
                continue
            jobs = question.jobs(choice)
            job, memory = fullest(jobs)
            room = capacity(job, hardware)
            if memory.peak > room:
                found.refuse(*_too_full(choice, memory, room))
                continue
            fitting.append((choice, plan_run(jobs, hardware)))
    # Of equally fast ones that with fewer axes, and then that with most memory to spare.
    fitting.sort(
        key=lambda pair: (
            -pair[1].tokens_per_second,
            sum(size > 1 for size in pair[0].mesh.sizes),
            pair[1].fullest.memory.peak,
        )
    )
    found.fitting, found.best = len(fitting), fitting[:keep]
    if slower := fitting[keep:]:
        choice, plan = slower[0]
        speed = f"{plan.tokens_per_second:,.0f} tokens/s, {plan.fullest.limit}"
        example = f"{' '.join(choice.overrides)}: {speed}"
        found.reasons["fits, and is slower"] = Reason(len(slower), example)
    return found


def fullest(jobs: Sequence[tuple[Job, int | None]]) -> tuple[Job, Memory]:
    """The stage that needs most memory, and what it needs."""
    of_stages = [(job, step_memory(job)) for job, _ in jobs]
    return max(of_stages, key=lambda pair: pair[1].peak)


def _too_full(choice: Choice, memory: Memory, room: int) -> tuple[str, str]:
    """The reason of a choice that does not fit."""
    part = max(PARTS, key=lambda part: getattr(memory, part))
    needs = f"needs {memory.peak / GIB:.1f} GiB of {room / GIB:.1f}"
    return f"does not fit, for its {part}", f"{' '.join(choice.overrides)}: {needs}"


def _without_numbers(problem: str) -> str:
    """A broken rule without its values and remedy: the same for all who break it."""
    rule = problem.partition(": ")[0]
    return re.sub(r" ?\([^)]*\)|\b\d+ ", "", rule)


# ---------------------------------------------------------------- where nothing fits


def remedy(question: SearchSpace, given: Choice, room: Callable[[Job], int]) -> Choice | None:
    """What would fit on as many devices and is nearest to what was given; None where nothing does.

    First the same mesh with another micro-batch size, with more recomputed, with weights freed
    earlier; then another mesh.

    Args:
        room: The bytes that a rank may hold.
    """
    on_same = [] if question.mesh_errors(given.mesh) else [given.mesh]
    others = sorted(meshes(given.mesh.world_size), key=lambda mesh: _distance(mesh, given.mesh))
    for mesh in [*on_same, *others]:
        if question.mesh_errors(mesh):
            continue
        ordered = sorted(
            choices(mesh, question),
            key=lambda choice: (
                choice.activation_checkpoint != given.activation_checkpoint,
                _rank(choice.activation_checkpoint),
                choice.reshard_after_forward != given.reshard_after_forward,
                choice.reduce_gradients != given.reduce_gradients,
                -(choice.micro_batch_size or 0),
            ),
        )
        for choice in ordered:
            if question.choice_errors(choice):
                continue
            job, memory = fullest(question.jobs(choice))
            if memory.peak <= room(job):
                return choice
    return None


def _rank(kept: Kept) -> float:
    """How much is recomputed: `none` nothing, `full` all."""
    return KEPT.index(kept) if isinstance(kept, str) else 2 - 2 * kept


def _distance(mesh: MeshShape, given: MeshShape) -> tuple[int, ...]:
    """How far a mesh is from another: axes that differ, the outer ones first."""
    pairs = list(zip(mesh.sizes, given.sizes, strict=True))
    return (sum(one != other for one, other in pairs), mesh.tp, mesh.cp, mesh.dp_replicate)


def fewest_devices(
    question: SearchSpace, room: Callable[[Job], int], more_than: int, per_node: int
) -> tuple[int, Choice] | None:
    """The smallest number of devices on which something fits, and what; None where no number does.

    Above one node whole nodes count. Of each mesh the most frugal choices are tried: replicas save
    no memory, and nothing takes less than the whole share at once, or one sequence at a time, with
    all recomputed, weights freed early and gradients reduced at once.
    """
    stages = [
        job for job, _ in question.jobs(Choice(MeshShape(1, 1, 1, 1), 1, "full", None, "step"))
    ]
    shards = divisors(math.gcd(*(job.global_batch_size for job in stages)))
    cps = divisors(math.gcd(*(job.seq_len for job in stages)))
    wider = [
        MeshShape(1, shard, cp, tp)
        for tp in divisors(stages[0].model.n_heads)
        for cp in cps
        for shard in shards
        if more_than < (size := shard * cp * tp) and (size % per_node == 0 or per_node % size == 0)
    ]
    for mesh in sorted(wider, key=lambda mesh: (mesh.world_size, mesh.tp, mesh.cp)):
        if question.mesh_errors(mesh):
            continue
        reshard = True if mesh.dp_shard * mesh.cp > 1 else None
        frugal: tuple[tuple[int, Reduction], ...] = (
            (question.share(mesh), "step"),
            (1, "step"),
            (1, "micro_batch"),
        )
        for size, reduction in frugal:
            choice = Choice(mesh, size, "full", reshard, reduction)
            if not question.choice_errors(choice):
                job, memory = fullest(question.jobs(choice))
                if memory.peak <= room(job):
                    return mesh.world_size, choice
    return None
