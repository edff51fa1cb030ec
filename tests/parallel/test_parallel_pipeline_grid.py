"""The grid of pipelines: what is in it, what is rejected, and a small part of it trained.

`python -m bench.pipeline_grid` trains all of it.
"""

import itertools

import pytest
from pipeline_grid import AXES, OPTIONS, combinations, differences, errors_of
from small_run import Case, model_config

from parallel.pipeline_schedule import schedule, split_layers

SEED = 0  # of the committed results
GRID = combinations(SEED)
VALID = [case for case in GRID if not errors_of(case)]


def test_grid_has_each_pipeline_alone_and_with_each_other_axis_and_option() -> None:
    for pp, parts, tied in itertools.product(AXES["pp"], AXES["pp_parts"], AXES["tied"]):
        of_pipeline = [
            case for case in VALID if (case.pp, case.pp_parts, case.tied) == (pp, parts, tied)
        ]
        assert any(case.world == pp for case in of_pipeline)
        for axis in ("dp_replicate", "dp", "cp", "tp"):
            assert any(getattr(case, axis) > 1 for case in of_pipeline), (pp, parts, tied, axis)
    for name, values in OPTIONS.items():
        for value in values:
            assert any(getattr(case, name) == value for case in VALID), (name, value)


def runs(case: Case) -> bool:
    """Return whether the runtime can distribute layers and micro-batches."""
    if case.n_layers + 1 < case.pp * case.pp_parts:
        return False
    split_layers(model_config(case.tied, case.n_layers), case.pp * case.pp_parts)
    try:
        for rank in range(case.pp):
            schedule(rank, case.pp, case.pp_parts, case.n_micro)
    except ValueError:
        return False
    return True


def test_rules_reject_exactly_the_pipelines_that_the_runtime_cannot_run() -> None:
    """Layers for each stage but the last, and micro-batches in groups if parts interleave."""
    assert len(GRID) > len(VALID) == 84
    rejected = [errors_of(case) for case in GRID if errors_of(case)]
    texts = ("and the head; use", "interleaves groups of", "do not divide into")
    for text in texts:
        assert any(text in error for errors in rejected for error in errors), text
    for case in GRID:
        errors = [error for error in errors_of(case) if texts[2] not in error]
        if errors or not errors_of(case):
            assert runs(case) == (not errors), (case, errors)


@pytest.mark.parametrize("case", [case for case in VALID if case.world == 2][:2], ids=str)
def test_pipeline_trains_like_one_process(case: Case) -> None:
    """Sums in a different order round differently, by a few float32 ulps of 1e-7."""
    found = differences(case)
    assert found["loss"] <= 1e-6 and found["grad_norm"] <= 3e-6
