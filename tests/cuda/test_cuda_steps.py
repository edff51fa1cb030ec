"""The recipes of conf/experiment on a tiny model: one rank of their mesh, on fake CUDA tensors."""

from dataclasses import replace
from typing import Any

import pytest
from fake_device import on_fake_device
from hydra import compose, initialize_config_dir
from step import Case, Report, run_cases

from cli.arguments import CONF, hydra_arguments
from cli.config import check_for_tasks
from model.config import ModelConfig
from parallel.mesh import resolve_mesh

# recipe: processes per node, nodes, a rank other than the first
MACHINES = {
    "h200_8b": (1, 1, 0),
    "h100x8_8b": (8, 1, 5),
    "h100x512_405b": (8, 64, 301),
    "h200_1b": (1, 1, 0),
    "h200_3b": (1, 1, 0),
    "h100x256_70b": (8, 32, 77),
    "llama3_8b_paper": (8, 16, 127),
    "llama3_70b_paper": (8, 32, 200),
    "llama3_405b_paper": (8, 256, 1029),
    "smoke": (2, 1, 1),
}
QUICK = ("h200_8b", "h100x8_8b")


def recipe_case(recipe: str, per_node: int, nodes: int, rank: int) -> Case:
    """Return a recipe with its parallelism, precision and kernel, on a tiny model."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        composed = compose("train", hydra_arguments([f"experiment={recipe}"], "train"))
        config = check_for_tasks(composed, per_node, nodes)
    mesh, _ = resolve_mesh(config.parallel, per_node * nodes)
    tiny = ModelConfig("tiny", 512, 2, 16, 8, 1024, 1024)
    kept = ("rope_scaling", "tie_embeddings", "attention")
    return Case(
        mesh=mesh.sizes,
        rank=rank,
        model=replace(tiny, **{name: getattr(config.model, name) for name in kept}),
        parallel=config.parallel,
        precision=config.precision,
        documents=5 if config.data.document_mask else None,
        seq=max(256, 16 * mesh.seq_multiple),
        initialize=True,
    )


@pytest.mark.parametrize(
    "recipe",
    [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in MACHINES],
)
def test_recipe_runs_on_the_device_without_waiting_for_it(recipe: str) -> None:
    case = recipe_case(recipe, *MACHINES[recipe])
    (report,) = on_fake_device(run_cases, {recipe: case}).values()
    assert isinstance(report, Report), report
    forwards = case.model.n_layers * case.micro_batches
    kernels: dict[str, Any] = {
        name: calls for name, calls in report.operations.items() if name.endswith(("_attn", "tion"))
    }
    assert kernels.keys() == {"flex_attention" if case.mesh[2] > 1 else "_varlen_attn"}, kernels
    assert set(kernels.values()) <= {forwards, 2 * forwards}
    # A block and two stages of the loss; reading and writing of int8 moments, for two shapes each.
    limit = 3 + 4 * (case.precision.optimizer_state == "int8")
    assert report.first_graphs == report.graphs <= limit
