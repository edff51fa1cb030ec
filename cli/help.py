"""Text of `--help` and `--version`. Imports only the configuration's schema, which is fast."""

import dataclasses
import re
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import Any, get_args

from cli.arguments import schema_of
from cli.groups import CONF, group_files, groups_of
from training.config_validation import fields_of

SECTIONS = ("model", "data", "tokenizer", "hardware")
"""Groups whose files hold one section of that name; `experiment` sets any key."""


def version_text() -> str:
    """Return the name and version of this installation."""
    project = CONF.parent / "pyproject.toml"
    if project.is_file():  # a checkout, next to which another version may be installed
        found = re.search(r'^version = "(.+)"', project.read_text(encoding="utf-8"), re.MULTILINE)
        return f"llamesh {found[1] if found else 'of unknown version'}"
    try:
        return f"llamesh {version('llamesh')}"
    except PackageNotFoundError:
        return "llamesh of unknown version"


def help_text(program: str) -> str:
    """Return the program's configuration file with its comments, and its groups with their keys."""
    text = (CONF / f"{program}.yaml").read_text(encoding="utf-8")
    usage, rest = f"\n{text}".split("\ndefaults:\n")
    keys = rest.partition("\n\n")[2]
    own = {line.removeprefix("- ").partition(":")[0] for line in map(str.strip, rest.splitlines())}
    groups = {group: file for group, file in groups_of(program).items() if group in own}
    if groups.pop("hardware", None) or program == "plan":  # train.py accepts it for recipes
        groups |= {"hardware": "h100"} if program == "plan" else {}
    choices = [f"  {group}={' | '.join(group_files(group))}" for group in sorted(groups)]
    sections = [
        line
        for group in sorted(groups)
        if group in SECTIONS
        for line in _section(program, group, groups[group])
    ]
    return "\n".join(
        [
            *(line.removeprefix("#").removeprefix(" ") for line in usage.splitlines()[1:]),
            *(["", "Config groups (files under conf/):", *choices] if groups else []),
            *(["", "Keys of the groups:", ""] if sections else []),
            *sections,
            *(["", "Keys and defaults:", ""] if keys else []),
            *(f"  {line}".rstrip() for line in keys.rstrip().splitlines()),
        ]
    )


def _section(program: str, group: str, default_file: str) -> Iterator[str]:
    """Yield the keys of a group's section: values of its default file, else of the dataclass."""
    import yaml

    text = (CONF / group / f"{default_file}.yaml").read_text(encoding="utf-8")
    values = yaml.safe_load(text)
    values = values.get(group, {}) if "@package _global_" in text.partition("\n")[0] else values
    yield f"  {group}:  # values of {group}={default_file}"
    yield from _keys(fields_of(schema_of(program))[group], values, "    ")


def _keys(annotation: Any, values: dict[str, Any], indent: str) -> Iterator[str]:
    for field in _fields(annotation):
        kind = fields_of(annotation)[field.name]
        inner = [each for each in get_args(kind) for each in (each, *get_args(each))]
        named = [each for each in inner if dataclasses.is_dataclass(each)]
        default = None if field.default is dataclasses.MISSING else field.default
        value = values.get(field.name, default)
        if named and isinstance(value, dict) and _has_sections(value):  # sources by name
            yield f"{indent}{field.name}:"
            for name, source in value.items():
                yield f"{indent}  {name}:"
                yield from _keys(named[0], source, f"{indent}    ")
        elif fields_of(kind) and isinstance(value, dict):
            yield f"{indent}{field.name}:"
            yield from _keys(kind, value, f"{indent}  ")
        else:
            yield f"{indent}{field.name}: {_yaml_value(value)}"


def _has_sections(value: dict[str, Any]) -> bool:
    """Return whether all values are dictionaries."""
    return all(isinstance(each, dict) for each in value.values())


def _fields(annotation: Any) -> Any:
    members = [annotation, *get_args(annotation)]
    return dataclasses.fields(next(each for each in members if dataclasses.is_dataclass(each)))


def _yaml_value(value: Any) -> str:
    return (
        "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    )
