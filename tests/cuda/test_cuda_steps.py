"""The recipes of conf/experiment on a tiny model: one rank of their mesh, on fake CUDA tensors."""

from dataclasses import replace
from typing import Any

import pytest
from fake_device import on_fake_device
from recipes import MACHINES, load_recipe
from step import Case, Report, run_cases

from model.config import ModelConfig

QUICK = ("h200_8b", "h100x8_8b")


def recipe_case(recipe: str) -> Case:
    """Return a recipe with its parallelism, precision and kernel, on a tiny model."""
    config, mesh = load_recipe(recipe)
    stages = mesh.pp * config.parallel.pp_parts
    tiny = ModelConfig("tiny", 512, max(2, stages), 16, 8, 1024, 1024)
    kept = ("rope_scaling", "tie_embeddings", "attention")
    return Case(
        mesh=tuple(vars(mesh).values()),
        rank=MACHINES[recipe][2],
        model=replace(tiny, **{name: getattr(config.model, name) for name in kept}),
        parallel=config.parallel,
        precision=config.precision,
        micro_batches=max(2, mesh.pp),
        documents=5 if config.data.document_mask else None,
        seq=max(256, 16 * mesh.seq_multiple),
        initialize=True,
    )


@pytest.mark.parametrize(
    "recipe",
    [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in MACHINES],
)
def test_recipe_runs_on_the_device_without_waiting_for_it(recipe: str) -> None:
    case = recipe_case(recipe)
    (report,) = on_fake_device(run_cases, {recipe: case}).values()
    assert isinstance(report, Report), report
    layers = case.model.n_layers // case.parallel.pp  # of a rank
    forwards = layers * case.micro_batches
    kernels: dict[str, Any] = {
        name: calls for name, calls in report.operations.items() if name.endswith(("_attn", "tion"))
    }
    assert kernels.keys() == {"flex_attention" if case.mesh[2] > 1 else "_varlen_attn"}, kernels
    assert set(kernels.values()) <= {forwards, 2 * forwards}
    # A block and two stages of the loss; reading and writing of int8 moments, for two shapes each.
    limit = 3 + 4 * (case.precision.optimizer_state == "int8")
    assert report.first_graphs == report.graphs <= limit
