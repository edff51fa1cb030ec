"""Bytes alive by part during a step, and their peaks by phase.

Both tiers of the memory plan record phases: the replay of `planning.allocations` and the trace of
`planning.tracing`.
"""

from collections.abc import Callable
from dataclasses import replace
from math import inf
from typing import Literal

from parallel.pipeline_schedule import schedule
from planning.activations import HALF_BUDGET, block_saved_bytes
from planning.step_spec import StepSpec

PARTS = (
    *("parameters", "gradients", "optimizer", "activations"),
    *("gathered", "logits", "host", "temporary"),
)
"""Parts of a memory breakdown, in display order."""

Held = dict[str, float]
Peaks = dict[str, Held]
"""Bytes by part at the peak of each phase."""


def fullest_phase(spec: StepSpec, peaks_of: Callable[[StepSpec], Peaks]) -> tuple[str, Held]:
    """Return the phase with the highest peak and its bytes by category.

    Under a memory budget, the compiler saves more than with `full` or `selective` checkpointing and
    less than with `none`: the peaks are between theirs.

    Args:
        peaks_of: Returns the peaks of a step without a budget, with the forward's activations in
            the category `activations`.
    """
    budget = spec.parallel.activation_checkpoint
    if not isinstance(budget, float) or not spec.n_layers:
        peaks = peaks_of(spec)
    elif budget >= HALF_BUDGET:  # recomputation behaves as if all matrix products were saved
        reference = _with_checkpoint(spec, "none" if budget == 1 else "selective")
        peaks = peaks_of(reference)
        difference = block_saved_bytes(spec) - block_saved_bytes(reference)
        layers = blocks_in_flight(spec)
        all_saved = layers * block_saved_bytes(reference)
        for phase, held in peaks.items():
            alive = held.get("activations", 0)
            # In the forward, the last block has saved the inputs of its attention only.
            saved = 1 - 0.5 / layers if phase == "forward" else min(alive / all_saved, 1)
            held["activations"] = alive + layers * difference * saved
    else:
        full, none = _with_checkpoint(spec, "full"), _with_checkpoint(spec, "none")
        least, saved, most = (block_saved_bytes(each) for each in (full, spec, none))
        weight = (saved - least) / (most - least)
        peaks = interpolate(peaks_of(full), peaks_of(none), weight)
    return max(peaks.items(), key=lambda item: sum(item[1].values()))


def blocks_in_flight(spec: StepSpec) -> int:
    """Return for how many blocks a rank has saved activations at most, counted by micro-batch."""
    if spec.mesh.pp == 1:
        return spec.n_layers
    alive = most = 0
    for action in schedule(spec.stage, spec.mesh.pp, len(spec.parts), spec.micro_batches):
        alive += len(spec.parts[action.part].layers) * (1 if action.forward else -1)
        most = max(most, alive)
    return most


def _with_checkpoint(spec: StepSpec, mode: Literal["full", "selective", "none"]) -> StepSpec:
    parallel = replace(spec.parallel, activation_checkpoint=mode, pp_checkpoint=None)
    return replace(spec, parallel=parallel)


def interpolate(first: Peaks, second: Peaks, weight: float) -> Peaks:
    """Return first + weight × (second - first), per phase and category."""
    return {
        phase: {
            name: a.get(name, 0) + weight * (second[phase].get(name, 0) - a.get(name, 0))
            for name in second[phase].keys() | a.keys()
        }
        for phase, a in first.items()
    }


class Heap:
    """Bytes alive by part, and their peak in each phase."""

    def __init__(self) -> None:
        self.held: dict[str, float] = dict.fromkeys(PARTS, 0)
        self.peaks: Peaks = {}
        self.total, self._highest = 0.0, -inf
        self._phase = ""

    def phase(self, name: str) -> None:
        self._record()
        self._phase = name
        self._highest = sum(self.peaks[name].values()) if name in self.peaks else -inf

    def add(self, part: str, size: float) -> None:
        self.held[part] += size
        self.total += size

    def free(self, part: str, size: float) -> None:
        self._record()
        self.held[part] -= size
        self.total -= size

    def use(self, size: float, part: str = "temporary") -> None:
        """Allocate and free."""
        self.add(part, size)
        self.free(part, size)

    def move(self, part: str, to: str, size: float) -> None:
        self.held[part] -= size
        self.held[to] += size

    def repeat(self, before: dict[str, float], times: int) -> None:
        """Add the change since `before` that many times."""
        for part, size in before.items():
            change = times * (self.held[part] - size)
            self.held[part] += change
            self.total += change

    def _record(self) -> None:
        if self.total > self._highest and self._phase:
            self._highest, self.peaks[self._phase] = self.total, dict(self.held)
