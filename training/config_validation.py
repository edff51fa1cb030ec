"""Validation of configurations: plain values become frozen dataclasses, or one `ConfigError`.

Types, bounds, choices and unknown keys are checked by pydantic as the dataclasses declare them;
rules that tie sections together are functions whose parameters name those sections. All errors are
reported together, each with key, value, rule and remedy. Has no knowledge of Hydra.
"""

import copy
import dataclasses
import difflib
import inspect
import json
import re
from collections.abc import Callable, Iterator, Sequence
from types import UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin, get_type_hints

Rule = Callable[..., list[str]]
"""Return error messages; each parameter is named for a section of the configuration."""

Config = TypeVar("Config")

NOT_A_NUMBER = "is not a number; use a number or a named choice"
UNKNOWN = "unexpected_keyword_argument"  # pydantic's name for an unknown key of a dataclass


class ConfigError(ValueError):
    """All errors of a configuration.

    Attributes:
        errors: One message per error.
    """

    def __init__(self, errors: Sequence[str]) -> None:
        self.errors = list(errors)
        super().__init__("\n".join(f"  - {error}" for error in self.errors))


def plain(config: Any) -> dict[str, Any]:
    """Return a configuration as plain dictionaries and lists, ready for YAML or JSON."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def validate(
    values: dict[str, Any], schema: type[Config], rules: Sequence[Rule] = (), prefix: str = ""
) -> Config:
    """Return `values` as an instance of the dataclass `schema`.

    Args:
        rules: Applied when every section that a rule names is valid on its own.
        prefix: Written before each key in messages, such as `hardware.`.

    Raises:
        ConfigError: unknown keys, wrong types, broken bounds and broken rules, all together.
    """
    from pydantic import TypeAdapter, ValidationError  # 0.1 s that `--help` does not need

    config, by_key = None, dict[str, list[Any]]()
    try:
        config = TypeAdapter(schema).validate_python(values)
    except ValidationError as error:
        for item in error.errors():  # a union reports one error per member
            by_key.setdefault(_dotted(item, values), []).append(item)
    errors = [
        message
        for key, items in by_key.items()
        for message in _messages(prefix, key, items, schema)
    ]
    values = copy.deepcopy(values)  # unknown keys are removed: the rules of their section apply
    unknown = [key for key, items in by_key.items() if items[0]["type"] == UNKNOWN]
    for key in unknown:
        _remove(values, key)
    invalid = {re.split(r"[.[]", key)[0] for key in by_key.keys() - unknown}
    sections: dict[str, Any] = {}
    hints = fields_of(schema)
    for name in hints.keys() & values.keys() - invalid:
        section = TypeAdapter(hints[name]).validate_python(values[name])
        if booleans := list(_booleans_as_numbers(f"{prefix}{name}", values[name], section)):
            errors += booleans
        else:
            sections[name] = section
    for rule in rules:
        names = inspect.signature(rule).parameters
        if names.keys() <= sections.keys():
            errors += rule(**{name: sections[name] for name in names})
    if errors or config is None:
        raise ConfigError(errors)
    return config


def annotations_along(schema: Any, path: Sequence[str]) -> Iterator[Any]:
    """Yield the annotation of each name of a path, until a name is unknown.

    Names below a dict or a list are its keys.
    """
    annotation = schema
    for name in path:
        container = next(
            (one for one in _members(annotation) if get_origin(one) in (dict, list)), None
        )
        if container is not None:
            annotation = get_args(container)[-1]
        else:
            annotation = fields_of(annotation).get(name)
        if annotation is None:
            return
        yield annotation


def fields_of(annotation: Any) -> dict[str, Any]:
    """Return the fields of a dataclass, also in `X | None`, with their annotations."""
    for member in _members(annotation):
        if dataclasses.is_dataclass(member):
            hints = get_type_hints(member, include_extras=True)
            return {field.name: hints[field.name] for field in dataclasses.fields(member)}
    return {}


def _members(annotation: Any) -> list[Any]:
    """Return the members of a union, without `Annotated`."""
    if get_origin(annotation) is Annotated:
        return _members(get_args(annotation)[0])
    if get_origin(annotation) in (UnionType, Union):
        return [inner for one in get_args(annotation) for inner in _members(one)]
    return [annotation]


def _dotted(item: Any, values: Any) -> str:
    """Return the dotted key of a pydantic error, without the names of union members."""
    key = ""
    absent = item["type"] in ("missing", UNKNOWN)
    for part in item["loc"]:
        known = part in values if isinstance(values, dict) else isinstance(part, int)
        if known or (absent and part == item["loc"][-1]):
            key += f"[{part}]" if isinstance(values, list) else f".{part}"
            try:
                values = values[part] if known else None
            except IndexError:  # the list is too short
                values = None
    return key.removeprefix(".")


def _remove(values: Any, key: str) -> None:
    """Delete a dotted key."""
    *parents, last = key.replace("[", ".").replace("]", "").split(".")
    for name in parents:
        values = values[int(name) if isinstance(values, list) else name]
    values.pop(last, None)


def _messages(prefix: str, key: str, items: list[Any], schema: Any) -> list[str]:
    """Return the messages of one key from pydantic's errors."""
    item, name = items[0], prefix + key
    kind, value = item["type"], item["input"]
    path = key.replace("[", ".").replace("]", "").split(".")
    annotations = list(annotations_along(schema, path))
    if kind == "value_error":  # raised by __post_init__, one message per line
        return str(item["ctx"]["error"]).split("\n")
    if kind == UNKNOWN:
        parent = annotations[-1] if len(path) > 1 else schema
        known, above = fields_of(parent), name.rpartition(".")[0]
        near = difflib.get_close_matches(path[-1], known, n=1)
        if near:
            return [f"Unknown key {name}. Did you mean {f'{above}.{near[0]}'.lstrip('.')}?"]
        return [f"Unknown key {name}. Known keys: {', '.join(known)}"]
    if kind == "missing":
        to = f"to the list {name.partition('[')[0]}" if "[" in name else f"{name}=… to the command"
        return [f"{name} has no value; add {'it ' if '[' in name else ''}{to}"]
    or_null = " or null" if annotations and type(None) in _members(annotations[-1]) else ""
    shown = f"{name}={_shown(value)}"
    if isinstance(value, bool):
        return [f"{shown} {NOT_A_NUMBER}"]
    pairs = [_rule_and_remedy(one["type"], one.get("ctx") or {}) for one in items]
    rule = next((rule for rule, _ in reversed(pairs) if rule), "has the wrong type")
    remedy = " or ".join(
        remedy or one["msg"].removeprefix("Input should be ").partition(",")[0]
        for (_, remedy), one in zip(pairs, items, strict=True)
    )
    if or_null:  # "a, b or c" becomes "a, b, c or null"
        remedy = remedy.replace(" or ", ", ")
    return [f"{shown} {rule}; use {remedy}{or_null}"]


