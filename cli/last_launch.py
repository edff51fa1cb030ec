"""Resume a run with the configuration of its last launch.

`python train.py run.dir=runs/NAME` uses the run's `config.yaml`. Command-line arguments have
precedence: `key=value`, and the keys that the file of a typed `experiment=` sets. Composed defaults
never replace a value of the run. Whether a typed value may change is checked in `training`.
"""

import copy
import re
from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from cli.arguments import Options, explicit_keys, typed_files
from cli.groups import groups_of
from resilience.processes import is_first_process
from resilience.run_folder import RunFolder
from training.config import JobConfig
from training.config_validation import ConfigError, fields_of
from training.key_suggestions import alternatives
from training.resume_policy import policy_of
from training.run_folder_check import check_path

if TYPE_CHECKING:
    from omegaconf import DictConfig

MAX_SHOWN = 6
NEW_RUN = "or a new run with the default configuration, add model=llama3_tiny"
OF_THIS_LAUNCH = ("run.dir", "run.allow_changes", "run.adopt")  # never taken from the last one
RECORDS = ("parallel.auto_record",)  # set by the program
GROUPS = ("model", "data", "tokenizer")
MESH = tuple(
    f"parallel.{name}"
    for name in (
        *("dp_replicate", "pp", "dp_shard", "cp", "tp"),
        *("pp_parts", "pp_layers", "pp_checkpoint"),
        *("devices", "num_nodes", "accelerator"),
    )
)
"""Devices and mesh. If one of these keys is typed, all come from this launch."""


def register_resolvers() -> None:
    """Register the interpolations of conf/ that are functions."""
    from omegaconf import OmegaConf

    OmegaConf.register_new_resolver("scratch_or_continued", _scratch_or_continued, replace=True)


def _scratch_or_continued(scratch: Any, continued: Any, *, _root_: "DictConfig") -> Any:
    """Return the value for a run from scratch, or for one that starts from `run.init_from`."""
    from omegaconf import OmegaConf

    return scratch if OmegaConf.select(_root_, "run.init_from") is None else continued


def resolve_recipe(composed: "DictConfig") -> None:
    """Replace values of `scratch_or_continued` by the one that applies, in place."""
    from omegaconf import OmegaConf

    values: Any = OmegaConf.to_container(composed, resolve=False)
    for key in _leaves(values):
        if "${scratch_or_continued:" in str(_get(values, key)):
            OmegaConf.update(composed, key, OmegaConf.select(composed, key))


