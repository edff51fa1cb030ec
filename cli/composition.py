"""Compose the configuration of a program from conf/ and its command-line arguments.

Uses Hydra's compose API, because its own command line prints traces and its errors name neither
file nor line. Errors of Hydra, OmegaConf and YAML become a `ConfigError`. Hydra is imported when
there is something to compose, so that `--help` is fast.
"""

import copy
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cli.arguments import (
    PROMPTS,
    Options,
    explicit_keys,
    hydra_arguments,
    parse_options,
    plan_arguments,
    schema_of,
    typed_files,
)
from cli.last_launch import register_resolvers, resolve_recipe, with_last_launch
from data.errors import DataError
from resilience.config import preflight_seconds
from resilience.exit_codes import ExitCode
from resilience.exit_timer import exit_if_late
from resilience.slurm import host_name
from resilience.standard_streams import print_result
from training.config_validation import ConfigError, field_at, fields_of, shown, takes_text
from training.tokenizer_choice import DEFAULT_FOLDER, tokenizer_overrides

if TYPE_CHECKING:
    from omegaconf import DictConfig

MAX_NAME_BYTES = 255
"""Longest name of a file or folder on Linux (NAME_MAX)."""


def compose_config(program: str, arguments: Sequence[str]) -> "DictConfig":
    """Return the composed configuration of a program, before validation.

    Raises:
        ConfigError: Arguments or files of the configuration cannot be composed.
        SystemExit: After `--help`, `--version` and `--cfg job`, which print and stop.
    """
    options = parse_options(arguments, program)
    if options.flags & {"help", "version"}:
        from cli.help import help_text, version_text

        print_and_exit(help_text(program) if "help" in options.flags else version_text())
    if errors := list(_long_name_errors(options)):
        raise ConfigError(errors)
    composed = compose_words(options)
    if "--cfg" in options.values:
        try:
            composed = with_tokenizer(composed, options.words)
        except DataError as error:
            raise ConfigError([str(error)]) from None
        print_and_exit(_as_yaml(composed, options))
    typed = explicit_keys(options.words)
    if program == "train" or (program == "plan" and typed & {"run.dir", "run.name", "run.branch"}):
        with _exit_if_late(composed):
            composed = with_last_launch(composed, options)
    return composed


def _exit_if_late(composed: "DictConfig") -> AbstractContextManager[None]:
    """Return a context that exits if the run folder does not answer in time."""
    from omegaconf import OmegaConf

    folder, limit = (
        OmegaConf.select(composed, key, throw_on_resolution_failure=False)
        for key in ("run.dir", "watchdog.setup_seconds")
    )
    activity = f"reading run.dir={folder} on {host_name()}"
    return exit_if_late(activity, preflight_seconds(limit), ExitCode.RANK_FAILED_BEFORE_SAVE)


def _long_name_errors(options: Options) -> Iterator[str]:
    """Yield an error for each typed path with a name that no file system admits."""
    schema = schema_of(options.program)
    for word in options.words:
        key, _, value = word.lstrip("+-").partition("=")
        is_path = takes_text(schema, key) and key.rpartition(".")[2] not in PROMPTS
        longest = max(value.split("/"), key=lambda name: len(name.encode()))
        if (is_path or key == "hardware") and (size := len(longest.encode())) > MAX_NAME_BYTES:
            yield (
                f"{key}={longest[:20]}… has a name of {size} bytes; use names of at most "
                f"{MAX_NAME_BYTES} bytes"
            )


def compose_words(options: Options) -> "DictConfig":
    """Return the configuration that a program's keys and groups compose.

    Raises:
        ConfigError: as `compose_config`.
    """
    if options.program == "plan":
        overrides = plan_arguments(options.words, options.folders)
    else:
        overrides = hydra_arguments(options.words, options.program, options.folders)
    from hydra import compose, initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    if errors := list(_experiment_errors(options)):
        raise ConfigError(errors)
    register_resolvers()
    folders = [str(folder) for folder in options.folders]
    search = [f'hydra.searchpath=["file://{folder}"]' for folder in folders[1:]]
    try:
        with initialize_config_dir(folders[0], version_base="1.3"):
            composed = compose(options.config_name, [*overrides, *search])
            errors = list(_section_errors(composed, options.program))
            if not errors:
                resolve_recipe(composed)
    except YAMLError as error:
        raise ConfigError([_yaml_error(error)]) from None
    except (HydraException, OmegaConfBaseException, OSError, ValueError, AssertionError) as error:
        raise ConfigError([_composition_error(error, options)]) from None
    if errors:
        raise ConfigError(errors)
    return composed


def with_tokenizer(composed: "DictConfig", arguments: Sequence[str]) -> "DictConfig":
    """Return the configuration with the tokenizer of `run.init_from` or `tokenizer.path`.

    Args:
        arguments: The command line, whose keys have precedence.

    Raises:
        DataError: The tokenizer cannot be read, or differs from the explicit keys.
    """
    from omegaconf import OmegaConf

    values: Any = OmegaConf.to_container(composed, resolve=False)
    if not isinstance(tokenizer := values.get("tokenizer"), dict):
        return composed
    init_from, run_dir = (OmegaConf.select(composed, key) for key in ("run.init_from", "run.dir"))
    overrides = tokenizer_overrides(tokenizer, explicit_keys(arguments), init_from, run_dir)
    if values.get("data", {}).get("folder") != DEFAULT_FOLDER:
        overrides.pop("data.folder", None)
    composed = copy.deepcopy(composed)
    for key, value in overrides.items():
        OmegaConf.update(composed, key, value, force_add=True)
    return composed


