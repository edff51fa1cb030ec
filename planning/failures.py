"""Failures of a run: time between them, what they and the saves cost, and the best interval.

A failure of any device stops the job. It restarts after `restart_seconds` and repeats the steps
since the newest committed checkpoint. Intervals between failures are exponential, and any of them
may hit a restart or a save. `bench.goodput` simulates the same protocol without these formulas.
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property

from checkpoint.config import CheckpointConfig
from planning.hardware import Hardware
from planning.host import checkpoint_bytes, checkpoint_tensors, shard_bytes
from planning.plan import SECONDS_PER_DAY, RunPlan
from planning.speed import ranks_per_device
from planning.step_spec import StepSpec
from planning.time_limits import planned_seconds

DEVICE_MTBF_DAYS = 2112.0
"""Mean time between failures of one device with its part of the node and network: 54 days × 16,384
GPUs / 419 unexpected interruptions (The Llama 3 Herd of Models, arXiv:2407.21783, section 3.3.4).
`plan.py` has it as a key."""
REQUEUE_SECONDS = 150
"""From a failure to the start of the next launch: the other ranks notice it and exit, and SLURM
delays a requeued job by two minutes (docs/slurm.md)."""
HOST_COPY_GB_S = 20.0
"""From a GPU to pinned memory, all GPUs of a node at the same time: PCIe 4.0 × 16 has 31.5 GB/s."""
TENSOR_SECONDS = 0.3e-3
"""Host time to prepare and start the copy of a tensor: `tensors_of` and `copy_to_host` of 3,411
small tensors took 1 s on one core of an EPYC."""
LEAST = 1e-9
"""Goodput of a run that practically never reaches its next checkpoint."""
MAX_LOSS = 0.02
"""Goodput that a configured interval may lose against the best one without a warning."""
LEAST_SECONDS = 3600.0
"""Shortest run with that warning: others lose at most minutes."""


@dataclass(frozen=True)
class ExpectedGoodput:
    """Expected fractions of the wall time, which add up to 1.

    `resilience.goodput` reports the same parts of a real run.

    Attributes:
        productive: Steps that count; this fraction is the goodput.
        stalled: Waits for saves; a real run also counts validation and text samples.
        lost: Steps that are repeated.
        restart: From each failure to the end of the next first step, `restart` and `between` of a
            real run.
    """

    productive: float
    stalled: float
    lost: float
    restart: float


@dataclass(frozen=True)
class Interruptions:
    """Failures and saves of a job.

    Attributes:
        mtbf_seconds: Mean time between failures of the job.
        restart_seconds: From a failure to the end of the first step of the next launch.
        stall_seconds: How long training waits for a save.
        write_seconds: From the end of this wait to the commit of the checkpoint; 0 if training
            waits for the commit.
        skip_when_busy: A save is skipped, instead of delayed, while the previous one is written.
    """

    mtbf_seconds: float
    restart_seconds: float
    stall_seconds: float
    write_seconds: float
    skip_when_busy: bool = False

    def expected(self, interval_seconds: float) -> ExpectedGoodput:
        """Return the expected goodput of a long run with saves after `interval_seconds` of steps.

        Daly 2006 ("A higher order estimate of the optimum checkpoint interval for restart dumps",
        equation 20), where the commit may follow the wait later: with failures at rate 1/M, the
        k-th checkpoint of a launch is committed R + k·period + write after the failure before it,
        and each that is reached before the next failure keeps one interval of steps. The sum over k
        of the probabilities exp(-t/M) is a geometric series.
        """
        mean, write = self.mtbf_seconds, self.write_seconds
        interval = interval_seconds
        if self.skip_when_busy and 0 < interval < write:
            interval *= math.ceil(write / interval)
        period = self.stall_seconds + max(interval, write)
        running = math.exp(-self.restart_seconds / mean)
        committed = math.exp(-write / mean) / math.expm1(min(period / mean, 700))
        productive = running * committed * interval / mean
        stalled = running * (1 - interval / period)
        lost = max(running - productive - stalled, 0.0)
        return ExpectedGoodput(productive, stalled, lost, 1 - running)

    @property
    def best_interval_seconds(self) -> float:
        """The seconds of steps between saves that maximize the goodput.

        Daly 2006, equation 37; its first term is Young's ("A first order approximation to the
        optimum checkpoint interval", 1974). An interval below `write_seconds` would delay or skip
        saves.
        """
        ratio = self.stall_seconds / (2 * self.mtbf_seconds)
        if ratio >= 1:
            return max(self.mtbf_seconds, self.write_seconds)
        young = math.sqrt(2 * self.stall_seconds * self.mtbf_seconds)
        daly = young * (1 + math.sqrt(ratio) / 3 + ratio / 9) - self.stall_seconds
        return max(daly, self.write_seconds)


@dataclass(frozen=True)
class FailurePlan:
    """What failures and saves cost a run with constant settings.

    Attributes:
        stages: (seconds per step, seconds without failures) of each stage of the run.
        config: When checkpoints are saved.
        n_devices: Devices whose failure stops the job.
        n_nodes: Nodes that write checkpoints.
        checkpoint_bytes: Size of a checkpoint.
        storage_gb_s: Planned rate of a node.
    """

    interruptions: Interruptions
    stages: tuple[tuple[float, float], ...]
    config: CheckpointConfig
    n_devices: int
    n_nodes: int
    checkpoint_bytes: int
    storage_gb_s: float

    @property
    def seconds(self) -> float:
        """Duration without failures and saves."""
        return sum(seconds for _, seconds in self.stages)

    @property
    def expected_seconds(self) -> float:
        """Duration with failures and saves with the configured interval; infinite below `LEAST`."""
        goodput = self.configured.productive
        return self.seconds / goodput if goodput > LEAST else math.inf

    @cached_property
    def configured(self) -> ExpectedGoodput:
        """With the configured interval."""
        return self._expected(self.config.interval, self.config.interval_minutes)

    @cached_property
    def best(self) -> ExpectedGoodput:
        """With `best_interval`."""
        return self._expected(self.best_interval, None)

    @cached_property
    def best_interval(self) -> int:
        """The best `checkpoint.interval`, rounded to two significant digits.

        With stages that differ, it has the highest goodput over all of them. It is the number of
        steps of a run that is too short to save before its last step.
        """
        best_seconds = self.interruptions.best_interval_seconds
        steps = [best_seconds / step_seconds for step_seconds, _ in self.stages]
        choices = _round_numbers(min(steps) / 2, 2 * max(steps))
        best = max(choices, key=lambda interval: self._expected(interval, None).productive)
        return min(best, round(sum(seconds / step for step, seconds in self.stages)) or 1)

    @property
    def interval_seconds(self) -> float:
        """Longest time between saves with the configured interval, without the wait for them."""
        config = self.config
        return max(self._interval(step, *_interval_keys(config)) for step, _ in self.stages)

    @property
    def needed_gb_s(self) -> float:
        """Rate of a node at which no save is delayed or skipped with the configured interval."""
        shortest = min(
            self._interval(step, *_interval_keys(self.config)) for step, _ in self.stages
        )
        return self.checkpoint_bytes / self.n_nodes / shortest / 1e9

    def _interval(self, step_seconds: float, interval: int | None, minutes: float | None) -> float:
        """Return the seconds of steps between saves; the last step always saves."""
        steps = [self.seconds / step_seconds] + ([] if interval is None else [interval])
        if minutes is not None:
            steps.append(math.ceil(60 * minutes / step_seconds))
        return max(min(steps), 1) * step_seconds

    def _expected(self, interval: int | None, minutes: float | None) -> ExpectedGoodput:
        """Return the expected goodput of all stages, weighted by their wall time."""
        weights: dict[str, float] = defaultdict(float)
        for step, seconds in self.stages:
            goodput = self.interruptions.expected(self._interval(step, interval, minutes))
            for part, fraction in asdict(goodput).items():
                weights[part] += fraction * seconds / max(goodput.productive, LEAST)
        wall = sum(weights.values())
        means = {part: weight / wall for part, weight in weights.items()}
        return ExpectedGoodput(**means)


def plan_failures(
    config: CheckpointConfig,
    run: RunPlan,
    device_mtbf_days: float = DEVICE_MTBF_DAYS,
    restart_seconds: float | None = None,
) -> FailurePlan:
    """Return what failures cost a planned run.

    Args:
        config: When checkpoints are saved.
        restart_seconds: From a failure to the end of the next first step; None: planned.
    """
    first = run.stages[0]
    spec, hardware = first.spec, first.hardware
    planned = planned_seconds([stage.spec for stage in run.stages], hardware)
    if restart_seconds is None:
        restart_seconds = REQUEUE_SECONDS + planned.setup
    n_devices = -(-spec.mesh.world_size // ranks_per_device(spec, hardware))
    return FailurePlan(
        Interruptions(
            mtbf_seconds=device_mtbf_days * SECONDS_PER_DAY / n_devices,
            restart_seconds=restart_seconds,
            stall_seconds=save_stall(spec, hardware, planned.checkpoint),
            write_seconds=planned.checkpoint if spec.async_save else 0.0,
            skip_when_busy=config.when_busy == "skip",
        ),
        tuple((stage.time.total, stage.seconds) for stage in run.stages),
        config,
        n_devices,
        -(-spec.mesh.world_size // hardware.devices_per_node),
        checkpoint_bytes(spec),
        hardware.storage_gb_s,
    )


def save_stall(spec: StepSpec, hardware: Hardware, write_seconds: float) -> float:
    """Return the seconds that training waits for a save: for its copy, or for all of it.

    The copy is read and written on CPU, whose memory the ranks share, and crosses PCIe on GPUs. The
    first save of a launch takes longer, because its host memory is allocated.
    """
    starting = TENSOR_SECONDS * checkpoint_tensors(spec)
    if not spec.async_save:
        return starting + write_seconds
    size = 3 * max(shard_bytes(stage) for stage in spec.stages)
    if spec.accelerator == "cpu":
        sharing = ranks_per_device(spec, hardware)
        return starting + 2 * size * sharing / (hardware.bandwidth_gb_s * 1e9)
    return starting + size / (HOST_COPY_GB_S * 1e9)


def interval_warnings(plan: FailurePlan) -> Iterator[str]:
    """Yield a warning if an interval is far from the best one, or none suffices, in a long run."""
    configured, best, times = plan.configured, plan.best, plan.interruptions
    if plan.seconds < LEAST_SECONDS:
        return
    failures = f"a failure every {time_text(times.mtbf_seconds)} on {plan.n_devices:,} devices"
    if plan.n_devices == 1:
        failures = failures.removesuffix("s")
    if best.productive - configured.productive <= MAX_LOSS:
        if math.isinf(plan.expected_seconds):
            days = times.mtbf_seconds * plan.n_devices / SECONDS_PER_DAY
            yield (
                f"device_mtbf_days={days:g} means {failures}, which restarts and saves do not "
                "outpace: the run never finishes; use fewer devices, or a higher device_mtbf_days"
            )
        return
    interval, minutes = _interval_keys(plan.config)
    longest = max(step for step, _ in plan.stages)
    by_minutes = minutes is not None and (interval is None or 60 * minutes < interval * longest)
    key, value = ("interval_minutes", minutes) if by_minutes else ("interval", interval)
    given = "null" if value is None else f"{value:g}"
    use = f"checkpoint.interval={plan.best_interval}"
    if minutes is not None:
        use += " checkpoint.interval_minutes=null"
    cause = f"waiting for them takes {configured.stalled:.1%} of the time"
    if configured.lost > configured.stalled:
        cause = f"steps repeated after {failures} take {configured.lost:.1%} of the time"
    yield (
        f"checkpoint.{key}={given} saves every {time_text(plan.interval_seconds)}, and {cause}: "
        f"the goodput is {configured.productive:.1%}, and {best.productive:.1%} with the best "
        f"interval; use {use}"
    )


def _interval_keys(config: CheckpointConfig) -> tuple[int | None, float | None]:
    return config.interval, config.interval_minutes


def _round_numbers(low: float, high: float) -> Sequence[int]:
    """Return the integers with two significant digits from `low` to `high`, at least 1."""
    tens = 10 ** max(math.floor(math.log10(max(high, 1))) - 1, 0)
    numbers = {digits * 10**power for power in range(len(str(tens))) for digits in range(1, 100)}
    return sorted(each for each in numbers if low <= each <= high) or [max(round(high), 1)]


def time_text(seconds: float) -> str:
    """Return a duration in its usual unit: 40 s, 25 min, 6.9 h, 12 days, 5.8 years."""
    units = (("years", 365 * SECONDS_PER_DAY), ("days", SECONDS_PER_DAY), ("h", 3600), ("min", 60))
    unit, size = next((each for each in units if seconds >= 2 * each[1]), ("s", 1))
    value = seconds / size
    return f"{value:,.0f} {unit}" if value >= 10 else f"{value:.2g} {unit}"
