"""The bench of training on a GPU: its reduced form, and what its cases are in full on an H200."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from bench import gpu_training, measurement
from bench.gpu_training import AIMS, CASES, FIGURES, MICRO_BATCHES, compared, composed
from cli.config import check_for_tasks
from parallel.mesh import resolve_mesh
from planning.hardware import load_hardware
from planning.plan import plan_run
from planning.request import PlanRequest, configured_choice

TOKENS = MICRO_BATCHES * 2 * 64  # of a reduced step
RESULTS = measurement.FOLDER / "gpu_training.json"


@pytest.fixture(scope="module")
def reduced(data_overrides: list[str]) -> dict[str, Any]:
    """What the command prints, as JSON."""
    with pytest.MonkeyPatch.context() as patch:
        told: list[str] = []
        patch.setattr(sys, "argv", ["gpu_training", "reduced", *data_overrides])
        patch.setattr("builtins.print", told.append)
        before = RESULTS.read_bytes() if RESULTS.exists() else None
        gpu_training.main()
        assert (RESULTS.read_bytes() if RESULTS.exists() else None) == before
    found: dict[str, Any] = json.loads(told[-1])
    return found


def test_the_reduced_form_yields_every_figure_of_every_case(reduced: dict[str, Any]) -> None:
    assert list(reduced["cases"]) == list(CASES) == list(AIMS) and reduced["aims"] == {}
    for case, found in reduced["cases"].items():
        assert found["mfu_causal"] is None  # of a CPU no peak is known
        for name in set(FIGURES) - {"mfu_causal"}:
            figure = found[name]
            assert 0 < figure["quartile_1"] <= figure["median"] <= figure["quartile_3"], case
        # The median of a figure and of its reciprocal are of one step.
        tokens = found["tokens_per_second"]["median"] * found["step_seconds"]["median"]
        assert tokens == pytest.approx(TOKENS)
        assert 0 < found["planned"]["peak_memory_gib"] < found["peak_memory_gib"]
        assert found["planned"]["step_seconds"] > 0
        assert set(found["plan_error"]) == set(found["planned"])


def test_each_case_is_the_recipe_that_it_is_named_for(reduced: dict[str, Any]) -> None:
    cases = reduced["cases"]
    states = {case: (found["optimizer_state"], found["fp8"]) for case, found in cases.items()}
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
def test_in_full_it_passes_the_rules_and_fits_an_h200(case: str) -> None:
    config = check_for_tasks(composed(case, False, []), 1, 1)
    assert config.model.vocab_size == 128_256 and config.data.document_mask
    assert config.parallel.compile and config.precision.param == "auto"
    mesh, _ = resolve_mesh(config.parallel, 1)
    asked, choice = PlanRequest(config, "cuda", tokens=1), configured_choice(config, mesh)
    assert not asked.mesh_errors(mesh) + asked.choice_errors(choice)
    jobs = asked.stages(choice)
    assert jobs[0][0].micro_batches == MICRO_BATCHES
    assert jobs[0][0].seq_len == (8192 if "8b" in case else 4096)
    assert plan_run(jobs, load_hardware("h200")).fits


def test_a_case_that_does_not_fit_is_skipped_with_the_planners_reason(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("planning.fit_check.this_machine", lambda _: (None, 2**20))
    found = gpu_training.measure("1b", True, [f"data.folder={tmp_path}"])
    assert list(found) == ["skipped"] and "does not fit" in found["skipped"]


def test_a_case_that_fails_tells_why_and_stops_no_other() -> None:
    assert "KeyError" in gpu_training.in_a_process("70b", True, [])["failed"]


def test_an_aim_is_met_from_its_value_on_and_never_by_what_was_not_measured() -> None:
    aims = {"tokens_per_second": 100.0}
    for median, met in ((99.0, False), (100.0, True)):
        row = compared({"tokens_per_second": {"median": median}}, aims)["tokens_per_second"]
        assert row == {"aim": 100.0, "found": median, "met": met}
    assert compared({"skipped": "too large"}, aims)["tokens_per_second"]["met"] is False
