"""Compatibility of a run with its initial weights (`run.init_from`) and their tokenizer."""

import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from data.errors import DataError
from model.config import ModelConfig
from resilience.processes import is_first_process
from training.config import JobConfig, RunConfig
from training.config_validation import ConfigError
from training.resume_policy import override_value, policy_of

if TYPE_CHECKING:
    from data.tokenizer import Tokenizer


def check_initial_weights(run: RunConfig, model: ModelConfig) -> None:
    """Check that the weights in `run.init_from` fit the model.

    Keys that determine shapes must be equal. Keys that change the function computed with the same
    weights, as for a longer context, may differ if `run.allow_changes` lists them.

    Raises:
        FormatError: The weights cannot be read.
        ConfigError: Keys differ; the message has both values of each.
    """
    from formats.detection import open_weights

    weights = open_weights(Path(str(run.init_from)), verify=False)
    if is_first_process():
        for warning in weights.warnings:
            print(f"Warning: {warning}", file=sys.stderr, flush=True)
    source = weights.model
    errors = []
    for field in dataclasses.fields(ModelConfig):
        key = f"model.{field.name}"
        policy = policy_of(key)
        value, source_value = getattr(model, field.name), getattr(source, field.name)
        may_differ = policy is not None and policy.change == "override"
        allowed = (
            policy is None or policy.change == "free" or (may_differ and key in run.allow_changes)
        )
        if allowed or value == source_value:
            continue
        source_override = f"{key}={override_value(source_value)}"
        remedy = f"'{source_override}'" if "{" in source_override else source_override
        if may_differ:
            remedy += f", or run.allow_changes=[{key}] to train the weights with another function"
        errors.append(
            f"{key}={override_value(value)} differs from {source_override} of the weights in "
            f"run.init_from={run.init_from}; use {remedy}"
        )
    if errors:
        raise ConfigError(errors)


def check_initial_tokenizer(config: JobConfig, tokenizer: "Tokenizer | None") -> None:
    """Check that the weights in `run.init_from` were trained with the tokenizer of the data.

    Args:
        tokenizer: None if it is still to be trained on the data.

    Raises:
        DataError: They were trained with another tokenizer.
        FormatError: Their tokenizer cannot be read.
    """
    from formats.detection import find_checkpoint
    from formats.tokenizers import find_tokenizer

    source = find_tokenizer(find_checkpoint(Path(str(config.run.init_from)), verify=False))
    if source is None and tokenizer is None:
        raise DataError(
            f"run.init_from={config.run.init_from} contains no tokenizer, and tokenizer=bpe would "
            "train another one than that of these weights; set tokenizer.path to their "
            "tokenizer.json or tokenizer.model, or use tokenizer=llama3 or byte if it is theirs"
        )
    if source is not None and tokenizer is not None and source.ranks != tokenizer.ranks:
        raise DataError(
            f"data.folder={config.data.folder} is tokenized with {tokenizer.name} (vocabulary of "
            f"{tokenizer.vocab_size:,}), but the weights in run.init_from={config.run.init_from} "
            f"were trained with {source.name} (vocabulary of {source.vocab_size:,}). Omit "
            "tokenizer and tokenizer.*, so that the run uses the tokenizer of the weights, and use "
            "another data.folder or the default one"
        )
