"""The answer of a plan: does it fit, what it sends, how fast, how long and for how much.

Puts the forms of `memory` and `speed` beside what a device has. A run whose sequences or batches
change on the way is a plan for each stage; the fullest one decides whether it fits.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import cached_property

from model.flops import flops_per_token
from parallel.traffic import Collective
from planning.hardware import Hardware
from planning.job import Job
from planning.memory import Memory, step_memory
from planning.speed import StepTime, span, step_time

GIB = 2**30
DAY = 86_400  # seconds
PARTS = tuple(field.name for field in fields(Memory) if field.name != "moment")
"""What a rank's memory is told by, in the order of a bar."""


def ranks_per_node(ranks: int, accelerator: str, hardware: Hardware) -> int:
    """How many processes share what `hardware` tells: on CPU a node's, of a GPU its one rank."""
    return min(ranks, hardware.devices_per_node) if accelerator == "cpu" else 1


def capacity(job: Job, hardware: Hardware) -> int:
    """Bytes that the tensors of a rank may take."""
    share = ranks_per_node(job.mesh.world_size, job.accelerator, hardware)
    return int((hardware.memory_gib / share - hardware.reserved_gib) * GIB)


@dataclass(frozen=True)
class Plan:
    """One step of one job on one hardware, and `tokens` of such steps.

    `memory` is what a rank holds at its fullest, `capacity` what it may hold, both in bytes;
    `analytic` what the closed forms say where `memory` is traced; `time` a step's parts in seconds.
    """

    job: Job
    hardware: Hardware
    memory: Memory
    capacity: int
    time: StepTime
    tokens: int | None
    analytic: Memory | None = None

    @property
    def tiers(self) -> dict[str, Memory]:
        """What is known of the memory, by how it is known."""
        if self.analytic is None:
            return {"analytic": self.memory}
        return {"analytic": self.analytic, "traced": self.memory}

    @property
    def fits(self) -> bool:
        """Whether the fullest moment of a step leaves nothing out."""
        return self.memory.peak <= self.capacity

    @property
    def tokens_per_second(self) -> float:
        """Of the whole mesh."""
        return self.job.tokens / self.time.total

    @property
    def tokens_per_second_per_device(self) -> float:
        """Of one rank."""
        return self.tokens_per_second / self.job.mesh.world_size

    def tflops(self, causal: bool = True) -> float:
        """Achieved TFLOP/s of a device, recomputation left out, as `training.throughput` counts."""
        flops = flops_per_token(self.job.model, self.job.seq_len, causal)
        return self.tokens_per_second_per_device * flops / 1e12

    def mfu(self, causal: bool = True) -> float | None:
        """The share of the device's peak; None under fp8, of which a bf16 peak says nothing."""
        peak = self.hardware.peak_tflops.get(self.job.precision.param)
        if self.job.precision.fp8 is not None or not peak:
            return None
        share = ranks_per_node(self.job.mesh.world_size, self.job.accelerator, self.hardware)
        return self.tflops(causal) / (peak / share)

    @property
    def seconds(self) -> float | None:
        """Of all `tokens`; saving, validation and faults left out."""
        return None if self.tokens is None else self.tokens / self.tokens_per_second

    @property
    def limit(self) -> str:
        """What keeps it from fitting, or else from being faster."""
        if not self.fits:
            part = max(PARTS, key=lambda part: getattr(self.memory, part))
            return f"memory, of which {part} are most ({getattr(self.memory, part) / GIB:.1f} GiB)"
        times = {
            "matrix products": self.time.matrix,
            "attention": self.time.attention,
            "elementwise passes": self.time.elementwise,
            "optimizer": self.time.optimizer,
            **{f"exposed communication on {axis}": each for axis, each in self.exposed.items()},
        }
        most = max(times, key=lambda name: times[name])
        return f"{most} ({times[most] / self.time.total:.0%} of a step)"

    @property
    def traffic(self) -> list[Collective]:
        """What a rank sends in a step."""
        return self.job.traffic()

    @property
    def exposed(self) -> dict[str, float]:
        """Seconds of a step in which an axis communicates and nothing is computed."""
        return dict(self.time.exposed)

    def links(self) -> dict[str, str]:
        """Which link each axis uses: inside a node, or between nodes."""
        return {each.axis: link(each.axis, self.job, self.hardware) for each in self.traffic}

    def by_axis(self) -> list[tuple[str, str, str, int, float]]:
        """Axis, kind, what for, count and bytes that a rank sends in a step; the most first."""
        found: dict[tuple[str, str, str], list[float]] = defaultdict(lambda: [0, 0.0])
        for each in self.traffic:
            sums = found[each.axis, each.kind, each.part]
            sums[0] += each.count
            sums[1] += float(each.sent)
        rows = [(*names, int(count), sent) for names, (count, sent) in found.items()]
        return sorted(rows, key=lambda row: -row[4])