def with_last_launch(composed: "DictConfig", options: Options) -> "DictConfig":
    """Return the configuration of a launch in the composed `run.dir`.

    Without an earlier launch in that folder, it is the composed one. So is it if that launch has
    left no checkpoint and the command selects groups, or the folder only by default.

    Raises:
        ConfigError: Only `run.dir` is typed, and there is no earlier launch.
        ConfigError: A typed group differs from the one of the run.
        RunFolderError: The configuration of the run is damaged.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        folder = RunFolder(Path(str(composed.run.dir)))
    except OmegaConfBaseException:  # reported by validation
        return composed
    explicit = typed_keys(options)
    branch = None
    if "run.branch" in explicit and composed.run.branch is not None:
        from cli.branch import open_branch

        if composed.run.resume == "auto":
            explicit.discard("run.resume")  # the default
        folder, branch = open_branch(str(composed.run.branch), folder, explicit)
    source = branch.source if branch else folder
    last = branch.config if branch else folder.last_config()
    if not last:
        _check_has_run(str(composed.run.dir), explicit)
        return composed
    now = cast(dict[str, Any], OmegaConf.to_container(composed, resolve=False))
    if branch or source.committed_steps():
        errors = list(_group_errors(now, last, explicit, options, source))
        if errors:
            raise ConfigError(errors)
    elif "run.dir" not in explicit or explicit & {*GROUPS, "experiment"}:
        return composed  # a complete command: the launch without a checkpoint may have failed
    merged = merge(now, last, explicit)
    merged["run"]["dir"] = _literal(str(folder.path))
    if folder.committed_steps():  # which replace the checkpoint that the run started from
        merged["run"]["resume"] = now["run"]["resume"]
    if branch:
        branch.set_decay(merged, explicit)
    merged = {**now, **merged}  # keys of plan.py, and unknown ones, which validation reports
    result = OmegaConf.create(merged)
    _print_kept(composed, result, folder)
    return result


def _check_has_run(text: str, explicit: set[str]) -> None:
    """Reject a folder without a run if `run.dir` is the only key: the command should resume one.

    Raises:
        ConfigError: The folder has no earlier launch.
        RunFolderError: The path is a file or a checkpoint.
    """
    # Validation reports an empty text, a tilde and a URL.
    if explicit != {"run.dir"} or re.match(r"\s*$|~|[A-Za-z][\w+.-]+:/", text):
        return
    path = Path(text)
    check_path(path)
    siblings = [each.parent.name for each in path.parent.glob("*/config.yaml")]
    near = get_close_matches(path.name, siblings, n=1, cutoff=0.7)
    runs = [f"run.dir={path.parent / name}" for name in near]
    remedy = f"did you mean {alternatives(runs)}? F" if runs else "f"
    rule = (
        "has no run to resume" if path.exists() else "does not exist, so there is no run to resume"
    )
    raise ConfigError([f"run.dir={path} {rule}; {remedy}{NEW_RUN}"])


def typed_keys(options: Options) -> set[str]:
    """Return the keys and groups that the command line sets, also through `experiment=`.

    These are the keys of the experiment's own file and the groups that it selects.
    """
    keys = explicit_keys(options.words)
    for name in typed_files(options, "experiment"):
        content = _file_content("experiment", name, options)
        defaults = content.pop("defaults", None)
        keys |= {
            str(group).rpartition("/")[2]
            for each in (defaults if isinstance(defaults, list) else [])
            if isinstance(each, dict)
            for group in each
        }
        keys |= set(_leaves(content))
    return keys


def merge(now: dict[str, Any], last: dict[str, Any], explicit: set[str]) -> dict[str, Any]:
    """Return the last launch's values with the explicit ones of this launch.

    Args:
        now: The composed configuration, with its interpolations.
        last: The resolved configuration of the last launch.
        explicit: Typed keys; one that `now` lacks was deleted.
    """
    merged = _known(_literal(last), now, JobConfig)
    for key, text in interpolations(now):
        # `optim.schedule_steps=${train.max_steps}` follows a typed max_steps if it did so before.
        if _get(last, key) == _resolved(text, last):
            _set(merged, key, text)
    if explicit.intersection(MESH):
        explicit = explicit.union(MESH)
    if "train.max_steps" in explicit:  # replaces the length in tokens
        explicit = explicit | {"train.max_tokens"}
    run = merged["run"]
    if run.get("resume") == "never":
        run["resume"] = "auto"
    for key in sorted({*explicit, *OF_THIS_LAUNCH} - {*GROUPS, "experiment"}):
        value = _get(now, key)
        if value is MISSING:
            _delete(merged, key)
        else:
            _set(merged, key, copy.deepcopy(value))
    return merged


# ---------------------------------------------------------------- typed groups


def _group_errors(
    now: dict[str, Any],
    last: dict[str, Any],
    explicit: set[str],
    options: Options,
    folder: RunFolder,
) -> Iterator[str]:
    """Yield an error for each typed group that is not the one of the run."""
    for group in GROUPS:
        if group not in explicit:
            continue
        name = next(iter(typed_files(options, group)), None)
        word = f"{group}={name}"
        if name is None:  # selected by the file of an experiment
            experiment, name = _selecting_experiment(group, options)
            word = f"experiment={experiment}"
        content = _file_content(group, name, options)
        section = content.get(group, {}) if "run" not in content and group in content else content
        different = []
        for inner in _leaves(section):
            key = f"{group}.{inner}"
            here, there = _get(now, key), _get(last, key)
            if key in explicit or here == "???" or (isinstance(here, str) and "${" in here):
                continue
            if group == "tokenizer" and _is_of_file(inner, last, options):
                continue
            policy = policy_of(key)
            decides = policy is not None and policy.change == "forbidden"
            if here != there and (decides or inner == "name"):
                there = "unset" if there is MISSING else there
                different.append(f"{key} is {there} in the run and {here} in the file")
        if different:
            there = (last.get(group) or {}).get("name")
            yield (
                f"{word} is not the {group} of the run in {folder.path} ({there}): "
                f"{'; '.join(different[:3])}. Omit {word.partition('=')[0]}= to resume the run, or "
                "use another run.dir"
            )


def _is_of_file(name: str, last: dict[str, Any], options: Options) -> bool:
    """Return whether a tokenizer file gave a run this key of its tokenizer, not the group.

    The file is that of `tokenizer.path` or of `run.init_from`. It has precedence over a group that
    only `experiment=` selects; a typed `tokenizer=` must have its name.
    """
    typed = explicit_keys(options.words)
    path, init_from = _get(last, "tokenizer.path"), _get(last, "run.init_from")
    if "tokenizer" in typed:
        has_path = path not in (None, MISSING) or "tokenizer.path" in typed
        return has_path and name == "vocab_size"
    return path not in (None, MISSING) or init_from not in (None, MISSING)


def _selecting_experiment(group: str, options: Options) -> tuple[str, str]:
    """Return the typed experiment whose file selects the group, and the name it selects."""
    for experiment in typed_files(options, "experiment"):
        for each in _file_content("experiment", experiment, options).get("defaults") or []:
            for key, name in each.items() if isinstance(each, dict) else ():
                if str(key).rpartition("/")[2] == group:
                    return experiment, str(name)
    return "", groups_of("train")[group]


def _file_content(group: str, name: str, options: Options) -> dict[str, Any]:
    import yaml

    paths = [folder / group / f"{name}.yaml" for folder in options.folders]
    path = next((path for path in paths if path.is_file()), None)
    content = yaml.safe_load(path.read_text(encoding="utf-8")) if path else None
    return content if isinstance(content, dict) else {}


# ---------------------------------------------------------------- nested dictionaries

MISSING: Any = object()


def _known(last: Any, now: Any, schema: Any) -> Any:
    """Return the last values without keys that this version lacks, and with those it requires.

    A key that an older version did not have takes its default from the dataclass.
    """
    fields = fields_of(schema)
    if not fields or not isinstance(last, dict):
        return last
    known = {name: value for name, value in last.items() if name in fields}
    for name, annotation in fields.items():
        composed = now.get(name, MISSING) if isinstance(now, dict) else MISSING
        if name in known:
            known[name] = _known(known[name], composed, annotation)
        elif fields_of(annotation) and composed is not MISSING and schema is JobConfig:
            known[name] = _known({}, composed, annotation)
        elif composed is not MISSING and not _has_default(schema, name):
            known[name] = composed
    return known


def _has_default(schema: Any, name: str) -> bool:
    import dataclasses
    from typing import get_args

    owners = [each for each in (schema, *get_args(schema)) if dataclasses.is_dataclass(each)]
    field = next(each for each in dataclasses.fields(owners[0]) if each.name == name)
    missing = dataclasses.MISSING
    return field.default is not missing or field.default_factory is not missing


def _leaves(values: Any, prefix: str = "") -> Iterator[str]:
    for name, value in values.items() if isinstance(values, dict) else ():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def interpolations(values: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the keys whose values refer to other keys, with the unresolved text."""
    for key in _leaves(values):
        value = _get(values, key)
        # A function's value, such as that of a recipe, is a default: the run's own value counts.
        if isinstance(value, str) and re.search(r"(?<!\\)\$\{[\w.]+\}", value):
            yield key, value


