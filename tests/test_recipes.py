"""Every recipe of conf/experiment passes train.py's own checks on the machines that it is for."""

from collections.abc import Iterator

import pytest
from hydra import compose, initialize_config_dir

from model.flops import parameter_count
from parallel.mesh import resolve_mesh
from program.command_line import CONF, hydra_arguments
from program.config import TrainProgram
from program.preflight import check_for_tasks

# recipe: devices a node, nodes, hardware.
MACHINES = {
    "smoke": (1, 1, "cpu"),
    "h200_1b": (1, 1, "h200"),
    "h200_3b": (1, 1, "h200"),
    "h200_8b": (1, 1, "h200"),
    "h100x8_8b": (8, 1, "h100"),
    "h100x256_70b": (8, 32, "h100"),
    "h100x512_405b": (8, 64, "h100"),
    "llama3_8b_paper": (8, 16, "h100"),
    "llama3_70b_paper": (8, 32, "h100"),
    "llama3_405b_paper": (8, 256, "h100"),
}
# What is published: peak learning rate, and tokens of a step from a number of tokens on.
RATES = {"llama3_8b_paper": 3e-4, "llama3_70b_paper": 1.5e-4, "llama3_405b_paper": 8e-5}
BATCHES = ((0, 4096, 2**22), (252e6, 8192, 2**23), (2.87e12, 8192, 2**24))


@pytest.fixture(scope="module", autouse=True)
def _hydra() -> Iterator[None]:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield


def load(recipe: str) -> TrainProgram:
    """As its tasks would on the machines that it is for."""
    per_node, nodes, _ = MACHINES[recipe]
    words = hydra_arguments([f"experiment={recipe}"], "train")
    return check_for_tasks(compose("train", words), per_node, nodes)


def test_every_recipe_has_its_machines() -> None:
    assert set(MACHINES) == {path.stem for path in (CONF / "experiment").glob("*.yaml")}


@pytest.mark.parametrize("recipe", MACHINES)
def test_a_recipe_passes_the_checks_on_its_machines(recipe: str) -> None:
    per_node, nodes, _ = MACHINES[recipe]
    config = load(recipe)
    mesh, problems = resolve_mesh(config.parallel, per_node * nodes)
    assert mesh.world_size == per_node * nodes and not problems
    if "_paper" in recipe:
        return
    # Where a name tells devices and size, they are those of the file.
    assert (config.parallel.devices or per_node, config.parallel.num_nodes or nodes) == (
        per_node,
        nodes,
    )
    size = recipe.rpartition("_")[2].removesuffix("b")
    if size.isdigit():
        assert round(parameter_count(config.model) / 1e9) == pytest.approx(int(size), abs=1)


@pytest.mark.parametrize("recipe", RATES)
def test_a_paper_recipe_follows_the_published_settings(recipe: str) -> None:
    config = load(recipe)
    assert config.optim.lr == RATES[recipe] and config.optim.min_lr_ratio == 0.01
    assert config.optim.warmup_steps == 8000 and config.optim.schedule_steps == 1_200_000
    assert config.data.document_mask and config.model.rope_scaling is None
    for stage, (begin, seq_len, tokens) in zip(config.stages().all, BATCHES, strict=True):
        # A stage begins with a step, so at most half a step from the published count of tokens.
        assert abs(stage.first_token - begin) <= tokens / 2
        assert (stage.seq_len, stage.seq_len * stage.global_batch_size) == (seq_len, tokens)
    last = config.stages().first_token(config.train.max_steps)
    assert abs(last - 15.6e12) <= tokens / 2
