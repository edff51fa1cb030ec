"""Load the files of conf/model as `ModelConfig` without composing a program's configuration."""

from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from model.config import ModelConfig, RopeScaling

FILES = sorted((Path(__file__).parents[1] / "conf" / "model").glob("*.yaml"))


def read(path: Path) -> ModelConfig:
    """Load one file of conf/model, with `${tokenizer.vocab_size}` set to 256."""
    raw = OmegaConf.merge(OmegaConf.load(path), {"tokenizer": {"vocab_size": 256}})
    keys: Any = OmegaConf.to_container(raw.model, resolve=True)
    scaling = keys.pop("rope_scaling")
    return ModelConfig(**keys, rope_scaling=scaling and RopeScaling(**scaling))