def _rule_and_remedy(kind: str, context: dict[str, Any]) -> tuple[str, str]:
    """Return the rule that a value breaks and its remedy; empty for a wrong type."""
    if kind == "literal_error":
        return "is not a valid choice", context["expected"].replace("'", "")
    if kind == "string_too_short":
        return "is empty", "a non-empty text"
    if kind == "too_short":
        return "is empty", "a list with at least one item"
    for name, rule, remedy in (
        ("greater_than_equal", "is below {}", "at least {}"),
        ("greater_than", "is not above {}", "a number above {}"),
        ("less_than_equal", "is above {}", "at most {}"),
        ("less_than", "is not below {}", "a number below {}"),
    ):
        if kind == name:
            limit = next(iter(context.values()))
            limit = int(limit) if isinstance(limit, float) and limit.is_integer() else limit
            return rule.format(limit), remedy.format(limit)
    return "", ""


def _shown(value: Any) -> str:
    """Return a value in command-line syntax."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return repr(value) if isinstance(value, str) else str(value)


def _booleans_as_numbers(key: str, given: Any, validated: Any) -> Iterator[str]:
    """Yield an error for each true or false that pydantic has converted to 1 or 0."""
    if isinstance(given, bool) and not isinstance(validated, bool):
        yield f"{key}={_shown(given)} {NOT_A_NUMBER}"
    elif isinstance(given, dict):
        for name, value in given.items():
            taken = validated[name] if isinstance(validated, dict) else getattr(validated, name)
            yield from _booleans_as_numbers(f"{key}.{name}", value, taken)
    elif isinstance(given, list | tuple):
        for index, (value, taken) in enumerate(zip(given, validated, strict=True)):
            yield from _booleans_as_numbers(f"{key}[{index}]", value, taken)
