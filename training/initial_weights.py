"""Whether a run may begin with weights that come from elsewhere (`run.init_from`)."""

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.errors import DataError
from model.config import ModelConfig
from training.config import JobConfig, RunConfig
from training.config_validation import ConfigError
from training.resume_policy import policy_of

if TYPE_CHECKING:
    from data.tokenizer import Tokenizer


def check_initial_weights(run: RunConfig, model: ModelConfig) -> None:
    """Whether the weights in `run.init_from` are those of such a model.

    Shapes have to be; what makes another function of the same weights may change by consent
    (`run.allow_changes`), as for a longer context.

    Raises:
        FormatError: they cannot be read.
        ConfigError: every key in which they differ, with both values.
    """
    from formats.detection import open_weights

    there = open_weights(Path(str(run.init_from))).model
    found = []
    for field in dataclasses.fields(ModelConfig):
        key = f"model.{field.name}"
        policy = policy_of(key)
        assert policy is not None
        now, before = getattr(model, field.name), getattr(there, field.name)
        if policy.change == "free" or now == before:
            continue
        if policy.change == "override" and key in run.allow_changes:
            continue
        remedy = f"use {_override(key, before)}"
        if policy.change == "override":
            remedy += f", or run.allow_changes=[{key}] to train them into another function"
        found.append(
            f"{key} ({_typed(now)}) is not that of the weights in run.init_from "
            f"({run.init_from}), which is {_typed(before)}: {remedy}"
        )
    if found:
        raise ConfigError(found)


def check_initial_tokenizer(config: JobConfig, here: "Tokenizer") -> None:
    """Whether the weights in `run.init_from` know the text by the data's tokens.

    Raises:
        DataError: they were trained on another tokenizer's.
        FormatError: their tokenizer cannot be read.
    """
    from formats.tokenizers import find_tokenizer

    there = find_tokenizer(Path(str(config.run.init_from)))
    if there is not None and there.ranks != here.ranks:
        raise DataError(
            f"the tokens of {config.data.folder} are those of tokenizer {here.name} "
            f"({here.vocab_size:,}), and the weights in run.init_from ({config.run.init_from}) "
            f"were trained on those of {there.name} ({there.vocab_size:,}): use "
            f"tokenizer={there.name} with tokenizer.path set to that folder's tokenizer.model, and "
            "another data.folder"
        )


def _typed(value: Any) -> str:
    """A value as a person types it on the command line."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    return json.dumps(value).replace('"', "").replace(": ", ":").replace(", ", ",")


def _override(key: str, value: Any) -> str:
    """What to type so that the key has this value."""
    typed = f"{key}={_typed(value)}"
    return f"'{typed}'" if "{" in typed else typed
