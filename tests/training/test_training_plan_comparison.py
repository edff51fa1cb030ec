"""The measured values of a launch next to its plan: once, without warm-up, of one stage."""

from collections import deque
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from data.stages import Stage
from model.config import ModelConfig
from training.plan_comparison import MEASURED_STEPS, PlanComparison, PlannedStep
from training.run import Run

SHORT = Stage(0, 0, 0, 64, 4, None, {})
LONG = Stage(30, 120, 7680, 128, 4, None, {})
PLANNED = {(64, 4): PlannedStep(0.5, 512.0, 2.0), (128, 4): PlannedStep(1.0, 512.0, 3.0)}


def compare(
    logged: list[int], seconds: list[float], change: int | None = None
) -> dict[int, dict[str, float]]:
    """Return the fields of each logged step that has any.

    Args:
        seconds: Of each step.
        change: First step of the second stage.
    """
    comparison, newest = PlanComparison(PLANNED, 0.1), deque[float](maxlen=MEASURED_STEPS)
    found, previous = {}, 0
    for step, each in enumerate(seconds, start=1):
        newest.append(each)
        if step in logged:
            stage = LONG if change is not None and step >= change else SHORT
            found[step] = comparison.fields(stage, step - previous, newest)
            previous = step
    return {step: fields for step, fields in found.items() if fields}


@pytest.mark.parametrize(
    ("logged", "steps", "expected"),
    [
        ([1, 10, 20, 30, 40], 40, 20),
        ([1, 7, 14, 21, 28], 28, 21),  # log.interval=7 skips step 20
        ([1, 100], 100, 100),
        ([1, *range(2, 60)], 60, 20),
        ([1, 19], 19, None),  # a short run
    ],
)
def test_plan_is_compared_at_the_first_logged_step_after_20(
    logged: list[int], steps: int, expected: int | None
) -> None:
    found = compare(logged, [0.4] * steps)
    assert list(found) == ([] if expected is None else [expected])
    if expected is not None:
        assert found[expected] == {
            "median_step_seconds": 0.4,
            "planned_step_seconds": 0.5,
            "planned_tokens_per_second": 512.0,
            "planned_peak_memory_gib": 2.0,
        }


def test_steps_that_compile_are_excluded() -> None:
    [fields] = compare([1, 20], [60.0, 30.0, 2.0, 2.0, 2.0] + [0.4] * 15).values()
    assert fields["median_step_seconds"] == 0.4


def test_steps_of_two_stages_are_not_mixed() -> None:
    """The last step of a stage is always logged."""
    found = compare([1, 10, 15, 20, 30, 40], [0.4] * 15 + [0.9] * 25, change=16)
    [(step, fields)] = found.items()
    assert step == 40 and fields["median_step_seconds"] == 0.9
    assert fields["planned_step_seconds"] == 1.0


def test_console_and_metrics_have_the_comparison_once() -> None:
    """At a logged step of a run on a known device, with the stall of a save that has ended."""
    lines: list[dict[str, Any]] = []
    notes: list[str] = []
    comparison = PlanComparison(PLANNED, 0.1, 0.45)
    comparison.save_stall_seconds = 0.25
    model = ModelConfig("small", 64, 1, 8, 8, 64, 64, tie_embeddings=False)
    run: Any = SimpleNamespace(
        clock=SimpleNamespace(read=lambda: (20, 8.0, 0.0), newest_steps=[0.4] * 15),
        config=SimpleNamespace(model=model, precision=SimpleNamespace(fp8=None)),
        comparison=comparison,
        console=SimpleNamespace(log=lines.append, note=notes.append),
        metrics=SimpleNamespace(write=lines.append),
        **{"mesh": SimpleNamespace(world_size=1), "last_metrics": {}, "stragglers": None},
        strategy=SimpleNamespace(pipeline=None),
        fabric=SimpleNamespace(device=torch.device("cpu")),
        optional=lambda output: Run.optional(run, output),
        failed_outputs=SimpleNamespace(report=lambda output, error: pytest.fail(str(error))),
    )
    metrics: list[dict[str, Any]] = [{"step": 20}, {"step": 40}]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("training.throughput.mixed_precision_policy", lambda *_: run)
        run.param_dtype = None
        for each in metrics:
            Run.log_metrics(run, each, SHORT)
    assert metrics[0]["planned_save_stall_seconds"] == 0.1
    assert metrics[0]["save_stall_seconds"] == 0.25 and "planned_step_seconds" not in metrics[1]
    [note] = notes
    assert note.startswith(
        "Measured next to the plan: 640 tokens/s (planned 512, +25%), 0.4 s per step (0.5), memory "
    )
    assert note.endswith(" GiB (2.00, 0.45 of it without tensors), save stall 0.25 s (0.1)")
