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

from cli.arguments import hydra_value
from cli.groups import CONF

SIZES = ("dim", "n_layers", "ffn_dim")


def initial_model_arguments(
    arguments: Sequence[str], folders: Sequence[Path] = (CONF,)
) -> list[str]:
    """Return the arguments that select the model of `run.init_from`, if no model is given.

    They precede the user's arguments, so explicit values win. Weights that cannot be opened select
    no model; `training.initial_weights` reports them. A sequence length of the recipe that the
    weights do not support is reduced, with as many tokens per step.

    Args:
        folders: Folders of configuration files.
    """
    given = dict(argument.lstrip("+-").partition("=")[::2] for argument in arguments)
    folder = given.get("run.init_from", "null")
    experiments = given.get("experiment", "null")
    if folder == "null" or "model" in given or _selects_model(experiments, folders):
        return []
    from formats.detection import open_weights
    from formats.errors import FormatError

    try:
        model = dataclasses.asdict(open_weights(Path(folder), verify=False).model)
    except FormatError:
        return []
    groups, recipes = _groups()

    def distance(name: str) -> tuple[bool, float]:
        changes = _differences(model, groups[name]).keys() - {"max_seq_len"}
        return bool(changes), abs(math.log(_size(model) / _size(groups[name])))

    nearest = min(groups, key=distance)
    changes = _differences(model, groups[nearest])
    if distance(nearest)[0]:
        changes["name"] = re.sub(r"[^\w.-]+", "-", model["name"]).strip("-.") or "continued"
    overrides = [f"++model.{key}={hydra_value(value)}" for key, value in changes.items()]
    seq_len, batch_size = (recipes[nearest][key] for key in ("seq_len", "global_batch_size"))
    if experiments == "null" and seq_len > model["max_seq_len"]:
        batch_size *= max(1, seq_len // model["max_seq_len"])
        sizes = {"seq_len": model["max_seq_len"], "global_batch_size": batch_size}
        overrides += [f"++train.{key}={size}" for key, size in sizes.items()]
    return [f"model={nearest}", *overrides]


def _selects_model(experiments: str, folders: Sequence[Path]) -> bool:
    """Return whether the file of an experiment sets the model or its shape."""
    names = [] if experiments == "null" else experiments.strip("[]").split(",")
    paths = [folder / "experiment" / f"{name.strip()}.yaml" for name in names for folder in folders]
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in paths if path.is_file()]
    return any(re.search(r"^model:|^ *- *(override +)?/?model *:", text, re.M) for text in texts)


def _groups() -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
    """Return the models of conf/model by name, and the `train` sections of their recipes."""
    from omegaconf import OmegaConf

    groups, recipes = {}, {}
    for path in sorted((CONF / "model").glob("*.yaml")):
        content: Any = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
        model = content.get("model", {})
        if all(isinstance(model.get(key), int) for key in SIZES):
            groups[path.stem], recipes[path.stem] = model, content["train"]
    return groups, recipes


def _differences(model: dict[str, Any], group: dict[str, Any]) -> dict[str, Any]:
    """Return the values of `model` that a group does not have."""
    names = model.keys() - {"name", "attention"}
    return {name: model[name] for name in sorted(names) if model[name] != group.get(name)}


def _size(model: dict[str, Any]) -> int:
    """Return roughly the number of parameters, without embeddings."""
    return model["n_layers"] * model["dim"] * (2 * model["dim"] + 3 * model["ffn_dim"])
