"""bench.gpu_training: its reduced form on CPU, and its full cases planned for an H200."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from bench import gpu_training, measurement
from bench.gpu_training import (
    CASES,
    METRICS,
    MICRO_BATCHES,
    TARGETS,
    compare_targets,
    compose_case,
)
from cli.config import check_for_tasks
from parallel.mesh import resolve_mesh
from planning.hardware import load_hardware
from planning.plan import plan_run
from planning.request import PlanRequest, configured_choice

TOKENS = MICRO_BATCHES * 2 * 64  # per reduced step
RESULTS = measurement.FOLDER / "gpu_training.json"


@pytest.fixture(scope="module")
def reduced(data_overrides: list[str]) -> dict[str, Any]:
    """Run the reduced cases and return the printed JSON."""
    with pytest.MonkeyPatch.context() as patch:
        output: list[str] = []
        patch.setattr(sys, "argv", ["gpu_training", "reduced", *data_overrides])
        patch.setattr("builtins.print", output.append)
        before = RESULTS.read_bytes() if RESULTS.exists() else None
        gpu_training.main()
        assert (RESULTS.read_bytes() if RESULTS.exists() else None) == before
    results: dict[str, Any] = json.loads(output[-1])
    return results


def test_reduced_form_measures_every_metric_of_every_case(reduced: dict[str, Any]) -> None:
    assert list(reduced["cases"]) == list(CASES) == list(TARGETS) and reduced["aims"] == {}
    for case, result in reduced["cases"].items():
        assert result["mfu_causal"] is None  # the peak of a CPU is unknown
        for name in set(METRICS) - {"mfu_causal"}:
            metric = result[name]
            assert 0 < metric["quartile_1"] <= metric["median"] <= metric["quartile_3"], case
        # The median of a metric and that of its reciprocal come from the same step.
        tokens = result["tokens_per_second"]["median"] * result["step_seconds"]["median"]
        assert tokens == pytest.approx(TOKENS)
        assert 0 < result["planned"]["peak_memory_gib"] < result["peak_memory_gib"]
        assert result["planned"]["step_seconds"] > 0
        assert set(result["plan_error"]) == set(result["planned"])


def test_cases_use_the_settings_of_their_recipes(reduced: dict[str, Any]) -> None:
    cases = reduced["cases"]
    states = {case: (result["optimizer_state"], result["fp8"]) for case, result in cases.items()}
    assert states == {
        "1b": ("fp32", None),
        "3b": ("fp32", None),
        "8b": ("int8", None),
        "8b_fp8": ("int8", "tensorwise"),
    }
    operations = [
        cases[case]["tflops"]["median"] / cases[case]["tokens_per_second"]["median"]
        for case in ("8b", "8b_fp8")
    ]
    assert operations[0] == pytest.approx(operations[1])


@pytest.mark.parametrize("case", CASES)
def test_full_case_is_valid_and_fits_on_an_h200(case: str) -> None:
    config = check_for_tasks(compose_case(case, False, []), 1, 1)
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
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("planning.fit_check.this_machine", lambda _: (None, 2**20))
    result = gpu_training.measure("1b", True, [f"data.folder={tmp_path}"])
    assert list(result) == ["skipped"] and "does not fit" in result["skipped"]


def test_failed_case_reports_its_error() -> None:
    assert "KeyError" in gpu_training.measure_in_process("70b", True, [])["failed"]


def test_target_is_met_at_its_value_and_never_without_a_measurement() -> None:
    targets = {"tokens_per_second": 100.0}
    for median, met in ((99.0, False), (100.0, True)):
        row = compare_targets({"tokens_per_second": {"median": median}}, targets)[
            "tokens_per_second"
        ]
        assert row == {"aim": 100.0, "found": median, "met": met}
    assert compare_targets({"skipped": "too large"}, targets)["tokens_per_second"]["met"] is False
