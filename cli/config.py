"""Convert configurations composed by Hydra to the dataclasses of a program.

The only code that handles a `DictConfig`: interpolations are resolved, missing values and renamed
keys reported, and the rest is left to `training.config_validation`. The planner is imported by
`plan.py` only, since `--help` should be fast.
"""

import dataclasses
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from cli.arguments import PROMPTS
from cli.composition import interpolation_error, with_tokenizer
from cli.last_launch import interpolations, register_resolvers
from data.config import PrepareJobConfig
from data.errors import DataError
from evaluation.config import EvaluateJobConfig, GenerateJobConfig
from formats.config import ConvertJobConfig
from model.config import ModelConfig
from parallel.config import ParallelConfig, PrecisionConfig
from parallel.mesh import MeshShape, resolve_mesh
from resilience.accelerator import accelerator_warnings, resolve_processes
from resilience.launcher_variables import launcher_errors
from resilience.processes import Processes, is_first_process
from resilience.renamed_keys import CONVERT_KEYS, EVALUATE_KEYS, RENAMED_KEYS, rename_keys
from resilience.run_folder import RunFolder, RunFolderError
from training import config_rules as rules
from training.config import JobConfig
from training.config_validation import (
    ConfigError,
    Rule,
    broken_rules,
    field_at,
    known_keys,
    takes_text,
    validate,
)
from training.config_warnings import config_warnings
from training.initial_weights import check_initial_weights
from training.tokenizer_choice import with_existing_folder

if TYPE_CHECKING:
    from planning.config import PlanJobConfig

Config = TypeVar("Config")

OTHER_STARTS = {  # nanoGPT's values of init_from
    "resume": "run.dir=runs/NAME without run.init_from to resume a run",
    "scratch": "no run.init_from for random weights",
}


def load_train_config(composed: DictConfig, *more_rules: Rule) -> JobConfig:
    """Return the configuration of `train.py`.

    Args:
        more_rules: Rules in addition to `CONFIG_RULES`.

    Raises:
        ConfigError: unknown keys, missing values, wrong types and broken rules, all together.
    """
    return _load(composed, JobConfig, (*rules.CONFIG_RULES, *more_rules))


def check_config(composed: DictConfig) -> tuple[JobConfig, Processes, MeshShape]:
    """Return the configuration of `train.py` with its processes and mesh on this machine.

    Prints warnings about it.

    Raises:
        ConfigError: as `load_train_config`, with the errors of mesh and machine.
    """
    _check_start(composed)
    if OmegaConf.select(composed, "parallel.auto") is True:
        from cli.auto_parallel import with_choice

        composed = with_choice(composed, load_train_config, sys.argv[1:])
    elif OmegaConf.select(composed, "parallel.auto_record") is not None:  # of an earlier launch
        OmegaConf.update(composed, "parallel.auto_record", None)
    config = load_train_config(composed, rules.launch_rule(), *rules.INSTALLATION_RULES)
    print_warnings(config_warnings(config))
    processes, _ = resolve_processes(config.parallel)
    print_warnings(accelerator_warnings(config.parallel, processes))
    mesh, _ = resolve_mesh(config.parallel, processes.world_size)
    return config, processes, mesh


def check_for_tasks(composed: DictConfig, per_node: int, num_nodes: int) -> JobConfig:
    """Return the configuration of a run whose processes `srun` will start on other machines.

    Args:
        per_node: Tasks per node.

    Raises:
        ConfigError: as `load_train_config`, with the errors of the mesh.
    """
    _check_start(composed)
    tasks = Processes("auto", per_node, num_nodes, "srun")
    return load_train_config(composed, rules.launch_rule(tasks), *rules.INSTALLATION_RULES)


