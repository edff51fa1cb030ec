"""Command-line arguments: options, keys and groups, and their form for Hydra.

An argument is `key=value`, `group=file`, `~key` or one of the options below. `--key=value` and
`+key=value` are accepted as `key=value`. Values of keys that hold free text (names, paths, prompts)
are literal: characters that mean something to Hydra need no escapes. Everything else is rejected
with the argument as it should be. Imports the configuration's schema only when there are keys.
"""

import os
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cli.groups import CONF, foreign_group_error, group_errors, group_files, groups_of
from cli.malformed_words import KEY, word_errors
from resilience.renamed_keys import CONVERT_KEYS, EVALUATE_KEYS, RENAMED_KEYS
from training.config_validation import ConfigError, field_at, fields_of, takes_text

PROMPTS = ("prompt", "system")  # keys whose values are never interpolated

MULTIRUN = (
    "--multirun is not supported: every process of a run would launch the sweep again. "
    "Launch one command per value, each with its own run.name, or on SLURM use "
    "python slurm/sweep.py with the same keys."
)
USE_CONFIG = "use --cfg job, which prints the composed configuration"
UNSUPPORTED = {  # options of Hydra: the remedy
    **dict.fromkeys(["--info", "-i", "--experimental-rerun"], USE_CONFIG),
    **dict.fromkeys(["--hydra-help"], "use --help"),
    **dict.fromkeys(
        ["--config-path", "-cp"], "use --config-dir DIR, which adds a folder like conf/"
    ),
    **dict.fromkeys(["--shell-completion", "-sc"], "use --help, which lists all keys"),
}


CONFIG_NAME, CONFIG_DIR = "--config-name", "--config-dir"
WITH_VALUE = {  # options: their long form
    **{"-c": "--cfg", "-p": "--package", "-cn": CONFIG_NAME, "-cd": CONFIG_DIR},
    **{name: name for name in ("--cfg", "--package", CONFIG_NAME, CONFIG_DIR)},
}
FLAGS = {
    **{"-h": "help", "--help": "help", "-V": "version", "--version": "version"},
    **{"--resolve": "resolve", "--run": "run", "-r": "run"},  # run: Hydra's default
}


@dataclass
class Options:
    """Parsed command line: options, keys and groups.

    Attributes:
        flags: Values of `FLAGS` that are given.
        values: Values of the long options in `WITH_VALUE`; `--cfg` prints the configuration.
        words: The remaining arguments: keys and groups.
        program: The name of the program.
    """

    program: str
    flags: set[str] = field(default_factory=set)
    values: dict[str, str] = field(default_factory=dict)
    words: list[str] = field(default_factory=list)

    @property
    def config_name(self) -> str:
        """The configuration file to compose, without its suffix."""
        return self.values.get(CONFIG_NAME, self.program).removesuffix(".yaml")

    @property
    def folders(self) -> list[Path]:
        """The folders of configuration files; the first that has a file counts."""
        given = self.values.get(CONFIG_DIR)
        return [CONF, *([Path(given).absolute()] if given else [])]


def parse_options(arguments: Sequence[str], program: str) -> Options:
    """Separate the options from keys and groups.

    Raises:
        ConfigError: An option is not supported, or its value is invalid.
    """
    options = Options(program)
    errors = list(_encoding_errors(arguments))
    if errors:
        raise ConfigError(errors)
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        option, equals, value = word.partition("=")
        if option in ("-m", "--multirun") or word == "hydra.mode=MULTIRUN":
            raise ConfigError([MULTIRUN])
        if option in FLAGS:
            options.flags.add(FLAGS[option])
        elif option in WITH_VALUE:
            omitted = option in ("-c", "--cfg") and rest[:1] not in (["job"], ["all"], ["hydra"])
            if not equals and rest and not omitted:
                value = rest.pop(0)
            options.values[WITH_VALUE[option]] = value
        elif option in UNSUPPORTED:
            errors.append(f"{option} is not supported; {UNSUPPORTED[option]}")
        else:
            options.words.append(word)
    errors += _option_errors(options)
    if errors:
        raise ConfigError(errors)
    return options


def _encoding_errors(arguments: Sequence[str]) -> Iterator[str]:
    """Yield an error for each argument that cannot be printed and saved as UTF-8."""
    for word in arguments:
        if not any("\udc80" <= char <= "\udcff" for char in word):  # bytes that are not decoded
            continue
        raw, encoding = os.fsencode(word), sys.getfilesystemencoding()
        try:
            yield f"{raw.decode()} is not {encoding}, as the locale; run: export PYTHONUTF8=1"
        except UnicodeDecodeError:
            yield f"{raw.decode(errors='backslashreplace')} is not UTF-8; use another name"