def _resolved(text: str, values: dict[str, Any]) -> Any:
    """Return an interpolation's value among resolved values, or MISSING."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        return OmegaConf.create({**_literal(values), "resolved": text})["resolved"]
    except OmegaConfBaseException:
        return MISSING


def _literal(value: Any) -> Any:
    """Return resolved values so that OmegaConf does not read a `${` in them as an interpolation."""
    if isinstance(value, dict):
        return {key: _literal(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_literal(inner) for inner in value]
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value


def _get(values: Any, key: str) -> Any:
    for name in key.split("."):
        if not isinstance(values, dict) or name not in values:
            return MISSING
        values = values[name]
    return values


def _set(values: dict[str, Any], key: str, value: Any) -> None:
    *sections, last = key.split(".")
    for name in sections:
        if not isinstance(values.get(name), dict):
            values[name] = {}
        values = values[name]
    values[last] = value


def _delete(values: Any, key: str) -> None:
    section, _, last = key.rpartition(".")
    values = _get(values, section) if section else values
    if isinstance(values, dict):
        values.pop(last, None)


def _print_kept(composed: "DictConfig", result: "DictConfig", folder: RunFolder) -> None:
    """Print which values are kept from the last launch instead of the composed ones."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    if not is_first_process():
        return
    try:
        before: Any = OmegaConf.to_container(composed, resolve=True)
        after: Any = OmegaConf.to_container(result, resolve=True)
    except OmegaConfBaseException:  # reported by validation
        return
    kept = [
        f"{key}={'null' if _get(after, key) is None else _get(after, key)}"
        for key in _leaves(after)
        if _get(before, key) not in (_get(after, key), MISSING) and key not in RECORDS
    ]
    if kept:
        # Without a checkpoint, a value that made the launch fail must be among those shown.
        shown = kept[:MAX_SHOWN] if folder.committed_steps() else kept
        more = f" and {len(kept) - len(shown)} more" if len(kept) > len(shown) else ""
        print(
            f"{folder.path} keeps the configuration of its last launch: {', '.join(shown)}{more}",
            flush=True,
        )