def _check_start(composed: DictConfig) -> None:
    """Check that the weights or the checkpoint to start from exist, before any other check.

    A run that has checkpoints of its own no longer needs them.

    Raises:
        ConfigError: They do not exist.
    """
    try:
        run = cast(dict[str, Any], OmegaConf.to_container(composed.run, resolve=True))
        folder = RunFolder(Path(run["dir"]))
        source = folder.resume_source(run["resume"])
        weights = None if folder.committed_steps() else run["init_from"]
    except (OmegaConfBaseException, RunFolderError, KeyError, TypeError):
        return  # reported by the checks that follow
    for key, path in (("init_from", weights), ("resume", source)):
        if not isinstance(path, str) or not path or path in ("auto", "never"):
            continue
        if URL.match(path) or Path(path).expanduser().exists():
            continue
        kinds = "a checkpoint, a Hugging Face or a Meta folder"
        remedy = kinds if key == "init_from" else "auto, never or runs/NAME/checkpoints/step-…"
        if key == "init_from":
            from formats.detection import hub_remedy

            remedy += hub_remedy(Path(path))
            remedy = OTHER_STARTS.get(path, remedy)
        raise ConfigError([f"run.{key}={path} does not exist; use {remedy}"])


def check_inference_mesh(
    parallel: ParallelConfig, precision: PrecisionConfig, model: ModelConfig, seq_len: int
) -> tuple[Processes, MeshShape]:
    """Return the processes and the mesh of `evaluate.py` and `generate.py` on this machine.

    Raises:
        ConfigError: The mesh does not fit this machine or the model.
    """
    processes, errors = resolve_processes(parallel)
    errors += launcher_errors(parallel, processes.accelerator)
    if processes.capability is not None:
        errors += rules.bf16_errors(processes.capability, precision, model)
    mesh, unresolved = resolve_mesh(parallel, processes.world_size)
    errors += unresolved or rules.model_errors(mesh, parallel, model, seq_len)
    compiled = dataclasses.replace(parallel, compile=parallel.compile is True)  # as in inference
    capability = processes.capability or rules.HOPPER
    errors += rules.compiler_errors(
        processes.accelerator, mesh, compiled, precision, model, False, capability
    )
    if errors:
        raise ConfigError(errors)
    print_warnings(accelerator_warnings(parallel, processes))
    return processes, mesh


def load_plan_config(composed: DictConfig) -> "PlanJobConfig":
    """Return the configuration of `plan.py`; raise as `load_train_config` does.

    A search chooses the mesh, so the configured one need not be valid.
    """
    from planning.config import PLAN_RULES, PlanJobConfig
    from planning.hardware import DEFAULT, Hardware, load_hardware
    from planning.hardware import RULES as HARDWARE_RULES

    given = composed.get("hardware")
    if given is None or "name" not in given:  # neither a recipe nor the command names it
        default = OmegaConf.create({"hardware": asdict(load_hardware(DEFAULT))})
        composed = cast(DictConfig, OmegaConf.merge(default, composed))
    _check_start(composed)

    def hardware_errors() -> list[str]:
        values = cast(dict[str, Any], OmegaConf.to_container(composed.hardware, resolve=True))
        return broken_rules(values, Hardware, HARDWARE_RULES)

    applied = (*rules.CONFIG_RULES, rules.saving_errors, hardware_errors, *PLAN_RULES)
    config = _load(composed, PlanJobConfig, applied)
    if config.run.init_from is not None and not RunFolder(Path(config.run.dir)).committed_steps():
        check_initial_weights(config.run, config.model)  # they may have selected the model
    warned = config
    if config.searches:  # `plan.py` warns about the combination that it finds
        parallel = dataclasses.replace(config.parallel, async_tp=False)
        warned = dataclasses.replace(config, parallel=parallel)
    print_warnings(config_warnings(warned))
    return config


def load_prepare_config(composed: DictConfig) -> PrepareJobConfig:
    """Return the configuration of `prepare.py`; raise as `load_train_config` does."""
    return _load(composed, PrepareJobConfig, rules.PREPARE_RULES)


