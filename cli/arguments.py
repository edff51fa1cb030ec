"""Command-line arguments: preparation for Hydra, and `--help`.

Imports only the standard library, so that `--help` is fast.
"""

import re
import sys
from pathlib import Path
from typing import Any

CONF = Path(__file__).parent.parent / "conf"


KEY = re.compile(r"[A-Za-z_][\w-]*(\.[\w-]+)*", re.ASCII)  # a dotted key or a group


def explicit_keys(arguments: list[str]) -> set[str]:
    """Return the dotted keys and the groups that the command line sets or deletes.

    `model=llama3_8b ++optim.lr=1e-3 ~data.sources.stdlib` gives `model`, `optim.lr` and
    `data.sources.stdlib`. Keys that a group's file sets are not among them.
    """
    keys = (argument.lstrip("+~-").partition("=")[0] for argument in arguments if "=" in argument)
    deleted = (argument[1:] for argument in arguments if argument.startswith("~"))
    return {key for key in (*keys, *deleted) if KEY.fullmatch(key)}


def hydra_arguments(
    arguments: list[str], config_name: str, texts: tuple[str, ...] = ()
) -> list[str]:
    """Return the arguments with every `key=value` as `++key=value`, which admits unknown keys.

    Hydra stops at the first unknown key; this way `cli.config` reports all of them together with
    wrong types and broken rules. Overrides of config groups (`model=llama3_8b`) are unchanged.
    `--help` is printed here because Hydra's own help takes a second.

    Args:
        texts: Keys whose value is literal text unless it is `null`: commas, quotes and brackets
            have no meaning.

    Raises:
        SystemExit: after `--help`, and for `--multirun`, which Fabric's launcher breaks.
    """
    if {"-h", "--help"} & set(arguments):
        print(help_text(config_name))
        sys.exit(0)
    if {"-m", "--multirun", "hydra.mode=MULTIRUN"} & set(arguments):
        sys.exit(
            "--multirun is not supported: every process of a run would launch the sweep again. "
            "Launch one command per value, each with its own run.name, or on SLURM use "
            "python slurm/sweep.py with the same keys."
        )
    rewritten = []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        plain_key = equals and re.fullmatch(r"[\w.-]+", key)
        if plain_key and not key.startswith("hydra.") and not (CONF / key).is_dir():
            if key in texts and value != "null":
                value = quoted(value)
            argument = f"++{key}={value}"
        rewritten.append(argument)
    if config_name in ("train", "plan") and any("run.init_from=" in each for each in arguments):
        from cli.initial_model import initial_model_arguments

        rewritten = initial_model_arguments(arguments) + rewritten
    return [*rewritten, *_other_length(arguments)]


def _other_length(arguments: list[str]) -> list[str]:
    """Return `train.max_tokens=null` if only `train.max_steps` is given.

    Raises:
        SystemExit: Both lengths are given.
    """
    given = dict(argument.partition("=")[::2] for argument in arguments)
    steps, tokens = (given.get(f"train.{key}", "null") for key in ("max_steps", "max_tokens"))
    if steps != "null" and tokens != "null":
        sys.exit(
            f"Invalid configuration:\n  - train.max_steps={steps} and train.max_tokens={tokens} "
            "are both given; use one of them"
        )
    return [] if steps == "null" else ["++train.max_tokens=null"]


def quoted(text: str) -> str:
    """Return the text as a quoted value of Hydra's grammar that OmegaConf does not interpolate."""
    # Backslashes before an escaped character and before the closing quote are doubled.
    text = re.sub(r"(\\*)\$\{", r"\1\1\\${", text)
    text = re.sub(r'(\\*)(")', r"\1\1\\\2", text)
    return '"' + re.sub(r"(\\+)\Z", r"\1\1", text) + '"'


def help_text(config_name: str) -> str:
    """Return the program's configuration file with its comments and the choices of each group."""
    text = (CONF / f"{config_name}.yaml").read_text(encoding="utf-8")
    usage, rest = f"\n{text}".split("\ndefaults:\n")
    keys = rest.split("\nhydra:\n")[0]
    keys = keys.partition("\n\n")[2]
    used = [group for group in sorted(CONF.iterdir()) if f"- {group.name}:" in rest]
    groups = [
        f"  {group.name}={' | '.join(sorted(file.stem for file in group.glob('*.yaml')))}"
        for group in used
    ]
    return "\n".join(
        [
            *(line.removeprefix("#").removeprefix(" ") for line in usage.splitlines()[1:]),
            *(["", "Config groups (files under conf/):", *groups] if groups else []),
            *(["", "Keys and defaults:", ""] if keys else []),
            *(f"  {line}".rstrip() for line in keys.splitlines()),
        ]
    )


def plan_arguments(arguments: list[str]) -> list[str]:
    """Return the arguments of `plan.py` as `hydra_arguments` does; `hardware` may be a file's path.

    Raises:
        SystemExit: after `--help`, and for a hardware that is neither a known name nor a file.
    """
    rewritten: list[str] = []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if key == "hardware" and equals and not (CONF / key / f"{value}.yaml").is_file():
            rewritten += ["~hardware", *_hardware_overrides(value)]
        else:
            rewritten.append(argument)
    return hydra_arguments(rewritten, "plan")


def _hardware_overrides(name: str) -> list[str]:
    from dataclasses import asdict

    from planning.hardware import load_hardware

    try:
        hardware = load_hardware(name)
    except (OSError, ValueError) as error:
        raise SystemExit(f"Invalid configuration: {error}") from None
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
