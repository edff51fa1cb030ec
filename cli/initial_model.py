"""Take model and recipe of a run from the weights that it starts from.

`run.init_from=FOLDER` without `model=` selects the group of conf/model with the shape of these
weights, or the group of the nearest size with the shape as overrides.
"""

import dataclasses
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cli.arguments import CONF, hydra_value

SIZES = ("dim", "n_layers", "ffn_dim")


def initial_model_arguments(arguments: Sequence[str]) -> list[str]:
    """Return the arguments that select the model of `run.init_from`, if no model is given.

    They precede the user's arguments, so explicit values win. Weights that cannot be opened select
    no model; `training.initial_weights` reports them.
    """
    given = dict(argument.lstrip("+-").partition("=")[::2] for argument in arguments)
    folder = given.get("run.init_from", "null")
    if folder == "null" or "model" in given or "experiment" in given:
        return []
    from formats.detection import open_weights
    from formats.errors import FormatError

    try:
        model = dataclasses.asdict(open_weights(Path(folder), verify=False).model)
    except FormatError:
        return []
    groups = _groups()

    def distance(name: str) -> tuple[bool, float]:
        changes = _differences(model, groups[name]).keys() - {"max_seq_len"}
        return bool(changes), abs(math.log(_size(model) / _size(groups[name])))

    nearest = min(groups, key=distance)
    changes = _differences(model, groups[nearest])
    if distance(nearest)[0]:
        changes["name"] = re.sub(r"[^\w.-]+", "-", model["name"]).strip("-.") or "continued"
    overrides = [f"++model.{key}={hydra_value(value)}" for key, value in changes.items()]
    return [f"model={nearest}", *overrides]


def _groups() -> dict[str, dict[str, Any]]:
    """Return the models of conf/model by name."""
    from omegaconf import OmegaConf

    groups = {}
    for path in sorted((CONF / "model").glob("*.yaml")):
        model: Any = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
        model = model.get("model", model)
        if all(isinstance(model.get(key), int) for key in SIZES):
            groups[path.stem] = model
    return groups


def _differences(model: dict[str, Any], group: dict[str, Any]) -> dict[str, Any]:
    """Return the values of `model` that a group does not have."""
    names = model.keys() - {"name", "attention"}
    return {name: model[name] for name in sorted(names) if model[name] != group.get(name)}


def _size(model: dict[str, Any]) -> int:
    """Return roughly the number of parameters, without embeddings."""
    return model["n_layers"] * model["dim"] * (2 * model["dim"] + 3 * model["ffn_dim"])