def load_evaluate_config(composed: DictConfig) -> EvaluateJobConfig:
    """Return the configuration of `evaluate.py`; raise as `load_train_config` does."""
    applied = (*rules.CONFIG_RULES, rules.inference_errors, rules.task_errors)
    return _load(composed, EvaluateJobConfig, applied, EVALUATE_KEYS)


def load_generate_config(composed: DictConfig) -> GenerateJobConfig:
    """Return the configuration of `generate.py`; raise as `load_train_config` does."""
    return _load(
        composed,
        GenerateJobConfig,
        (*rules.CONFIG_RULES, rules.inference_errors, rules.generate_errors),
    )


def load_convert_config(composed: DictConfig) -> ConvertJobConfig:
    """Return the configuration of `convert.py`; raise as `load_train_config` does."""
    return _load(composed, ConvertJobConfig, (rules.convert_errors,), CONVERT_KEYS)


def print_warnings(warnings: Iterable[str]) -> None:
    """Print warnings before launch, on the first process."""
    if is_first_process():
        for warning in warnings:
            print(f"Warning: {warning}", file=sys.stderr, flush=True)


def _load(
    composed: DictConfig,
    schema: type[Config],
    applied: Sequence[Rule],
    renamed: Mapping[str, str] = RENAMED_KEYS,
) -> Config:
    """Return the composed configuration as a dataclass; raise ConfigError with all errors."""
    if schema is JobConfig and "hardware" in composed:  # of a recipe, for `plan.py`
        composed = OmegaConf.masked_copy(
            composed, [str(key) for key in composed if key != "hardware"]
        )
    register_resolvers()
    values = cast(dict[str, Any], OmegaConf.to_container(composed, resolve=False))
    unset = {name for name, value in values.items() if value == "???"}
    found = rename_keys(values, renamed)
    errors = [
        f"{old} and {new} are both given; use {new}"
        for old, new in found.items()
        if "." not in new and new not in unset
    ]
    errors += _missing_values(values)
    if not errors:
        try:
            values = _resolve(with_tokenizer(composed, sys.argv[1:]), schema)
        except OmegaConfBaseException as error:
            errors = [interpolation_error(error)]
        except DataError as error:
            errors = [str(error)]
        rename_keys(values, renamed)
    for old, new in found.items():
        if is_first_process():
            print(f"Warning: {old} is deprecated; use {new}", file=sys.stderr, flush=True)
    if not errors:
        try:
            config = validate(values, schema, (*applied, *_text_rules(values, schema)))
        except ConfigError as error:
            raise ConfigError(_without_derived(error.errors, composed)) from None
        if "data" in values and "tokenizer" in values:
            data = with_existing_folder(config.data, config.tokenizer)  # type: ignore[attr-defined]
            config = dataclasses.replace(config, data=data)  # type: ignore[type-var]
        return config
    # Values are not final: of the other errors only unknown keys are certain.
    try:
        validate(values, schema)
    except ConfigError as error:
        errors += [each for each in error.errors if each.startswith("Unknown key")]
    raise ConfigError(errors)


def _without_derived(errors: Sequence[str], composed: DictConfig) -> list[str]:
    """Return errors without those of values that follow from another key with an error.

    `optim.schedule_steps` is `${train.max_steps}` by default.
    """
    values = cast(dict[str, Any], OmegaConf.to_container(composed, resolve=False))
    invalid = {re.split(r"[=\[ ]", error, maxsplit=1)[0] for error in errors}
    derived = {
        key for key, text in interpolations(values) if invalid & {*re.findall(r"[\w.]+", text)}
    }
    return [error for error in errors if error.partition("=")[0] not in derived]