def _section_errors(composed: "DictConfig", program: str) -> Iterator[str]:
    """Yield an error for each section that has a value instead of keys."""
    from omegaconf import OmegaConf

    values: Any = OmegaConf.to_container(composed, resolve=False)
    for name, annotation in fields_of(schema_of(program)).items():
        keys = fields_of(annotation)
        if keys and not isinstance(value := values.get(name, {}), dict):
            inner = ", ".join(f"{name}.{key}" for key in keys)
            yield f"{name}={shown(value)} is not a section; set its keys: {inner}"


def interpolation_error(error: Any) -> str:
    """Return an error of OmegaConf about a `${…}` as key, rule and remedy."""
    text = str(error).splitlines()[0]
    if missing := re.search(r"Interpolation key '([^']*)' not found", text):
        rule = f"refers to {missing[1]}, which is not a key"
        return f"{error.full_key} {rule}; use a value, or a key of --cfg job"
    if missing := re.search(r"Environment variable '([^']*)' not found", text):
        rule = f"refers to the environment variable {missing[1]}, which is not set"
        return f"{error.full_key} {rule}; use a value, or run: export {missing[1]}=…"
    return f"{error.full_key} has a ${{…}} that cannot be resolved ({text}); use a value"


def print_and_exit(text: str) -> None:
    """Print the text and exit with code 0, also if the reader of a pipe stops early.

    Raises:
        SystemExit: always, except for
        OSError: Standard output cannot be written.
    """
    with suppress(BrokenPipeError):
        print_result(text)
    sys.exit(0)


def _as_yaml(composed: "DictConfig", options: Options) -> str:
    """Return the configuration, or the section of it that `--package` names, as YAML.

    Raises:
        ConfigError: An interpolation cannot be resolved, or there is no such section.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    package = options.values.get("--package", "")
    part = OmegaConf.select(composed, package) if package else composed
    if not OmegaConf.is_config(part):
        known = ", ".join(map(str, composed))
        raise ConfigError([f"--package={package} is not a section; use one of {known}"])
    try:
        text = OmegaConf.to_yaml(part, resolve="resolve" in options.flags)
    except OmegaConfBaseException as error:
        raise ConfigError([interpolation_error(error)]) from None
    header = f"# @package {package}\n" if package else ""
    return f"{header}{text}".removesuffix("\n")


def _experiment_errors(options: Options) -> Iterator[str]:
    """Yield an error for each typed experiment that would set no key of the program."""
    for name in typed_files(options, "experiment"):
        path = _file(f"experiment/{name}", options)
        text = path.read_bytes().decode("utf-8", "replace") if path else ""
        if path and not re.search(r"^\s*#\s*@package\s+_global_", text, re.MULTILINE):
            yield (
                f"{_shown(str(path))} lacks '# @package _global_', without which its keys are in a "
                "section `experiment`; make that its first line"
            )
        elif path and re.match(r"(\s|#.*\n)*(-\s|[^\s:#]+(\s|$))", text):
            yield f"{_shown(str(path))} is not a mapping; write keys as `train:` and `  key: value`"


def _yaml_error(error: Any) -> str:
    """Return a YAML error with its file and line."""
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    problem = getattr(error, "problem", None) or " ".join(str(error).split())
    where = f"{_shown(mark.name)}, line {mark.line + 1}" if mark else "a configuration file"
    return f"{where}: {problem}; correct the YAML"


def _composition_error(error: BaseException, options: Options) -> str:
    """Return an error of the composition in one line, with the file and the line that caused it."""
    text = " ".join(str(error if str(error) else error.__cause__).split())
    if deleted := re.match(r"Could not delete from config. '([^']+)' does not exist", text):
        return f"~{deleted[1]} deletes a key that is not set; remove this argument"
    if merged := re.match(r"Error merging override \+*([\w.]+)=(.*)", text):  # a list
        known = fields_of(field_at(schema_of(options.program), merged[1]))
        inner = ", ".join(f"{merged[1]}.{key}" for key in known)
        return f"{merged[1]}={merged[2]} is not a section; set its keys: {inner}"
    if isinstance(error, UnicodeDecodeError):
        files = [path for folder in options.folders for path in folder.rglob("*.yaml")]
        damaged = [path for path in files if "\ufffd" in path.read_bytes().decode(errors="replace")]
        names = ", ".join(_shown(str(path)) for path in damaged)
        return f"{names} is not UTF-8 text ({text}); save it as UTF-8"
    within = re.search(r"(?:^In|Invalid defaults list in) '([^']+)'[:,]? ?", text)
    if not within:
        return text or type(error).__name__
    message = text[within.end() :]
    message = re.split(r" ?(?:Config search path:|Available options in)", message)[0]
    path = _file(within[1], options)
    missing = re.search(r"'([^']+)'", message)
    if path is None:
        return f"conf/{within[1]}.yaml: {message}"
    last = missing[1].rpartition("/")[2] if missing else ""
    experiments = (
        _file(f"experiment/{name}", options) for name in typed_files(options, "experiment")
    )
    for candidate in (path, *filter(None, experiments)):  # an override is reported for its target
        lines = candidate.read_text(encoding="utf-8", errors="replace").splitlines()
        found = [number for number, each in enumerate(lines, 1) if last and last in each]
        if found:
            return f"{_shown(str(candidate))}, line {found[0]}: {message}"
    return f"{_shown(str(path))}: {message}"


def _file(config: str, options: Options) -> Path | None:
    paths = [folder / f"{config}.yaml" for folder in options.folders]
    return next((path for path in paths if path.is_file()), None)


def _shown(path: str) -> str:
    """Return a path relative to the working directory if it is below it."""
    relative = os.path.relpath(path)
    return path if relative.startswith("..") else relative
