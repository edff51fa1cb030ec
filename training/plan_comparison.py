"""Measured step time, throughput, memory and save stall next to the plan, once in each launch.

The plan comes from `planning.fit_check`, on hardware that the planner knows.
"""

import statistics
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from data.stages import Stage

WARM_UP_STEPS = 5
"""First steps of a launch, which compile and allocate, and are excluded."""
MEASURED_STEPS = 15


@dataclass(frozen=True)
class PlannedStep:
    """The plan of one stage.

    Attributes:
        tokens_per_second: Of the entire mesh.
        peak_memory_gib: Of a rank, as `training.throughput.peak_memory_gib` measures it.
    """

    seconds: float
    tokens_per_second: float
    peak_memory_gib: float


class PlanComparison:
    """Compares a launch with its plan at its first logged step after 20 steps of one stage.

    Args:
        steps: Plan of each stage by sequence length and global batch size.
        save_stall_seconds: Planned wait of the training for a save.
        process_gib: Part of the planned memory that is the process without tensors, on CPU.
    """

    def __init__(
        self,
        steps: Mapping[tuple[int, int], PlannedStep],
        save_stall_seconds: float,
        process_gib: float = 0.0,
    ) -> None:
        self.steps, self.planned_stall = steps, save_stall_seconds
        self.process_gib = process_gib
        self.save_stall_seconds: float | None = None  # of the latest save
        self._stage: Stage | None = None
        self._n_steps = 0
        self._done = False

    def fields(
        self, stage: Stage, n_steps: int, step_seconds: Collection[float]
    ) -> dict[str, float]:
        """Return the plan, and the median of the steps, for the metrics of a logged step.

        Args:
            stage: Stage of all steps since the previous logged step.
            n_steps: Their number.
            step_seconds: Durations of the newest `MEASURED_STEPS` steps.

        Returns:
            Empty except once.
        """
        self._n_steps = n_steps + (self._n_steps if stage == self._stage else 0)
        self._stage = stage
        planned = self.steps.get((stage.seq_len, stage.global_batch_size))
        if self._done or planned is None or self._n_steps < WARM_UP_STEPS + MEASURED_STEPS:
            return {}
        self._done = True
        fields = {
            "median_step_seconds": statistics.median(step_seconds),
            "planned_step_seconds": planned.seconds,
            "planned_tokens_per_second": planned.tokens_per_second,
            "planned_peak_memory_gib": planned.peak_memory_gib,
        }
        if self.save_stall_seconds is not None:
            fields |= {
                "save_stall_seconds": self.save_stall_seconds,
                "planned_save_stall_seconds": self.planned_stall,
            }
        return fields


def comparison_text(metrics: Mapping[str, Any], stage: Stage, process_gib: float) -> str:
    """Return the measured and planned values in metrics that have `PlanComparison.fields`.

    Args:
        process_gib: As in `PlanComparison`; the memory plan at launch does not contain it.
    """
    process = f", {process_gib:g} of it without tensors" if process_gib else ""
    stages = ", ".join(f"{gib:.2f}" for gib in metrics.get("peak_memory_gib_by_stage", ()))
    by_stage = f", by stage {stages}" if stages else ""
    seconds, planned = metrics["median_step_seconds"], metrics["planned_step_seconds"]
    tokens_per_second = stage.global_batch_size * stage.seq_len / seconds
    text = (
        f"Measured next to the plan: {tokens_per_second:,.0f} tokens/s (planned "
        f"{metrics['planned_tokens_per_second']:,.0f}, {planned / seconds - 1:+.0%}), "
        f"{seconds:.3g} s per step ({planned:.3g}), memory {metrics['peak_memory_gib']:.2f} GiB "
        f"({metrics['planned_peak_memory_gib']:.2f}{process}){by_stage}"
    )
    if "save_stall_seconds" in metrics:
        stall, planned = metrics["save_stall_seconds"], metrics["planned_save_stall_seconds"]
        text += f", save stall {stall:.2g} s ({planned:.2g})"
    return text
