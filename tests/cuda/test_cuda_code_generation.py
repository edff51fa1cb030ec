"""Machine code of compiled training steps for GPUs of four generations, without a GPU.

A selection of the cases of `python tests/cuda/compile_recipes.py`, which compiles all of them: each
architecture, one and several ranks, FlexAttention and fp8.
"""

import json
import re

import pytest
from code_generation import (
    ARCHITECTURES,
    RECIPES,
    VARIANTS,
    cases,
    compile_steps,
    excess,
    make_step,
    rejection,
)
from conftest import ROOT
from fake_device import on_fake_device

RECORD = ROOT / "bench" / "results" / "code_generation.json"

SELECTED = [
    ("h200_1b", "as configured", "sm_80"),
    ("h200_8b", "fp8 rowwise", "sm_90"),
    ("h100x256_70b", "flex", "sm_100"),  # has its own number of warps
    ("h200_1b", "fp8 tensorwise", "sm_120"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "variant", "architecture"), SELECTED)
def test_kernels_of_a_recipe_fit_into_shared_memory_and_registers(
    recipe: str, variant: str, architecture: str
) -> None:
    assert rejection(recipe, variant, architecture) is None
    (result,) = on_fake_device(
        compile_steps,
        [make_step(recipe, variant)],
        capability=ARCHITECTURES[architecture],
        generates_code=True,
    )
    assert not isinstance(result, str), result
    assert result["kernels"] > 10
    assert bool(result["flex_kernels"]) == (variant == "flex")
    assert excess(result) == {}


def test_every_architecture_and_variant_of_a_recipe_is_compiled() -> None:
    found = [*cases()]
    assert {each[0] for each in found} == {*RECIPES}
    assert {each[1:] for each in found} == {(v, a) for v in VARIANTS for a in ARCHITECTURES}
    recipes, variants, architectures = ({*names} for names in zip(*SELECTED, strict=True))
    assert (variants, architectures) == ({*VARIANTS}, {*ARCHITECTURES})
    assert len(recipes) > 2 and {*SELECTED} <= {*found}
    rejected = {each for each in found if rejection(*each) is not None}
    assert rejected == {each for each in found if "fp8" in each[1] and each[2] == "sm_80"}


def test_recorded_results_have_every_case_within_limits() -> None:
    record = json.loads(RECORD.read_text())
    assert re.fullmatch("[0-9a-f]{7,40}", record["commit"])  # without local changes
    results = record["figures"]["cases"]
    assert results.keys() == {", ".join(case) for case in cases()}
    for case in cases():
        result = results[", ".join(case)]
        if error := rejection(*case):
            assert result == {"rejected": error}
        else:
            assert result["kernels"] > 10 and excess(result) == {}, case
