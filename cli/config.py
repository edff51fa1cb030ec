"""The only gate between what a person typed and what the programs run.

Hydra composes YAML and overrides; here the result becomes plain frozen dataclasses, or one
`ConfigError` that lists every problem at once. Nothing below this file sees a `DictConfig`.
Each section's dataclass and its own rules live in the package that it configures; the rules that
tie sections together are in `training.config_rules`. Imports nothing heavy,
so that `--help` stays fast.
"""

import contextlib
import dataclasses
import difflib
import json
from collections.abc import Callable
from types import UnionType
from typing import Any, Literal, Union, cast, get_args, get_origin

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from data.config import DataConfig, TokenizerConfig
from data.stages import Stages, plan_stages
from evaluation.config import EvaluationConfig, GenerationConfig
from model.config import ModelConfig
from parallel.config import ParallelConfig, PrecisionConfig
from training.config import (
    CheckpointConfig,
    FaultsConfig,
    LogConfig,
    OptimConfig,
    RunConfig,
    TrainConfig,
    ValidationConfig,
    WatchdogConfig,
)
from training.config_rules import (
    convert_errors,
    of_every_stage,
    prepare_errors,
    size_errors,
    stage_errors,
    stream_errors,
    task_number_errors,
)
from training.precision_rules import evaluation_errors, moment_errors


class ConfigError(ValueError):
    """Everything that is wrong with a configuration, one line a problem."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        super().__init__("\n".join(f"  - {problem}" for problem in problems))


@dataclasses.dataclass(frozen=True)
class JobConfig:
    """The whole configuration of `train.py`."""

    run: RunConfig
    model: ModelConfig
    parallel: ParallelConfig
    precision: PrecisionConfig
    data: DataConfig
    tokenizer: TokenizerConfig
    train: TrainConfig
    optim: OptimConfig
    checkpoint: CheckpointConfig
    faults: FaultsConfig
    watchdog: WatchdogConfig
    validation: ValidationConfig
    log: LogConfig

    def stages(self) -> Stages:
        """The stages of the run; `stage_errors` has refused those that do not fit the steps."""
        return plan_stages(
            self.data,
            seq_len=self.train.seq_len,
            global_batch_size=self.train.global_batch_size,
            micro_batch_size=self.train.micro_batch_size,
        )[0]


@dataclasses.dataclass(frozen=True)
class PrepareJobConfig:
    """The whole configuration of `prepare.py`; conf/prepare.yaml explains its own keys."""

    data: DataConfig
    tokenizer: TokenizerConfig
    pack: int | list[int] | None
    verify: bool
    inspect: str | None
    sample: int
    seq_len: int | None
    seed: int | None

    @property
    def lengths(self) -> list[int]:
        """The lengths in `pack`, each once."""
        given = [self.pack] if isinstance(self.pack, int) else self.pack or []
        return sorted(set(given))


@dataclasses.dataclass(frozen=True)
class EvaluateJobConfig:
    """The whole configuration of `evaluate.py`; the rest is the checkpoint's own."""

    evaluation: EvaluationConfig
    tasks: list[str]
    task_folder: str | None
    num_fewshot: int | None
    limit: int | None
    tokenizer_path: str | None
    parallel: ParallelConfig
    precision: PrecisionConfig


@dataclasses.dataclass(frozen=True)
class ConvertJobConfig:
    """The whole configuration of `convert.py`; conf/convert.yaml explains its keys."""

    source: str
    target: str
    format: Literal["native", "hf", "meta"] | None
    dtype: Literal["fp32", "bf16", "fp16"] | None
    parts: int
    file_gb: float
    tokenizer_path: str | None
    overwrite: bool


@dataclasses.dataclass(frozen=True)
class GenerateJobConfig(GenerationConfig):
    """The whole configuration of `generate.py`."""

    parallel: ParallelConfig
    precision: PrecisionConfig


# A rule that ties sections together: the names of the sections, and what finds the problems.
Rule = tuple[tuple[str, ...], Callable[..., list[str]]]


