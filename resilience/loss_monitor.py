"""The watch over losses and gradients: what each step gave, and what follows when it is bad.

A step leaves its loss and norm on the device, where the optimizer itself looks whether they are
finite (`not_finite`). `AsyncStatsReader` brings them to the host without making it wait, and
`LossMonitor` decides: go on, rewind and leave out the batches that were bad, or give up. Every
rank reads the
same values in the same order, so all decide alike. What a rewind does is the training loop's.
"""

import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from resilience.config import FaultsConfig

Range = tuple[int, int]
"""Batches of the order, or samples: from the first one to before the second one."""

WARM_UP = 20  # losses before the first can be a spike; spikes in a row that are a new level
MEMORY = 0.01  # the weight of the newest loss in mean and variance, once there are 100
# The smallest standard deviation, as a share of the mean: losses that hardly differ have no spikes.
MIN_DEVIATION = 0.005


def not_finite(values: Tensor) -> Tensor:
    """1.0 if any of the values is infinite or not a number, else 0.0; a scalar on their device."""
    return 1.0 - torch.isfinite(values).all().float()


# ---------------------------------------------------------------- from the device to the host


class StepStats(NamedTuple):
    """What one step gave, on the host; the same on every rank.

    `step` counts optimizer steps from 1; `batch` is the number of its batch in the order, from 0;
    `requests` tells how many ranks made each.
    """

    step: int
    batch: int
    samples: Range
    loss: float
    grad_norm: float
    requests: tuple[int, ...] = ()

    @property
    def where(self) -> str:
        """The samples, in words."""
        return f"samples {self.samples[0]} to {self.samples[1] - 1}"


class AsyncStatsReader:
    """Reads each step's values without waiting for the device: on CUDA one step late.

    Only the type of the device decides about that, so all ranks read the same step at a time. The
    wait for the step before keeps the host at most one step ahead, which has then been queued.
    """

    def __init__(self, device_type: str) -> None:
        self.lag = 1 if device_type == "cuda" else 0
        self._pending: deque[tuple[StepStats, Tensor, Any]] = deque()

    def read(self, step: int, batch: int, samples: Range, values: Tensor) -> list[StepStats]:
        """Takes the values of the step just queued; gives back those of steps that are due.

        Args:
            values: (2 + requests), loss, norm and requests, on the device.
        """
        vitals = StepStats(step, batch, samples, 0.0, 0.0)
        if values.is_cuda:
            host = torch.empty_like(values, device="cpu", pin_memory=True)
            host.copy_(values, non_blocking=True)
            copied = torch.cuda.Event(blocking=True)
            copied.record()
            self._pending.append((vitals, host, copied))
        else:
            self._pending.append((vitals, values, None))
        return self._take(len(self._pending) - self.lag)

    def flush(self) -> list[StepStats]:
        """What has not been given back yet, waited for: before a save, and at the end."""
        return self._take(len(self._pending))

    def clear(self) -> None:
        """Forgets what has not been given back yet: after a rewind it never was."""
        self._pending.clear()

    def _take(self, count: int) -> list[StepStats]:
        taken = []
        for _ in range(count):
            vitals, values, copied = self._pending.popleft()
            if copied is not None:
                copied.synchronize()
            loss, norm, *requests = values.tolist()
            asked = tuple(round(each) for each in requests)
            taken.append(vitals._replace(loss=loss, grad_norm=norm, requests=asked))
        return taken


# ---------------------------------------------------------------- what follows


@dataclass(frozen=True)
class MonitorAction:
    """What follows from a step: nothing, something to tell, a rewind, or the end of the run.

    `told` is for people; `event` and `fields` for the ledger, None where there is nothing. `rewind`
    names the batches to leave out from now on; `abort` says why the run has to end.
    """

    told: str | None = None
    event: str | None = None
    fields: Mapping[str, Any] | None = None
    rewind: Range | None = None
    abort: str | None = None


@dataclass
class MonitorState:
    """What the monitor remembers of the steps up to here: plain values, part of each checkpoint.

    `skipped` updates in all and `in_a_row`, the last ones being from `row_batch` and `row_sample`
    on; mean and variance over the `seen` losses that were no spikes, the latest weighing most;
    `spikes_in_a_row`.
    """

    skipped: int = 0
    in_a_row: int = 0
    row_batch: int = 0
    row_sample: int = 0
    seen: int = 0
    mean: float = 0.0
    variance: float = 0.0
    spikes_in_a_row: int = 0


