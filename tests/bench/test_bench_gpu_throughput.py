"""bench.gpu.throughput: its full cases planned for an H200; test_bench_gpu.py runs reduced ones."""

from typing import Any

import pytest

from bench.gpu import throughput
from bench.gpu.throughput import (
    CASES,
    MICRO_BATCHES,
    TARGETS,
    compare_memory,
    compare_target,
    compose_case,
    measure_case,
)
from cli.config import check_for_tasks
from parallel.mesh import resolve_mesh
from planning.hardware import load_hardware
from planning.plan import plan_run
from planning.request import PlanRequest, configured_choice


@pytest.mark.parametrize("case", CASES)
def test_full_case_is_valid_and_fits_on_an_h200(case: str) -> None:
    config = check_for_tasks(compose_case(case, False), 1, 1)
    assert config.model.vocab_size == 128_256 and config.data.document_mask
    assert config.parallel.compile and config.precision.param == "auto"
    mesh, _ = resolve_mesh(config.parallel, 1)
    request, choice = PlanRequest(config, "cuda", tokens=1), configured_choice(config, mesh)
    assert not request.mesh_errors(mesh) + request.choice_errors(choice)
    stages = request.stages(choice)
    assert stages[0][0].micro_batches == MICRO_BATCHES
    assert stages[0][0].seq_len == (8192 if "8b" in case else 4096)
    assert plan_run(stages, load_hardware("h200")).fits


def test_case_that_does_not_fit_is_skipped_with_the_planner_message(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("planning.fit_check.this_machine", lambda _: (None, 2**20))
    ((name, row),) = measure_case("1b", True)
    assert name == "speed" and "does not fit" in row["skipped"]


def test_target_depends_on_the_flash_attention_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throughput, "is_h200", lambda: True)
    assert list(CASES) == list(TARGETS)
    for active, rate, met in (("FA2", 9_800, True), ("FA3", 9_800, False), ("FA3", 10_700, True)):
        monkeypatch.setattr(throughput, "flash_implementation", lambda active=active: active)
        row = compare_target("8b", {"tokens_per_second": {"median": rate}})
        assert (row["flash_attention"], row["passed"]) == (active, met)


def test_planned_memory_must_be_close_to_that_of_the_allocator() -> None:
    def row(planned: float, reserved: float | None) -> dict[str, Any]:
        found = {"planned": {"peak_memory_gib": planned}, "peak_memory_gib": 100.0}
        return compare_memory(found | {"reserved_gib": reserved})

    assert row(95, 110)["passed"] and not row(80, 110)["passed"] and "passed" not in row(1, None)
