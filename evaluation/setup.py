"""What `evaluate.py` has around its measurements: checks before it launches, and its file."""

import dataclasses
import json
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.errors import DataError
from evaluation.config import EvaluateJobConfig
from formats.errors import FormatError
from model.config import ModelConfig
from parallel.config import ParallelConfig
from parallel.mesh import MeshShape, Processes, plan_processes, resolve_mesh
from training.config_rules import model_errors
from training.config_validation import ConfigError

if TYPE_CHECKING:
    from data.dataset import Dataset
    from data.tokenizer import Tokenizer
    from evaluation.inference import InferenceContext
    from evaluation.language_model import LlameshModel
    from formats.weights import Weights

LONGEST_WINDOW = 2048  # tokens, where neither a run nor a key tells
FIGURES = "evaluation.json"


def check_tasks(config: EvaluateJobConfig) -> None:
    """Whether the tasks can be run; raises `ConfigError` with every problem."""
    if not config.tasks:
        return
    from evaluation.harness import task_errors

    problems = task_errors(config.tasks, config.task_folder)
    if config.parallel.cp > 1:
        problems.append(
            f"parallel.cp ({config.parallel.cp}) cuts sequences, and tasks generate text token by "
            "token: use parallel.cp=1"
        )
    if problems:
        raise ConfigError(problems)


def held_out_of(config: EvaluateJobConfig, weights: "Weights") -> "tuple[Dataset | None, int]":
    """The text to measure the loss on, and the length of its windows in tokens.

    It is the run's own, or what `evaluation.data` names. Without either there is none, which is
    right where tasks are asked for.

    Raises:
        DataError: there is nothing to evaluate on, it holds nothing out, or has other tokens.
    """
    from data.dataset import Dataset

    evaluation = config.evaluation
    trained = weights.config
    data, train = trained.get("data") or {}, trained.get("train") or {}
    folder = evaluation.data or data.get("folder")
    longest = min(weights.model.max_seq_len, LONGEST_WINDOW)
    seq_len = evaluation.seq_len or train.get("seq_len") or longest
    if evaluation.data is None and (folder is None or data.get("stream_shards") is not None):
        if config.tasks:
            return None, seq_len
        if folder is not None:
            raise DataError(
                f"data.stream_shards ({data['stream_shards']}) of this checkpoint's run means that "
                "it was trained straight from a dataset, of which nothing is held out: there is "
                "nothing to evaluate on. Set evaluation.data to a prepared folder, or name tasks"
            )
        raise DataError(
            f"{weights.folder} tells of no text that was held out: set evaluation.data to a "
            "prepared folder (like shards/stdlib-bpe, made by prepare.py), or name tasks"
        )
    assert folder is not None
    if evaluation.data is None and config.tasks and not Path(folder).exists():
        return None, seq_len
    dataset = Dataset.open(folder, document_mask=data.get("document_mask", True))
    if not dataset.n_validation_windows(seq_len):
        raise DataError(
            f"{folder} holds no held-out window of {seq_len} tokens: prepare it with a larger "
            "data.validation_fraction, or use a shorter evaluation.seq_len"
        )
    _check_tokens(dataset, weights)
    return dataset, seq_len


def _check_tokens(dataset: "Dataset", weights: "Weights") -> None:
    """Raises DataError where the text is in other tokens than the model knows."""
    from formats.tokenizers import find_tokenizer

    here, there = dataset.tokenizer(), find_tokenizer(weights.folder)
    if there is not None and there.ranks != here.ranks:
        raise DataError(
            f"{dataset.folder} is in the tokens of {here.name} ({here.vocab_size:,}), and "
            f"{weights.folder} knows those of {there.name} ({there.vocab_size:,}): prepare the "
            f"text with tokenizer={there.name} and tokenizer.path set to that folder's "
            "tokenizer.model"
        )
    if here.vocab_size > weights.model.vocab_size:
        raise DataError(
            f"{dataset.folder} has {here.vocab_size:,} tokens, and {weights.folder} knows "
            f"{weights.model.vocab_size:,} (vocab_size): prepare the text with its tokenizer"
        )


def check_mesh(
    config: EvaluateJobConfig, model: ModelConfig, seq_len: int
) -> tuple[ParallelConfig, Processes, MeshShape]:
    """How this evaluation is spread; raises `ConfigError` with every problem."""
    parallel = config.parallel
    if config.tasks:  # whose sequences have any length, and whose logits are asked for
        parallel = dataclasses.replace(parallel, sequence_parallel=False, loss_parallel=False)
    processes, problems = plan_processes(parallel)
    mesh, more = resolve_mesh(parallel, processes.world_size)
    # Any number of windows goes: every data rank takes micro-batches of its own.
    problems += more or model_errors(mesh, parallel, model, seq_len)
    if problems:
        raise ConfigError(problems)
    return parallel, processes, mesh


def harness_model(
    config: EvaluateJobConfig, loaded: "InferenceContext", tokenizer: "Tokenizer"
) -> "LlameshModel":
    """The model as lm-eval asks it; every process has one, and deals with its share."""
    import torch.distributed as dist

    from evaluation.generation_sync import GenerationSync
    from evaluation.language_model import LlameshModel
    from formats.tokenizers import stop_ids

    def gather(own: list[Any]) -> list[list[Any]]:
        shares: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(shares, own)
        return shares[:: loaded.mesh.ranks_per_sample]  # peers have the same

    return LlameshModel(
        loaded.model,
        tokenizer,
        device=loaded.fabric.device,
        batch_size=config.evaluation.micro_batch_size,
        stop=stop_ids(tokenizer),
        data_rank=loaded.data_rank,
        data_size=loaded.mesh.dp,
        gather=gather,
        agree=GenerationSync(loaded.strategy.device_mesh, loaded.fabric.device),
        is_first=loaded.fabric.is_global_zero,
    )


def number_format(config: EvaluateJobConfig, loaded: "InferenceContext") -> str:
    """In which numbers the model computes: `float32` or `bfloat16`."""
    from parallel.data_parallel import mixed_precision_policy

    policy = mixed_precision_policy(config.precision, loaded.fabric.device.type)
    return str(policy.param_dtype).removeprefix("torch.")


def versions(harness: bool) -> dict[str, str]:
    """The versions of what measured."""
    found = {}
    for name in ("torch", "llamesh", *(["lm_eval"] if harness else [])):
        with suppress(PackageNotFoundError):  # a checkout that was never installed runs too
            found[name] = version(name)
    return found


def write_figures(config: EvaluateJobConfig, figures: dict[str, Any]) -> None:
    """Writes `evaluation.json` whole or not at all.

    Raises:
        FormatError: it cannot be written.
    """
    evaluation = config.evaluation
    path = Path(evaluation.output or Path(evaluation.checkpoint) / FIGURES)
    fresh = path.with_name(f".{path.name}.tmp")
    try:
        fresh.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
        fresh.rename(path)
    except OSError as error:
        raise FormatError(
            f"{path} cannot be written ({error.strerror}): name another file with "
            f"evaluation.output. What it would hold:\n{json.dumps(figures, indent=1)}"
        ) from None