def load_train_config(
    composed: DictConfig, *more_rules: Rule, program: type[JobConfig] = JobConfig
) -> JobConfig:
    """The typed configuration of `train.py`, or of a `program` that has more keys.

    Args:
        composed: What Hydra composed.
        more_rules: Rules beyond those of the configuration alone; one is applied when every
            section that it names is well typed.

    Raises:
        ConfigError: unknown keys, missing values, wrong types and broken rules, all at once.
    """
    rules: list[Rule] = [
        (("train", "data"), stage_errors),
        (
            ("train", "data", "model", "tokenizer"),
            lambda train, data, model, tokenizer: of_every_stage(
                train, data, lambda sizes: size_errors(sizes, model, tokenizer)
            ),
        ),
        (("data", "tokenizer", "validation"), stream_errors),
        (("precision", "optim"), moment_errors),
        *more_rules,
    ]
    return cast(JobConfig, _load(composed, program, rules))


def load_prepare_config(composed: DictConfig) -> PrepareJobConfig:
    """The typed configuration of `prepare.py`; raises as `load_train_config` does."""
    keys = ("pack", "verify", "inspect", "sample", "seq_len", "seed")
    return _load(composed, PrepareJobConfig, [(keys, prepare_errors)])


def load_evaluate_config(composed: DictConfig) -> EvaluateJobConfig:
    """The typed configuration of `evaluate.py`; raises as `load_train_config` does."""
    numbers = ("num_fewshot", "limit")
    rules: list[Rule] = [(("precision",), evaluation_errors), (numbers, task_number_errors)]
    return _load(composed, EvaluateJobConfig, rules)


def load_convert_config(composed: DictConfig) -> ConvertJobConfig:
    """The typed configuration of `convert.py`; raises as `load_train_config` does."""
    keys = ("format", "parts", "file_gb")
    return _load(composed, ConvertJobConfig, [(keys, convert_errors)])


def load_generate_config(composed: DictConfig) -> GenerateJobConfig:
    """The typed configuration of `generate.py`; raises as `load_train_config` does."""
    keys = tuple(field.name for field in dataclasses.fields(GenerationConfig))
    own: Rule = (keys, lambda *values: GenerationConfig(*values).problems())
    return _load(composed, GenerateJobConfig, [own, (("precision",), evaluation_errors)])


def plain(config: Any) -> dict[str, Any]:
    """A configuration as plain dictionaries and lists, ready for YAML or JSON."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def _load(composed: DictConfig, program: Any, rules: list[Rule]) -> Any:
    """Checks keys, types and rules, section by section; raises with all that was found.

    A section is a dataclass with rules of its own, or one plain value whose rules are in `rules`.
    """
    # Imported here: 0.1 s that `--help` need not pay.
    from pydantic import TypeAdapter, ValidationError

    values = cast(dict[str, Any], OmegaConf.to_container(composed, resolve=False))
    if missing := _missing_values(values):
        raise ConfigError(missing + _unknown_keys(values, program, ""))
    try:
        values = cast(dict[str, Any], OmegaConf.to_container(composed, resolve=True))
    except OmegaConfBaseException as error:
        problem = f"{error.full_key}: {str(error).splitlines()[0]}"
        raise ConfigError([problem, *_unknown_keys(values, program, "")]) from None
    problems = _unknown_keys(values, program, "")
    sections: dict[str, Any] = {}
    for field in dataclasses.fields(program):
        given = values.get(field.name)
        adapter = TypeAdapter(cast(Any, field.type))
        try:
            sections[field.name] = adapter.validate_python(given)
        except ValidationError as error:
            errors: dict[str, list[Any]] = {}  # a union has an error for each of its members
            for item in error.errors():
                errors.setdefault(_key(item, given), []).append(item)
            problems += [_type_problem(f"{field.name}{key}", its) for key, its in errors.items()]
            if not dataclasses.is_dataclass(field.type):
                continue
            # The rules of the other keys, with this one's default in its place.
            wrong = {key.split(".")[1] for key in errors if key}
            rest = {
                key: value
                for key, value in (given if isinstance(given, dict) else {}).items()
                if key not in wrong
            }
            with contextlib.suppress(ValidationError):
                problems += [
                    problem
                    for problem in adapter.validate_python(rest).problems()
                    if not any(f"{field.name}.{key}" in problem for key in wrong)
                ]
        else:
            problems += _switches(field.name, given, sections[field.name])
            if dataclasses.is_dataclass(field.type):
                problems += sections[field.name].problems()
    for names, rule in rules:
        if all(name in sections for name in names):
            problems += rule(*(sections[name] for name in names))
    if problems:
        raise ConfigError(problems)
    return program(**sections)


def _missing_values(values: dict[str, Any], prefix: str = "") -> list[str]:
    """Every key whose value a person has to give."""
    found = []
    for key, value in values.items():
        if isinstance(value, dict):
            found += _missing_values(value, f"{prefix}{key}.")
        elif value == "???":
            found.append(f"{prefix}{key} has no value: add {prefix}{key}=… to the command")
    return found


def _key(item: Any, values: Any) -> str:
    """The dotted rest of a key, from pydantic's location without its names of union members."""
    key = ""
    for part in item["loc"]:
        known = part in values if isinstance(values, dict) else isinstance(part, int)
        if known or (item["type"] == "missing" and part == item["loc"][-1]):
            key += f"[{part}]" if isinstance(values, list) else f".{part}"
            try:
                values = values[part] if known else None
            except IndexError:  # too short a list: the place is named, the value is not there
                values = None
    return key


