"""The recipes of conf/experiment on the machines that they are meant for."""

from hydra import compose, initialize_config_dir

from cli.arguments import CONF, hydra_arguments
from cli.config import check_for_tasks
from parallel.mesh import MeshShape, resolve_mesh
from training.config import JobConfig

# recipe: processes per node, nodes, a rank other than the first
MACHINES = {
    "h200_8b": (1, 1, 0),
    "h100x8_8b": (8, 1, 5),
    "h100x512_405b": (8, 64, 301),
    "h200_1b": (1, 1, 0),
    "h200_3b": (1, 1, 0),
    "h100x256_70b": (8, 32, 77),
    "h100x16k_405b": (8, 2048, 5003),
    "h100x16k_405b_long": (8, 2048, 9018),
    "llama3_8b_paper": (8, 16, 127),
    "llama3_70b_paper": (8, 32, 200),
    "llama3_405b_paper": (8, 256, 1029),
    "smoke": (2, 1, 1),
}


def load_recipe(recipe: str, *overrides: str) -> tuple[JobConfig, MeshShape]:
    """Return the configuration and the mesh of a recipe, as the tasks on its machines do."""
    per_node, nodes, _ = MACHINES[recipe]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        arguments = hydra_arguments([f"experiment={recipe}", *overrides], "train")
        config = check_for_tasks(compose("train", arguments), per_node, nodes)
    mesh, _ = resolve_mesh(config.parallel, per_node * nodes)
    return config, mesh