def _option_errors(options: Options) -> Iterator[str]:
    values, name, folders = options.values, options.config_name, options.folders
    for option, value in values.items():
        if option != "--cfg" and not value:
            yield f"{option} has no value; use {option}=VALUE"
    if values.get("--cfg", "job") not in ("", "job"):
        yield f"--cfg={values['--cfg']} is not supported; use --cfg job"
    if "--cfg" not in values and ("resolve" in options.flags or "--package" in values):
        yield "--resolve and --package apply to --cfg job; add it, or remove them"
    if values.get(CONFIG_DIR) and not folders[-1].is_dir():
        yield (
            f"{CONFIG_DIR}={values[CONFIG_DIR]} is not a folder; use one with files like those in "
            f"{CONF}"
        )
    elif name and name not in (
        known := [options.program, *(path.stem for path in own_files(folders))]
    ):
        remedy = f"use one of {', '.join(known)}"
        if name in group_files("experiment", folders):
            remedy = f"use experiment={name}"
        rule = f"is not a configuration of {options.program}.py"
        yield f"{CONFIG_NAME}={name} {rule}; {remedy}"


def own_files(folders: Sequence[Path]) -> list[Path]:
    """Return the configuration files in the folders that the user has added to conf/."""
    return sorted(path for folder in folders[1:] for path in folder.glob("*.yaml"))


def explicit_keys(arguments: Sequence[str]) -> set[str]:
    """Return the dotted keys and the groups that the command line sets or deletes.

    `model=llama3_8b ++optim.lr=1e-3 ~data.sources.stdlib` gives `model`, `optim.lr` and
    `data.sources.stdlib`. Keys that a group's file sets are not among them.
    """
    keys = (argument.lstrip("+~-").partition("=")[0] for argument in arguments if "=" in argument)
    deleted = (argument[1:] for argument in arguments if argument.startswith("~"))
    return {key for key in (*keys, *deleted) if KEY.fullmatch(key)}


def typed_files(options: Options, group: str) -> list[str]:
    """Return the names of the group's files that the command line selects."""
    values = [
        value
        for word in options.words
        for name, _, value in [word.partition("=")]
        if name.lstrip("-+") == group
    ]
    return [name.strip() for value in values[-1:] for name in value.strip("[]").split(",")]


# ---------------------------------------------------------------- keys and groups


def hydra_arguments(
    arguments: Sequence[str], program: str, folders: Sequence[Path] = (CONF,)
) -> list[str]:
    """Return keys and groups as overrides for Hydra.

    A `key=value` becomes `++key=value`, which admits unknown keys: Hydra stops at the first one,
    and `cli.config` reports all of them together with wrong types and broken rules.

    Args:
        folders: Folders of configuration files.

    Raises:
        ConfigError: Arguments that are not `key=value`, and groups without such a file.
    """
    schema = schema_of(program)
    groups = groups_of(program)
    if any(word.startswith("train.max_tokens=") for word in arguments):  # replaces the steps
        arguments = [word for word in arguments if word != "train.max_steps=null"]
    overrides: list[str] = []
    errors: list[str] = []
    for word in arguments:
        name, equals, value = word.partition("=")
        key = name.lstrip("-") if equals else name
        key = key.lstrip("+~")
        if not KEY.fullmatch(key) or not (equals or name.startswith("~")):
            continue
        if key.partition(".")[0] == "hydra":
            errors.append(f"{key} configures Hydra and has no effect here; {_hydra_remedy(key)}")
        elif name.startswith("~"):
            overrides.append(word)
        elif key in groups:
            errors += group_errors(key, value, folders)
            if value != "null":  # the default of groups without a file, which Hydra rejects
                overrides.append(f"{key}={value}")
        elif any((folder / key).is_dir() for folder in folders) and field_at(schema, key) is None:
            errors.append(foreign_group_error(key, value, program, list(groups)))
        else:
            try:
                overrides.append(f"++{key}={_override_value(schema, key, value)}")
            except ConfigError as error:
                errors += error.errors
    errors = [*word_errors(arguments, program, schema, folders), *errors]
    if errors:
        raise ConfigError(errors)
    if program in ("train", "plan"):
        overrides += _other_length(arguments)
        if any("run.init_from=" in each for each in arguments):
            from cli.initial_model import initial_model_arguments

            overrides = initial_model_arguments(arguments, folders) + overrides
    return overrides