class LossMonitor:
    """Decides from the vitals of one step after the other; it does nothing itself.

    Args:
        rewinds: How many the run has had before this start.
        memory: As `remembered` gave it where the run goes on from; None for a fresh run.
    """

    def __init__(
        self, config: FaultsConfig, rewinds: int = 0, memory: Mapping[str, Any] | None = None
    ) -> None:
        self.config, self.rewinds = config, rewinds
        self._memory = MonitorState(**(memory or {}))

    def state_dict(self) -> dict[str, Any]:
        """What has to be known to go on as if there had been no stop, ready for JSON."""
        return asdict(self._memory)

    def reset_after_rewind(self, memory: Mapping[str, Any] | None) -> None:
        """Counts a rewind that has been done, and goes on with the memory of its checkpoint."""
        self.rewinds += 1
        self._memory = MonitorState(**(memory or {}))

    def check(self, vitals: StepStats) -> MonitorAction:
        """What follows from the next step."""
        if not (math.isfinite(vitals.loss) and math.isfinite(vitals.grad_norm)):
            return self._skipped(vitals)
        memory = self._memory
        memory.in_a_row = 0
        deviations = self._deviations(vitals.loss)
        threshold = self.config.spike_threshold
        if threshold is not None and deviations > threshold:
            return self._spike(vitals, deviations)
        memory.spikes_in_a_row = 0
        self._enter(vitals.loss)
        return MonitorAction()

    def _skipped(self, vitals: StepStats) -> MonitorAction:
        """An update that no rank made; after too many in a row, more than that."""
        config, memory = self.config, self._memory
        memory.skipped += 1
        memory.in_a_row += 1
        if memory.in_a_row == 1:
            memory.row_batch, memory.row_sample = vitals.batch, vitals.samples[0]
        told = (
            f"Step {vitals.step}: loss {vitals.loss:g}, gradient norm {vitals.grad_norm:g}: update "
            f"skipped on all ranks ({vitals.where}; {memory.in_a_row} in a row, {memory.skipped} "
            "in all)"
        )
        fields = _fields(vitals) | {"in_a_row": memory.in_a_row, "skipped": memory.skipped}
        if memory.in_a_row < config.max_consecutive_skips:
            return MonitorAction(told, "skip", fields)
        row = (
            f"{memory.in_a_row} updates in a row were not finite (samples {memory.row_sample} to "
            f"{vitals.samples[1] - 1})"
        )
        if self.rewinds < config.max_rewinds:
            told = f"{told}; {row}: {self._next_rewind()}"
            return MonitorAction(told, "skip", fields, rewind=(memory.row_batch, vitals.batch + 1))
        abort = (
            f"{row}, and no rewind is left of faults.max_rewinds ({config.max_rewinds}): look at "
            "these samples, use a lower optim.lr, or allow more rewinds"
        )
        return MonitorAction(told, "skip", fields, abort=abort)

    def _spike(self, vitals: StepStats, deviations: float) -> MonitorAction:
        """A loss far above the others. It stays out of their statistics, until it is the rule."""
        memory = self._memory
        told = (
            f"Step {vitals.step}: loss {vitals.loss:.4g} is {deviations:.1f} standard deviations "
            f"above its running mean of {memory.mean:.4g} ({vitals.where})"
        )
        fields = _fields(vitals) | {"deviations": round(deviations, 2), "mean": memory.mean}
        if self.config.rewind_on_spike:
            if self.rewinds < self.config.max_rewinds:
                told = f"{told}: {self._next_rewind()}"
                return MonitorAction(told, "spike", fields, rewind=(vitals.batch, vitals.batch + 1))
            told += f"; no rewind is left of faults.max_rewinds ({self.config.max_rewinds})"
        memory.spikes_in_a_row += 1
        if memory.spikes_in_a_row == WARM_UP:
            told += f"; after {WARM_UP} in a row this is the new level"
            memory.seen = memory.spikes_in_a_row = 0
        return MonitorAction(told, "spike", fields)

    def _next_rewind(self) -> str:
        return (
            "rewinding to the last good checkpoint, these samples are left out "
            f"(rewind {self.rewinds + 1} of {self.config.max_rewinds})"
        )

    def _deviations(self, loss: float) -> float:
        """By how many standard deviations a loss lies above the mean; 0 during the warm-up."""
        memory = self._memory
        if memory.seen < WARM_UP:
            return 0.0
        deviation: float = max(memory.variance**0.5, MIN_DEVIATION * abs(memory.mean), 1e-12)
        return (loss - memory.mean) / deviation

    def _enter(self, loss: float) -> None:
        """Takes a loss into mean and variance: all weigh the same at first, then the old fade."""
        memory = self._memory
        memory.seen += 1
        weight = max(1 / memory.seen, MEMORY)
        if memory.seen == 1:
            memory.mean = memory.variance = 0.0
        difference = loss - memory.mean
        memory.mean += weight * difference
        memory.variance = (1 - weight) * (memory.variance + weight * difference**2)


def _fields(vitals: StepStats) -> dict[str, Any]:
    """What the ledger holds of a bad step."""
    return {
        "step": vitals.step,
        "batch": vitals.batch,
        "samples": list(vitals.samples),
        "loss": vitals.loss,
        "grad_norm": vitals.grad_norm,
    }


# ---------------------------------------------------------------- what a run has left out


def rewinds_of(events: Iterable[Mapping[str, Any]]) -> list[Range]:
    """The batches that each rewind of a ledger left out, in the order of the rewinds.

    The event is written before training goes on, `event` "rewind" with `skip` [first, stop].
    """
    skips = [event["skip"] for event in events if event.get("event") == "rewind"]
    return [(int(first), int(stop)) for first, stop in skips]


def union(ranges: Iterable[Sequence[int]]) -> tuple[Range, ...]:
    """The same batches as ranges in ascending order that neither touch nor overlap."""
    merged: list[Range] = []
    for first, stop in sorted((first, stop) for first, stop in ranges):
        if merged and first <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], stop))
        else:
            merged.append((first, stop))
    return tuple(merged)
