"""The plan of a run: memory, communication, throughput, duration and cost on given hardware.

Combines `planning.memory` and `planning.speed` with the limits of a device. A run whose sequence
length or batch size changes has one plan per stage; the stage that needs the most memory decides
whether the run fits.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from model.flops import flops_per_token
from planning.hardware import Hardware
from planning.memory import GIB, MemoryBreakdown, step_memory
from planning.speed import StepTime, span, step_time
from planning.step_spec import StepSpec

SECONDS_PER_DAY = 86_400


def ranks_per_device(spec: StepSpec, hardware: Hardware) -> int:
    """Return the ranks that share the resources in `hardware`: all of a node on CPU, one on GPU."""
    on_cpu = spec.accelerator == "cpu"
    return min(spec.mesh.world_size, hardware.devices_per_node) if on_cpu else 1


def capacity(spec: StepSpec, hardware: Hardware) -> int:
    """Return the bytes available to the tensors of a rank."""
    memory_gib = hardware.memory_gib / ranks_per_device(spec, hardware)
    return int((memory_gib - hardware.reserved_gib) * GIB)


@dataclass(frozen=True)
class Plan:
    """The plan of one stage: a step on given hardware, repeated for `tokens` tokens.

    Attributes:
        memory: Peak memory of a rank.
        capacity: Bytes available to a rank.
        analytic: The closed-form breakdown if `memory` is traced, else None.
    """

    spec: StepSpec
    hardware: Hardware
    memory: MemoryBreakdown
    capacity: int
    time: StepTime
    tokens: int | None
    analytic: MemoryBreakdown | None = None

    @property
    def tiers(self) -> dict[str, MemoryBreakdown]:
        """Memory breakdowns by method: analytic, and traced if available."""
        if self.analytic is None:
            return {"analytic": self.memory}
        return {"analytic": self.analytic, "traced": self.memory}

    @property
    def fits(self) -> bool:
        return self.memory.peak <= self.capacity

    @property
    def tokens_per_second(self) -> float:
        """Throughput of the entire mesh."""
        return self.spec.tokens / self.time.total

    @property
    def tokens_per_second_per_device(self) -> float:
        return self.tokens_per_second / self.spec.mesh.world_size

    def tflops(self, causal: bool = True) -> float:
        """Return model TFLOP/s per device, without recomputation, as in `training.throughput`."""
        flops = flops_per_token(self.spec.model, self.spec.seq_len, causal)
        return self.tokens_per_second_per_device * flops / 1e12

    def mfu(self, causal: bool = True) -> float | None:
        """Return the model FLOP utilization, or None under fp8, where the bf16 peak is no bound."""
        peak = self.hardware.peak_tflops.get(self.spec.precision.param)
        if self.spec.precision.fp8 is not None or not peak:
            return None
        return self.tflops(causal) / (peak / ranks_per_device(self.spec, self.hardware))

    @property
    def seconds(self) -> float | None:
        """Duration of `tokens` tokens, without checkpoints, validation and faults."""
        return None if self.tokens is None else self.tokens / self.tokens_per_second

    @property
    def bottleneck(self) -> str:
        """The largest part of memory if the plan does not fit, else the longest part of a step."""
        if not self.fits:
            part = self.memory.largest_part
            return f"memory (largest part: {part}, {getattr(self.memory, part) / GIB:.1f} GiB)"
        seconds = step_seconds(self)
        longest = max(seconds, key=lambda name: seconds[name])
        return f"{longest} ({seconds[longest] / self.time.total:.0%} of a step)"

    def traffic_by_axis(self) -> list[tuple[str, str, str, int, float]]:
        """Return (axis, kind, purpose, count, bytes sent per rank) of a step, largest first."""
        sums: dict[tuple[str, str, str], list[float]] = defaultdict(lambda: [0, 0.0])
        for collective in self.spec.traffic():
            row = sums[collective.axis, collective.kind, collective.part]
            row[0] += collective.count
            row[1] += float(collective.sent)
        rows = [(*key, int(count), sent) for key, (count, sent) in sums.items()]
        return sorted(rows, key=lambda row: -row[4])


def link(axis: str, spec: StepSpec, hardware: Hardware) -> str:
    """Return which link the groups of an axis use: inside a node or between nodes."""
    reach, _ = span(axis, spec.mesh, hardware.devices_per_node)
    return "inside a node" if reach <= hardware.devices_per_node else "between nodes"


@dataclass(frozen=True)
class RunPlan:
    """The plans of all stages of a run, in order."""

    stages: tuple[Plan, ...]

    @cached_property
    def fullest(self) -> Plan:
        """The stage with the highest peak memory."""
        return max(self.stages, key=lambda plan: plan.memory.peak)

    @property
    def fits(self) -> bool:
        return self.fullest.fits

    @property
    def bottleneck(self) -> str:
        """The bottleneck of the first stage, or of the fullest if the run does not fit."""
        return (self.stages[0] if self.fits else self.fullest).bottleneck

    @property
    def tokens(self) -> int | None:
        """Tokens of all stages, or None if unknown."""
        known = [plan.tokens for plan in self.stages if plan.tokens is not None]
        return sum(known) if len(known) == len(self.stages) else None

    @property
    def seconds(self) -> float | None:
        """Duration of all stages, or None if unknown."""
        known = [plan.seconds for plan in self.stages if plan.seconds is not None]
        return sum(known) if len(known) == len(self.stages) else None

    @property
    def days(self) -> float | None:
        return None if self.seconds is None else self.seconds / SECONDS_PER_DAY

    @property
    def cost(self) -> float | None:
        """Cost of all devices for the duration, in the currency of `price_per_hour`."""
        first = self.stages[0]
        price = first.hardware.price_per_hour
        if price is None or self.seconds is None:
            return None
        devices = first.spec.mesh.world_size / ranks_per_device(first.spec, first.hardware)
        return self.seconds / 3600 * price * devices

    @property
    def tokens_per_second(self) -> float:
        """Throughput of the entire mesh, averaged over all stages."""
        if len(self.stages) > 1 and self.seconds and self.tokens:
            return self.tokens / self.seconds
        return self.stages[0].tokens_per_second


def step_seconds(plan: Plan) -> dict[str, float]:
    """Return the seconds of a step by part."""
    time = plan.time
    return {
        "matrix products": time.matrix,
        "attention": time.attention,
        "elementwise": time.elementwise,
        "optimizer": time.optimizer,
        **{f"exposed communication, {axis}": seconds for axis, seconds in time.exposed.items()},
    }


def plan_run(
    stages: Sequence[tuple[StepSpec, int | None]],
    hardware: Hardware,
    trace_memory: Callable[[StepSpec], MemoryBreakdown] | None = None,
) -> RunPlan:
    """Return the plans of consecutive stages.

    Args:
        stages: (step, number of tokens) per stage.
        trace_memory: Replaces the closed forms of memory, which are then reported as `analytic`.
    """
    plans = []
    for spec, tokens in stages:
        analytic = step_memory(spec)
        plans.append(
            Plan(
                spec=spec,
                hardware=hardware,
                memory=trace_memory(spec) if trace_memory else analytic,
                capacity=capacity(spec, hardware),
                time=step_time(spec, hardware),
                tokens=tokens,
                analytic=analytic if trace_memory else None,
            )
        )
    return RunPlan(tuple(plans))
