"""The default configuration, and run folders with minimal files."""

import copy
import json
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from cli.arguments import CONF
from cli.config import load_train_config
from resilience.run_folder import COMMITTED, RunFolder
from training.config import JobConfig
from training.config_validation import plain


def default() -> JobConfig:
    """Return the configuration of `train.py model=llama3_2_1b tokenizer=llama3` without Hydra."""
    composed: Any = OmegaConf.load(CONF / "train.yaml")
    del composed["defaults"]
    for group, name in (("data", "stdlib"), ("tokenizer", "llama3")):
        composed[group] = OmegaConf.load(CONF / group / f"{name}.yaml")
    composed.merge_with(OmegaConf.load(CONF / "model" / "llama3_2_1b.yaml"))
    return load_train_config(composed)


CONFIG = plain(default())


def leaves(config: dict[str, Any], prefix: str = "") -> list[str]:
    """Return the dotted keys of all values."""
    found = []
    for key, value in config.items():
        path = f"{prefix}{key}"
        found += leaves(value, f"{path}.") if isinstance(value, dict) else [path]
    return found


def value_at(config: dict[str, Any], key: str) -> Any:
    """Return the value of a dotted key."""
    value: Any = config
    for name in key.split("."):
        value = value[name]
    return value


def changed(*keys_and_values: Any, of: dict[str, Any] = CONFIG) -> dict[str, Any]:
    """`changed("optim.lr", 1.0, "run.seed", 9)`: the configuration with these values."""
    config = copy.deepcopy(of)
    for key, value in zip(keys_and_values[::2], keys_and_values[1::2], strict=True):
        path, _, last = key.rpartition(".")
        section = value_at(config, path) if path else config
        section[last] = value
    return config


def other(key: str) -> Any:
    """Return a value other than the default of a key."""
    if key == "data.stages":
        return [{"from_sample": 1, "seq_len": 8}]  # before the position of any run
    return "another" if isinstance(value_at(CONFIG, key), str | None) else 12345


def commit(folder: RunFolder, step: int, config: dict[str, Any] = CONFIG, **position: Any) -> Path:
    """Create the folder of a committed checkpoint."""
    target = folder.step_folder(step)
    target.mkdir(parents=True)
    position = {"step": step, "samples": 2 * step, "data_hash": "same"} | position
    (target / "manifest.json").write_text(json.dumps({"position": position, "config": config}))
    (target / COMMITTED).touch()
    return target
