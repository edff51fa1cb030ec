"""Evaluates a checkpoint on its run's held-out text: `python evaluate.py evaluation.checkpoint=…`.

On any mesh, whatever mesh it was saved on. What is evaluated, on which data and with which model,
stands in the checkpoint's manifest; the command adds only where and how many at a time.
"""

import dataclasses
import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from omegaconf import DictConfig, OmegaConf

from data.errors import DataError
from parallel.mesh import MeshShape, Processes, plan_processes, resolve_mesh
from program.command_line import hydra_arguments
from program.config import (
    ConfigError,
    EvaluateProgram,
    TrainProgram,
    load_evaluate_config,
    load_train_config,
)
from program.preflight import refusals
from program.rules import model_problems
from training.run_folder import COMMITTED, RunFolderError

if TYPE_CHECKING:
    from data.dataset import Dataset


@hydra.main(version_base="1.3", config_path="conf", config_name="evaluate")
def main(composed: DictConfig) -> None:
    """Checks, launches, evaluates, tells."""
    with refusals():
        config = load_evaluate_config(composed)
        trained = read_trained_config(Path(config.evaluation.checkpoint))
        processes, mesh = check_mesh(config, trained)
        dataset = open_held_out(trained)
        figures = evaluate(config, trained, processes, mesh, dataset)
    if figures:
        print(json.dumps(figures, indent=1))


def read_trained_config(checkpoint: Path) -> TrainProgram:
    """The configuration that a checkpoint was trained with.

    Raises:
        RunFolderError: it is not a committed checkpoint, or its manifest cannot be read.
    """
    try:
        (checkpoint / COMMITTED).stat()
        values = json.loads((checkpoint / "manifest.json").read_text())["config"]
    except (OSError, ValueError, KeyError) as error:
        raise RunFolderError(
            f"evaluation.checkpoint ({checkpoint}) is not a committed checkpoint ({error}): "
            "name a folder like runs/NAME/checkpoints/step-00000100"
        ) from None
    return load_train_config(OmegaConf.create(values))


def check_mesh(config: EvaluateProgram, trained: TrainProgram) -> tuple[Processes, MeshShape]:
    """Processes and mesh of this evaluation; raises `ConfigError` with every problem."""
    processes, problems = plan_processes(config.parallel)
    mesh, more = resolve_mesh(config.parallel, processes.world_size)
    # Any number of windows goes: every data rank takes micro-batches of its own.
    problems += more or model_problems(mesh, config.parallel, trained.model, trained.train.seq_len)
    if problems:
        raise ConfigError(problems)
    return processes, mesh


def open_held_out(trained: TrainProgram) -> "Dataset":
    """The run's dataset; raises `DataError` where it is gone or holds nothing out."""
    from data.dataset import Dataset

    if trained.data.stream_lanes is not None:
        raise DataError(
            f"data.stream_lanes ({trained.data.stream_lanes}) of this checkpoint's run means that "
            "it was trained straight from a dataset, of which nothing is held out: there is "
            "nothing to evaluate on; runs on prepared data (data.stream_lanes=null) hold text out"
        )
    dataset = Dataset.open(trained.data.folder, document_mask=trained.data.document_mask)
    seq_len = trained.train.seq_len
    if not dataset.n_held_out(seq_len):
        raise DataError(
            f"data.folder ({trained.data.folder}) holds no held-out window of {seq_len} tokens: "
            "prepare it with a larger data.validation_fraction"
        )
    return dataset


def evaluate(
    config: EvaluateProgram,
    trained: TrainProgram,
    processes: Processes,
    mesh: MeshShape,
    dataset: "Dataset",
) -> dict[str, Any]:
    """Loss in nats a token, perplexity and bits per byte; also written beside the weights."""
    import torch

    from data.loader import validation_batches
    from evaluation.perplexity import bits_per_byte, mean_loss
    from model.llama import Llama
    from program.launch import launch
    from training.checkpoint.files import read_position
    from training.checkpoint.restoring import find_damage, load
    from training.config import WatchdogConfig
    from training.watchdog import Watchdog

    checkpoint = Path(config.evaluation.checkpoint)
    watchdog = Watchdog(WatchdogConfig(None, None, None))  # of the processes, not of their time
    fabric, strategy = launch(processes, mesh, config.parallel, config.precision, watchdog)
    if damage := find_damage(checkpoint):
        raise RunFolderError(f"{checkpoint} is damaged: {damage}")
    with torch.device("meta"):
        # The kernel of the device that evaluates, not of the one that trained.
        llama = Llama(dataclasses.replace(trained.model, attention="auto"))
    model = fabric.setup_module(llama)
    load(checkpoint, llama)
    n_windows = dataset.n_held_out(trained.train.seq_len)
    samples = min(config.evaluation.samples or n_windows, n_windows)
    batches = validation_batches(
        dataset,
        samples=samples,
        seq_len=trained.train.seq_len,
        micro_batch_size=config.evaluation.micro_batch_size,
        rank=mesh.data_rank(fabric.global_rank),
        size=mesh.dp,
    )
    loss = mean_loss(model, batches, fabric.device, strategy.sum_over_data)
    lengths = torch.tensor(dataset.tokenizer().byte_lengths())
    figures = {
        "checkpoint": str(checkpoint),
        "step": read_position(checkpoint).step,
        "loss": loss,
        "perplexity": math.exp(loss),
        "bits_per_byte": bits_per_byte(
            loss, batches, lengths, strategy.sum_over_data, fabric.device
        ),
        "samples": samples,
        "data_hash": dataset.hash,
        "torch": torch.__version__,
    }
    watchdog.close()
    if not fabric.is_global_zero:
        return {}
    fresh = checkpoint / ".evaluation.tmp"
    fresh.write_text(json.dumps(figures, indent=1) + "\n")
    fresh.rename(checkpoint / "evaluation.json")
    return figures


if __name__ == "__main__":
    sys.argv[1:] = hydra_arguments(sys.argv[1:], "evaluate")
    main()