def _type_problem(key: str, items: list[Any]) -> str:
    """One wrong type or missing value, told as key, value, rule and remedy."""
    if items[0]["type"] == "missing" and "[" in key:
        return f"{key} has no value: add it to the list {key.partition('[')[0]}"
    if items[0]["type"] == "missing":
        return f"{key} has no value: add {key}=… to the command"
    rules = " or ".join(item["msg"].removeprefix("Input should be ") for item in items)
    return f"{key} ({items[0]['input']!r}) has the wrong type or choice: it should be {rules}"


def _switches(name: str, given: Any, section: Any) -> list[str]:
    """Every key set to true or false that is no switch: pydantic takes them for 1 and 0."""
    keys = {name: (given, section)}
    if isinstance(given, dict):
        keys = {f"{name}.{key}": (value, getattr(section, key)) for key, value in given.items()}
    elif isinstance(given, list):
        pairs = zip(given, section, strict=True)
        keys = {f"{name}[{place}]": pair for place, pair in enumerate(pairs)}
    return [
        f"{key} ({str(value).lower()}) is not a switch: use a number or a named choice"
        for key, (value, taken) in keys.items()
        if isinstance(value, bool) and not isinstance(taken, bool)
    ]


def _unknown_keys(values: dict[str, Any], schema: Any, prefix: str) -> list[str]:
    """Every key of `values` that the dataclass `schema` lacks, with the likeliest meant one.

    The key is taken out of `values`, so that the types of the others can still be checked.
    """
    fields = {field.name: field.type for field in dataclasses.fields(schema)}
    found = []
    for key in list(values):
        if key not in fields:
            del values[key]
            near = difflib.get_close_matches(str(key), fields, n=1)
            hint = f"did you mean {prefix}{near[0]}?" if near else f"known: {', '.join(fields)}"
            found.append(f"{prefix}{key} is not a key: {hint}")
            continue
        inner, many = _dataclass_of(fields[key])
        if inner is None:
            continue
        children = {"": values[key]}
        if many and isinstance(values[key], dict):
            children = {f".{name}": child for name, child in values[key].items()}
        elif many and isinstance(values[key], list):
            children = {f"[{place}]": child for place, child in enumerate(values[key])}
        for path, child in children.items():
            if isinstance(child, dict):
                found += _unknown_keys(child, inner, f"{prefix}{key}{path}.")
    return found


def _dataclass_of(annotation: Any) -> tuple[Any, bool]:
    """The dataclass in `X`, `dict[str, X]`, `list[X]` or one `| None`, and if there are many."""
    if dataclasses.is_dataclass(annotation):
        return annotation, False
    if get_origin(annotation) in (dict, list):
        return _dataclass_of(get_args(annotation)[-1])[0], True
    if get_origin(annotation) in (UnionType, Union):
        members = (_dataclass_of(member) for member in get_args(annotation))
        return next((found for found in members if found[0] is not None), (None, False))
    return None, False
