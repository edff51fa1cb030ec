"""Metrics of pipeline stages, measured on real processes.

The forward of a micro-batch sleeps for as long as the test says, like the attention of long and
short documents, so that its duration hardly depends on the machine.
"""

import io
import re
import time
from collections.abc import Sequence
from typing import Any

import pytest
from distributed import on_ranks
from small_run import Case, batch, build, local_batches

from parallel.pipeline_schedule import bubble
from train import train_step
from training.console import Console
from training.throughput import pipeline_metrics

EVEN = (0.1, 0.1, 0.1, 0.1)
UNEVEN = (0.28, 0.04, 0.04, 0.04)  # the same sum


def measure(case: Case, seconds: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Return the metrics of a step.

    Args:
        seconds: By pipeline rank, sleep in the forward of each micro-batch.
    """
    run: Any = build(case)
    pipeline = run.strategy.pipeline
    sleeps = iter(seconds[pipeline.rank])

    def sleep(*_: Any) -> None:
        time.sleep(next(sleeps))

    batches = local_batches(batch(1), run.data_rank, case.mesh.dp, case.n_micro)
    train_step(run, batches, lr=1e-3)  # the first step of a process is slow
    handle = run.llama.register_forward_pre_hook(sleep)
    train_step(run, batches, lr=1e-3)
    handle.remove()
    return pipeline_metrics(pipeline, run.fabric.device)


@pytest.fixture(scope="module")
def measured() -> dict[str, dict[str, Any]]:
    case = Case(pp=2, n_layers=2, n_micro=4)
    slow = [2 * each for each in EVEN]
    steps = {"even": (EVEN, EVEN), "uneven": (UNEVEN, UNEVEN), "slow": (EVEN, slow)}
    found = {name: on_ranks(2, measure, case, seconds) for name, seconds in steps.items()}
    assert all(first == second for first, second in found.values())
    return {name: first for name, (first, _) in found.items()}


def test_bubble_share_of_equal_stages_and_micro_batches_is_that_of_the_schedule(
    measured: dict[str, dict[str, Any]],
) -> None:
    # Both stages also compute for about a tenth of the time, and the machine may be loaded.
    assert measured["even"]["bubble_share"] == pytest.approx(bubble(2, 1, 4), abs=0.06)


def test_micro_batches_of_uneven_cost_lengthen_the_bubble(
    measured: dict[str, dict[str, Any]],
) -> None:
    # Sleeps alone: 0.1 of 0.5 s, and 0.28 of 0.68 s.
    even, uneven = (measured[name]["bubble_share"] for name in ("even", "uneven"))
    assert uneven == pytest.approx(0.28 / 0.68, abs=0.08) and uneven > even + 0.1


def test_slowest_stage_and_memory_of_each_stage_are_reported(
    measured: dict[str, dict[str, Any]],
) -> None:
    slow = measured["slow"]
    assert slow["slowest_stage"] == 1
    memory = slow["peak_memory_gib_by_stage"]
    assert len(memory) == 2 and min(memory) > 0 and slow["peak_memory_gib"] == max(memory)


def test_console_has_columns_of_the_pipeline_only_with_a_pipeline() -> None:
    record = {"step": 3, "loss": 4.5, "bubble_share": 0.2, "slowest_stage": 1}
    for fields, pattern in ((record, r"bubble +slowest"), ({"step": 3, "loss": 4.5}, None)):
        file = io.StringIO()
        Console(True, file).log(fields)
        headings, values = file.getvalue().splitlines()
        assert ("bubble" in headings) == (pattern is not None)
        if pattern:
            assert re.search(pattern, headings) and re.search(r" 20\.0% +1\b", values)
