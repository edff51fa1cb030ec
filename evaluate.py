"""Evaluate trained weights: `python evaluate.py evaluation.checkpoint=…`.

Computes loss, perplexity and bits per byte on held-out text by data source, on any mesh, and with
`tasks=[…]` benchmarks through lm-eval. Weights are a native checkpoint, which records its dataset,
or a Hugging Face or Meta folder. Results are printed and written to `evaluation.json` in the folder
of the weights.
"""

import dataclasses
import json
import sys
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from omegaconf import DictConfig

from cli.arguments import hydra_arguments
from cli.config import load_evaluate_config
from cli.errors import exit_on_user_error
from evaluation.config import EvaluateJobConfig
from training.config_validation import ConfigError

if TYPE_CHECKING:
    from data.dataset import Dataset
    from evaluation.held_out import LossTotals
    from evaluation.inference import InferenceContext
    from formats.weights import Weights


@hydra.main(version_base="1.3", config_path="conf", config_name="evaluate")
def main(composed: DictConfig) -> None:
    """Load the configuration and evaluate; user errors exit with a message."""
    with exit_on_user_error():
        evaluate(load_evaluate_config(composed))


def evaluate(config: EvaluateJobConfig) -> None:
    """Measure everything the configuration requests; rank 0 prints and writes the results.

    Raises:
        FormatError, DataError, TaskError, ConfigError: Weights, text, tasks or mesh are invalid.
    """
    from evaluation.held_out import open_held_out
    from evaluation.lm_eval_tasks import task_errors
    from formats.detection import open_weights
    from formats.tokenizers import resolve_tokenizer
    from formats.weights import fingerprint
    from parallel.data_parallel import mixed_precision_policy

    if errors := task_errors(config.tasks, config.task_folder, config.parallel.cp):
        raise ConfigError(errors)
    weights = open_weights(Path(config.evaluation.checkpoint))
    held_out, seq_len = open_held_out(
        weights, config.evaluation.data, config.evaluation.seq_len, optional=bool(config.tasks)
    )
    tokenizer = resolve_tokenizer(weights.folder, config.tokenizer_path) if config.tasks else None
    context = launch(config, weights, seq_len)
    policy = mixed_precision_policy(config.precision, context.fabric.device.type)
    results: dict[str, Any] = {
        "checkpoint": str(weights.folder),
        "format": weights.format,
        "step": weights.step,
        "weights_hash": fingerprint(weights),
        "precision": str(policy.param_dtype).removeprefix("torch."),
    }
    if held_out is not None:
        results |= {"data": str(held_out.folder), "data_hash": held_out.hash, "seq_len": seq_len}
        results |= loss_metrics(held_out_loss(config, context, held_out, seq_len))
    if tokenizer is not None:
        from evaluation.lm_eval_model import LlameshLM
        from evaluation.lm_eval_tasks import run_tasks

        results["tasks"] = run_tasks(
            LlameshLM.on_mesh(context, tokenizer, config.evaluation.micro_batch_size),
            config.tasks,
            folder=config.task_folder,
            num_fewshot=config.num_fewshot,
            limit=config.limit,
        )
    results["versions"] = versions("torch", "llamesh", *(["lm_eval"] if config.tasks else []))
    context.watchdog.close()
    if context.fabric.is_global_zero:
        output = config.evaluation.output or Path(config.evaluation.checkpoint) / "evaluation.json"
        write_results(Path(output), results)
        print(json.dumps(results, indent=1))


def launch(config: EvaluateJobConfig, weights: "Weights", seq_len: int) -> "InferenceContext":
    """Load the model on its mesh; raise ConfigError if the mesh does not fit the model."""
    from evaluation.inference import load_model, plan_inference
    from training.config_rules import model_errors

    parallel = config.parallel
    if config.tasks:  # their sequences have arbitrary lengths, and scoring needs logits
        parallel = dataclasses.replace(parallel, sequence_parallel=False, loss_parallel=False)
    # The number of windows need not be divisible: every data rank has its own micro-batches.
    processes, mesh, errors = plan_inference(parallel, weights.model, seq_len, model_errors)
    if errors:
        raise ConfigError(errors)
    return load_model(weights, processes, mesh, parallel, config.precision)


def held_out_loss(
    config: EvaluateJobConfig, context: "InferenceContext", dataset: "Dataset", seq_len: int
) -> "dict[str, LossTotals]":
    """Return the loss on the held-out windows by data source, equal on all ranks."""
    import torch

    from data.loader import validation_batches
    from evaluation.held_out import evaluate_loss

    n_windows = dataset.n_validation_windows(seq_len)
    batches = validation_batches(
        dataset,
        samples=min(config.evaluation.samples or n_windows, n_windows),
        seq_len=seq_len,
        micro_batch_size=config.evaluation.micro_batch_size,
        rank=context.data_rank,
        size=context.mesh.dp,
    )
    byte_lengths = torch.tensor(dataset.tokenizer().byte_lengths())
    sum_over_data = context.strategy.sum_over_data
    return evaluate_loss(context.model, batches, context.fabric.device, sum_over_data, byte_lengths)


def loss_metrics(by_source: "dict[str, LossTotals]") -> dict[str, Any]:
    """Return loss in nats per token, perplexity and bits per byte, in total and by source."""
    from evaluation.held_out import LossTotals

    def metrics(totals: LossTotals) -> dict[str, Any]:
        return {
            "loss": totals.loss,
            "perplexity": totals.perplexity,
            "bits_per_byte": totals.bits_per_byte,
            "targets": totals.targets,
            "bytes": totals.n_bytes,
        }

    sources = {name: metrics(totals) for name, totals in by_source.items()}
    return metrics(sum(by_source.values(), LossTotals())) | {"sources": sources}


def versions(*packages: str) -> dict[str, str]:
    """Return the versions of the packages that are installed."""
    found = {}
    for name in packages:
        with suppress(PackageNotFoundError):  # llamesh itself may run from a checkout
            found[name] = version(name)
    return found


def write_results(path: Path, results: dict[str, Any]) -> None:
    """Write the results atomically.

    Raises:
        FormatError: The file cannot be written.
    """
    from data.files import write_atomically
    from formats.errors import FormatError

    text = json.dumps(results, indent=1)
    try:
        write_atomically(path, f"{text}\n".encode())
    except OSError as error:
        raise FormatError(
            f"{path} cannot be written ({error.strerror}); set evaluation.output to another file. "
            f"Results:\n{text}"
        ) from None


if __name__ == "__main__":
    sys.argv[1:] = hydra_arguments(sys.argv[1:], "evaluate")
    main()
