"""Loss and gradient-norm monitoring: detect bad steps and decide how the run continues.

Each step leaves its scalars on the device, where the optimizer skips the update if they are not
finite (`not_finite`). `AsyncStatsReader` copies them to the host without blocking, and
`LossMonitor` maps them to an action: continue, skip, rewind or abort. All ranks read the same
values in the same order and therefore reach the same decision. Executing a rewind is the training
loop's job.
"""

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from parallel.step_scalars import NO_REQUESTS, StepRequests, StepScalars
from resilience.config import FaultsConfig
from resilience.rewinds import BatchRange

StepIndex = tuple[int, int, BatchRange]
"""Step, batch and samples of `StepStats`."""

WARMUP_STEPS = 20  # steps before spike detection starts; consecutive spikes that set a new baseline
EMA_WEIGHT = 0.01  # weight of the newest loss in the running mean and variance, after 100 losses
MIN_RELATIVE_STD = 0.005  # lower bound of the standard deviation, relative to the mean


NEVER_FINITE = (
    "no step had a finite loss, so the initial weights (run.init_from) compute values that exceed "
    "the range of the data type; use other weights, or precision.param=fp32"
)
"""Reason and remedy if all updates of a run were skipped."""


def not_finite(values: Tensor) -> Tensor:
    """Return a scalar on the same device: 1.0 if any value is infinite or NaN, else 0.0."""
    return 1.0 - torch.isfinite(values).all().float()


class StepStats(NamedTuple):
    """Host-side statistics of one optimizer step, identical on all ranks.

    Attributes:
        step: Optimizer step, starting at 1.
        batch: Index of the batch in the sample order, starting at 0.
        samples: Half-open range of sample indices in the batch.
        requests: Number of ranks that made each request.
    """

    step: int
    batch: int
    samples: BatchRange
    loss: float
    grad_norm: float
    requests: StepRequests = NO_REQUESTS

    @property
    def samples_text(self) -> str:
        return f"samples {self.samples[0]} to {self.samples[1] - 1}"


class AsyncStatsReader:
    """Copy step statistics to the host without blocking the device.

    On CUDA, `read` returns the statistics of the previous step: waiting for step N-1 while step N
    is queued keeps the host at most one step ahead. The delay depends on the device type only, so
    all ranks process the same step at the same time.
    """

    def __init__(self, device_type: str) -> None:
        self.delay = 1 if device_type == "cuda" else 0
        self._pending: deque[tuple[StepIndex, Tensor, torch.cuda.Event | None]] = deque()

    def read(self, step: int, batch: int, samples: BatchRange, values: Tensor) -> list[StepStats]:
        """Enqueue one step and return the statistics that are due.

        Args:
            values: (2 + n_requests) the step's `StepScalars`, on the device.
        """
        copied = None
        if values.is_cuda:
            host = torch.empty_like(values, device="cpu", pin_memory=True)
            host.copy_(values, non_blocking=True)
            values = host
            copied = torch.cuda.Event(blocking=True)
            copied.record()
        self._pending.append(((step, batch, samples), values, copied))
        return self._pop(len(self._pending) - self.delay)

    def flush(self) -> list[StepStats]:
        """Wait for and return all pending statistics (before a save or a rewind)."""
        return self._pop(len(self._pending))

    def _pop(self, count: int) -> list[StepStats]:
        popped = []
        for _ in range(count):
            index, values, copied = self._pending.popleft()
            if copied is not None:
                copied.synchronize()
            scalars = StepScalars.from_tensor(values)
            popped.append(StepStats(*index, scalars.loss, scalars.grad_norm, scalars.requests))
        return popped


@dataclass(frozen=True)
class MonitorAction:
    """Result of checking one step.

    Attributes:
        message: Log message, or None.
        event: Event type for the event log, or None.
        fields: Fields of that event.
        rewind: Batches to exclude after restoring the last valid checkpoint, or None.
        abort: Reason to abort the run, or None.
    """

    message: str | None = None
    event: str | None = None
    fields: Mapping[str, Any] | None = None
    rewind: BatchRange | None = None
    abort: str | None = None


OLD_NAMES = {  # of fields of `MonitorState` in checkpoints of 0.1
    "skipped": "n_skipped",
    "in_a_row": "n_consecutive",
    "row_batch": "first_batch",
    "row_sample": "first_sample",
    "seen": "n_losses",
    "spikes_in_a_row": "n_consecutive_spikes",
}


@dataclass
class MonitorState:
    """State of `LossMonitor`, saved in every checkpoint.

    Attributes:
        n_skipped: Skipped updates since the start of the run.
        n_consecutive: Length of the current sequence of skipped updates.
        first_batch, first_sample: Start of that sequence.
        n_losses, mean, variance: Running statistics of the loss, spikes excluded.
        n_consecutive_spikes: Length of the current sequence of spikes.
    """

    n_skipped: int = 0
    n_consecutive: int = 0
    first_batch: int = 0
    first_sample: int = 0
    n_losses: int = 0
    mean: float = 0.0
    variance: float = 0.0
    n_consecutive_spikes: int = 0

    @classmethod
    def from_dict(cls, values: Mapping[str, Any] | None) -> "MonitorState":
        """Create the state from a checkpoint of this or an earlier version; None for a new run."""
        return cls(**{OLD_NAMES.get(key, key): value for key, value in (values or {}).items()})