def schema_of(program: str) -> Any:
    """Return the root dataclass of a program's configuration."""
    if program == "plan":
        from planning.config import PlanJobConfig

        return PlanJobConfig
    if program == "prepare":
        from data.config import PrepareJobConfig

        return PrepareJobConfig
    if program == "convert":
        from formats.config import ConvertJobConfig

        return ConvertJobConfig
    if program in ("evaluate", "generate"):
        import evaluation.config as configs

        return configs.EvaluateJobConfig if program == "evaluate" else configs.GenerateJobConfig
    from training.config import JobConfig

    return JobConfig


def _other_length(arguments: Sequence[str]) -> list[str]:
    """Return `train.max_tokens=null` if only `train.max_steps` is given.

    Raises:
        ConfigError: Both lengths are given.
    """
    given = dict(argument.lstrip("+-").partition("=")[::2] for argument in arguments)
    steps, tokens = (given.get(f"train.{key}", "null") for key in ("max_steps", "max_tokens"))
    if steps != "null" and tokens != "null":
        both = f"train.max_steps={steps} and train.max_tokens={tokens}"
        raise ConfigError([f"{both} are both given; omit one of them"])
    return [] if steps == "null" else ["++train.max_tokens=null"]


def _hydra_remedy(key: str) -> str:
    if key.startswith(("hydra.run", "hydra.sweep", "hydra.output")):
        return "use run.dir"
    if key.startswith("hydra.searchpath"):
        return "use --config-dir DIR"
    return "remove it"


def _override_value(schema: Any, key: str, value: str) -> str:
    """Return a value in Hydra's grammar.

    Raises:
        ConfigError: Several values, for a key that takes one.
    """
    renamed = {**RENAMED_KEYS, **EVALUATE_KEYS, **CONVERT_KEYS}
    text = takes_text(schema, key) or takes_text(schema, renamed.get(key, key))
    last = key.rpartition(".")[2]
    # `null` can be a name or a prompt, but hardly a path.
    if text and (value != "null" or (text == "required" and last in ("name", *PROMPTS))):
        return quoted(value, () if last in PROMPTS else tuple(fields_of(schema)))
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        parsed = OverridesParser.create().parse_override(f"{key}={value}")
    except HydraException:
        return quoted(value)  # validation reports the key with its type
    if not parsed.is_sweep_override():
        return value
    if "list" in str(field_at(schema, key)) or "tuple" in str(field_at(schema, key)):
        raise ConfigError([f"{key}={value} is not a list; use {shlex.quote(f'{key}=[{value}]')}"])
    raise ConfigError(
        [
            f"{key}={value} lists several values, but a run has one; launch one command per value, "
            "each with its own run.name, or on SLURM use python slurm/sweep.py with the same keys"
        ]
    )


def quoted(text: str, sections: Sequence[str] = ()) -> str:
    """Return the text as a quoted value of Hydra's grammar.

    Args:
        sections: If given, `${section.key}` and `${oc.env:NAME}` remain interpolations; every other
            `${` is literal.
    """
    kept = rf"(?!oc\.env:[^}}]*\}}|(?:{'|'.join(sections)})(?:\.\w+)*\}})" if sections else ""
    # Backslashes before an escaped character and before the closing quote are doubled.
    text = re.sub(r"(\\*)\$\{" + kept, r"\1\1\\${", text)
    text = re.sub(r'(\\*)(")', r"\1\1\\\2", text)
    return '"' + re.sub(r"(\\+)\Z", r"\1\1", text) + '"'


# ---------------------------------------------------------------- plan.py


def plan_arguments(arguments: Sequence[str], folders: Sequence[Path] = (CONF,)) -> list[str]:
    """Return the arguments of `plan.py` as `hydra_arguments` does; `hardware` may be a file's path.

    Raises:
        ConfigError: as `hydra_arguments`, and for a hardware that is neither a name nor a file.
    """
    words: list[str] = []
    hardware: list[str] = []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if (
            key.lstrip("-+") == "hardware"
            and equals
            and value not in group_files("hardware", folders)
        ):
            words.append("~hardware")
            hardware = _hardware_overrides(value)
        else:
            words.append(argument)
    return [*hardware, *hydra_arguments(words, "plan", folders)]


def _hardware_overrides(name: str) -> list[str]:
    from planning.hardware import load_hardware

    try:
        hardware = load_hardware(name)
    except ConfigError:
        raise
    except (OSError, ValueError) as error:
        raise ConfigError([str(error)]) from None
    return [f"++hardware.{key}={hydra_value(one)}" for key, one in asdict(hardware).items()]


def hydra_value(value: Any) -> str:
    """Return a YAML value in Hydra's grammar."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{hydra_value(one)}" for key, one in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(hydra_value, value)) + "]"
    if isinstance(value, str):
        return quoted(value)
    return "null" if value is None else str(value).lower()
