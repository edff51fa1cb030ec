"""Weights from the disk in a model on a mesh, and the tokenizer that belongs to them."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from formats.errors import FormatError
from parallel.config import ParallelConfig, PrecisionConfig
from parallel.mesh import MeshShape, Processes

if TYPE_CHECKING:
    from lightning.fabric import Fabric

    from data.tokenizer import Tokenizer
    from formats.weights import Weights
    from parallel.strategy import MeshStrategy
    from resilience.watchdog import Watchdog


@dataclass(frozen=True)
class InferenceContext:
    """A model that is ready to be asked, on every process of its mesh."""

    fabric: "Fabric"
    strategy: "MeshStrategy"
    mesh: MeshShape
    model: Any  # Fabric's wrapper around the sharded Llama
    weights: "Weights"
    watchdog: "Watchdog"

    @property
    def data_rank(self) -> int:
        """Which of the mesh's `dp` shares of the work this process does."""
        return self.mesh.data_rank(self.fabric.global_rank)


def load_model(
    weights: "Weights",
    processes: Processes,
    mesh: MeshShape,
    parallel: ParallelConfig,
    precision: PrecisionConfig,
) -> InferenceContext:
    """Launches the processes and fills each one's shard of the model.

    Raises:
        FormatError: on every rank: the weights are damaged, or one of them cannot read its shard.
        LaunchError: the processes cannot find each other.
    """
    import torch

    from model.llama import Llama
    from parallel.launch import launch
    from resilience.config import WatchdogConfig
    from resilience.watchdog import Watchdog

    watchdog = Watchdog(WatchdogConfig(None, None, None))  # of the processes, not of their time
    fabric, strategy = launch(processes, mesh, parallel, precision, watchdog.watch_children)
    watchdog.connect()
    with torch.device("meta"):
        llama = Llama(weights.model)
    model = fabric.setup_module(llama)
    fill_together(llama, weights)
    model.eval()
    return InferenceContext(fabric, strategy, mesh, model, weights, watchdog)


def fill_together(llama: Any, weights: "Weights") -> None:
    """Gives every rank its shard of whole weights; all raise where one cannot read its own.

    Raises:
        FormatError: a checkpoint is not as it was saved, or a file cannot be read; the message
            names the ranks.
    """
    import torch.distributed as dist

    from checkpoint.restore import find_damage
    from formats.weights import fill
    from parallel.parallelize import local_block

    if weights.format == "native" and (damage := find_damage(weights.folder)):
        raise FormatError(f"{weights.folder} is damaged: {damage}")

    problem = None
    try:
        fill(llama, weights, local_block)
    except FormatError as error:
        problem = str(error)
    told: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(told, problem)
    if problems := [f"{each} (rank {rank})" for rank, each in enumerate(told) if each is not None]:
        raise FormatError("; ".join(problems))


def fingerprint_together(weights: "Weights") -> str:
    """The hash of the weights, of which every rank reads a share."""
    import torch.distributed as dist

    from formats.weights import fingerprint

    def gather(own: dict[str, str]) -> list[dict[str, str]]:
        shares: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(shares, own)
        return shares

    return fingerprint(weights, dist.get_rank(), dist.get_world_size(), gather)


def tokenizer_of(weights: "Weights", choice: str | None = "auto") -> "Tokenizer | None":
    """The tokenizer of weights: the one that lies beside them, or another.

    Args:
        choice: `auto`, the path of a `tokenizer.model`, a `tokenizer.json` or a folder with one of
            them, or None for none.

    Raises:
        FormatError: there is none, or it cannot be read.
    """
    from formats.tokenizers import find_tokenizer, read_tokenizer_file

    if choice is None:
        return None
    if choice != "auto":
        path = Path(choice)
        found = find_tokenizer(path) if path.is_dir() else read_tokenizer_file(path)
    else:
        found = find_tokenizer(weights.folder) or _of_its_data(weights.folder)
    if found is None:
        raise FormatError(
            f"{weights.folder if choice == 'auto' else choice} holds no tokenizer.model and no "
            "tokenizer.json: name one by tokenizer_path=PATH, or do without by tokenizer_path=null"
        )
    return found


def _of_its_data(folder: Path) -> "Tokenizer | None":
    """The tokenizer of a run's data, for checkpoints from before they carried their own."""
    from data.config import TokenizerConfig
    from data.errors import DataError
    from data.tokenizer import load_tokenizer

    try:
        config = json.loads((folder / "manifest.json").read_text())["config"]
        return load_tokenizer(TokenizerConfig(**config["tokenizer"]), config["data"]["folder"])
    except (OSError, ValueError, KeyError, TypeError, DataError):
        return None