class LossMonitor:
    """Decide how the run continues after each step. Has no side effects.

    Args:
        n_rewinds: Rewinds so far in this run.
        state: A previous `state_dict()`, or None for a new run.
    """

    def __init__(
        self, config: FaultsConfig, n_rewinds: int = 0, state: Mapping[str, Any] | None = None
    ) -> None:
        self.config, self.n_rewinds = config, n_rewinds
        self._state = MonitorState.from_dict(state)

    def has_skipped_all(self, step: int) -> bool:
        """Return whether all `step` updates of the run were skipped."""
        return 0 < step <= self._state.n_skipped

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain values for JSON."""
        return asdict(self._state)

    def restore(self, state: Mapping[str, Any] | None, n_rewinds: int) -> None:
        """Continue with the state of the restored checkpoint, after this many rewinds."""
        self.n_rewinds = n_rewinds
        self._state = MonitorState.from_dict(state)

    def check(self, stats: StepStats) -> MonitorAction:
        """Return the action for one step."""
        if not (math.isfinite(stats.loss) and math.isfinite(stats.grad_norm)):
            return self._skip(stats)
        state = self._state
        state.n_consecutive = 0
        deviations = self._deviations(stats.loss)
        threshold = self.config.spike_threshold
        if threshold is not None and deviations > threshold:
            return self._spike(stats, deviations)
        state.n_consecutive_spikes = 0
        self._update(stats.loss)
        return MonitorAction()

    def _skip(self, stats: StepStats) -> MonitorAction:
        config, state = self.config, self._state
        state.n_skipped += 1
        state.n_consecutive += 1
        if state.n_consecutive == 1:
            state.first_batch, state.first_sample = stats.batch, stats.samples[0]
        message = (
            f"Step {stats.step}: skipped the update on all ranks: loss {stats.loss:g}, gradient "
            f"norm {stats.grad_norm:g} ({stats.samples_text}; {state.n_consecutive} consecutive, "
            f"{state.n_skipped} in total)"
        )
        fields = _event_fields(stats)
        fields |= {"n_consecutive": state.n_consecutive, "n_skipped": state.n_skipped}
        if state.n_consecutive < config.max_consecutive_skips:
            return MonitorAction(message, "skip", fields)
        reason = (
            f"{state.n_consecutive} consecutive updates were not finite (samples "
            f"{state.first_sample} to {stats.samples[1] - 1})"
        )
        if self.n_rewinds < config.max_rewinds:
            message += f"; {reason}: {self._next_rewind()}"
            rewind = state.first_batch, stats.batch + 1
            return MonitorAction(message, "skip", fields, rewind)
        remedy = "inspect these samples, lower optim.lr, or allow more rewinds"
        if self.has_skipped_all(stats.step):
            remedy = NEVER_FINITE
        abort = (
            f"{reason}, and faults.max_rewinds={config.max_rewinds} allows no further rewind; "
            f"{remedy}"
        )
        return MonitorAction(message, "skip", fields, abort=abort)

    def _spike(self, stats: StepStats, deviations: float) -> MonitorAction:
        """Return the action for a loss far above the mean; it is excluded from the statistics."""
        state, max_rewinds = self._state, self.config.max_rewinds
        message = (
            f"Step {stats.step}: loss {stats.loss:.4g} is {deviations:.1f} standard deviations "
            f"above its running mean of {state.mean:.4g} ({stats.samples_text})"
        )
        fields = _event_fields(stats) | {"deviations": round(deviations, 2), "mean": state.mean}
        if self.config.rewind_on_spike:
            if self.n_rewinds < max_rewinds:
                message += f": {self._next_rewind()}"
                return MonitorAction(message, "spike", fields, (stats.batch, stats.batch + 1))
            message += f"; faults.max_rewinds={max_rewinds} allows no further rewind"
        state.n_consecutive_spikes += 1
        if state.n_consecutive_spikes == WARMUP_STEPS:
            message += f"; using the level of {WARMUP_STEPS} consecutive spikes as the new baseline"
            state.n_losses = state.n_consecutive_spikes = 0
        return MonitorAction(message, "spike", fields)

    def _next_rewind(self) -> str:
        return (
            "rewinding to the last valid checkpoint and excluding these samples "
            f"(rewind {self.n_rewinds + 1} of {self.config.max_rewinds})"
        )

    def _deviations(self, loss: float) -> float:
        """Return the distance of `loss` from the running mean in standard deviations."""
        state = self._state
        if state.n_losses < WARMUP_STEPS:
            return 0.0
        std: float = max(state.variance**0.5, MIN_RELATIVE_STD * abs(state.mean), 1e-12)
        return (loss - state.mean) / std

    def _update(self, loss: float) -> None:
        """Update mean and variance: equal weights at first, then an exponential moving average."""
        state = self._state
        state.n_losses += 1
        weight = max(1 / state.n_losses, EMA_WEIGHT)
        if state.n_losses == 1:
            state.mean = state.variance = 0.0
        difference = loss - state.mean
        state.mean += weight * difference
        state.variance = (1 - weight) * (state.variance + weight * difference**2)


def _event_fields(stats: StepStats) -> dict[str, Any]:
    """Return the fields of a bad step for the event log."""
    fields = {"step": stats.step, "batch": stats.batch, "samples": list(stats.samples)}
    return fields | {"loss": stats.loss, "grad_norm": stats.grad_norm}