def _resolve(composed: DictConfig, schema: type[Any]) -> dict[str, Any]:
    """Return all values, with `train.max_steps` derived from `train.max_tokens` if that is set."""
    values = cast(dict[str, Any], OmegaConf.to_container(composed, resolve=True))
    max_tokens = OmegaConf.select(composed, "train.max_tokens")
    if max_tokens is None or not issubclass(schema, JobConfig):
        return values
    try:
        config = validate(values, schema)
    except ConfigError:
        return values  # the caller reports the errors
    steps = config.stages().steps_for(max_tokens)
    # Values that refer to max_steps, such as optim.schedule_steps, follow.
    derived = OmegaConf.merge(composed, {"train": {"max_steps": steps}})
    return cast(dict[str, Any], OmegaConf.to_container(derived, resolve=True))


EXPANDED = ("checkpoint", "run.init_from", "run.resume", "tokenizer.path", "tokenizer_path")
"""Keys whose readers expand a tilde."""
FILE_URL = re.compile(r"file:(//(localhost)?)?(?=/[^/])")
URL = re.compile(r"([A-Za-z][\w+.-]+):/")
HUB = re.compile(r"(?:hf://|https?://huggingface\.co/)([\w.-]+/[\w.-]+)")


def _text_rules(values: dict[str, Any], schema: Any) -> list[Rule]:
    """Return a rule for texts that would be used as another path than the user means.

    An empty path, as an unset shell variable leaves it, is the working directory; a URL would be a
    local folder such as `./s3:`, and a tilde that the shell does not expand a folder `./~`.
    """
    errors: list[str] = []
    for key in known_keys(schema, values=values):
        text = _value_at(values, key)
        if not isinstance(text, str) or not takes_text(schema, key):
            continue
        if key == "run.name" or key.rpartition(".")[2] in PROMPTS:  # names have rules, prompts none
            continue
        if key.startswith("data.sources."):
            errors += _source_path_errors(values, key, text)
        elif not text.strip() and "MinLen" not in repr(field_at(schema, key)):
            null = " or null" if takes_text(schema, key) == "optional" else ""
            errors.append(f"{key}={text!r} is empty; use a text{null}")
        elif URL.match(text):
            path = FILE_URL.sub("", text) if FILE_URL.match(text) else "PATH"
            rule = "is a URL, but only paths of mounted file systems are supported"
            remedy = f"use {key}={path}"
            if key in EXPANDED and (hub := HUB.match(text)):
                name = hub[1].rpartition("/")[2]
                remedy = f"hf download {hub[1]} --local-dir {name}, then use {key}={name}"
            errors.append(f"{key}={text} {rule}; {remedy}")
        elif (path := os.path.expanduser(text)) != text and key not in EXPANDED:
            errors.append(f"{key}={text} has a ~ that the shell did not expand; use {key}={path}")
    return [lambda: errors]


def _source_path_errors(values: dict[str, Any], key: str, text: str) -> Iterator[str]:
    """Yield an error if the path of a source is a URL; the hub has names without a scheme."""
    section, _, name = key.rpartition(".")
    format = _value_at(values, f"{section}.format")
    if name != "path" or not URL.match(text):
        return
    hub = re.match(r"(?:hf://datasets/|https?://huggingface.co/datasets/)([\w.-]+/[\w.-]+)", text)
    if hub:
        remedy = f"use {key}={hub[1]} with {section}.format=huggingface"
    elif FILE_URL.match(text):
        remedy = f"use {key}={FILE_URL.sub('', text)}"
    elif format == "huggingface":
        remedy = "use the name of a dataset on the hub, such as HuggingFaceFW/fineweb-edu"
    else:
        remedy = f"download the files and use {key}=PATH"
    yield f"{key}={text} is a URL, which format {format} does not read; {remedy}"


def _value_at(values: Any, key: str) -> Any:
    for name in key.split("."):
        values = values.get(name) if isinstance(values, dict) else None
    return values


def _missing_values(values: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield an error for each key that the user must set."""
    for name, value in values.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict):
            yield from _missing_values(value, f"{key}.")
        elif value == "???":
            yield f"{key} has no value; add {key}=… to the command"
