"""What a person types, made ready for Hydra, and what `--help` answers.

Imports nothing but the standard library, so that `--help` answers at once.
"""

import re
import sys
from pathlib import Path

CONF = Path(__file__).parent.parent / "conf"


def hydra_arguments(
    arguments: list[str], config_name: str, texts: tuple[str, ...] = ()
) -> list[str]:
    """Arguments for Hydra in which every `key=value` may also name an unknown key (`++key=value`).

    Hydra would stop at the first key that it does not know; so the gate (`cli.config`) sees
    them all, together with wrong types and broken rules. Overrides of config groups
    (`model=llama3_8b`) stay as they are. `--help` is answered here: Hydra's own takes a second to
    list its internals.

    Args:
        texts: Keys whose value is text as it stands, but for `null`: commas, quotes and brackets
            mean nothing in it.

    Raises:
        SystemExit: after `--help`; and for a multirun, which self-launched processes cannot share.
    """
    if {"-h", "--help"} & set(arguments):
        print(help_text(config_name))
        sys.exit(0)
    if {"-m", "--multirun", "hydra.mode=MULTIRUN"} & set(arguments):
        sys.exit(
            "--multirun is not supported: every process of a run would start the sweep again. "
            "Start one command for each value, each with its own run.name, or on SLURM "
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
    return rewritten


def quoted(text: str) -> str:
    """The text as a quoted value of Hydra's grammar, which OmegaConf then leaves as it is."""
    # Backslashes count before what they escape, and before the closing quote: there, two for each.
    text = re.sub(r"(\\*)\$\{", r"\1\1\\${", text)
    text = re.sub(r'(\\*)(")', r"\1\1\\\2", text)
    return '"' + re.sub(r"(\\+)\Z", r"\1\1", text) + '"'


def help_text(config_name: str) -> str:
    """The program's own configuration file with its comments, and the choices of every group."""
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
            *(["", "Groups, each a file of keys under conf/:", *groups] if groups else []),
            *(["", "Keys and their defaults:", ""] if keys else []),
            *(f"  {line}".rstrip() for line in keys.splitlines()),
        ]
    )
