"""Evaluate trained weights: `python evaluate.py checkpoint=…`.

Computes loss, perplexity and bits per byte on held-out text by data source, on any mesh, and with
`tasks=[…]` benchmarks through lm-eval. Weights are a run folder or one of its checkpoints, which
record the dataset, or a Hugging Face or Meta folder. A table of the results is printed; all of them
are written to `evaluation.json` in the folder of the weights.
"""

import dataclasses
import os
import sys
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from cli.composition import compose_config
from cli.config import check_inference_mesh, load_evaluate_config
from cli.errors import exit_on_user_error
from cli.start_up import start_up
from evaluation.config import EvaluateJobConfig
from evaluation.errors import EvaluationError
from training.config_validation import ConfigError

SMALLER = (
    "use evaluation.micro_batch_size=1 or precision.param=bf16, or divide the weights over more "
    "processes (parallel.dp_shard)"
)


def main(arguments: list[str]) -> None:
    """Load the configuration and evaluate; user errors exit with a message."""
    with exit_on_user_error(smaller=SMALLER):
        evaluate(load_evaluate_config(compose_config("evaluate", arguments)))


def evaluate(config: EvaluateJobConfig) -> None:
    """Measure everything the configuration requests; rank 0 prints and writes the results.

    Raises:
        FormatError, DataError, ConfigError: Weights, text, tasks or mesh are invalid.
        EvaluationError: A metric or a task failed; the results of the others are written.
    """
    from formats.detection import check_path, open_weights

    check_path(Path(config.checkpoint))  # before the slow imports
    from evaluation.held_out import LossTotals, evaluate_dataset, open_held_out
    from evaluation.inference import load_model
    from evaluation.lm_eval_tasks import TaskOptions, run_tasks, task_errors
    from evaluation.report import report_lines
    from formats.instruct import find_chat_template, prompt_folders
    from formats.tokenizers import resolve_tokenizer
    from formats.weights import fingerprint
    from parallel.data_parallel import mixed_precision_policy

    tasks, folder, parallel = config.tasks, config.task_folder, config.parallel
    if tasks and (errors := list(task_errors(tasks, folder, parallel.cp))):
        raise ConfigError(errors)
    settings = config.evaluation
    weights = open_weights(Path(config.checkpoint))
    output = output_file(settings.output, weights.folder)
    held_out, seq_len = open_held_out(weights, settings, optional=bool(tasks))
    tokenizer = resolve_tokenizer(weights.folder, config.tokenizer_path) if tasks else None
    template = None
    if tokenizer is not None and config.apply_chat_template:
        template = find_chat_template(prompt_folders(weights, config.tokenizer_path), tokenizer)
    if tasks:  # their sequences have arbitrary lengths, and scoring needs logits
        parallel = dataclasses.replace(parallel, sequence_parallel=False, loss_parallel=False)
    # The number of windows need not be divisible: every data rank has its own micro-batches.
    processes, mesh = check_inference_mesh(parallel, config.precision, weights.model, seq_len)
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
    failures: dict[str, str] = {}
    if held_out is not None:
        results |= {"data": str(held_out.folder), "data_hash": held_out.hash, "seq_len": seq_len}
        try:
            totals = evaluate_dataset(context, held_out, seq_len, settings)
        except EvaluationError as error:
            failures["loss"] = str(error)
        else:
            results |= sum(totals.values(), LossTotals()).metrics()
            results["sources"] = {name: each.metrics() for name, each in totals.items()}
    samples = {}
    if tokenizer is not None:
        from evaluation.lm_eval_model import LlameshLM

        lm = LlameshLM(context, tokenizer, settings.micro_batch_size, template)
        chat, log_samples = config.apply_chat_template, config.log_samples
        options = TaskOptions(folder, config.num_fewshot, config.limit, chat, log_samples)
        found = run_tasks(lm, tasks, options)
        results["tasks"], samples = found.scores, found.samples
        failures |= found.errors
    if failures:
        results["errors"] = failures
    packages = ("torch", "llamesh", "lm_eval") if tasks else ("torch", "llamesh")
    # llamesh itself may run from a checkout, without a distribution.
    results["versions"] = {
        name: each.version for name in packages for each in distributions(name=name)
    }
    context.watchdog.close()
    if context.fabric.is_global_zero:
        write_results(output, results)
        write_samples(output.with_name(f"{output.stem}.samples"), samples)
        print("\n".join([*report_lines(results), f"Results: {output}"]), flush=True)
    if failures:
        lines = "".join(f"\n  {name}: {error}" for name, error in failures.items())
        raise EvaluationError(f"no results for {len(failures)} of the metrics and tasks:{lines}")


def output_file(path: str | None, weights: Path) -> Path:
    """Return the file of the results, after checking that it can be written.

    Raises:
        FormatError: Its folder does not exist or is read-only, or it is a folder.
    """
    from formats.errors import FormatError

    file = Path(path or weights / "evaluation.json")
    reason = None
    if file.is_dir():
        reason = "it is a folder"
    elif not file.parent.is_dir():
        reason = f"{file.parent} is not a folder"
    elif not os.access(file.parent, os.W_OK):
        reason = f"{file.parent} is read-only"
    if reason is not None:
        raise FormatError(f"{file} cannot be written ({reason}); set evaluation.output to a file")
    return file


def write_results(path: Path, results: dict[str, Any]) -> None:
    """Write the results atomically.

    Raises:
        FormatError: The file cannot be written.
    """
    from data.files import strict_json, write_atomically, write_problem
    from formats.errors import FormatError

    text = strict_json(results, indent=1)
    try:
        write_atomically(path, f"{text}\n".encode())
    except OSError as error:
        problem = write_problem(error, path.parent)
        raise FormatError(
            f"{path} cannot be written ({problem}); set evaluation.output to another file. "
            f"Results:\n{text}"
        ) from None


def write_samples(folder: Path, samples: dict[str, list[Any]]) -> None:
    """Write the samples of each task as JSON lines to `folder/TASK.jsonl`.

    Raises:
        FormatError: A file cannot be written.
    """
    from data.files import json_line, write_atomically
    from formats.errors import FormatError

    for task, records in samples.items():
        path = folder / f"{task}.jsonl"
        lines = [json_line(each, default=str) + "\n" for each in records]
        try:
            folder.mkdir(exist_ok=True)
            write_atomically(path, "".join(lines).encode(errors="surrogatepass"))
        except OSError as error:
            raise FormatError(
                f"{path} cannot be written ({error.strerror}); set evaluation.output to another "
                "folder"
            ) from None


if __name__ == "__main__":
    start_up()
    main(sys.argv[1:])
