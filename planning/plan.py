"""The plan of a run: memory, communication, throughput, duration and cost on given hardware.

Combines `planning.memory` and `planning.speed` with the limits of a device. A run whose sequence
length or batch size changes has one plan per stage; the stage that needs the most memory decides
whether the run fits.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from model.flops import flops_per_token
from planning.collectives import placement
from planning.communicators import communicator_bytes
from planning.hardware import Hardware
from planning.host import GPU_PROCESS_GIB, host_bytes
from planning.memory import GIB, MemoryBreakdown, different_stages, step_memory
from planning.speed import THROUGHPUT_INTERVAL, StepTime, ranks_per_device, step_time
from planning.step_spec import StepSpec

SECONDS_PER_DAY = 86_400
TIGHT = 0.95  # of the available memory, above which the error of a plan may exceed the rest


def capacity(spec: StepSpec, hardware: Hardware) -> int:
    """Return the bytes available to the tensors of a rank."""
    memory_gib = hardware.memory_gib / ranks_per_device(spec, hardware)
    return int((memory_gib - hardware.reserved_gib) * GIB) - communicator_bytes(spec)


def host_peak(spec: StepSpec, ranks_per_node: int) -> int:
    """Return the host memory of a node's ranks on GPUs; 0 on CPU, where it is the ranks' memory."""
    if spec.accelerator == "cpu":
        return 0
    ranks = min(ranks_per_node, spec.mesh.world_size)
    return ranks * (host_bytes(spec) + int(GPU_PROCESS_GIB * GIB))


def memory_limit(spec: StepSpec, hardware: Hardware) -> int:
    """Return `capacity`, or 0 if the nodes do not have enough host memory."""
    available = hardware.host_memory_gib
    used = host_peak(spec, hardware.devices_per_node)
    return 0 if available is not None and used > available * GIB else capacity(spec, hardware)


@dataclass(frozen=True)
class Plan:
    """The plan of one stage: a step on given hardware, repeated for `tokens` tokens.

    Attributes:
        tiers: Peak memory of a rank by method: analytic, and traced if available. The last decides.
    """

    spec: StepSpec
    hardware: Hardware
    tokens: int
    tiers: dict[str, MemoryBreakdown]

    @property
    def memory(self) -> MemoryBreakdown:
        return list(self.tiers.values())[-1]

    @property
    def capacity(self) -> int:
        """Bytes available to a rank."""
        return capacity(self.spec, self.hardware)

    @property
    def host_peak(self) -> int:
        """Bytes of host memory of a node with GPUs."""
        return host_peak(self.spec, self.hardware.devices_per_node)

    @cached_property
    def time(self) -> StepTime:
        return step_time(self.spec, self.hardware)

    @property
    def fits(self) -> bool:
        return self.memory.peak <= memory_limit(self.spec, self.hardware)

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
        peaks, param = self.hardware.peak_tflops, self.spec.precision.param
        peak = peaks.get(self.spec.matrix_dtype, peaks.get(param))
        if self.spec.precision.fp8 is not None or not peak:
            return None
        return self.tflops(causal) / (peak / ranks_per_device(self.spec, self.hardware))

    @property
    def seconds(self) -> float:
        """Duration of `tokens` tokens, without checkpoints, validation and faults."""
        return self.tokens / self.tokens_per_second

    @property
    def bottleneck(self) -> str:
        """The largest part of memory if the plan does not fit, else the longest part of a step."""
        if not self.fits and self.memory.peak <= self.capacity:
            return f"host memory ({self.host_peak / GIB:.1f} GiB per node)"
        if not self.fits:
            part = self.memory.largest_part
            return f"memory (largest part: {part}, {getattr(self.memory, part) / GIB:.1f} GiB)"
        return longest_part(self.time.by_part())

    def traffic(self) -> list[tuple[str, str, str, str, int, float]]:
        """Return (axis, link, kind, purpose, count, bytes sent per rank) of a step, largest first.

        The link is where the groups of the axis communicate: inside a node or between nodes. In a
        pipeline, each row is that of the rank which sends most for this purpose.
        """
        most: dict[tuple[str, str, str, str], tuple[int, float]] = {}
        for stage in different_stages(self.spec):
            sums: dict[tuple[str, str, str, str], tuple[int, float]] = {}
            for each in stage.traffic():
                key = (each.axis, link(each.axis, self.spec, self.hardware), each.kind, each.part)
                count, sent = sums.get(key, (0, 0.0))
                sums[key] = count + each.count, sent + float(each.sent)
            for name, row in sums.items():
                most[name] = max(row, most.get(name, row), key=lambda each: each[1])
        return sorted((key + row for key, row in most.items()), key=lambda row: -row[-1])


def longest_part(seconds: Mapping[str, float]) -> str:
    """Return the longest part and its fraction of all of them."""
    longest, time = max(seconds.items(), key=lambda part: part[1])
    return f"{longest} ({time / sum(seconds.values()):.0%} of a step)"


def link(axis: str, spec: StepSpec, hardware: Hardware) -> str:
    """Return which link the groups of an axis use: inside a node or between nodes."""
    where = placement(axis, spec.mesh, hardware.devices_per_node)
    return "inside a node" if where.inside_node else "between nodes"


@dataclass(frozen=True)
class RunPlan:
    """The plans of all stages of a run, in order."""

    stages: tuple[Plan, ...]

    @cached_property
    def fullest(self) -> Plan:
        """The stage with the highest peak memory, of those that do not fit if there are any."""
        return max(self.stages, key=lambda plan: (not plan.fits, plan.memory.peak))

    @property
    def fits(self) -> bool:
        return self.fullest.fits

    @property
    def is_tight(self) -> bool:
        """Whether a stage uses so much of the available memory that it may not fit in practice."""
        return any(plan.memory.peak > TIGHT * plan.capacity for plan in self.stages)

    @property
    def bottleneck(self) -> str:
        """The longest part of all steps, or the bottleneck of the fullest stage if it does not fit.

        The fullest stage has the highest peak memory.
        """
        if not self.fits:
            return self.fullest.bottleneck
        seconds: dict[str, float] = defaultdict(float)
        for plan in self.stages:
            for part, time in plan.time.by_part().items():
                seconds[part] += time / plan.time.total * plan.seconds
        return longest_part(seconds)

    @property
    def tokens(self) -> int:
        return sum(plan.tokens for plan in self.stages)

    @property
    def seconds(self) -> float:
        return sum(plan.seconds for plan in self.stages)

    @property
    def device_hours(self) -> float:
        """Hours of all devices together; on CPU a node is one device."""
        spec, hardware = self.stages[0].spec, self.stages[0].hardware
        return self.seconds / 3600 * spec.mesh.world_size / ranks_per_device(spec, hardware)

    @property
    def cost(self) -> float | None:
        """Cost of all devices for the duration in `hardware.currency`; None without a price."""
        price = self.stages[0].hardware.price_per_hour
        return None if price is None else self.device_hours * price

    @property
    def energy_kwh(self) -> float | None:
        """Energy of all devices at their power limit, without hosts; None if it is unknown."""
        power = self.stages[0].hardware.power_watts
        return None if power is None else self.device_hours * power / 1000

    @property
    def tokens_per_second(self) -> float:
        """Throughput of the entire mesh: all tokens over the duration of all stages."""
        if len(self.stages) == 1:
            return self.stages[0].tokens_per_second
        return self.tokens / self.seconds

    @property
    def tokens_per_second_per_device(self) -> float:
        return self.tokens_per_second / self.stages[0].spec.mesh.world_size

    @property
    def largest_mesh(self) -> int:
        """Devices with the fewest sequences per data rank, and the same pp, cp and tp.

        These are one of the smallest batch, or if parts of pipeline ranks interleave, `pp`.
        """
        spec = self.stages[0].spec
        per_rank = spec.mesh.pp if spec.parallel.pp_parts > 1 else 1
        smallest = min(plan.spec.global_batch_size for plan in self.stages)
        return smallest // per_rank * spec.mesh.ranks_per_sample

    def tflops(self, causal: bool = True) -> float:
        """Return model TFLOP/s per device: the FLOPs of all stages over their duration."""
        return self._mean([plan.tflops(causal) for plan in self.stages])

    def mfu(self, causal: bool = True) -> float | None:
        """Return the model FLOP utilization over all stages; None as in `Plan.mfu`."""
        utilizations = [plan.mfu(causal) for plan in self.stages]
        known = [each for each in utilizations if each is not None]
        return self._mean(known) if len(known) == len(utilizations) else None

    def _mean(self, rates: Sequence[float]) -> float:
        """Return the mean of a rate per second of each stage."""
        if len(rates) == 1:
            return rates[0]
        stages = zip(rates, self.stages, strict=True)
        return sum(rate * plan.seconds for rate, plan in stages) / self.seconds

    @property
    def tokens_per_second_interval(self) -> tuple[float, float] | None:
        """Throughput in eight of ten runs on GPUs; None on CPU, for which none are published."""
        if self.stages[0].spec.accelerator == "cpu":
            return None
        low, high = THROUGHPUT_INTERVAL
        return low * self.tokens_per_second, high * self.tokens_per_second


def plan_run(
    stages: Sequence[tuple[StepSpec, int]],
    hardware: Hardware,
    trace_memory: Callable[[StepSpec], MemoryBreakdown] | None = None,
) -> RunPlan:
    """Return the plans of consecutive stages.

    Args:
        stages: (step, number of tokens) per stage.
        trace_memory: Replaces the closed forms of memory, which are then reported as `analytic`.
    """
    methods = {"analytic": step_memory} | ({"traced": trace_memory} if trace_memory else {})
    return RunPlan(
        tuple(
            Plan(spec, hardware, tokens, {name: method(spec) for name, method in methods.items()})
            for spec, tokens in stages
        )
    )