def link(axis: str, job: Job, hardware: Hardware) -> str:
    """`inside` a node or `between` nodes: neighbours in rank share a node, tp innermost."""
    reach, _ = span(axis, job.mesh, hardware.devices_per_node)
    return "inside a node" if reach <= hardware.devices_per_node else "between nodes"


def make_plan(
    job: Job, hardware: Hardware, tokens: int | None = None, memory: Memory | None = None
) -> Plan:
    """The plan of a job: analytic, but for a `memory` that is known better."""
    return Plan(
        job=job,
        hardware=hardware,
        memory=memory or step_memory(job),
        capacity=capacity(job, hardware),
        time=step_time(job, hardware),
        tokens=tokens,
        analytic=step_memory(job) if memory is not None else None,
    )


@dataclass(frozen=True)
class RunPlan:
    """The plans of a run's stages, in order."""

    stages: tuple[Plan, ...]

    @cached_property
    def fullest(self) -> Plan:
        """The one that needs most memory of what there is."""
        return max(self.stages, key=lambda plan: plan.memory.peak)

    @property
    def fits(self) -> bool:
        """Whether every stage does."""
        return self.fullest.fits

    @property
    def tokens(self) -> int | None:
        """Of all stages; None where they are not known."""
        known = [plan.tokens for plan in self.stages if plan.tokens is not None]
        return sum(known) if len(known) == len(self.stages) else None

    @property
    def seconds(self) -> float | None:
        """Of all tokens."""
        known = [plan.seconds for plan in self.stages if plan.seconds is not None]
        return sum(known) if len(known) == len(self.stages) else None

    @property
    def days(self) -> float | None:
        """Of all tokens."""
        return None if self.seconds is None else self.seconds / DAY

    @property
    def cost(self) -> float | None:
        """Of all devices for that time, in the currency of the hardware's price."""
        first = self.stages[0]
        price = first.hardware.price_per_hour
        if price is None or self.seconds is None:
            return None
        share = ranks_per_node(first.job.mesh.world_size, first.job.accelerator, first.hardware)
        return self.seconds / 3600 * price * first.job.mesh.world_size / share

    @property
    def tokens_per_second(self) -> float:
        """Of the whole mesh, over all stages."""
        if len(self.stages) > 1 and self.seconds and self.tokens:
            return self.tokens / self.seconds
        return self.stages[0].tokens_per_second


def step_parts(plan: Plan) -> dict[str, float]:
    """A step's seconds by what they go to; their sum is the step."""
    time = plan.time
    return {
        "matrix products": time.matrix,
        "attention": time.attention,
        "elementwise": time.elementwise,
        "optimizer": time.optimizer,
        **{f"exposed communication, {axis}": each for axis, each in plan.exposed.items()},
        "all": time.total,
    }


def plan_run(
    jobs: Sequence[tuple[Job, int | None]],
    hardware: Hardware,
    memory_of: Callable[[Job], Memory | None] = lambda job: None,
) -> RunPlan:
    """The plans of jobs that follow each other, each with its tokens.

    Args:
        memory_of: What is known better than by the closed forms.
    """
    return RunPlan(tuple(make_plan(job, hardware, tokens, memory_of(job)) for job, tokens in jobs))
