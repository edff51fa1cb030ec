"""Evaluate trained weights: `python evaluate.py checkpoint=…`.

Computes loss, perplexity and bits per byte on held-out text by data source, on any mesh, and with
`tasks=[…]` benchmarks through lm-eval. Weights are a run folder or one of its checkpoints, which
record the dataset, or a Hugging Face or Meta folder. Results are printed and written to
`evaluation.json` in the folder of the weights.
"""

import dataclasses
import json
import sys
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig

from cli.arguments import hydra_arguments
from cli.config import check_inference_mesh, load_evaluate_config
from cli.errors import exit_on_user_error
from cli.start_up import start_up
from evaluation.config import EvaluateJobConfig
from training.config_validation import ConfigError


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
    from evaluation.held_out import LossTotals, evaluate_dataset, open_held_out
    from evaluation.inference import load_model
    from evaluation.lm_eval_tasks import run_tasks, task_errors
    from formats.detection import open_weights
    from formats.tokenizers import resolve_tokenizer
    from formats.weights import fingerprint
    from parallel.data_parallel import mixed_precision_policy

    tasks, folder, parallel = config.tasks, config.task_folder, config.parallel
    if tasks and (errors := list(task_errors(tasks, folder, parallel.cp))):
        raise ConfigError(errors)
    settings = config.evaluation
    weights = open_weights(Path(config.checkpoint))
    held_out, seq_len = open_held_out(weights, settings, optional=bool(tasks))
    tokenizer = resolve_tokenizer(weights.folder, config.tokenizer_path) if tasks else None
    if tasks:  # their sequences have arbitrary lengths, and scoring needs logits
        parallel = dataclasses.replace(parallel, sequence_parallel=False, loss_parallel=False)
    # The number of windows need not be divisible: every data rank has its own micro-batches.
    processes, mesh = check_inference_mesh(parallel, weights.model, seq_len)
    context = load_model(weights, processes, mesh, parallel, config.precision)
    weights = context.weights
    policy = mixed_precision_policy(config.precision, context.fabric.device.type)
    results: dict[str, Any] = {
        "checkpoint": str(weights.folder),
        "format": weights.format,
        "step": weights.step,
        "weights_hash": fingerprint(weights),
        "precision": str(policy.param_dtype).removeprefix("torch."),
    }
    if held_out is not None:
        totals = evaluate_dataset(context, held_out, seq_len, settings)
        results |= {"data": str(held_out.folder), "data_hash": held_out.hash, "seq_len": seq_len}
        results |= sum(totals.values(), LossTotals()).metrics()
        results["sources"] = {name: each.metrics() for name, each in totals.items()}
    if tokenizer is not None:
        from evaluation.lm_eval_model import LlameshLM

        lm = LlameshLM(context, tokenizer, settings.micro_batch_size)
        fewshot, limit = config.num_fewshot, config.limit
        results["tasks"] = run_tasks(lm, tasks, folder=folder, num_fewshot=fewshot, limit=limit)
    packages = ("torch", "llamesh", "lm_eval") if tasks else ("torch", "llamesh")
    # llamesh itself may run from a checkout, without a distribution.
    results["versions"] = {
        name: each.version for name in packages for each in distributions(name=name)
    }
    context.watchdog.close()
    if context.fabric.is_global_zero:
        output = settings.output or weights.folder / "evaluation.json"
        write_results(Path(output), results)
        print(json.dumps(results, indent=1))


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
    start_up()
    main()
