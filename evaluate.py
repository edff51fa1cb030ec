"""Evaluates weights: `python evaluate.py evaluation.checkpoint=…`.

Loss, perplexity and bits per byte on held-out text, by source, on any mesh; with `tasks=[…]` named
benchmarks through lm-eval. The weights are a checkpoint of ours, which tells on which data, or a
Hugging Face or Meta folder. What is measured goes to `evaluation.json` beside the weights.
"""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from omegaconf import DictConfig

from cli.arguments import hydra_arguments
from cli.config import load_evaluate_config
from cli.errors import exit_on_user_error
from evaluation.config import EvaluateJobConfig
from evaluation.setup import (
    check_mesh,
    check_tasks,
    held_out_of,
    number_format,
    versions,
    write_figures,
)

if TYPE_CHECKING:
    from data.dataset import Dataset
    from evaluation.inference import InferenceContext
    from evaluation.perplexity import Measured


@hydra.main(version_base="1.3", config_path="conf", config_name="evaluate")
def main(composed: DictConfig) -> None:
    """Checks, launches, evaluates, tells."""
    with exit_on_user_error("Not evaluated"):
        config = load_evaluate_config(composed)
        check_tasks(config)
        evaluate(config)


def evaluate(config: EvaluateJobConfig) -> None:
    """Everything that is asked of the weights; printed, and written beside them.

    Raises:
        FormatError, DataError, ConfigError: weights, text or mesh are not what they have to be.
    """
    from evaluation.inference import fingerprint_together, load_model, tokenizer_of
    from formats.recognition import open_weights

    weights = open_weights(Path(config.evaluation.checkpoint))
    held_out, seq_len = held_out_of(config, weights)
    tokenizer = tokenizer_of(weights, config.tokenizer_path) if config.tasks else None
    parallel, processes, mesh = check_mesh(config, weights.model, seq_len)
    loaded = load_model(weights, processes, mesh, parallel, config.precision)
    figures: dict[str, Any] = {
        "checkpoint": str(weights.folder),
        "format": weights.format,
        "step": weights.step,
        "weights_hash": fingerprint_together(weights),
        "precision": number_format(config, loaded),
    }
    if held_out is not None:
        figures |= {"data": str(held_out.folder), "data_hash": held_out.hash, "seq_len": seq_len}
        figures |= describe(measure_held_out(config, loaded, held_out, seq_len))
    if tokenizer is not None:
        from evaluation.harness import run_tasks
        from evaluation.setup import harness_model

        figures["tasks"] = run_tasks(
            harness_model(config, loaded, tokenizer),
            config.tasks,
            folder=config.task_folder,
            num_fewshot=config.num_fewshot,
            limit=config.limit,
        )
    figures["versions"] = versions(bool(config.tasks))
    loaded.watchdog.close()
    if loaded.fabric.is_global_zero:
        write_figures(config, figures)
        print(json.dumps(figures, indent=1))


def measure_held_out(
    config: EvaluateJobConfig, loaded: "InferenceContext", dataset: "Dataset", seq_len: int
) -> "dict[str, Measured]":
    """The loss on the held-out windows, by source; every rank gets the same."""
    import torch

    from data.loader import validation_batches
    from evaluation.perplexity import measure

    evaluation = config.evaluation
    n_windows = dataset.n_validation_windows(seq_len)
    batches = validation_batches(
        dataset,
        samples=min(evaluation.samples or n_windows, n_windows),
        seq_len=seq_len,
        micro_batch_size=evaluation.micro_batch_size,
        rank=loaded.data_rank,
        size=loaded.mesh.dp,
    )
    lengths = torch.tensor(dataset.tokenizer().byte_lengths())
    sum_over_data = loaded.strategy.sum_over_data
    return measure(loaded.model, batches, loaded.fabric.device, sum_over_data, lengths)


def describe(measured: "dict[str, Measured]") -> dict[str, Any]:
    """Loss in nats a token, perplexity, and bits a byte, over all sources and of each."""
    from evaluation.perplexity import NOTHING

    def figures(of: "Measured") -> dict[str, Any]:
        return {
            "loss": of.loss,
            "perplexity": of.perplexity,
            "bits_per_byte": of.bits_per_byte,
            "targets": of.targets,
            "bytes": of.n_bytes,
        }

    whole = figures(sum(measured.values(), NOTHING))
    return whole | {"sources": {name: figures(of) for name, of in measured.items()}}


if __name__ == "__main__":
    sys.argv[1:] = hydra_arguments(sys.argv[1:], "evaluate")
    main()
